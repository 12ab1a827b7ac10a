"""Vision-language models behind one small protocol, one file per family. Nothing here knows where data is stored.

A family consists of a section in `config/models.py` and a module here that is named after its `kind` and has a function `make`. Families
are imported when first used, so that importing this module needs neither torch nor transformers.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ommatid.config.models import LiteModel, Model, TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm.preprocess import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import nn

Dtype = Literal["auto", "float32", "bfloat16"]
Replacement = Callable[["torch.Tensor"], "torch.Tensor"]
"""Function from the tokens at a hookpoint, `(batch, n_tokens, d_model)` as in `Captured`, to replacements of the same shape. It is called
once, on the whole batch, without autograd or autocast, and must not write into its argument."""
Score = Callable[["torch.Tensor"], "torch.Tensor"]
"""Differentiable function from outputs, `(batch, d_output)` float32, to one number per image, `(batch,)`, which depends on the output of
that image only. If tokens at a later hookpoint are read, they are its argument, `(batch, n_tokens, d_model)` float32."""
N_NEAR = 10
"""Number of similar names listed in the error about an unknown hookpoint."""


@dataclass(frozen=True)
class Hookpoint:
    """A place in the model where activations can be captured."""

    d_model: int
    """Width of an activation."""
    special: tuple[str, ...]
    """Kinds of the tokens before the patches, in the model's order: ("cls",), ("cls", "register", "register"), ("pooled",) or ()."""
    grid: tuple[int, int] | None
    """Rows and columns of the patch tokens; None if no token has a place in the image."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens per image: special tokens and patches."""
        rows, cols = self.grid or (0, 0)
        return len(self.special) + rows * cols


@dataclass(frozen=True)
class Captured:
    """The results of one forward pass over a batch of images, on the model's device."""

    tokens: Mapping[str, "torch.Tensor"]
    """Activations by hookpoint, `(batch, n_tokens, d_model)`, in the dtype in which the model computes there. Special tokens come first,
    then patches row by row from the top left."""
    embedding: "torch.Tensor | None"
    """Image embeddings in the joint space, `(batch, d_embed)` float32, comparable to `embed_text` by cosine. They are finite, but not of
    unit norm. None if the model has no text tower."""


@dataclass(frozen=True)
class Differentiated:
    """The tokens at a hookpoint, the outputs computed from them, and the gradients of a score, on the model's device."""

    tokens: "torch.Tensor"
    """Tokens at the hookpoint, after the replacement if there was one, `(batch, n_tokens, d_model)` float32."""
    outputs: "torch.Tensor"
    """Outputs computed from these tokens, `(batch, d_output)` float32: what `splice` returns, up to rounding."""
    gradients: "torch.Tensor"
    """Gradient of each image's score with respect to its tokens, `(batch, n_tokens, d_model)` float32."""


class VisionModel(Protocol):
    """The model whose activations are explained."""

    @property
    def name(self) -> str:
        """Name that a user would recognise: "lite0@128", or the path."""
        ...

    @property
    def d_embed(self) -> int | None:
        """Width of the joint image-text space; None if the model has no text tower, and so no joint space."""
        ...

    @property
    def d_output(self) -> int:
        """Width of what `splice` returns: `d_embed` if the model has a text tower, and else the width of its final features.

        Raises:
            ModelError: The model is the user's module, and its forward pass returns no features.
        """
        ...

    @property
    def hookpoints(self) -> Mapping[str, Hookpoint]:
        """All hookpoints by name, in the order of the forward pass."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """Function from an RGB image to uint8 pixels `(H, W, 3)`. It only resizes and crops; it is cheap, picklable and thread-safe."""
        ...

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """The settings of `preprocess` as JSON for a manifest, from which `Preprocess(**preprocessing)` restores it."""
        ...

    @property
    def text_templates(self) -> tuple[str, ...]:
        """Templates that turn a name into a text, such as ("a photo of a {}",); empty if the model has no text tower."""
        ...

    @property
    def logit_scale(self) -> float | None:
        """Factor by which training multiplied cosines of images and texts before the softmax or sigmoid; None if there was none."""
        ...

    def capture(self, pixels: "torch.Tensor", hookpoints: Sequence[str]) -> Captured:
        """Capture activations and image embeddings in one forward pass.

        Args:
            pixels: uint8 pixels `(batch, H, W, 3)` from `preprocess`.
            hookpoints: Names of the hookpoints to capture. If there are none, only embeddings are computed.

        Returns:
            The activations and the embeddings.

        Raises:
            ModelError: A hookpoint is unknown.
        """
        ...

    def splice(
        self, pixels: "torch.Tensor", hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> "tuple[torch.Tensor, ...]":
        """Compute the model's output with the tokens at a hookpoint replaced.

        The output is the image embedding if the model has a text tower. If it has none, the output is its final features:

        - `vit`, `dino`: the class token of the last hidden state, after the final layer norm
        - `llava`, `qwen`: the mean token of `vision.projection`, which is what the language model reads
        - `module`: what the forward pass returns; of tokens, the class token if there is one, and else the mean of the patches

        Every replacement goes through a forward pass of its own, with the same batch. So a replacement that returns its argument, or the
        same values, gives the plain output of the batch bit for bit, whatever else is in the call. The part of the pass before the
        hookpoint runs only once, except in a `module`, whose blocks are not known.

        Args:
            pixels: uint8 pixels `(batch, H, W, 3)` from `preprocess`.
            hookpoint: Name of the hookpoint.
            replacements: Functions that compute the new tokens.
            read: A later hookpoint, whose tokens are returned instead of the output; the layers after it do not run, where that is known.

        Returns:
            The outputs for each replacement, `(batch, d_output)` float32; or tokens that are read, `(batch, n_tokens, d_model)` float32.

        Raises:
            ModelError: A hookpoint is unknown, the one to read is not a later one, or the model is the user's module, and its forward pass
                returns no features.
        """
        ...

    def differentiate(
        self, pixels: "torch.Tensor", hookpoint: str, score: Score, replacement: Replacement | None = None, read: str | None = None
    ) -> Differentiated:
        """Compute the gradient of a score of the output with respect to the tokens at a hookpoint.

        This takes one forward pass, of which only the part after the hookpoint is differentiated, and one backward pass. Nothing of
        them remains in the model. Memory grows with the batch, and with the depth of the part after the hookpoint.

        Args:
            pixels: uint8 pixels `(batch, H, W, 3)` from `preprocess`.
            hookpoint: Name of the hookpoint.
            score: The score of each image's output.
            replacement: Function that computes the tokens at which the gradient is taken; None takes it at the model's own tokens.
            read: A later hookpoint, whose tokens take the place of the output.

        Returns:
            The tokens, the outputs and the gradients.

        Raises:
            ModelError: The hookpoint is unknown, the output does not depend on it, or the model is the user's module, and its forward
                pass returns no features or cannot be differentiated.
        """
        ...

    def embed_text(self, texts: Sequence[str]) -> "torch.Tensor":
        """Return the embeddings of texts in the joint space, `(texts, d_embed)` float32.

        Raises:
            ModelError: The model has no text tower.
        """
        ...


class Judge(Protocol):
    """The independent encoder whose embeddings the monosemanticity score uses."""

    @property
    def name(self) -> str:
        """Name that a user would recognise."""
        ...

    @property
    def d_embed(self) -> int:
        """Width of the embedding."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """Function from an RGB image to uint8 pixels `(H, W, 3)`."""
        ...

    def embed(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Return the embeddings `(batch, d_embed)` float32 of uint8 pixels `(batch, H, W, 3)`."""
        ...


State = Mapping[str, "torch.Tensor | str"]
"""Everything that a network's outputs are computed from, besides code: weights by name, and settings as text."""


class Recognisable(Protocol):
    """A model or judge whose outputs can be found again, because it says what they are computed from.

    All families here are. A network without this property is run anew on every image each time.
    """

    @property
    def state(self) -> State:
        """Weights and settings. Networks of the same class with equal states compute the same."""
        ...


def state_of(module: "nn.Module", *settings: object, unused: Collection[str] = ()) -> State:
    """Return the state of a network that computes with a module.

    Args:
        module: The module.
        settings: Settings that are not among its parameters and buffers.
        unused: Names of parameters on which no output depends, such as random ones of a pooler that the files lack.

    Returns:
        The state.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {**{name: tensor.detach() for name, tensor in tensors if name not in unused}, "settings": repr(settings)}


def load_model(params: Model, dtype: Dtype, device: str) -> VisionModel:
    """Load a model, by calling `make` of the module named after its kind.

    Args:
        params: Section of the parameters.
        dtype: Data type in which the model computes.
        device: Device of the model.

    Returns:
        The model.

    Raises:
        ModelError: The model's files cannot be found or used. The message says which, and what to do.
    """
    return import_module(f"{__name__}.{params.kind}").make(params, dtype, device)


def load_judge(params: LiteModel | TransformersJudge, dtype: Dtype, device: str) -> Judge:
    """Load a judge, by calling `make_judge` of the module named after its kind.

    Args:
        params: Section of the parameters.
        dtype: Data type in which the judge computes.
        device: Device of the judge.

    Returns:
        The judge.

    Raises:
        ModelError: The judge's files cannot be found or used. The message says which, and what to do.
    """
    return import_module(f"{__name__}.{params.kind}").make_judge(params, dtype, device)


class Hooked(Protocol):
    """A model with hookpoints; its properties are those of `VisionModel`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def hookpoints(self) -> Mapping[str, Hookpoint]: ...  # noqa: D102


def check_hookpoints(model: Hooked, hookpoint: str, read: str | None) -> None:
    """Check that a model has a hookpoint, and a later one to read.

    Raises:
        ModelError: A hookpoint is unknown, or the one to read is not later in the forward pass.
    """
    names = list(model.hookpoints)
    for name in (hookpoint, read or hookpoint):
        check_hookpoint(model, name)
    if read and names.index(read) <= names.index(hookpoint):
        raise ModelError(f"hookpoint {read!r} is not after {hookpoint!r} in {model.name}: tokens can only be read after those that change")


def check_hookpoint(model: Hooked, name: str) -> Hookpoint:
    """Return the hookpoint with a name.

    Raises:
        ModelError: The model has no such hookpoint. The message lists those with the most similar names.
    """
    known = model.hookpoints
    if name not in known:
        near = difflib.get_close_matches(name, known, n=N_NEAR, cutoff=0.0)
        more = f"; `ommatid hookpoints` lists these and {len(known) - len(near)} more" if len(known) > len(near) else ""
        raise ModelError(
            f"hookpoint {name!r}: {model.name} has no such hookpoint; set extract.hookpoints to one or more of: {', '.join(near)}{more}"
        )
    return known[name]


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ImageNet class names in the order of the network's logits. Missile and sunglasses each occur twice."""
    text = (files("ommatid.vlm") / "imagenet_classes.txt").read_text(encoding="utf-8")
    names = tuple(line for line in text.splitlines() if line and not line.startswith("#"))
    assert len(names) == 1000, f"imagenet_classes.txt has {len(names)} names, not 1000"
    return names
