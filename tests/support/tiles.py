"""Pictures of coloured tiles, a model that sees their colours, and an SAE planted on its activations."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ommatid.config import Params, TrainParams
from ommatid.errors import ModelError
from ommatid.evaluate.stage import evaluate
from ommatid.extract import networks
from ommatid.extract.stage import extract
from ommatid.images.stage import run as make_images
from ommatid.label import context
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.vlm import Captured, Differentiated, Hookpoint, Replacement, Score
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.splicing import differentiate
from support.study import make_artefact, make_test_params

COLOURS = {"red": (240, 128, 128), "green": (128, 240, 128), "blue": (128, 128, 240), "grey": (128, 128, 128)}
GRID = (2, 3)


def draw_tiles(rng: np.random.Generator, names: Sequence[str]) -> Image.Image:
    """Draw a picture of 2 x 3 tiles of 16 pixels, each of a named colour with a little noise."""
    tiles = np.array([COLOURS[name] for name in names], dtype=float).reshape(*GRID, 3)
    pixels = tiles.repeat(16, axis=0).repeat(16, axis=1) + rng.normal(0, 6, (32, 48, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tile_folder(folder: Path, n: int, seed: int = 0) -> None:
    """Write n pictures, mostly grey with up to three tiles of one colour, into a sub-folder named for the colour."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        colour = ["red", "green", "blue"][i % 3]
        names = ["grey"] * 6
        for place in rng.permutation(6)[: rng.integers(1, 4)]:
            names[place] = colour
        (folder / colour).mkdir(parents=True, exist_ok=True)
        draw_tiles(rng, names).save(folder / colour / f"{i:04d}.png")


def make_images_artefact(root: Path, n: int) -> Artefact:
    """Make the images artefact of a folder of tile pictures."""
    write_tile_folder(root / "tiles", n)
    params = make_test_params(images={"source": {"kind": "folder", "path": str(root / "tiles")}, "limit": None})
    return make_artefact(root / "images", "images", make_images, params.images, {})


class TileModel:
    """A model whose patch activations are mean colours of tiles minus grey, mapped to d_model by a fixed matrix; its texts are colours."""

    name = "tiles"
    d_embed = d_output = 3
    d_model = 8
    text_templates = ("a photo of a {}",)
    logit_scale = None
    preprocess = Preprocess(resize=(32, 48), crop=(32, 48), interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    preprocessing = preprocess.as_json()
    hookpoints = {"tiles": Hookpoint(8, ("cls",), GRID), "cls": Hookpoint(8, ("cls",), None)}  # noqa: RUF012

    def __init__(self) -> None:
        self.n_captured = 0
        mixed = torch.randn(self.d_model, 3, generator=torch.Generator().manual_seed(5))
        self.spread = torch.linalg.qr(mixed).Q.T.contiguous()
        """Three planted orthogonal directions, none of which is an axis of the activations."""

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        return {"spread": self.spread}

    def colours(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean colour of each tile minus grey, -1 to 1, (batch, rows, cols, 3)."""
        tiles = pixels.float().unflatten(1, (2, 16)).unflatten(3, (3, 16))
        return tiles.mean((2, 4)) / 128 - 1

    def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
        self.n_captured += len(pixels)
        colours = self.colours(pixels)
        patches = (colours @ self.spread).flatten(1, 2)
        cls = patches.mean(1, keepdim=True)
        tokens = {"tiles": torch.cat([cls, patches], dim=1), "cls": cls}
        return Captured({name: tokens[name] for name in hookpoints}, colours.mean((1, 2)) + 0.01)

    def splice(
        self, pixels: torch.Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        assert read is None, "the tile model has no later hookpoints"
        tokens = self.capture(pixels, [hookpoint]).tokens[hookpoint]
        n_special = len(self.hookpoints[hookpoint].special) if self.hookpoints[hookpoint].grid else 0
        return tuple(replace(tokens)[:, n_special:].mean(1) @ self.spread.T + 0.01 for replace in replacements)

    def differentiate(
        self, pixels: torch.Tensor, hookpoint: str, score: Score, replacement: Replacement | None = None, read: str | None = None
    ) -> Differentiated:
        return differentiate(lambda put: self.splice(pixels, hookpoint, [put], read)[0], score, replacement, f"tiles: {hookpoint}")

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.colours(pixels).mean((1, 2)) + 0.03

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [next((c for name, c in COLOURS.items() if name in text), COLOURS["grey"]) for text in texts]
        return torch.tensor(rows).float() / 128 - 1 + 0.01


class WithoutText(TileModel):
    """The tile model without its text tower; its output is the mean colour."""

    d_embed = None
    text_templates = ()

    def embed_text(self, texts: object) -> object:
        raise ModelError("tiles: has no text tower")


D_DEEP = 5
"""Width of the hookpoint `deep`."""


class DeepTileModel(TileModel):
    """Has a second hookpoint of another width, a fixed linear map of the first, and a third one with other tokens."""

    hookpoints = {**TileModel.hookpoints, "deep": Hookpoint(D_DEEP, ("cls",), GRID)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.onward = torch.randn(self.d_model, D_DEEP, generator=torch.Generator().manual_seed(7))

    def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
        captured = super().capture(pixels, ["tiles", "cls"])
        tokens = {**captured.tokens, "deep": captured.tokens["tiles"] @ self.onward}
        return replace(captured, tokens={name: tokens[name] for name in hookpoints})

    def splice(
        self, pixels: torch.Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        if hookpoint != "deep":
            return super().splice(pixels, hookpoint, replacements)
        tokens, back = self.capture(pixels, ["deep"]).tokens["deep"], torch.linalg.pinv(self.spread @ self.onward)
        return tuple(replacement(tokens)[:, 1:].mean(1) @ back + 0.01 for replacement in replacements)


def png(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


N_IMAGES = 300
PURE = {0: "red", 1: "green", 2: "blue"}
MIXED, DEAD, ALWAYS = 3, 4, 5
D_SAE = 6


def plant_sae(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Make the artefact of the stage `train`, with known weights."""
    red, green, blue = TileModel().spread
    directions = torch.stack([red, green, blue, (red + green) / 2**0.5, red, red])
    b_enc = torch.tensor([0.0, 0.0, 0.0, 0.0, -100.0, 5.0])
    config = SAEConfig("planted", TileModel.d_model, D_SAE, 1, "tiles", "tiles")
    sae = SAE(config, directions.T.contiguous(), b_enc, directions, torch.zeros(TileModel.d_model), torch.tensor(0.3))
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return draft.seal({"sae": "planted", "dead_latents": [DEAD]})


def make_line(root: Path, params: Params, **more: Any) -> dict[str, Artefact]:
    """Make images, activations, the planted SAE and its evaluation, and then the artefacts of the stages in `more`; return all by stage."""
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        made: dict[str, Artefact] = {"images": make_images_artefact(root, N_IMAGES)}
        stages: Mapping[str, Any] = {"extract": extract, "train": plant_sae, "evaluate": evaluate, **more}
        kinds = {"extract": "extraction", "train": "sae", "evaluate": "evaluation", "label": "labels"}
        for name, stage in stages.items():
            artefact = make_artefact(root / kinds[name], kinds[name], stage, getattr(params, name), made)
            made[name] = artefact.child("tiles", "activations") if name == "extract" else artefact
        return made


def use_tile_model(patch: pytest.MonkeyPatch, model: TileModel | None = None) -> None:
    """Use a TileModel, or the one that is given, whichever model, judge and namer the params name."""
    model = model or TileModel()
    patch.setattr(networks, "load_model", lambda params, dtype, device: model)
    patch.setattr(networks, "load_judge", lambda params, dtype, device: model)
    patch.setattr(context, "load_model", lambda params, dtype, device: model)


@contextmanager
def deep_tile_checkout(root: Path, n: int, **sections: Any) -> Iterator[DeepTileModel]:
    """Work in a folder with params.yaml, pictures and words of their colours; yield the model, whose hookpoints are all extracted.

    Args:
        root: The folder.
        n: Number of pictures.
        sections: Values of sections other than `images`, `extract` and `label`.
    """
    model = DeepTileModel()
    write_tile_folder(root / "photos", n)
    (root / "words.txt").write_text("\n".join(COLOURS))
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"hookpoints": ["tiles", "deep", "cls"], "tokens": "all", "dtype": "float32"},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
        **sections,
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_tile_model(patch, model)
        yield model
