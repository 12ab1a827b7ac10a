"""Tiny LLaVA and Qwen models with random weights, saved as a hub would: the full model, of which Ommatid reads the vision tower."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_towers import randomise
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SQUARE = {"height": 48, "width": 48}
GRIDS = [[96, 48], [48, 96]]


def save_llava(folder: Path, next_: bool = False, siglip: bool = False, shards: bool = False, **changes: Any) -> Path:
    """A LLaVA whose tower has 3 blocks, 32 wide, on 48 x 48 images in 16-pixel patches: a 3 x 3 grid; the language model is 40 wide."""
    torch.manual_seed(0)
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**SMALL, image_size=48, patch_size=16)
    text_values: dict[str, Any] = SMALL | {"hidden_size": 40, "vocab_size": 99, "num_key_value_heads": 4}
    text = LlamaConfig(**text_values)
    if next_:
        config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=GRIDS, **changes)
        processor = LlavaNextImageProcessorPil(size={"shortest_edge": 48}, crop_size=SQUARE, image_grid_pinpoints=GRIDS)
        model = LlavaNextForConditionalGeneration(config)
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=SQUARE)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **changes))
    randomise(model)
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    processor.save_pretrained(folder)
    return folder


def save_qwen(folder: Path, windows: bool = True) -> Path:
    """A Qwen2.5-VL, or without windows a Qwen2-VL: 4 blocks, 32 wide, patches of 4 pixels, windows of 3 x 3 merge groups."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 1e4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 99, "rope_parameters": rope}
    text = SMALL | ids | {"hidden_size": 40, "num_key_value_heads": 2}
    if windows:
        vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 40, "window_size": 24, "fullatt_block_indexes": [1, 3]}
        config = Qwen2_5_VLConfig(vision_config=vision | {"depth": 4, "num_heads": 4, "patch_size": 4}, text_config=text)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {"embed_dim": 32, "hidden_size": 40, "mlp_ratio": 2, "depth": 4, "num_heads": 4, "patch_size": 4}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text))
    randomise(model)
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4).save_pretrained(folder)
    return folder


def squares(pixels: torch.Tensor) -> list[Image.Image]:
    """Preprocessed pixels as images, for transformers' processors."""
    return [Image.fromarray(square.numpy()) for square in pixels]


def plant(size: int, patch: int, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images (n, size, size, 3), and the same with one bright patch each, at the given row and column of the grid."""
    dark = torch.full((len(places), size, size, 3), 60, dtype=torch.uint8)
    bright = dark.clone()
    for image, (row, col) in zip(bright, places, strict=True):
        image[patch * row : patch * (row + 1), patch * col : patch * (col + 1)] = 250
    return dark, bright
