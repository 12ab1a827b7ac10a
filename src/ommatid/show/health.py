"""The health of a dictionary in one picture: how often latents fire, how alike they are, how training went."""

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
"""Of the first plot, and from one to the next."""
ROWS = (124, 402)
"""Tops of both rows of plots."""
BINS = 48
"""Of the histograms that are drawn from the weights."""
N_COMPARED = 2048
"""Latents, spread over the dictionary, that are compared with all others: all would take minutes where there are many."""


def draw_all(training: Artefact, reports: Path) -> dict[str, list[Path]]:
    """Draw the health of every SAE of a training into the folder `HEALTH` of the reports; pictures of earlier trainings are removed.

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
        name: In its training.
        path: The PNG to write.
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
    with safe_open(sae.file("sae.safetensors"), framework="numpy") as file:
        # what is not finite fails the gate, which says so
        return {name: np.nan_to_num(file.get_tensor(name)) for name in names}


def _load_curves(sae: Artefact) -> dict[str, np.ndarray]:
    """The measurements; of an SAE that diverged without the last, which has no numbers, unless it is the only one."""
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
    """Cosine of latents to their nearest other, (at most `N_COMPARED`,); `directions`: (d_sae, d_out)."""
    n = len(directions)
    mine = np.unique(np.linspace(0, n - 1, min(N_COMPARED, n)).astype(int))
    queries, others = UnitRows(len(mine), lambda rows: directions[mine[rows]]), UnitRows(n, lambda rows: directions[rows])
    return np.maximum(nearest(queries, others, 1, mine).cosines[:, 0], -1.0)


# ---- the plots


def _draw_density(page: Page, summary: Mapping[str, Any], d_sae: int) -> None:
    edges, counts = summary["histograms"].get("log10_density", ([-1.0, 0.0], [0]))
    axes = _plot(page, 0, 0, "How often latents fire", "firings a token, log10")
    _draw_bars(axes, edges, counts)
    silent = d_sae - sum(counts)
    _remark(axes, f"{silent:,} silent of late", ALARM if silent > d_sae // 10 else GREY)


def _draw_likeness(page: Page, cosines: np.ndarray) -> None:
    axes = _plot(page, 1, 0, "How alike latents are", "cosine of a direction to its nearest other")
    counts, edges = np.histogram(cosines, BINS, (min(0.0, float(cosines.min())), 1.0))
    _draw_bars(axes, edges, counts)
    axes.axvline(ALIKE, color=ALARM, linewidth=0.8, linestyle=(0, (4, 3)))
    share = float((cosines > ALIKE).mean())
    _remark(axes, f"{percent(share)} above {ALIKE}", ALARM if share > 0.1 else GREY)


def _draw_norms(page: Page, norms: np.ndarray) -> None:
    axes = _plot(page, 2, 0, "How long encoders are", "length of a latent's encoder")
    low, high = float(norms.min()), float(norms.max())
    # before training has moved them all are as long as each other
    counts, edges = np.histogram(norms, BINS, (low, max(high, low * 1.01, 1e-6)))
    _draw_bars(axes, edges, counts)
    _remark(axes, f"median {np.median(norms):.3g}", GREY)


def _draw_curves(page: Page, curves: Mapping[str, np.ndarray]) -> None:
    for column, (key, title) in enumerate({"fvu": "FVU", "l0": "L0", "dead": "Share of dead latents"}.items()):
        axes = _plot(page, column, 1, title, "tokens")
        values = curves[key]
        axes.plot(curves["tokens"], values, color=ACCENT, linewidth=1.5, marker="." if len(values) == 1 else "")
        # FVU begins far above where training goes
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
    """Above a plot, at its right."""
    axes.text(1.0, 1.055, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=colour)
