"""Common base of the ViTs from transformers: it opens a folder, names hookpoints, and captures or replaces the tokens there."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from ommatid.errors import ModelError
from ommatid.vlm import (
    Captured,
    Differentiated,
    Dtype,
    Hookpoint,
    Replacement,
    Score,
    State,
    check_hookpoint,
    check_hookpoints,
    hub,
    splicing,
    state_of,
)
from ommatid.vlm.hooks import capturing, ending_after, replacing, skipping
from ommatid.vlm.precision import cast_linears, normalise, resolve_dtype
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.processor import load_preprocess

KEY = "extract.model.path"
IMAGE_NEEDS = hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR
TEXT_BATCH = 64


@dataclass(frozen=True)
class Opened:
    """A model that was read from a folder."""

    path: str
    """Folder or hub name that the user gave."""
    folder: Path
    """Folder of the files."""
    config: Any
    """Config of transformers."""
    model: Any
    """Model of transformers, in float32 on the CPU."""
    preprocess: Preprocess
    """Preprocessing of images."""
    unused: frozenset[str] = frozenset()
    """Names of weights that the files lack, so that they are random, and on which no output depends."""


def open_model(path: str, kind: str, classes: Mapping[str, Any], needs: hub.Needs = IMAGE_NEEDS) -> Opened:
    """Read a model.

    Args:
        path: Folder or hub name.
        kind: Kind of the family, for messages.
        classes: Classes of transformers by `model_type` in config.json.
        needs: Files that the folder must have.

    Returns:
        The model.

    Raises:
        ModelError: The model is not found, incomplete or damaged, or its `model_type` is not in `classes`.
    """
    folder = hub.locate(path, KEY, needs)
    config = hub.load_config(folder, path, KEY)
    if config.model_type not in classes:
        raise ModelError(f"{KEY}: {path}: is a {config.model_type} model; kind {kind} takes model_type {' or '.join(classes)}")
    preprocess = load_preprocess(folder, path, KEY)
    # The pooler of a ViT may be missing: it runs after the last hookpoint, and most folders have none.
    model, missing = hub.load_weights(classes[config.model_type], folder, path, KEY, optional="pooler.")
    return Opened(path, folder, config, model, preprocess, frozenset(missing))


@dataclass(frozen=True)
class Site:
    """A hookpoint and its module."""

    hookpoint: Hookpoint
    """The hookpoint."""
    module: nn.Module
    """Module whose output is captured."""
    is_bottleneck: bool = False
    """Whether the module is a block, and all that is computed after it depends on the image only through its output. A forward pass can
    then resume here. The last site need not say so, because the blocks before it take nearly all the time."""


def block_sites(
    blocks: Iterable[tuple[nn.Module, nn.Module, nn.Module]], hookpoint: Hookpoint, n_bottlenecks: int | None = None
) -> dict[str, Site]:
    """Name the three hookpoints of each block.

    Args:
        blocks: Three modules for each block: those that output what attention and what the MLP add to the residual stream, and the one
            that outputs the stream after both.
        hookpoint: Hookpoint that describes all of them.
        n_bottlenecks: Number of blocks, from the first on, of whose outputs only the last is used after them; None for all blocks.

    Returns:
        The sites, by name.
    """
    names = (".attn", ".mlp", "")
    return {
        f"vision.blocks.{i}{name}": Site(hookpoint, module, is_bottleneck=not name and (n_bottlenecks is None or i < n_bottlenecks))
        for i, block in enumerate(blocks)
        for name, module in zip(names, block, strict=True)
    }


def patch_grid(config: Any, crop: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of the patches of an image of size `crop`. No patch covers pixels left over at the right or bottom."""
    patch = _pair(config.patch_size)
    return crop[0] // patch[0], crop[1] // patch[1]


def check_size(config: Any, opened: Opened) -> None:
    """Check that preprocessing makes images of the one size that a model takes.

    Raises:
        ModelError: Preprocessing makes images of another size.
    """
    size, crop = _pair(config.image_size), opened.preprocess.crop
    if crop != size:
        sides = " x ".join(map(str, size))
        raise ModelError(
            f"{KEY}: {opened.path}: preprocessor crops to {crop[0]} x {crop[1]}, but config.json says image_size {sides}; they must agree"
        )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class Tower:
    """A ViT without a text tower.

    Its hookpoints are `vision.blocks.<i>`, the residual stream after block i (hidden_states[i + 1] in transformers), and
    `vision.blocks.<i>.attn` and `vision.blocks.<i>.mlp`, which are what the block's two halves add to it. Its output has the width of the
    last hookpoint.
    """

    d_embed: int | None = None
    text_templates: tuple[str, ...] = ()
    logit_scale: float | None = None

    def __init__(self, opened: Opened, sites: Mapping[str, Site], tower: nn.Module, dtype: Dtype, device: str) -> None:
        self.name = opened.path
        self.preprocess = opened.preprocess
        self.preprocessing: Mapping[str, Any] = opened.preprocess.as_json()
        self.hookpoints: Mapping[str, Hookpoint] = {name: site.hookpoint for name, site in sites.items()}
        self.d_output = list(sites.values())[-1].hookpoint.d_model
        self._modules = {name: site.module for name, site in sites.items()}
        self._bottlenecks = {name for name, site in sites.items() if site.is_bottleneck}
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        cast_linears(tower, self._dtype)
        self._model = opened.model.requires_grad_(False).to(device)
        self._config, self._unused = opened.config, opened.unused

    @property
    def state(self) -> State:
        """Weights and config: see `Recognisable`."""
        return state_of(self._model, hub.settings(self._config), unused=self._unused)

    @torch.inference_mode()
    def capture(self, pixels: UInt8[Tensor, "batch height width 3"], hookpoints: Sequence[str]) -> Captured:
        """Return activations at the hookpoints, and the embedding if there is one: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown.
        """
        for name in hookpoints:
            check_hookpoint(self, name)
        x = normalise(pixels, self.preprocess, self._device)
        with self._autocast(), capturing({name: self._modules[name] for name in hookpoints}) as seen:
            embedding = self._run(x, hookpoints)
        return Captured({name: self._as_tokens(name, seen[name]) for name in hookpoints}, embedding)

    @torch.inference_mode()
    def splice(
        self, pixels: UInt8[Tensor, "batch height width 3"], hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> tuple[Float32[Tensor, "batch ..."], ...]:
        """Return the outputs `(batch, d_output)` float32, or the tokens that are read, for each replacement: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown, or the one to read is not a later one.
        """
        check_hookpoints(self, hookpoint, read)
        x = normalise(pixels, self.preprocess, self._device)
        with self._resuming(x, hookpoint):
            return tuple(self._splice(x, hookpoint, replacement, read) for replacement in replacements)

    def differentiate(
        self,
        pixels: UInt8[Tensor, "batch height width 3"],
        hookpoint: str,
        score: Score,
        replacement: Replacement | None = None,
        read: str | None = None,
    ) -> Differentiated:
        """Return the gradients of a score with respect to the tokens at a hookpoint: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown, the one to read is not a later one, or the output does not depend on the tokens.
        """
        check_hookpoints(self, hookpoint, read)

        def run(replacement: Replacement) -> Tensor:
            return self._splice(normalise(pixels, self.preprocess, self._device), hookpoint, replacement, read)

        return splicing.differentiate(run, score, replacement, f"{self.name}: hookpoint {hookpoint!r}")

    def embed_text(self, texts: Sequence[str]) -> Float32[Tensor, "texts d_embed"]:
        """Raise an error: the model has no text tower.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"{self.name}: has no text tower; set extract.namer to a model that has one")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32)

    def _run(self, x: Tensor, hookpoints: Sequence[str]) -> Tensor | None:
        """Run the model on normalised pixels `(batch, 3, H, W)` as far as the last hookpoint; return embeddings if there are any."""
        if hookpoints:
            last = max(hookpoints, key=list(self._modules).index)
            with ending_after(self._modules[last]):
                self._read(x)
        return None

    def _read(self, x: Tensor) -> Tensor:
        """Run the model on normalised pixels, and return its output `(batch, d_output)`: here the class token after the final norm."""
        return self._model(pixel_values=x).last_hidden_state[:, 0]

    @contextmanager
    def _resuming(self, x: Tensor, hookpoint: str) -> Iterator[None]:
        """Run normalised pixels up to the last bottleneck before or at a hookpoint; passes inside the block resume there."""
        names = list(self._modules)
        before = [self._modules[name] for name in names[: names.index(hookpoint) + 1] if name in self._bottlenecks]
        if not before:
            yield
            return
        with self._autocast(), capturing({"state": before[-1]}) as seen, ending_after(before[-1]):
            self._read(x)
        with skipping(before, seen["state"]):
            yield

    def _splice(self, x: Tensor, hookpoint: str, replacement: Replacement, read: str | None) -> Tensor:
        """Run the model on normalised pixels with the tokens at a hookpoint replaced; return its output, or tokens, in float32."""

        def replace(output: Tensor) -> Tensor:
            tokens = splicing.replace_tokens(self._as_tokens(hookpoint, output), replacement)
            # The layout in memory is kept, because sums may be rounded differently in another one.
            return torch.empty_like(output).copy_(self._as_output(hookpoint, tokens).reshape(output.shape))

        with self._autocast(), replacing(self._modules[hookpoint], replace):
            if read is None:
                return self._read(x).float()
            module = self._modules[read]
            with capturing({read: module}) as seen, ending_after(module):
                self._read(x)
            return self._as_tokens(read, seen[read]).float()

    def _as_tokens(self, hookpoint: str, output: Tensor) -> Tensor:
        """Return an output as tokens `(batch, tokens, d_model)`; one vector per image, `(batch, d_model)`, becomes one token."""
        return output if output.ndim == 3 else output[:, None]

    def _as_output(self, hookpoint: str, tokens: Tensor) -> Tensor:
        """Return tokens in the order in which the module outputs them, whatever the shape."""
        return tokens


class JointTower(Tower, ABC):
    """A ViT and a text tower with a joint space. Each family adds the hookpoint of the image embedding."""

    text_templates = ("a photo of a {}",)
    d_embed: int

    def __init__(self, opened: Opened, sites: Mapping[str, Site], tower: nn.Module, dtype: Dtype, device: str) -> None:
        super().__init__(opened, sites, tower, dtype, device)
        self._tokenizer = hub.load_tokenizer(opened.folder, opened.path, KEY)
        self.logit_scale = float(opened.model.logit_scale.exp())
        with torch.inference_mode(), hub.reading(opened.path, KEY, "the text tower's output"):
            self._embed_texts(["a", "a dog"])

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Float32[Tensor, "texts d_embed"]:
        """Return the embeddings of texts, `(texts, d_embed)` float32."""
        parts = [self._embed_texts(list(texts[start : start + TEXT_BATCH])) for start in range(0, len(texts), TEXT_BATCH)]
        return torch.cat([torch.empty(0, self.d_embed, device=self._device), *parts])

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor: ...

    def _run(self, x: Tensor, hookpoints: Sequence[str]) -> Tensor:
        return self._read(x).float()

    def _read(self, x: Tensor) -> Tensor:
        return self._model.get_image_features(pixel_values=x).pooler_output
