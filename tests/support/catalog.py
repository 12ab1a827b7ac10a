"""Tiny artefacts of the stages before `catalog`: six images and four latents that cover every special case once.

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
from ommatid.catalog.stage import CATALOG, build_catalog
from ommatid.config import CatalogParams
from ommatid.events import Listener, ignore
from ommatid.store import Artefact, Draft

NAME = "batch_topk-4-k2-s0"
SAE = f"{NAME}-00000000"
OTHER = "batch_topk-2-k1-s0"
"""Name of a second SAE, which has the first two latents."""
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
STRUCTURE = [
    # latent, dense, rare, uniqueness, label entropy, depth, duplicate of
    (True, True, 0.5, 0.9, 2, None),
    (True, True, 0.5, 0.3, 1, 0),
    (False, True, None, 0.0, None, None),
    (False, False, None, None, None, None),
]
COFIRING = [(0, 1, 1, 2.0, 0.2, 8), (1, 1, 0, 2.0, 0.2, 8)]
AUDIT = {
    "latent": 0, "class": "cat", "status": "suspect", "suspicion": 0.125, "lift": 1.5, "attribute": None,
    "n_with": 40, "n_without": 20, "n_others_with": 16, "n_others_without": 44,
    "accuracy_with": 0.9, "accuracy_without": 0.5, "accuracy_more": 0.4, "accuracy_more_low": 0.1, "accuracy_more_high": 0.7,
    "mistaken_with": 0.75, "mistaken_more": 0.5, "mistaken_more_low": 0.125, "mistaken_more_high": 0.75,
    "trust_with": 0.75, "trust_without": 1.0, "trust_less": 0.25, "trust_less_low": 0.125, "trust_less_high": 0.5,
    "n_tested": 78, "grouped_by": "latent 0", "worst_group": "others_with", "worst": 0.25, "worst_ablated": 0.75, "worst_random": 0.25,
    "worst_random_low": 0.2, "worst_random_high": 0.3, "worst_leace": 0.875, "balanced": 0.6, "balanced_ablated": 0.8,
    "balanced_random": 0.65, "balanced_leace": 0.85, "gain_low": 0.1,
}  # fmt: skip
AUDITS = {"status": "ok", "attributes": [], "n_with_attributes": 0, "n_images": 120, "n_classes": 3, "accuracy": 0.5, "n_latents": 3}
AUDITS |= {"n_pairs": 9, "n_too_few": 8, "n_examined": 1, "n_unlisted": 0, "n_suspicious": 1, "n_tested": 1, "n_suspects": 1}
AUDIT_IMAGES = [("class_with", 0, "cat"), ("class_without", 2, "truck"), ("others_with", 3, "cat")]
DENSITIES = [("sae", 0.0, 0.0, 1), ("sae", 0.01, 0.1, 0), ("sae", 0.1, 1.0, 3), ("untrained", 0.1, 1.0, 4)]
FIDELITY = [("sae", "patch", 24, 0.2), ("sae", "all", 24, 0.2), ("untrained", "all", 24, 0.6)]
PROBES = [("cat", "latents", 1, 0.9, [0]), ("cat", "x", 3, 1.0, None), ("truck", "latents", 1, 0.8, [1]), ("truck", "x", 3, 0.9, None)]
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
NEAR_MISSES = [
    # latent, rank, image, margin, closeness
    (0, 1, 4, -0.25, 0.75),
    (0, 2, 5, -0.5, 0.5),
    (1, 1, 0, -0.125, None),
    (2, 1, 1, -0.5, 0.5),
]
LABELS = [
    # latent, labeller, place, status, label, score, control
    (0, "words", 1, "ok", "tabby cat", 0.7, 0.5),
    (0, "prompts", 2, "ok", "cat", 0.9, 0.4),
    (1, "prompts", 2, "refused", None, None, None),
    (1, "words", 1, "ok", "truck", 0.6, 0.7),
    (2, "words", 1, "too_few_examples", None, None, None),
]
MISTAKES = [
    # latent, labeller, kind, rank, image, cosine, threshold, act, hard
    (0, "words", "missed", 1, 3, 0.125, 0.25, 1.0, None),
    (0, "prompts", "false_alarm", 1, 4, 0.5, 0.25, 0.0, True),
    (1, "words", "missed", 1, 4, 0.125, 0.25, 1.0, None),
    (1, "words", "false_alarm", 1, 0, 0.5, 0.25, 0.0, False),
]
INTERVENTIONS = [
    # latent, outcome, arm, dose, value, draws
    (0, "toward_label", "targeted", 1.0, 0.5, 1),
    (0, "toward_label", "random_latent", 1.0, 0.1, 8),
    (0, "drift", "targeted", 1.0, 0.1, 1),
    (1, "toward_label", "targeted", 0.5, 0.1, 1),
]
EFFECTS = [
    # latent, status, reason, outcome, dose, act, effect, low, high, best control, status of a random latent
    (0, "causal", None, "toward_label", 1.0, 4.0, 0.5, 0.25, 0.75, 0.125, "reads_only"),
    (1, "reads_only", None, "toward_label", 0.5, 1.0, 0.1, -0.25, 0.5, 0.2, "causal"),
    (2, "untested", "not chosen", None, None, None, None, None, None, None, None),
]
"""Latent 3 has no row: `features` says untested."""
ATTRIBUTIONS = [("cat", 1, 0, 0.5, 0.4, 1.8), ("cat", 2, 1, -0.25, None, 1.8), ("label of latent 0", 1, 0, 0.25, None, 1.0)]
ZERO_SHOT = [("plain", 0.9, 1.0), ("sae", 0.8, 0.85), ("sae_with_error", 0.9, 1.0), ("mean", 0.2, 0.0), ("untrained", 0.5, 0.4)]
COMPARISONS = [("sae", 0.2, 0.7), ("untrained", 0.6, 0.5), ("neurons", None, 0.4)]
JUDGED = [
    # dictionary, latent, judge, ms, floor
    ("sae", 0, "lite2", 0.8, 0.35),
    ("sae", 1, "lite2", 0.6, 0.35),
    ("sae", 0, "dino", 0.5, 0.1),
    ("sae", 1, "dino", None, 0.1),
    ("neurons", 0, "lite2", 0.4, 0.35),
    ("neurons", 0, "dino", 0.2, 0.1),
]


def thumbnail(image: int, side: int = 32) -> bytes:
    """Return a WebP of one colour, which differs between images."""
    colour = np.random.default_rng(image).integers(40, 216, 3)
    out = io.BytesIO()
    Image.new("RGB", (side, side), tuple(int(c) for c in colour)).save(out, "WEBP")
    return out.getvalue()


def columns(schema: pa.Schema, rows: Sequence[Sequence[Any]], names: str, **constant: Any) -> pa.Table:
    """Make a table of a schema from rows with the columns `names` and from constant columns; other columns are null."""
    values = {name: [constant.get(name)] * len(rows) for name in schema.names}
    values |= {name: [row[i] for row in rows] for i, name in enumerate(names.split())}
    return pa.table({name: values[name] for name in schema.names}, schema=schema)


def make(place: Path, kind: str, fill: Callable[[Draft], Mapping[str, Any]], inputs: Mapping[str, Artefact], **params: Any) -> Artefact:
    """Publish an artefact; `fill` writes its tables and returns its summary."""
    with store.open_draft(place, kind, params, inputs) as draft:
        draft.seal(fill(draft))
        return draft.publish(place)


def make_inputs(root: Path, width: int = 32, height: int = 32, names: Sequence[str] = (NAME,)) -> dict[str, Artefact]:
    """Make the inputs of the stage `catalog` for some SAEs."""
    images = make(root / "images", "images", lambda draft: _images(draft, width, height), {}, limit=6)
    activations = make(root / "activations", "activations", lambda draft: {}, {"images": images}, hookpoint="blocks.15")
    training = make(root / "sae", "training", _inside(names, "sae", _sae), {"extract": activations}, k=2)
    inputs = {"images": images, "train": training}
    evaluations = make(root / "evaluation", "evaluations", _evaluations(names), inputs, n_top=2)
    labellings = make(root / "labels", "labellings", _inside(names, "labels", _labels), {"evaluate": evaluations}, seed=0)
    effects = make(root / "interventions", "interventions", _inside(names, "effects", _effects), {"label": labellings}, draws=8)
    return {**inputs, "evaluate": evaluations, "label": labellings, "intervene": effects}


def _inside(names: Sequence[str], kind: str, fill: Callable[[Draft, str], Mapping[str, Any]]) -> Callable[[Draft], Mapping[str, Any]]:
    """Return a function that fills an artefact with one child per name."""

    def fill_all(draft: Draft) -> Mapping[str, Any]:
        for name in names:
            child = draft.child(name, kind, _train_params(name) if kind == "sae" else None)
            child.seal(fill(child, name))
        return {"saes": list(names)}

    return fill_all


def _evaluations(names: Sequence[str]) -> Callable[[Draft], Mapping[str, Any]]:
    """Fill in the evaluation of each SAE, and a comparison in which latents of the same index match."""

    def fill(draft: Draft) -> Mapping[str, Any]:
        summary = _inside(names, "evaluation", _evaluation)(draft)
        pairs = [(f"{one}-00000000", f"{other}-00000000", _latents_of(one)) for one in names for other in names if one != other]
        matches = [(sae, latent, other, latent % 2, 1.0 if latent < 2 else 0.6) for sae, other, n in pairs for latent in range(n)]
        draft.write_table("matches.parquet", columns(schemas.MATCHES, matches, "sae latent other_sae other_latent cosine"))
        stable = [(sae, other, 2 / n, 2 / n, 0.8, 0.5) for sae, other, n in pairs]
        draft.write_table("stability.parquet", columns(schemas.STABILITY, stable, "sae other_sae matched mutual mmcs chance"))
        return summary

    return fill


def _train_params(name: str) -> dict[str, Any]:
    return {"k": int(name.split("-")[2].removeprefix("k"))}


def _latents_of(name: str) -> int:
    return int(name.split("-")[1])


def build(root: Path, inputs: Mapping[str, Artefact], n_neighbours: int = 2, on_event: Listener = ignore) -> Artefact:
    """Build and publish the catalogue of some inputs in `root`, as `ommatid catalog` does, but without its gate."""
    params = CatalogParams(n_neighbours=n_neighbours)
    with store.open_draft(root / "catalog", "catalog", params.model_dump(mode="json"), inputs) as draft:
        build_catalog(params, inputs, draft, {name: lineage_of(name) for name in inputs["train"].children}, on_event)
        return draft.publish(root / "catalog")


def lineage_of(name: str) -> dict[str, str | None]:
    """Return the lineage of SAEs that each have their own MLflow run."""
    return LINEAGE if name == NAME else {**LINEAGE, "mlflow_run_id": f"run of {name}"}


def path_in(root: Path) -> Path:
    """Return the path of the catalogue that `build` writes."""
    return root / "catalog" / CATALOG


def _images(draft: Draft, width: int, height: int) -> dict[str, Any]:
    rows = [(*row, thumbnail(row[0])) for row in IMAGES]
    table = columns(
        schemas.IMAGES, rows, "image image_id path label thumbnail", split="eval", width=width, height=height, encoded=b"not kept"
    )
    draft.write_table("images-00000.parquet", table.slice(0, 4))
    draft.write_table("images-00001.parquet", table.slice(4))
    return {}


def _sae(draft: Draft, name: str) -> dict[str, Any]:
    with draft.write_file("sae.safetensors") as path:
        save_file({"W_dec": DIRECTIONS[: _latents_of(name)]}, path)
    config = {"variant": "batch_topk", **_train_params(name), "model": "lite0", "hookpoint": "blocks.15"}
    with draft.write_file("cfg.json") as path:
        path.write_text(json.dumps(config), encoding="utf-8")
    return {"sae": f"{name}-00000000"}


def _evaluation(draft: Draft, name: str) -> dict[str, Any]:
    sae, n = f"{name}-00000000", _latents_of(name)
    names = "latent density mean_act max_act n_images is_dead dead_in_training ms purity top_classes"
    more = "is_dense is_rare uniqueness label_entropy lca_depth duplicate_of"
    latents = [latent + structure for latent, structure in zip(LATENTS, STRUCTURE, strict=True)]
    draft.write_table("latents.parquet", columns(schemas.LATENTS, latents[:n], f"{names} {more}", sae=sae))
    rows = [(*row, 2 if row[-1] else 0, 2 if row[-1] else 0) for row in EXAMPLES if row[0] < n]
    draft.write_table("examples.parquet", columns(schemas.EXAMPLES, rows, "latent decile rank image act heat rows cols", sae=sae))
    missed = [row for row in NEAR_MISSES if row[0] < n]
    draft.write_table("near_misses.parquet", columns(schemas.NEAR_MISSES, missed, "latent rank image margin closeness", sae=sae))
    fired = [row for row in FIRINGS if row[1] < n]
    draft.write_table("firings-00000.parquet", columns(schemas.FIRINGS, fired, "image latent act", sae=sae))
    constant = dict(n_latents=n, l0=2.0, dead=0.25, ms_best=0.8, ms_left_out=2)
    compared = [(dictionary, fvu, ms - (4 - n) / 100) for dictionary, fvu, ms in COMPARISONS]  # the widest is the best
    draft.write_table(
        "comparisons.parquet",
        columns(schemas.COMPARISONS, compared, "dictionary fvu ms", sae=sae, ms_floor=0.35, judge="lite2", **constant),
    )
    related = {
        "cofiring": columns(schemas.COFIRING, COFIRING, "latent rank other lift jaccard n_both", sae=sae),
        "densities": columns(schemas.DENSITIES, DENSITIES, "dictionary low high n_latents", sae=sae),
        "fidelity": columns(schemas.FIDELITY, FIDELITY, "dictionary kind n_tokens fvu", sae=sae, cosine=0.9, l0=2.0),
        "levels": columns(schemas.LEVELS, [(1, 0, n - 1, 0.2, 0.7, 2)], "level first last fvu ms n_ms", sae=sae, n_lca=0),
        "probes": columns(
            schemas.PROBES, PROBES, "class probe k accuracy latents", sae=sae, auroc=0.9, auroc_low=0.8, auroc_high=1.0, n_positive=3
        ),
    }
    for table, rows in related.items():
        draft.write_table(f"{table}.parquet", rows)
    shown = dict(
        n_images=6, n_classes=3, n_replaced=4, n_tokens=4, logit_scale=10.0, accuracy_low=0.0, accuracy_high=1.0, downstream_kl=0.25
    )
    rows = [(*row, 1 - row[1], 0.9 - row[1]) for row in ZERO_SHOT]
    draft.write_table(
        "zero_shot.parquet", columns(schemas.ZERO_SHOT, rows, "spliced accuracy recovered cross_entropy downstream_loss", sae=sae, **shown)
    )
    draft.write_table("judged.parquet", columns(schemas.JUDGED, JUDGED, "dictionary latent judge ms floor", sae=sae))
    return {"sae": sae}


def _labels(draft: Draft, name: str) -> dict[str, Any]:
    rows = [row for row in LABELS if row[0] < _latents_of(name)]
    constant = {"sae": f"{name}-00000000", "n_requests": 0, "n_tokens": 0}
    table = columns(schemas.LABELS, rows, "latent labeller place status label score control_score", **constant)
    draft.write_table("labels.parquet", table)
    names, mistaken = (
        "latent labeller kind rank image cosine threshold act is_hard",
        [row for row in MISTAKES if row[0] < _latents_of(name)],
    )
    draft.write_table("mistakes.parquet", columns(schemas.MISTAKES, mistaken, names, sae=f"{name}-00000000"))
    return {}


def _effects(draft: Draft, name: str) -> dict[str, Any]:
    sae, n = f"{name}-00000000", _latents_of(name)
    names = "latent status reason outcome dose act effect effect_low effect_high best_control control_causal"
    effects = [row for row in EFFECTS if row[0] < n]
    draft.write_table("effects.parquet", columns(schemas.EFFECTS, effects, names, sae=sae))
    ran = [row for row in INTERVENTIONS if row[0] < n]
    table = columns(schemas.INTERVENTIONS, ran, "latent outcome arm dose value n_draws", sae=sae, n_images=6)
    draft.write_table("interventions.parquet", table)
    table = columns(schemas.ATTRIBUTIONS, ATTRIBUTIONS, "output rank latent effect exact sparsity", sae=sae, n_images=6)
    draft.write_table("attributions.parquet", table)
    draft.write_table("audit.parquet", pa.Table.from_pylist([{**AUDIT, "sae": sae}], schema=schemas.AUDIT))
    draft.write_table("audits.parquet", pa.Table.from_pylist([{**AUDITS, "sae": sae}], schema=schemas.AUDITS))
    keys = {"sae": sae, "latent": 0, "class": "cat", "rank": 1}
    shown = [{**keys, "part": part, "image": image, "called": called} for part, image, called in AUDIT_IMAGES]
    draft.write_table("audit_images.parquet", pa.Table.from_pylist(shown, schema=schemas.AUDIT_IMAGES))
    return {}
