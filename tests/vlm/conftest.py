"""Tiny models with random weights, saved as a hub would: no network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches gain nothing from threads, and where others hold the cores, threads that wait for one another cost 40 times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _save_tokenizer(folder: Path) -> int:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    return len(tokens)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 3 blocks, 32 wide, on 48 x 48 images in 16-pixel patches: a 3 x 3 grid."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    n_tokens = _save_tokenizer(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = small | {"vocab_size": n_tokens, "max_position_embeddings": 16, "bos_token_id": n_tokens - 2, "eos_token_id": n_tokens - 1}
    vision = small | {"image_size": 48, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder
