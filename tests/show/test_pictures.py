"""Pictures of every kind of feature are PNGs of the expected size that show the feature's own images and heat maps."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ommatid.catalog.question import choose_sae
from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError
from ommatid.show.pictures import draw_best, draw_comparison, draw_feature
from ommatid.show.pictures.best import ROW
from ommatid.show.pictures.feature import GUTTER, TOP, _numbers
from ommatid.show.pictures.page import MARGIN, SIDE, Example, overlaid
from support import catalog as catalog_artefacts

WIDTH = 1326


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def drawn(file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    folder = tmp_path_factory.mktemp("pictures") / "made" / "here"
    with Catalog(file) as catalog:
        for latent in range(4):
            draw_feature(catalog, latent, folder / f"latent-{latent}.png")
    assert sorted(path.name for path in folder.iterdir()) == [f"latent-{latent}.png" for latent in range(4)]
    return [pixels(folder / f"latent-{latent}.png") for latent in range(4)]


def test_pages_have_equal_widths_and_space_for_their_rows(drawn: list[np.ndarray]) -> None:
    assert {page.shape[1] for page in drawn} == {WIDTH}
    # decile 10 with its heat maps, then the deciles 5 and 1; without heat maps one row of pictures less
    assert drawn[0].shape[0] >= TOP + 2 * SIDE + 2 * SIDE
    assert all(page.shape[0] < 1200 for page in drawn)


def test_pages_of_different_features_differ(drawn: list[np.ndarray]) -> None:
    for a in range(4):
        for b in range(a):
            assert drawn[a].shape != drawn[b].shape or (drawn[a] != drawn[b]).mean() > 0.01


def test_the_first_tile_is_the_strongest_image_and_the_heat_lies_below(catalog: Catalog, drawn: list[np.ndarray]) -> None:
    ((webp,),) = catalog.rows("SELECT thumbnail FROM images WHERE image = 0")
    thumbnail = np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))
    tile = drawn[0][TOP : TOP + SIDE, MARGIN + GUTTER : MARGIN + GUTTER + SIDE]
    assert np.array_equal(tile, thumbnail.repeat(3, axis=0).repeat(3, axis=1))
    below = drawn[0][TOP + SIDE + 2 : TOP + 2 * SIDE + 2, MARGIN + GUTTER : MARGIN + GUTTER + SIDE].astype(int)
    change = np.abs(below - tile.astype(int)).sum(2)
    # HEAT is 0 1 / 2 4: the lower right corner is the hottest
    assert change[-5, -5] > change[5, 5] + 30


def test_the_same_input_gives_the_same_bytes(catalog: Catalog, tmp_path: Path) -> None:
    for name in "ab":
        draw_feature(catalog, 1, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("causal", "words"), [("reads_only", ["reads only"]), ("untested", []), (None, [])])
def test_a_page_says_what_the_feature_does_if_that_was_tested(catalog: Catalog, causal: str | None, words: list[str]) -> None:
    (feature,) = catalog.ask("SELECT * FROM features ORDER BY sae, latent LIMIT 1").dicts()
    assert _numbers({**feature, "causal": causal})[5:] == words


@pytest.mark.parametrize("latent", [4, -1])
def test_an_unknown_latent_names_the_range(catalog: Catalog, tmp_path: Path, latent: int) -> None:
    with pytest.raises(QueryError, match=f"no latent {latent}; {catalog_artefacts.SAE} has 0 to 3"):
        draw_feature(catalog, latent, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.png").mkdir()
    for path, why in ((tmp_path / "file" / "x.png", f"{tmp_path / 'file'} is not a folder"), (tmp_path / "taken.png", "Is a directory")):
        with pytest.raises(QueryError, match=f"{path}: cannot be written: {why}; name another place with --to FILE"):
            draw_feature(catalog, 0, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.png"]


def test_heat_covers_the_part_of_the_image_that_the_model_sees() -> None:
    wide = Image.new("RGB", (40, 20), (128, 128, 128))
    tile = overlaid(Example(10, 1.0, np.ones((2, 2), np.float32), wide, (0.5, 1.0)), 1.0, side=80)
    hot = (tile != overlaid(Example(10, 1.0, None, wide, (0.5, 1.0)), 1.0, side=80)).any(axis=2)
    rows, cols = np.nonzero(hot)
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (20, 60, 20, 60)


def test_the_contact_sheet_shows_the_best_features_with_enough_images(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_best(catalog, tmp_path / "none.png")
    monkeypatch.setattr("ommatid.show.pictures.best.MIN_IMAGES", 2)
    draw_best(catalog, tmp_path / "two.png", n=5)
    draw_best(catalog, tmp_path / "one.png", n=1)
    heights = [pixels(tmp_path / f"{name}.png").shape[0] for name in ("none", "one", "two")]
    assert heights[0] < heights[1] < heights[2]
    assert heights[2] - heights[1] == ROW


def test_show_writes_the_picture_and_prints_its_path(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from ommatid.cli import main; main()", "show", "0", "--catalog", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(file.parents[1] / "pictures/latent-0.png"), done.stderr  # below the root of the catalogue's study
    assert pixels(Path(done.stdout.strip())).shape[1] == WIDTH


# ---- several SAEs


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    names = [catalog_artefacts.NAME, catalog_artefacts.OTHER]
    catalog_artefacts.build(root, catalog_artefacts.make_inputs(root, names=names))
    return catalog_artefacts.path_in(root)


def test_the_best_sae_is_shown_unless_one_is_named_by_either_of_its_names(several: Path) -> None:
    with Catalog(several) as catalog:
        assert choose_sae(catalog) == catalog_artefacts.SAE
        for name in (catalog_artefacts.OTHER, f"{catalog_artefacts.OTHER}-00000000"):
            assert choose_sae(catalog, name) == f"{catalog_artefacts.OTHER}-00000000"


def test_an_unknown_sae_is_an_error_that_lists_the_known_ones(several: Path) -> None:
    says = (
        f"no SAE 'batch_topk-4-k2-s1'; did you mean {catalog_artefacts.NAME}\\? .* has {catalog_artefacts.NAME}, {catalog_artefacts.OTHER}"
    )
    with Catalog(several) as catalog, pytest.raises(QueryError, match=says):
        choose_sae(catalog, "batch_topk-4-k2-s1")


def test_a_picture_is_of_the_named_sae(several: Path, tmp_path: Path) -> None:
    with Catalog(several) as catalog:
        draw_feature(catalog, 1, tmp_path / "best.png")
        draw_feature(catalog, 1, tmp_path / "other.png", catalog_artefacts.OTHER)
        with pytest.raises(QueryError, match=f"no latent 2; {catalog_artefacts.OTHER}-00000000 has 0 to 1"):
            draw_feature(catalog, 2, tmp_path / "x.png", catalog_artefacts.OTHER)
    assert (tmp_path / "best.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_a_comparison_has_a_row_for_each_sae(several: Path, file: Path, tmp_path: Path) -> None:
    heights = []
    for path in (file, several):
        with Catalog(path) as catalog:
            draw_comparison(catalog, tmp_path / "comparison.png")
        heights.append(pixels(tmp_path / "comparison.png").shape[0])
    assert heights[1] - heights[0] == 22
