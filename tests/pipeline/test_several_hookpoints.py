"""Proves that SAEs of several hookpoints in one study have the numbers that they have in studies of their own, from training to catalogue.

Drawn tiles and the model that sees their colours, at two hookpoints of different widths and with a transcoder between them, by `run_stage`
with the real gates. The tests of this file run in order: each needs the artefacts of the one before.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from fastapi.testclient import TestClient
from PIL import Image

import ommatid
from ommatid.catalog.reader import Catalog
from ommatid.config import Params, make_params
from ommatid.errors import ArtefactError, ConfigError, StoppedError
from ommatid.events import Event, Measured, Progress, ignore
from ommatid.explorer.app import make_app
from ommatid.explorer.web import Settings
from ommatid.pipeline import open_stage
from ommatid.pipeline.run import run_stage
from ommatid.publish import champion
from ommatid.sae.model import SAE
from ommatid.store import Artefact
from support.study import run_verb
from support.tiles import D_DEEP, DeepTileModel, TileModel, deep_tile_checkout

SHAPE = "batch_topk-12-k2-s0"
PLACES: dict[str, dict[str, Any]] = {
    "tiles": {"hookpoint": "tiles"},
    "deep": {"hookpoint": "deep"},
    "tiles-to-deep": {"hookpoint": "tiles", "target": "deep"},
}
"""What runs say of each SAE, by how its name begins."""
NAMES = [f"{place}-{SHAPE}" for place in PLACES]
LATER = ("train", "evaluate", "label", "intervene", "catalog")
CATALOG = Path("data/catalog/catalog.duckdb")


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeepTileModel]:
    """The model, in a folder with pictures and params.yaml."""
    train = {"epochs": 12, "batch_size": 64, "lr": 0.01, "max_dead": 1.0, "d_sae": 12, "k": 2, "runs": [*PLACES.values()]}
    intervene = {"n_images": 16, "latents": {"kind": "best", "by": "ms", "n": 2}}
    root = tmp_path_factory.mktemp("checkout")
    with deep_tile_checkout(root, 120, train=train, evaluate={"max_dead": 1.0}, intervene=intervene) as model:
        yield model


@pytest.fixture
def params() -> Params:
    return read_params()


def read_params(**train: Any) -> Params:
    values = yaml.safe_load(Path("params.yaml").read_text())
    return make_params({**values, "train": values["train"] | train}, "params.yaml")


def run(stages: tuple[str, ...], params: Params, data: str = "data") -> None:
    for stage in stages:
        run_stage(stage, params, ignore, data)


def test_each_hookpoint_is_a_pass_of_its_own_and_a_kill_costs_one_at_most(params: Params) -> None:
    run(("images", "extract"), params)
    shutil.copytree("data", "one")

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.what.startswith("deep: train steps"):
            raise StoppedError("as by a signal")

    with pytest.raises(StoppedError):
        run_stage("train", params, stop)
    heard: list[Event] = []
    training = run_stage("train", params, heard.append)
    assert training.summary["saes"] == NAMES and set(training.each()) == set(NAMES)
    # the first was finished before the kill
    assert {event.sae for event in heard if isinstance(event, Measured)} == set(NAMES[1:])
    configs = [SAE.load(training.child(name, "sae").path).config for name in NAMES]
    assert [(config.hookpoint, config.target, config.d_model) for config in configs] == [
        ("tiles", None, TileModel.d_model),
        ("deep", None, D_DEEP),
        ("tiles", "deep", TileModel.d_model),
    ]
    for name, sae in training.each().items():
        read = {key: open_stage("extract", of).digest for key, of in zip(("extract", "target"), places_of(name), strict=False)}
        assert sae.manifest.inputs == read


def places_of(name: str) -> list[str]:
    return [*PLACES[name.removesuffix(f"-{SHAPE}")].values()]


@pytest.mark.parametrize("place", PLACES)
def test_an_sae_is_what_it_is_in_a_study_of_its_own(place: str) -> None:
    if not Path("data/interventions").exists():
        run(LATER[1:-1], read_params())
    alone = read_params(runs=[], **PLACES[place])
    for stage in LATER[:-1]:
        run_stage(stage, alone, ignore, "one")
    for stage in LATER[:-1]:
        ours, theirs = open_stage(stage).each()[f"{place}-{SHAPE}"], open_stage(stage, data="one").each()[SHAPE]
        assert ours.tables == theirs.tables and without_name(ours.summary) == without_name(theirs.summary)
        assert {table: without_sae(ours, table) for table in ours.tables} == {table: without_sae(theirs, table) for table in theirs.tables}
        same = {file.name: file.sha256 for file in theirs.manifest.files if not file.name.endswith(".parquet")}
        assert {file.name: file.sha256 for file in ours.manifest.files if file.name in same} == same
    assert same_inputs(f"{place}-{SHAPE}")


def without_name(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: repr(value) for key, value in summary.items() if key != "sae"}


def without_sae(artefact: Artefact, table: str) -> pa.Table:
    rows = artefact.read(table)
    return rows.drop_columns([name for name in ("sae",) if name in rows.column_names])


def same_inputs(name: str) -> bool:
    """Whether what each stage read of the activations is that of the SAE's own hookpoints."""
    found = {key: open_stage("extract", of).digest for key, of in zip(("extract", "target"), places_of(name), strict=False)}
    evaluation = open_stage("evaluate").each()[name].manifest.inputs
    return {key: evaluation.get(key) for key in ("extract", "target")} == {"target": None, **found}


def test_the_catalogue_has_layers_side_by_side(params: Params) -> None:
    run_stage("catalog", params, ignore)
    with Catalog(CATALOG) as catalog:
        rows = catalog.rows("SELECT name, hookpoint, target, ms IS NOT NULL, label_score IS NOT NULL FROM runs ORDER BY hookpoint, target")
        assert [row[:3] for row in rows] == [
            (NAMES[1], "deep", None),
            (NAMES[2], "tiles", "deep"),
            (NAMES[0], "tiles", None),
        ]
        assert all(row[3] and row[4] for row in rows)
        # baselines of each hookpoint: the neurons are as many as the activations are wide
        found = catalog.rows("SELECT name, c.n_latents FROM comparisons AS c JOIN runs USING (sae) WHERE dictionary = 'neurons'")
        assert dict(found) == {NAMES[0]: TileModel.d_model, NAMES[1]: D_DEEP, NAMES[2]: TileModel.d_model}
        # the transcoder's directions are in the space of deep, and so are comparable with those of the SAE there, and no others
        pairs = "SELECT a.name, b.name FROM {} AS m JOIN runs AS a USING (sae) JOIN runs AS b ON b.sae = m.other_sae GROUP BY ALL"
        expected = {(NAMES[1], NAMES[2]), (NAMES[2], NAMES[1])}
        assert set(catalog.rows(pairs.format("matches"))) == set(catalog.rows(pairs.format("stability"))) == expected
        assert catalog.rows("SELECT count(DISTINCT activations_digest) FROM runs") == [(2,)]
    page = Path("data/quality/report.html").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in NAMES)
    table = page.partition('<th scope="col">hookpoint</th>')[2].partition("</table>")[0]
    assert re.findall("<td>(deep|tiles|tiles to deep)</td>", table) == ["deep", "tiles", "tiles to deep"]


def test_pages_and_pictures_have_layers_side_by_side() -> None:
    assert run_verb("show", "--compare") == 0
    with Image.open("data/pictures/comparison.png") as picture:
        assert picture.width == 1240
    with TestClient(make_app(Settings(CATALOG)), base_url="http://127.0.0.1") as asks:
        found = asks.get("/api/compare", params={"a": NAMES[0], "b": NAMES[1]}).json()
        assert [numbers["hookpoint"][0] for numbers in found["numbers"]] == ["tiles", "deep"]
        assert [row["place"] for row in found["layers"]] == ["deep", "tiles", "tiles to deep"]
        assert not found["is_matched"] and not found["is_one_space"]
        page = asks.get("/compare", params={"a": NAMES[0], "b": NAMES[1]}).text
        assert "The directions of these two lie in different spaces" in page and "Layers side by side" in page
        alike = asks.get("/api/compare", params={"a": NAMES[1], "b": NAMES[2]}).json()
        assert alike["is_matched"] and alike["is_one_space"]


def test_python_reads_each_sae_at_its_own_hookpoint() -> None:
    picture = next(Path("photos").rglob("*.png"))
    with ommatid.open_run("data") as study:
        assert study.saes == tuple(sorted(NAMES))
        widths = {name: study.encode(picture, name).x.shape[-1] for name in NAMES}
        assert widths == {NAMES[0]: TileModel.d_model, NAMES[1]: D_DEEP, NAMES[2]: TileModel.d_model}
        subjects = [study.subject(name)[1] for name in NAMES]
        assert [(subject.reads.name, subject.writes.name) for subject in subjects] == [
            ("tiles", "tiles"),
            ("deep", "deep"),
            ("tiles", "deep"),
        ]
        assert all(len(study.attribute(picture, ["red"], sae=name).table()) for name in NAMES[:2])


def test_a_champion_is_compared_with_the_saes_of_its_own_hookpoint(params: Params) -> None:
    champion.publish(champion.decide(params), params.retrain.keep)
    assert (first := champion.find_champion())
    with Catalog(champion.CATALOG) as catalog:
        ((place,),) = catalog.rows("SELECT hookpoint || coalesce(target, '') FROM runs WHERE decision = 'champion'")
    again = read_params(seed=1)
    run(LATER, again)
    decision = champion.decide(again)
    assert decision.champion and decision.champion.sae == first.challenger.sae
    assert decision.run["hookpoint"] + (decision.run["target"] or "") == place
    assert decision.champion.fvu == pytest.approx(first.challenger.fvu)  # measured on the activations that it was trained for


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (
            {"runs": [{"hookpoint": "tiles"}, {"hookpoint": "tile"}]},
            "train.hookpoint: 'tile' is not in extract.hookpoints: tiles, deep, cls",
        ),
        ({"grid": {"hookpoint": ["tiles"], "target": ["cls", "late"]}}, "train.target: 'late' is not in extract.hookpoints"),
        ({"runs": [{"k": 3}, {"k": 4}]}, "train.runs or train.grid: each SAE must name one of extract.hookpoints to train on: tiles, deep"),
        ({"runs": [{"k": 3}, {"hookpoint": "deep"}]}, "of which some name a hookpoint and some do not; set train.hookpoint as well"),
        ({"grid": {"hookpoint": ["tiles", "tiles"]}}, "runs or grid: makes the same SAE twice: {'hookpoint': 'tiles'}"),
        ({"grid": {"hookpoint": ["tiles", "deep"], "target": ["deep"]}}, "hookpoint and target are both deep; set target to null"),
        ({"grid": {"hookpoint": ["tiles", "deep"]}, "runs": [{"hookpoint": "cls"}]}, "runs and grid are both given"),
        ({"grid": {"hookpoint": ["tiles"], "epochs": [1, 2]}}, "epochs: cannot differ between SAEs that are trained together"),
    ],
)
def test_what_cannot_be_trained_together_is_named(train: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_params(**{"runs": [], **train})
    assert says in str(refused.value)


def test_a_target_with_other_tokens_is_refused_before_anything_is_trained() -> None:
    before = open_stage("train").digest
    mixed = read_params(runs=[{"hookpoint": "tiles"}, {"hookpoint": "tiles", "target": "cls"}])
    with pytest.raises(ArtefactError, match=r"train.target: cls cannot be reconstructed from tiles, .*tokens_per_image 7 and 1"):
        run_stage("train", mixed, ignore)
    assert open_stage("train").digest == before
