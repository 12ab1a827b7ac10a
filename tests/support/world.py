"""Inputs of the stage `evaluate` made from arrays, and a small world with planted latents.

The world has five classes in a taxonomy. An image's tokens are the directions of its class and of all above it, so that a latent of
each direction fires on what is planted:

| latent | fires on | level |
|---|---|---|
| 0 | animals | 1 |
| 1, 2 | mammals, birds | 2 |
| 3 to 7 | dogs, cats, wrens, owls, cars | 3 |
| 8 | dogs, too: a near duplicate of 3 | 3 |
| 9 | nothing | 3 |
| 10 | every token | 3 |
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas, store
from ommatid.activations.columns import to_binary
from ommatid.config import EvaluateParams
from ommatid.evaluate.stage import evaluate
from ommatid.events import Listener, ignore
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft, part_name
from support.study import make_artefact, make_test_params

PATHS = {
    "dog": ("animal", "mammal", "dog"),
    "cat": ("animal", "mammal", "cat"),
    "wren": ("animal", "bird", "wren"),
    "owl": ("animal", "bird", "owl"),
    "car": ("thing", "car"),
}
SHOWN = {0: "animal", 1: "mammal", 2: "bird", 3: "dog", 4: "cat", 5: "wren", 6: "owl", 7: "car", 8: "dog"}
DOG, DOG_AGAIN, DEAD, ALWAYS = 3, 8, 9, 10
D_SAE, D_MODEL, LEVELS = 11, 16, (1, 3, 11)
KINDS = ("cls", "patch", "patch", "patch")


def make_world(n: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Make activations of n images, (images, tokens, d_model), and the class of each image."""
    rng = np.random.default_rng(seed)
    labels = [list(PATHS)[i % len(PATHS)] for i in range(n)]
    directions = torch.eye(D_MODEL)
    places = {name: latent for latent, name in reversed(SHOWN.items())}
    x = torch.zeros(n, len(KINDS), D_MODEL)
    for image, label in enumerate(labels):
        for name in PATHS[label]:
            if name in places:
                x[image] += float(rng.uniform(1, 2)) * directions[places[name]]
    x += torch.from_numpy(rng.normal(0, 0.02, x.shape)).float()
    x[:, 0] += 0.5 * directions[D_MODEL - 1]  # cls tokens have something of their own, which no latent shows
    return x.half().float(), labels


def make_sae() -> SAE:
    """Make the SAE with the planted latents."""
    directions = torch.eye(D_MODEL)[:D_SAE].clone()
    directions[DOG_AGAIN] = torch.nn.functional.normalize(torch.eye(D_MODEL)[DOG] + 0.1 * torch.eye(D_MODEL)[DOG_AGAIN], dim=0)
    b_enc = torch.zeros(D_SAE)
    b_enc[DEAD], b_enc[ALWAYS] = -100.0, 5.0
    config = SAEConfig("matryoshka", D_MODEL, D_SAE, 3, "world", "world", prefixes=LEVELS)
    return SAE(config, directions.T.contiguous(), b_enc, directions, torch.zeros(D_MODEL), torch.tensor(0.5))


def make_inputs(
    root: Path,
    x: Tensor,
    labels: Sequence[str | None],
    paths: Sequence[str | None],
    sae: SAE | None = None,
    kinds: Sequence[str] = KINDS,
    n_shards: int = 3,
) -> dict[str, Artefact]:
    """Images, activations and SAE of these images, all of which are for evaluation.

    The main judge sees the mean of x, another the first token, and fails on every seventh image.
    """
    images = _make(root / "images", "images", lambda draft: _write_images(draft, labels, paths))
    activations = _make(root / "activations", "activations", lambda draft: _write_activations(draft, x, kinds, n_shards))
    return {
        "images": images,
        "extract": activations,
        "train": _make(root / "sae", "sae", lambda draft: _write_sae(draft, sae or make_sae())),
    }


def run(place: Path, inputs: Mapping[str, Artefact], on_event: Listener = ignore, **changes: Any) -> Artefact:
    """Evaluate the inputs."""
    params: EvaluateParams = make_test_params(evaluate=changes).evaluate
    return make_artefact(place, "evaluation", lambda params, inputs, draft: evaluate(params, inputs, draft, on_event), params, inputs)


def _make(place: Path, kind: str, fill: Callable[[Draft], Mapping[str, Any]]) -> Artefact:
    with store.open_draft(place, kind, {}, {}) as draft:
        draft.seal(fill(draft))
        return draft.publish(place)


def _write_images(draft: Draft, labels: Sequence[str | None], paths: Sequence[str | None]) -> dict[str, Any]:
    constant = {"split": "eval", "width": 1, "height": 1, "captions": [], "thumbnail": b"", "encoded": b""}
    rows = [
        {"image": i, "image_id": hashlib.sha256(f"{i}".encode()).hexdigest(), "path": f"{i}", "label": label, "taxonomy": path, **constant}
        for i, (label, path) in enumerate(zip(labels, paths, strict=True))
    ]
    draft.write_table("images.parquet", pa.Table.from_pylist(rows, schema=schemas.IMAGES))
    return {"n_eval": len(rows), "n_images": len(rows)}


def _write_activations(draft: Draft, x: Tensor, kinds: Sequence[str], n_shards: int) -> dict[str, Any]:
    n, t, d = x.shape
    schema = schemas.activations(d, {})
    mean, first = (torch.nn.functional.normalize(seen + 0.01, dim=1) for seen in (x.mean(1), x[:, 0]))
    first[3::7] = torch.nan
    image = np.repeat(np.arange(n, dtype=np.int32), t)
    token = np.tile(np.arange(t, dtype=np.int32), n)
    place = np.full(n * t, -1, np.int16)
    rows = pa.table([image, token, pa.array(list(kinds) * n), place, place, to_binary(x.flatten(0, 1), torch.float16)], schema=schema)
    vectors = [to_binary(seen, torch.float32) for seen in (mean, mean, first)]
    embedded = pa.table([np.arange(n, dtype=np.int32), *vectors], schema=schemas.embeddings(d, d, d))
    for shard, numbers in enumerate(np.array_split(np.arange(n), n_shards)):
        first, last = int(numbers[0]), int(numbers[-1]) + 1
        mine = rows.slice(first * t, (last - first) * t)
        draft.write_table(part_name("eval", shard), mine)
        draft.write_table(part_name("train", shard), mine)
        draft.write_table(part_name("embeddings", shard), embedded.slice(first, last - first))
    judges = [{"judge": name, "d_judge": d, "failed": 0} for name in ("mean", "first")]
    return {"tokens_per_image": t, "grid": None, "judges": judges, "hookpoint": "world"}


def _write_sae(draft: Draft, sae: SAE) -> dict[str, Any]:
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return {"sae": "planted", "dead_latents": []}
