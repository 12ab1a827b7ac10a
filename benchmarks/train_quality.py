"""Benchmark of quality: FVU on held-out tokens after training on the same tokens, ours against each peer's with its own inference."""

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from peer_process import Peers
from report import Row
from synthetic import HELD_OUT, Synthetic, first_of, fvu
from train_setup import CPU, Size, request

from ommatid.sae.learner import Learner, Sample
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch

SIZE = Size(d_model=256, d_sae=2048, k=16, batch_size=1024)
N_STEPS = (300, 1500)
"""Lengths of the runs; a short one may rank the trainers differently from a long one."""
SAMPLE = 16384
"""Number of tokens in the sample that a run is initialised from, as in the stage."""
N_HELD_OUT = 16
"""Number of held-out batches."""
PEERS: dict[str, tuple[dict[str, Any], ...]] = {
    "batch_topk": ({"peer": "sae_lens"}, {"peer": "dictionary_learning"}),
    "topk": ({"peer": "sae_lens"}, {"peer": "dictionary_learning"}, {"peer": "sparsify", "optimiser": "adam"}),
    "matryoshka": ({"peer": "sae_lens"}, {"peer": "dictionary_learning"}),
}


def quality(peers: Peers, n_steps: int) -> Iterator[Row]:
    """Compare the FVU of each variant with the peers'."""
    when = f"after {n_steps} steps"
    for variant, others in PEERS.items():
        mine, scale, check = _ours(variant, n_steps)
        what = f"{variant}, FVU on held-out tokens {when}"
        yield Row(f"{what}: ours", mine[None], "FVU")
        for peer in others:
            peers.ask("make", **request(variant, SIZE, n_steps, scale) | peer)
            assert abs(peers.ask("train") / check - 1) < 1e-6, "the peer's batches differ from ours; does it use another version of torch?"
            other = {bound: peers.ask("fvu", n_batches=N_HELD_OUT, bound=bound) for bound in mine}
            yield Row(f"{what}: {peer['peer']}", other[None], "FVU")
            yield Row(f"{variant}: FVU {when}, ours / {peer['peer']} - 1", 100 * (mine[None] / other[None] - 1), "%", 1, 0, "lower")
            if len(mine) > 1:
                yield from _levels(mine, other, when, peer["peer"])


def _levels(mine: dict[int | None, float], other: dict[int | None, float], when: str, peer: str) -> Iterator[Row]:
    """Compare the mean FVU over the levels of a Matryoshka dictionary, which training minimises; the last level has all latents."""
    ours, theirs = (fmean(fvu for bound, fvu in found.items() if bound) for found in (mine, other))
    yield Row(f"matryoshka, mean FVU over levels {when}: ours", ours, "FVU")
    yield Row(f"matryoshka, mean FVU over levels {when}: {peer}", theirs, "FVU")
    yield Row(f"matryoshka: mean FVU over levels {when}, ours / {peer} - 1", 100 * (ours / theirs - 1), "%", 1, 0, "lower")


def _ours(variant: str, n_steps: int) -> tuple[dict[int | None, float], float, float]:
    """FVU of the latents below each bound (None: all), the scale of the data, and the sum of squares of the first scaled batch."""
    data, b = Synthetic(SIZE.d_model), SIZE.batch_size
    sample = Sample(torch.cat([data.batch(number, b) for number in range(SAMPLE // b)]))
    params = SIZE.section(variant=variant, epochs=1, seed=0)
    learner = Learner.begin(variant, params, make_plan(params, n_steps * b), sample, CPU)
    for x in (data.batch(number, b) for number in range(n_steps)):
        learner.learn(Batch(x, x))
    sae, scale = learner.finish("synthetic", "synthetic", None), learner.scales.x
    held_out = [data.batch(HELD_OUT + number, b) for number in range(N_HELD_OUT)]
    first = data.batch(0, b) * scale
    bounds: list[int | None] = [None, *(sae.config.prefixes or ())]
    found = {bound: fvu([(x, sae.decode(first_of(sae.encode(x), bound))) for x in held_out]) for bound in bounds}
    return found, scale, float(first.double().square().sum())
