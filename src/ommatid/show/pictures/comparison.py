"""The comparison of all SAEs of a catalogue: fidelity, monosemanticity, their controls, and a table of the numbers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ommatid.catalog.reader import Catalog
from ommatid.show.numbers import in_order
from ommatid.show.pictures.page import FAINT, GREY, INK, MARGIN, Page, fixed, short

WIDTH = 1240
PLOT_HEIGHT, PLOT_WIDTH = 350, 510
LEGEND = 50
"""Height of the legend above the plots, in pixels."""
PLOT_TOP = MARGIN + 42 + LEGEND
AXIS = 58
"""Space to the left of a plot for the numbers on its axis, in pixels."""
N_NAMED = 3
"""Largest number of hookpoints that the caption names."""
N_ROWS = 16
"""Largest number of SAEs in the table, best first."""
ROW = 22
"""Height of a row of the table, in pixels."""
HUES = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096", "#975a16")
"""Colours of hookpoints and variants."""
LINE = "#a3a9b1"
"""Colour of lines that join SAEs of several colours."""
COLUMNS = (
    ("d_sae", 560),
    ("k", 620),
    ("L0", 695),
    ("FVU", 775),
    ("dead", 850),
    ("MS − floor", 950),
    ("95 % interval", 1080),
    ("labelled", 1168),
)
"""Columns of the table, with the right edge of each, in pixels from the margin."""
WORST_FVU = 1.1
"""FVU above which an untrained SAE is not drawn: random directions can be far worse than predicting the mean, whose FVU is 1."""


@dataclass(frozen=True)
class Entry:
    """The numbers of an SAE and of its controls."""

    sae: str
    """Name of the SAE in the catalogue."""
    name: str
    """Name of the SAE in its training."""
    place: str
    """Hookpoint that it encodes and, for a transcoder, the one that it decodes."""
    variant: str
    """Kind of the SAE."""
    d_sae: int
    """Number of latents."""
    k: int
    """Value of `train.k`."""
    l0: float
    """Mean number of latents that fire per token."""
    fvu: float | None
    """Fraction of variance unexplained."""
    dead: float
    """Share of dead latents."""
    above: float | None
    """Mean MS above its floor."""
    low: float | None
    """Lower end of the 95 % interval of `above`."""
    high: float | None
    """Upper end of the 95 % interval of `above`."""
    labelled: int
    """Number of latents with a label."""
    untrained_fvu: float | None
    """FVU of the untrained SAE."""
    untrained_l0: float
    """L0 of the untrained SAE."""
    untrained_above: float | None
    """Mean MS of the untrained SAE above its floor."""
    neurons_above: float | None
    """Mean MS of the raw neurons above its floor."""


def draw_comparison(catalog: Catalog, path: Path) -> None:
    """Draw every SAE of a catalogue: FVU against L0, MS above its floor against d_sae, and a table of the numbers.

    Args:
        catalog: The open catalogue.
        path: PNG file to write.

    Raises:
        QueryError: The file cannot be written.
    """
    entries = [Entry(*row) for row in catalog.rows(_ENTRIES)]
    colours = _colours(entries)
    rows = entries[:N_ROWS]
    page = Page(WIDTH, PLOT_TOP + PLOT_HEIGHT + 84 + ROW * len(rows) + 24 + MARGIN)
    page.text(
        MARGIN,
        MARGIN - 10,
        f"{len(entries)} SAEs of this catalogue" if len(entries) > 1 else "The SAE of this catalogue",
        15,
        weight="bold",
    )
    page.text(MARGIN, MARGIN + 16, _caption(catalog), 9, GREY)
    _draw_plots(page, MARGIN + 42, entries, colours)
    _draw_table(page, PLOT_TOP + PLOT_HEIGHT + 62, rows, len(entries), colours)
    page.save(path)


def make_plots(catalog: Catalog) -> Page:
    """Return a page with the two plots and their legend, without the table."""
    entries = [Entry(*row) for row in catalog.rows(_ENTRIES)]
    page = Page(WIDTH, MARGIN // 2 + LEGEND + PLOT_HEIGHT + 52)
    _draw_plots(page, MARGIN // 2, entries, _colours(entries))
    return page


def _caption(catalog: Catalog) -> str:
    ((model, hookpoints, judge, floor),) = catalog.rows(_SUBJECT)
    where = ", ".join(sorted(hookpoints, key=in_order)) if len(hookpoints) <= N_NAMED else f"at {len(hookpoints)} hookpoints"
    return f"trained on {model} {where}, measured on images not used in training. Judge {judge}, floor {fixed(floor)}"


# ---- colours


def _group(entry: Entry, entries: Sequence[Entry]) -> str:
    """Return what an SAE's colour stands for: its hookpoint and variant, as far as SAEs differ in them, or else its k."""
    varying = [
        name for key in ("place", "variant") for name in [getattr(entry, key)] if len({getattr(other, key) for other in entries}) > 1
    ]
    return ", ".join(varying) or f"k {entry.k}"


def _is_hued(entries: Sequence[Entry]) -> bool:
    """Return whether colours stand for hookpoints or variants, and not for k."""
    return len({(entry.place, entry.variant) for entry in entries}) > 1


def _colours(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the colour of each group, in the order of the legend: a hue for each, or shades from light to dark for increasing k."""
    if _is_hued(entries):
        return dict(zip(sorted({_group(entry, entries) for entry in entries}, key=in_order), _cycle(HUES), strict=False))
    ks = sorted({entry.k for entry in entries})
    shades = colormaps["viridis_r"](np.linspace(0.3, 0.9, len(ks))) if len(ks) > 1 else [HUES[0]]
    return {f"k {k}": to_hex(shade) for k, shade in zip(ks, shades, strict=True)}


def _cycle(hues: Sequence[str]) -> Iterable[str]:
    while True:
        yield from hues


def _draw_plots(page: Page, y: int, entries: Sequence[Entry], colours: dict[str, str]) -> None:
    _draw_legend(page, y, entries, colours)
    _draw_fidelity(page, MARGIN + AXIS, y + LEGEND, entries, colours)
    _draw_monosemanticity(page, WIDTH - MARGIN - PLOT_WIDTH, y + LEGEND, entries, colours)


def _draw_legend(page: Page, y: int, entries: Sequence[Entry], colours: dict[str, str]) -> None:
    x, room = MARGIN, WIDTH - 2 * MARGIN - 420  # The rest is for the names of the lines.
    if len({entry.variant for entry in entries}) == 1:
        page.text(x, y, entries[0].variant, 9.5, weight="bold")
        x += 14 + 8 * len(entries[0].variant)
    for i, (group, colour) in enumerate(colours.items()):
        if x + 44 + 8 * len(group) > MARGIN + room:
            page.text(x, y, f"and {len(colours) - i} more", 9.5, GREY)
            x += 100
            break
        page.text(x, y - 3, "●", 12, colour)
        page.text(x + 18, y, group, 9.5)
        x += 44 + 8 * len(group)
    page.text(x, y, "- - -  untrained SAEs of the same shapes        ———  raw neurons", 9.5, GREY)


# ---- the plots


def _draw_fidelity(page: Page, x: int, y: int, entries: Sequence[Entry], colours: dict[str, str]) -> None:
    """Plot FVU against L0, and join the SAEs that differ in k only."""
    page.text(x, y - 22, "Reconstruction: FVU against L0", 10, weight="bold")
    axes = _plot(page, x, y, "L0: latents that fire per token", "fraction of variance unexplained")
    known = [(entry, entry.fvu) for entry in entries if entry.fvu is not None]
    for line in _lines(known, lambda entry: (entry.place, entry.variant, entry.d_sae)):
        colour = colours[_group(line[0][0], entries)] if _is_hued(entries) else LINE
        _join(axes, [(entry.l0, fvu) for entry, fvu in line], color=colour)
    untrained = [(entry, entry.untrained_fvu) for entry in entries if entry.untrained_fvu is not None and entry.untrained_fvu < WORST_FVU]
    for line in _lines(untrained, lambda entry: (entry.place, entry.d_sae)):
        _join(axes, [(entry.untrained_l0, fvu) for entry, fvu in line], color=GREY, linestyle=(0, (4, 3)), marker="x", markersize=4)
    for entry, fvu in known:
        axes.plot(entry.l0, fvu, "o", color=colours[_group(entry, entries)], markersize=7, markeredgecolor="white", zorder=3)
    _mark_l0(axes, [entry.l0 for entry in entries])
    axes.set_ylim(bottom=0)


def _draw_monosemanticity(page: Page, x: int, y: int, entries: Sequence[Entry], colours: dict[str, str]) -> None:
    """Plot mean MS above its floor against width, and join the SAEs that differ in width only."""
    page.text(x, y - 22, "Monosemanticity: mean MS above its floor against width", 10, weight="bold")
    axes = _plot(page, x, y, "d_sae: number of latents", "mean MS − floor, with 95 % interval")
    known = [(entry, entry.above) for entry in entries if entry.above is not None]
    for line in _lines(known, lambda entry: (entry.place, entry.variant, entry.k)):
        _join(axes, [(entry.d_sae, above) for entry, above in line], color=colours[_group(line[0][0], entries)])
    untrained = [(entry, entry.untrained_above) for entry in entries if entry.untrained_above is not None]
    for line in _lines(untrained, lambda entry: (entry.place, entry.k)):
        _join(axes, [(entry.d_sae, above) for entry, above in line], color=GREY, linestyle=(0, (4, 3)), marker="x", markersize=4)
    for (entry, above), place in zip(known, _spread_over_width([entry for entry, _ in known]), strict=True):
        colour = colours[_group(entry, entries)]
        if entry.low is not None and entry.high is not None:
            axes.plot([place, place], [entry.low, entry.high], color=colour, linewidth=1.6, alpha=0.75, solid_capstyle="butt")
        axes.plot(place, above, "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)
    places = {entry.place: entry for entry in reversed(entries)}  # The neurons of a hookpoint are the same beside each of its SAEs.
    for entry in places.values():
        if entry.neurons_above is not None:
            axes.axhline(entry.neurons_above, color=colours[_group(entry, entries)] if len(places) > 1 else GREY, linewidth=1.2, zorder=1)
    _mark_widths(axes, (entry.d_sae for entry in entries))


def _plot(page: Page, x: int, y: int, across: str, up: str) -> Any:
    axes = page.axes(x, y, PLOT_WIDTH, PLOT_HEIGHT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, fontsize=9, color=GREY)
    axes.set_ylabel(up, fontsize=9, color=GREY)
    return axes


def _lines(points: list[tuple[Entry, float]], key: Any) -> Iterable[list[tuple[Entry, float]]]:
    """Group points into lines, by a key."""
    return [list(line) for _, line in groupby(sorted(points, key=lambda point: key(point[0])), key=lambda point: key(point[0]))]


def _join(axes: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    """Draw a thin line from left to right, through the mean of points that share a place."""
    ordered = [(x, np.mean([y for _, y in same])) for x, same in groupby(sorted(points), key=lambda point: point[0])]
    axes.plot(*zip(*ordered, strict=True), **{"linewidth": 1.2, "alpha": 0.6, **style})


def _spread_over_width(entries: Sequence[Entry]) -> list[float]:
    """Return the SAEs' places on the axis of widths; those of one width stand side by side, so that no interval covers another."""
    found: dict[str, float] = {}
    widths = {entry.d_sae for entry in entries}
    room, widest = (0.5, 0.08) if len(widths) == 1 else (0.25, 0.03)  # In octaves.
    for d_sae in widths:
        same = sorted((entry for entry in entries if entry.d_sae == d_sae), key=lambda entry: (entry.variant, entry.k, entry.sae))
        step = min(widest, room / len(same))
        found |= {entry.sae: d_sae * 2 ** (step * (i - (len(same) - 1) / 2)) for i, entry in enumerate(same)}
    return [found[entry.sae] for entry in entries]


def _mark_widths(axes: Any, widths: Iterable[int]) -> None:
    """Scale the axis to base 2, with space at both ends and a mark at every width."""
    marks = sorted(set(widths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(marks, labels=[f"{mark:,}" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(marks[0] / 2**0.3, marks[-1] * 2**0.3)


def _mark_l0(axes: Any, values: Sequence[float]) -> None:
    """Scale the axis to base 2 if the values span octaves."""
    low, high = min(values) / 1.25, max(values) * 1.25
    axes.set_xlim(low, high)
    if low > 0 and high / low > 3:
        marks = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(marks, labels=[f"{mark:,g}" for mark in marks])
        axes.set_xticks([], minor=True)


# ---- the table


def _draw_table(page: Page, y: int, entries: Sequence[Entry], n: int, colours: dict[str, str]) -> None:
    page.text(MARGIN + 18, y + 12, "SAE", 9, GREY, va="baseline")
    for title, right in COLUMNS:
        page.text(MARGIN + right, y + 12, title, 9, GREY, ha="right", va="baseline")
    page.rule(y + 20)
    for i, entry in enumerate(entries):
        at = y + 40 + ROW * i
        page.text(MARGIN, at + 1, "●", 12, colours[_group(entry, entries)], va="baseline")
        page.text(MARGIN + 18, at, short(entry.name, 52), 9.5, INK, va="baseline", weight="bold" if i == 0 else "normal")
        for (_, right), cell in zip(COLUMNS, _cells(entry), strict=True):
            page.text(MARGIN + right, at, cell, 9.5, ha="right", va="baseline")
    if n > len(entries):
        page.text(MARGIN + 18, y + 32 + ROW * len(entries), f"and {n - len(entries)} more; the relation runs lists all", 9, GREY)


def _cells(entry: Entry) -> list[str]:
    interval = "–" if entry.low is None or entry.high is None else f"{entry.low:.3f} to {entry.high:.3f}"
    above = "–" if entry.above is None else f"{entry.above:.3f}"
    fvu = "–" if entry.fvu is None else f"{entry.fvu:.3f}"
    labelled = f"{entry.labelled:,}"
    return [f"{entry.d_sae:,}", f"{entry.k}", f"{entry.l0:.1f}", fvu, f"{entry.dead:.1%}", above, interval, labelled]


_ENTRIES = """
    SELECT
        mine.sae, coalesce(runs.name, mine.sae), coalesce(runs.hookpoint || coalesce(' to ' || runs.target, ''), 'unknown'),
        coalesce(runs.variant, 'unknown'), mine.n_latents, coalesce(runs.k, 0),
        mine.l0, mine.fvu, mine.dead, mine.ms - mine.ms_floor, mine.ms_low - mine.ms_floor, mine.ms_high - mine.ms_floor,
        coalesce(runs.n_labelled, 0), untrained.fvu, untrained.l0, untrained.ms - untrained.ms_floor, neurons.ms - neurons.ms_floor
    FROM comparisons AS mine
    LEFT JOIN runs ON runs.sae = mine.sae
    JOIN comparisons AS untrained ON untrained.sae = mine.sae AND untrained.dictionary = 'untrained'
    JOIN comparisons AS neurons ON neurons.sae = mine.sae AND neurons.dictionary = 'neurons'
    WHERE mine.dictionary = 'sae'
    ORDER BY mine.ms - mine.ms_floor DESC NULLS LAST, mine.sae
"""
_SUBJECT = """
    SELECT any_value(runs.model), list(DISTINCT runs.hookpoint), any_value(comparisons.judge), any_value(comparisons.ms_floor)
    FROM comparisons JOIN runs ON runs.sae = comparisons.sae WHERE dictionary = 'sae'
"""
