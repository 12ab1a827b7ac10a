"""Vision-language models: one file a family behind one small protocol, none of which knows where data lives.

Families load late: importing this module needs neither torch nor transformers.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, Protocol, assert_never

from ommatid.config import ClipModel, LiteModel, TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Hookpoint:
    """A place in the model where activations can be captured."""

    d_model: int
    """Width of an activation."""
    grid: tuple[int, int] | None
    """Rows and columns of the patch tokens; None: no token has a place in the image."""
    has_cls: bool
    """Whether there is a class token."""


@dataclass(frozen=True)
class Captured:
    """What one forward pass gives for a batch of images: float32, on the model's device."""

    cls: "torch.Tensor | None"
    """Class tokens (batch, d_model), where the hookpoint has them."""
    patches: "torch.Tensor | None"
    """Patch tokens (batch, rows, cols, d_model), row 0 at the top and column 0 at the left, where the hookpoint has a grid."""
    embedding: "torch.Tensor"
    """The images in the joint space (batch, d_embed): comparable to `embed_text` by cosine; finite, not of unit norm."""


class VisionModel(Protocol):
    """The model that is explained."""

    @property
    def name(self) -> str:
        """What the user would call it: "lite0@128", or the path."""
        ...

    @property
    def d_embed(self) -> int:
        """Width of the joint space."""
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
        """How a name becomes a text: ("a photo of a {}",)."""
        ...

    def capture(self, pixels: "torch.Tensor", hookpoint: str) -> Captured:
        """Run the model on uint8 pixels (batch, H, W, 3) as `preprocess` makes them.

        Raises:
            ModelError: the hookpoint is unknown.
        """
        ...

    def embed_text(self, texts: Sequence[str]) -> "torch.Tensor":
        """Texts in the joint space (texts, d_embed), float32."""
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


def load_model(params: LiteModel | ClipModel, dtype: Dtype, device: str) -> VisionModel:
    """Load the model that is explained.

    Raises:
        ModelError: its files cannot be found or used; the message says which and what to do.
    """
    match params:
        case LiteModel():
            from ommatid.vlm.lite import LiteVision

            return LiteVision(params.variant, params.image_size, dtype, device)
        case ClipModel():
            from ommatid.vlm.clip import ClipVision

            return ClipVision(params.path, dtype, device)
        case _:
            assert_never(params)


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
        ModelError: unknown; lists the valid ones, the nearest in spelling first.
    """
    known = model.hookpoints
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        names = [*near, *(other for other in known if other not in near)]
        raise ModelError(f"hookpoint {name!r}: {model.name} has none of that name; set extract.hookpoint to one of: {', '.join(names)}")
    return known[name]


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 ImageNet class names in the order of the network's logits (998 differ: missile and sunglasses stand twice)."""
    text = (files("ommatid.vlm") / "imagenet_classes.txt").read_text(encoding="utf-8")
    names = tuple(line for line in text.splitlines() if line and not line.startswith("#"))
    assert len(names) == 1000, f"imagenet_classes.txt has {len(names)} names, not 1000"
    return names
