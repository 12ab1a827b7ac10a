"""Activations of known structure: columns of an artefact, and files for the stage `extract` to import."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml

from ommatid import schemas
from ommatid.activations.columns import to_binary
from ommatid.config import Params
from ommatid.events import ignore
from ommatid.extract.rows import order_rows, window, write_rows
from ommatid.pipeline.run import run_stage
from ommatid.store import Artefact, open_draft, part_name
from support.study import make_test_params

N_IMAGES, N_TOKENS = 400, 5
"""Numbers of images, and of tokens per image, in each of two shards."""
D_MODEL = 16
"""Width of the activations that `write_activations` writes."""


def make_activations(root: Path, window_rows: int | None = None) -> Artefact:
    """Make activations whose vector is (image, token), with rows in the order of an extraction."""
    with open_draft(root / "activations", "activations", {}, {}) as draft:
        sizes = []
        for shard in range(2):
            image = np.repeat(np.arange(N_IMAGES), N_TOKENS) + shard * N_IMAGES
            order = order_rows(image, np.random.default_rng(shard))
            sizes.append(window(np.bincount(order.stratum), N_TOKENS))
            rows = order.argsort()
            token = np.tile(np.arange(N_TOKENS), N_IMAGES)
            x = torch.from_numpy(np.stack([image[rows], token[rows]], axis=1)).half()
            columns = [pa.array(image[rows], pa.int32()), pa.array(token[rows], pa.int32()), pa.array(["patch"] * len(rows))]
            places = [pa.array(np.zeros(len(rows)), pa.int16())] * 2
            schema = schemas.activations(2, {})
            table = pa.table([*columns, *places, to_binary(x, torch.float16)], schema=schema)
            write_rows(draft, part_name("train", shard), (table.slice(start, 700) for start in range(0, len(table), 700)), schema)
        draft.seal({"window": min(sizes) if window_rows is None else window_rows})
        return draft.publish(root / "activations")


def draw_activations() -> np.ndarray:
    """Sample sparse mixtures of 64 directions, (tokens, 32) float16."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    mix = torch.rand(10_000, 64, generator=generator)
    return ((mix * (mix > 0.95)) @ directions + 0.1).half().numpy()


def write_activations(folder: Path, n: int = 4096) -> Path:
    """Write sparse mixtures of 24 directions, so that some latents are better than others."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((24, D_MODEL))
    codes = rng.random((n, 24)) * (rng.random((n, 24)) < 0.1)
    np.save(folder / "x.npy", (codes @ directions + 0.5).astype(np.float32))
    return folder / "x.npy"


def make_params(folder: Path, **train: object) -> Params:
    """Return params that import `x.npy` in `folder` and train a small SAE."""
    section = {"d_sae": 32, "k": 3, "epochs": 6, "batch_size": 256, "lr": 3e-3, "max_dead": 1.0} | train
    source = {"source": "files", "path": str(folder / "x.npy"), "name": "x", "model": "planted", "eval_share": 0.2}
    values = make_test_params(train=section).model_dump(mode="json") | {"extract": source}
    return Params.model_validate(values)


def prepare(folder: Path, params: Params) -> None:
    """Write params.yaml into `folder` and extract."""
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    run_stage("extract", params, ignore)
