"""Proves what a labeller that looks at images is shown: images of the naming half only, with the heat maps of the evaluation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ommatid.config import Params
from ommatid.images.eval_split import EvalSplit, iter_latent_firings, load_eval_split
from ommatid.label.evidence import Cases, Evidence, Spool, choose_firing, iter_heat_maps, nearest_latents
from ommatid.label.labellers.base import Case
from ommatid.store import Artefact, Draft, open_draft
from ommatid.vlm.preprocess import Preprocess
from support.tiles import ALWAYS, DEAD, GRID, MIXED, PURE, TileModel

WANTED = [*PURE, MIXED, ALWAYS]


@pytest.fixture
def draft(tmp_path: Path) -> Iterator[Draft]:
    with open_draft(tmp_path / "labels", "labels", {}, {}) as opened:
        yield opened


@pytest.fixture(scope="module")
def split(line: dict[str, Artefact]) -> EvalSplit:
    return load_eval_split(line["images"])


@pytest.fixture
def cases(line: dict[str, Artefact], params: Params, split: EvalSplit, draft: Draft) -> dict[int, Case]:
    evidence = Evidence(split, params.label, nearest_latents(line["train"]))
    evidence.fill(iter_latent_firings(line["evaluate"].files("firings"), split, str(draft.scratch)))
    assert sorted(evidence.strongest) == sorted(WANTED)
    made = Cases(Spool(line["images"], split, draft, TileModel.preprocess), split, evidence, params.label)
    fired = iter_latent_firings(line["evaluate"].files("firings"), split, str(draft.scratch))
    return {case.latent: case for case in made.iter_cases(fired, iter_heat_maps(line["evaluate"]), WANTED)}


def test_cases_are_made_for_the_requested_latents(cases: dict[int, Case]) -> None:
    assert list(cases) == WANTED
    assert DEAD not in cases


def test_no_image_of_the_held_out_half_is_in_a_case(line: dict[str, Artefact], cases: dict[int, Case]) -> None:
    """The test uses the ids of the images, not the stage's own records."""
    rows = line["images"].read("images", ["image", "image_id", "split", "encoded"]).to_pylist()
    by_image = {row["image"]: row for row in rows}
    shown = [example for case in cases.values() for example in (*case.firing, *case.silent)]
    assert len(shown) > 60
    for example in shown:
        row = by_image[example.image]
        assert row["split"] == "eval"
        assert int(row["image_id"][8:16], 16) % 2 == 0
        assert example.encoded == row["encoded"]


def test_firing_and_silent_images_are_what_they_are_called(line: dict[str, Artefact], cases: dict[int, Case], params: Params) -> None:
    firings = line["evaluate"].read("firings").to_pandas()
    for latent, case in cases.items():
        acts = dict(firings[firings.latent == latent][["image", "act"]].itertuples(index=False))
        assert [example.act for example in case.firing] == [pytest.approx(acts[example.image]) for example in case.firing]
        assert [example.act for example in case.firing] == sorted((example.act for example in case.firing), reverse=True)
        assert all(example.act == 0 and example.image not in acts for example in case.silent)
        images = [example.image for example in (*case.firing, *case.silent)]
        assert len(set(images)) == len(images)
        assert len(case.firing) == params.label.n_examples
        assert len(case.silent) == (0 if latent == ALWAYS else params.label.n_examples)


def test_hard_and_random_images_alternate(line: dict[str, Artefact], cases: dict[int, Case]) -> None:
    """Hard images for the red latent are those of other colours, because grey images fire nothing."""
    fired = line["evaluate"].read("firings").to_pandas()
    coloured = set(fired[fired.latent.isin(PURE)].image)
    hard = cases[0].silent[::2]
    assert all(example.image in coloured for example in hard)


def test_heat_maps_are_those_of_the_examples(line: dict[str, Artefact], cases: dict[int, Case]) -> None:
    examples = line["evaluate"].read("examples").to_pylist()
    heat = {(row["latent"], row["image"]): row["heat"] for row in examples}
    n_with_heat = 0
    for latent, case in cases.items():
        for example in case.firing:
            expected = heat.get((latent, example.image))
            if expected is None:
                assert example.heat is None
            else:
                assert example.heat is not None
                assert example.heat.shape == GRID
                assert example.heat.ravel().tolist() == expected
                n_with_heat += 1
    assert n_with_heat > 30


def test_the_strongest_half_and_weaker_ones_with_heat_are_chosen() -> None:
    has_heat = np.zeros(100, dtype=bool)
    has_heat[[0, 1, 30, 40, 50, 60, 70]] = True
    assert choose_firing(has_heat, 10).tolist() == [0, 1, 2, 3, 4, 30, 40, 50, 60, 70]
    assert choose_firing(has_heat, 6).tolist() == [0, 1, 2, 30, 50, 70]
    assert choose_firing(np.zeros(100, dtype=bool), 6).tolist() == [0, 1, 2, 3, 51, 99]
    assert choose_firing(np.ones(4, dtype=bool), 6).tolist() == [0, 1, 2, 3]
    assert choose_firing(np.arange(100) == 99, 5).tolist() == [0, 1, 2, 3, 99]


def test_a_spool_left_by_an_interrupted_run_is_reused(line: dict[str, Artefact], split: EvalSplit, draft: Draft) -> None:
    first = Spool(line["images"], split, draft, TileModel.preprocess)
    made = (draft.path / "scratch/encoded.bin").stat()
    again = Spool(line["images"], split, draft, TileModel.preprocess)
    assert (draft.path / "scratch/encoded.bin").stat().st_ino == made.st_ino
    assert first.read(5) == again.read(5)
    last = len(split.images) - 1
    assert first.read(last)[0] == line["images"].read("images", ["encoded"])["encoded"][int(split.images[last])].as_py()


@pytest.mark.parametrize(
    ("resize", "crop", "seen"), [((16,), (16, 16), (16 / 24, 1)), ((32, 48), (32, 48), (1, 1)), ((32, 48), (16, 12), (0.25, 0.5))]
)
def test_the_share_that_the_model_sees_follows_from_its_preprocessing(
    line: dict[str, Artefact], split: EvalSplit, draft: Draft, resize: tuple[int, ...], crop: tuple[int, int], seen: tuple[float, float]
) -> None:
    preprocess = Preprocess(resize, crop, "bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    assert Spool(line["images"], split, draft, preprocess).read(0)[1] == pytest.approx(seen)
