"""Tiny artefacts, as the stages before `catalog` would leave them: six images, four latents, every edge once.

| latent | fires on | label | why it is here |
|---|---|---|---|
| 0 | images 0 1 2 3 | `tabby cat` by words, `cat` (better score) by prompts | the best label wins |
| 1 | images 3 4 | refused by prompts, `truck` by words | a label beats a refusal |
| 2 | image 5 | too_few_examples | a feature without a label, without ms |
| 3 | nothing | none | dead, never asked |
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from safetensors.numpy import save_file

from ommatid import schemas, store
from ommatid.catalog.build import CATALOG, build_catalog
from ommatid.config import CatalogParams
from ommatid.events import Listener, ignore
from ommatid.store import Artefact, Draft

SAE = "batch_topk-4-k2-00000000"
LINEAGE = {
    "git_commit": "1f2e3d",
    "git_dirty": "false",
    "dvc_experiment": None,
    "dvc_lock": "4a5b",
    "mlflow_run_id": "run-1",
    "prefect_flow_run_id": None,
}
DIRECTIONS = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]], np.float32)

IMAGES = [
    (image, f"id{image}", f"{label}/{image}.png", label) for image, label in enumerate(["cat", "cat", "cat", "truck", "truck", "ship"])
]
LATENTS = [
    # latent, density, mean, max, images, dead, dead in training, ms, purity, classes
    (0, 0.4, 1.5, 4.0, 4, False, False, 0.8, 0.75, ["cat", "truck"]),
    (1, 0.2, 0.5, 2.0, 2, False, False, 0.6, 1.0, ["truck"]),
    (2, 0.1, 0.5, 1.0, 1, False, True, None, None, ["ship"]),
    (3, 0.0, None, 0.0, 0, True, True, None, None, []),
]
FIRINGS = [(0, 0, 4.0), (1, 0, 3.0), (2, 0, 2.0), (3, 0, 1.0), (3, 1, 2.0), (4, 1, 1.0), (5, 2, 1.0)]
HEAT = [0.0, 1.0, 2.0, 4.0]
EXAMPLES = [
    # latent, decile, rank, image, act, heat
    (0, 10, 1, 0, 4.0, HEAT),
    (0, 10, 2, 1, 3.0, HEAT),
    (0, 5, 1, 2, 2.0, HEAT),
    (0, 1, 1, 3, 1.0, HEAT),
    (1, 10, 1, 3, 2.0, None),
    (1, 1, 1, 4, 1.0, None),
    (2, 10, 1, 5, 1.0, HEAT),
]
LABELS = [
    # latent, labeller, status, label, score, control
    (0, "words", "ok", "tabby cat", 0.7, 0.5),
    (0, "prompts", "ok", "cat", 0.9, 0.4),
    (1, "prompts", "refused", None, None, None),
    (1, "words", "ok", "truck", 0.6, 0.5),
    (2, "words", "too_few_examples", None, None, None),
]
COMPARISONS = [("sae", 0.2, 0.7), ("untrained", 0.6, 0.5), ("neurons", None, 0.4)]


def thumbnail(image: int, side: int = 32) -> bytes:
    """A WebP of one colour a picture."""
    colour = np.random.default_rng(image).integers(40, 216, 3)
    out = io.BytesIO()
    Image.new("RGB", (side, side), tuple(int(c) for c in colour)).save(out, "WEBP")
    return out.getvalue()


def columns(schema: pa.Schema, rows: Sequence[Sequence[Any]], names: str, **constant: Any) -> pa.Table:
    """A table of `schema`: `names` are the columns of `rows`, `constant` others; the rest is null."""
    values = {name: [constant.get(name)] * len(rows) for name in schema.names}
    values |= {name: [row[i] for row in rows] for i, name in enumerate(names.split())}
    return pa.table({name: values[name] for name in schema.names}, schema=schema)


def make(place: Path, kind: str, fill: Callable[[Draft], Mapping[str, Any]], inputs: Mapping[str, Artefact], **params: Any) -> Artefact:
    """A published artefact; `fill` writes its tables and returns its summary."""
    with store.open_draft(place, kind, params, inputs) as draft:
        draft.seal(fill(draft))
        return draft.publish(place)


def make_inputs(root: Path, width: int = 32, height: int = 32) -> dict[str, Artefact]:
    """What the stage `catalog` reads."""
    images = make(root / "images", "images", lambda draft: _images(draft, width, height), {}, limit=6)
    activations = make(root / "activations", "activations", lambda draft: {}, {"images": images}, hookpoint="blocks.15")
    sae = make(root / "sae", "sae", _sae, {"extract": activations}, k=2)
    evaluation = make(root / "evaluation", "evaluation", _evaluation, {"images": images, "train": sae}, n_top=2)
    labels = make(root / "labels", "labels", _labels, {"evaluate": evaluation}, seed=0)
    return {"images": images, "train": sae, "evaluate": evaluation, "label": labels}


def build(root: Path, inputs: Mapping[str, Artefact], n_neighbours: int = 2, on_event: Listener = ignore) -> Artefact:
    """The catalogue of these inputs, published in `root`, as `ommatid catalog` would without its gate."""
    params = CatalogParams(n_neighbours=n_neighbours)
    with store.open_draft(root / "catalog", "catalog", params.model_dump(mode="json"), inputs) as draft:
        build_catalog(params, inputs, draft, LINEAGE, on_event)
        return draft.publish(root / "catalog")


def path_in(root: Path) -> Path:
    """Where `build` leaves the file."""
    return root / "catalog" / CATALOG


def _images(draft: Draft, width: int, height: int) -> dict[str, Any]:
    rows = [(*row, thumbnail(row[0])) for row in IMAGES]
    table = columns(
        schemas.IMAGES, rows, "image image_id path label thumbnail", split="eval", width=width, height=height, encoded=b"not kept"
    )
    draft.write_table("images-00000.parquet", table.slice(0, 4))
    draft.write_table("images-00001.parquet", table.slice(4))
    return {}


def _sae(draft: Draft) -> dict[str, Any]:
    with draft.write_file("sae.safetensors") as path:
        save_file({"W_dec": DIRECTIONS}, path)
    with draft.write_file("cfg.json") as path:
        path.write_text(json.dumps({"model": "lite0", "hookpoint": "blocks.15"}), encoding="utf-8")
    return {"sae": SAE}


def _evaluation(draft: Draft) -> dict[str, Any]:
    names = "latent density mean_act max_act n_images is_dead dead_in_training ms purity top_classes"
    draft.write_table("latents.parquet", columns(schemas.LATENTS, LATENTS, names, sae=SAE))
    rows = [(*row, 2 if row[-1] else 0, 2 if row[-1] else 0) for row in EXAMPLES]
    draft.write_table("examples.parquet", columns(schemas.EXAMPLES, rows, "latent decile rank image act heat rows cols", sae=SAE))
    draft.write_table("firings-00000.parquet", columns(schemas.FIRINGS, FIRINGS, "image latent act", sae=SAE))
    constant = dict(n_latents=4, l0=2.0, dead=0.25, ms_best=0.8, ms_left_out=2)
    draft.write_table(
        "comparisons.parquet",
        columns(schemas.COMPARISONS, COMPARISONS, "dictionary fvu ms", sae=SAE, ms_floor=0.35, judge="lite2", **constant),
    )
    return {"sae": SAE}


def _labels(draft: Draft) -> dict[str, Any]:
    names = "latent labeller status label score control_score"
    draft.write_table("labels.parquet", columns(schemas.LABELS, LABELS, names, sae=SAE))
    return {}
