"""Artefacts reduced to small frames, one row a part where they are large; nothing here holds more than a batch of a large column."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import safe_open

from ommatid.config import Params, TrainParams
from ommatid.store import Artefact

Frames = dict[str, pd.DataFrame]

SHOWN = 3
"""So many failing rows of a part are named; the rest are counted."""

RELATIONS = ("images", "latents", "examples", "firings", "labels", "neighbours", "features", "runs")


def images(artefact: Artefact, params: Params) -> Frames:
    """Frames `parts` (one row a part), `splits` (one a split) and `whole` (one row)."""
    files = _files(artefact, "images")
    parts = [{**_select(_IMAGE_PART, [path]), **_encoded(artefact, path.name)} for path in files]
    counts = {split: _select(f"count(*) FILTER (split = '{split}') AS n", files)["n"] if files else 0 for split in ("train", "eval")}
    splits = pd.DataFrame({"split": counts.keys(), "images": counts.values()})
    return {"parts": _frame(parts), "splits": splits, "whole": pd.DataFrame([_image_set(artefact, files)])}


_IMAGE_PART = f"""
    count(*) AS rows,
    count(*) FILTER (width < 1 OR height < 1) AS "images without size",
    arg_min('image ' || image || ' ' || path, image, {SHOWN}) FILTER (width < 1 OR height < 1) AS "first without size",
    count(*) FILTER (split NOT IN ('train', 'eval')) AS "images of unknown split",
    arg_min('image ' || image || ' ' || split, image, {SHOWN}) FILTER (split NOT IN ('train', 'eval')) AS "first of unknown split"
"""


def _encoded(artefact: Artefact, part: str) -> dict[str, Any]:
    """Images whose bytes are empty, read a few at a time: one photograph may be tens of megabytes."""
    empty: list[str] = []
    for batch in _batches(artefact, part, ["image", "encoded"], n_rows=64):
        lengths = pc.call_function("binary_length", [batch["encoded"]]).fill_null(0).to_numpy(zero_copy_only=False)
        empty += [f"image {image}" for image in batch["image"].to_numpy()[lengths == 0]]
    return {"images without bytes": len(empty), "first without bytes": _named(empty[:SHOWN])}


def _image_set(artefact: Artefact, files: list[Path]) -> dict[str, Any]:
    repeated = _rows("SELECT image_id, count(*) AS n FROM {} GROUP BY ALL HAVING n > 1 ORDER BY image_id", files)
    keys = _rows("SELECT image, count(*) AS n FROM {} GROUP BY ALL HAVING n > 1 ORDER BY image", files)
    rejected = _rows("SELECT path, reason FROM {} WHERE reason <> 'duplicate' ORDER BY path", _files(artefact, "rejected"))
    n = artefact.rows("images")
    return {
        "set": "all images",
        "repeated ids": len(repeated),
        "first repeated ids": _named([f"{id_} ({times} times)" for id_, times in repeated[:SHOWN]]),
        "repeated keys": len(keys),
        "first repeated keys": _named([f"image {image} ({times} times)" for image, times in keys[:SHOWN]]),
        "rejected share": len(rejected) / max(1, n + len(rejected)),
        "first rejected": _named([f"{path} ({reason})" for path, reason in rejected[:10]]),
    }


def extract(artefact: Artefact, params: Params) -> Frames:
    """Frames `parts` (activations), `embeddings` (one row a part and vector), `judges`, `splits` and `whole`, of all hookpoints."""
    frames = [_hookpoint(name, artefact.child(name, "activations")) for name in artefact.children]
    return {name: pd.concat([frame[name] for frame in frames], ignore_index=True) for name in frames[0]}


def _hookpoint(hookpoint: str, artefact: Artefact) -> Frames:
    # read where they are: of all artefacts this one may be too large for the disk of this machine
    tables = {table: artefact.parts(table) if table in artefact.tables else [] for table in ("train", "eval", "embeddings")}
    parts = [_activations(artefact, part) for table in ("train", "eval") for part in tables[table]]
    vectors = [_vectors(artefact, part, name) for part in tables["embeddings"] for name in _vector_names(artefact, part)]
    splits = [{"split": table, "tokens": artefact.rows(table)} for table in ("train", "eval")]
    whole = [_image_match(artefact, tables["train"] + tables["eval"], tables["embeddings"])]
    if artefact.summary.get("source") == "files":
        whole = []  # imported without images: there is nothing to embed
    frames = {"parts": parts, "embeddings": vectors, "judges": _judges(vectors), "splits": splits, "whole": whole}
    return {name: _frame([_of(hookpoint, row) for row in rows]) for name, rows in frames.items()}


def _of(hookpoint: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row, its name beginning with the hookpoint's."""
    name, *_ = row
    return row | {name: f"{hookpoint}, {row[name]}"}


_MAGNITUDE, _INFINITY = np.uint16(0x7FFF), 0x7C00
"""Bits of a float16 without its sign order as its magnitude does: NaN above infinity above every finite number (IEEE 754)."""


def _activations(artefact: Artefact, part: str) -> dict[str, Any]:
    bad: dict[str, list[np.ndarray]] = {"NaN": [], "infinity": [], "only zeros": []}
    rows, largest = 0, 0
    for batch in _batches(artefact, part, ["image", "token", "x"], n_rows=2048):
        bits = _vector_bits(batch["x"], np.uint16)
        top = (bits & _MAGNITUDE).max(axis=1)
        places = np.stack([batch["image"].to_numpy(), batch["token"].to_numpy()], axis=1)
        for name, mask in (("NaN", top > _INFINITY), ("infinity", top == _INFINITY), ("only zeros", top == 0)):
            bad[name].append(places[mask])
        rows += batch.num_rows
        largest = max(largest, int(top[top < _INFINITY].max(initial=0)))
    profile: dict[str, Any] = {"part": part, "rows": rows, "largest": float(np.array(largest, np.uint16).view(np.float16))}
    for name, found in bad.items():
        where = np.concatenate(found) if found else np.empty((0, 2), np.int32)
        profile[f"tokens with {name}"] = len(where)
        profile[f"first with {name}"] = _named([f"image {image} token {token}" for image, token in where[:SHOWN]])
    return profile


def _vector_names(artefact: Artefact, part: str) -> list[str]:
    with artefact.open_part(part) as file:
        return [name for name in file.schema_arrow.names if name != "image"]


def _vectors(artefact: Artefact, part: str, name: str) -> dict[str, Any]:
    """How many are damaged; of a judge, all NaN says that it failed on the image, which is none."""
    lost: list[int] = []
    off: list[int] = []
    embedded = 0
    for batch in _batches(artefact, part, ["image", name], n_rows=4096):
        vectors = _vector_bits(batch[name], np.float32).astype(np.float64)
        failed = np.isnan(vectors).all(axis=1) & (name != "joint")
        norms = np.linalg.norm(vectors, axis=1)
        image = batch["image"].to_numpy()
        lost += image[~np.isfinite(norms) & ~failed].tolist()
        off += image[np.isfinite(norms) & (np.abs(norms - 1) > 1e-3)].tolist()
        embedded += int((~failed).sum())
    profile: dict[str, Any] = {"part": f"{part}, {name}", "vector": name, "embedded": embedded}
    for what, found in (("not finite", lost), ("not of unit norm", off)):
        profile[f"embeddings {what}"] = len(found)
        profile[f"first {what}"] = _named([f"image {image}" for image in found[:SHOWN]])
    return profile


def _judges(vectors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each judge the images that it embedded."""
    names = dict.fromkeys(row["vector"] for row in vectors if row["vector"] != "joint")
    return [{"judge": name, "images embedded": sum(row["embedded"] for row in vectors if row["vector"] == name)} for name in names]


def _image_match(artefact: Artefact, activations: list[str], embeddings: list[str]) -> dict[str, Any]:
    """How the images of the two kinds of table differ."""
    whole: dict[str, Any] = {"set": "all images"}
    if not activations or not embeddings:
        missing = "activations" if not activations else "embeddings"
        return whole | {"unmatched images": None, "first unmatched": missing, "repeated embeddings": 0, "first repeated": ""}
    captured = np.unique(np.concatenate([np.unique(_images_of(artefact, part)) for part in activations]))
    embedded, times = np.unique(np.concatenate([_images_of(artefact, part) for part in embeddings]), return_counts=True)
    for what, found in (("unmatched images", np.setxor1d(captured, embedded)), ("repeated embeddings", embedded[times > 1])):
        whole |= {what: len(found), f"first {what.split()[0]}": _named([f"image {image}" for image in found[:SHOWN]])}
    return whole


def _images_of(artefact: Artefact, part: str) -> np.ndarray:
    return artefact.read_part(part, ["image"])["image"].to_numpy()


_TENSORS = {"W_enc": ("ms",), "b_enc": ("s",), "W_dec": ("so",), "b_dec": ("o",), "threshold": ("", "s")}
"""Shapes that each tensor may have, a letter a dimension: m is d_model, s d_sae, o what is decoded: d_model but in a transcoder."""
_GATED = {"gate_scale": ("s",), "gate_shift": ("s",)}
"""Of a gated SAE besides."""


def train(artefact: Artefact, params: Params) -> Frames:
    """Frames `tensors` (one row a tensor), `directions` (one a latent) and `final` (the last row of the curves)."""
    path = artefact.file("sae.safetensors")
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        is_gated = params.train.variant.kind == "gated" or _GATED.keys() & names
        shapes = _TENSORS | (_GATED if is_gated else {})
        sizes = _sizes(file, names, params.train)
        tensors = _frame([_tensor(file, names, name, [[sizes[letter] for letter in shape] for shape in shapes[name]]) for name in shapes])
        norms = np.linalg.norm(file.get_tensor("W_dec"), axis=1) if "W_dec" in names else np.empty(0)
    curves = artefact.read("curves").to_pandas() if "curves" in artefact.tables else pd.DataFrame(columns=["step", "fvu", "l0", "dead"])
    directions = pd.DataFrame({"latent": np.arange(len(norms)), "norm": norms.astype(np.float64)})
    counts = pd.DataFrame([{"table": "curves", "rows": len(curves)}])
    return {"tensors": tensors, "directions": directions, "final": curves.tail(1).reset_index(drop=True), "counts": counts}


def _sizes(file: Any, names: set[str], params: TrainParams) -> dict[str, int | None]:
    """Size of each letter of a shape; None where the tensor that has it is missing."""
    d_out = file.get_slice("b_dec").get_shape()[0] if "b_dec" in names else None
    d_in = file.get_slice("W_enc").get_shape()[0] if "W_enc" in names else None
    return {"m": d_out if params.target is None else d_in, "s": params.d_sae, "o": d_out}


def _tensor(file: Any, names: set[str], name: str, shapes: list[list[int | None]]) -> dict[str, Any]:
    if name not in names:
        return {"tensor": name, "problem": "missing", "values not finite": 0}
    value = file.get_tensor(name)
    fits = list(value.shape) in shapes and value.dtype == np.float32
    problem = "" if fits else f"{value.dtype} {list(value.shape)}, expected float32 {' or '.join(map(str, shapes))}"
    return {"tensor": name, "problem": problem, "values not finite": int(value.size - np.isfinite(value).sum())}


def evaluate(artefact: Artefact, params: Params) -> Frames:
    """Frames `latents`, `counts` (one row), `sizes` (one a table), `examples` and `firings` (one a part)."""
    latents = _table(artefact, "latents", ["latent", "density", "is_dead", "ms"])
    known = set(latents["latent"].tolist())
    latents["dead disagrees"] = latents["is_dead"].astype(bool) != (latents["density"] == 0)
    comparisons = _table(artefact, "comparisons", ["dictionary", "fvu"])
    fvu = dict(zip(comparisons["dictionary"], comparisons["fvu"], strict=True))
    odd = sorted((set(range(params.train.d_sae)) ^ known) | set(latents["latent"][latents["latent"].duplicated()].tolist()))
    counts = {
        "set": "all latents",
        "latents missing or repeated": len(odd),
        "first missing": _named([f"latent {n}" for n in odd[:SHOWN]]),
        "latents with ms": latents["ms"].count(),
        "fvu of the sae": fvu.get("sae", np.nan),
        "fvu below untrained": fvu.get("untrained", np.nan) - fvu.get("sae", np.nan),
        "dictionaries missing": len({"sae", "untrained", "neurons"} - set(fvu)),
        "first dictionaries": _named(sorted({"sae", "untrained", "neurons"} - set(fvu))),
    }
    return {
        "latents": latents,
        "counts": pd.DataFrame([counts]),
        "examples": _frame([_select(_EXAMPLE_PART, [path]) for path in _files(artefact, "examples")]),
        "firings": _frame([_select(_firing_part(params.train.d_sae), [path]) for path in _files(artefact, "firings")]),
        "sizes": pd.DataFrame([{"table": table, "rows": artefact.rows(table)} for table in ("examples", "firings")]),
    }


_EXAMPLE_PART = f"""
    count(*) AS rows,
    count(*) FILTER (decile NOT BETWEEN 1 AND 10) AS "examples of no decile",
    arg_min('latent ' || latent || ' image ' || image || ' decile ' || decile, latent, {SHOWN})
        FILTER (decile NOT BETWEEN 1 AND 10) AS "first of no decile",
    count(*) FILTER (rank < 1) AS "examples of no rank",
    arg_min('latent ' || latent || ' image ' || image, latent, {SHOWN}) FILTER (rank < 1) AS "first of no rank"
"""


def _firing_part(d_sae: int) -> str:
    bad = f"NOT (act > 0 AND isfinite(act)) OR latent NOT BETWEEN 0 AND {d_sae - 1}"
    return f"""
        count(*) AS rows,
        count(*) FILTER ({bad}) AS "rows that are no firing",
        arg_min('image ' || image || ' latent ' || latent || ' act ' || act, image, {SHOWN}) FILTER ({bad}) AS "first no firing"
    """


def label(artefact: Artefact, params: Params) -> Frames:
    """Frames `labels` and `counts` (one row)."""
    labels = _table(artefact, "labels", ["latent", "status", "label", "score", "control_score"])
    ok = labels["status"] == "ok"
    labels["label disagrees with status"] = ok != labels["label"].notna()
    labels["score without status ok"] = labels["score"].notna() & ~ok
    missing = sorted(set(range(params.train.d_sae)) - set(labels["latent"].tolist()))
    counts = {
        "set": "all labels",
        "ok labels": labels["label"][ok].size,
        "latents without a row": len(missing),
        "first without a row": _named([f"latent {n}" for n in missing[:SHOWN]]),
    }
    return {"labels": labels, "counts": pd.DataFrame([counts])}


def catalog(artefact: Artefact, params: Params) -> Frames:
    """Frames `relations` (one row a relation) and `features` (one row)."""
    with duckdb.connect(str(artefact.file("catalog.duckdb")), read_only=True) as connection:
        relations = [_relation(connection, name) for name in RELATIONS]
        readable = all(row["rows"] is not None for row in relations)
        features = _features(connection) if readable else {"latents not in features once": None, "first such": ""}
    return {"relations": _frame(relations), "features": pd.DataFrame([{"relation": "features", **features}])}


def _relation(connection: duckdb.DuckDBPyConnection, name: str) -> dict[str, Any]:
    try:
        row = connection.execute(f"SELECT count(*) FROM {name}").fetchone()
    except duckdb.Error as error:
        return {"relation": name, "problem": f"cannot be read: {str(error).splitlines()[0]}", "rows": None}
    assert row is not None, name
    return {"relation": name, "problem": "" if row[0] else "empty", "rows": row[0]}


def _features(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    features = "(SELECT sae, latent, count(*) AS n FROM features GROUP BY ALL)"
    odd = connection.execute(
        f"SELECT latent, coalesce(n, 0) FROM latents FULL JOIN {features} USING (sae, latent) "
        "WHERE n IS DISTINCT FROM 1 OR density IS NULL ORDER BY latent"
    ).fetchall()
    return {"latents not in features once": len(odd), "first such": _named([f"latent {n} ({times} times)" for n, times in odd[:SHOWN]])}


PROFILES: Mapping[str, Callable[[Artefact, Params], Frames]] = {
    "images": images,
    "extract": extract,
    "train": train,
    "evaluate": evaluate,
    "label": label,
    "catalog": catalog,
}


def _files(artefact: Artefact, table: str) -> list[Path]:
    """Files of a table; none where the artefact has no such table: a suite names what is missing better than an error."""
    return artefact.files(table) if table in artefact.tables else []


def _table(artefact: Artefact, table: str, columns: list[str]) -> pd.DataFrame:
    return artefact.read(table, columns).to_pandas() if table in artefact.tables else pd.DataFrame(columns=columns)


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows)


def _named(places: list[str] | None) -> str:
    return ", ".join(places or ())


def _scan(files: list[Path]) -> str:
    names = ", ".join("'" + str(path).replace("'", "''") + "'" for path in files)
    return f"read_parquet([{names}], hive_partitioning=false)"


def _query(sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(config={"autoinstall_known_extensions": False, "memory_limit": "1GB"}) as connection:
        return connection.execute(sql).fetchall()


def _rows(sql: str, files: list[Path]) -> list[tuple[Any, ...]]:
    """Answer of `sql`, whose {} stands for all rows of the files; nothing without files."""
    return _query(sql.format(_scan(files))) if files else []


def _select(columns: str, files: list[Path]) -> dict[str, Any]:
    """One row of aggregates over the files, with the first one's name; lists of places become text."""
    with duckdb.connect(config={"autoinstall_known_extensions": False, "memory_limit": "1GB"}) as connection:
        cursor = connection.execute(f"SELECT {columns} FROM {_scan(files)}")
        names = [column[0] for column in cursor.description or ()]
        values = cursor.fetchone() or ()
    row = {name: _named(value) if name.startswith("first") else value for name, value in zip(names, values, strict=True)}
    return {"part": files[0].name, **row}


def _batches(artefact: Artefact, part: str, columns: list[str], n_rows: int) -> Iterator[pa.RecordBatch]:
    with artefact.open_part(part) as file:
        yield from file.iter_batches(batch_size=n_rows, columns=columns)


def _vector_bits(column: pa.Array, dtype: Any) -> np.ndarray:
    """A column of fixed-size binary as an array (rows, width) of `dtype`, without a copy."""
    width = column.type.byte_width // np.dtype(dtype).itemsize
    data = column.buffers()[1]
    offset = column.offset * column.type.byte_width
    return np.frombuffer(data, dtype=dtype, count=len(column) * width, offset=offset).reshape(len(column), width)
