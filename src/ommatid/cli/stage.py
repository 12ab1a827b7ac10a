"""The verbs that run a stage: how one is started from the command line, and the line that sums it up."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ommatid.cli.terminal import say, showing
from ommatid.compute.collector import collector_paused
from ommatid.config import Params, load_params
from ommatid.pipeline.checkout import StageWatch, watch_stage

if TYPE_CHECKING:
    from ommatid.store import Artefact

REJECTED = 3
"""Exit status of a stage whose gate rejected some SAEs and passed others; those that passed are published."""


def run(name: str, params_file: Path, overrides: Sequence[str], data: str, allow_rejected: bool = False) -> int:
    """Run a stage, or this process's share of a training that torchrun started.

    Args:
        name: Name of the stage.
        params_file: The params file.
        overrides: Values to override, such as `train.k=32`.
        data: Root of the artefacts, a path or URL.
        allow_rejected: Whether SAEs rejected by the gate leave the exit status at 0.

    Returns:
        The exit status: 0, or `REJECTED`.
    """
    watch = watch_stage(name)
    params = load_params(params_file, overrides)
    if name == "train" and params.train.init:
        from ommatid.publish.champion import resolve_start

        params = resolve_start(params)
    from ommatid.executors.workers import OPENMP_SETTINGS

    # before torch is imported, whose OpenMP reads them once
    for key, value in OPENMP_SETTINGS.items():
        os.environ.setdefault(key, value)
    if name == "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        has_rejected = _train_distributed(params, data, watch)
    else:
        has_rejected = _run_alone(name, params, data, watch)
    return REJECTED if has_rejected and not allow_rejected else 0


def _run_alone(name: str, params: Params, data: str, watch: StageWatch | None) -> bool:
    """Run a stage in this process; return whether its gate rejected any SAE."""
    with collector_paused():
        from ommatid.pipeline.inputs import study_params
        from ommatid.pipeline.run import run_stage

    with showing(sys.stdout, len(params.train.each()) > 1) as on_event:
        artefact = run_stage(name, study_params(name, params, data, on_event), on_event, data, watch=watch)
    rejected = f"; {len(artefact.rejected)} rejected: {', '.join(artefact.rejected)}" if artefact.rejected else ""
    say(f"{name}: {artefact.url} holds {_describe_contents(artefact)}{rejected}")
    return bool(artefact.rejected)


def _train_distributed(params: Params, data: str, watch: StageWatch | None) -> bool:
    """Train as one of the processes of `torchrun --nproc-per-node N -m ommatid train`.

    Returns:
        Whether the gate rejected any SAE, in the first process; False in all others.
    """
    from ommatid.pipeline.inputs import study_params
    from ommatid.pipeline.run import follow_training
    from ommatid.sae import distributed

    with distributed.process_group():
        if distributed.rank():
            follow_training(study_params("train", params, data), data)
            return False
        return _run_alone("train", params, data, watch)


def _describe_contents(artefact: "Artefact") -> str:
    """Number of SAEs or hookpoints, rows of each table, and size on disk."""
    from ommatid.store.filesystem import in_words

    children = list(artefact.each().values())
    rows: Counter[str] = Counter()
    for part in children or [artefact]:
        rows.update({table: part.rows(table) for table in part.tables})
    kind = "hookpoints" if artefact.manifest.kind == "extraction" else "SAEs"
    of = [f"{len(children)} {kind}"] if len(children) > 1 else []
    counts = [f"{n} {table}" for table, n in rows.items()]
    return ", ".join([*of, *counts, in_words(sum(f.bytes for part in [artefact, *children] for f in part.manifest.files))])
