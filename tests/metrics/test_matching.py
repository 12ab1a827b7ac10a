"""Equal directions are matched, chance is not mistaken for a match, and co-firing is counted correctly.

Oracles: the whole matrix of cosines, every permutation, sets of images. Planted: a permuted and noised copy, and random dictionaries.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from ommatid import schemas, store
from ommatid.compute import nearest
from ommatid.evaluate import latent_pairs as matches_module
from ommatid.evaluate.latent_pairs import EvaluatedSAE, match, write_matches
from ommatid.metrics import best_matches, chance_cosine, match_one_to_one, matching
from ommatid.store import Artefact


def random(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def copy_of(a: torch.Tensor, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the directions in another order, with other norms and some noise, and the new index of each."""
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(9))
    noised = a[order] + noise * random(*a.shape, seed=5)
    return noised * (0.1 + torch.rand(len(a), 1)), order.argsort()


# ---- the metric


@pytest.mark.parametrize("tile", [3, 7, 4096])
def test_best_matches_in_tiles_equal_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(nearest, "TILE", tile)
    a, b = 3 * random(20, 6), random(13, 6, seed=1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2)
    there, back = best_matches(a, b)
    assert torch.equal(there.other, cosines.argmax(1)) and torch.equal(back.other, cosines.argmax(0))
    torch.testing.assert_close(there.cosine.double(), cosines.amax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(back.cosine.double(), cosines.amax(0), rtol=0, atol=1e-6)
    assert there.mmcs == pytest.approx(float(cosines.amax(1).mean()), abs=1e-6)
    assert there.mutual(back).tolist() == [cosines.argmax(0)[best] == i for i, best in enumerate(cosines.argmax(1))]


def test_a_permuted_and_noised_copy_is_found_in_its_order() -> None:
    a = random(200, 32)
    b, places = copy_of(a)
    there, back = best_matches(a, b)
    assert torch.equal(there.other, places) and bool(there.mutual(back).all())
    assert there.mmcs > 0.99
    cosines = match_one_to_one(a, b)
    assert cosines is not None and len(cosines) == 200 and float(cosines.min()) > 0.9


@pytest.mark.parametrize(("n", "d"), [(200, 32), (1000, 128)])
def test_random_dictionaries_match_at_chance_level(n: int, d: int) -> None:
    a, b = random(n, d), random(n, d, seed=1)
    there, _ = best_matches(a, b)
    assert there.mmcs == pytest.approx(chance_cosine(n, d), abs=0.01)
    cosines = match_one_to_one(a, b)
    assert cosines is not None and int((cosines > nearest.ALIKE).sum()) == 0
    assert float(cosines.mean()) < there.mmcs  # one to one, not everyone gets the nearest


def test_opposite_directions_do_not_match() -> None:
    a = random(5, 40)
    there, _ = best_matches(a, -a)
    assert there.mmcs < 0.5


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_one_to_one_has_the_highest_sum_of_all_assignments(shape: tuple[int, int]) -> None:
    a, b = random(shape[0], 3), random(shape[1], 3, seed=2)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    wide = cosines if shape[0] <= shape[1] else cosines.T
    best = max(
        sum(float(wide[i, j]) for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(wide.shape[1]), wide.shape[0])
    )
    found = match_one_to_one(a, b)
    assert found is not None and len(found) == min(shape)
    assert float(found.sum()) == pytest.approx(best, abs=1e-5)


def test_two_copies_of_one_direction_match_it_once() -> None:
    a, b = torch.tensor([[1.0, 0], [1.0, 0.01]]), torch.tensor([[1.0, 0], [0, 1.0]])
    assert best_matches(a, b)[0].other.tolist() == [0, 0]
    found = match_one_to_one(a, b)
    assert found is not None and int((found > nearest.ALIKE).sum()) == 1


def test_wide_dictionaries_are_not_matched_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MOST_ONE_TO_ONE", 4)
    assert match_one_to_one(random(4, 3), random(4, 3)) is not None
    assert match_one_to_one(random(5, 3), random(4, 3)) is None
    assert match_one_to_one(random(4, 3), random(5, 3)) is None


@pytest.mark.parametrize(("m", "d"), [(1, 3), (2, 2), (8, 1), (50, 4), (300, 64)])
def test_the_chance_level_is_that_of_random_directions(m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    n = 40_000 // m + 1000
    others = rng.normal(size=(n, m, d)).astype(np.float32)
    first = others[:, :, 0] / np.linalg.norm(others, axis=2)  # the cosine with the first axis
    best = first.max(1)
    assert chance_cosine(m, d) == pytest.approx(best.mean(), abs=4.5 * best.std() / np.sqrt(n) + 1e-9)


def test_a_direction_of_length_zero_matches_nothing() -> None:
    there, _ = best_matches(torch.zeros(1, 3), torch.eye(3))
    assert there.cosine.tolist() == [0.0]


# ---- the tables


FIRES = {"a": {0: {1, 2, 3}, 1: {4}, 2: set()}, "b": {0: set(), 1: {2, 3, 5, 6}, 2: {4}}}
"""Images that fire each latent; the directions of b are those of a, shifted by one."""


def evaluated(root: Path, name: str, directions: torch.Tensor, fires: Mapping[int, set[int]]) -> EvaluatedSAE:
    with store.open_draft(root / f"sae-{name}", "sae", {}, {}) as draft:
        with draft.write_file("sae.safetensors") as path:
            save_file({"W_dec": directions.contiguous()}, path)
        with draft.write_file("cfg.json") as path:
            path.write_text(json.dumps({"hookpoint": "here"}))
        draft.seal({"sae": name})
        sae = draft.publish(root / f"sae-{name}")
    with store.open_draft(root / f"evaluation-{name}", "evaluation", {}, {}) as draft:
        rows = [{"sae": name, "image": image, "latent": latent, "act": 1.0} for latent, images in fires.items() for image in sorted(images)]
        for part, some in enumerate((rows[:2], rows[2:])):
            draft.write_table(store.part_name("firings", part), pa.Table.from_pylist(some, schema=schemas.FIRINGS))
        draft.seal({})
        return EvaluatedSAE(sae, draft.publish(root / f"evaluation-{name}"))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[EvaluatedSAE, EvaluatedSAE]:
    directions = torch.eye(3)
    return evaluated(tmp_path, "a", directions, FIRES["a"]), evaluated(tmp_path, "b", directions.roll(1, 0), FIRES["b"])


def jaccard(one: set[int], other: set[int]) -> float | None:
    return len(one & other) / len(one | other) if one | other else None


def test_matches_have_the_nearest_latent_and_the_number_of_shared_images(pair: tuple[EvaluatedSAE, EvaluatedSAE], tmp_path: Path) -> None:
    found = match(*pair, tmp_path).matches
    assert found.schema == schemas.MATCHES
    expected = [("a", latent, "b", (latent + 1) % 3) for latent in range(3)] + [("b", latent, "a", (latent - 1) % 3) for latent in range(3)]
    assert [(row["sae"], row["latent"], row["other_sae"], row["other_latent"]) for row in found.to_pylist()] == expected
    for row in found.to_pylist():
        assert row["cosine"] == 1
        assert row["jaccard"] == jaccard(FIRES[row["sae"]][row["latent"]], FIRES[row["other_sae"]][row["other_latent"]])
    assert found["jaccard"].to_pylist() == [0.4, 1.0, None, None, 0.4, 1.0]


def test_stability_is_a_share_of_each_saes_own_latents(tmp_path: Path) -> None:
    a = evaluated(tmp_path, "a", random(40, 16), {})
    b = evaluated(tmp_path, "b", torch.cat([a_directions(a), random(10, 16, seed=3)]), {})
    mine, theirs = match(a, b, tmp_path).stability.to_pylist()
    assert (mine["sae"], mine["other_sae"], mine["matched"], mine["mutual"]) == ("a", "b", 1.0, 1.0)
    assert (theirs["sae"], theirs["other_sae"], theirs["matched"], theirs["mutual"]) == ("b", "a", 0.8, 0.8)
    assert mine["mmcs"] == pytest.approx(1) and 0.8 < theirs["mmcs"] < 1
    assert (mine["chance"], theirs["chance"]) == (chance_cosine(50, 16), chance_cosine(40, 16))


def a_directions(one: EvaluatedSAE) -> torch.Tensor:
    return matches_module._directions(one.sae)


def test_dictionaries_too_wide_for_one_to_one_matching_still_have_mutual_matches(
    pair: tuple[EvaluatedSAE, EvaluatedSAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "MOST_ONE_TO_ONE", 2)
    assert [(row["matched"], row["mutual"]) for row in match(*pair, tmp_path).stability.to_pylist()] == [(None, 1.0)] * 2


@pytest.mark.parametrize(("names", "n_pairs"), [("a", 0), ("ab", 1), ("abc", 3)])
def test_every_pair_of_saes_is_matched_and_a_single_sae_leaves_empty_tables(tmp_path: Path, names: str, n_pairs: int) -> None:
    all_of = {name: evaluated(tmp_path, name, random(4, 3, seed=i), {0: {1}}) for i, name in enumerate(names)}
    found = tables(tmp_path, all_of)
    assert found.rows("stability") == 2 * n_pairs and found.rows("matches") == 2 * 4 * n_pairs
    rows = found.read("stability").to_pylist()
    assert {(row["sae"], row["other_sae"]) for row in rows} == set(itertools.permutations(names, 2))


def tables(root: Path, all_of: Mapping[str, EvaluatedSAE]) -> Artefact:
    with store.open_draft(root / "evaluation", "evaluations", {}, {}) as draft:
        write_matches({name: one.sae for name, one in all_of.items()}, {name: one.evaluation for name, one in all_of.items()}, draft)
        draft.seal({})
        return draft.publish(root / "evaluation")
