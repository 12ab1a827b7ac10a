"""Tiny models with random weights, saved as on a hub; no network is needed."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
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
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTMAEConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise all weights, because many are zero or one before training, which makes tokens equal and scales ineffective."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model.eval()


def save_weights(folder: Path, model: nn.Module, processor: Any) -> Path:
    """Save a model and its processor in a folder like those on a hub."""
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    processor.save_pretrained(folder)
    return folder


SQUARE = {"height": 48, "width": 48}
GRIDS = [[96, 48], [48, 96]]


def save_llava(folder: Path, next_: bool = False, siglip: bool = False, shards: bool = False, **changes: Any) -> Path:
    """Save a LLaVA with a tower of 3 blocks, width 32, 48 x 48 images and 16-pixel patches, and a language model of width 40."""
    torch.manual_seed(0)
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**SIZES, image_size=48, patch_size=16)
    text_values: dict[str, Any] = SIZES | {"hidden_size": 40, "vocab_size": 99, "num_key_value_heads": 4}
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
    """Save a Qwen2.5-VL, or a Qwen2-VL if it has no windows: 4 blocks, width 32, 4-pixel patches, windows of 3 x 3 merge groups."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 1e4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 99, "rope_parameters": rope}
    text = SIZES | ids | {"hidden_size": 40, "num_key_value_heads": 2}
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
    """Return preprocessed pixels as images, for transformers' processors."""
    return [Image.fromarray(square.numpy()) for square in pixels]


def plant(size: int, patch: int, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make grey images, (n, size, size, 3), and the same images with one bright patch each at a row and column of the grid."""
    dark = torch.full((len(places), size, size, 3), 60, dtype=torch.uint8)
    bright = dark.clone()
    for image, (row, col) in zip(bright, places, strict=True):
        image[patch * row : patch * (row + 1), patch * col : patch * (col + 1)] = 250
    return dark, bright


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_tiny_clip(folder: Path) -> None:
    """Save a CLIP with 3 blocks, width 32, 48 x 48 images and 16-pixel patches, a 3 x 3 grid."""
    n_tokens = _save_tokenizer(folder)
    text = SIZES | {"vocab_size": n_tokens, "max_position_embeddings": 16, "bos_token_id": n_tokens - 2, "eos_token_id": n_tokens - 1}
    vision = SIZES | {"image_size": 48, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)


def _save_tokenizer(folder: Path) -> int:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    return len(tokens)


_LIST = "[PAD] [UNK] [CLS] [SEP] [MASK] a horse dog bird car red blue green on in grass sky road water"
WORDS = _LIST.split()
CAPTIONER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CAPTIONER_VISION: dict[str, Any] = CAPTIONER | {"image_size": 32, "patch_size": 16}
CAPTIONER_TEXT: dict[str, Any] = CAPTIONER | {
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def save_tiny_captioner(folder: Path, family: str) -> Any:
    """Save a captioner, `blip`, `git`, `vision-encoder-decoder` or `masked`, on 32 x 32 images with twenty words, and return it."""
    torch.manual_seed(0)
    match family:
        case "blip":
            model: Any = BlipForConditionalGeneration(
                BlipConfig(text_config=CAPTIONER_TEXT | {"sep_token_id": 3}, vision_config=CAPTIONER_VISION)
            )
        case "git":
            model = GitForCausalLM(GitConfig(vision_config=CAPTIONER_VISION, **CAPTIONER_TEXT))
        case _:  # with an encoder that masks patches at random where it is so called
            masked: dict[str, Any] = CAPTIONER_VISION | {"patch_size": 4}
            encoder = ViTMAEConfig(**masked) if family == "masked" else ViTConfig(**CAPTIONER_VISION)
            decoder = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=len(WORDS), bos_token_id=2, eos_token_id=3)
            config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
            model = VisionEncoderDecoderModel(config=config)
            model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 0
    torch.manual_seed(1)
    for weights in model.parameters():
        if weights.ndim > 1:  # larger than usual, so that captions depend on the image
            torch.nn.init.normal_(weights, std=0.5)
    model.eval().save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return model
