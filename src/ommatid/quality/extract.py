"""What is checked of activations: they are numbers that an SAE can learn from, and every image has its embeddings."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, filled, iter_batches, named, within, zero
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Frames `parts` (activations), `embeddings` (one row a part and vector), `judges`, `splits` and `whole`, of all hookpoints."""
    frames = [_hookpoint(name, artefact.child(name, "activations")) for name in artefact.children]
    return {name: pd.concat([frame[name] for frame in frames], ignore_index=True) for name in frames[0]}


def _hookpoint(hookpoint: str, artefact: Artefact) -> Frames:
    # parts are read where they lie: of all artefacts this one may be too large for the disk of this machine
    tables = {table: artefact.parts(table) if table in artefact.tables else [] for table in ("train", "eval", "embeddings")}
    parts = [_activations(artefact, part) for table in ("train", "eval") for part in tables[table]]
    vectors = [_vectors(artefact, part, name) for part in tables["embeddings"] for name in _vector_names(artefact, part)]
    splits = [{"split": table, "tokens": artefact.rows(table)} for table in ("train", "eval")]
    whole = [_image_match(artefact, tables["train"] + tables["eval"], tables["embeddings"])]
    if artefact.summary.get("source") == "files":
        whole = []  # imported without images: there is nothing to embed
    frames = {"parts": parts, "embeddings": vectors, "judges": _judges(vectors), "splits": splits, "whole": whole}
    return {name: pd.DataFrame([_of(hookpoint, row) for row in rows]) for name, rows in frames.items()}


def _of(hookpoint: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row, with the name of the hookpoint before its own."""
    name, *_ = row
    return row | {name: f"{hookpoint}, {row[name]}"}


_MAGNITUDE, _INFINITY = np.uint16(0x7FFF), 0x7C00
"""The bits of a float16 without its sign sort like its magnitude: NaN above infinity above every finite number (IEEE 754)."""


def _activations(artefact: Artefact, part: str) -> dict[str, Any]:
    """A row of frame `parts`: tokens of a part whose activation is damaged, and the largest finite magnitude."""
    bad: dict[str, list[np.ndarray]] = {"NaN": [], "infinity": [], "only zeros": []}
    rows, largest = 0, 0
    for batch in iter_batches(artefact, part, ["image", "token", "x"], n_rows=2048):
        bits = _vector_bits(batch["x"], np.uint16)
        top = (bits & _MAGNITUDE).max(axis=1)
        places = np.stack([batch["image"].to_numpy(), batch["token"].to_numpy()], axis=1)
        for name, mask in (("NaN", top > _INFINITY), ("infinity", top == _INFINITY), ("only zeros", top == 0)):
            bad[name].append(places[mask])
        rows += batch.num_rows
        largest = max(largest, int(top[top < _INFINITY].max(initial=0)))
    row: dict[str, Any] = {"part": part, "rows": rows, "largest": float(np.array(largest, np.uint16).view(np.float16))}
    for name, found in bad.items():
        where = np.concatenate(found) if found else np.empty((0, 2), np.int32)
        row[f"tokens with {name}"] = len(where)
        row[f"first with {name}"] = named([f"image {image} token {token}" for image, token in where[:SHOWN]])
    return row


def _vector_names(artefact: Artefact, part: str) -> list[str]:
    with artefact.open_part(part) as file:
        return [name for name in file.schema_arrow.names if name != "image"]


def _vectors(artefact: Artefact, part: str, name: str) -> dict[str, Any]:
    """A row of frame `embeddings`: how many are damaged. All NaN is no damage: it says that a judge failed on the image."""
    lost: list[int] = []
    off: list[int] = []
    embedded = 0
    for batch in iter_batches(artefact, part, ["image", name], n_rows=4096):
        vectors = _vector_bits(batch[name], np.float32).astype(np.float64)
        failed = np.isnan(vectors).all(axis=1) & (name != "joint")
        norms = np.linalg.norm(vectors, axis=1)
        image = batch["image"].to_numpy()
        lost += image[~np.isfinite(norms) & ~failed].tolist()
        off += image[np.isfinite(norms) & (np.abs(norms - 1) > 1e-3)].tolist()
        embedded += int((~failed).sum())
    row: dict[str, Any] = {"part": f"{part}, {name}", "vector": name, "embedded": embedded}
    for what, found in (("not finite", lost), ("not of unit norm", off)):
        row[f"embeddings {what}"] = len(found)
        row[f"first {what}"] = named([f"image {image}" for image in found[:SHOWN]])
    return row


def _judges(vectors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of frame `judges`: how many images each judge embedded."""
    names = dict.fromkeys(row["vector"] for row in vectors if row["vector"] != "joint")
    return [{"judge": name, "images embedded": sum(row["embedded"] for row in vectors if row["vector"] == name)} for name in names]


def _image_match(artefact: Artefact, activations: list[str], embeddings: list[str]) -> dict[str, Any]:
    """The row of frame `whole`: how the images of the two kinds of table differ."""
    whole: dict[str, Any] = {"set": "all images"}
    if not activations or not embeddings:
        missing = "activations" if not activations else "embeddings"
        return whole | {"unmatched images": None, "first unmatched": missing, "repeated embeddings": 0, "first repeated": ""}
    captured = np.unique(np.concatenate([np.unique(_images_of(artefact, part)) for part in activations]))
    embedded, times = np.unique(np.concatenate([_images_of(artefact, part) for part in embeddings]), return_counts=True)
    for what, found in (("unmatched images", np.setxor1d(captured, embedded)), ("repeated embeddings", embedded[times > 1])):
        whole |= {what: len(found), f"first {what.split()[0]}": named([f"image {image}" for image in found[:SHOWN]])}
    return whole


def _images_of(artefact: Artefact, part: str) -> np.ndarray:
    return artefact.read_part(part, ["image"])["image"].to_numpy()


def _vector_bits(column: pa.Array, dtype: Any) -> np.ndarray:
    """A column of fixed-size binary as an array (rows, width) of `dtype`, without a copy."""
    width = column.type.byte_width // np.dtype(dtype).itemsize
    data = column.buffers()[1]
    offset = column.offset * column.type.byte_width
    return np.frombuffer(data, dtype=dtype, count=len(column) * width, offset=offset).reshape(len(column), width)


def rules(params: Params) -> list[Rule]:
    """Rules under which activations are numbers that an SAE can learn from, and every image has its embeddings."""
    return [
        within(
            "splits", "tokens", "both splits have tokens", "nothing can be trained or evaluated without tokens", row="split", min_value=1
        ),
        zero(
            "parts",
            "tokens with NaN",
            "no activation is NaN",
            "one NaN spreads to every weight of the SAE in one step",
            first="first with NaN",
        ),
        zero(
            "parts",
            "tokens with infinity",
            "no activation is infinite",
            "float16 ends at 65504: a larger activation was cut, and its loss is infinite",
            first="first with infinity",
        ),
        zero(
            "parts",
            "tokens with only zeros",
            "no activation is all zeros",
            "a hookpoint that gives zeros is dead or wrong, and a cosine with zero is undefined",
            first="first with only zeros",
        ),
        filled(
            "whole", "unmatched images", "activations and embeddings are both present", "scores join activations with embeddings", row="set"
        ),
        zero(
            "whole",
            "unmatched images",
            "activations and embeddings are of the same images",
            "a score over images that lack one of the two would be a score over other images than it says",
            row="set",
            first="first unmatched",
        ),
        zero(
            "whole",
            "repeated embeddings",
            "every image has one embedding",
            "a repeated image would weigh twice in monosemanticity",
            row="set",
            first="first repeated",
        ),
        zero(
            "embeddings",
            "embeddings not finite",
            "embeddings are finite",
            "one NaN makes every monosemanticity score NaN; only all NaN says that a judge failed on an image, which is then left out",
            first="first not finite",
        ),
        within(
            "judges",
            "images embedded",
            "every judge embedded some image",
            "a judge that failed on all images has no score of anything",
            row="judge",
            min_value=1,
        ),
        zero(
            "embeddings",
            "embeddings not of unit norm",
            "embeddings have unit norm",
            "scores take dot products of embeddings for cosines",
            first="first not of unit norm",
        ),
    ]
