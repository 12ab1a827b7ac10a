"""Proves what is read of models without a text tower: a linear head finds classes, and latents that move its logits are causal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ommatid.config.models import VitModel
from ommatid.errors import ConfigError, ModelError
from ommatid.intervene import head
from ommatid.intervene.head import fit_head, load_head
from ommatid.store import Artefact
from ommatid.vlm import VisionModel, load_model
from support.models import SIZES, randomise, save_weights
from support.tiles import COLOURS, TileModel, draw_tiles, make_images_artefact

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return make_images_artefact(tmp_path_factory.mktemp("images"), 150)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    config = ViTConfig(**{**SIZES, "image_size": (32, 48), "patch_size": 16})
    folder = tmp_path_factory.mktemp("vit")
    save_weights(folder, randomise(ViTModel(config)), ViTImageProcessorPil(size={"height": 32, "width": 48}))
    return load_model(VitModel(kind="vit", path=str(folder)), "float32", "cpu")


def save_head(path: Path, weight: torch.Tensor, names: Any = CLASSES, **more: torch.Tensor) -> str:
    save_file(
        {"weight": weight, "bias": torch.zeros(len(weight)), **more},
        path,
        {"names": names if isinstance(names, str) else json.dumps(names)},
    )
    return str(path)


# Fitted heads


def test_a_vit_without_text_is_read_by_a_head_that_names_the_class_and_its_gradient_moves_the_class(
    vit: VisionModel, images: Artefact
) -> None:
    """A small step of the tokens before the last block along the gradient of a class's log-odds raises them by as much as it says."""
    fitted = fit_head(vit, images, "vision.blocks.1", "cpu")
    assert fitted.names == CLASSES and fitted.weights.shape == (3, vit.d_output)
    colours = torch.tensor([COLOURS[name] for name in CLASSES], dtype=torch.uint8)
    pixels = colours[:, None, None].expand(3, 32, 48, 3).contiguous()
    (outputs,) = vit.splice(pixels, "vision.blocks.1", [lambda tokens: tokens])
    assert fitted.scores(outputs).argmax(1).tolist() == [0, 1, 2]
    score = fitted.log_odds("red")
    found = vit.differentiate(pixels, "vision.blocks.1", score)
    step = 1e-3 * found.gradients / found.gradients.flatten(1).norm(dim=1)[:, None, None]
    (moved,) = vit.splice(pixels, "vision.blocks.1", [lambda tokens: tokens + step])
    assert (score(moved) > score(outputs)).all()
    torch.testing.assert_close(score(moved) - score(outputs), (step * found.gradients).sum((1, 2)), rtol=0.05, atol=1e-5)
    torch.testing.assert_close(
        fitted.difference("red", "blue")(outputs).double(),
        fitted.scores(outputs)[:, 2] - fitted.scores(outputs)[:, 0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_head_that_guesses_is_refused(images: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = head.load_labels(images, "train")
    shuffled = dict(zip(labels, torch.randint(3, (len(labels),), generator=torch.Generator().manual_seed(0)).tolist(), strict=True))
    monkeypatch.setattr(head, "load_labels", lambda *_: {image: CLASSES[place] for image, place in shuffled.items()})
    with pytest.raises(ModelError, match=r"where .* is chance: add labelled images, or set intervene.head to a file"):
        fit_head(TileModel(), images, "tiles", "cpu")


class Memory(TileModel):
    """A model whose outputs are noise, but enough of it to tell any images apart to which a head is fitted."""

    d_output = 300  # pyright: ignore[reportAssignmentType]

    def splice(self, pixels: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        return (torch.stack([torch.randn(300, generator=torch.Generator().manual_seed(int(one.sum()))) for one in pixels]),)


def test_a_head_is_tested_on_images_to_which_it_is_not_fitted(images: Artefact) -> None:
    with pytest.raises(ModelError, match=r"fitted to \d+ training images names the class of \d+% of \d+ others, where \d+% is chance"):
        fit_head(Memory(), images, "tiles", "cpu")


class Shifted(TileModel):
    """A model whose outputs are far from zero, and vary little."""

    def splice(self, pixels: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(1e-2 * output + 5 for output in super().splice(pixels, *arguments, **options))


def test_a_logit_of_zero_divides_a_class_from_the_others_wherever_outputs_lie(images: Artefact) -> None:
    fitted = fit_head(Shifted(), images, "tiles", "cpu")
    pixels = torch.from_numpy(np.stack([np.asarray(draw_tiles(np.random.default_rng(0), [name] * 2 + ["grey"] * 4)) for name in CLASSES]))
    (outputs,) = Shifted().splice(pixels, "tiles", [lambda tokens: tokens])
    assert (fitted.scores(outputs) > 0).tolist() == torch.eye(3).bool().tolist()


# Given heads


@pytest.mark.parametrize(
    ("weight", "names", "error"),
    [
        (torch.zeros(3, 4), CLASSES, r"weight is \(3, 4\), but tiles needs \(classes, 3\)"),
        (torch.zeros(3), CLASSES, r"weight is \(3,\), but tiles needs"),
        (torch.full((3, 3), torch.nan), CLASSES, "numbers that are not finite"),
        (torch.zeros(3, 3), ["a", "b"], "names lists 2 classes, and weight has 3"),
        (torch.zeros(3, 3), ["a", "a", "b"], "all different"),
        (torch.zeros(3, 3), "{", "a JSON list of the names of the classes; got '{'"),
        (torch.zeros(1, 3), ["a"], "two or more"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_what_is_wrong(tmp_path: Path, weight: torch.Tensor, names: Any, error: str) -> None:
    path = save_head(tmp_path / "head.safetensors", weight, names)
    with pytest.raises(ConfigError, match=f"intervene.head: .*head.safetensors: .*{error}"):
        load_head(path, TileModel())


def test_a_head_whose_file_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; name a safetensors file"):
        load_head(str(tmp_path / "head"), TileModel())
    (tmp_path / "head").write_text("no tensors")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_head(str(tmp_path / "head"), TileModel())
    save_file({"weight": torch.zeros(3, 3)}, tmp_path / "head")
    with pytest.raises(ConfigError, match="has no tensor 'bias'"):
        load_head(str(tmp_path / "head"), TileModel())
    path = save_head(tmp_path / "short", torch.zeros(3, 3), bias=torch.zeros(2))
    with pytest.raises(ConfigError, match=r"bias is \(2,\), but weight has 3 classes"):
        load_head(path, TileModel())
