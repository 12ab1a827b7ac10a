"""Models of transformers with weights set by hand: they say the word whose direction their vision tower holds, and their SAE is known.

The tower reads twelve textures, one for each word, and writes each along its own unit direction; the blocks add nothing. The projector
turns what exceeds a threshold along a direction into the coordinate of its word, the only attention of the language model averages over
all tokens, or over the words of WORDS in the prompt if there are any, and the head says the word of the largest coordinate, or "nothing"
if none is large. A Qwen2.5-VL has the same language model, a tower that writes the same directions, and a merger in place of the projector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ommatid.sae.model import SAE, SAEConfig

_LIST = "stripe dot wave grid ring star leaf fur brick cloud sand glass"
WORDS: list[str] = [*_LIST.split()]
"""Words that the model can say of an image, one for each texture."""
NOTHING = "nothing"
"""The word that the model says if it sees no texture."""
HOOKPOINT = "vision.blocks.0"
"""Hookpoint whose output the projector reads: the second to last hidden state, as in LLaVA 1.5."""
SIDE, PATCH, D, N = 16, 4, 16, len(WORDS)
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
"""Height and width of the larger versions of an image that a LLaVA-NeXT cuts into tiles."""
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "<|image_pad|>"]
QUESTION = "User : What is shown in this image ? Use exactly one word ! Answer :"
VOCABULARY: list[str] = [*SPECIAL, *WORDS, NOTHING, *dict.fromkeys(QUESTION.split())]
THRESHOLD = 0.6
"""Value along a word's direction below which the projector ignores it."""
SAID, TEXT = N, N + 1
"""Coordinates of the language model that mark a token as a word of an answer, or as any other text."""


def _id(word: str) -> int:
    return VOCABULARY.index(word)


def save_words(folder: Path, image_token: str = "<image>") -> None:
    """Save a tokenizer of whole words and a chat template that puts the image first."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    named = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[4:], **named).save_pretrained(folder)
    loop = "{% for message in messages %}{% for part in message['content'] %}"
    part = f"{{% if part['type'] == 'image' %}}{image_token} {{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    ends = "{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer :{% endif %}"
    (folder / "chat_template.jinja").write_text(f"User : {loop}{part}{ends}")


def directions() -> Tensor:
    """Return orthonormal directions of mean zero, (D - 1, D): those of the words, one that every token has, and unused ones."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < D:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return hadamard[1:] / D**0.5


def textures() -> Tensor:
    """Return orthonormal textures of mean zero in one patch, (N, 3, PATCH, PATCH), one for each word."""
    noise = torch.randn(N, 3 * PATCH**2, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr((noise - noise.mean(1, keepdim=True)).T)[0].T
    return basis.reshape(N, 3, PATCH, PATCH).float()


def save_tiny_llava(folder: Path, is_next: bool = False) -> Path:
    """Save the model with its processor, tokenizer and chat template; it has 6,616 parameters. A LLaVA-NeXT sees tiles, too."""
    vision = CLIPVisionConfig(
        hidden_size=D, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1, image_size=SIDE, patch_size=PATCH, projection_dim=D
    )
    text = LlamaConfig(
        hidden_size=D,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(VOCABULARY),
        bos_token_id=_id("<s>"),
        eos_token_id=_id("</s>"),
        pad_token_id=_id("<pad>"),
    )
    values: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_index": _id("<image>")}
    if is_next:
        config = LlavaNextConfig(**values, projector_hidden_act="relu", image_grid_pinpoints=GRIDS)
        model: Any = LlavaNextForConditionalGeneration(config)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**values, projector_hidden_act="relu"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            nn.init.ones_(weight) if "norm" in name and name.endswith("weight") else nn.init.zeros_(weight)
        _set_tower(model.model.vision_tower)
        _set_projector(model.model.multi_modal_projector)
        _set_language(model)
    model.eval().save_pretrained(folder)
    half = [0.5] * 3
    sizes: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if is_next:
        processor = LlavaNextImageProcessorPil(**sizes, image_mean=half, image_std=half, image_grid_pinpoints=GRIDS)
    else:
        processor = CLIPImageProcessorPil(**sizes, image_mean=half, image_std=half)
    processor.save_pretrained(folder)
    save_words(folder)
    return folder


QWEN_SIDE = 2 * SIDE
"""Height and width of the images of the Qwen2.5-VL, whose tokens are groups of four patches."""
SHARP = 20.0
"""Slope of the merger before its GELU, so large that this is a ReLU."""


def save_tiny_qwen(folder: Path) -> Path:
    """Save a Qwen2.5-VL with its processor, tokenizer and chat template."""
    vision = {"depth": 1, "num_heads": 1, "hidden_size": D, "intermediate_size": 4, "out_hidden_size": D, "patch_size": PATCH}
    vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [0]}
    text: dict[str, Any] = {"hidden_size": D, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "vocab_size": len(VOCABULARY), "tie_word_embeddings": False}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    text |= {f"{name}_token_id": _id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=_id("<|image_pad|>"), tie_word_embeddings=False)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            nn.init.ones_(weight) if ("norm" in name or "ln_q" in name) and name.endswith("weight") else nn.init.zeros_(weight)
        tower = model.model.visual
        tower.patch_embed.proj.weight.copy_(torch.einsum("kd,kcyx->dcyx", directions()[:N], textures())[:, :, None] / 2)  # of two frames
        tower.blocks[0].mlp.down_proj.bias.copy_(2 * directions()[N])
        first, _, second = tower.merger.mlp
        for patch in range(4):
            first.weight[patch * D : patch * D + N, patch * D : (patch + 1) * D] = SHARP * directions()[:N]
            second.weight[range(N), range(patch * D, patch * D + N)] = 1 / (4 * SHARP)
        first.bias[[patch * D + k for patch in range(4) for k in range(N)]] = -SHARP * THRESHOLD
        _set_language(model)
    model.eval().save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=PATCH, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    save_words(folder, "<|image_pad|>")
    return folder


def _set_tower(tower: Any) -> None:
    words, base = directions()[:N], directions()[N]
    # Textures have a norm of 2 in the pixels that the tower receives, and the direction of all tokens has one of 2.
    tower.embeddings.patch_embedding.weight.copy_(torch.einsum("kd,kcyx->dcyx", words, textures()))
    tower.embeddings.position_embedding.weight.copy_(2 * base.expand(1 + (SIDE // PATCH) ** 2, D))


def _set_projector(projector: Any) -> None:
    projector.linear_1.weight[:N] = directions()[:N]
    projector.linear_1.bias[:N] = -THRESHOLD
    projector.linear_2.weight.copy_(torch.eye(D))


def _set_language(model: Any) -> None:
    language = model.model.language_model
    words = [_id(word) for word in WORDS]
    embeddings, head = language.embed_tokens.weight, model.lm_head.weight
    embeddings[:, TEXT] = 1.0
    embeddings[words, TEXT], embeddings[words, SAID], embeddings[words, range(N)] = 0.0, 10.0, 5.0
    embeddings[_id(NOTHING)] = embeddings[words[0]] * (torch.arange(D) == SAID)
    attention = language.layers[0].self_attn
    seen = torch.diag((torch.arange(D) < N).float())
    # This pair of coordinates turns least with the distance of two tokens.
    attention.q_proj.weight[D // 2 - 1, TEXT] = attention.k_proj.weight[D // 2 - 1, SAID] = 1.5
    attention.v_proj.weight.copy_(seen)
    attention.o_proj.weight.copy_(4 * seen)
    head[words, range(N)] = 1.0
    head[_id(NOTHING), TEXT] = 0.5
    head[_id("</s>"), SAID] = 10.0


def draw(words: Sequence[str | None], seed: int = 0, side: int = SIDE) -> list[Image.Image]:
    """Draw an image for each word: noise on grey, and the word's texture in half of the patches, or in none for None."""
    generator = np.random.default_rng(seed)
    patterns = 2 * textures().numpy()
    images = []
    for word in words:
        x = generator.normal(0, 0.02, (side // PATCH, side // PATCH, 3, PATCH, PATCH))
        if word is not None:
            x[generator.permutation(x.shape[0] ** 2).reshape(x.shape[:2]) % 2 == 0] += patterns[WORDS.index(word)]
        x = x.transpose(0, 3, 1, 4, 2).reshape(side, side, 3)
        images.append(Image.fromarray(np.clip((x * 0.5 + 0.5) * 255, 0, 255).round().astype(np.uint8)))
    return images


def make_sae() -> SAE:
    """Make the SAE of HOOKPOINT: latent k is the direction of word k, latent N that of all tokens, and the others are unused."""
    W = directions()
    config = SAEConfig("relu", D, len(W), 2, HOOKPOINT, "tiny-llava")
    return SAE(config, W.T.contiguous(), torch.zeros(len(W)), W, torch.zeros(D), torch.tensor(0.3))
