"""Proves the Python API: an image of a study gets the activations that the catalogue holds, examples in docs run, and the import is light.

A study of drawn tiles is made through the stages; docstrings and pages run beside it, as a user's notebook would.
"""

import doctest
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ommatid
from ommatid.errors import ArtefactError, ConfigError, InputError, ModelError
from ommatid.stage import load
from ommatid.store.filesystem import open_folder
from support.activations import draw_activations
from support.study import CHECKOUT, make_test_params, run_verb
from support.tiles import COLOURS, draw_tiles, png, use_tile_model, write_tile_folder

PAGE = CHECKOUT / "docs/users/python.md"
N_IMAGES = 200


@pytest.fixture(scope="module", autouse=True)
def _checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A finished study in `data`, and pictures with the names used in the examples."""
    root = tmp_path_factory.mktemp("checkout")
    write_tile_folder(root / "photos", N_IMAGES)
    (root / "words.txt").write_text("\n".join(COLOURS))
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": 24, "k": 2, "epochs": 20, "batch_size": 64, "lr": 0.01, "max_dead": 1.0, "patience": None},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    rng = np.random.default_rng(7)
    for name, colour in (("cat.jpg", "red"), ("dog.jpg", "blue")):
        draw_tiles(rng, ["grey", colour] * 3).save(root / name, quality=95)
    np.save(root / "x.npy", draw_activations()[:2000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_tile_model(patch)
        assert [run_verb(stage) for stage in ("images", "extract", "train", "evaluate", "label", "intervene", "catalog")] == [0] * 7
        yield


@pytest.fixture
def run() -> Iterator[ommatid.Run]:
    with ommatid.open_run("data") as opened:
        yield opened


def test_activations_of_images_of_the_study_equal_its_firings(run: ommatid.Run) -> None:
    """Both are float16; the remaining difference is the order in which products are summed in other batches."""
    rows = run.artefacts["images"].read("images", ["image", "split", "encoded"]).to_pylist()
    rows = [row for row in rows if row["split"] == "eval"]
    found = run.encode([row["encoded"] for row in rows])
    place = {row["image"]: i for i, row in enumerate(rows)}
    wanted = torch.zeros_like(found.acts)
    for image, latent, act in run.catalog.rows("SELECT image, latent, act FROM firings"):
        wanted[place[image], latent] = act
    assert len(rows) > 50 and (wanted > 0).sum() > 100
    assert torch.allclose(found.acts, wanted, rtol=1e-5, atol=1e-5)
    assert ((found.acts > 0) == (wanted > 0)).all()


def test_heat_maps_of_images_of_the_study_equal_those_of_its_examples(run: ommatid.Run) -> None:
    examples = run.catalog.rows("SELECT image, latent, heat, rows, cols FROM examples WHERE heat IS NOT NULL LIMIT 40")
    encoded = {row["image"]: row["encoded"] for row in run.artefacts["images"].read("images", ["image", "encoded"]).to_pylist()}
    assert len(examples) == 40
    for image, latent, heat, rows, cols in examples:
        found = run.encode(encoded[image])
        assert torch.allclose(found.heat(0, [latent])[0], torch.tensor(heat).view(rows, cols), rtol=1e-5, atol=1e-5)
        assert found.heat(0)[latent].max() == found.acts[0, latent]
        assert found.boxes == ((0, 0, 48, 32),)


def test_top_lists_firing_latents_with_their_features(run: ommatid.Run) -> None:
    found = run.encode(["cat.jpg", "dog.jpg"])
    rows, features = found.top(3), run.features()
    assert rows.columns.tolist() == ["image", "latent", "label", "act", "label_score", "max_act", "ms", "density"]
    for i, name in enumerate(found.images):
        mine = rows[rows.image == name]
        strongest = found.acts[i].sort(descending=True).values[:3]
        assert mine.act.tolist() == strongest[strongest > 0].tolist()
        assert mine.label.tolist() == features.label[mine.latent].tolist()
    everything = found.top(None)
    assert len(everything) == int((found.acts > 0).sum()) and len(found.top(1)) == 2
    assert "red" in rows.label[rows.image == "cat.jpg"].tolist()


def test_an_image_gives_the_same_activations_in_every_form(run: ommatid.Run) -> None:
    with Image.open("cat.jpg") as opened:
        array = np.asarray(opened)
        given: list[Any] = ["cat.jpg", Path("cat.jpg"), Path("cat.jpg").read_bytes(), opened, array, Image.fromarray(array).convert("RGBA")]
        found = run.encode(given)
    assert found.images == ("cat.jpg", "cat.jpg", "2", "3", "4", "5")
    assert (found.x == found.x[0]).all()
    assert (run.encode(np.stack([array, array])).x == found.x[:2]).all() and len(run.encode(array)) == len(run.encode("cat.jpg")) == 1


def test_pillow_images_are_turned_upright_like_files(run: ommatid.Run) -> None:
    image = draw_tiles(np.random.default_rng(0), ["red", "grey", "grey"] * 2)
    exif = image.getexif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    found = run.encode([buffer.getvalue(), Image.open(buffer), png(image.rotate(180)), png(image)])
    assert (found.x[:3] == found.x[0]).all() and not torch.equal(found.x[0], found.x[3])


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (["cat.jpg", "none.jpg"], "image none.jpg: No such file or directory"),
        (["params.yaml"], "image params.yaml: not_an_image"),
        (["photos"], "image photos: Is a directory"),
        (["cat.jpg", b""], "image 1: empty: 0 bytes"),
        ([np.zeros((3, 8, 8), np.uint8)], r"image 0 is an array of uint8 \(3, 8, 8\); it must be a path"),
        ([np.zeros((8, 8, 3))], "image 0 is an array of float64"),
        ([7], "image 0 is of type int"),
        ([], "no images were given"),
    ],
)
def test_images_that_cannot_be_read_are_named(images: Any, says: str, run: ommatid.Run) -> None:
    with pytest.raises(InputError, match=says):
        run.encode(images)


def test_a_folder_that_is_not_a_study_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nowhere holds no finished study: .*make it with `dvc repro train`"):
        ommatid.open_run("nowhere")
    with pytest.raises(ArtefactError, match=r"; did you mean .*/data\?$"):
        ommatid.open_run(Path.cwd())


def test_one_of_several_saes_is_chosen_by_name_and_must_match_the_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("data", "two")
    assert run_verb("train", "--data", "two", "--set", "train.runs=[{k: 2}, {k: 3}]") == 0
    run = ommatid.open_run("two")
    assert len(run.saes) == 2
    for use in (run.sae, run.features, lambda: run.encode("cat.jpg")):
        with pytest.raises(ConfigError, match=f"two has 2 SAEs; name one of them: {', '.join(run.saes)}"):
            use()
    with pytest.raises(ConfigError, match=f"two has no SAE 'other'; it has {run.saes[0]}, "):
        run.sae("other")
    assert [run.sae(name).config.k for name in run.saes] == [2, 3]
    with pytest.raises(ArtefactError, match="two/evaluation was made from another version of two/sae; run `dvc repro evaluate`"):
        run.encode("cat.jpg", run.saes[1])
    with pytest.raises(
        ArtefactError, match=f"two/catalog has no features of {run.saes[1]}-.*, as it was built before that SAE was trained"
    ):
        run.features(run.saes[1])
    run.close()


def test_activations_from_files_have_no_model_to_encode_images_with(capsys: pytest.CaptureFixture[str]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["extract"] = {"source": "files", "path": "x.npy", "name": "planted", "model": "drawn"}
    params["train"] |= {"d_sae": 48, "k": 4, "epochs": 2, "batch_size": 256}
    Path("files.yaml").write_text(yaml.safe_dump(params))
    assert [run_verb(stage, "--data", "files", "--params", "files.yaml") for stage in ("extract", "train")] == [0, 0]
    run = ommatid.open_run("files")
    with pytest.raises(ModelError, match=r"files: its activations were imported from files.*run.sae\(\).encode\(x\)"):
        run.encode("cat.jpg")
    assert run.sae().encode(torch.from_numpy(draw_activations()[:5]).float()).shape == (5, 48)
    assert list(run.artefacts) == ["extract", "train"]


def test_a_study_in_an_object_store_is_opened_by_its_url(run: ommatid.Run, s3: str) -> None:
    shutil.copytree("data", "copy", ignore=shutil.ignore_patterns(".*"))
    for path in [path for path in Path("copy").rglob("*") if path.is_file()]:
        open_folder(s3).put(path, path.relative_to("copy").as_posix())  # moves it
    with ommatid.open_run(s3) as there:
        assert list(there.artefacts) == list(run.artefacts)
        assert there.encode("cat.jpg").top().equals(run.encode("cat.jpg").top())


def test_fvu_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"x has the shape \(2, 3\) and x_hat \(2, 4\)"):
        ommatid.fvu(np.zeros((2, 3)), torch.zeros(2, 4))
    with pytest.raises(InputError, match="not finite"):
        ommatid.fvu(np.full((2, 3), np.nan), np.zeros((2, 3)))
    x, x_hat = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)).half()
    by_hand = (x.double() - x_hat.double()).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert ommatid.fvu(x, x_hat.numpy()) == pytest.approx(float(by_hand))


# ---- examples


def public() -> dict[str, Any]:
    """Return everything that `import ommatid` offers, with the public members of its classes."""
    found: dict[str, Any] = {name: getattr(ommatid, name) for name in ommatid.__all__}
    for one in (ommatid.Run, ommatid.Encoding, ommatid.Intervention, ommatid.Contributions):
        members = {name: value for part in reversed(one.__mro__[:-1]) for name, value in vars(part).items() if not name.startswith("_")}
        found |= {f"{one.__name__}.{name}": value for name, value in members.items() if getattr(value, "__doc__", None)}
    return {"ommatid": ommatid, **found}


@pytest.mark.parametrize("name", public())
def test_the_example_of_a_docstring_runs(name: str) -> None:
    described = public()[name]
    if name in ("Run.close",):
        return  # shown by Run
    text = inspect.getdoc(described)
    assert text and ">>>" in text, f"{name} has no example"
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert not said, "".join(said)


def test_the_page_on_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert 0 < names["unexplained"] < 1 and len(names["where"]) == 6 and names["scores"].round(2).tolist() == [0.99, 0.0]


def test_the_import_loads_no_other_library() -> None:
    code = "import json, sys; before = {*sys.modules}; import ommatid; dir(ommatid); print(json.dumps(sorted({*sys.modules} - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "ommatid" in loaded and loaded <= {"ommatid", *sys.stdlib_module_names}


def test_public_names_are_listed_and_unknown_ones_raise() -> None:
    assert set(ommatid.__all__) <= set(dir(ommatid))
    with pytest.raises(AttributeError, match="module 'ommatid' has no attribute 'open'; it has Answers, Catalog, "):
        ommatid.open  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ommatid.catalog:Catalog", "ommatid:Catalog"),
        ("ommatid.stage:open_stage", "ommatid.pipeline:open_stage"),
        ("ommatid.images.drawing:draw", "ommatid.images.figure:draw"),
        ("ommatid.sae.interop:Told", "ommatid.sae.interop:Overrides"),
    ],
)
def test_an_old_name_still_works_and_names_the_new_one(old: str, new: str) -> None:
    sys.modules.pop("ommatid.images.drawing", None)  # it warns when it is imported
    with pytest.warns(DeprecationWarning, match=f"{old.rpartition(':')[0]}.* is now ".replace(".", r"\.", 1)):
        found = load(old)
    assert found is load(new)
