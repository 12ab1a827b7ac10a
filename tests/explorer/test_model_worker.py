"""Proves what the explorer's model answers, on pictures of coloured tiles and an SAE whose latents each fire on a planted colour.

The planted feature is found by its colour's name and by a picture of it; an image of the study gets the activations, heat maps and shares
that its catalogue holds; uploads that lie are refused in a sentence. The questions are answered in this process; `test_model_client.py`
asks them across processes.
"""

import io
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image

from ommatid.catalog.reader import Catalog
from ommatid.errors import InputError, ModelError
from ommatid.explorer import model_worker
from ommatid.explorer.model_worker import Study
from ommatid.pipeline import open_stage
from support.tile_study import SAE, make_tile_study
from support.tiles import D_SAE, DEAD, PURE, TileModel, draw_tiles, png, use_tile_model


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tile_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def _tile_model(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile_model(monkeypatch)


@pytest.fixture
def study(catalog: Path) -> Study:
    return Study(str(catalog), str(catalog.parents[1]))


@pytest.fixture
def opened(catalog: Path) -> Iterator[Catalog]:
    with Catalog(catalog) as found:
        yield found


def encoded_images(catalog: Path) -> dict[int, bytes]:
    """Return the files of the evaluation images."""
    rows = open_stage("images", data=str(catalog.parents[1])).read("images", ["image", "split", "encoded"]).to_pylist()
    return {row["image"]: row["encoded"] for row in rows if row["split"] == "eval"}


# ---- search


def test_a_planted_feature_is_found_by_its_name(study: Study) -> None:
    for latent, colour in PURE.items():
        hits = study.search_text(SAE, colour, 3)
        assert hits["found"][0] == latent and len(hits["found"]) == 3
        assert hits["scores"][0] > 0.7 and hits["scores"] == sorted(hits["scores"], reverse=True)


def test_hits_are_the_cosines_of_meanings_with_the_text_less_the_mean_of_labels(study: Study, opened: Catalog) -> None:
    labels = [label for (label,) in opened.rows("SELECT DISTINCT label FROM features WHERE label IS NOT NULL")]
    assert {"red", "green", "blue"} <= {*labels}
    texts = study._texts(SAE)
    assert {*labels} < {*texts.words} and len(texts.words) == 64  # there are too few labels, so that words of ImageNet are added
    model = TileModel()
    embedded = torch.nn.functional.normalize(model.embed_text([f"a photo of a {text}" for text in texts.words]), dim=1)
    query = embedded[texts.words.index("blue")] - embedded.mean(0)
    rows = opened.rows("SELECT latent, embedding FROM meanings ORDER BY latent")
    meanings = np.stack([np.frombuffer(embedding, np.int8) for _, embedding in rows]).astype(float)
    wanted = meanings @ query.numpy() / np.linalg.norm(meanings, axis=1) / float(query.norm())
    found = study.search_text(SAE, "blue", 100)
    assert dict(zip(found["found"], found["scores"], strict=True)) == pytest.approx(
        {latent: float(cosine) for (latent, _), cosine in zip(rows, wanted, strict=True)}, abs=1e-5
    )
    assert DEAD not in found["found"] and len(found["found"]) == D_SAE - 1  # the dead latent has no meaning


def test_meanings_are_read_in_blocks(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study.search_text(SAE, "red", 100)
    monkeypatch.setattr(model_worker, "ROWS", 2)
    study._meanings.cache_clear()
    assert study.search_text(SAE, "red", 100) == whole


def test_an_image_finds_the_features_that_fire_those_of_its_kind_and_itself(study: Study, catalog: Path) -> None:
    encoded = encoded_images(catalog)
    for image in list(encoded)[:3]:
        found, own = study.search_image(SAE, encoded[image], 5), study.encode(SAE, encoded[image])
        assert found["by_activation"] == {"found": own["latents"][:5], "scores": own["acts"][:5]}
        colour = next(latent for latent in own["latents"] if latent in PURE)
        assert next(latent for latent in found["by_meaning"]["found"] if latent in PURE) == colour
        assert found["images"]["found"][0] == image and found["images"]["scores"][0] == pytest.approx(1, abs=1e-3)
        assert (found["n_images"], found["problem"]) == (len(encoded), None)


def test_images_left_out_of_a_search_are_counted(study: Study, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encoded_images(catalog)
    monkeypatch.setattr(model_worker, "MOST_IMAGES", 10)
    found = study.search_image(SAE, encoded[min(encoded)], 50)
    assert len(found["images"]["found"]) == found["n_images"] == 10
    assert found["problem"] == f"only the first 10 of {len(encoded)} evaluation images are compared"


# ---- encoding


def test_an_image_of_the_study_gets_what_its_catalogue_holds(study: Study, catalog: Path, opened: Catalog) -> None:
    """The activations are those in `firings`, the heat maps those in `examples`, and the shares those in `images`."""
    encoded = encoded_images(catalog)
    examples = opened.rows("SELECT image, latent, heat, rows, cols FROM examples")
    assert len(encoded) > 50 and len({image for image, *_ in examples}) > 30
    for image, data in encoded.items():
        found = study.encode(SAE, data)
        wanted = dict(opened.rows("SELECT latent, act FROM firings WHERE image = ?", [image]))
        assert dict(zip(found["latents"], found["acts"], strict=True)) == pytest.approx(wanted, abs=1e-5)
        assert found["acts"] == sorted(found["acts"], reverse=True) and found["n_firing"] == len(wanted) > 0
        shares = opened.rows("SELECT width, height, seen_width, seen_height FROM images WHERE image = ?", [image])[0]
        assert shares == (found["width"], found["height"], found["seen_width"], found["seen_height"])
        for of, latent, heat, rows, cols in examples:
            if of == image:
                assert found["heat"][found["latents"].index(latent)] == pytest.approx(heat, abs=1e-5)
                assert (rows, cols) == (found["rows"], found["cols"])


def test_patches_list_their_strongest_latents(study: Study) -> None:
    found = study.encode(SAE, png(draw_tiles(np.random.default_rng(0), ["red", "grey", "green", "grey", "grey", "blue"])))
    heat = dict(zip(found["latents"], found["heat"], strict=True))
    assert len(found["patches"]) == 6
    for place, colour in ((0, 0), (2, 1), (5, 2)):
        patch = found["patches"][place]
        assert colour in patch["latents"] and patch["acts"] == sorted(patch["acts"], reverse=True)
        assert patch["acts"] == [heat[latent][place] for latent in patch["latents"]]
        assert all(act > 0 for act in patch["acts"])
        assert [place for place, act in enumerate(heat[colour]) if act > 0] == [place]


def test_the_picture_is_upright_small_and_without_metadata(study: Study) -> None:
    image = draw_tiles(np.random.default_rng(0), ["red", "grey", "grey"] * 2).resize((2000, 1000))
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert b"secret" in buffer.getvalue()
    found = study.encode(SAE, buffer.getvalue())
    assert (found["width"], found["height"]) == (1000, 2000)
    assert (found["picture_width"], found["picture_height"]) == (384, 768)
    with Image.open(io.BytesIO(found["picture"])) as picture:
        assert picture.format == "WEBP" and picture.size == (384, 768) and not picture.getexif()
        red, grey = picture.convert("RGB").getpixel((190, 60)), picture.convert("RGB").getpixel((190, 700))
    assert isinstance(red, tuple) and isinstance(grey, tuple)
    assert red[0] > red[1] + 60 and abs(grey[0] - grey[1]) < 30
    assert b"secret" not in found["picture"] and b"EXIF" not in found["picture"]


def test_of_very_many_latents_only_the_strongest_are_listed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    image = png(draw_tiles(np.random.default_rng(0), ["red"] * 6))
    whole = study.encode(SAE, image)
    monkeypatch.setattr(model_worker, "MOST_LATENTS", 2)
    found = study.encode(SAE, image)
    assert found["latents"] == whole["latents"][:2] and len(found["heat"]) == 2 and found["n_firing"] == whole["n_firing"] > 2


def lying_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size that its data do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("encoded", "says"),
    [
        (lying_png(12000, 12000), r"too large\): 12000 x 12000 pixels, more than"),
        (lying_png(60000, 60000), r"too large\): Image size \(3600000000 pixels\) exceeds limit"),
        (lying_png(1000, 1000), r"\((truncated|unreadable)\): "),
        (png(Image.new("RGB", (50, 50)))[:-40], r"\(truncated\): "),
        (b"<svg onload='alert(1)'/>", r"not an image\): SVG or XML, which is not decoded; formats that can be read are AVIF, BMP, "),
        (b"%PDF-1.7", r"not an image\): a PDF"),
        (b"hello", r"not an image\): does not begin like any image file"),
    ],
)
def test_uploads_that_lie_are_refused_in_a_sentence(study: Study, encoded: bytes, says: str) -> None:
    for question in (lambda: study.encode(SAE, encoded), lambda: study.search_image(SAE, encoded, 5)):
        with pytest.raises(InputError, match=rf"the image cannot be read .*{says}"):
            question()


# ---- where the model and the SAE come from


def test_a_published_catalogue_and_its_sae_suffice_for_all_but_similar_images(study: Study, catalog: Path, tmp_path: Path) -> None:
    shutil.copyfile(catalog, tmp_path / "catalog.duckdb")
    shutil.copytree(catalog.parents[1] / "sae" / SAE, tmp_path / "champions" / "0123" / "sae")
    published = Study(str(tmp_path / "catalog.duckdb"), str(tmp_path / "nowhere"))
    image = next(iter(encoded_images(catalog).values()))
    assert published.encode(SAE, image) == study.encode(SAE, image)
    assert published.search_text(SAE, "red", 9) == study.search_text(SAE, "red", 9)
    found = published.search_image(SAE, image, 9)
    assert (
        found["problem"]
        == f"similar images are not searched for, as {tmp_path / 'nowhere'} does not hold the activations of this catalogue"
    )
    assert found["images"]["found"] == []
    exact = study.search_image(SAE, image, 9)["by_meaning"]
    assert found["by_meaning"]["found"][:2] == exact["found"][:2]  # the mean image is estimated from thumbnails
    assert found["by_meaning"]["scores"] == pytest.approx(exact["scores"], abs=0.2)


def change(catalog: Path, copy: Path, sql: str) -> Study:
    """Open a copy of a catalogue that a statement has changed, beside the study."""
    shutil.copyfile(catalog, copy)
    with duckdb.connect(copy) as connection:
        connection.execute(sql)
    return Study(str(copy), str(catalog.parents[1]))


@pytest.mark.parametrize(
    ("sql", "question", "says"),
    [
        ("UPDATE runs SET sae_digest = 'other'", "encode", "planted is neither in .*/sae nor in .*/champions, at least not the version"),
        ("DROP TABLE meanings", "search_text", "has no relation meanings, as an older version .* again with `dvc repro catalog`"),
        ("DELETE FROM meanings", "search_text", "has no meanings of planted, as no latent fires or its model has no joint"),
        (
            """UPDATE runs SET params = '{"extract": {"source": "files", "model": "drawn"}}'""",
            "encode",
            "the activations of planted were imported from files, so its model is not known",
        ),
        ("UPDATE runs SET params = '{}'", "search_text", "were imported from files"),
        ("UPDATE runs SET sae = 'other'", "encode", "has no SAE 'planted'; it has other"),
    ],
)
def test_what_cannot_be_loaded_says_why(catalog: Path, tmp_path: Path, sql: str, question: str, says: str) -> None:
    study = change(catalog, tmp_path / "changed.duckdb", sql)
    asked: dict[str, Any] = {
        "encode": lambda: study.encode(SAE, png(Image.new("RGB", (48, 32)))),
        "search_text": lambda: study.search_text(SAE, "red", 5),
    }
    with pytest.raises(ModelError, match=says):
        asked[question]()


def test_activations_made_anew_are_not_searched(catalog: Path, tmp_path: Path) -> None:
    study = change(catalog, tmp_path / "changed.duckdb", "UPDATE runs SET activations_digest = 'other'")
    found = study.search_image(SAE, png(Image.new("RGB", (48, 32))), 5)
    assert "were made anew since; run `dvc repro`" in found["problem"] and found["n_images"] == 0


# ---- steering and attribution


def steer(study: Study, names: list[str], latents: list[int], tokens: str = "all", patches: tuple[int, ...] = (), **more: Any) -> Any:
    """Steer latents on a picture of tiles of named colours, at the doses 0, 1 and 2."""
    encoded = png(draw_tiles(np.random.default_rng(0), names))
    return study.steer(SAE, encoded, latents, more.get("doses", [0.0, 1.0, 2.0]), tokens, list(patches), more.get("texts", []))


def named(found: Any, name: str) -> Any:
    return next(row for row in found["names"] if row["name"] == name)


def test_a_planted_latent_takes_an_image_to_its_colour_and_no_control_does(study: Study) -> None:
    green, red = 1, 0
    found = steer(study, ["red"] * 3 + ["grey"] * 3, [green])
    row = named(found, "green")
    assert found["n_names"] == 3 and row["kind"] == "label" and named(found, "blue")["kind"] == "class"
    assert row["rank"] > 1 and row["ranks"][2] == 1 and named(found, "red")["rank"] == 1
    assert row["scores"][0] == row["score"], "to remove a silent latent changes nothing"
    assert set(row["controls"]) == {"untouched", "sign_flipped", "random_latent", "random_direction", "diff_means"}
    for arm in ("sign_flipped", "random_latent", "random_direction"):
        assert all(len(ends) == 2 and ends[0] <= ends[1] for ends in row["controls"][arm])
        assert row["scores"][2] > row["controls"][arm][2][1] + 0.1, arm
    assert row["controls"]["untouched"][0] == row["controls"]["untouched"][2]
    (latent,) = found["latents"]
    assert latent["latent"] == green and latent["act"] == 0 and latent["scale"] > 0 and latent["heat"] == [0.0] * 6
    assert any("silent on the image" in text for text in found["warnings"])
    (on_red,) = steer(study, ["red"] * 3 + ["grey"] * 3, [red])["latents"]
    assert [act > 0 for act in on_red["heat"]] == [True] * 3 + [False] * 3 and on_red["act"] == max(on_red["heat"])


def test_few_live_latents_give_fewer_draws(study: Study) -> None:
    assert steer(study, ["red"] * 6, [1])["n_draws"] == 2


def test_only_chosen_tokens_are_edited(study: Study) -> None:
    tiles = ["green", "grey", "grey", "red", "grey", "grey"]
    whole = steer(study, tiles, [1])
    one, every = (steer(study, tiles, [1], "patches", chosen) for chosen in ((5,), (0, 1, 2, 3, 4, 5)))
    assert every["names"] == whole["names"], "all patches are all tokens"
    plain = named(whole, "green")["score"]
    assert plain < named(one, "green")["scores"][2] < named(whole, "green")["scores"][2]
    firing = steer(study, tiles, [1], "firing", doses=[0.0])
    there = steer(study, tiles, [1], "patches", (0,), doses=[0.0])
    assert named(firing, "green")["scores"] == named(there, "green")["scores"] < [plain]


def test_typed_texts_are_compared_first(study: Study) -> None:
    found = steer(study, ["red"] * 6, [2], texts=["something blue", "red"])
    assert {row["name"]: row["kind"] for row in found["names"]} == {
        "something blue": "text",
        "red": "text",
        "blue": "label",
        "green": "class",
    }
    assert found["n_names"] == 4 and sorted(row["rank"] for row in found["names"]) == [1, 2, 3, 4]


def test_without_classes_labels_are_compared_and_without_labels_typed_texts(study: Study) -> None:
    subject = study._subject(SAE)
    vars(subject)["classes"] = {}
    found = steer(study, ["red"] * 6, [1])
    assert {row["name"]: row["kind"] for row in found["names"]} == {"green": "label", "red": "other", "blue": "other"}
    subject = study._subject(SAE)
    vars(subject)["labels"] = {}
    study._describe.cache_clear()
    study.load("study", SAE)
    with pytest.raises(InputError, match="texts: the study's images have no classes, and no latent has a label; type a text to compare"):
        steer(study, ["red"] * 6, [1])
    assert [(row["name"], row["rank"]) for row in steer(study, ["red"] * 6, [1], texts=["red"])["names"]] == [("red", 1)]


def test_several_latents_are_steered_with_a_warning(study: Study) -> None:
    found = steer(study, ["grey"] * 6, [2, 0])
    assert [one["latent"] for one in found["latents"]] == [2, 0] and "do not compose" in found["warnings"][0]
    with pytest.raises(InputError, match=r"latents: there is no control, as only 1 live latents differ .* steer fewer latents at once"):
        steer(study, ["grey"] * 6, [1, 2])


@pytest.mark.parametrize(
    ("latents", "tokens", "patches", "says"),
    [
        ([DEAD], "all", (), "latent 4 is dead"),
        ([99], "all", (), "latent 99 does not exist"),
        ([1], "patches", (0, 6), "patches: got 6; the image has 2 x 3 patches, 0 to 5"),
        ([1], "cls", (), "no class token is kept"),
    ],
)
def test_what_cannot_be_steered_says_why(study: Study, latents: list[int], tokens: str, patches: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        steer(study, ["red"] * 6, latents, tokens, patches)


def test_steering_needs_the_study_of_the_catalogue(catalog: Path, tmp_path: Path) -> None:
    other = change(catalog, tmp_path / "changed.duckdb", "UPDATE runs SET activations_digest = 'other'")
    with pytest.raises(ModelError, match=r"the study in .* is not the one that the catalogue was built from; run `dvc repro`"):
        other.load("study", SAE)
    shutil.copyfile(catalog, tmp_path / "catalog.duckdb")
    with pytest.raises(
        ModelError, match=r"an edit is made with the study that the catalogue was built from, which is not at hand: .*nowhere"
    ):
        Study(str(tmp_path / "catalog.duckdb"), str(tmp_path / "nowhere")).load("study", SAE)


def test_latents_that_speak_for_a_colour_are_found_where_it_is(study: Study) -> None:
    encoded = png(draw_tiles(np.random.default_rng(0), ["red", "green", "grey", "grey", "grey", "grey"]))
    found = study.attribute(SAE, encoded, ["green", "red"])
    effects = {one["latent"]: one for one in found["latents"]}
    assert effects[1]["effect"] > 0 > effects[0]["effect"] and DEAD not in effects
    assert max(range(6), key=effects[1]["heat"].__getitem__) == 1 and min(range(6), key=effects[0]["heat"].__getitem__) == 0
    sizes = [abs(one["effect"]) for one in found["latents"]]
    assert sizes == sorted(sizes, reverse=True) and found["n_firing"] == len(sizes) and found["measure"] == "cosine"
    assert found["others"] == [], "all that fire are listed"
    alone = study.attribute(SAE, encoded, ["green"]), study.attribute(SAE, encoded, ["red"])
    assert found["score"] == pytest.approx(alone[0]["score"] - alone[1]["score"], abs=1e-5)
    with pytest.raises(InputError, match="texts 'red' and 'reddish' are the same to tiles: give other words"):
        study.attribute(SAE, encoded, ["red", "reddish"])


def test_of_many_latents_some_others_are_drawn_for_scale(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = png(draw_tiles(np.random.default_rng(0), ["red", "green", "grey", "grey", "grey", "grey"]))
    whole = study.attribute(SAE, encoded, ["green", "red"])
    monkeypatch.setattr(model_worker, "N_ATTRIBUTED", 1)
    monkeypatch.setattr(model_worker, "N_DRAWN", 2)
    found = study.attribute(SAE, encoded, ["green", "red"])
    effects = {one["latent"]: one["effect"] for one in whole["latents"]}
    assert len(effects) > 3 and len(found["latents"]) == 1 and len(found["others"]) == 2
    assert all(any(other == pytest.approx(effect, abs=1e-6) for effect in effects.values()) for other in found["others"])


def test_a_model_without_texts_is_read_by_classes(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TileModel()
    model.d_embed = None  # type: ignore[assignment]
    use_tile_model(monkeypatch, model)
    study = Study(str(catalog), str(catalog.parents[1]))
    found = steer(study, ["red"] * 3 + ["grey"] * 3, [1])
    row = named(found, "green")
    assert found["measure"] == "logit" and {name["kind"] for name in found["names"]} == {"class"}
    assert row["rank"] > 1 and row["ranks"][2] == 1
    encoded = png(draw_tiles(np.random.default_rng(0), ["red", "green", "grey", "grey", "grey", "grey"]))
    effects = {one["latent"]: one["effect"] for one in study.attribute(SAE, encoded, ["green", "red"])["latents"]}
    assert effects[1] > 0 > effects[0]
    says = "texts: tiles has no text tower, so its output can only be compared with classes; leave texts empty"
    with pytest.raises(InputError, match=says):
        steer(study, ["red"] * 6, [1], texts=["red"])
    with pytest.raises(InputError, match="'a red tile' is not among the names that are read from the output: 'blue', 'green', 'red'"):
        study.attribute(SAE, encoded, ["a red tile"])
