"""Trains every variant on the demo's activations in one pass, measures them on the evaluation split, and prints a table.

    python benchmarks/variants.py [train.KEY=VALUE ...]

Run it in a checkout in which `make demo` has run. The table is the one in docs/results/variants.md. Takes several minutes.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ommatid.config import TrainParams, load_params
from ommatid.evaluate.batches import iter_images
from ommatid.events import ignore
from ommatid.metrics import Fidelity, Firing, Monosemanticity, nan_mean
from ommatid.pipeline import open_stage
from ommatid.sae.learner import CURVE_COLUMNS, Learner
from ommatid.store import Artefact
from ommatid.train.stage import fit

KINDS = ("batch_topk", "topk", "matryoshka", "jumprelu", "gated", "archetypal", "relu")


def main() -> None:
    """Train and measure all variants, and print the table."""
    params = load_params(overrides=sys.argv[1:])
    activations = open_stage("extract", params.hookpoint)
    runs = [{}, *({"variant": {"kind": kind}} for kind in KINDS)]
    train = TrainParams.model_validate(params.train.model_dump(mode="json") | {"grid": {}, "runs": runs})
    learners = fit(train, {"extract": activations}, None, ignore)
    print("| variant | L0 in training | dead | FVU | L0 on evaluation | dead | FVU | MS − floor |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    for learner in learners.values():
        print(f"| {_name(learner.params)} | " + " | ".join(_numbers(learner, activations)) + " |")


def _name(params: TrainParams) -> str:
    return f"`{params.variant.kind}`" + (", aligned" if params.is_aligned else "")


def _numbers(learner: Learner, activations: Artefact) -> Iterator[str]:
    final: dict[str, Any] = dict(zip(CURVE_COLUMNS, learner.curves[-1].tolist(), strict=True))
    yield from (f"{final['l0']:.2f}", f"{final['dead']:.1%}", f"{final['fvu']:.3f}")
    sae = learner.finish("", "", None)
    fidelity, firing = Fidelity(), Firing(sae.n_latents)
    scores = Monosemanticity(sae.n_latents, activations.summary["d_judge"])
    for batch in iter_images(activations, None, sae.n_latents, 0, "", ignore):
        x = batch.x.flatten(0, 1)
        acts = sae.encode(x)
        pooled = acts.unflatten(0, batch.x.shape[:2]).amax(1)
        fidelity.add(x, sae.decode(acts), int((acts > 0).sum()))
        firing.add(acts, pooled)
        scores.add(pooled, batch.judges[0])
    found = scores.scores()
    dead = float(firing.is_dead.double().mean())
    yield from (f"{fidelity.l0:.2f}", f"{dead:.1%}", f"{fidelity.fvu:.3f}", f"{nan_mean(found.ms) - found.floor:.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
