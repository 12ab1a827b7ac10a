"""Tower: what the transformers ViTs share: opening a folder, naming hookpoints, and one forward pass that captures several of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ommatid.errors import ModelError
from ommatid.vlm import Captured, Dtype, Hookpoint, Replacement, check_hookpoint, hub
from ommatid.vlm.hooks import capturing, ending_after, replacing
from ommatid.vlm.precision import halve_linears, normalise, resolve_dtype
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.processor import load_preprocess

KEY = "extract.model.path"
IMAGE_NEEDS = hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR
TEXT_BATCH = 64


@dataclass(frozen=True)
class Opened:
    """A model's folder, read."""

    path: str
    """What the user wrote."""
    folder: Path
    """Where the files lie."""
    config: Any
    """transformers' config."""
    model: Any
    """transformers' model, in float32 on the CPU."""
    preprocess: Preprocess
    """What its images go through."""


def open_model(path: str, kind: str, classes: Mapping[str, Any], needs: hub.Needs = IMAGE_NEEDS) -> Opened:
    """Read the folder of a model of one of the types (`model_type` in its config.json) that `classes` maps to transformers' classes.

    Raises:
        ModelError: not found, incomplete, damaged, or of another type.
    """
    folder = hub.locate(path, KEY, needs)
    config = hub.load_config(folder, path, KEY)
    if config.model_type not in classes:
        raise ModelError(f"{KEY}: {path}: is a {config.model_type} model; kind {kind} takes model_type {' or '.join(classes)}")
    preprocess = load_preprocess(folder, path, KEY)
    # The pooler of a ViT runs after the last hookpoint, and most folders come without one.
    model, _ = hub.load_weights(classes[config.model_type], folder, path, KEY, optional="pooler.")
    return Opened(path, folder, config, model, preprocess)


@dataclass(frozen=True)
class Site:
    """A hookpoint and the module that puts it out."""

    hookpoint: Hookpoint
    module: nn.Module
    is_all: bool = True
    """Whether what it puts out is all that the pass goes on from, and nothing goes by beside it."""


def block_sites(blocks: Iterable[tuple[nn.Module, nn.Module, nn.Module]], hookpoint: Hookpoint) -> dict[str, Site]:
    """The three hookpoints of each block, by name.

    Args:
        blocks: For each what puts out attention's addition to the residual stream, the MLP's, and the stream after both.
        hookpoint: The same for all.
    """
    names = (".attn", ".mlp", "")
    return {
        f"vision.blocks.{i}{name}": Site(hookpoint, module, is_all=not name)
        for i, block in enumerate(blocks)
        for name, module in zip(names, block, strict=True)
    }


def patch_grid(config: Any, crop: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of an image of `crop`; a rest at the right or the bottom is in none."""
    patch = _pair(config.patch_size)
    return crop[0] // patch[0], crop[1] // patch[1]


def check_size(config: Any, opened: Opened) -> None:
    """For models that take images of one size.

    Raises:
        ModelError: preprocessing makes another.
    """
    size, crop = _pair(config.image_size), opened.preprocess.crop
    if crop != size:
        said = " x ".join(map(str, size))
        raise ModelError(
            f"{KEY}: {opened.path}: preprocessor crops to {crop[0]} x {crop[1]}, but config.json says image_size {said}; they must agree"
        )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class Tower:
    """A ViT without a text tower.

    Hookpoints: `vision.blocks.<i>`, the residual stream after block i (transformers' hidden_states[i + 1]), and `.attn` and `.mlp`,
    what the block's two halves add to it.
    """

    d_embed: int | None = None
    text_templates: tuple[str, ...] = ()
    logit_scale: float | None = None

    def __init__(self, opened: Opened, sites: Mapping[str, Site], tower: nn.Module, dtype: Dtype, device: str) -> None:
        self.name = opened.path
        self.preprocess = opened.preprocess
        self.preprocessing: Mapping[str, Any] = opened.preprocess.as_json()
        self.hookpoints: Mapping[str, Hookpoint] = {name: site.hookpoint for name, site in sites.items()}
        self._modules = {name: site.module for name, site in sites.items()}
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        halve_linears(tower, self._dtype)
        self._model = opened.model.to(device)

    @torch.inference_mode()
    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        """Activations at the hookpoints, and the embedding where there is one, of uint8 pixels (batch, H, W, 3).

        Raises:
            ModelError: a hookpoint is unknown.
        """
        for name in hookpoints:
            check_hookpoint(self, name)
        x = normalise(pixels, self.preprocess, self._device)
        with self._autocast(), capturing({name: self._modules[name] for name in hookpoints}) as seen:
            embedding = self._run(x, hookpoints)
        return Captured({name: _as_tokens(seen[name]) for name in hookpoints}, embedding)

    def splice(self, pixels: Tensor, hookpoint: str, replacements: Sequence[Replacement]) -> tuple[Tensor, ...]:
        """There is no text tower, and so no embedding to come to.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.name}: has no text tower, and so no joint space in which to see what other tokens at {hookpoint} change")

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """There is no text tower.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.name}: has no text tower; set extract.namer to a model that has one")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32)

    def _run(self, x: Tensor, hookpoints: Sequence[str]) -> Tensor | None:
        """Run the model on (batch, 3, H, W), no further than to the last of the hookpoints."""
        if hookpoints:
            last = max(hookpoints, key=list(self._modules).index)
            with ending_after(self._modules[last]):
                self._model(pixel_values=x)
        return None


class JointTower(Tower, ABC):
    """A ViT with a text tower in the same space; the family adds the hookpoint of the image embedding."""

    text_templates = ("a photo of a {}",)
    d_embed: int

    def __init__(self, opened: Opened, sites: Mapping[str, Site], tower: nn.Module, dtype: Dtype, device: str) -> None:
        super().__init__(opened, sites, tower, dtype, device)
        self._tokenizer = hub.load_tokenizer(opened.folder, opened.path, KEY)
        self._is_all = {name: site.is_all for name, site in sites.items()}
        self.logit_scale = float(opened.model.logit_scale.exp())
        with torch.inference_mode(), hub.reading(opened.path, KEY, "what the text tower makes of texts"):
            self._embed_texts(["a", "a dog"])

    @torch.inference_mode()
    def splice(self, pixels: Tensor, hookpoint: str, replacements: Sequence[Replacement]) -> tuple[Tensor, ...]:
        """Image embeddings, one (batch, d_embed) float32 for each replacement, of uint8 pixels (batch, H, W, 3); see `VisionModel`.

        One forward pass: up to the hookpoint once for all, where nothing goes by beside it.

        Raises:
            ModelError: the hookpoint is unknown.
        """
        check_hookpoint(self, hookpoint)
        n, is_all = len(replacements), self._is_all[hookpoint]

        def replace(output: Tensor) -> Tensor:
            parts = [output] * n if is_all else output.chunk(n)
            return torch.cat([_other_tokens(part, replacement) for part, replacement in zip(parts, replacements, strict=True)])

        x = normalise(pixels, self.preprocess, self._device)
        with self._autocast(), replacing(self._modules[hookpoint], replace):
            return self._run(x if is_all else torch.cat([x] * n), ()).chunk(n)

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings (texts, d_embed), float32."""
        parts = [self._embed_texts(list(texts[start : start + TEXT_BATCH])) for start in range(0, len(texts), TEXT_BATCH)]
        return torch.cat([torch.empty(0, self.d_embed, device=self._device), *parts])

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor: ...

    def _run(self, x: Tensor, hookpoints: Sequence[str]) -> Tensor:
        return self._model.get_image_features(pixel_values=x).pooler_output.float()


def _as_tokens(output: Tensor) -> Tensor:
    """One vector an image is one token: (batch, d_model) or (batch, tokens, d_model) to the latter."""
    return output if output.ndim == 3 else output[:, None]


def _other_tokens(output: Tensor, replacement: Replacement) -> Tensor:
    tokens = replacement(_as_tokens(output))
    assert tokens.shape == _as_tokens(output).shape, f"tokens {tuple(tokens.shape)} cannot take the place of {tuple(output.shape)}"
    return tokens.reshape(output.shape).to(output)
