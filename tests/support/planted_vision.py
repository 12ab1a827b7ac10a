"""A model whose activations are a known mixture of the factors of the source `shapes`, with its own joint text space and judge.

It knows every image by its pixels and looks up what is in it: nothing is learnt, so whatever is measured on it has a right answer.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ommatid.images.figure import BACKGROUNDS, COLOURS, FAMILIES, PLACES, SHAPES, TEMPERATURES, TEXTURES, Figure, draw, make_figure
from ommatid.images.shapes import Plan
from ommatid.vlm import Captured, Hookpoint
from ommatid.vlm.preprocess import Preprocess

PLAN = Plan(n_images=1200, size=36, seed=0)
"""Plan of the images that the model knows."""
GROUPS = {
    "family": tuple(FAMILIES),
    "shape": SHAPES,
    "temperature": tuple(TEMPERATURES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "place": PLACES,
    "background": tuple(BACKGROUNDS),
}
FACTORS = tuple(chain.from_iterable(GROUPS.values()))
"""Words for the 38 factors, of which each image has seven."""
SEVEN, PER_PATCH = len(GROUPS), 3
"""Number of factors of an image, and of each of its patches."""
D_MODEL = 64
NOISE = 0.05
"""Standard deviation of the noise on each component of an activation."""
OFFSET = 1.0
"""Norm of the offset that all activations share."""
HOOKPOINT = "tokens"
MODEL = {
    "kind": "module",
    "factory": "support.planted_vision:make",
    "resize": [PLAN.size, PLAN.size],
    "crop": [PLAN.size, PLAN.size],
    "interpolation": "nearest",
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
}
"""The model, as a value of `extract.model`."""


def directions(width: int, seed: int) -> Tensor:
    """Sample a random direction of unit norm for each factor, (factors, width)."""
    return normalize(torch.randn(len(FACTORS), width, generator=torch.Generator().manual_seed(seed)), dim=1)


DIRECTIONS = directions(D_MODEL, seed=1)
"""Directions planted in the activations, (factors, d_model)."""
B_DEC = OFFSET * normalize(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2)), dim=0)
"""Offset that all activations share, (d_model,)."""


@cache
def figures() -> tuple[Figure, ...]:
    """Return the figures on the images."""
    return tuple(make_figure(PLAN.seed, number) for number in range(PLAN.n_images))


@cache
def _numbers() -> dict[bytes, int]:
    """Return the number of each image, by its pixels."""
    return {draw(figure, PLAN.size).tobytes(): number for number, figure in enumerate(figures())}


def numbers_of(pixels: Tensor) -> Tensor:
    """Return the numbers of images, given their uint8 pixels, (images, H, W, 3); -1 for an image that is not in the plan."""
    return torch.tensor([_numbers().get(image.numpy().tobytes(), -1) for image in pixels])


@cache
def truths() -> Tensor:
    """Return which factors each image has, (images, factors), 0 or 1."""
    return torch.tensor([[float(name in figure.factors) for name in FACTORS] for figure in figures()])


@cache
def codes() -> Tensor:
    """How strongly each factor is in each of the nine patches, (images, 9, factors).

    Each patch has three of the seven factors that are true of its image, by turns in an order drawn for the image: so each factor is in
    three patches or four. Strengths lie between 1 and 2, each on its own.
    """
    generator = torch.Generator().manual_seed(5)
    order = torch.rand(PLAN.n_images, SEVEN, generator=generator).argsort(dim=1)
    by_turns = torch.arange(9 * PER_PATCH).view(9, PER_PATCH) % SEVEN
    true = truths().nonzero()[:, 1].view(-1, SEVEN)
    chosen = true.gather(1, order)[:, by_turns]
    strengths = 1 + torch.rand(chosen.shape, generator=generator)
    return torch.zeros(PLAN.n_images, 9, len(FACTORS)).scatter_(2, chosen, strengths)


@cache
def tokens() -> Tensor:
    """Return the activations of all images, (images, 9, d_model)."""
    mixed = codes() @ DIRECTIONS + B_DEC
    return mixed + NOISE * torch.randn(mixed.shape, generator=torch.Generator().manual_seed(6))


def light(pixels: Tensor) -> Tensor:
    """Return the mean brightness of each of the nine patches, (images, 9), 0 to 1, given uint8 pixels, (images, H, W, 3)."""
    side = PLAN.size // 3
    return pixels.float().view(-1, 3, side, 3, side, 3).mean((2, 4, 5)).flatten(1) / 255


class Planted(nn.Module):
    """The model that is explained; for an unknown image, its activations are the offset plus the brightness of the patch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).contiguous()
        numbers = numbers_of(pixels)
        unknown = B_DEC + light(pixels)[:, :, None] * DIRECTIONS[0]
        return self.tokens(torch.where(numbers[:, None, None] < 0, unknown, tokens()[numbers]))


def make() -> nn.Module:
    """Make the model; this is the factory that `extract.model` names."""
    return Planted()


class _Embedder:
    """Embeds images as the mean of the directions of their factors."""

    preprocess = Preprocess((PLAN.size, PLAN.size), (PLAN.size, PLAN.size), "nearest", (0, 0, 0), (1, 1, 1))
    preprocessing = preprocess.as_json()

    def __init__(self, name: str, width: int, seed: int) -> None:
        self.name = name
        self.d_embed = width
        self.directions = directions(width, seed)

    def embed(self, pixels: Tensor) -> Tensor:
        """Embed images, (images, width), with noise of a fifth of the norm; for an unknown image, embed its brightness."""
        numbers = numbers_of(pixels)
        noise = torch.randn(PLAN.n_images, self.d_embed, generator=torch.Generator().manual_seed(7)) / self.d_embed**0.5
        known = normalize(truths() @ self.directions, dim=1) + 0.2 * noise
        unknown = torch.nn.functional.pad(light(pixels), (0, self.d_embed - 9), value=1.0)
        return torch.where(numbers[:, None] < 0, unknown, known[numbers])


class PlantedNamer(_Embedder):
    """Embeds texts as the sum of the directions of the factors that they name; texts that name none get a random direction."""

    text_templates = ("a photo of a {}",)
    hookpoints: dict[str, Hookpoint] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__("planted names", 64, seed=3)

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        return Captured({}, self.embed(pixels))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._embed_text(text) for text in texts])

    def _embed_text(self, text: str) -> Tensor:
        found = torch.zeros(self.d_embed)
        for name in sorted(FACTORS, key=len, reverse=True):  # "top left" is neither "top" nor "left"
            if f" {name} " in f" {text} ":
                text = text.replace(name, "")
                found += self.directions[FACTORS.index(name)]
        if found.any():
            return found
        return normalize(torch.randn(self.d_embed, generator=torch.Generator().manual_seed(sum(text.encode()))), dim=0)


class PlantedJudge(_Embedder):
    """The judge, which embeds the same factors in other directions."""

    def __init__(self) -> None:
        super().__init__("planted judge", 96, seed=4)
