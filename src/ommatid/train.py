"""Stage `train`: activations in, `sae.safetensors` + `cfg.json` + training curves out."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch

from ommatid import schemas
from ommatid.config import TrainParams
from ommatid.events import Listener, ignore
from ommatid.reader import iter_batches, load_sample
from ommatid.sae.model import CONFIG, WEIGHTS, SAEConfig
from ommatid.sae.trainer import CURVE_COLUMNS, Plan, State, Trainer, finish, make_plan, make_state
from ommatid.store import Artefact, Draft

CHECKPOINT = "checkpoint.safetensors"
SAMPLE = 16384
"""Tokens from which scale, mean and initial directions are taken."""


def train(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Train on the train split of the activations; a run that died goes on from its last checkpoint, bit for bit.

    Raises:
        TrainingError: too few tokens, or the loss diverged.
    """
    activations = inputs["extract"]
    plan = make_plan(params, activations.rows("train"))
    checkpoint = draft.scratch / CHECKPOINT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = State.load(checkpoint, device) if checkpoint.exists() else make_state(params, load_sample(activations, SAMPLE).to(device))

    def save(state: State) -> None:
        with draft.write_file(f"{draft.scratch.name}/{CHECKPOINT}") as path:
            state.save(path)

    Trainer(params, plan, state, on_event).fit(iter_batches(activations, plan.batch_size, params.seed, int(state.step)), save)
    return _write(params, activations, draft, plan, state)


def _write(params: TrainParams, activations: Artefact, draft: Draft, plan: Plan, state: State) -> Artefact:
    seen = activations.summary
    config = SAEConfig("batch_topk", seen["d_model"], params.d_sae, params.k, seen["hookpoint"], seen["model"])
    sae = finish(state, config)
    with draft.write_file(WEIGHTS) as weights, draft.write_file(CONFIG) as cfg:
        sae.save(weights, cfg)
    draft.write_table("curves.parquet", _curves(state, plan))
    final = dict(zip(CURVE_COLUMNS, state.curves[-1].tolist(), strict=True))
    dead = (state.idle >= plan.dead_after).nonzero()[:, 0].tolist()
    summary = {
        "sae": _name(config, draft.describe(WEIGHTS).sha256),
        "n_steps": plan.n_steps,
        "n_tokens": plan.n_steps * plan.batch_size,
        "fvu": final["fvu"],
        "l0": final["l0"],
        "dead": final["dead"],
        "dead_latents": dead,
        "dead_after": plan.dead_after,
        "threshold": float(sae.threshold),
        "scale": float(state.scale),
    }
    return draft.seal(summary)


def _curves(state: State, plan: Plan) -> pa.Table:
    columns: dict[str, np.ndarray] = dict(zip(CURVE_COLUMNS, state.curves.T.numpy(), strict=True))
    steps = columns["step"].astype(np.int64)
    columns |= {"step": steps, "tokens": steps * plan.batch_size}
    return pa.table({name: columns[name] for name in schemas.CURVES.names}, schema=schemas.CURVES)


def _name(config: SAEConfig, weights: str) -> str:
    """Such as batch_topk-2560-k32-1a2b3c4d: the tail is the weights' checksum."""
    return f"{config.variant}-{config.d_sae}-k{config.k}-{weights[:8]}"
