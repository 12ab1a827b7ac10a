"""Studies of the vision towers of the tiny models that answer, through the stages, with an SAE whose first latents are what they read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ommatid.config import Params, TrainParams
from ommatid.extract import networks
from ommatid.intervene import answers
from ommatid.label import context
from ommatid.pipeline import STAGES
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.vlm import Captured, load_model
from ommatid.vlm.preprocess import Preprocess
from support.study import make_test_params
from support.tile_study import run_stage
from support.tiny_llava import HOOKPOINT, PATCH, QWEN_SIDE, SIDE, WORDS, D, N, directions, draw, textures

N_READERS = 24
"""Number of latents that read a word as those of the words do, and write where the language model does not read."""
N_EACH = 24
"""Number of images of each word."""


def reader(word: str) -> int:
    """Return the first latent that reads a word without writing it."""
    return N + 1 + WORDS.index(word)


class Namer:
    """A joint space, and a judge, with one axis for each word: how much of a texture an image has, and which word a text is.

    Args:
        side: Height and width of the images.
    """

    name = "textures"
    d_embed = N
    text_templates = ("{}",)
    logit_scale = None
    hookpoints: Mapping[str, Any] = {}

    def __init__(self, side: int) -> None:
        self.preprocess = Preprocess((side, side), (side, side), "bicubic", (0.5,) * 3, (0.5,) * 3)
        self.preprocessing = self.preprocess.as_json()

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        return Captured({}, self.embed(pixels))

    def embed(self, pixels: Tensor) -> Tensor:
        patches = (pixels.float() / 127.5 - 1).unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
        return torch.einsum("byixjc,kcij->bk", patches, textures()).relu() + 0.1

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        others = [torch.rand(N, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.stack([torch.eye(N)[WORDS.index(text)] if text in WORDS else other for text, other in zip(texts, others, strict=True)])


def plant(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Make an SAE of a latent for each word, one for all tokens, and readers, which write in the two directions that nothing reads."""
    W = directions()
    angles = torch.arange(N_READERS) * torch.pi / N_READERS
    reads = torch.cat([W[: N + 1], W[:N].repeat(N_READERS // N, 1)])
    writes = torch.cat([W[: N + 1], torch.stack([angles.cos(), angles.sin()], 1) @ W[N + 1 : N + 3]])
    config = SAEConfig("planted", D, len(reads), 2, HOOKPOINT, "tiny-llava")
    sae = SAE(config, reads.T.contiguous(), torch.zeros(len(reads)), writes, torch.zeros(D), torch.tensor(0.3))
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return draft.seal({"sae": "planted", "dead_latents": []})


def make_speaking_params(root: Path, folder: Path, latents: Sequence[int], **intervene: Any) -> Params:
    """Make the params of a study in `root` of the model in `folder`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "words.txt").write_text("\n".join(WORDS))
    is_qwen = "qwen" in (folder / "config.json").read_text()
    model = {"kind": "qwen", "path": str(folder), "image_size": QWEN_SIDE} if is_qwen else {"kind": "llava", "path": str(folder)}
    section = {"latents": {"kind": "listed", "latents": list(latents)}, "doses": [0, 1], "n_images": 39, "draws": 16}
    section["answers"] = {"dtype": "float32", "batch": 40, "joint": {"kind": "lite"}}
    return make_test_params(
        images={"source": {"kind": "folder", "path": str(root / "photos")}, "limit": None, "eval_share": 0.5},
        extract={"model": model, "hookpoints": [HOOKPOINT], "tokens": "patch", "dtype": "float32"} | {"namer": {"kind": "lite"}},
        train={"d_sae": N + 1 + N_READERS, "k": 2},
        evaluate={"baselines": []},
        label={"labellers": [{"kind": "vocabulary", "words": [str(root / "words.txt")]}], "min_examples": 2, "n_examples": 8},
        intervene=section | intervene,
    )


def side_of(params: Params) -> int:
    """Return the height and width of the images of a study."""
    return QWEN_SIDE if params.model_dump()["extract"]["model"]["kind"] == "qwen" else SIDE


def use_namer(patch: pytest.MonkeyPatch, params: Params) -> None:
    """Use the Namer wherever the params name a model other than the one that answers, and as the judge."""
    namer = Namer(side_of(params))

    def load(params: Any, dtype: Any, device: str) -> Any:
        return load_model(params, dtype, device) if params.kind in ("llava", "qwen") else namer

    for module in (networks, context, answers):
        patch.setattr(module, "load_model", load)
    patch.setattr(networks, "load_judge", lambda params, dtype, device: namer)


def make_speaking_study(root: Path, params: Params) -> Path:
    """Make a study in `root/data`, whose photographs are in `root/photos`; return it."""
    with pytest.MonkeyPatch.context() as patch:
        use_namer(patch, params)
        words = [*WORDS, None] * N_EACH
        for i, (word, image) in enumerate(zip(words, draw(words, side=side_of(params)), strict=True)):
            (root / "photos" / (word or "nothing")).mkdir(parents=True, exist_ok=True)
            image.save(root / "photos" / (word or "nothing") / f"{i:03d}.png")
        for name in STAGES:
            run_stage(name, params, root / "data", plant)
    return root / "data"
