"""Vision-language models: one file a family behind one small protocol, none of which knows where data lives.

A family is a section of `config/models.py` and the module here that its `kind` names, with a function `make`. Families load late:
importing this module needs neither torch nor transformers.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, Protocol, assert_never

from ommatid.config.models import LiteModel, Model, TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16"]
Replacement = Callable[["torch.Tensor"], "torch.Tensor"]
"""From the tokens at a hookpoint (batch, n_tokens, d_model), as `Captured` has them, to those that take their place: as many, as wide."""
N_NEAR = 10
"""Hookpoints that the error about an unknown one shows."""


@dataclass(frozen=True)
class Hookpoint:
    """A place in the model where activations can be captured."""

    d_model: int
    """Width of an activation."""
    special: tuple[str, ...]
    """Kinds of the tokens before the patches, in the model's order: ("cls",), ("cls", "register", "register"), ("pooled",) or ()."""
    grid: tuple[int, int] | None
    """Rows and columns of the patch tokens; None: no token has a place in the image."""

    @property
    def n_tokens(self) -> int:
        """Tokens of an image: the special ones and the patches."""
        rows, cols = self.grid or (0, 0)
        return len(self.special) + rows * cols


@dataclass(frozen=True)
class Captured:
    """What one forward pass gives for a batch of images, on the model's device."""

    tokens: Mapping[str, "torch.Tensor"]
    """By hookpoint (batch, n_tokens, d_model): special tokens first, then patches row by row from the top left; in the dtype in which the
    model computes there."""
    embedding: "torch.Tensor | None"
    """The images in the joint space (batch, d_embed), float32: comparable to `embed_text` by cosine; finite, not of unit norm. None where
    the model has no text tower."""


class VisionModel(Protocol):
    """The model that is explained."""

    @property
    def name(self) -> str:
        """What the user would call it: "lite0@128", or the path."""
        ...

    @property
    def d_embed(self) -> int | None:
        """Width of the joint image-text space; None: no text tower, thus no joint space."""
        ...

    @property
    def hookpoints(self) -> Mapping[str, Hookpoint]:
        """Every hookpoint by name, in the order of the forward pass."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """From an RGB image to uint8 (H, W, 3): resize and crop only; cheap, picklable, safe in threads."""
        ...

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """The same as JSON for a manifest; `Preprocess(**preprocessing)` gives it back."""
        ...

    @property
    def text_templates(self) -> tuple[str, ...]:
        """How a name becomes a text: ("a photo of a {}",); empty without a text tower."""
        ...

    @property
    def logit_scale(self) -> float | None:
        """What the model was trained to multiply cosines of images and texts by before a softmax or sigmoid; None: it was not."""
        ...

    def capture(self, pixels: "torch.Tensor", hookpoints: Sequence[str]) -> Captured:
        """Run the model once on uint8 pixels (batch, H, W, 3) as `preprocess` makes them; without hookpoints for the embedding alone.

        Raises:
            ModelError: a hookpoint is unknown.
        """
        ...

    def splice(self, pixels: "torch.Tensor", hookpoint: str, replacements: Sequence[Replacement]) -> "tuple[torch.Tensor, ...]":
        """Embeddings, as `Captured` has them, that the model comes to when it goes on from other tokens at the hookpoint.

        Args:
            pixels: uint8 (batch, H, W, 3) as `preprocess` makes them.
            hookpoint: Where.
            replacements: What takes the place of the tokens there, one or more; each is called once, on the whole batch, and must not
                write into what it is given.

        Returns:
            One (batch, d_embed) float32 for each replacement.

        Raises:
            ModelError: the hookpoint is unknown, or there is no text tower, and so no embedding to come to.
        """
        ...

    def embed_text(self, texts: Sequence[str]) -> "torch.Tensor":
        """Texts in the joint space (texts, d_embed), float32.

        Raises:
            ModelError: there is no text tower.
        """
        ...


class Judge(Protocol):
    """The independent encoder whose embeddings the monosemanticity score uses."""

    @property
    def name(self) -> str:
        """What the user would call it."""
        ...

    @property
    def d_embed(self) -> int:
        """Width of the embedding."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """From an RGB image to uint8 (H, W, 3)."""
        ...

    def embed(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """From uint8 pixels (batch, H, W, 3) to embeddings (batch, d_embed), float32."""
        ...


def load_model(params: Model, dtype: Dtype, device: str) -> VisionModel:
    """Load the model that is explained by `make`, with these arguments, of the module that is named for its kind.

    Raises:
        ModelError: its files cannot be found or used; the message says which and what to do.
    """
    return import_module(f"{__name__}.{params.kind}").make(params, dtype, device)


def load_judge(params: LiteModel | TransformersJudge, dtype: Dtype, device: str) -> Judge:
    """Load the judge.

    Raises:
        ModelError: its files cannot be found or used; the message says which and what to do.
    """
    match params:
        case LiteModel():
            from ommatid.vlm.lite import LiteJudge

            return LiteJudge(params.variant, params.image_size, dtype, device)
        case TransformersJudge():
            from ommatid.vlm.judge import TransformersVisionJudge

            return TransformersVisionJudge(params.path, dtype, device)
        case _:
            assert_never(params)


def check_hookpoint(model: VisionModel, name: str) -> Hookpoint:
    """The hookpoint of that name.

    Raises:
        ModelError: unknown; lists the valid ones that are nearest in spelling.
    """
    known = model.hookpoints
    if name not in known:
        near = difflib.get_close_matches(name, known, n=N_NEAR, cutoff=0.0)
        more = f"; `ommatid hookpoints` lists these and {len(known) - len(near)} more" if len(known) > len(near) else ""
        raise ModelError(
            f"hookpoint {name!r}: {model.name} has none of that name; name in extract.hookpoints one of: {', '.join(near)}{more}"
        )
    return known[name]


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 ImageNet class names in the order of the network's logits (998 differ: missile and sunglasses stand twice)."""
    text = (files("ommatid.vlm") / "imagenet_classes.txt").read_text(encoding="utf-8")
    names = tuple(line for line in text.splitlines() if line and not line.startswith("#"))
    assert len(names) == 1000, f"imagenet_classes.txt has {len(names)} names, not 1000"
    return names
