"""The vision tower of Qwen2.5-VL and Qwen2-VL models, read from their folders without loading the language model.

Shapes: b images, r rows and q columns of patches, m patches per side of a merge group, w merge groups per side of a window.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Shaped
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from ommatid.config import models
from ommatid.errors import ModelError
from ommatid.vlm import Dtype, Hookpoint, hub, partial_loading
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.processor import load_preprocess
from ommatid.vlm.tower import KEY, Opened, Site, Tower, block_sites

PROJECTION = "vision.projection"
PART = "visual"
TOWERS = {"qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel, "qwen2_vl": Qwen2VisionTransformerPretrainedModel}
MODEL_TYPES = tuple(TOWERS)
"""Values of `model_type` in config.json that belong to this family."""


class QwenVision(Tower):
    """A ViT without special tokens, which orders patches by 2 x 2 merge groups and, in Qwen2.5-VL, by attention windows.

    Images are resized to a square, so that all have the same grid; the model's own processor would keep the aspect ratio. Hookpoints are
    those of the blocks, on the full grid, and `vision.projection`: the merger's output for the language model, one token per merge group.
    Tokens are returned row by row from the top left, whatever the order inside the tower.
    """

    def __init__(self, path: str, image_size: int, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | partial_loading.SHARDS | hub.PREPROCESSOR)
        config = hub.load_config(folder, path, KEY)
        grid = check_config(config, image_size, path)
        self._vision = config.vision_config
        preprocess = load_tower_preprocess(folder, config, image_size, path)
        weights = partial_loading.read_weights(folder, PART, path, KEY)
        tower = partial_loading.load_pretrained(TOWERS[config.model_type], self._vision, weights, PART, path, KEY)
        sites = make_sites(tower, config, grid)
        opened = Opened(path, folder, config, _Encoder(tower, self._vision, grid), preprocess)
        super().__init__(opened, sites, tower, dtype, device)
        self._orders = {name: tower_order(name, point, self._vision).to(device) for name, point in self.hookpoints.items()}

    def _read(self, x: Float[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch d_output"]:
        tokens = self._model(pixel_values=x)
        return tokens.float().unflatten(0, (len(x), -1)).mean(1)

    def _as_tokens(self, hookpoint: str, output: Float[Tensor, "tokens_of_all_images d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        order = self._orders[hookpoint]
        return output.unflatten(0, (-1, len(order)))[:, order.argsort()]

    def _as_output(self, hookpoint: str, tokens: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens d_model"]:
        return tokens[:, self._orders[hookpoint]]


class _Encoder(nn.Module):
    """The tower with images `(b, 3, size, size)` as its input."""

    def __init__(self, tower: Any, vision: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tower, self._grid = tower, grid
        # Keeps the residual stream in float32: autocast makes patches bfloat16, and no float32 position embedding is added afterwards.
        tower.patch_embed.register_forward_hook(lambda _module, _inputs, patches: patches.float())
        self._sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "tokens_of_all_images d_output"]:
        grids = torch.tensor([[1, *self._grid]] * len(pixel_values), device=pixel_values.device)
        return self.tower(flatten_patches(pixel_values, *self._sizes), grids).pooler_output


def _square_pixels(vision: Any, image_size: int, processor: Any, picture: Image.Image) -> Float[np.ndarray, "3 height width"]:
    """Run the processor on a picture resized to a square, and reassemble its patches to `(3, image_size, image_size)`."""
    square = picture.resize((image_size, image_size), processor.resample)
    patches = processor(square, do_resize=False, return_tensors="pt")["pixel_values"]
    sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    pixels = torch.empty(3, image_size, image_size)
    places = flatten_patches(torch.arange(pixels.numel()).reshape(1, *pixels.shape), *sizes)
    return pixels.put_(places, patches.reshape(places.shape)).numpy()


def flatten_patches(
    images: Shaped[Tensor, "batch channels height width"], patch_size: int, merge_size: int, temporal_size: int
) -> Shaped[Tensor, "patches values"]:
    """Cut images into patches in the layout that the processor of Qwen2-VL makes for the tower.

    Merge groups are ordered row by row, and so are the patches within each. An image is treated as a video of equal frames.

    Args:
        images: Images, `(b, 3, H, W)`.
        patch_size: Pixels per side of a patch.
        merge_size: Patches per side of a merge group.
        temporal_size: Number of frames.

    Returns:
        The patches, `(b * r * q, 3 * temporal_size * patch_size^2)`.
    """
    b, channels, height, width = images.shape
    groups = (height // patch_size // merge_size, width // patch_size // merge_size)
    x = images.reshape(b, channels, groups[0], merge_size, patch_size, groups[1], merge_size, patch_size)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # Image, row and column of the group, row and column in the group, channel, y, x.
    x = x.unsqueeze(6).expand(*x.shape[:6], temporal_size, patch_size, patch_size)
    return x.reshape(b * height * width // patch_size**2, -1)


def patch_order(grid: tuple[int, int], m: int, w: int) -> list[int]:
    """Return the order of patches in the tower: by window, by merge group in a window and by patch in a group, each row by row.

    Windows at the right and at the bottom may be smaller.

    Args:
        grid: Rows and columns of the patches.
        m: Patches per side of a merge group; 1 gives the order of the merge groups themselves, for their grid.
        w: Merge groups per side of a window.

    Returns:
        The indices of the patches, row · columns + column, in the order of the tower.
    """

    def place(patch: int) -> tuple[int, ...]:
        row, col = divmod(patch, grid[1])
        return row // (m * w), col // (m * w), row // m, col // m, row, col

    return sorted(range(grid[0] * grid[1]), key=place)


def tower_order(name: str, hookpoint: Hookpoint, vision: Any) -> Int[Tensor, " tokens"]:
    """Return the order of tokens in the output of a hookpoint: for each of its positions, the token's number row by row."""
    assert hookpoint.grid is not None, name
    return torch.tensor(patch_order(hookpoint.grid, 1 if name == PROJECTION else vision.spatial_merge_size, _window(vision)))


def load_tower_preprocess(folder: Path, config: Any, image_size: int, path: str) -> Preprocess:
    """Read the preprocessing of images, which are resized to squares of `image_size` pixels per side.

    Raises:
        ModelError: As for `load_preprocess`.
    """
    square = {"size": {"height": image_size, "width": image_size}}
    return load_preprocess(folder, path, KEY, square, partial(_square_pixels, config.vision_config, image_size))


def check_config(config: Any, image_size: int, path: str) -> tuple[int, int]:
    """Return the rows and columns of the patches of a square image.

    Raises:
        ModelError: The config is of another model, or the image size is not a multiple of its merge groups.
    """
    if config.model_type not in TOWERS:
        raise ModelError(f"{KEY}: {path}: is a {config.model_type} model; kind qwen takes model_type {' or '.join(TOWERS)}")
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    if image_size % unit:
        raise ModelError(
            f"extract.model.image_size: {image_size} is not a multiple of {unit}, which is the {vision.spatial_merge_size} patches of "
            f"{vision.patch_size} pixels that the model merges; set it to a multiple, such as {max(unit, round(image_size / unit) * unit)}"
        )
    return (image_size // vision.patch_size,) * 2


def _window(vision: Any) -> int:
    """Return the merge groups per side of an attention window. Qwen2-VL has no windows, and 1 gives its order of patches."""
    return vision.window_size // vision.spatial_merge_size // vision.patch_size if hasattr(vision, "window_size") else 1


def make_sites(tower: Any, config: Any, grid: tuple[int, int]) -> dict[str, Site]:
    """Name the hookpoints of a tower, whose last one is the merger."""
    vision = config.vision_config
    # In Qwen2-VL the width of the blocks is embed_dim, and hidden_size is the width of the language model.
    widths = (vision.hidden_size, vision.out_hidden_size) if config.model_type == "qwen2_5_vl" else (vision.embed_dim, vision.hidden_size)
    sites = block_sites(((block.attn, block.mlp, block) for block in tower.blocks), Hookpoint(d_model=widths[0], special=(), grid=grid))
    merged = (grid[0] // vision.spatial_merge_size, grid[1] // vision.spatial_merge_size)
    return sites | {PROJECTION: Site(Hookpoint(d_model=widths[1], special=(), grid=merged), tower.merger)}


def make(params: models.QwenModel, dtype: Dtype, device: str) -> QwenVision:
    """Load the model, as `load_model` describes."""
    return QwenVision(params.path, params.image_size, dtype, device)
