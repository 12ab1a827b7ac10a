"""Stage `train`: train one or several SAEs on activations; each becomes `sae.safetensors`, `cfg.json` and training curves."""

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
"""Name of the checkpoint in the draft's scratch folder."""
SAMPLE = 16384
"""Number of tokens from which scale, mean and initial directions are taken."""
BATCHES_AHEAD = 4
"""Number of batches that are read ahead of the training step."""


def run(
    params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore, whole: Plan | None = None
) -> Artefact:
    """Train all SAEs in one pass over the training split. A killed run continues from its last checkpoint, bit for bit.

    Args:
        params: The section `train`.
        inputs: `extract`, and `target` for a transcoder.
        draft: Draft that the SAEs are written into.
        on_event: Called with each progress event and warning.
        whole: Plan of the longer run for which this one is a trial, so that its steps cost as much as that run's; None if this is
            no trial.

    Returns:
        The sealed artefact, with one child for each SAE.

    Raises:
        TrainingError: There are too few tokens, or the loss of every SAE diverged. An SAE that diverges alone fails the gate later.
        StoppedError: The process was asked to stop, and has saved a checkpoint.
        ModelError: An SAE to be imported cannot be read, or its widths are not those of the activations.
    """
    checkpoint = Checkpoint(draft, f"{draft.scratch.name}/{CHECKPOINT}")
    # Imports come first, so that whatever is wrong with them is found before hours of training.
    saes = {name: write_imported(name, one, inputs, draft) for name, one in params.each().items() if isinstance(one.variant, Imported)}
    if len(saes) < len(params.each()):
        distributed.agree_to_train()
        for name, learner in fit(params, inputs, checkpoint, on_event, whole).items():
            child = draft.child(name, "sae", learner.params.identity())
            saes[name] = child.sealed() or _write(learner, inputs, child)
    of = {name: TrainedSAESummary(**{key: saes[name].summary[key] for key in TrainedSAESummary.__annotations__}) for name in params.each()}
    return draft.seal(TrainingSummary(saes=list(of), of=of))


def follow(params: TrainParams, inputs: Mapping[str, Artefact]) -> None:
    """Take part in training as a rank other than the first; do nothing if the first rank decides not to train."""
    if distributed.agree_to_train():
        fit(params, inputs, None, ignore)


def fit(
    params: TrainParams,
    inputs: Mapping[str, Artefact],
    checkpoint: Checkpoint | None,
    on_event: Listener,
    whole: Plan | None = None,
) -> dict[str, Learner]:
    """Train all SAEs that are not imported. Every rank calls this.

    Args:
        params: The section `train`.
        inputs: `extract`, and `target` for a transcoder.
        checkpoint: Checkpoint that the first rank reads and writes; None on all other ranks.
        on_event: Called with each progress event and warning.
        whole: Plan of the longer run for which this one is a trial; see `run`.

    Returns:
        The learner of each SAE by its folder name, after the last step.

    Raises:
        ConfigError: A batch cannot be shared evenly among the ranks.
        TrainingError, StoppedError: See `run`.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    learners = _learners(params, inputs, distributed.broadcast_tensors(checkpoint.load() if checkpoint else {}, device), device, whole)
    first = learners[0]
    if first.plan.batch_size % distributed.n_ranks():
        raise ConfigError(
            f"train.batch_size: {first.plan.batch_size} tokens cannot be shared evenly among {distributed.n_ranks()} processes; "
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
    # Plans come first: they raise an error if there are too few tokens, before any is read.
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
    """Yield the batches in pinned memory, from which a GPU copies asynchronously; on a CPU yield them as they are."""
    if device.type != "cuda":
        yield from batches
        return
    for batch in batches:
        x = batch.x.pin_memory()
        target = x if batch.target is batch.x else batch.target.pin_memory()
        yield Batch(x, target, batch.joint.pin_memory() if batch.joint is not None else None)


def _write(learner: Learner, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    activations, plan = inputs["extract"].summary, learner.plan
    target = inputs["target"].summary["hookpoint"] if "target" in inputs else None
    sae = learner.finish(activations["hookpoint"], activations["model"], target)
    with draft.write_file(WEIGHTS) as weights, draft.write_file(CONFIG) as cfg:
        sae.save(weights, cfg)
    draft.write_table("curves.parquet", _curves(learner))
    final = dict(zip(CURVE_COLUMNS, learner.curves[-1].tolist(), strict=True))
    summary = SAESummary(
        sae=f"{learner.name}-{draft.describe(WEIGHTS).sha256[:8]}",  # unique, unlike the folder name
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
