"""Plots are SVG in which everything from data is escaped, and curves have their control lines and names."""

from itertools import pairwise
from xml.etree import ElementTree

from ommatid.show.svg import BOTTOM, Axis, draw_curves, draw_grid, draw_histogram, draw_points

EVIL = "<script>alert(1)</script>\"'&"


def test_text_from_data_is_never_markup() -> None:
    axis = Axis(0, 1, EVIL)
    plots = [
        draw_curves(EVIL, EVIL, EVIL, {EVIL: [(0, 0), (1, 1)], "b": [(0, 1), (1, 0)]}, EVIL),
        draw_grid(EVIL, axis, axis, [(0, 0.5, 0, 0.5, 3)], lambda *ends: EVIL, [(0.5, EVIL)]),
        draw_histogram(EVIL, EVIL, [(0, 1, 3)]),
        draw_points(EVIL, EVIL, EVIL, [(0, 0), (1, 2)]),
    ]
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert root.attrib["aria-label"] == EVIL and EVIL in [text.text for text in root.iter("text")]
        assert {element.tag for element in root.iter()} <= {"svg", "a", "title", "rect", "line", "path", "polyline", "text"}
    assert ElementTree.fromstring(plots[1].svg)[-1].tag == "text" and f'href="{EVIL}"' not in plots[1].svg


def test_every_curve_is_drawn_and_named_and_the_first_stands_out() -> None:
    plot = draw_curves("t", "dose", "effect", {"this": [(0, 0), (1, 4)], "other": [(0, 0), (1, 1)]}, "this", 400, 220)
    root = ElementTree.fromstring(plot.svg)
    assert root.attrib["viewBox"] == "0 0 400 220"
    curves = {line.attrib["class"]: line.attrib["points"] for line in root.iter("polyline")}
    assert set(curves) == {"curve", "curve control"}
    ends = {kind: float(points.split(" ")[-1].split(",")[1]) for kind, points in curves.items()}
    assert ends["curve"] < ends["curve control"]  # higher on the page
    assert {text.text: text.attrib["class"] for text in root.iter("text")}.items() >= {("this", "name"), ("other", "mark")}


def test_names_of_curves_lie_neither_on_each_other_nor_on_the_axis() -> None:
    names = ["a", "b", "c", "d"]
    plot = draw_curves(
        "t", "dose", "effect", {name: [(0, 0), (1, 0.001 * i)] for i, name in enumerate(names)} | {"high": [(0, 0), (1, 9)]}, "a"
    )
    places = sorted(words.y for words in plot.words if words.text in [*names, "high"])
    assert min(b - a for a, b in pairwise(places)) >= 13 and max(places) <= plot.height - BOTTOM - 4
