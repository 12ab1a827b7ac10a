"""Stage `train`: train one or several SAEs on activations; each becomes `sae.safetensors`, `cfg.json` and training curves.

SAEs of the same activations are a group: they are trained together on the same batches, in one pass over the activations. One group is
trained after another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ommatid import schemas
from ommatid.activations.batches import Columns, Share, iter_batches, load_sample
from ommatid.compute.checkpoint import Checkpoint, State, inside
from ommatid.compute.prefetch import prefetch
from ommatid.config import Imported, TrainParams
from ommatid.errors import ConfigError, TrainingError
from ommatid.events import Listener, Warned, about, ignore
from ommatid.sae import distributed
from ommatid.sae.learner import CURVE_COLUMNS, Learner, Sample, histograms
from ommatid.sae.model import CONFIG, SAE, WEIGHTS
from ommatid.sae.schedule import Plan, make_plan
from ommatid.sae.step import Batch
from ommatid.sae.trainer import Trainer
from ommatid.store import Artefact, Draft
from ommatid.summaries import SAESummary, TrainedSAESummary, TrainingSummary
from ommatid.train.imported import write_imported
from ommatid.train.start import find_start

CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint of the first group in the draft's scratch folder; those of other groups have a number."""
SAMPLE = 16384
"""Number of tokens from which scale, mean and initial directions are taken."""
BATCHES_AHEAD = 4
"""Number of batches that are read ahead of the training step."""


def run(
    params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore, whole: Plan | None = None
) -> Artefact:
    """Train all SAEs, each group in one pass over its training split. A killed run continues from its last checkpoint, bit for bit.

    Args:
        params: The section `train`.
        inputs: `extract`, and `target` for a transcoder: activations, or the extraction if SAEs have different hookpoints.
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
    each = params.each()
    # Imports come first, so that whatever is wrong with them is found before hours of training.
    imported = {name: one for name, one in each.items() if isinstance(one.variant, Imported)}
    saes = {name: write_imported(name, one, select_activations(one, inputs), draft) for name, one in imported.items()}
    groups = make_groups(params, inputs)
    for group in groups:
        group.plans(whole)  # raises an error if there are too few tokens, before any is read
    for number, group in enumerate(groups):
        checkpoint = Checkpoint(draft, f"{draft.scratch.name}/{_checkpoint_name(number)}")
        children = {name: draft.child(name, "sae", one.identity(), group.inputs) for name, one in group.saes.items()}
        found = {name: sealed for name, child in children.items() if (sealed := child.sealed())}
        if len(found) < len(children):
            distributed.agree_to_train(number)
            listen = about(group.name, len(groups) == 1, on_event)
            learners = fit(params, group, checkpoint, listen, whole, must_survive=len(groups) == 1)
            found |= {name: _write(learners[name], group.inputs, child) for name, child in children.items() if name not in found}
            checkpoint.remove()
        saes |= found
    if groups and all(has_diverged(sae) for sae in saes.values()):
        raise TrainingError("train: the loss of every SAE diverged at every hookpoint: lower train.lr")
    distributed.agree_to_train(None)
    of = {name: TrainedSAESummary(**{key: saes[name].summary[key] for key in TrainedSAESummary.__annotations__}) for name in each}
    return draft.seal(TrainingSummary(saes=list(of), of=of))


def follow(params: TrainParams, inputs: Mapping[str, Artefact]) -> None:
    """Take part in training as a rank other than the first, until that trains nothing more."""
    groups = make_groups(params, inputs)
    while (number := distributed.agree_to_train()) is not None:
        fit(params, groups[number], None, ignore, must_survive=len(groups) == 1)


@dataclass(frozen=True)
class Group:
    """SAEs of the same activations, which are trained together."""

    saes: Mapping[str, TrainParams]
    """Params of each SAE, by its folder name."""
    inputs: Mapping[str, Artefact]
    """The activations that they encode (`extract`) and, for transcoders, those that they decode (`target`)."""

    @property
    def name(self) -> str:
        """What its SAEs have in common, for progress events."""
        return next(iter(self.saes.values())).place

    def plans(self, whole: Plan | None) -> dict[str, Plan]:
        """Make the plan of each SAE; see `run`.

        Raises:
            TrainingError: There are too few tokens.
        """
        plans = {name: make_plan(one, self.inputs["extract"].rows("train")) for name, one in self.saes.items()}
        return plans if whole is None else {name: plan.like(whole) for name, plan in plans.items()}


def make_groups(params: TrainParams, inputs: Mapping[str, Artefact]) -> list[Group]:
    """Group the SAEs that are not imported by the activations that they encode and decode, in the order of `params`."""
    found: dict[str, dict[str, TrainParams]] = {}
    for name, one in params.each().items():
        if not isinstance(one.variant, Imported):
            found.setdefault(one.place, {})[name] = one
    return [Group(saes, select_activations(next(iter(saes.values())), inputs)) for saes in found.values()]


def select_activations(one: TrainParams, inputs: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """Select the activations that one SAE encodes (`extract`) and, for a transcoder, decodes (`target`)."""
    names = {"extract": one.hookpoint, "target": one.target}
    found: dict[str, Artefact] = {}
    for stage, artefact in inputs.items():
        if artefact.manifest.kind != "extraction":
            found[stage] = artefact
        elif name := names[stage]:
            found[stage] = artefact.child(name, "activations")
    return found


def has_diverged(sae: Artefact) -> bool:
    """Return whether the loss of a trained SAE diverged."""
    return not math.isfinite(sae.summary["fvu"])


def _checkpoint_name(group: int) -> str:
    return f"{group}-{CHECKPOINT}" if group else CHECKPOINT


def fit(
    params: TrainParams,
    group: Group,
    checkpoint: Checkpoint | None,
    on_event: Listener,
    whole: Plan | None = None,
    must_survive: bool = True,
) -> dict[str, Learner]:
    """Train the SAEs of a group. Every rank calls this.

    Args:
        params: The section `train`.
        group: The SAEs.
        checkpoint: Checkpoint that the first rank reads and writes; None on all other ranks.
        on_event: Called with each progress event and warning.
        whole: Plan of the longer run for which this one is a trial; see `run`.
        must_survive: Whether it is an error if all SAEs of the group diverge.

    Returns:
        The learner of each SAE by its folder name, after the last step.

    Raises:
        ConfigError: A batch cannot be shared evenly among the ranks.
        TrainingError, StoppedError: See `run`.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    inputs = group.inputs
    learners = _learners(group, distributed.broadcast_tensors(checkpoint.load() if checkpoint else {}, device), device, whole, on_event)
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
        Trainer(learners, on_event, checkpoint, params.patience, must_survive).fit(ready)
    return {learner.name: learner for learner in learners}


def _learners(group: Group, saved: State, device: torch.device, whole: Plan | None, on_event: Listener) -> Sequence[Learner]:
    plans = group.plans(whole)
    if not saved:
        starts = {name: _find_start(name, one, group.inputs, on_event) for name, one in group.saes.items()}
        sample = _load_sample(group.inputs)
        return [Learner.begin(name, one, plans[name], sample, device, starts[name]) for name, one in group.saes.items()]
    return [Learner.restore(name, one, plans[name], inside(saved, name), device) for name, one in group.saes.items()]


def _find_start(name: str, params: TrainParams, inputs: Mapping[str, Artefact], on_event: Listener) -> SAE | None:
    """Load the SAE to begin with; if there is none that fits, say why training begins anew."""
    start = find_start(params, inputs)
    if isinstance(start, str):
        on_event(Warned(f"train: {name} begins anew: {start}"))
        return None
    return start


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
