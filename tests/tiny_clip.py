"""A tiny CLIP with random weights, saved as a hub would: no network."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_tiny_clip(folder: Path) -> None:
    """A CLIP of 3 blocks, 32 wide, on 48 x 48 images in 16-pixel patches: a 3 x 3 grid."""
    n_tokens = _save_tokenizer(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = small | {"vocab_size": n_tokens, "max_position_embeddings": 16, "bos_token_id": n_tokens - 2, "eos_token_id": n_tokens - 1}
    vision = small | {"image_size": 48, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)


def _save_tokenizer(folder: Path) -> int:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    return len(tokens)
