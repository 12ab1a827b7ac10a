"""The output of `ommatid estimate`: what a run will take, as a table with notes."""

from ommatid.cli.terminal import align
from ommatid.estimate import Estimate
from ommatid.store.filesystem import in_words


def format_estimate(estimate: Estimate) -> list[str]:
    """Format an estimate as lines: a row for each stage, the total, and notes on time and disk space."""
    return [*align(_rows(estimate)), *_notes(estimate)]


def _rows(estimate: Estimate) -> list[tuple[str, ...]]:
    rows = [("stage", "disk", "minutes", "memory", "by trials on")]
    for stage in estimate.stages:
        seconds, peak = (stage.seconds, stage.peak) if stage.sizes else (None, None)
        by = f"{' and '.join(map(str, {stage.sizes[0]: 0, stage.sizes[-1]: 0}))} images" if stage.sizes else "exists already: used as it is"
        minutes, memory = "-" if seconds is None else f"{seconds / 60:.1f}", "-" if peak is None else in_words(peak)
        rows.append((stage.stage, in_words(stage.bytes), minutes, memory, by))
    total = ("total", in_words(estimate.bytes), f"{estimate.seconds / 60:.1f}", in_words(estimate.peak), f"of {estimate.n_images} images")
    return [*rows, total]


def _notes(estimate: Estimate) -> list[str]:
    lines = [f"estimated in {estimate.took / 60:.1f} minutes"]
    if estimate.untried:
        lines.append(f"label: not included is what {' and '.join(estimate.untried)} will take, as no model is asked before the run")
    if estimate.free is not None:
        fits = estimate.missing <= estimate.free
        verdict = "it fits" if fits else "IT DOES NOT FIT: free some, or lower images.limit or extract.sample"
        needed, transient = in_words(estimate.missing), in_words(estimate.temporary)
        lines.append(f"disk: {needed} needed ({transient} of it only while a stage runs), {in_words(estimate.free)} free: {verdict}")
    return lines
