"""The picture docs/pictures/week.png: photographs, runs, champions, messages and faults of the week, each day as wide as the others.

`python benchmarks/week_picture.py` draws it again from benchmarks/results/week.json, which benchmarks/week.py writes.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GREY, FAINT, BLUE = "#1b1e23", "#6a7078", "#eef0f3", "#2b6cb0"
COLOURS = {
    "Promoted": "#2f855a",
    "Kept": BLUE,
    "Unchanged": "#a0a7b0",
    "Drifted": "#b7791f",
    "Rejected": "#c05621",
    "Crashed": "#b42318",
}
"""Colours of final states."""
LANES = ("runs of retrain", "messages", "champion", "out of order")
"""Lanes of the lower panel, from above."""
HALF = 0.17
"""Half of the height of a bar, in lanes."""


RESULT = Path(__file__).parent / "results/week.json"
PICTURE = Path(__file__).parents[1] / "docs/pictures/week.png"


def draw(
    days: Sequence[tuple[str, float]],
    photographs: Sequence[tuple[float, int]],
    runs: Sequence[dict[str, Any]],
    messages: Sequence[float],
    decisions: Sequence[dict[str, Any]],
    faults: Sequence[tuple[str, float, float]],
    end: float,
    path: Path = PICTURE,
) -> None:
    """Draw the week.

    Args:
        days: Names of the days, with the times at which they began, in seconds since 1970.
        photographs: Times at which photographs came or went, with their number then.
        runs: Runs as Prefect's API returns them.
        messages: Times at which messages came.
        decisions: Lines of decisions.jsonl.
        faults: Names of servers, with the times from which and until which they were out of order.
        end: End of the last day.
        path: File to write.
    """
    place = _places([when for _, when in days], end)
    figure = Figure(figsize=(12, 5.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 8))
    for axes in (above, below):
        for i in range(0, len(days), 2):
            axes.axvspan(i, i + 1, color=FAINT, lw=0)
        axes.tick_params(colors=INK, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    _draw_photographs(above, [(place(when), n) for when, n in photographs], len(days))
    below.set(xlim=(0, len(days)), ylim=(len(LANES) - 0.45, -0.75), yticks=range(len(LANES)))
    below.set_yticklabels(LANES, color=INK)
    below.set_xticks([i + 0.5 for i in range(len(days))], [name for name, _ in days])
    below.tick_params(axis="x", labelbottom=False, labeltop=False)
    above.tick_params(axis="x", labeltop=True)
    _draw_runs(below, runs, place)
    below.plot([place(when) for when in messages], [1] * len(messages), "o", color=INK, ms=7)
    _draw_champions(below, decisions, place, len(days))
    for i, (name, began, over) in enumerate(sorted(faults, key=lambda fault: fault[1])):
        left, right = place(began), place(over)
        below.barh(3, right - left - 0.01, 2 * HALF, left, color=COLOURS["Crashed"])
        # above and below in turn, as one fault may follow another at once
        y, side = (3 + HALF + 0.05, "top") if i % 2 else (3 - HALF - 0.05, "bottom")
        below.text((left + right) / 2, y, name, ha="center", va=side, color=INK, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _places(begins: Sequence[float], end: float) -> Callable[[float], float]:
    """Return the function from times to places, by which each day is 1 wide."""
    edges = [*begins, end]

    def place(when: float) -> float:
        day = min(max(bisect_right(edges, when) - 1, 0), len(begins) - 1)
        return min(day + (when - edges[day]) / (edges[day + 1] - edges[day]), float(len(begins)))

    return place


def _draw_photographs(axes: Axes, changes: Sequence[tuple[float, int]], end: int) -> None:
    axes.step([0.0, *(x for x, _ in changes), end], [0, *(n for _, n in changes), changes[-1][1]], where="post", color=BLUE, lw=2)
    for (x, n), following in zip(changes, [*(x for x, _ in changes[1:]), float(end)], strict=True):
        if following - x < 0.05:  # the next number would lie on this one
            continue
        axes.annotate(f"{n:,}", (x, n), (3, 4), textcoords="offset points", color=INK, fontsize=9)
    axes.set(ylim=(0, 1.35 * max(n for _, n in changes)), yticks=[])
    axes.set_ylabel("photographs", color=INK, rotation=0, ha="right", va="center")


def _draw_runs(axes: Axes, runs: Sequence[dict[str, Any]], place: Callable[[float], float]) -> None:
    before = -1.0
    for run in sorted(runs, key=lambda run: run["start_time"]):
        left, right = (place(datetime.fromisoformat(run[key]).timestamp()) for key in ("start_time", "end_time"))
        state = run["state"]["name"]
        axes.barh(0, max(right - left, 0.02), 2 * HALF, left, color=COLOURS[state])
        axes.plot(left, HALF + 0.1, "D" if run["auto_scheduled"] else "^", color=GREY, ms=5)
        middle = (left + right) / 2
        level = 0.3 if middle - before < 0.45 else 0.0  # or its name would lie on the one before
        before = middle if not level else -1.0
        axes.text(middle, -HALF - 0.05 - level, state, ha="center", va="bottom", color=COLOURS[state], fontsize=9)
    axes.plot([], [], "^", color=GREY, ms=5, label="started by images that came or went")
    axes.plot([], [], "D", color=GREY, ms=5, label="started by the schedule")
    axes.plot([], [], "x", color=BLUE, ms=7, mew=2, label="a challenger that did not win")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=3, frameon=False, labelcolor=INK, fontsize=9)


def _draw_champions(axes: Axes, decisions: Sequence[dict[str, Any]], place: Callable[[float], float], end: int) -> None:
    won = [one for one in decisions if one["decision"] == "champion"]
    names = {digest: "ABC"[i] for i, digest in enumerate(dict.fromkeys(one["challenger"]["digest"] for one in won))}
    for one, right in zip(won, [*_times(won[1:], place), float(end)], strict=True):
        left = place(datetime.fromisoformat(one["decided_at"]).timestamp())
        name = names[one["challenger"]["digest"]]
        axes.barh(2, right - left - 0.01, 2 * HALF, left, color=("#2f855a", "#276749", "#68a37f")["ABC".index(name)])
        said = f"{name} again" if one["how"] == "rollback" else name
        axes.text((left + right) / 2, 2, said, ha="center", va="center", color="white", fontsize=9, weight="bold")
    lost = [one for one in decisions if one["decision"] != "champion"]
    for x in _times(lost, place):
        axes.plot(x, 2 - HALF - 0.13, "x", color=BLUE, ms=7, mew=2)


def _times(decisions: Sequence[dict[str, Any]], place: Callable[[float], float]) -> Iterator[float]:
    return (place(datetime.fromisoformat(one["decided_at"]).timestamp()) for one in decisions)


if __name__ == "__main__":
    draw(**json.loads(RESULT.read_text(encoding="utf-8")))
