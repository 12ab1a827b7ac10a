"""A generated catalogue of the size of a large study, built by the stage `catalog` from artefacts drawn at random.

It has 65,536 latents x 768, 1.3 million examples, 16 million firings on 50,000 evaluation images of 1,000 classes, and a second SAE of
4,096 latents with which the first is matched. The number of images on which a latent fires follows a log-normal distribution from 1 to
20,000, with some dead latents. Most latents prefer one class. Labels, scores and statistics are consistent with each other: a dead latent
has no score, a rare one no label.
"""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from safetensors.numpy import save_file

from ommatid import schemas, store
from ommatid.catalog import stage
from ommatid.catalog.stage import CATALOG, build_catalog
from ommatid.config import CatalogParams
from ommatid.store import Artefact, Draft, part_name

N_CLASSES = 1000
CLASS_IMAGES = 50
"""Evaluation images of a class."""
N_IMAGES, N_EVAL = 60_000, N_CLASSES * CLASS_IMAGES
"""Images in all, and those of the evaluation split, which come first."""
WIDTH = 768
"""Width of activations and of joint embeddings."""
GRID = 7
"""Rows and columns of a heat map."""
N_TOP = 12
"""Strongest images that are kept as examples; one more is kept of each lower decile."""
JUDGES = ("judge_a", "judge_b")
N_TESTED, N_DRAWS, DOSES = 256, 8, (0.0, 0.5, 1.0)
"""Latents of an SAE that interventions test, draws of a random control, and doses."""
THUMBNAILS = 1500
"""Distinct pictures among the thumbnails; each thumbnail has bytes of its own."""
FIRINGS_PER_PART = 2**20


@dataclass(frozen=True)
class Size:
    """Size of an SAE and of its evaluation."""

    name: str
    d_sae: int
    n_firings: int

    @property
    def sae(self) -> str:
        return f"{self.name}-{self.d_sae:08x}"


SAES = (Size("batch_topk-65536-k32-s0", 65_536, 16_000_000), Size("batch_topk-4096-k32-s0", 4096, 1_000_000))


@dataclass(frozen=True)
class Fired:
    """Firings of an SAE, latent after latent, each from the strongest image to the weakest."""

    latent: np.ndarray
    image: np.ndarray
    act: np.ndarray
    n: np.ndarray
    """Images on which each latent fires, (d_sae,)."""
    favourite: np.ndarray
    """Class that each latent prefers, (d_sae,)."""

    @property
    def place(self) -> np.ndarray:
        """Place of each firing among those of its latent, from 0."""
        return np.arange(len(self.latent)) - np.repeat(np.cumsum(self.n) - self.n, self.n)


def catalogue(folder: Path) -> Path:
    """Return the generated catalogue in a folder, building it first if it is not there, or if this file or the relations have changed.

    Args:
        folder: Folder that only this function writes to.

    Returns:
        The DuckDB file.
    """
    path, stamp = folder / "catalog" / CATALOG, folder / "made-by"
    sources = [Path(__file__), Path(schemas.__file__), *sorted(Path(stage.__file__).parent.rglob("*.sql"))]
    wanted = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    if not (path.exists() and stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        build(generate(folder), folder / "catalog")
        stamp.write_text(wanted)
    return path


def build(inputs: Mapping[str, Artefact], place: Path) -> float:
    """Build the catalogue of some artefacts, and return the seconds that the stage took."""
    params = CatalogParams(n_neighbours=8)
    shutil.rmtree(place, ignore_errors=True)
    start = time.perf_counter()
    with store.open_draft(place, "catalog", params.model_dump(mode="json"), inputs) as draft:
        build_catalog(params, inputs, draft, {})
        draft.publish(place)
    return time.perf_counter() - start


def generate(root: Path) -> dict[str, Artefact]:
    """Make the artefacts of all stages before `catalog`."""
    rng = np.random.default_rng(0)
    words = _class_names(rng)
    images = _make(root / "images", "images", lambda draft: _images(draft, words), {}, limit=N_IMAGES)
    activations = _make(root / "activations", "activations", _embeddings, {"images": images}, hookpoint="vision.blocks.11")
    fired = {size.name: _draw_firings(size, np.random.default_rng(size.d_sae)) for size in SAES}
    training = _make(root / "sae", "training", _inside("sae", _sae), {"extract": activations}, k=32)
    inputs = {"images": images, "extract": activations, "train": training}

    def evaluations(draft: Draft) -> Mapping[str, Any]:
        summary = _inside("evaluation", lambda child, size: _evaluation(child, size, fired[size.name], words))(draft)
        _matches(draft)
        return summary

    evaluated = _make(root / "evaluation", "evaluations", evaluations, inputs, n_top=N_TOP)
    labelled = _make(
        root / "labels",
        "labellings",
        _inside("labels", lambda child, size: _labels(child, size, fired[size.name], words)),
        {"evaluate": evaluated},
        seed=0,
    )
    tested = _make(root / "interventions", "interventions", _inside("effects", _effects), {"label": labelled}, draws=N_DRAWS)
    return {**inputs, "evaluate": evaluated, "label": labelled, "intervene": tested}


def _make(place: Path, kind: str, fill: Callable[[Draft], Mapping[str, Any]], inputs: Mapping[str, Artefact], **params: Any) -> Artefact:
    with store.open_draft(place, kind, params, inputs) as draft:
        draft.seal(fill(draft))
        return draft.publish(place)


def _inside(kind: str, fill: Callable[[Draft, Size], Mapping[str, Any]]) -> Callable[[Draft], Mapping[str, Any]]:
    """Return a function that fills an artefact with one inner artefact for each SAE."""

    def fill_all(draft: Draft) -> Mapping[str, Any]:
        for size in SAES:
            child = draft.child(size.name, kind, {"k": 32, "d_sae": size.d_sae} if kind == "sae" else None)
            child.seal(fill(child, size))
        return {"saes": [size.name for size in SAES]}

    return fill_all


# ---- images


def _class_names(rng: np.random.Generator) -> list[str]:
    from ommatid.vlm import imagenet_classes

    return [*imagenet_classes()][:N_CLASSES]


def _images(draft: Draft, words: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    pictures = [_thumbnail(rng) for _ in range(THUMBNAILS)]
    for part in range(0, N_IMAGES, 10_000):
        numbers = np.arange(part, part + 10_000)
        classes = numbers % N_CLASSES
        ids = [rng.bytes(32).hex() for _ in numbers]
        table = {
            "image": numbers.astype(np.int32),
            "image_id": ids,
            "path": [f"{words[c].replace(' ', '_')}/{i[:12]}.jpg" for c, i in zip(classes, ids, strict=True)],
            "split": ["eval" if n < N_EVAL else "train" for n in numbers],
            "width": rng.integers(320, 640, len(numbers)).astype(np.int32),
            "height": rng.integers(320, 640, len(numbers)).astype(np.int32),
            "label": [words[c] for c in classes],
            "captions": [
                [f"a photograph of a {words[c]} beside a {words[o]}"] for c, o in zip(classes, rng.permutation(classes), strict=True)
            ],
            "taxonomy": [f"entity/{c % 10}/{c % 100}/{words[c]}" for c in classes],
            # bytes after the picture's own are ignored by decoders, and make each thumbnail differ
            "thumbnail": [pictures[n % THUMBNAILS] + rng.bytes(16) for n in numbers],
            "encoded": [b"not kept"] * len(numbers),
        }
        draft.write_table(part_name("images", part // 10_000), pa.table(table, schema=schemas.IMAGES))
    return {}


def _thumbnail(rng: np.random.Generator, side: int = 96) -> bytes:
    """Draw a picture with the spectrum of a photograph, encoded as a thumbnail: about 2 kB."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    spectrum = np.fft.fft2(rng.standard_normal((3, side, side))) / np.maximum(frequency, 1 / side) ** 1.2
    planes = np.fft.ifft2(spectrum).real
    planes[1:] = 0.8 * planes[:1] + 0.4 * planes[1:]
    planes = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
    out = io.BytesIO()
    Image.fromarray((planes * 55 + 120).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(out, "WEBP", quality=80)
    return out.getvalue()


def _centres() -> np.ndarray:
    """Joint embedding around which those of each class lie, (N_CLASSES, WIDTH)."""
    return np.random.default_rng(2).standard_normal((N_CLASSES, WIDTH), dtype=np.float32)


def _embeddings(draft: Draft) -> dict[str, Any]:
    rng, centres = np.random.default_rng(3), _centres()
    schema = schemas.embeddings(WIDTH, WIDTH)
    for part in range(0, N_IMAGES, 10_000):
        numbers = np.arange(part, part + 10_000)
        joint = centres[numbers % N_CLASSES] + rng.standard_normal((len(numbers), WIDTH), dtype=np.float32) + 1
        columns = {"image": numbers.astype(np.int32), "joint": _binary(joint), "judge": _binary(joint[:, ::-1])}
        draft.write_table(part_name("embeddings", part // 10_000), pa.table(columns, schema=schema), compression="none")
    return {"d_joint": WIDTH, "grid": [GRID, GRID], "preprocessing": {"crop": [224, 224], "resize": [224]}}


def _binary(rows: np.ndarray) -> pa.Array:
    """Unit rows as fixed-width little-endian float32."""
    values = np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype="<f4")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * values.shape[1]), len(values), [None, pa.py_buffer(values)])


# ---- an SAE and its evaluation


def _sae(draft: Draft, size: Size) -> dict[str, Any]:
    shared = np.random.default_rng(5).standard_normal((SAES[-1].d_sae, WIDTH), dtype=np.float32)
    own = np.random.default_rng(size.d_sae).standard_normal((size.d_sae, WIDTH), dtype=np.float32)
    rows = min(len(shared), size.d_sae)
    own[:rows] = shared[:rows] + 0.3 * own[:rows]
    with draft.write_file("sae.safetensors") as path:
        save_file({"W_dec": own / np.linalg.norm(own, axis=1, keepdims=True)}, path)
    with draft.write_file("cfg.json") as path:
        config = {"variant": "batch_topk", "k": 32, "model": "clip", "hookpoint": "vision.blocks.11"}
        path.write_text(json.dumps(config), encoding="utf-8")
    return {"sae": size.sae}


def _draw_firings(size: Size, rng: np.random.Generator) -> Fired:
    wanted = np.exp(rng.normal(0, 1.6, size.d_sae))
    wanted[rng.random(size.d_sae) < 0.03] = 0
    scale = size.n_firings / wanted.sum()
    for _ in range(20):  # the longest and the shortest are cut, so the rest is scaled until the sum fits
        n = np.where(wanted > 0, (wanted * scale).clip(1, 20_000), 0)
        scale *= size.n_firings / n.sum()
    n = n.astype(np.int64)
    favourite = rng.integers(N_CLASSES, size=size.d_sae)
    keys = []
    for start in range(0, size.d_sae, 8192):
        latents = np.arange(start, min(start + 8192, size.d_sae))
        many = latents[n[latents] > 2000]
        drawn = [latent * N_EVAL + rng.choice(N_EVAL, n[latent], replace=False, shuffle=False) for latent in many]
        few = latents[n[latents] <= 2000]
        each = np.repeat(few, (n[few] * 1.02).astype(np.int64))
        own = favourite[each] + N_CLASSES * rng.integers(CLASS_IMAGES, size=len(each))
        image = np.where(rng.random(len(each)) < 0.3, own, rng.integers(N_EVAL, size=len(each)))
        keys.append(np.unique(np.concatenate([each * N_EVAL + image, *drawn])))
    key = np.concatenate(keys)
    latent, image = (key // N_EVAL).astype(np.int32), (key % N_EVAL).astype(np.int32)
    strength = rng.gamma(4, 0.6, size.d_sae).astype(np.float32)
    act = strength[latent] * (0.2 + rng.standard_exponential(len(key), dtype=np.float32))
    act *= np.where(image % N_CLASSES == favourite[latent], np.float32(2.5), np.float32(1))
    order = np.argsort(latent.astype(np.float64) * 1e4 - np.minimum(act, 9e3), kind="stable")
    return Fired(latent[order], image[order], act[order], np.bincount(latent, minlength=size.d_sae), favourite)


def _evaluation(draft: Draft, size: Size, fired: Fired, words: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(size.d_sae + 1)
    _write_firings(draft, size, fired)
    latents = _latents(size, fired, words, rng)
    draft.write_table("latents.parquet", latents)
    for part, table in enumerate(_iter_examples(size, fired, rng)):
        draft.write_table(part_name("examples", part), table)
    draft.write_table("near_misses.parquet", _near_misses(size, fired))
    draft.write_table("cofiring.parquet", _cofiring(size, rng))
    draft.write_table("judged.parquet", _judged(size, latents, rng))
    draft.write_table("probes.parquet", _probes(size, fired, words, rng))
    ms = float(np.nanmean(latents["ms"].to_numpy(zero_copy_only=False).astype(float)))
    compared = [
        dict(dictionary=d, n_latents=n, fvu=f, cosine=c, l0=32.0, dead=0.03, ms=m, ms_low=m - 0.01, ms_high=m + 0.01, ms_best=0.95)
        for d, n, f, c, m in (
            ("sae", size.d_sae, 0.21, 0.91, ms),
            ("untrained", size.d_sae, 0.72, 0.55, ms - 0.1),
            ("neurons", WIDTH, None, None, ms - 0.15),
            ("sparse_neurons", 2 * WIDTH, None, None, ms - 0.12),
        )
    ]
    shared = dict(sae=size.sae, ms_left_out=12, ms_floor=0.31, purity=0.5, coverage=0.8, uniqueness=0.8, judge=JUDGES[0])
    draft.write_table("comparisons.parquet", _table(schemas.COMPARISONS, compared, shared))
    kinds = [dict(dictionary=d, kind=k, fvu=0.2, n_tokens=50_000) for d in ("sae", "untrained") for k in ("cls", "patch", "all")]
    draft.write_table("fidelity.parquet", _table(schemas.FIDELITY, kinds, dict(sae=size.sae, cosine=0.9, l0=32.0)))
    edges = [(0.0, 0.0), *((10.0**e, 10.0 ** (e + 1)) for e in range(-6, 0))]
    bins = [dict(dictionary=d, low=low, high=high, n_latents=size.d_sae // 7) for d in ("sae", "untrained") for low, high in edges]
    draft.write_table("densities.parquet", _table(schemas.DENSITIES, bins, dict(sae=size.sae)))
    level = dict(level=1, first=0, last=size.d_sae - 1, fvu=0.21, ms=0.6, n_ms=size.d_sae, lca_depth=1.5, n_lca=1000)
    draft.write_table("levels.parquet", _table(schemas.LEVELS, [level], dict(sae=size.sae)))
    spliced = [dict(spliced=s, accuracy=a, recovered=a) for s, a in (("plain", 0.7), ("sae", 0.65), ("mean", 0.001), ("untrained", 0.3))]
    constant = dict(n_images=1000, n_classes=N_CLASSES, n_replaced=50, n_tokens=50, logit_scale=100.0, cross_entropy=1.0)
    constant |= dict(downstream_loss=0.1, downstream_kl=0.1)
    draft.write_table(
        "zero_shot.parquet", _table(schemas.ZERO_SHOT, spliced, dict(sae=size.sae, accuracy_low=0.0, accuracy_high=1.0, **constant))
    )
    return {"sae": size.sae}


def _table(schema: pa.Schema, rows: list[dict[str, Any]], constant: Mapping[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{**constant, **row} for row in rows], schema=schema)


def _columns(schema: pa.Schema, n: int, **columns: Any) -> pa.Table:
    """Make a table from arrays, and from constants that are repeated n times."""
    values = {}
    for name, value in columns.items():
        type_ = schema.field(name).type
        is_constant = value is None or isinstance(value, str | int | float)
        values[name] = pa.repeat(pa.scalar(value, type_), n) if is_constant else pa.array(value, type_, from_pandas=True)
    return pa.table({name: values.get(name, pa.nulls(n, schema.field(name).type)) for name in schema.names}, schema=schema)


def _write_firings(draft: Draft, size: Size, fired: Fired) -> None:
    """Write the firings by image, as the stage `evaluate` does."""
    order = np.argsort(fired.image, kind="stable")
    for part, start in enumerate(range(0, len(order), FIRINGS_PER_PART)):
        rows = order[start : start + FIRINGS_PER_PART]
        values = dict(sae=size.sae, image=fired.image[rows], latent=fired.latent[rows], act=fired.act[rows])
        draft.write_table(part_name("firings", part), _columns(schemas.FIRINGS, len(rows), **values), compression="zstd")


def _latents(size: Size, fired: Fired, words: list[str], rng: np.random.Generator) -> pa.Table:
    d, n = size.d_sae, fired.n
    total = np.bincount(fired.latent, fired.act, minlength=d)
    max_act = np.zeros(d)
    max_act[fired.latent[fired.place == 0]] = fired.act[fired.place == 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_act = np.where(n > 0, total / n, np.nan)
    ms = np.where(n > 1, rng.beta(5, 4, d) * 0.7 + 0.2, np.nan)
    half = rng.uniform(0.005, 0.05, d)
    purity = np.where(n >= 16, rng.integers(1, 17, d) / 16, np.nan)
    density = n / N_EVAL * rng.uniform(0.05, 0.5, d)
    other = rng.integers(d, size=d).astype(float)
    near = np.array(words, dtype=object)
    classes = [
        [] if not count else [near[f], near[(f + 1) % N_CLASSES], near[(f + 7) % N_CLASSES]]
        for f, count in zip(fired.favourite, n, strict=True)
    ]
    return _columns(
        schemas.LATENTS,
        d,
        sae=size.sae,
        latent=np.arange(d),
        density=density,
        mean_act=mean_act,
        max_act=max_act,
        n_images=n,
        is_dead=n == 0,
        dead_in_training=(n == 0) & (rng.random(d) < 0.5),
        ms=ms,
        ms_low=ms - half,
        ms_high=ms + half,
        purity=purity,
        purity_64=np.where(n >= 64, purity * 0.9, np.nan),
        top_classes=classes,
        label_entropy=np.where(n > 0, rng.uniform(0, 8, d), np.nan),
        lca_depth=np.where(n >= 16, rng.integers(0, 4, d), np.nan),
        uniqueness=np.where(n >= 16, rng.beta(8, 2, d), np.nan),
        is_dense=density > 0.1,
        is_rare=(n > 0) & (n < 16),
        duplicate_of=np.where(rng.random(d) < 0.02, other, np.nan),
    )


def _iter_examples(size: Size, fired: Fired, rng: np.random.Generator) -> Iterator[pa.Table]:
    place, n = fired.place, fired.n[fired.latent]
    decile = (10 - 10 * place // n).astype(np.int8)
    # of each lower decile, the firing in the middle, unless it is among the strongest
    middle = place == ((10 - decile) * n + n // 2) // 10
    kept = np.flatnonzero((place < N_TOP) | ((decile < 10) & middle))
    group = fired.latent[kept].astype(np.int64) * 16 + (10 - decile[kept])
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    rank = np.arange(len(kept)) - np.repeat(starts, np.diff(np.r_[starts, len(kept)])) + 1
    for start in range(0, len(kept), 200_000):
        rows = kept[start : start + 200_000]
        heat = _heat(fired.act[rows], rng)
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * GRID * GRID
        yield _columns(
            schemas.EXAMPLES,
            len(rows),
            sae=size.sae,
            latent=fired.latent[rows],
            decile=decile[rows],
            rank=rank[start : start + 200_000],
            image=fired.image[rows],
            act=fired.act[rows],
            heat=pa.ListArray.from_arrays(pa.array(offsets), pa.array(heat.ravel())),
            rows=GRID,
            cols=GRID,
        )


def _near_misses(size: Size, fired: Fired) -> pa.Table:
    rng, alive = np.random.default_rng(size.d_sae + 3), np.flatnonzero(fired.n)
    latent, rank = np.repeat(alive, schemas.N_NEAR_MISSES), np.tile(np.arange(1, schemas.N_NEAR_MISSES + 1), len(alive))
    closeness = np.sort(rng.beta(8, 2, (len(alive), schemas.N_NEAR_MISSES)), axis=1)[:, ::-1].ravel()
    values = dict(latent=latent, rank=rank, image=rng.integers(N_EVAL, size=len(latent)), margin=closeness - 1, closeness=closeness)
    return _columns(schemas.NEAR_MISSES, len(latent), sae=size.sae, **values)


def _heat(act: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Heat maps with one spot each, (examples, patches); the largest value is the image's activation, and most are 0."""
    n, grid = len(act), np.arange(GRID, dtype=np.float32)
    centre, reach = rng.uniform(0, GRID - 1, (2, n, 1)).astype(np.float32), rng.uniform(1, 2.5, (n, 1)).astype(np.float32)
    rows, cols = (np.exp(-(((grid - c) / reach) ** 2)) for c in centre)
    heat = (rows[:, :, None] * cols[:, None, :]).reshape(n, -1) * rng.uniform(0.7, 1, (n, GRID * GRID)).astype(np.float32)
    heat[heat < 0.25] = 0
    return heat / heat.max(1, keepdims=True) * act[:, None]


def _cofiring(size: Size, rng: np.random.Generator) -> pa.Table:
    latent, rank = np.repeat(np.arange(size.d_sae), 8), np.tile(np.arange(1, 9), size.d_sae)
    n = len(latent)
    lift = np.sort(rng.exponential(20, (size.d_sae, 8)) + 1.1, axis=1)[:, ::-1].ravel()
    other = rng.integers(size.d_sae, size=n)
    values = dict(latent=latent, rank=rank, other=other, lift=lift, jaccard=rng.beta(1, 9, n), n_both=rng.integers(8, 200, n))
    return _columns(schemas.COFIRING, n, sae=size.sae, **values)


def _judged(size: Size, latents: pa.Table, rng: np.random.Generator) -> pa.Table:
    ms = latents["ms"].to_numpy(zero_copy_only=False).astype(float)
    tables = []
    for j, judge in enumerate(JUDGES):
        for dictionary, n in (("sae", size.d_sae), ("untrained", size.d_sae), ("neurons", WIDTH), ("sparse_neurons", 2 * WIDTH)):
            values = ms - 0.1 * j if dictionary == "sae" else rng.beta(4, 6, n)
            shared = dict(sae=size.sae, dictionary=dictionary, judge=judge, floor=0.31 - 0.1 * j)
            bounds = dict(ms=values, ms_low=values - 0.02, ms_high=values + 0.02)
            tables.append(_columns(schemas.JUDGED, n, latent=np.arange(n), **shared, **bounds))
    return pa.concat_tables(tables)


def _probes(size: Size, fired: Fired, words: list[str], rng: np.random.Generator) -> pa.Table:
    rows = []
    for c in range(64):
        telling = [int(i) for i in np.flatnonzero(fired.favourite == c)[:10]]
        for probe, k in (("latents", 1), ("latents", 2), ("latents", 5), ("latents", 10), ("x", WIDTH)):
            accuracy = float(rng.uniform(0.7, 0.99))
            latents = telling[:k] if probe == "latents" else None
            rows.append({"class": words[c], "probe": probe, "k": k, "accuracy": accuracy, "auroc": accuracy, "latents": latents})
    return _table(schemas.PROBES, rows, dict(sae=size.sae, auroc_low=0.6, auroc_high=1.0, n_positive=25))


def _matches(draft: Draft) -> None:
    rng, tables, stable = np.random.default_rng(7), [], []
    for size in SAES:
        (other,) = [o for o in SAES if o is not size]
        n, shared = size.d_sae, min(size.d_sae, other.d_sae)
        match = np.r_[np.arange(shared), rng.integers(other.d_sae, size=n - shared)]
        cosine = np.r_[rng.uniform(0.85, 0.97, shared), rng.uniform(0.1, 0.4, n - shared)]
        values = dict(sae=size.sae, other_sae=other.sae, latent=np.arange(n), other_latent=match, cosine=cosine, jaccard=rng.beta(2, 5, n))
        tables.append(_columns(schemas.MATCHES, n, **values))
        stable.append(dict(sae=size.sae, other_sae=other.sae, matched=None, mutual=0.05, mmcs=0.4, chance=0.1))
    for part, table in enumerate(tables):
        draft.write_table(part_name("matches", part), table)
    draft.write_table("stability.parquet", _table(schemas.STABILITY, stable, {}))


# ---- labels


def _labels(draft: Draft, size: Size, fired: Fired, words: list[str]) -> dict[str, Any]:
    rng, d = np.random.default_rng(size.d_sae + 2), size.d_sae
    first, second = np.array(words, dtype=object)[fired.favourite], np.array(words, dtype=object)[rng.integers(N_CLASSES, size=d)]
    tables, mistakes = [], []
    for place, labeller in enumerate(("vocabulary", "vlm"), start=1):
        asked = np.flatnonzero((fired.n > 0) & ((place == 1) | (rng.random(d) < 0.4)))
        n = len(asked)
        is_ok = (fired.n[asked] >= 16) & (rng.random(n) < 0.98)
        text = first[asked] if place == 1 else first[asked] + " near a " + second[asked]

        def scored(values: np.ndarray, is_ok: np.ndarray = is_ok) -> np.ndarray:
            return np.where(is_ok, values, np.nan)

        score = rng.beta(6, 3, n) * 0.5 + 0.5
        mistakes += [_mistakes(size, labeller, kind, asked[is_ok]) for kind in ("missed", "false_alarm")]
        status = np.where(is_ok, "ok", np.where(fired.n[asked] < 16, "too_few_examples", "unparsed"))
        tables.append(
            _columns(
                schemas.LABELS,
                n,
                sae=size.sae,
                latent=asked,
                labeller=labeller,
                place=place,
                status=status.astype(object),
                label=[label if ok else None for label, ok in zip(text, is_ok, strict=True)],
                similarity=scored(rng.normal(0.3, 0.1, n)),
                score=scored(score),
                auroc=scored(score + 0.01),
                auroc_low=scored(score - 0.05),
                auroc_high=scored(score + 0.05),
                control_score=scored(rng.normal(0.52, 0.05, n)),
                random_score=scored(rng.normal(0.5, 0.05, n)),
                correlation=scored(rng.normal(0.3, 0.2, n)),
                control_correlation=scored(rng.normal(0, 0.1, n)),
                precision=scored(score / 4),
                precision_chance=scored(0.02),
                recall=scored(score),
                recall_chance=scored(0.3),
                n_requests=0,
                n_tokens=0,
            )
        )
    draft.write_table("labels.parquet", pa.concat_tables(tables))
    draft.write_table("mistakes.parquet", pa.concat_tables(mistakes))
    return {}


def _effects(draft: Draft, size: Size) -> dict[str, Any]:
    rng = np.random.default_rng(size.d_sae + 3)
    chosen, is_tested = rng.choice(size.d_sae, N_TESTED, replace=False), np.zeros(size.d_sae, dtype=bool)
    is_tested[chosen] = True
    effect, control = rng.normal(0.1, 0.1, size.d_sae), rng.normal(0.05, 0.05, size.d_sae)
    is_causal = effect > np.maximum(control, 0.05)
    effects = _columns(
        schemas.EFFECTS,
        size.d_sae,
        sae=size.sae,
        latent=np.arange(size.d_sae),
        status=np.where(is_tested, np.where(is_causal, "causal", "reads_only"), "untested").astype(object),
        reason=[None if tested else "not chosen" for tested in is_tested],
        outcome=["toward_label" if tested else None for tested in is_tested],
        dose=np.where(is_tested, 1.0, np.nan),
        act=np.where(is_tested, 4.0, np.nan),
        effect=np.where(is_tested, effect, np.nan),
        effect_low=np.where(is_tested, effect - 0.05, np.nan),
        effect_high=np.where(is_tested, effect + 0.05, np.nan),
        best_control=np.where(is_tested, control, np.nan),
        control_causal=["reads_only" if tested else None for tested in is_tested],
    )
    points = [
        (latent, outcome, arm, dose) for latent in sorted(chosen) for outcome in schemas.OUTCOMES for arm in schemas.ARMS for dose in DOSES
    ]
    latents, outcomes, arms, doses = (list(values) for values in zip(*points, strict=True))
    value, n = rng.normal(0.1, 0.1, len(points)), len(points)
    more = dict(value=value, low=value - 0.05, high=value + 0.05, n_images=96, n_draws=N_DRAWS)
    draft.write_table(
        "interventions.parquet",
        _columns(schemas.INTERVENTIONS, n, sae=size.sae, latent=latents, outcome=outcomes, arm=arms, dose=doses, **more),
    )
    outputs, ranks = np.arange(N_CLASSES).repeat(schemas.N_ATTRIBUTED), np.tile(np.arange(1, schemas.N_ATTRIBUTED + 1), N_CLASSES)
    more = dict(rank=ranks, latent=rng.integers(size.d_sae, size=len(ranks)), effect=1.0 / ranks, exact=np.nan, sparsity=20.0, n_images=96)
    names = np.array(_class_names(rng), dtype=object)[outputs]
    draft.write_table("attributions.parquet", _columns(schemas.ATTRIBUTIONS, len(ranks), sae=size.sae, output=names, **more))
    draft.write_table("effects.parquet", effects)
    return {}


def _mistakes(size: Size, labeller: str, kind: str, latents: np.ndarray) -> pa.Table:
    rng, n = np.random.default_rng([size.d_sae, len(labeller), len(kind)]), len(latents) * schemas.N_MISTAKES
    is_missed, threshold = kind == "missed", np.repeat(rng.uniform(0.1, 0.3, len(latents)), schemas.N_MISTAKES)
    distance = np.sort(rng.uniform(0, 0.1, (len(latents), schemas.N_MISTAKES)), axis=1)[:, ::-1].ravel()
    values = dict(image=rng.integers(N_EVAL, size=n), threshold=threshold, cosine=threshold + (-distance if is_missed else distance))
    values |= dict(act=rng.gamma(4, 0.6, n) if is_missed else 0.0, is_hard=None if is_missed else rng.random(n) < 0.5)
    values |= dict(latent=np.repeat(latents, schemas.N_MISTAKES), rank=np.tile(np.arange(1, schemas.N_MISTAKES + 1), len(latents)))
    return _columns(schemas.MISTAKES, n, sae=size.sae, labeller=labeller, kind=kind, **values)
