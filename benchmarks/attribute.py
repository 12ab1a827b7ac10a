"""Benchmark of attribution: effects of all latents on one output by one backward pass, against ablating them one by one.

python benchmarks/attribute.py     writes benchmarks/results/attribute.json; uses 2 threads; takes about a minute
The model is the demo's, lite0 at 128 pixels, at the demo's hookpoint, blocks.15; the SAE has 1,280 latents with random directions, of
which 16 fire per token on average. The output is the similarity to one text minus that to another.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from own_process import clock
from report import Row, middle, publish
from torch import Tensor

from ommatid.extract.tokens import TokenPicker
from ommatid.images.figure import draw, make_figure
from ommatid.intervene.attribution import Attributor, agreement, similarity
from ommatid.sae.model import SAEConfig, make_untrained
from ommatid.vlm import Captured, Differentiated, Hookpoint, Replacement, Score, VisionModel, check_hookpoint
from ommatid.vlm.lite import LiteVision

THREADS = 2
SIZE, HOOKPOINT, D_SAE, K = 128, "blocks.15", 1280, 16
N_IMAGES = 8
TURNS = 16
"""Number of times that every way is timed, one after another."""
WIDE, WIDE_LATENTS, WIDE_TOKENS = 768, 65_536, 197
"""Width, latents and tokens per image of the large SAE."""


def make_attributor(model: VisionModel, hookpoint: str, pixels: Tensor, d_sae: int) -> Attributor:
    """Make an untrained SAE at a hookpoint, of which K latents fire per token."""
    picker = TokenPicker(hookpoint, check_hookpoint(model, hookpoint), "all")
    sample = picker.pick(model.capture(pixels[:8], [hookpoint]).tokens[hookpoint]).float().flatten(0, 1)
    config = SAEConfig("batch_topk", sample.shape[1], d_sae, K, hookpoint, model.name)
    return Attributor(model, make_untrained(config, sample[:128], seed=0), picker, picker)


def ablate_one_by_one(attributor: Attributor, pixels: Tensor, score: Score, latents: Sequence[int], shares_prefix: bool) -> Tensor:
    """Ablate each latent on all images, in a pass of its own, and return effects (images, latents)."""
    sae, model, picker = attributor.sae, attributor.model, attributor.writes
    tokens = picker.pick(model.capture(pixels, [picker.name]).tokens[picker.name])
    acts = sae.encode(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])

    def remove(latent: int, tokens: Tensor) -> Tensor:
        return picker.put(tokens, picker.pick(tokens) - acts[:, :, latent, None] * sae.W_dec[latent])

    (plain,) = model.splice(pixels, picker.name, [lambda tokens: tokens])
    replacements = [partial(remove, latent) for latent in latents]
    if shares_prefix:
        outputs = model.splice(pixels, picker.name, replacements)
    else:
        outputs = [model.splice(pixels, picker.name, [replacement])[0] for replacement in replacements]
    return torch.stack([score(plain) - score(output) for output in outputs], dim=1)


class Lookup:
    """A model whose tokens are given and whose output is their mean, so that nearly all time is the SAE's."""

    name = "lookup"

    def __init__(self, n_images: int) -> None:
        self.tokens = torch.randn(n_images, WIDE_TOKENS, WIDE, generator=torch.Generator().manual_seed(0))
        self.hookpoints = {"tokens": Hookpoint(WIDE, ("cls",), (14, 14))}

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        return Captured({"tokens": self.tokens}, None)

    def differentiate(
        self, pixels: Tensor, hookpoint: str, score: Score, replacement: Replacement | None = None, read: str | None = None
    ) -> Differentiated:
        gradients = torch.ones_like(self.tokens) / WIDE_TOKENS
        return Differentiated(self.tokens, self.tokens.mean(1), gradients)


def on_the_demo_model() -> tuple[list[Row], list[str]]:
    """Rows for the demo's model. All ways are timed by turns, because other work may slow the machine down."""
    model = cast(VisionModel, LiteVision("lite0", SIZE, "float32", "cpu"))
    pixels = torch.stack([torch.from_numpy(draw(make_figure(0, number), SIZE)) for number in range(N_IMAGES)])
    attributor = make_attributor(model, HOOKPOINT, pixels, D_SAE)
    score = similarity(*model.embed_text(["a photo of a truck", "a photo of a ship"]))
    attributor.exact(pixels, score, [0, 1, 2])  # warms up
    times: dict[str, list[float]] = {}
    found: dict[str, list[Tensor]] = {}

    def measure(name: str, work: Any) -> None:
        seconds, effects = clock(work)
        times.setdefault(name, []).append(seconds)
        found.setdefault(name, []).append(effects)

    for some in torch.arange(D_SAE).split(D_SAE // TURNS):
        measure("one by one", lambda some=some: ablate_one_by_one(attributor, pixels, score, some.tolist(), False))
        measure("shared", lambda some=some: ablate_one_by_one(attributor, pixels, score, some.tolist(), True))
        measure("cheap", lambda: attributor.cheap(pixels, score).by_image)
        measure("integrated", lambda: attributor.integrated(pixels, score).by_image)
        measure("exact", lambda: attributor.exact(pixels, score, range(D_SAE)))
    seconds = {name: sum(each) for name, each in times.items()}
    for name in ("cheap", "integrated", "exact"):
        seconds[name] /= TURNS
    exact, naive = found["exact"][0], torch.cat(found["one by one"], dim=1)
    rows = [
        Row("cheap effects of all latents, against ablating them one by one", seconds["one by one"] / seconds["cheap"], "x", 100, 1000),
        Row("the same, against passes that share the layers before the hookpoint", seconds["shared"] / seconds["cheap"], "x"),
        Row("the same, against `exact`, which ablates only latents that fire", seconds["exact"] / seconds["cheap"], "x"),
        Row("integrated effects in 10 steps, against ablating one by one", seconds["one by one"] / seconds["integrated"], "x"),
        Row("`exact`, against ablating one by one", seconds["one by one"] / seconds["exact"], "x"),
        Row("cheap effects of all latents: time per image", 1e3 * seconds["cheap"] / N_IMAGES, "ms", better="lower"),
        Row("largest difference between `exact` and ablating one by one", float((exact - naive).abs().max()), "", better="lower"),
    ]
    for name in ("cheap", "integrated"):
        agreed = agreement(found[name][0].mean(0), exact.mean(0), "truck", name).correlation
        rows.append(Row(f"rank correlation over latents of {name} effects with exact ones, means over images", agreed.value, ""))
    n_firing, largest = int((exact != 0).sum(1).double().mean()), float(exact.abs().max())
    return rows, [f"{N_IMAGES} images; {n_firing} of {D_SAE} latents fire on an image; effects are up to {largest:.2g}"]


def on_a_large_sae() -> Row:
    model, pixels = cast(VisionModel, Lookup(N_IMAGES)), torch.zeros(N_IMAGES, 1, 1, 3, dtype=torch.uint8)
    attributor = make_attributor(model, "tokens", pixels, WIDE_LATENTS)
    seconds = middle([clock(lambda: attributor.cheap(pixels, lambda outputs: outputs[:, 0]).by_image)[0] for _ in range(3)])
    what = f"cheap effects of {WIDE_LATENTS:,} latents, {WIDE_TOKENS} tokens x {WIDE}, without the model: time per image"
    return Row(what, 1e3 * seconds / N_IMAGES, "ms", better="lower")


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    rows, notes = on_the_demo_model()
    rows.append(on_a_large_sae())
    publish("attribute", rows, ["ommatid", "torch"], [f"{THREADS} threads", *notes])
