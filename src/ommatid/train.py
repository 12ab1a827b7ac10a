"""Stage `train`: activations in; for each SAE `sae.safetensors` + `cfg.json` + training curves out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ommatid import schemas
from ommatid.config import TrainParams
from ommatid.events import Listener, about, ignore
from ommatid.reader import iter_batches, load_sample
from ommatid.sae.model import CONFIG, WEIGHTS, SAEConfig
from ommatid.sae.trainer import CURVE_COLUMNS, Plan, State, Trainer, finish, make_plan, make_state
from ommatid.store import Artefact, Draft

SAMPLE = 16384
"""Tokens from which scale, mean and initial directions are taken."""
SUMMARISED = ("sae", "n_steps", "n_tokens", "fvu", "l0", "dead")
"""What the training's summary says of each SAE."""


def train(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Train every SAE of `params` on the train split; a run that died goes on from its last checkpoint, bit for bit.

    Raises:
        TrainingError: too few tokens, or the loss diverged.
    """
    saes = params.each()
    made: dict[str, Artefact] = {}
    for name, one in saes.items():
        child = draft.child(name, "sae", one.identity())
        made[name] = child.sealed() or _train_one(one, name, inputs, child, about(name, len(saes) == 1, on_event))
    return draft.seal({"saes": list(made), "of": {name: {key: sae.summary[key] for key in SUMMARISED} for name, sae in made.items()}})


def _train_one(one: TrainParams, name: str, inputs: Mapping[str, Artefact], child: Draft, on_event: Listener) -> Artefact:
    activations = inputs["extract"]
    plan = make_plan(one, activations.rows("train"))
    checkpoint = child.scratch / f"{name}.safetensors"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = State.load(checkpoint, device) if checkpoint.exists() else make_state(one, load_sample(activations, SAMPLE).to(device))

    def save(state: State) -> None:
        with child.write_file(f"{child.scratch.name}/{checkpoint.name}") as path:
            state.save(path)

    Trainer(one, plan, state, on_event).fit(iter_batches(activations, plan.batch_size, one.seed, int(state.step)), save)
    return _write(one, name, activations, child, plan, state)


def _write(one: TrainParams, name: str, activations: Artefact, child: Draft, plan: Plan, state: State) -> Artefact:
    seen = activations.summary
    sae = finish(state, SAEConfig(one.variant.kind, seen["d_model"], one.d_sae, one.k, seen["hookpoint"], seen["model"]))
    with child.write_file(WEIGHTS) as weights, child.write_file(CONFIG) as cfg:
        sae.save(weights, cfg)
    child.write_table("curves.parquet", _curves(state, plan))
    final = dict(zip(CURVE_COLUMNS, state.curves[-1].tolist(), strict=True))
    summary: dict[str, Any] = {
        "sae": f"{name}-{child.describe(WEIGHTS).sha256[:8]}",  # the name of another training's SAE may be the same
        "n_steps": plan.n_steps,
        "n_tokens": plan.n_steps * plan.batch_size,
        "fvu": final["fvu"],
        "l0": final["l0"],
        "dead": final["dead"],
        "dead_latents": (state.idle >= plan.dead_after).nonzero()[:, 0].tolist(),
        "dead_after": plan.dead_after,
        "threshold": float(sae.threshold),
        "scale": float(state.scale),
    }
    return child.seal(summary)


def _curves(state: State, plan: Plan) -> pa.Table:
    columns: dict[str, np.ndarray] = dict(zip(CURVE_COLUMNS, state.curves.T.numpy(), strict=True))
    steps = columns["step"].astype(np.int64)
    columns |= {"step": steps, "tokens": steps * plan.batch_size}
    return pa.table({name: columns[name] for name in schemas.CURVES.names}, schema=schemas.CURVES)
