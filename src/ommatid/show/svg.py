"""Plots as SVG, for the report and the explorer's pages: no script, no style attribute, and a title on every shape."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 66.0, 12.0, 10.0, 40.0
"""Margins for the numbers on the axes and their names."""


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float
    title: str
    """Text that a pointer on the shape shows, and a screen reader reads."""
    href: str | None = None
    """Address that the shape leads to; None for none."""
    kind: str = "bar"
    """Class of the shape in the style sheet."""
    opacity: float = 1.0


@dataclass(frozen=True)
class Stroke:
    """A straight line with a name at its end, such as a floor."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = "grid"
    name: str = ""


@dataclass(frozen=True)
class Words:
    """A text."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    kind: str = "tick"
    is_turned: bool = False
    """Whether it reads from bottom to top."""


@dataclass
class Plot:
    """A plot: shapes in pixels from the top left corner."""

    width: int
    height: int
    title: str
    """What the plot shows, for screen readers."""
    boxes: list[Box] = field(default_factory=list)
    strokes: list[Stroke] = field(default_factory=list)
    words: list[Words] = field(default_factory=list)
    curves: list[tuple[str, str]] = field(default_factory=list)
    """Points of each curve as SVG writes them, and its class."""
    areas: list[tuple[str, str]] = field(default_factory=list)
    """Points of each area as SVG writes them, and its class."""
    marks: list[tuple[float, bool]] = field(default_factory=list)
    """Horizontal places of vertical lines between which a slider of the page chooses, and whether each is shown."""
    dots: str = ""
    """Points as a path of strokes without length, whose round ends are drawn: the shortest way to write thousands."""

    @property
    def svg(self) -> Markup:
        """The plot as an SVG element of the class `plot`, whose colours are in the page's style sheet."""
        return Markup("\n").join(self._iter_shapes())

    def _iter_shapes(self) -> Iterator[Markup]:
        """Iterate over the lines of the SVG element, each with everything from data escaped."""
        yield _tag("svg", False, class_="plot", viewBox=f"0 0 {self.width} {self.height}", role="group", aria_label=self.title)
        for line in self.strokes:
            if line.kind in ("grid", "axis"):
                yield _tag("line", class_=line.kind, x1=line.x1, y1=line.y1, x2=line.x2, y2=line.y2)
        for box in self.boxes:
            yield _draw_box(box)
        for points, kind in self.areas:
            yield _tag("polygon", class_=kind, points=points)
        for x, is_shown in self.marks:
            hidden = {} if is_shown else {"hidden": ""}
            yield _tag("line", class_="at", x1=x, y1=TOP, x2=x, y2=self.height - BOTTOM, **hidden)
        if self.dots:
            yield _tag("path", class_="dots", d=self.dots)
        for points, kind in self.curves:
            yield _tag("polyline", class_=kind, points=points)
        for line in self.strokes:
            if line.kind not in ("grid", "axis"):
                yield _tag("line", class_=line.kind, x1=line.x1, y1=line.y1, x2=line.x2, y2=line.y2)
                yield _draw_words(Words(max(line.x2 - 4, 60), line.y2 - 5, line.name, "end", "mark"))
        for words in self.words:
            yield _draw_words(words)
        yield Markup("</svg>")


def _tag(name: str, is_whole: bool = True, /, **attributes: str | float) -> Markup:
    """Write a tag, with its end if it is whole; in the names of attributes, `_` stands for a hyphen, or for nothing at the end."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}{'/' if is_whole else ''}>")


def _draw_box(box: Box) -> Markup:
    opacity = {"fill_opacity": box.opacity} if box.opacity != 1 else {}
    shape = {"class_": box.kind, "x": box.x, "y": box.y, "width": box.width, "height": box.height}
    title = Markup("<title>{}</title>").format(box.title)
    if box.href:
        return _tag("a", False, href=box.href) + title + _tag("rect", **shape, **opacity) + Markup("</a>")
    return _tag("rect", False, **shape, **opacity) + title + Markup("</rect>")


def _draw_words(words: Words) -> Markup:
    turned = {"transform": f"rotate(-90 {words.x} {words.y})"} if words.is_turned else {}
    start = _tag("text", False, class_=words.kind, x=words.x, y=words.y, text_anchor=words.anchor, **turned)
    return start + escape(words.text) + Markup("</text>")


@dataclass(frozen=True)
class Axis:
    """The axis of a plot."""

    low: float
    high: float
    name: str
    is_log: bool = False

    def share(self, value: float) -> float:
        """Place of a value between the ends of the axis, 0 to 1 unless it lies outside."""
        low, high, value = (math.log10(x) if self.is_log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, n: int = 5) -> list[float]:
        """About n round values between the ends."""
        if self.is_log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        if self.high <= self.low:
            return [self.low]
        raw = (self.high - self.low) / n
        if raw < 1e-300 or self.low + raw == self.low:  # too near to each other for numbers between them
            return [self.low, self.high]
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def write(value: float) -> str:
    """Write a number on an axis, as short as it can be read."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"10{str(exponent).translate(_RAISED)}" if math.isclose(value, 10.0**exponent) else f"{value:.0e}"
    return f"{value:,.10g}".replace("-", "−")


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def make_frame(
    title: str, x: Axis, y: Axis, width: int = 560, height: int = 300
) -> tuple[Plot, Callable[[float], float], Callable[[float], float]]:
    """Make a plot with axes, and the functions that turn values into pixels."""
    plot = Plot(width, height, title)

    def to_x(value: float) -> float:
        return round(LEFT + x.share(value) * (width - LEFT - RIGHT), 1)

    def to_y(value: float) -> float:
        return round(height - BOTTOM - y.share(value) * (height - TOP - BOTTOM), 1)

    for value in x.ticks():
        plot.words.append(Words(to_x(value), height - BOTTOM + 16, write(value)))
    for value in y.ticks(4):
        plot.strokes.append(Stroke(LEFT, to_y(value), width - RIGHT, to_y(value)))
        plot.words.append(Words(LEFT - 6, to_y(value) + 4, write(value), "end"))
    plot.strokes.append(Stroke(LEFT, height - BOTTOM, width - RIGHT, height - BOTTOM, "axis"))
    plot.words.append(Words(LEFT + (width - LEFT - RIGHT) / 2, height - 6, x.name, kind="name"))
    plot.words.append(Words(13, TOP + (height - TOP - BOTTOM) / 2, y.name, kind="name", is_turned=True))
    return plot, to_x, to_y


def draw_histogram(title: str, name: str, bins: Sequence[tuple[float, float, int]]) -> Plot:
    """Draw a histogram of images.

    Args:
        title: What it shows.
        name: Name of the values.
        bins: Lower and upper end of each bin, and the number of images in it.
    """
    ends = [end for low, high, _ in bins for end in (low, high)]
    most = max((n for _, _, n in bins), default=1)
    plot, to_x, to_y = make_frame(title, Axis(min(ends), max(ends), name), Axis(0, most, "images"), height=200)
    for low, high, n in bins:
        if n:
            left, right, top = to_x(low), to_x(high), to_y(n)
            box = Box(
                left + 0.5,
                top,
                max(0.5, right - left - 1),
                to_y(0) - top,
                f"{write_share(low)} to {write_share(high)}: {_count(n, 'image')}",
            )
            plot.boxes.append(box)
    return plot


def _count(n: int, unit: str) -> str:
    return f"{n:,} {unit}{'s' if n != 1 else ''}"


def write_share(value: float) -> str:
    """Write an end of a bin with three significant digits."""
    return f"{value:.3g}".replace("-", "−")


def draw_grid(
    title: str,
    x: Axis,
    y: Axis,
    cells: Sequence[tuple[float, float, float, float, int]],
    address: Callable[[float, float, float, float], str],
    marks: Sequence[tuple[float, str]] = (),
) -> Plot:
    """Draw how many features lie in each cell of a plane, each cell a link.

    Args:
        title: What it shows.
        x: Horizontal axis.
        y: Vertical axis.
        cells: For each cell that is not empty, its ends on the horizontal axis, on the vertical axis, and the number of features.
        address: Function that returns the address of a cell's features, given its ends.
        marks: Value on the vertical axis and name of each horizontal line.
    """
    plot, to_x, to_y = make_frame(title, x, y)
    most = max((n for *_, n in cells), default=1)
    for x1, x2, y1, y2, n in cells:
        left, right, top, bottom = to_x(x1), to_x(x2), to_y(y2), to_y(y1)
        opacity = round(0.25 + 0.75 * math.log1p(n) / math.log1p(most), 2)
        where = f"{_count(n, 'feature')}; {x.name} {write_share(x1)} to {write_share(x2)}, {y.name} {write_share(y1)} to {write_share(y2)}"
        size = (round(max(1.0, right - left - 0.7), 1), round(max(1.0, bottom - top - 0.7), 1))
        plot.boxes.append(Box(left, top, *size, where, address(x1, x2, y1, y2), "cell", opacity))
    for value, name in marks:
        plot.strokes.append(Stroke(LEFT, to_y(value), 560 - RIGHT, to_y(value), "floor", name))
    return plot


def draw_points(title: str, x_name: str, y_name: str, points: Sequence[tuple[float, float]], is_line: bool = False) -> Plot:
    """Draw points, or a line through them in their order.

    Args:
        title: What it shows.
        x_name: Name of the horizontal values.
        y_name: Name of the vertical values.
        points: The points, at least one, all finite and less than 1e300 from zero.
        is_line: Whether to draw a line instead of dots.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    plot, to_x, to_y = make_frame(title, Axis(min(xs), max(xs), x_name), Axis(min(ys), max(ys), y_name))
    if is_line:
        plot.curves.append((" ".join(f"{to_x(x):g},{to_y(y):g}" for x, y in points), "curve"))
    else:
        plot.dots = "".join(f"M{to_x(x):g} {to_y(y):g}h0" for x, y in points)
    return plot


def draw_curves(
    title: str,
    x_name: str,
    y_name: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    first: str,
    width: int = 560,
    height: int = 300,
) -> Plot:
    """Draw a line for each series, with its name at its right end.

    Args:
        title: What it shows.
        x_name: Name of the horizontal values.
        y_name: Name of the vertical values.
        curves: Points of each series, all finite, in the order of their horizontal values.
        first: Name of the series that stands out from the others.
        width: Width of the plot.
        height: Height of the plot.
    """
    points = [point for series in curves.values() for point in series]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    plot, to_x, to_y = make_frame(title, Axis(min(xs), max(xs), x_name), Axis(min(ys), max(ys), y_name), width, height)
    downward = sorted(curves.items(), key=lambda item: to_y(item[1][-1][1]))
    places, free, end = [], TOP, height - BOTTOM - 4
    for _, series in downward:  # names that would lie on each other are moved down, and up again from the axis
        free = max(free + 13, to_y(series[-1][1]) - 4)
        places.append(free)
    places = [min(place, end - 13 * after) for place, after in zip(places, reversed(range(len(places))), strict=True)]
    for (name, series), place in zip(downward, places, strict=True):
        kind = "curve" if name == first else "curve control"
        plot.curves.append((" ".join(f"{to_x(x):g},{to_y(y):g}" for x, y in series), kind))
        plot.words.append(Words(to_x(series[-1][0]) - 4, place, name, "end", "name" if name == first else "mark"))
    return plot


def draw_ranges(
    title: str,
    y_name: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    bands: Mapping[str, Sequence[tuple[float, float, float]]],
    at: int,
) -> Plot:
    """Draw a change by dose under several arms, whose names the page has in a legend, and the line of no change.

    Args:
        title: What it shows.
        y_name: Name of the change.
        lines: Dose and change, in the order of doses, by the class of each line.
        bands: Dose, lowest and highest change, in the order of doses, by the class of each area.
        at: Place of the dose that a vertical line marks.
    """
    ys = [0.0, *(y for line in lines.values() for _, y in line), *(y for band in bands.values() for _, *ends in band for y in ends)]
    doses = [dose for dose, _ in next(iter(lines.values()))]
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.04 or 1e-3
    plot, to_x, to_y = make_frame(title, Axis(min(doses), max(doses), "dose"), Axis(low - margin, high + margin, y_name), height=280)
    for kind, band in bands.items():
        there = [f"{to_x(dose):g},{to_y(top):g}" for dose, _, top in band]
        back = [f"{to_x(dose):g},{to_y(bottom):g}" for dose, bottom, _ in reversed(band)]
        plot.areas.append((" ".join([*there, *back]), kind))
    plot.strokes.append(Stroke(LEFT, to_y(0), plot.width - RIGHT, to_y(0), "axis"))
    for kind, line in lines.items():
        plot.curves.append((" ".join(f"{to_x(x):g},{to_y(y):g}" for x, y in line), kind))
    plot.marks = [(to_x(dose), place == at) for place, dose in enumerate(doses)]
    return plot


def draw_bars(
    title: str,
    bars: Sequence[tuple[str, float, tuple[float, float] | None]],
    first: str,
    mark: tuple[float, str] | None = None,
) -> Plot:
    """Draw shares as bars, each below its name. The plot is narrow enough to be read on a phone.

    Args:
        title: What it shows.
        bars: Name and share of each bar, 0 to 1, and the ends of its interval; None for none.
        first: Name of the bar that stands out from the others.
        mark: A share, and the name of the line drawn at it; None for no line.
    """
    step, height, right = 38, 13, 46
    plot = Plot(360, step * len(bars) + (16 if mark else 2), title)

    def to_x(share: float) -> float:
        return round(share * (plot.width - right), 1)

    for place, (name, share, ends) in enumerate(bars):
        top = step * place + 18
        plot.words.append(Words(0, top - 4, name, "start", "name"))
        plot.boxes.append(Box(0, top, max(1.0, to_x(share)), height, f"{name}: {100 * share:.0f} %", opacity=1.0 if name == first else 0.5))
        if ends:
            plot.strokes.append(Stroke(to_x(ends[0]), top + height / 2, to_x(ends[1]), top + height / 2, "axis"))
        plot.words.append(Words(to_x(max(share, ends[1] if ends else share)) + 5, top + height - 2, f"{100 * share:.0f} %", "start"))
    if mark:
        x = to_x(mark[0])
        plot.strokes.append(Stroke(x, 2, x, plot.height - 14, "grid"))
        plot.words.append(Words(x, plot.height - 3, mark[1]))
    return plot
