"""Proves that reviewed features are found again by their directions in retrained SAEs, and that what is not found is not lost."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ommatid.reviews import ReviewLog, State, follow
from ommatid.reviews.log import Draft

D_SAE, D_MODEL = 96, 32
OLD, NEW, NEWER = "topk-96-k2-s0-00000000", "topk-96-k2-s0-11111111", "topk-96-k2-s0-22222222"


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def turned(directions: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Return directions that have exactly this cosine with the given ones."""
    random = rng.normal(size=directions.shape)
    across = unit(random - (random * directions).sum(1, keepdims=True) * directions)
    return cosine * directions + (1 - cosine**2) ** 0.5 * across


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def directions(rng: np.random.Generator) -> np.ndarray:
    """Orthogonal directions in both halves of the latents, so that different ones are far from alike."""
    return np.concatenate([np.linalg.qr(rng.normal(size=(D_MODEL, D_MODEL)))[0] for _ in range(D_SAE // D_MODEL)])


@pytest.fixture
def log(tmp_path: Path) -> ReviewLog:
    return ReviewLog(tmp_path / "log.jsonl")


def name_all(log: ReviewLog, sae: str, directions: np.ndarray, latents: range = range(D_SAE)) -> State:
    log.extend([Draft("Ada", sae, i, "rename", f"{sae} {i}", direction=lambda i=i: directions[i]) for i in latents])
    return log.state()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_permuted_and_scaled_sae_has_every_feature(log: ReviewLog, directions: np.ndarray, rng: np.random.Generator, dtype: type) -> None:
    state = name_all(log, OLD, directions)
    order = rng.permutation(D_SAE)
    found = follow(state, NEW, (turned(directions, 0.93, rng)[order] * rng.uniform(0.1, 9, (D_SAE, 1))).astype(dtype))
    assert not found.orphans and found.latents == {(OLD, int(old)): new for new, old in enumerate(order)}
    assert all(abs(cosine - 0.93) < 2e-3 for cosine in found.cosines.values())
    assert {latent: one.name for latent, one in found.features(state).items()} == {i: f"{OLD} {old}" for i, old in enumerate(order)}


def test_what_turned_too_far_is_an_orphan_with_all_that_was_said(log: ReviewLog, directions: np.ndarray, rng: np.random.Generator) -> None:
    state = name_all(log, OLD, directions)
    new = turned(directions, 0.91, rng)
    new[:40] = turned(directions[:40], 0.89, rng)
    new[50] = -directions[50]
    found = follow(state, NEW, new)
    assert set(found.orphans) == {(OLD, i) for i in [*range(40), 50]}
    assert {key: one.name for key, one in found.orphaned(state).items()} == {key: f"{OLD} {key[1]}" for key in found.orphans}
    assert found.key_of((OLD, 60)) == (NEW, 60) and found.key_of((OLD, 3)) == (OLD, 3)


def test_features_of_another_width_and_directions_of_zeros_are_orphans(log: ReviewLog, directions: np.ndarray) -> None:
    name_all(log, OLD, directions, range(3))
    log.append("Ada", OLD, 3, "rate", 1, direction=lambda: np.zeros(D_MODEL))
    log.append("Ada", "vit-8-0", 0, "rate", 1, direction=lambda: np.ones(8))
    state = log.state()
    assert follow(state, NEW, directions).orphans == ((OLD, 3), ("vit-8-0", 0))
    assert len(follow(state, NEW, directions[:, :7]).orphans) == 5
    assert len(follow(state, NEW, np.zeros_like(directions)).orphans) == 5
    assert len(follow(state, NEW, directions[:0]).orphans) == 5


def test_a_latent_takes_one_feature_of_each_sae_and_the_most_similar_first(log: ReviewLog, directions: np.ndarray) -> None:
    """Two old features are like one new latent; the second-best of one of them is another new latent."""
    rng = np.random.default_rng(1)
    old = np.stack([directions[0], turned(directions[:1], 0.97, rng)[0]])
    state = name_all(log, OLD, old, range(2))
    between = unit(old[0] + 0.5 * old[1])
    assert follow(state, NEW, between[None]).latents == {(OLD, 0): 0} and follow(state, NEW, between[None]).orphans == ((OLD, 1),)
    found = follow(state, NEW, np.stack([old[1], between]))
    assert found.latents == {(OLD, 1): 0, (OLD, 0): 1}
    same = follow(state, NEW, np.stack([old[0], old[0], old[1], old[1]]))
    assert same.latents == {(OLD, 0): 0, (OLD, 1): 2}  # of equal ones the first


def test_over_a_chain_of_retrains_the_original_direction_is_compared(log: ReviewLog, directions: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    second = turned(directions, 0.95, rng)
    third = turned(second, 0.95, rng)  # has a cosine of about 0.9 with the first, above or below it
    fourth = turned(third, 0.95, rng)
    state = name_all(log, OLD, directions)
    for later in (second, third, fourth):
        for key, cosine in follow(state, NEWER, later).cosines.items():
            assert abs(cosine - directions[key[1]] @ later[key[1]]) < 2e-3 and cosine >= 0.9
    cosines = (directions * third).sum(1)
    assert {key[1] for key in follow(state, NEWER, third).orphans} == set(np.flatnonzero(cosines < 0.9).tolist()) != set()
    lost = follow(state, NEWER, fourth).orphans
    assert set(lost) > set(follow(state, NEWER, second).orphans)
    back = follow(state, NEWER, directions)  # an SAE that turns back finds all of them again
    assert not back.orphans


def test_what_was_said_of_both_saes_merges_in_the_order_of_time(log: ReviewLog, directions: np.ndarray) -> None:
    order = np.roll(np.arange(D_SAE), 1)
    new = directions[order]

    def say(who: str, sae: str, latent: int, kind: str, value: str | int, seen: str | None = None) -> str:
        return log.append(who, sae, latent, kind, value, seen=seen, direction=lambda: (directions if sae == OLD else new)[latent]).id

    say("Ada", OLD, 4, "rename", "horse")
    say("Ada", OLD, 4, "list_add", "animals")
    here = say("Bo", NEW, 5, "rename", "pony", seen="")
    say("Cy", OLD, 4, "rate", 3)
    say("Bo", NEW, 9, "list_add", "animals")
    state = log.state()
    found = follow(state, NEW, new)
    merged = found.feature(state, 5)
    assert merged.keys == ((NEW, 5), (OLD, 4)) and [event.who for event in merged.history] == ["Ada", "Ada", "Bo", "Cy"]
    assert merged.name == "pony" and merged.rating == 3 and list(found.features(state)) == [5, 9]
    assert [event.value for event in merged.conflicts["rename"]] == ["horse", "pony"]  # Bo had not seen what Ada said of the old one
    assert found.lists(state) == {"animals": ((NEW, 5), (NEW, 9))}
    assert follow(state, OLD, directions).feature(state, 4).name == "pony"  # the old SAE knows what was said later, too
    log.undo("Ada", here)
    assert found.covers(log.state()) and found.feature(log.state(), 5).name == "horse"
    say("Ada", OLD, 7, "rate", 1)
    assert not found.covers(log.state())


def test_directions_may_come_in_tiles(log: ReviewLog, directions: np.ndarray, rng: np.random.Generator) -> None:
    state = name_all(log, OLD, directions)
    new = turned(directions, 0.92, rng)[rng.permutation(D_SAE)]

    def tiles() -> Iterator[np.ndarray]:
        for start in range(0, D_SAE, 7):
            yield new[start : start + 7]

    assert follow(state, NEW, tiles()).latents == follow(state, NEW, new).latents
    assert follow(ReviewLog("nowhere.jsonl").state(), NEW, iter(())).latents == {}
