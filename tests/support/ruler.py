"""Photographs of lesions with a ruler: a model that takes the ruler for a sign of one class, and an SAE that has a latent for the ruler.

Each picture has six tiles. One of them shows the lesion, red or blue, as strongly as it happens to be; another may show a paler lesion of
the other class; a third, if there is a ruler, is green. In 95 % of the training pictures the ruler goes with red, and in the evaluation
pictures less. All tiles have gradients, which mean nothing.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ommatid.config import Params, TrainParams
from ommatid.evaluate.stage import evaluate
from ommatid.extract.stage import extract
from ommatid.images.dataset import split_of
from ommatid.images.stage import run as make_images
from ommatid.label.stage import label
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.vlm import Captured, Hookpoint
from support.study import make_artefact, make_test_params
from support.tile_study import run_planted
from support.tiles import GRID, TileModel, png, use_tile_model

N_IMAGES, EVAL_SHARE = 1000, 0.5
RULER_GOES_WITH = {"train": {"red": 0.95, "blue": 0.05}, "eval": {"red": 0.6, "blue": 0.4}}
"""Share of the pictures of each class that have a ruler."""
RED, RULER, BLUE, SHADOW = range(4)
"""Latents of the planted SAE: of a red lesion, of the ruler, of a blue lesion, and one that fires with the ruler, but writes elsewhere."""
N_OTHERS = 24
"""Number of its other latents, which are of gradients and write in random directions."""
D_SAE = 4 + N_OTHERS
WORDS = ("red", "green", "blue", "stripe", "dot", "wave", "leaf", "brick", "cloud", "sand", "glass", "fur")
D_MODEL, N_READ = 96, 5
"""Width of the activations, and number of directions that pictures have: three colours and two gradients."""
WEIGHT = 1.0
"""Weight of the ruler in what the model takes for red, where the lesion's colour has 1."""


def draw(rng: np.random.Generator, kind: str, has_ruler: bool) -> tuple[Image.Image, Image.Image]:
    """Draw a picture, and the mask of its lesion."""
    lesion, other, ruler = rng.permutation(6)[:3]
    tiles = np.zeros((6, 16, 16, 3))
    channel = {"red": 0, "blue": 2}
    tiles[lesion, ..., channel[kind]] = rng.uniform(0.25, 0.9)
    if rng.random() < 0.4:
        tiles[other, ..., channel["red" if kind == "blue" else "blue"]] = rng.uniform(0.1, 0.6)
    if has_ruler:
        tiles[ruler, ..., 1] = 0.85
    across, down = rng.uniform(-0.12, 0.12, (2, 6, 1, 1, 1))
    ramp = np.linspace(-1, 1, 16)
    tiles += across * ramp[None, None, :, None] + down * ramp[None, :, None, None]
    pixels = (1 + tiles.reshape(*GRID, 16, 16, 3).swapaxes(1, 2).reshape(32, 48, 3)) * 128
    mask = (np.arange(6).reshape(GRID) == lesion).repeat(16, axis=0).repeat(16, axis=1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask.astype(np.uint8))


def write_folder(folder: Path, seed: int = 0) -> None:
    """Write the pictures into a sub-folder for each class; beside it, masks of the lesions, and which pictures have a ruler."""
    rng, lines = np.random.default_rng(seed), ["path,ruler"]
    for i in range(N_IMAGES):
        kind, split = ("red", "blue")[i % 2], "eval" if rng.random() < EVAL_SHARE else "train"
        has_ruler = bool(rng.random() < RULER_GOES_WITH[split][kind])
        content, mask = b"", None
        while not mask or split_of(hashlib.sha256(content).hexdigest(), EVAL_SHARE) != split:
            picture, mask = draw(rng, kind, has_ruler)
            content = png(picture)
        for place in (folder, folder.parent / "masks"):
            (place / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{i:04d}.png").write_bytes(content)
        mask.save(folder.parent / "masks" / kind / f"{i:04d}.png")
        lines.append(f"{kind}/{i:04d}.png,{'yes' if has_ruler else 'no'}")
    (folder.parent / "rulers.csv").write_text("\n".join(lines) + "\n")


class RulerModel(TileModel):
    """A model that reads colours, and takes green for a sign of red; its activations hold the gradients of tiles as well."""

    d_model = D_MODEL
    hookpoints = {"tiles": Hookpoint(D_MODEL, ("cls",), GRID)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        mixed = torch.randn(D_MODEL, N_READ, generator=torch.Generator().manual_seed(5))
        self.spread = torch.linalg.qr(mixed).Q.T.contiguous()

    def colours(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean colour of each tile minus grey, and its gradients across and down, (batch, rows, cols, 5)."""
        tiles = pixels.float().unflatten(1, (2, 16)).unflatten(3, (3, 16)) / 128 - 1
        ramp = torch.linspace(-1, 1, 16)
        across, down = (5 * (tiles * by).mean((2, 4, 5)) for by in (ramp[:, None], ramp[:, None, None, None]))
        return torch.cat([tiles.mean((2, 4)), torch.stack([across, down], -1)], -1)

    def capture(self, pixels: torch.Tensor, hookpoints: Any) -> Captured:
        captured = super().capture(pixels, hookpoints)
        assert captured.embedding is not None
        return Captured(captured.tokens, captured.embedding[:, :3])

    def splice(self, pixels: torch.Tensor, hookpoint: str, replacements: Any, read: str | None = None) -> tuple[torch.Tensor, ...]:
        return tuple(output[:, :3] for output in super().splice(pixels, hookpoint, replacements, read))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().embed(pixels)[:, :3]

    def embed_text(self, texts: Any) -> torch.Tensor:
        signs = {"red": (1.0, WEIGHT, 0.0), "blue": (0.0, 0.0, 1.0), "green": (0.0, 1.0, 0.0)}
        return torch.stack([next((torch.tensor(sign) for name, sign in signs.items() if name in text), _embed(text)) for text in texts])


def _embed(text: str) -> torch.Tensor:
    """Embed a word that means nothing to the model."""
    return torch.randn(3, generator=torch.Generator().manual_seed(sum(text.encode())))


def plant(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Make the artefact of the stage `train`, with known weights."""
    model, generator = RulerModel(), torch.Generator().manual_seed(3)
    angles = torch.linspace(0, 2 * torch.pi, N_OTHERS + 1)[:-1]
    gradients = torch.stack([angles.cos(), angles.sin()], 1) @ model.spread[3:]
    readers = torch.cat([model.spread[:3], model.spread[1:2], gradients])
    written = torch.randn(1 + N_OTHERS, D_MODEL, generator=generator)
    written[0] -= written[0] @ model.spread.T @ model.spread  # the model does not read it at all
    writers = torch.cat([model.spread[:3], written / written.norm(dim=1, keepdim=True)])
    thresholds = torch.tensor([0.35, 0.5, 0.35, 0.5, *[0.18] * N_OTHERS])
    config = SAEConfig("planted", D_MODEL, D_SAE, 1, "tiles", "tiles")
    sae = SAE(config, readers.T.contiguous(), torch.zeros(D_SAE), writers, torch.zeros(D_MODEL), thresholds)
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return draft.seal({"sae": "planted", "dead_latents": []})


def make_ruler_params(root: Path, **sections: Mapping[str, Any]) -> Params:
    """Make the params of a study of the pictures in `root/photos`; `sections` change them."""
    changes: dict[str, dict[str, Any]] = {
        "images": {"source": {"kind": "folder", "path": str(root / "photos")}, "limit": None, "eval_share": EVAL_SHARE},
        "extract": {"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        "train": {"d_sae": D_SAE, "k": 1},
        "evaluate": {"baselines": [], "n_per_decile": 2},
        "label": {"labellers": [{"kind": "vocabulary", "words": [str(root / "words.txt")]}], "min_examples": 2},
    }
    return make_test_params(**{name: {**changes.get(name, {}), **sections.get(name, {})} for name in {*changes, *sections}})


def write_sources(root: Path) -> None:
    """Write the pictures, the attributes and the list of words."""
    write_folder(root / "photos")
    (root / "words.txt").write_text("\n".join(WORDS) + "\n")


def make_ruler_line(root: Path, params: Params) -> dict[str, Artefact]:
    """Make the artefacts of all stages before `intervene`, by stage."""
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch, RulerModel())
        made = {"images": make_artefact(root / "images", "images", make_images, params.images, {})}
        stages: Mapping[str, Any] = {"extract": extract, "train": plant, "evaluate": evaluate, "label": label}
        kinds = {"extract": "extraction", "train": "sae", "evaluate": "evaluation", "label": "labels"}
        for name, stage in stages.items():
            artefact = make_artefact(root / kinds[name], kinds[name], stage, getattr(params, name), made)
            made[name] = artefact.child("tiles", "activations") if name == "extract" else artefact
        return made


def make_ruler_study(root: Path, **sections: Mapping[str, Any]) -> Path:
    """Make a study of the pictures in `root/data`; `sections` change its params. Return its catalogue."""
    write_sources(root)
    return run_planted(root / "data", make_ruler_params(root, **sections), plant, RulerModel())
