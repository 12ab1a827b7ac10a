"""Proves `ommatid steer` and `ommatid attribute`, and `Run.intervene` and `Run.attribute` behind them, on a study whose truth is planted.

Of the SAE's latents three write a colour that the model reads, and the others where it does not read (tests/support/readers.py). Bad input
is refused with one line that says what to do, before the model is loaded wherever that is possible.
"""

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ommatid
from ommatid.errors import ArtefactError, InputError, ModelError
from ommatid.extract import networks
from ommatid.sae.model import SAE
from ommatid.store import Draft
from ommatid.vlm import Captured, Hookpoint, Replacement
from support.readers import D_MODEL, N_READERS, plant, wide_tile_model
from support.study import run_verb
from support.tile_study import make_tile_study
from support.tiles import GRID, TileModel, draw_tiles, use_tile_model

RED, GREEN, BLUE = range(3)
CHANGES: dict[str, Any] = {
    "train": {"d_sae": 3 + N_READERS, "k": 1},
    "intervene": {"latents": {"kind": "listed", "latents": [RED, GREEN, 20]}, "n_images": 32, "draws": 20, "max_drift": 1.0},
}


@pytest.fixture(scope="module", autouse=True)
def _study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A study in `data`, and pictures with a red tile at the bottom right, and with a blue tile there."""
    root = tmp_path_factory.mktemp("study")
    with wide_tile_model(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        make_tile_study(root, plant, **CHANGES)
        rng = np.random.default_rng(7)
        for name, colour in (("red.png", "red"), ("blue.png", "blue")):
            draw_tiles(rng, ["grey"] * 5 + [colour]).save(root / name)
        use_tile_model(patch)
        yield


@pytest.fixture
def run() -> Iterator[ommatid.Run]:
    with ommatid.open_run("data") as opened:
        yield opened


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it a fault to load the model."""

    def fail(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(networks, "load_model", fail)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed since the last call, on both streams."""
    return "".join(capsys.readouterr())


# ---- steer


def test_steer_prints_the_names_before_and_after_beside_every_control(capsys: pytest.CaptureFixture[str], run: ommatid.Run) -> None:
    assert run_verb("steer", "blue.png", "--latent", f"{RED}", "--dose", "0,1") == 0
    lines = said(capsys).splitlines()
    assert lines[0] == "blue.png: latent 0 (red) is silent"
    at = lines.index(next(line for line in lines if line.startswith("dose 1: latent 0 set to ")))
    heading, red = lines[at + 1].split("  "), next(line for line in lines[at + 2 :] if line.startswith("  red "))
    for arm in ("before", "after", "sign flipped", "random latents", "random directions", "diff. of means", "x̂, no edit"):
        assert any(arm == cell.strip() for cell in heading), arm
    found = run.intervene("blue.png", RED, [0, 1])
    p = found.steered.log_p_abn.exp()[:, 0, found.names.index("red")]
    ranks = found.steered.ranks_abn[:, 0, found.names.index("red")]
    key = {(key.name, key.dose): place for place, key in enumerate(found.steered.arms)}
    before, after = key["none", None], key["targeted", 1.0]
    assert int(ranks[before]) > 1 == int(ranks[after]) and p[after] > p[before]
    star = " *" if found.steered.beyond(0, 1.0)[found.names.index("red")] else "  "
    assert f" {100 * float(p[before]):.1f} % #{int(ranks[before])} " in red and f" {100 * float(p[after]):.1f} % #1{star}" in red
    drawn = found.steered.of(found.steered.log_p_abn.exp(), "random_latent", 1.0)[:, 0, found.names.index("red")]
    assert f"[{100 * float(drawn.min()):.1f}, {100 * float(drawn.max()):.1f}]" in red
    assert any(line.startswith("warning: latent 0 is silent on the image: to remove it there") for line in lines)


def test_names_in_the_table_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("steer", "red.png", "--latent", "0", "--dose", "1", "--text", "red\nand round", "--text", "blue " * 1000) == 0
    lines = said(capsys).splitlines()
    assert any(line.startswith("  red and round  ") for line in lines) and max(map(len, lines)) < 300


def test_doses_are_printed_both_ways(capsys: pytest.CaptureFixture[str], run: ommatid.Run) -> None:
    (one,) = run.subject()[1].describe([RED])
    assert run_verb("steer", "red.png", "--latent", "0", "--dose", "0.5") == 0
    assert f"dose 0.5: latent 0 set to {0.5 * one.scale:.3g}, 0.5 times its 99th percentile" in said(capsys)
    assert run_verb("steer", "red.png", "--latent", "0", "--dose", "0.5", "--absolute") == 0
    assert f"dose 0.5: latent 0 set to 0.5, {0.5 / one.scale:.3g} times its 99th percentile" in said(capsys)


def test_results_are_written_as_picture_table_and_json(capsys: pytest.CaptureFixture[str], run: ommatid.Run, tmp_path: Path) -> None:
    for ending in ("png", "csv", "json"):
        file = tmp_path / "new" / f"steered.{ending}"
        assert run_verb("steer", "red.png", "blue.png", "--latent", "0", "--latent", "1", "--dose", "1", "--out", str(file)) == 0
        assert said(capsys).splitlines()[-1] == str(file)
    found = run.intervene(["red.png", "blue.png"], [RED, GREEN], [1])
    with Image.open(tmp_path / "new/steered.png") as picture:
        assert picture.width > 1000 and len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 100
    with (tmp_path / "new/steered.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = found.table()
    assert len(rows) == len(table) == 2 * (2 + 5) * 3 and list(rows[0]) == table.columns.tolist()
    assert [float(row["score"]) for row in rows] == pytest.approx(table.score.tolist())
    read = json.loads((tmp_path / "new/steered.json").read_text())
    assert read["warnings"] == list(found.warnings) and [one["latent"] for one in read["latents"]] == [RED, GREEN]
    assert read["doses"][0]["relative"] == pytest.approx([1, 1]) and len(read["rows"]) == len(table)
    for attributed in ("png", "csv", "json"):
        assert run_verb("attribute", "red.png", "--text", "red", "--out", str(tmp_path / f"attributed.{attributed}")) == 0
    read = json.loads((tmp_path / "attributed.json").read_text())
    assert read["images"][0]["completeness"]["difference"] != 0 and read["rows"][0]["latent"] == RED


def test_a_mask_and_its_patches_are_the_same(run: ommatid.Run, tmp_path: Path) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[16:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = [
        run.intervene("red.png", RED, [0], patches=patches)
        for patches in ([(1, 2)], np.arange(6).reshape(GRID) == 5, (np.arange(6).reshape(1, *GRID) == 5), Image.open(tmp_path / "mask.png"))
    ]
    for one in found[1:]:
        assert torch.equal(one.steered.scores_abn, found[0].steered.scores_abn)
    everywhere, elsewhere = run.intervene("red.png", RED, [0]), run.intervene("red.png", RED, [0], patches=[(0, 0)])
    assert torch.equal(found[0].scores("targeted", 0), everywhere.scores("targeted", 0))
    assert torch.equal(elsewhere.scores("targeted", 0), elsewhere.scores("none"))


# ---- attribute


def test_attribution_names_the_planted_latents_and_where_they_fire(capsys: pytest.CaptureFixture[str], run: ommatid.Run) -> None:
    found = run.attribute(["red.png", "blue.png"], ["red", "blue"], top=4)
    (one, other), rows = found.of, found.table()
    assert one.effects_s[RED] > 0 > other.effects_s[BLUE]
    assert found.top(0)[0] == RED and found.top(1)[0] == BLUE
    assert one.effects_s[3:].abs().max() < 1e-5 * one.effects_s[RED]
    first = rows[rows["rank"] == 1]
    assert first.image.tolist() == ["red.png", "blue.png"] and first.label.tolist() == ["red", "blue"]
    assert (first.row.tolist(), first.col.tolist()) == ([1, 1], [2, 2])
    assert first.effect.tolist() == pytest.approx(first.at_patch.tolist(), rel=1e-4)
    assert first.causal.tolist() == ["causal", "untested"]
    assert (first.exact * first.effect > 0).all()
    assert run_verb("attribute", "red.png", "--text", "red", "--text", "blue") == 0
    text = said(capsys)
    assert text.startswith("red.png: 'red' − 'blue' is ") and "row 1, column 2" in text and "effective number of latents: 1.0" in text


@pytest.mark.parametrize("method", ["cheap", "integrated", "exact"])
def test_methods_agree_on_the_sign_and_only_exact_ones_are_not_compared(method: Any, run: ommatid.Run) -> None:
    found = run.attribute("red.png", class_name="red", method=method)
    (one,) = found.of
    assert found.output == "log-odds of 'red'" and one.effects_s[RED] > 0 and one.sparsity == pytest.approx(1, abs=1e-3)
    assert (one.agreement is None, one.completeness is None) == (method == "exact",) * 2
    if method == "exact":
        assert one.exact[RED] == one.effects_s[RED]


def test_effects_that_do_not_add_up_are_warned_of(run: ommatid.Run) -> None:
    """The similarity is a cosine, which is far from linear between the mean activation, where the output is small, and the image."""
    found = run.attribute("red.png", ["red"])
    (one,) = found.of
    assert one.completeness and one.completeness.gap > 0.05 * abs(float(one.completeness.difference_b[0]))
    assert any(warning.startswith("red.png: cheap effects do not add up") for warning in found.warnings)


class LayeredTiles(TileModel):
    """A tile model with another hookpoint, whose tokens are those of the first, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(1))).Q
        self.hookpoints = {name: Hookpoint(D_MODEL, ("cls",), GRID) for name in ("tiles", "late")}

    def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
        found = super().capture(pixels, ["tiles"])
        tokens = {"tiles": found.tokens["tiles"], "late": found.tokens["tiles"] @ self.turn}
        return Captured({name: tokens[name] for name in hookpoints}, found.embedding)

    def splice(
        self, pixels: torch.Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        if hookpoint == "late":
            back = [lambda tokens, replace=replace: replace(tokens @ self.turn) @ self.turn.T for replace in replacements]
            return super().splice(pixels, "tiles", back)
        if read is None:
            return super().splice(pixels, hookpoint, replacements)
        tokens = self.capture(pixels, [hookpoint]).tokens[hookpoint]
        return tuple(replace(tokens) @ self.turn for replace in replacements)


BOTH = {"extract": {"hookpoints": ["tiles", "late"], "tokens": "patch", "dtype": "float32"}}


def plant_changed(change: Callable[[SAE], dict[str, torch.Tensor]], **config: Any) -> Callable[[Any, Any, Draft], Any]:
    """Return a function that plants the SAE with some tensors and values of its configuration changed."""

    def plant_it(params: Any, inputs: Any, draft: Draft) -> Any:
        made = plant(params, inputs, draft)
        sae = SAE.load(made.path)
        changed = SAE(dataclasses.replace(sae.config, **config), **{**sae.tensors(), **change(sae)})
        for file in made.path.iterdir():
            file.unlink()
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
            changed.save(weights, cfg)
        return draft.seal({"sae": "planted", "dead_latents": []})

    return plant_it


def test_a_transcoder_is_edited_where_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transcoder that reads the first hookpoint and writes what the second has there has the latents of the first SAE."""
    model = LayeredTiles()
    planted = plant_changed(lambda sae: {"W_dec": sae.W_dec @ model.turn}, target="late")
    train = {**CHANGES["train"], "hookpoint": "tiles", "target": "late"}
    make_tile_study(tmp_path, planted, model, **{**CHANGES, **BOTH, "train": train})
    use_tile_model(monkeypatch, model)
    with ommatid.open_run("data") as plain, ommatid.open_run(tmp_path / "data") as run:
        found, expected = (of.intervene("blue.png", RED, [0, 1], draws=2) for of in (run, plain))
        assert found.steered.grid == GRID and "diff_means" not in {key.name for key in found.steered.arms}
        for arm, dose in (("none", None), ("untouched", None), ("targeted", 1), ("sign_flipped", 1)):
            assert torch.allclose(found.scores(arm, dose), expected.scores(arm, dose), atol=1e-4), arm
        one, other = (of.attribute("red.png", ["red", "blue"], method="integrated").of[0] for of in (run, plain))
        assert torch.allclose(one.effects_s, other.effects_s, atol=1e-4) and one.effects_s[RED] > 0.01


def test_a_latent_at_a_later_hookpoint_comes_from_the_earlier_latent_of_its_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The turned SAE's latents are those of the first SAE, so that each is caused by the one of the same index."""
    model = LayeredTiles()
    turned = plant_changed(lambda sae: {"W_enc": model.turn.T @ sae.W_enc, "W_dec": sae.W_dec @ model.turn}, hookpoint="late")
    for root, planted in (("early", plant), ("late", turned)):
        train = {**CHANGES["train"], "hookpoint": {"early": "tiles"}.get(root, root)}
        make_tile_study(tmp_path / root, planted, model, **{**CHANGES, **BOTH, "train": train})
    use_tile_model(monkeypatch, model)
    early, late = (str(tmp_path / root / "data") for root in ("early", "late"))
    with ommatid.open_run(early) as run:
        found = run.attribute("red.png", latent_of=(late, RED))
        assert found.top(0)[0] == RED and abs(found.of[0].exact[RED] - found.of[0].value) < 1e-4
        with pytest.raises(InputError, match="latent 2 of planted does not depend on any latent there: it is silent on this image"):
            run.attribute("red.png", latent_of=(late, BLUE))
        with pytest.raises(InputError, match="latent 1 of planted is at tiles, where those of planted are: name one at a later hookpoint"):
            run.attribute("red.png", latent_of=(early, 1))
    assert run_verb("attribute", "red.png", "--data", early, "--latent-of", f"{late}:planted:{RED}") == 0
    assert f"activation of latent {RED} of planted is" in said(capsys)
    with ommatid.open_run(early) as run:
        found = run.circuit("red", late, sizes=[2, 6], draws=4)
        assert {(node.hookpoint, node.latent) for node in found.nodes} == {
            (at, one) for at in ("tiles", "late") for one in (RED, GREEN, BLUE)
        }
        assert (found.edges[0].source, found.edges[0].target) == (RED, RED) and len(found.edges) == 9
    assert run_verb("circuit", "red", "--data", early, "--and-sae", f"{late}:planted", "--size", "6", "--draws", "2") == 0
    shown = said(capsys)
    assert "red at tiles and late: log-odds" in shown and re.search(r"\n0 +0 +[+-]", shown)
    assert run_verb("circuit", "red", "--data", early, "--and-sae", early, "--size", "2") == 1
    assert "both SAEs are at tiles: give a second one at a later hookpoint" in said(capsys)


def test_a_circuit_is_printed_beside_its_controls_and_written(capsys: pytest.CaptureFixture[str], run: ommatid.Run, tmp_path: Path) -> None:
    found = run.circuit("red", sizes=[1, 3], draws=5)
    assert {(node.latent, node.label) for node in found.nodes} == {(RED, "red"), (GREEN, "green"), (BLUE, "blue")} and not found.edges
    rows = found.table().set_index(["arm", "size"]).faithfulness
    assert rows["circuit", 3] > 0.8 > 0.5 > rows["random", 3] and rows["without", 3] < 0.2 < rows["without_random", 3]
    for name in ("red.dot", "red.csv", "red.json"):
        assert run_verb("circuit", "red", "--size", "1,3", "--draws", "5", "--out", str(tmp_path / name)) == 0
        shown = said(capsys)
        assert shown.endswith(f"{tmp_path / name}\n") and "circuit alone" in shown and "all but random ones" in shown
    assert (tmp_path / "red.dot").read_text().startswith("digraph circuit {")
    assert len((tmp_path / "red.csv").read_text().splitlines()) == 1 + len(found.points)
    assert json.loads((tmp_path / "red.json").read_text())["class_name"] == "red"


# ---- bad input

STEER, ATTRIBUTE = ("steer", "red.png", "--latent", "0"), ("attribute", "red.png")


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            (*STEER, "--dose", "0,much"),
            "--dose '0,much': 'much' is not a finite number; expected numbers with commas between, such as 0,0.5",
        ),
        ((*STEER, "--dose", "nan"), "--dose 'nan': 'nan' is not a finite number"),
        ((*STEER, "--dose", "1,inf"), "--dose '1,inf': 'inf' is not a finite number"),
        ((*STEER, "--dose", ""), "--dose '': '' is not a finite number"),
        ((*STEER, "--dose", "1,1"), "--dose '1,1': 1 is given twice"),
        (("steer", "red.png", "--latent", "123"), "latent 123 does not exist; planted has latents 0 to 122"),
        (("steer", "red.png", "--latent", "-1"), "latent -1 does not exist"),
        (("steer", "red.png", "--latent", "0", "--latent", "0"), "latents: 0, 0 names a latent twice; name each once"),
        (("steer", "none.png", "--latent", "0"), "image none.png: No such file or directory"),
        (("steer", "words.txt", "--latent", "0"), "image words.txt: not_an_image"),
        ((*STEER, "--tokens", "some"), "--tokens 'some': expected all, firing, cls"),
        ((*STEER, "--error", "lose"), "--error 'lose': expected keep, drop"),
        (
            (*STEER, "--patches", "1,2 3"),
            "--patches '1,2 3': expected rows and columns of patches, such as '3,4 3,5', or a picture that marks",
        ),
        ((*STEER, "--patches", "small.png"), "patches: the mask has 24 x 16 pixels, but red.png has 48 x 32; make the mask as large as"),
        ((*STEER, "--out", "data"), "data is a folder; name a file that ends in .png, .csv, .json"),
        ((*STEER, "--out", "steered.jpg"), "steered.jpg: results are written as .png, .csv, .json; give the file one of these endings"),
        (
            (*STEER, "--out", "red.png/x.csv"),
            "red.png/x.csv: cannot be written: red.png is not a folder; name another place with --out FILE",
        ),
        ((*STEER, "--sae", "other"), "data has no SAE 'other'; it has planted"),
        ((*STEER, "--data", "nowhere"), "nowhere holds no finished study"),
        (ATTRIBUTE, "an output is one or two --text, a --class or a --latent-of, and none is given: name one"),
        ((*ATTRIBUTE, "--text", "red", "--class", "red"), "and --text and --class are given: name one"),
        ((*ATTRIBUTE, "--text", "a", "--text", "b", "--text", "c"), "--text is given 3 times"),
        ((*ATTRIBUTE, "--class", "rad"), "class 'rad': no evaluation image has it; did you mean 'red'? they have blue, green and red"),
        ((*ATTRIBUTE, "--latent-of", "7"), "--latent-of '7': expected the root of another study, the name of its SAE"),
        ((*ATTRIBUTE, "--text", "red", "--method", "fast"), "--method 'fast': expected cheap, integrated, exact"),
        (("circuit", "rad"), "class 'rad': no evaluation image has it; did you mean 'red'? they have blue, green and red"),
        (("circuit", "red", "--size", "8,x"), "--size '8,x': 'x'; expected numbers above 0, each once, with commas between, such as 8,16"),
        (("circuit", "red", "--size", "4,4"), "--size '4,4': '4'; expected numbers above 0, each once"),
        (("circuit", "red", "--out", "x.png"), "x.png: circuits are written as .dot, .csv, .json; name a file with one of these endings"),
        (("circuit", "red", "--and-sae", "nowhere"), "nowhere holds no finished study"),
        ((*ATTRIBUTE, "--text", "red", "--out", "x.txt"), "x.txt: results are written as .png, .csv, .json"),
        ((*ATTRIBUTE, "--text", "red", "--out", "red.png/x.csv"), "red.png/x.csv: cannot be written: red.png is not a folder"),
        (("circuit", "red", "--out", "red.png/x.csv"), "red.png/x.csv: cannot be written: red.png is not a folder"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (24, 16)).save("small.png")
    assert run_verb(*arguments) == 1
    (line,) = said(capsys).splitlines()
    assert line.startswith(f"error: {says}") or f" {says}" in line, line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patches": [(2, 0)]}, "patches: row 2, column 0 is not a patch; rows are 0 to 1, columns 0 to 2"),
        ({"patches": [(1, 2, 3)]}, r"patches: got \(1, 2, 3\); expected pairs of row and column"),
        ({"patches": np.ones((3, 3), bool)}, r"patches: the mask is \(3, 3\); the model has \(2, 3\) patches"),
        ({"patches": np.zeros(GRID, bool)}, "patches: none is chosen"),
        ({"patches": [(0, 0)], "tokens": "firing"}, "tokens are 'firing' and patches are given as well"),
        ({"tokens": "cls"}, "no class token is kept at tiles"),
        ({"texts": ["red", " "]}, "texts: got ' ', which is empty"),
        ({"texts": ["red", "red"]}, "give one or more, each once"),
        ({"texts": "red"}, r"texts are 'red'; give a list of texts"),
        ({"texts": ["red", None]}, r"texts are \['red', None\]; give a list of texts"),
        ({"doses": [np.nan]}, "doses: got nan"),
        ({"doses": None}, "doses: got None; expected finite numbers"),
        ({"seed": -1}, "seed is -1; it must be a whole number, 0 or above"),
        ({"patches": [1, 2]}, "patches: got 1; expected pairs of row and column"),
        ({"draws": 200}, "only 60 live latents differ from latents"),
    ],
)
def test_what_does_not_fit_the_model_is_named(options: dict[str, Any], says: str, run: ommatid.Run) -> None:
    with pytest.raises(InputError, match=says):
        run.intervene("red.png", RED, **{"draws": 3, **options})


@pytest.mark.parametrize(
    ("latents", "says"), [([], "latents: there are none"), (["3"], "latents: got '3'; expected the indices"), ([True], "latents: got True")]
)
def test_latents_are_indices(latents: Any, says: str, run: ommatid.Run) -> None:
    with pytest.raises(InputError, match=says):
        run.intervene("red.png", latents)


def test_outputs_are_named_one_at_a_time(run: ommatid.Run) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "none is given: name one"),
        ({"texts": ["a"], "class_name": "red"}, "texts and class_name are given: name one"),
        ({"texts": "red"}, "texts are 'red'; give a list"),
        ({"texts": ["a", "b", "c"]}, "give a list of one text, or of two"),
        ({"texts": ["red", "reddish"]}, "texts 'red' and 'reddish' are the same to tiles: give other words"),
        ({"texts": ["a"], "method": "fast"}, "method is 'fast'; allowed values are cheap, integrated, exact"),
        ({"texts": ["a"], "top": 0}, "top is 0; it must be 1 or more"),
        ({"class_name": 3}, "class_name is 3; give the name of a class"),
        ({"latent_of": 5}, "latent_of is 5; give the run of the later SAE or the root"),
    ]
    for options, says in cases:
        with pytest.raises(InputError, match=says):
            run.attribute("red.png", **options)
    with pytest.raises(InputError, match=r"arm 'other' was not run at dose 1; arms are none, untouched, targeted"):
        run.intervene("red.png", RED, [1]).scores("other", 1)
    with pytest.raises(InputError, match="name 'teal' was not compared with the output; names are blue, green and red"):
        run.intervene("red.png", RED, [1]).table(["teal"])


def test_a_dead_latent_is_refused(tmp_path: Path) -> None:
    make_tile_study(tmp_path)
    with ommatid.open_run(tmp_path / "data") as run, pytest.raises(InputError, match="latent 4 is dead: it fires on no image"):
        run.intervene("red.png", 4, draws=1)


def test_an_output_that_the_tokens_do_not_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(TileModel):
        """A model whose output comes from tokens that are not edited."""

        def splice(
            self, pixels: torch.Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
        ) -> tuple[torch.Tensor, ...]:
            embedding = self.capture(pixels, []).embedding
            assert embedding is not None
            tokens = self.capture(pixels, [hookpoint]).tokens[hookpoint]
            return tuple(embedding + 0 * replace(tokens).sum((1, 2))[:, None] for replace in replacements)

    use_tile_model(monkeypatch, Deaf())
    with ommatid.open_run("data") as run:
        says = (
            "tiles: {} does not depend on the patch tokens at tiles, so no latent there has an effect; use an SAE of an earlier hookpoint"
        )
        with pytest.raises(ModelError, match=says.format("the output")):
            run.intervene("red.png", RED, [1])
        with pytest.raises(ModelError, match=says.format("'red'")):
            run.attribute("red.png", ["red"])


def test_a_model_without_a_text_tower_is_read_by_a_linear_head_and_takes_no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TileModel()
    model.d_embed = None  # pyright: ignore[reportAttributeAccessIssue]
    use_tile_model(monkeypatch, model)
    with ommatid.open_run("data") as run:
        found = run.intervene("blue.png", RED, [1])
        red = found.names.index("red")
        before, after = found.scores("none")[0, 0], found.scores("targeted", 1)[0, 0]
        assert found.names[int(before.argmax())] == "blue" and after[red] > before[red]
        named = run.attribute("red.png", ["red"]), run.attribute("red.png", ["red", "blue"]), run.attribute("red.png", class_name="red")
        assert [one.top(0, 1) for one in named] == [[RED]] * 3
        with pytest.raises(
            ModelError, match="tiles has no text tower with which to embed texts; leave them out to read classes by a linear"
        ):
            run.intervene("red.png", RED, texts=["red"])


def test_latents_doses_and_patches_may_be_arrays(run: ommatid.Run) -> None:
    table = run.attribute("red.png", ["red"]).table(1)
    given: list[Any] = [table.latent[0], table.latent, np.array([RED]), torch.tensor(RED), torch.tensor([RED])]
    found = [run.intervene("red.png", latents, [1], draws=2) for latents in given]
    assert {one.steered.latents for one in found} == {(RED,)}
    doses: list[Any] = [np.linspace(0, 1, 3), torch.tensor([0, 0.5, 1]), [np.float32(0), 0.5, 1]]
    assert {run.intervene("red.png", RED, given, draws=2).steered.doses for given in doses} == {(0, 0.5, 1)}
    assert run.intervene("red.png", RED, 1, draws=2).steered.doses == (1,)
    patches: Any = torch.ones(GRID, dtype=torch.bool)
    assert run.intervene("red.png", RED, [1], patches=patches, draws=2).steered.doses == (1,)


def test_a_model_with_other_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TileModel()
    model.spread = model.spread.flip(0)
    use_tile_model(monkeypatch, model)
    with (
        ommatid.open_run("data") as run,
        pytest.raises(ModelError, match=r"tiles: its activations at tiles are not those in .*data/activations"),
    ):
        run.intervene("red.png", RED)


@pytest.mark.usefixtures("_no_model")
def test_a_study_that_is_not_finished_says_which_stage_to_run(tmp_path: Path) -> None:
    shutil.copytree("data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/labels")
    with (
        ommatid.open_run(tmp_path / "data") as run,
        pytest.raises(ArtefactError, match=r"labels: does not exist; make it with `dvc repro label`"),
    ):
        run.intervene("red.png", RED)


def test_latents_have_no_causal_status_before_the_stage_intervene_has_run(tmp_path: Path) -> None:
    shutil.copytree("data", tmp_path / "data")
    for name in ("interventions", "catalog"):
        shutil.rmtree(tmp_path / "data" / name)
    with ommatid.open_run(tmp_path / "data") as run:
        assert run.attribute("red.png", ["red"]).table(1).causal.tolist() == [None]


@pytest.mark.usefixtures("_no_model")
def test_an_sae_that_was_trained_anew_since_it_was_evaluated_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_other(other)
    shutil.copytree("data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/sae")
    shutil.copytree(other / "data/sae", tmp_path / "data/sae")
    with ommatid.open_run(tmp_path / "data") as run, pytest.raises(ArtefactError, match=r"was made from another version of .*data/sae"):
        run.intervene("red.png", RED)


def make_other(root: Path) -> None:
    """Make a study of another SAE."""
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        make_tile_study(root)
