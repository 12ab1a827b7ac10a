"""Benchmark of interventions: all arms of a latent by running the rest of the model, against running the whole model for each.

python benchmarks/intervene.py            writes benchmarks/results/intervene.json; uses 2 threads; takes minutes; needs `make demo`
python benchmarks/intervene.py memory N   prints the peak memory of a study of N images
The model is the demo's, lite0 at 128 pixels, at the demo's hookpoint, blocks.15, with an SAE of 1,280 latents with random directions. The
full size of the comparison would take hours, so both ways are timed by turns on one latent and one batch of images at a time.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from attribute import HOOKPOINT, SIZE, THREADS, make_attributor
from own_process import clock, in_a_process, peak
from report import Row, middle, publish
from torch import Tensor

from ommatid import store
from ommatid.config import InterveneParams, load_params
from ommatid.extract.tokens import TokenPicker
from ommatid.images.figure import draw, make_figure
from ommatid.intervene import measure
from ommatid.intervene.latent_test import LatentTest
from ommatid.intervene.readout import Readout
from ommatid.intervene.stage import run
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import unit
from ommatid.pipeline.inputs import open_inputs
from ommatid.sae.model import SAE
from ommatid.vlm import Captured, Hookpoint, Replacement, VisionModel
from ommatid.vlm.lite import LiteVision

BATCH = 64
N_LATENTS, N_IMAGES, DOSES, DRAWS = 64, 1000, (0.0, 0.25, 0.5, 0.75, 1.0), 20
"""Size of the comparison: latents, images, doses, and draws of each random control."""
TURNS = 7
"""Number of turns, each with another latent."""
NAIVE_ARMS = 12
"""Number of arms, spread evenly over all of them, that are run through the whole model in a turn."""
MEMORY_IMAGES = (250, 1000, 4000)
MEMORY_LATENTS, KEPT = 8, 2**25
"""Latents, and bytes of results that are kept at a time: an eighth of what the stage keeps, so that few latents reach it."""
WIDTH, D_OUTPUT, D_SAE = 320, 384, 1280
"""Widths of the model without layers: those of the demo."""
CLASSES = tuple(f"class {n}" for n in range(10))


class Fixed(Subject):
    """A subject whose model and SAE are given, and whose images are drawn or empty."""

    def __init__(self, model: VisionModel, sae: SAE, picker: TokenPicker, n_images: int, is_drawn: bool) -> None:
        self.model, self.sae, self.reads, self.writes, self.device, self.head = model, sae, picker, picker, "cpu", None
        self.device_sae, self.classes = sae, {number: CLASSES[number % len(CLASSES)] for number in range(n_images)}
        self.labels = {n: {"label": f"label {n}", "score": 0.9} for n in range(sae.n_latents)}
        self.readout = Readout(CLASSES, unit(model.embed_text(CLASSES)), 20.0)
        self.densities = torch.full((sae.n_latents,), 0.01, dtype=torch.float64), torch.ones(sae.n_latents, dtype=torch.bool)
        self.is_drawn = is_drawn

    def load_pixels(self, images: Sequence[int]) -> Iterator[tuple[np.ndarray, Tensor]]:
        for start in range(0, len(images), BATCH):
            numbers = np.array(images[start : start + BATCH])
            yield numbers, torch.stack([_pixels(number) if self.is_drawn else torch.zeros(1, 1, 3) for number in numbers.tolist()]).byte()


def _pixels(number: int) -> Tensor:
    return torch.from_numpy(draw(make_figure(0, number), SIZE))


class NoLayers:
    """A model whose output is a fixed linear function of its tokens, so that a study of thousands of images takes minutes."""

    name, d_embed, d_output, text_templates, logit_scale = "no-layers", D_OUTPUT, D_OUTPUT, ("a photo of a {}",), 20.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(BATCH, 16, WIDTH, generator=generator)
        self.head = torch.randn(WIDTH, D_OUTPUT, generator=generator) / WIDTH**0.5
        self.hookpoints = {HOOKPOINT: Hookpoint(WIDTH, (), (4, 4))}

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        return Captured({HOOKPOINT: self.tokens[: len(pixels)]}, None)

    def splice(self, pixels: Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None) -> tuple[Tensor, ...]:
        return tuple(replacement(self.tokens[: len(pixels)]).mean(1) @ self.head for replacement in replacements)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.randn(D_OUTPUT, generator=torch.Generator().manual_seed(hash(text) % 2**31)) for text in texts])


def make_study(subject: Fixed, n_images: int, latents: Sequence[int]) -> tuple[Study, list[Described]]:
    """Make a study of given latents, whose scale is their largest activation on a batch of images."""
    params = InterveneParams.model_validate(
        {"latents": {"kind": "listed", "latents": latents}, "doses": DOSES, "n_images": n_images, "draws": DRAWS, "max_drift": 1, "seed": 0}
    )
    study = Study(params, subject)
    study.images, study.chosen = list(range(n_images)), latents
    pixels = next(subject.load_pixels(range(BATCH)))[1]
    tokens = subject.reads.pick(subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name]).float().flatten(0, 1)
    acts = subject.sae.encode(tokens)
    return study, [
        Described(n, f"label {n}", int((acts[:, n] > 0).sum()), float(acts[:, n].max()) or 1.0, tokens.mean(0), 1.0, CLASSES[0])
        for n in latents
    ]


def run_naively(test: LatentTest, pixels: Tensor, read: Tensor) -> float:
    """Return the seconds that all arms take on a batch of images, each through the whole model, from those of some arms."""
    (none, *arms), _ = test._make_arms(read)
    test._make_room(len(arms))
    subject = test.study.subject
    (plain,) = subject.model.splice(pixels, subject.writes.name, [none.replacement])
    some = np.linspace(0, len(arms) - 1, NAIVE_ARMS).round().astype(int).tolist()

    def run() -> None:
        for place in some:
            outputs = subject.model.splice(pixels, subject.writes.name, [arms[place].replacement])
            test._keep([place], torch.arange(len(pixels)), plain, outputs)

    return clock(run)[0] * len(arms) / NAIVE_ARMS


def on_the_demo_model() -> tuple[list[Row], list[str]]:
    """Rows of the comparison. Both ways are timed by turns, because other work may slow the machine down."""
    model = cast(VisionModel, LiteVision("lite0", SIZE, "float32", "cpu"))
    pixels = torch.stack([_pixels(number) for number in range(BATCH)])
    attributor = make_attributor(model, HOOKPOINT, pixels, D_SAE)
    subject = Fixed(model, attributor.sae, attributor.reads, N_IMAGES, is_drawn=True)
    firing = attributor.encode(pixels).firing.tolist()
    study, described = make_study(subject, N_IMAGES, firing[:: len(firing) // TURNS][:TURNS])
    ours, naive, shares = [], [], []
    for one in described:
        test, of_naive = LatentTest(study, one), LatentTest(study, one)

        def run_once(test: LatentTest = test) -> Tensor:
            read = model.capture(pixels, [HOOKPOINT]).tokens[HOOKPOINT]
            test.run(pixels, read)
            return read

        run_once(LatentTest(study, one))  # warms up
        seconds, read = clock(run_once)
        ours.append(seconds)
        naive.append(run_naively(of_naive, pixels, read))
        shares.append(float(test.fires[0].double().mean()))
    per_image, of_naive_per_image = (middle(each) / BATCH for each in (ours, naive))
    fires = middle(shares)
    size = f"{N_IMAGES:,} images x {N_LATENTS} latents x {len(DOSES)} doses x all arms"
    rows = [
        Row(f"{size}, against running the whole model for each", of_naive_per_image / per_image, "x", 5, 20),
        Row("one latent, all doses and arms: time per image", 1e3 * per_image, "ms", better="lower"),
        Row("the same, by running the whole model for each", 1e3 * of_naive_per_image, "ms", better="lower"),
        Row(f"{size}: time, from that of one latent and image", per_image * N_IMAGES * N_LATENTS / 60, "min", better="lower"),
    ]
    n_arms = len(DOSES) * (3 + 2 * DRAWS) + 1
    return rows, [
        f"{n_arms} arms; medians of {TURNS} latents, each on {BATCH} images; the median latent fires on {fires:.0%} of the images"
    ]


def of_memory() -> list[Row]:
    rows = []
    for n in MEMORY_IMAGES:
        found = in_a_process(__file__, "memory", str(n))
        what = f"peak memory of a study of {n:,} images, {MEMORY_LATENTS} latents, {KEPT >> 20} MB of results kept"
        rows.append(Row(what, found["peak"], "MB", 2048, better="lower"))
    return rows


def of_the_stage() -> list[Row]:
    seconds, found = clock(lambda: in_a_process(__file__, "stage"))
    return [
        Row("the demo's stage, with its imports", seconds, "s", 60, 30, better="lower"),
        Row("peak memory of the demo's stage", found["peak"], "MB", 2048, better="lower"),
    ]


def measure_memory(n_images: int) -> dict[str, float]:
    """Test latents on images of a model without layers, and return the peak memory in MB and the seconds that it took."""
    model = cast(VisionModel, NoLayers())
    attributor = make_attributor(model, HOOKPOINT, torch.zeros(BATCH, 1, 1, 3), D_SAE)
    study, described = make_study(Fixed(model, attributor.sae, attributor.reads, n_images, is_drawn=False), n_images, range(MEMORY_LATENTS))
    measure.KEPT = KEPT
    seconds, (found, refused) = clock(lambda: measure.run_tests(study, described, lambda event: None))
    assert len(found) == MEMORY_LATENTS and not refused, (len(found), refused[:1])
    return {"peak": peak(), "seconds": seconds}


def run_stage() -> dict[str, float]:
    """Run the stage on the artefacts of `make demo`, into a folder of its own, and return its peak memory in MB."""
    params = load_params(Path("params.yaml"))
    inputs = open_inputs("intervene", params, "data")
    with tempfile.TemporaryDirectory() as folder, store.open_draft(Path(folder) / "interventions", "interventions", {}, inputs) as draft:
        run(params.intervene, inputs, draft)
    return {"peak": peak()}


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    match sys.argv[1:]:
        case ["memory", n]:
            print(json.dumps(measure_memory(int(n))))
        case ["stage"]:
            print(json.dumps(run_stage()))
        case _:
            rows, notes = on_the_demo_model()
            rows += [*of_memory(), *of_the_stage()]
            publish("intervene", rows, ["ommatid", "torch"], [f"{THREADS} threads", *notes])
