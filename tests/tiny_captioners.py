"""Tiny captioning models with random weights, saved as a hub would: no network."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTMAEConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

_LIST = "[PAD] [UNK] [CLS] [SEP] [MASK] a horse dog bird car red blue green on in grass sky road water"
WORDS = _LIST.split()
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SMALL | {"image_size": 32, "patch_size": 16}
TEXT = SMALL | {"vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def save_tiny_captioner(folder: Path, family: str) -> Any:
    """One of `blip`, `git`, `vision-encoder-decoder`, `masked` on 32 x 32 images, with twenty words; gives the model."""
    torch.manual_seed(0)
    match family:
        case "blip":
            model: Any = BlipForConditionalGeneration(BlipConfig(text_config=TEXT | {"sep_token_id": 3}, vision_config=VISION))
        case "git":
            model = GitForCausalLM(GitConfig(vision_config=VISION, **TEXT))
        case _:  # with an encoder that masks patches at random where it is so called
            encoder = ViTMAEConfig(**VISION | {"patch_size": 4}) if family == "masked" else ViTConfig(**VISION)
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
