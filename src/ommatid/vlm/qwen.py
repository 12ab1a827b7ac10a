"""QwenVision: the vision tower inside the folder of a Qwen2.5-VL or Qwen2-VL; the language model is never loaded.

Shapes: b images, r rows and q columns of patches, m patches a side of a merge group, w groups a side of a window.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from ommatid.config import models
from ommatid.errors import ModelError
from ommatid.vlm import Captured, Dtype, Hookpoint, hub, parts
from ommatid.vlm.processor import load_preprocess
from ommatid.vlm.tower import KEY, Opened, Site, Tower, block_sites

PROJECTION = "vision.projection"
PART = "visual"
TOWERS = {"qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel, "qwen2_vl": Qwen2VisionTransformerPretrainedModel}
MODEL_TYPES = tuple(TOWERS)
"""Values of model_type in config.json that are of this family."""


class QwenVision(Tower):
    """A ViT without special tokens, whose patches run in 2 x 2 merge groups and, in Qwen2.5-VL, in attention windows.

    Images are resized to one square, so that the grid is the same for all; the model's own processor would keep the aspect ratio.
    Hookpoints: those of the blocks, over the full grid; and `vision.projection`, what the merger hands to the language model, one token
    a merge group. All come row by row from the top left, whatever order the tower runs them in.
    """

    def __init__(self, path: str, image_size: int, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | parts.SHARDS | hub.PREPROCESSOR)
        config = hub.load_config(folder, path, KEY)
        if config.model_type not in TOWERS:
            raise ModelError(f"{KEY}: {path}: is a {config.model_type} model; kind qwen takes model_type {' or '.join(TOWERS)}")
        self._vision = config.vision_config
        grid = _grid(image_size, self._vision)
        square = {"size": {"height": image_size, "width": image_size}}
        preprocess = load_preprocess(folder, path, KEY, square, partial(_square_pixels, self._vision, image_size))
        weights = parts.read_weights(folder, PART, path, KEY)
        tower = parts.load_pretrained(TOWERS[config.model_type], self._vision, weights, PART, path, KEY)
        sites = _sites(tower, self._vision, config.model_type, grid)
        opened = Opened(path, folder, config, _Encoder(tower, self._vision, grid), preprocess)
        super().__init__(opened, sites, tower, dtype, device)
        self._places = {name: self._find_places(name) for name in sites}

    @torch.inference_mode()
    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        """Activations at the hookpoints of uint8 pixels (b, size, size, 3); there is no joint space.

        Raises:
            ModelError: a hookpoint is unknown.
        """
        rows = super().capture(pixels, hookpoints).tokens  # images one after another, each in the tower's order
        return Captured({name: x.reshape(len(pixels), -1, x.shape[-1])[:, self._places[name]] for name, x in rows.items()}, None)

    def _find_places(self, hookpoint: str) -> Tensor:
        """For each token, row by row, its position in the output of the hookpoint."""
        grid, m = self.hookpoints[hookpoint].grid, 1 if hookpoint == PROJECTION else self._vision.spatial_merge_size
        assert grid is not None
        return torch.tensor(patch_order(grid, m, _window(self._vision)), device=self._device).argsort()


class _Encoder(nn.Module):
    """The tower for images (b, 3, size, size), all of one grid."""

    def __init__(self, tower: Any, vision: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tower, self._grid = tower, grid
        # Autocast makes patches bfloat16, and no position is added that would make them float32 again, as the residual stream is to be.
        tower.patch_embed.register_forward_hook(lambda _module, _inputs, patches: patches.float())
        self._sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    def forward(self, pixel_values: Tensor) -> None:
        grids = torch.tensor([[1, *self._grid]] * len(pixel_values), device=pixel_values.device)
        self.tower(flatten_patches(pixel_values, *self._sizes), grids)


def _square_pixels(vision: Any, image_size: int, processor: Any, picture: Image.Image) -> np.ndarray:
    """What the processor makes of the picture as a square, put back from its patches: (3, image_size, image_size)."""
    square = picture.resize((image_size, image_size), processor.resample)
    patches = processor(square, do_resize=False, return_tensors="pt")["pixel_values"]
    sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    pixels = torch.empty(3, image_size, image_size)
    places = flatten_patches(torch.arange(pixels.numel()).reshape(1, *pixels.shape), *sizes)
    return pixels.put_(places, patches.reshape(places.shape)).numpy()


def flatten_patches(images: Tensor, patch_size: int, merge_size: int, temporal_size: int) -> Tensor:
    """From (b, 3, H, W) to (b * r * q, 3 * temporal_size * patch_size^2), as the processor of Qwen2-VL hands patches to the tower.

    Merge groups row by row, patches row by row in each; an image is a film of `temporal_size` equal frames.
    """
    b, channels, height, width = images.shape
    groups = (height // patch_size // merge_size, width // patch_size // merge_size)
    x = images.reshape(b, channels, groups[0], merge_size, patch_size, groups[1], merge_size, patch_size)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # b, group row, group column, row in it, column in it, channel, y, x
    x = x.unsqueeze(6).expand(*x.shape[:6], temporal_size, patch_size, patch_size)
    return x.reshape(b * height * width // patch_size**2, -1)


def patch_order(grid: tuple[int, int], m: int, w: int) -> list[int]:
    """The patches (index row * columns + column) in the order in which the tower runs them; with m 1, the merge groups.

    Windows row by row, merge groups row by row in a window, patches row by row in a group; windows at the right and the bottom may
    be smaller.
    """

    def place(patch: int) -> tuple[int, ...]:
        row, col = divmod(patch, grid[1])
        return row // (m * w), col // (m * w), row // m, col // m, row, col

    return sorted(range(grid[0] * grid[1]), key=place)


def _grid(image_size: int, vision: Any) -> tuple[int, int]:
    unit = vision.patch_size * vision.spatial_merge_size
    if image_size % unit:
        raise ModelError(
            f"extract.model.image_size: {image_size} is no multiple of {unit}, the {vision.spatial_merge_size} patches of "
            f"{vision.patch_size} pixels that the model merges; such as {max(unit, round(image_size / unit) * unit)}"
        )
    return (image_size // vision.patch_size,) * 2


def _window(vision: Any) -> int:
    """Merge groups a side of an attention window; Qwen2-VL has none, which is one group a window: the order of its patches."""
    return vision.window_size // vision.spatial_merge_size // vision.patch_size if hasattr(vision, "window_size") else 1


def _sites(tower: Any, vision: Any, model_type: str, grid: tuple[int, int]) -> dict[str, Site]:
    # Qwen2-VL calls the width of its blocks embed_dim, and that of the language model hidden_size
    widths = (vision.hidden_size, vision.out_hidden_size) if model_type == "qwen2_5_vl" else (vision.embed_dim, vision.hidden_size)
    sites = block_sites(((block.attn, block.mlp, block) for block in tower.blocks), Hookpoint(d_model=widths[0], special=(), grid=grid))
    merged = (grid[0] // vision.spatial_merge_size, grid[1] // vision.spatial_merge_size)
    return sites | {PROJECTION: Site(Hookpoint(d_model=widths[1], special=(), grid=merged), tower.merger)}


def make(params: models.QwenModel, dtype: Dtype, device: str) -> QwenVision:
    """See `load_model`."""
    return QwenVision(params.path, params.image_size, dtype, device)
