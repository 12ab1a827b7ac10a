"""The picture docs/pictures/train-cost.png: the time of a training step by d_sae and by k."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from train_cost import Points
from train_setup import CHECKOUT, Size

PICTURE = CHECKOUT / "docs/pictures/train-cost.png"
INK, GREY, FAINT, OURS = "#1b1e23", "#6a7078", "#d9dce1", "#2b6cb0"
MARKS = (("#b42318", "o"), ("#b7791f", "s"), ("#2f855a", "D"), ("#6b46c1", "^"))
"""Colours and markers of the peers, in the order in which they were measured."""


def draw(points: Points, size: Size, path: Path) -> None:
    """Draw two panels with logarithmic axes."""
    figure = Figure(figsize=(10, 4.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(6, 5))
    _panel(left, points.by_d_sae, f"d_sae, at k {size.k}")
    _panel(right, points.by_k, f"k, at d_sae {_thousands(size.d_sae)}")
    for i, (name, found) in enumerate(points.peers.items()):
        colour, mark = MARKS[i % len(MARKS)]
        shift = 1.035 ** (2 * i - len(points.peers) + 1)  # sideways, so that equal values do not hide each other
        left.plot([d_sae * shift for d_sae in found], list(found.values()), mark, color=colour, ms=7, mec="white", label=name)
        right.plot([size.k * shift], [found[size.d_sae]], mark, color=colour, ms=7, mec="white")
    left.set_ylabel("ms per step", color=INK)
    title = f"One training step: {size.batch_size:,} tokens of {size.d_model} values, on the CPU"
    figure.suptitle(title, x=0.012, ha="left", color=INK, weight="bold", size=12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, by: dict[int, tuple[float, float]], label: str) -> None:
    ours, floor = ([value[i] for value in by.values()] for i in range(2))
    axes.plot(list(by), floor, "--", color=GREY, lw=1.5, label="the encoder's product alone")
    axes.plot(list(by), ours, "-o", color=OURS, lw=2.2, ms=5, label="this project, batch_topk")
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_xticks(list(by), [_thousands(value) for value in by])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=FAINT, lw=0.8)
    axes.tick_params(colors=INK, which="both", length=0, labelleft=True)
    _hide(axes.spines[side] for side in ("top", "right", "left", "bottom"))


def _hide(spines: Iterable) -> None:
    for spine in spines:
        spine.set_visible(False)


def _thousands(value: int) -> str:
    return f"{value:,}"
