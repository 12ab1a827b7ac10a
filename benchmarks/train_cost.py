"""Benchmark of the time of a training step: against the peers' steps, against the encoder's product alone, by d_sae and by k."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from peer_process import Peers
from report import Row, middle
from train_setup import Floor, Ours, Size, Theirs, in_turn

LARGE = 4
"""Second d_sae at which peers are measured, as a multiple of the first."""
WIDTHS = (0.25, 0.5, 1, 2, 4, 8)
"""Values of d_sae at which our step is measured, as multiples of the size's own."""
KS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Contest:
    """A comparison of our trainer with a peer's; if the peer's can be used in several ways, the fastest counts."""

    name: str
    variant: str
    ways: tuple[dict[str, Any], ...]
    must: float
    goal: float
    at_large: bool = True


_DENSE_OR_SPARSE = tuple({"peer": "sae_lens", "sparse": sparse} for sparse in (False, True))
_OPTIMISERS = tuple({"peer": "sparsify", "optimiser": optimiser} for optimiser in ("signum", "adam"))
CONTESTS = (
    Contest("SAELens", "batch_topk", _DENSE_OR_SPARSE, 10, 15),
    Contest("dictionary_learning", "batch_topk", ({"peer": "dictionary_learning"},), 10, 15),
    Contest("sparsify", "topk", _OPTIMISERS, 3, 5),
    Contest("dictionary_learning", "matryoshka", ({"peer": "dictionary_learning"},), 10, 15, at_large=False),
)


@dataclass
class Points:
    """Milliseconds per step, for the picture."""

    by_d_sae: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Our step and the encoder's product alone, by d_sae."""
    by_k: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Our step and the encoder's product alone, by k."""
    peers: dict[str, dict[int, float]] = field(default_factory=dict)
    """Steps of the peers, by name and d_sae."""

    def load(self, earlier: dict[str, dict[str, Any]]) -> None:
        """Load the points of an earlier run from JSON."""
        for name in ("by_d_sae", "by_k"):
            getattr(self, name).update({int(at): tuple(pair) for at, pair in earlier.get(name, {}).items()})
        self.peers.update({name: {int(at): ms for at, ms in found.items()} for name, found in earlier.get("peers", {}).items()})


def against_peers(peers: Peers, size: Size, rounds: int, points: Points) -> Iterator[Row]:
    """Run each contest at the size itself, then at four times its d_sae, where the ratio must be no worse."""
    for contest in CONTESTS:
        ratio, rows = _contest(peers, contest, size, rounds, contest.must, contest.goal, points)
        yield from rows
        if contest.at_large:
            yield from _contest(peers, contest, replace(size, d_sae=LARGE * size.d_sae), rounds, ratio, None, points)[1]


def _contest(
    peers: Peers, contest: Contest, size: Size, rounds: int, must: float, goal: float | None, points: Points
) -> tuple[float, list[Row]]:
    """Run a contest and return the ratio of the peer's time to ours, with its rows."""
    found = []
    for way in contest.ways:
        ours = Ours(contest.variant, size)
        theirs = Theirs(peers, contest.variant, size, ours.scale, way)
        mine, other = (middle(times) for times in in_turn(rounds, ours, theirs))
        found.append((other, mine, ", ".join(f"{key} {value}" for key, value in way.items() if key != "peer")))
    other, mine, way = min(found)
    points.peers.setdefault(f"{contest.name} {contest.variant}", {})[size.d_sae] = other
    what = f"{contest.variant} step, d_sae {size.d_sae}"
    rows = [
        Row(f"{what}: ours", mine, "ms"),
        Row(f"{what}: {contest.name}{f' ({way})' if way else ''}", other, "ms"),
        Row(f"{what}: {contest.name} / ours", other / mine, "ratio", must, goal),
    ]
    return other / mine, rows


def against_floor(size: Size, rounds: int) -> Iterator[Row]:
    """Compare our step with the encoder's product, its lower bound."""
    floor = Floor(size)
    for variant in ("batch_topk", "topk", "matryoshka"):
        mine, product = (middle(times) for times in in_turn(rounds, Ours(variant, size), floor))
        bounds = (5, 3) if variant == "batch_topk" else (None, None)
        what = f"{variant} step / the encoder's product alone ({str(floor.dtype).removeprefix('torch.')}, {product:.3g} ms)"
        yield Row(what, mine / product, "ratio", *bounds, "lower")


def by_width(size: Size, rounds: int, points: Points) -> Iterator[Row]:
    """Measure our BatchTopK step by d_sae and by k."""
    for d_sae in (round(width * size.d_sae) for width in WIDTHS):
        points.by_d_sae[d_sae] = _cost(replace(size, d_sae=d_sae), rounds)
        yield Row(f"our batch_topk step, d_sae {d_sae}, k {size.k}", points.by_d_sae[d_sae][0], "ms")
    for k in KS:
        points.by_k[k] = _cost(replace(size, k=k), rounds)
        yield Row(f"our batch_topk step, d_sae {size.d_sae}, k {k}", points.by_k[k][0], "ms")


def _cost(size: Size, rounds: int) -> tuple[float, float]:
    mine, product = (middle(times) for times in in_turn(rounds, Ours("batch_topk", size), Floor(size)))
    return mine, product
