"""Profile and rules of the stage `extract`: activations are numbers that an SAE can learn from, and every image has its embeddings."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, filled, iter_batches, named, within, zero
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames `parts`, `embeddings`, `judges`, `splits` and `whole`, each over all hookpoints.

    For each hookpoint, they have one row for each part of activations, for each part and vector of embeddings, for each judge, for each
    split, and for all images.
    """
    frames = [_hookpoint(name, artefact.child(name, "activations")) for name in artefact.children]
    return {name: pd.concat([frame[name] for frame in frames], ignore_index=True) for name in frames[0]}


def _hookpoint(hookpoint: str, artefact: Artefact) -> Frames:
    # Parts are read from where they are stored, because this artefact may be too large for the disk of this machine.
    tables = {table: artefact.parts(table) if table in artefact.tables else [] for table in ("train", "eval", "embeddings")}
    parts = [_activations(artefact, part) for table in ("train", "eval") for part in tables[table]]
    vectors = [_vectors(artefact, part, name) for part in tables["embeddings"] for name in _vector_names(artefact, part)]
    splits = [{"split": table, "tokens": artefact.rows(table)} for table in ("train", "eval")]
    whole = [_image_match(artefact, tables["train"] + tables["eval"], tables["embeddings"])]
    if artefact.summary.get("source") == "files":
        whole = []  # activations imported from files come without images, so there is nothing to embed
    frames = {"parts": parts, "embeddings": vectors, "judges": _judges(vectors), "splits": splits, "whole": whole}
    return {name: pd.DataFrame([_of(hookpoint, row) for row in rows]) for name, rows in frames.items()}


def _of(hookpoint: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the name of the hookpoint put before its own name, which is its first value."""
    name, *_ = row
    return row | {name: f"{hookpoint}, {row[name]}"}


_MAGNITUDE, _INFINITY = np.uint16(0x7FFF), 0x7C00
"""Mask of a float16's bits without the sign, and the bits of infinity. Masked bits sort like magnitudes: every finite number, then
infinity, then NaN (IEEE 754)."""


def _activations(artefact: Artefact, part: str) -> dict[str, Any]:
    """Make a row of the frame `parts`: how many tokens of a part have a damaged activation, and the largest finite magnitude."""
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
    """Make a row of the frame `embeddings`: how many are damaged. All NaN is no damage, but marks an image on which the judge failed."""
    not_finite: list[int] = []
    not_unit: list[int] = []
    embedded = 0
    for batch in iter_batches(artefact, part, ["image", name], n_rows=4096):
        vectors = _vector_bits(batch[name], np.float32).astype(np.float64)
        failed = np.isnan(vectors).all(axis=1) & (name != "joint")
        norms = np.linalg.norm(vectors, axis=1)
        image = batch["image"].to_numpy()
        not_finite += image[~np.isfinite(norms) & ~failed].tolist()
        not_unit += image[np.isfinite(norms) & (np.abs(norms - 1) > 1e-3)].tolist()
        embedded += int((~failed).sum())
    row: dict[str, Any] = {"part": f"{part}, {name}", "vector": name, "embedded": embedded}
    for fault, found in (("not finite", not_finite), ("not of unit norm", not_unit)):
        row[f"embeddings {fault}"] = len(found)
        row[f"first {fault}"] = named([f"image {image}" for image in found[:SHOWN]])
    return row


def _judges(vectors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the rows of the frame `judges`: how many images each judge embedded."""
    names = dict.fromkeys(row["vector"] for row in vectors if row["vector"] != "joint")
    return [{"judge": name, "images embedded": sum(row["embedded"] for row in vectors if row["vector"] == name)} for name in names]


def _image_match(artefact: Artefact, activations: list[str], embeddings: list[str]) -> dict[str, Any]:
    """Make the row of the frame `whole`: how the images of the activations and of the embeddings differ."""
    whole: dict[str, Any] = {"set": "all images"}
    if not activations or not embeddings:
        missing = "activations" if not activations else "embeddings"
        return whole | {"unmatched images": None, "first unmatched": missing, "repeated embeddings": 0, "first repeated": ""}
    captured = np.unique(np.concatenate([np.unique(_images_of(artefact, part)) for part in activations]))
    embedded, times = np.unique(np.concatenate([_images_of(artefact, part) for part in embeddings]), return_counts=True)
    for fault, found in (("unmatched images", np.setxor1d(captured, embedded)), ("repeated embeddings", embedded[times > 1])):
        whole |= {fault: len(found), f"first {fault.split()[0]}": named([f"image {image}" for image in found[:SHOWN]])}
    return whole


def _images_of(artefact: Artefact, part: str) -> np.ndarray:
    return artefact.read_part(part, ["image"])["image"].to_numpy()


def _vector_bits(column: pa.Array, dtype: Any) -> np.ndarray:
    """Return a column of fixed-size binary values as an array of `dtype`, (rows, width), without copying it."""
    width = column.type.byte_width // np.dtype(dtype).itemsize
    data = column.buffers()[1]
    offset = column.offset * column.type.byte_width
    return np.frombuffer(data, dtype=dtype, count=len(column) * width, offset=offset).reshape(len(column), width)


def rules(params: Params) -> list[Rule]:
    """Make the rules under which an SAE can learn from the activations, and every image has its embeddings."""
    return [*_activation_rules(), *_embedding_rules()]


def _activation_rules() -> list[Rule]:
    return [
        within(
            "splits", "tokens", "both splits have tokens", "without tokens nothing can be trained or evaluated", row="split", min_value=1
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
            "the largest float16 is 65504: a larger activation has overflowed, and makes the loss infinite",
            first="first with infinity",
        ),
        zero(
            "parts",
            "tokens with only zeros",
            "no activation is all zeros",
            "a hookpoint that yields zeros is dead or wrong, and the cosine with a zero vector is undefined",
            first="first with only zeros",
        ),
    ]


def _embedding_rules() -> list[Rule]:
    return [
        filled(
            "whole", "unmatched images", "activations and embeddings are both present", "scores join activations with embeddings", row="set"
        ),
        zero(
            "whole",
            "unmatched images",
            "activations and embeddings are of the same images",
            "an image that lacks one of the two would silently be missing from the scores",
            row="set",
            first="first unmatched",
        ),
        zero(
            "whole",
            "repeated embeddings",
            "every image has one embedding",
            "a repeated image would count twice in monosemanticity",
            row="set",
            first="first repeated",
        ),
        zero(
            "embeddings",
            "embeddings not finite",
            "embeddings are finite",
            "one NaN makes every monosemanticity score NaN; only embeddings that are all NaN are left out: a judge failed on their images",
            first="first not finite",
        ),
        within(
            "judges",
            "images embedded",
            "every judge embedded some image",
            "a judge that failed on all images cannot score anything",
            row="judge",
            min_value=1,
        ),
        zero(
            "embeddings",
            "embeddings not of unit norm",
            "embeddings have unit norm",
            "scores use dot products of embeddings as cosines",
            first="first not of unit norm",
        ),
    ]
