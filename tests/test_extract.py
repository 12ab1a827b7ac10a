"""Proves that activations land in the right row with the right place, mixed but reproducible, and that a kill loses one chunk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import GRID, TileModel, make_artefact, make_images_artefact, make_test_params
from PIL import Image

from ommatid import extract as module
from ommatid.config import ExtractParams
from ommatid.errors import ModelError
from ommatid.events import Progress
from ommatid.extract import TokenPicker, extract
from ommatid.images import decode
from ommatid.store import Artefact, open_draft
from ommatid.tensors import from_float16, from_float32
from ommatid.vlm import Captured, Hookpoint

N_IMAGES = 40


def params(**changes: object) -> ExtractParams:
    return make_test_params(extract={"hookpoint": "tiles", "tokens": "patch", "batch_size": 7, **changes}).extract


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TileModel:
    model = TileModel()
    monkeypatch.setattr(module, "load_model", lambda params, dtype, device: model)
    monkeypatch.setattr(module, "load_judge", lambda params, dtype, device: model)
    monkeypatch.setattr(module, "IMAGES_PER_CHUNK", 16)
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return make_images_artefact(tmp_path_factory.mktemp("images"), N_IMAGES)


def make(root: Path, images: Artefact, **changes: object) -> Artefact:
    return make_artefact(root / "activations", "activations", extract, params(**changes), {"images": images})


def expected(model: TileModel, images: Artefact) -> dict[tuple[int, int, int], torch.Tensor]:
    """(image, row, col) -> activation, by hand."""
    rows = zip(*(images.read("images")[name].to_pylist() for name in ("image", "encoded")), strict=True)
    return {
        (image, r, c): (model.colours(torch.from_numpy(np.array(decode(encoded)))[None])[0, r, c] @ model.spread).half()
        for image, encoded in rows
        for r in range(GRID[0])
        for c in range(GRID[1])
    }


def test_every_patch_is_there_once_with_its_place_and_value(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    artefact = make(tmp_path, images)
    truth = expected(model, images)
    split = dict(zip(*(images.read("images")[name].to_pylist() for name in ("image", "split")), strict=True))
    seen = set()
    for table_name in ("train", "eval"):
        table = artefact.read(table_name)
        x = from_float16(table["x"])
        for i, row in enumerate(table.select(["image", "token", "kind", "row", "col"]).to_pylist()):
            key = (row["image"], row["row"], row["col"])
            torch.testing.assert_close(x[i], truth[key], rtol=2e-3, atol=2e-3)
            assert row["token"] == 1 + row["row"] * GRID[1] + row["col"]  # the class token is 0
            assert row["kind"] == "patch"
            assert split[row["image"]] == table_name
            seen.add(key)
    assert seen == set(truth)
    assert artefact.rows("train") + artefact.rows("eval") == len(truth)


def test_training_rows_are_mixed_and_evaluation_rows_in_order(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    artefact = make(tmp_path, images)
    train, held = (artefact.read(name)["image"].to_numpy() for name in ("train", "eval"))
    assert (np.diff(held) >= 0).all()
    neighbours_of_one_image = (np.diff(train) == 0).mean()
    assert neighbours_of_one_image < 0.15  # unshuffled: 5 of 6
    first = train[: len(train) // 4]
    assert len(set(first.tolist()) & set(range(N_IMAGES // 2, N_IMAGES))) > 3  # later images come early


def test_embeddings_are_unit_and_in_image_order(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    table = make(tmp_path, images).read("embeddings")
    assert table["image"].to_pylist() == list(range(N_IMAGES))
    for column in ("joint", "judge"):
        vectors = from_float32(table[column])
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(N_IMAGES))


def test_a_planted_bright_tile_is_the_brightest_patch(model: TileModel) -> None:
    picker = TokenPicker("patch", model.hookpoints["tiles"])
    for index, (_, _, row, col) in enumerate(picker.places):
        pixels = np.full((32, 48, 3), 128, np.uint8)
        pixels[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] = 255
        shown = model.preprocess(Image.fromarray(pixels))
        tokens = picker.pick(model.capture(torch.from_numpy(shown)[None], "tiles"))
        assert int(tokens[0].norm(dim=1).argmax()) == index


def test_token_policies() -> None:
    captured = Captured(torch.full((2, 4), 9.0), torch.arange(2 * 2 * 3 * 4.0).view(2, 2, 3, 4), torch.zeros(2, 3))
    both = Hookpoint(4, GRID, True)
    kinds = {policy: [place[1] for place in TokenPicker(policy, both).places] for policy in ("pooled", "patch", "cls", "all")}
    assert kinds == {"pooled": ["pooled"], "patch": ["patch"] * 6, "cls": ["cls"], "all": ["cls"] + ["patch"] * 6}
    assert captured.patches is not None
    torch.testing.assert_close(TokenPicker("pooled", both).pick(captured)[:, 0], captured.patches.flatten(1, 2).mean(1))
    assert TokenPicker("all", both).pick(captured).shape == (2, 7, 4)
    assert TokenPicker("cls", both).pick(captured).unique().tolist() == [9.0]
    with pytest.raises(ModelError, match="'cls' is not at this hookpoint; it has patch, pooled, all"):
        TokenPicker("cls", Hookpoint(4, GRID, False))
    with pytest.raises(ModelError, match="'patch' is not at this hookpoint; it has cls, all"):
        TokenPicker("patch", Hookpoint(4, None, True))


def test_unknown_hookpoint_is_refused_before_any_image(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    with pytest.raises(ModelError, match="one of: tiles, cls"):
        make(tmp_path, images, hookpoint="tile")
    assert model.n_captured == 0


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    whole = make(tmp_path / "whole", images)
    model.n_captured = 0

    class Killed(BaseException):
        pass

    def kill(event: object) -> None:
        if isinstance(event, Progress) and event.done >= 32:
            raise Killed

    place = tmp_path / "killed" / "activations"
    section = params()
    with pytest.raises(Killed), open_draft(place, "activations", section.model_dump(mode="json"), {"images": images}) as draft:
        extract(section, {"images": images}, draft, kill)
    assert not place.exists()
    again = make(tmp_path / "killed", images)
    assert model.n_captured == N_IMAGES  # 32 before, 8 after: none twice
    assert [(f.name, f.sha256) for f in again.manifest.files] == [(f.name, f.sha256) for f in whole.manifest.files]


def test_rows_are_dealt_to_bounded_parts(tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(tmp_path / "one", images)
    monkeypatch.setattr(module, "PART_BYTES", 600)
    many = make(tmp_path / "many", images)
    assert len(one.files("train")) == 1
    sizes = [len(part) for part in many.iter_parts("train")]
    assert len(sizes) > 3
    assert max(sizes) - min(sizes) <= 3
    assert sorted(one.read("train")["image"].to_pylist()) == sorted(many.read("train")["image"].to_pylist())
