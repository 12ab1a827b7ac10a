"""Stage `train`: activations in, one or several SAEs out, each with `sae.safetensors`, `cfg.json` and training curves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
import torch

from ommatid import schemas
from ommatid.activations.batches import Columns, Share, iter_batches, load_sample
from ommatid.compute.checkpoint import Checkpoint, State, inside
from ommatid.compute.prefetch import prefetch
from ommatid.config import Imported, TrainParams
from ommatid.errors import ConfigError
from ommatid.events import Listener, ignore
from ommatid.sae import distributed
from ommatid.sae.learner import CURVE_COLUMNS, Learner, Sample, histograms
from ommatid.sae.model import CONFIG, WEIGHTS
from ommatid.sae.schedule import Plan, make_plan
from ommatid.sae.step import Batch
from ommatid.sae.trainer import Trainer
from ommatid.store import Artefact, Draft
from ommatid.summaries import SAESummary, TrainedSAESummary, TrainingSummary
from ommatid.train.imported import write_imported

CHECKPOINT = "checkpoint.safetensors"
SAMPLE = 16384
"""Tokens from which scale, mean and initial directions are taken."""
BATCHES_AHEAD = 4
"""Ready before the step that needs them."""


def run(
    params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore, whole: Plan | None = None
) -> Artefact:
    """Train all SAEs in one pass over the train split; a run that died goes on from its last checkpoint, bit for bit.

    Args:
        params: The section `train`.
        inputs: `extract`, and `target` for a transcoder.
        draft: Where the SAEs are written.
        on_event: Called with progress events.
        whole: Plan of a longer run for which this one is a trial, so that its steps must cost as much; None if it is no trial.

    Raises:
        TrainingError: too few tokens, or the loss of every SAE diverged; one that diverges while others go on fails the gate.
        StoppedError: the process was asked to end; a checkpoint is there.
        ModelError: an SAE to be imported cannot be read, or is of another width.
    """
    checkpoint = Checkpoint(draft, f"{draft.scratch.name}/{CHECKPOINT}")
    made = {
        name: write_imported(name, one, inputs, draft) for name, one in params.each().items() if isinstance(one.variant, Imported)
    }  # first: what is wrong with them is found before hours of training
    if len(made) < len(params.each()):
        distributed.agree_to_train()
        for name, learner in fit(params, inputs, checkpoint, on_event, whole).items():
            child = draft.child(name, "sae", learner.params.identity())
            made[name] = child.sealed() or _write(learner, inputs, child)
    of = {name: TrainedSAESummary(**{key: made[name].summary[key] for key in TrainedSAESummary.__annotations__}) for name in params.each()}
    return draft.seal(TrainingSummary(saes=list(of), of=of))


def follow(params: TrainParams, inputs: Mapping[str, Artefact]) -> None:
    """What every rank but the first does: train with it, if it trains."""
    if distributed.agree_to_train():
        fit(params, inputs, None, ignore)


def fit(
    params: TrainParams,
    inputs: Mapping[str, Artefact],
    checkpoint: Checkpoint | None,
    on_event: Listener,
    whole: Plan | None = None,
) -> dict[str, Learner]:
    """Train; called by every rank, of which the first has the checkpoint and writes it.

    Raises:
        ConfigError: a batch cannot be shared among the ranks.
        TrainingError, StoppedError: see `train`.

    Args:
        params: Of the stage.
        inputs: `extract`, and `target` for a transcoder.
        checkpoint: Read and written by the first rank only; None on the others.
        on_event: Hears of progress.
        whole: See `train`.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    learners = _learners(params, inputs, distributed.broadcast_tensors(checkpoint.load() if checkpoint else {}, device), device, whole)
    first = learners[0]
    if first.plan.batch_size % distributed.n_ranks():
        raise ConfigError(
            f"train.batch_size: {first.plan.batch_size} tokens a step cannot be shared evenly by {distributed.n_ranks()} processes; "
            f"set a multiple of {distributed.n_ranks()}"
        )
    columns = Columns(inputs["extract"], inputs.get("target"), any(learner.params.ms_weight for learner in learners))
    share = Share(distributed.rank(), distributed.n_ranks())
    batches = iter_batches(columns, first.plan.batch_size, params.seed, max(learner.guides.step for learner in learners), share)
    with closing(prefetch(_pinned(batches, device), BATCHES_AHEAD)) as ready:
        Trainer(learners, on_event, checkpoint, params.patience).fit(ready)
    return {learner.name: learner for learner in learners}


def _learners(
    params: TrainParams, inputs: Mapping[str, Artefact], saved: State, device: torch.device, whole: Plan | None
) -> Sequence[Learner]:
    trained = {name: one for name, one in params.each().items() if not isinstance(one.variant, Imported)}
    # refuses too few tokens before any are read
    plans = {name: make_plan(one, inputs["extract"].rows("train")) for name, one in trained.items()}
    if whole is not None:
        plans = {name: plan.like(whole) for name, plan in plans.items()}
    if not saved:
        sample = _load_sample(inputs)
        return [Learner.begin(name, one, plans[name], sample, device) for name, one in trained.items()]
    return [Learner.restore(name, one, plans[name], inside(saved, name), device) for name, one in trained.items()]


def _load_sample(inputs: Mapping[str, Artefact]) -> Sample:
    return Sample(load_sample(inputs["extract"], SAMPLE), load_sample(inputs["target"], SAMPLE) if "target" in inputs else None)


def _pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """In memory from which a GPU copies by itself."""
    if device.type != "cuda":
        yield from batches
        return
    for batch in batches:
        x = batch.x.pin_memory()
        target = x if batch.target is batch.x else batch.target.pin_memory()
        yield Batch(x, target, batch.joint.pin_memory() if batch.joint is not None else None)


def _write(learner: Learner, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    seen, plan = inputs["extract"].summary, learner.plan
    target = inputs["target"].summary["hookpoint"] if "target" in inputs else None
    sae = learner.finish(seen["hookpoint"], seen["model"], target)
    with draft.write_file(WEIGHTS) as weights, draft.write_file(CONFIG) as cfg:
        sae.save(weights, cfg)
    draft.write_table("curves.parquet", _curves(learner))
    final = dict(zip(CURVE_COLUMNS, learner.curves[-1].tolist(), strict=True))
    summary = SAESummary(
        sae=f"{learner.name}-{draft.describe(WEIGHTS).sha256[:8]}",  # an SAE of another training may have the same folder name
        n_steps=plan.n_steps,
        n_tokens=plan.n_steps * plan.batch_size,
        fvu=final["fvu"],
        l0=final["l0"],
        dead=final["dead"],
        dead_latents=learner.dead.tolist(),
        dead_after=plan.dead_after,
        histograms=histograms(learner.weights, learner.density),
        threshold=float(sae.threshold.mean()),
        scale=learner.scales.x,
    )
    return draft.seal(summary)


def _curves(learner: Learner) -> pa.Table:
    columns: dict[str, np.ndarray] = dict(zip(CURVE_COLUMNS, learner.curves.T.numpy(), strict=True))
    steps = columns["step"].astype(np.int64)
    columns |= {"step": steps, "tokens": steps * learner.plan.batch_size}
    return pa.table({name: columns[name] for name in schemas.CURVES.names}, schema=schemas.CURVES)
