"""The source `shapes` draws what its plan says: areas follow from geometry, pixels show colours and positions, and factors are independent.

It draws the same bytes on every machine, whichever images are requested.
"""

import hashlib
import io
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from ommatid.errors import SourceError
from ommatid.images.figure import BACKGROUNDS, COLOURS, FAMILIES, PLACES, SHAPES, TEXTURES, Figure, draw, make_figure
from ommatid.images.shapes import Shapes
from support.study import CHECKOUT

FACTORS = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "place": PLACES, "background": tuple(BACKGROUNDS)}
FIRST_32 = "971a505bf19901823739d84e7fd8e20ee9bd4055a39d67819576e52488e77105"
"""The sha256 of the first 32 images of the plan in data/."""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "plan.json")


def write_plan(path: Path, n_images: int = 40, size: int = 32, seed: int = 0) -> Path:
    path.write_text(json.dumps({"n_images": n_images, "size": size, "seed": seed}))
    return path


def bytes_of(path: Path, positions: range) -> list[bytes]:
    return [item.read() for item in Shapes(path).iter_items(positions)]


def a_figure(**changes) -> Figure:
    """Return a plain figure."""
    values = {"shape": "circle", "colour": "red", "texture": "plain", "place": "centre", "background": "black"}
    return Figure(**{**values, "scale": 0.9, "turn": 0.0, "shift": (0.0, 0.0), "phase": (0.0, 0.0), "shade": 0, **changes})


def lens(r: float, d: float) -> float:
    """Return the area that a disc of radius 1 shares with one of radius r at distance d."""
    a, b = math.acos((d * d + 1 - r * r) / (2 * d)), math.acos((d * d + r * r - 1) / (2 * d * r))
    return a + r * r * b - d * math.sin(a)


AREAS = {
    "circle": math.pi * 0.95**2,
    "ring": math.pi * (1 - 0.5**2),
    "crescent": math.pi - lens(0.75, 0.5),
    "triangle": 3 * math.sqrt(3) / 4,
    "square": 2.0,
    "hexagon": 3 * math.sqrt(3) / 2,
    "star": 5 * math.sin(math.pi / 10) / math.sin(3 * math.pi / 10) * math.sin(math.pi / 5),
    "cross": 4 * 0.95 * 0.6 - 0.6**2,
    "arrow": 0.95 * 0.5 + 0.9 * 0.98**2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_area_however_it_is_turned(shape):
    for turn in (0.0, 0.2):
        pixels = draw(a_figure(shape=shape, turn=turn), 300)
        covered = (pixels[..., 0] - 16.0).sum() / (214 - 16)
        assert covered == pytest.approx(AREAS[shape] * (0.9 * 50) ** 2, rel=0.005)


def test_shapes_of_equal_area_differ_in_their_outline():
    """Each of nine masks overlaps most with rotations of itself."""
    masks = {shape: draw(a_figure(shape=shape), 96)[..., 0] > 100 for shape in SHAPES}
    turned = {shape: draw(a_figure(shape=shape, turn=0.1), 96)[..., 0] > 100 for shape in SHAPES}
    for shape, mask in masks.items():
        overlap = {other: (mask & theirs).sum() / (mask | theirs).sum() for other, theirs in turned.items()}
        assert max(overlap, key=overlap.__getitem__) == shape


def test_pixels_show_position_colour_texture_and_background():
    for number in range(300):
        figure = make_figure(1, number)
        pixels = draw(figure, 60).astype(int)
        background = BACKGROUNDS[figure.background] + figure.shade
        ys, xs = (pixels != background).any(2).nonzero()
        row, column = divmod(PLACES.index(figure.place), 3)
        assert {*ys // 20} == {row} and {*xs // 20} == {column}
        seen = Counter(map(tuple, pixels[ys, xs].tolist()))
        light, dark = COLOURS[figure.colour], tuple(value // 2 for value in COLOURS[figure.colour])
        assert light in seen
        assert (dark in seen) == (figure.texture != "plain")
        if figure.texture == "plain":
            assert seen.most_common(1)[0][0] == light


def test_edges_are_smooth():
    edge = np.unique(draw(a_figure(shift=(0.3, 0.1)), 64)[..., 0])
    assert edge[0] == 16 and edge[-1] == 214
    assert len(edge) > 8


def test_factors_are_even_and_independent():
    figures = [make_figure(0, number) for number in range(4000)]
    for name, values in FACTORS.items():
        counts = Counter(getattr(figure, name) for figure in figures)
        assert counts.keys() == set(values)
        assert chisquare(list(counts.values())).pvalue > 1e-3
    for pair in itertools.combinations(FACTORS, 2):
        counts = Counter(tuple(getattr(figure, name) for name in pair) for figure in figures)
        table = np.array([[counts[a, b] for b in FACTORS[pair[1]]] for a in FACTORS[pair[0]]])
        expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
        assert chisquare(table.ravel(), expected.ravel(), ddof=sum(table.shape) - 2).pvalue > 1e-3


def test_figures_are_described_in_words():
    figure = a_figure(texture="striped", colour="orange", place="top left")
    assert figure.factors == ("round", "circle", "warm", "orange", "striped", "top left", "black")
    assert figure.taxonomy == "round/circle/warm circle/orange circle/striped orange circle"
    assert figure.caption == "a striped orange circle at the top left on a black background"
    assert a_figure(colour="orange").caption == "an orange circle in the centre on a black background"


def test_the_taxonomy_is_a_tree():
    parents: dict[str, set[str]] = {}
    for number in range(2000):
        classes = make_figure(0, number).taxonomy.split("/")
        assert len(classes) == 5
        for parent, child in itertools.pairwise(classes):
            parents.setdefault(child, set()).add(parent)
    assert {len(of_one) for of_one in parents.values()} == {1}
    assert set(FAMILIES) == set.union(*(parents[shape] for shape in SHAPES))


def test_one_seed_gives_the_same_bytes_whichever_images_are_requested(plan, tmp_path):
    every = bytes_of(plan, range(40))
    assert bytes_of(plan, range(7, 30, 11)) == every[7:30:11]
    assert len(set(every)) == 40
    assert not set(bytes_of(write_plan(tmp_path / "other.json", seed=1), range(40))) & set(every)


def test_bytes_are_the_same_on_every_machine():
    images = bytes_of(CHECKOUT / "data/shapes.json", range(32))
    assert Image.open(io.BytesIO(images[0])).size == (64, 64)
    assert hashlib.sha256(b"".join(images)).hexdigest() == FIRST_32


def test_the_stage_makes_a_data_set_of_it(plan, make):
    artefact = make({"kind": "shapes", "path": str(plan)}, limit=20)
    rows = artefact.read("images").to_pylist()
    figures = [make_figure(0, number) for number in range(0, 40, 2)]
    assert [(row["path"], row["label"], row["captions"], row["taxonomy"]) for row in rows] == [
        (f"{2 * i:07d}.png", figure.shape, [figure.caption], figure.taxonomy) for i, figure in enumerate(figures)
    ]
    for row, figure in zip(rows, figures, strict=True):
        assert np.array_equal(np.array(Image.open(io.BytesIO(row["encoded"]))), draw(figure, 32))


def test_another_plan_has_another_fingerprint(plan, tmp_path):
    prints = {Shapes(write_plan(tmp_path / f"{i}.json", *values)).fingerprint for i, values in enumerate([(40, 32, 0), (41, 32, 0)])}
    assert len(prints) == 2
    assert Shapes(plan).fingerprint in prints


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file; images.source.path names the plan"),
        ("{", "not a plan with n_images, size and seed"),
        ("[" * 100_000, "not a plan with n_images, size and seed"),
        ("[]", "the whole: Input should be"),
        ('{"n_images": 0, "size": 32, "seed": 0}', "n_images: Input should be greater than or equal to 1"),
        ('{"n_images": 4, "size": 8, "seed": 0}', "size: Input should be greater than or equal to 24"),
        ('{"n_images": 4, "size": 32.5, "seed": 0}', "size: Input should be a valid integer"),
        ('{"n_images": 4, "size": 32}', "seed: Field required"),
        ('{"n_images": 4, "size": 32, "seed": 0, "sead": 1}', "sead: Extra inputs are not permitted"),
    ],
)
def test_an_invalid_plan_is_refused(text, said, tmp_path):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SourceError, match=said) as caught:
        Shapes(path)
    assert str(path) in str(caught.value)
