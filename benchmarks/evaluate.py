"""Benchmark of the MonoSemanticity score: against the published pairwise loop, at full size, and the memory of the stage `evaluate`.

python benchmarks/evaluate.py      writes benchmarks/results/evaluate.json; uses 2 threads, as the loop does; takes some minutes
Two kinds of random latents are scored: latents that each fire on one image in a hundred, as those of an SAE with k 20 of 2,048 on
class tokens, in compressed rows and as a dense array; and latents that fire on every image, which need at least one float64 matrix
product. The judge's embeddings have 768 dimensions. Memory is the peak resident set size of a separate process, including arrays and
libraries.
"""

import json
import sys

import numpy as np
import torch
from evaluate_stage import THREADS, memory_of_the_stage
from own_process import clock, in_a_process, peak
from report import Row, middle, publish
from torch import Tensor
from torch.nn.functional import cosine_similarity

LOOP_SIZES = (750, 1500, 3000)
"""Numbers of images on which the loop is run."""
N_LATENTS, WIDTH = 2048, 768
DENSITY = 0.01
"""Share of images on which a latent fires."""
FULL = (50_000, 8192)
"""Numbers of images and latents at full size."""


def draw_acts(n: int, n_latents: int, density: float, seed: int = 0) -> Tensor:
    """Draw dense activations (n, n_latents), float32, in chunks of images to avoid copies."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.empty(n, n_latents)
    for some in acts.split(512):
        some.uniform_(generator=generator)
        if density < 1:
            some.sub_(1 - density).relu_().mul_(1 / density)
    return acts


def draw_embeddings(n: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1)).add_(0.1)


def published_loop(acts: Tensor, embeddings: Tensor, batch: int = 100) -> Tensor:
    """Compute the score as metric.py of sae-for-vlm does: each image against all later ones in batches of 100, summing weighted cosines."""
    low, high = acts.amin(0), acts.amax(0)
    a = (acts - low) / (high - low)
    above, below = torch.zeros_like(low), torch.zeros_like(low)
    for i in range(len(a)):
        for start in range(i + 1, len(a), batch):
            later = slice(start, start + batch)
            weights = a[i] * a[later]
            above += (weights * cosine_similarity(embeddings[i][None], embeddings[later])[:, None]).sum(0)
            below += weights.sum(0)
    return above / below


def against_the_loop() -> tuple[list[Row], float]:
    """Rows of the comparison with the loop, and the largest difference between the scores."""
    from ommatid.metrics import monosemanticity

    rows, difference = [], 0.0
    ratios: dict[tuple[str, int], float] = {}
    for n in LOOP_SIZES:
        embeddings = draw_embeddings(n)
        for what, density in (
            ("SAE latents, compressed rows", DENSITY),
            ("SAE latents, dense array", DENSITY),
            ("latents that always fire", 1.0),
        ):
            acts = draw_acts(n, N_LATENTS, density)
            loop, expected = clock(lambda acts=acts, embeddings=embeddings: published_loop(acts, embeddings))
            array = acts.to_sparse_csr() if "rows" in what else acts
            found = [clock(lambda array=array, embeddings=embeddings: monosemanticity(array, embeddings)) for _ in range(9)]
            ours = middle([seconds for seconds, _ in found])
            both = ~(expected.isnan() | found[0][1].isnan())
            difference = max(difference, float((found[0][1] - expected)[both].abs().max()))
            ratios[what, n] = loop / ours
            must = 200 if n == 1500 else None
            print(f"{what}, {n}: loop {loop:.2f} s, ours {ours * 1e3:.1f} ms", flush=True)
            rows.append(Row(f"{what}, N {n:,}: speedup over the loop", loop / ours, "x", must=must, goal=must and 300))
    first, _, last = LOOP_SIZES
    for what in dict.fromkeys(what for what, _ in ratios):
        growth = ratios[what, last] / ratios[what, first]
        rows.append(Row(f"{what}: speedup at N {last:,} / speedup at {first:,}", growth, "x", must=1.2, goal=3))
    return rows, difference


def at_full_size() -> list[Row]:
    rows = []
    for what in ("dense", "rows"):
        result = in_a_process(__file__, "full", what)
        name = f"{FULL[0]:,} images x {FULL[1]:,} latents x {WIDTH}, {'dense float32' if what == 'dense' else 'compressed rows'}"
        rows.append(Row(f"{name}: seconds", result["seconds"], "s", must=60, goal=20, better="lower"))
        rows.append(Row(f"{name}: peak memory", result["peak"], "MB", must=3000, goal=2500, better="lower"))
    return rows


def run_full(what: str) -> dict[str, float]:
    from ommatid.metrics import monosemanticity

    embeddings = draw_embeddings(FULL[0])
    acts = draw_acts(*FULL, density=1.0) if what == "dense" else draw_rows(*FULL)
    seconds, ms = clock(lambda: monosemanticity(acts, embeddings))
    assert not np.isnan(np.asarray(ms)).any()
    return {"seconds": seconds, "peak": peak()}


class Rows:
    """Compressed sparse rows with the attributes of scipy's csr_matrix."""

    def __init__(self, parts: list[Tensor], shape: tuple[int, int]) -> None:
        self.indptr = torch.cat(
            [torch.zeros(1, dtype=torch.int64), torch.cat([part.crow_indices().diff() for part in parts]).cumsum(0)]
        ).numpy()
        self.indices = torch.cat([part.col_indices().int() for part in parts]).numpy()
        self.data = torch.cat([part.values() for part in parts]).numpy()
        self.shape = shape


def draw_rows(n: int, n_latents: int) -> Rows:
    sizes = [min(512, n - start) for start in range(0, n, 512)]
    return Rows([draw_acts(size, n_latents, DENSITY, seed).to_sparse_csr() for seed, size in enumerate(sizes)], (n, n_latents))


def main() -> None:
    torch.set_num_threads(THREADS)
    match sys.argv[1:]:
        case ["full", what]:
            print(json.dumps(run_full(what)))
        case []:
            rows, difference = against_the_loop()
            rows += at_full_size() + memory_of_the_stage()
            notes = [
                f"{THREADS} threads; in the comparison with the loop, {N_LATENTS:,} latents and embeddings of {WIDTH} dimensions",
                f"SAE latents fire on {DENSITY:.0%} of images",
                f"largest difference from the loop, which computes in float32: {difference:.1g}",
            ]
            publish("evaluate", rows, ["ommatid", "torch", "numpy", "duckdb"], notes)
        case other:
            raise SystemExit(f"{' '.join(other)}: takes no arguments")


if __name__ == "__main__":
    main()
