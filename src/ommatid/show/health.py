"""A picture of a dictionary's health: how often its latents fire, how alike they are, and how its training went."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter
from safetensors import safe_open

from ommatid.compute.nearest import ALIKE, UnitRows, nearest
from ommatid.show.pictures.page import ACCENT, ALARM, FAINT, GREY, INK, MARGIN, Page, percent, short
from ommatid.stage import HEALTH
from ommatid.store import Artefact

WIDTH, HEIGHT = 1240, 640
PLOT_WIDTH, PLOT_HEIGHT = 330, 180
LEFT, STEP = MARGIN + 34, 398
"""Left edge of the first plot, and distance from one plot to the next, in pixels."""
ROWS = (124, 402)
"""Top edges of the two rows of plots, in pixels."""
BINS = 48
"""Bins of the histograms that are computed from the weights."""
N_COMPARED = 2048
"""Largest number of latents, evenly spread over the dictionary, that are compared with all others; comparing all can take minutes."""


def draw_all(training: Artefact, reports: Path) -> dict[str, list[Path]]:
    """Draw the health of every SAE of a training, and remove the pictures of earlier trainings.

    Args:
        training: The training.
        reports: Folder of the reports; the pictures are written to its folder `HEALTH`.

    Returns:
        The pictures of each SAE.
    """
    folder = reports / HEALTH
    shutil.rmtree(folder, ignore_errors=True)
    pictures = {}
    for name, sae in training.each().items():
        draw_health(sae, name, folder / f"{name}.png")
        pictures[name] = [folder / f"{name}.png"]
    return pictures


def draw_health(sae: Artefact, name: str, path: Path) -> None:
    """Draw three histograms of the latents and three curves of training.

    Args:
        sae: One SAE of a training.
        name: Name of the SAE in its training.
        path: PNG file to write.
    """
    weights = _load(sae, ("W_enc", "W_dec"))
    page = Page(WIDTH, HEIGHT)
    page.text(MARGIN, MARGIN - 10, short(name, 80), 15, weight="bold")
    page.text(MARGIN, MARGIN + 18, _caption(sae.summary, len(weights["W_dec"])), 9.5, GREY)
    _draw_density(page, sae.summary, len(weights["W_dec"]))
    _draw_likeness(page, nearest_cosines(weights["W_dec"]))
    _draw_norms(page, np.linalg.norm(weights["W_enc"], axis=0))
    _draw_curves(page, _load_curves(sae))
    page.save(path)


def _load(sae: Artefact, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Load weights, with numbers in place of NaN and infinity."""
    with safe_open(sae.file("sae.safetensors"), framework="numpy") as file:
        # The gate reports weights that are not finite; the picture is still drawn.
        return {name: np.nan_to_num(file.get_tensor(name)) for name in names}


def _load_curves(sae: Artefact) -> dict[str, np.ndarray]:
    """Load the curves of training. If the SAE diverged, measurements that are not finite are left out, unless there are no others."""
    table = sae.read("curves")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    measured = np.isfinite(columns["fvu"])
    return {name: column[measured] if measured.any() else np.nan_to_num(column) for name, column in columns.items()}


def _caption(summary: Mapping[str, Any], d_sae: int) -> str:
    return (
        f"{d_sae:,} latents after {summary['n_steps']:,} steps over {summary['n_tokens']:,} tokens: FVU {summary['fvu']:.4f}, "
        f"L0 {summary['l0']:.2f}, {percent(summary['dead'])} dead"
    )


def nearest_cosines(directions: np.ndarray) -> np.ndarray:
    """Return the cosine of latents with the nearest other latent.

    Args:
        directions: Directions of all latents, `(d_sae, d_out)`.

    Returns:
        Cosines of at most `N_COMPARED` latents, `(latents,)` float32.
    """
    n = len(directions)
    compared = np.unique(np.linspace(0, n - 1, min(N_COMPARED, n)).astype(int))
    queries, others = UnitRows(len(compared), lambda rows: directions[compared[rows]]), UnitRows(n, lambda rows: directions[rows])
    return np.maximum(nearest(queries, others, 1, compared).cosines[:, 0], -1.0)


# ---- the plots


def _draw_density(page: Page, summary: Mapping[str, Any], d_sae: int) -> None:
    edges, counts = summary["histograms"].get("log10_density", ([-1.0, 0.0], [0]))
    axes = _plot(page, 0, 0, "How often latents fire", "firings per token, log10")
    _draw_bars(axes, edges, counts)
    silent = d_sae - sum(counts)
    _remark(axes, f"{silent:,} did not fire recently", ALARM if silent > d_sae // 10 else GREY)


def _draw_likeness(page: Page, cosines: np.ndarray) -> None:
    axes = _plot(page, 1, 0, "How alike latents are", "cosine with the nearest other direction")
    counts, edges = np.histogram(cosines, BINS, (min(0.0, float(cosines.min())), 1.0))
    _draw_bars(axes, edges, counts)
    axes.axvline(ALIKE, color=ALARM, linewidth=0.8, linestyle=(0, (4, 3)))
    share = float((cosines > ALIKE).mean())
    _remark(axes, f"{percent(share)} above {ALIKE}", ALARM if share > 0.1 else GREY)


def _draw_norms(page: Page, norms: np.ndarray) -> None:
    axes = _plot(page, 2, 0, "Norms of encoders", "norm of a latent's encoder")
    low, high = float(norms.min()), float(norms.max())
    # All norms are equal before the first step of training, and the range of a histogram must not be empty.
    counts, edges = np.histogram(norms, BINS, (low, max(high, low * 1.01, 1e-6)))
    _draw_bars(axes, edges, counts)
    _remark(axes, f"median {np.median(norms):.3g}", GREY)


def _draw_curves(page: Page, curves: Mapping[str, np.ndarray]) -> None:
    for column, (key, title) in enumerate({"fvu": "FVU", "l0": "L0", "dead": "Share of dead latents"}.items()):
        axes = _plot(page, column, 1, title, "tokens")
        values = curves[key]
        axes.plot(curves["tokens"], values, color=ACCENT, linewidth=1.5, marker="." if len(values) == 1 else "")
        # The first values of FVU are far above the rest, and would flatten the curve.
        highest = float(np.quantile(values, 0.9)) * 1.3 if key == "fvu" else float(values.max()) * 1.1
        axes.set_ylim(0, max(highest, 0.01))
        axes.set_xlim(0, max(curves["tokens"][-1], 1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        _remark(axes, f"{values[-1]:.4g} at the end", GREY)


def _plot(page: Page, column: int, row: int, title: str, label: str) -> Any:
    x, y = LEFT + STEP * column, ROWS[row]
    page.text(x, y - 26, title, 10, INK, weight="bold")
    axes = page.axes(x, y, PLOT_WIDTH, PLOT_HEIGHT)
    axes.set_xlabel(label, fontsize=8.5, color=GREY)
    axes.locator_params(nbins=6)
    return axes


def _draw_bars(axes: Any, edges: Any, counts: Any) -> None:
    axes.stairs(counts, edges, fill=True, color=ACCENT, zorder=2)
    axes.set_ylim(0, max(1, int(np.max(counts))) * 1.12)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _remark(axes: Any, text: str, colour: str) -> None:
    """Write a remark above a plot, at its right edge."""
    axes.text(1.0, 1.055, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=colour)
