"""A champion keeps what new images are compared with; checks reach catalogue, verb and gate, and stop only if asked to."""

import json
import shutil
from pathlib import Path

import duckdb
import pytest
from typer.testing import CliRunner

from ommatid import store
from ommatid.catalog.reader import Catalog
from ommatid.cli import drift as verb
from ommatid.cli.app import app
from ommatid.config import load_params
from ommatid.errors import ArtefactError
from ommatid.events import Warned
from ommatid.publish import champion
from ommatid.publish.drift import DriftError, check_drift, stop_if_drifted
from support.drifting import D_SAE, NAME, write_extraction, write_sae
from support.study import CHECKOUT

OVERRIDES = ("extract.hookpoints=[vision.blocks.1]", "drift.min_images=30", "drift.alpha=0.2")
PARAMS = load_params(CHECKOUT / "params.yaml", OVERRIDES)
STOP = load_params(CHECKOUT / "params.yaml", (*OVERRIDES, "drift.action=stop"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a study of 180 images whose SAE can become champion."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(CHECKOUT / "params.yaml", "params.yaml")
    bring(old=range(180))
    with store.open_draft("data/sae", "training", {}, {}) as draft:
        write_sae(tmp_path / "one")
        shutil.copytree(tmp_path / "one", draft.path / "only")
        draft.seal({"saes": ["only"], "of": {}})
        draft.publish("data/sae")
    with store.open_draft("data/evaluation", "evaluations", {}, {}) as draft:
        numbers = {"fvu": 0.3, "l0": 4.0, "dead": 0.1, "ms": 0.4, "ms_floor": 0.3, "image_activation": "max"}
        draft.child("only", "evaluation").seal({"sae": NAME, **numbers})
        draft.seal({"saes": ["only"], "of": {}})
        draft.publish("data/evaluation")
    make_catalog(tmp_path / "made.duckdb")
    return tmp_path


def make_catalog(path: Path) -> None:
    """Make what a champion's catalogue needs here."""
    with duckdb.connect(path) as connection:
        images = "read_parquet('data/images/images-*.parquet')"
        connection.execute(f"CREATE TABLE images AS SELECT image, image_id, path, thumbnail FROM {images}")
        connection.execute("CREATE TABLE matches (sae VARCHAR, latent INTEGER, other_sae VARCHAR, other_latent INTEGER)")
        connection.execute(
            "CREATE TABLE runs AS SELECT $sae AS sae, 'only' AS name, now()::TIMESTAMP AS created_at, NULL::VARCHAR AS decision, "
            "NULL::TIMESTAMP AS decided_at, NULL::VARCHAR AS reason, NULL::VARCHAR AS activations_digest, "
            "json_object('evaluate', json_object('image_activation', 'max')) AS params",
            {"sae": NAME},
        )
        connection.execute(
            f"CREATE TABLE features AS SELECT '{NAME}' AS sae, i::INTEGER AS latent, 'name ' || i AS label FROM range({D_SAE}) t(i)"
        )
    with store.open_draft("data/catalog", "catalog", {}, {}) as draft:
        with draft.write_file("catalog.duckdb") as file:
            shutil.copyfile(path, file)
        draft.seal({"saes": ["only"], "rows": {}})
        draft.publish("data/catalog")


def bring(shift: float = 0.0, **groups: range) -> None:
    """Replace the images and the activations of the checkout."""
    for name in ("images", "activations"):
        shutil.rmtree(Path("data") / name, ignore_errors=True)
    made = write_extraction(Path("brought"), groups, shift)
    shutil.move(str(made.images.folder.local_path()), "data/images")
    with store.open_draft("data/activations", "extraction", {}, {}) as draft:
        shutil.move(str(made.activations.folder.local_path()), draft.path / "vision.blocks.1")
        draft.seal({"hookpoints": ["vision.blocks.1"], "n_shards": 1, "n_images": 0})
        draft.publish("data/activations")


def promote() -> None:
    events: list[object] = []
    made = champion.decide(PARAMS)
    champion.publish(made, 5, events.append)
    assert not [event for event in events if isinstance(event, Warned)], events


def published(sql: str) -> list[tuple]:
    with Catalog(champion.CATALOG) as catalog:
        return catalog.rows(sql)


def test_without_a_champion_or_new_images_nothing_is_compared(checkout: Path) -> None:
    outcome = check_drift(PARAMS)
    assert (outcome.verdict, outcome.reason) == ("nothing", "there is no champion yet that new images could be compared with")
    promote()
    outcome = check_drift(PARAMS)
    assert outcome.reason == f"no images have come in that were not compared with the champion {NAME} before"
    bring(old=range(90))  # others were removed
    assert check_drift(PARAMS).check is None and not Path("data/published/drift").exists()


def test_a_check_is_published_with_names_and_pictures_and_stops_only_if_asked(checkout: Path) -> None:
    promote()
    assert (champion.CHAMPIONS / champion.find_champion().key / "drift/manifest.json").exists()  # type: ignore[union-attr]
    bring(old=range(180), new=range(1000, 1060))
    outcome = check_drift(STOP)
    assert outcome.verdict == "none" and not outcome.is_drift
    stop_if_drifted(STOP, outcome)
    bring(shift=0.8, old=range(180), new=range(1000, 1060), shifted=range(3000, 3060))
    outcome = check_drift(STOP)
    assert outcome.verdict == "drift" and outcome.is_drift
    stop_if_drifted(PARAMS, outcome)  # which warns
    with pytest.raises(
        DriftError, match=r"60 new images differ from the champion's 180: .*; nothing was trained; look at data/quality/drift"
    ):
        stop_if_drifted(STOP, outcome)
    assert check_drift(STOP).is_drift  # the next run stops as well
    assert published("SELECT verdict, n_new FROM drift_checks ORDER BY check_id") == [("none", 60), ("drift", 60)]
    assert published("SELECT count(*), count(DISTINCT label) FROM drift") == [(2 * D_SAE, D_SAE)]
    sides = published(
        "SELECT side, bool_and(path LIKE 'old/%'), bool_and(path LIKE 'shifted/%') FROM drift_images GROUP BY side ORDER BY side"
    )
    assert sides == [("before", True, False), ("new", False, True)]
    report = json.loads(Path("data/quality/drift.json").read_text())
    assert not report["success"] and report["summary"]["n_new"] == 60
    assert "new images differ from those of the champion" in Path("data/quality/drift.html").read_text()
    assert [made.decision for made in champion.read_decisions()] == ["champion"]


def test_a_check_that_was_not_published_is_published_by_the_next_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promote()
    bring(old=range(180), new=range(1000, 1060))
    with monkeypatch.context() as killed:
        killed.setattr("ommatid.publish.drift.settle", lambda keep, on_event: None)
        check_drift(PARAMS)
    assert published("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'drift_checks'") == [(0,)]
    (made,) = champion.CHECKS.iterdir()
    shutil.copytree(made, leftover := made.with_name("00002-abcd.1-2.tmp"))  # as a run that was killed before it renamed this
    assert champion._is_settled()  # the last decision is published, so that a rollback would not be taken for one that was cut short
    champion.settle(5)
    assert published("SELECT verdict FROM drift_checks") == [("none",)]
    assert check_drift(PARAMS).check is None and not leftover.exists() and made.exists()


def test_a_damaged_check_is_left_out_and_made_again(checkout: Path) -> None:
    promote()
    bring(old=range(180), new=range(1000, 1060))
    first = check_drift(PARAMS)
    bring(old=range(180), new=range(1000, 1060), newer=range(2000, 2060))
    second = check_drift(PARAMS)
    assert first.check and second.check
    folder = first.check.artefact.path
    damage(folder / "drift.parquet")
    champion.CATALOG.unlink()
    warned: list[object] = []
    champion.settle(5, warned.append)
    (said,) = warned
    assert isinstance(said, Warned) and said.what.startswith(f"a check for drift is left out: {champion.CHECKS / folder.name}")
    assert "drift.parquet: checksum differs" in said.what
    assert published("SELECT check_id FROM drift_checks") == [(second.check.row["check_id"],)]
    again = check_drift(PARAMS)
    assert again.check and again.check.row["n_new"] == 60, "those of the check that is left out"
    (second.check.artefact.path / "drift_checks.parquet").unlink()
    champion.CATALOG.unlink()
    champion.settle(5)
    assert published("SELECT check_id FROM drift_checks") == [(again.check.row["check_id"],)]


def test_a_champion_of_an_older_version_gets_a_reference_while_its_images_are_there(checkout: Path) -> None:
    promote()
    folder = champion.folder_of(champion.find_champion())  # type: ignore[arg-type]
    shutil.rmtree(folder / "drift")
    bring(old=range(40), new=range(1000, 1060))
    outcome = check_drift(STOP)
    assert outcome.check is None and not outcome.is_drift
    assert "is missing or damaged, and only 40 of its 180 images are here" in outcome.reason
    assert not (folder / "drift").exists()
    bring(old=range(170), new=range(1000, 1060))
    outcome = check_drift(STOP)
    assert outcome.verdict == "none" and outcome.check and outcome.check.row["n_known"] == 170
    assert outcome.check.row["n_new"] == 60


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_reference_is_made_again_while_its_images_are_there(checkout: Path) -> None:
    promote()
    folder = champion.folder_of(champion.find_champion())  # type: ignore[arg-type]
    whole = (folder / "drift/embeddings.parquet").read_bytes()
    damage(folder / "drift/embeddings.parquet")
    bring(old=range(40), new=range(1000, 1060))
    warned: list[object] = []
    outcome = check_drift(STOP, warned.append)
    assert outcome.check is None and "only 40 of its 180 images are here" in outcome.reason
    assert any("drift: damaged" in warning.what for warning in warned if isinstance(warning, Warned)), warned
    assert (folder / "drift/embeddings.parquet").read_bytes() != whole, "it stays, as there is no other"
    bring(old=range(180), new=range(1000, 1060))
    outcome = check_drift(STOP)
    assert outcome.verdict == "none" and (folder / "drift/embeddings.parquet").read_bytes() == whole
    assert {path.name for path in folder.iterdir()} == {"sae", "drift", "catalog.duckdb"}


def test_a_champion_whose_sae_is_damaged_is_not_compared_and_one_without_a_catalogue_has_latents_without_names(checkout: Path) -> None:
    promote()
    folder = champion.folder_of(champion.find_champion())  # type: ignore[arg-type]
    bring(shift=0.8, old=range(180), shifted=range(3000, 3060))
    (folder / "catalog.duckdb").unlink()
    warned: list[object] = []
    outcome = check_drift(PARAMS, warned.append)
    assert outcome.verdict == "drift" and outcome.check
    changed = [row for row in outcome.check.latents() if row["is_changed"]]
    assert changed and {row["label"] for row in outcome.check.latents()} == {None}
    assert {row["side"] for row in outcome.check.pictures()} == {"new"}
    said = " ".join(warning.what for warning in warned if isinstance(warning, Warned))
    assert "changed latents are shown without names: " in said and "without the champion's images: " in said
    damage(folder / "sae/sae.safetensors")
    outcome = check_drift(STOP)
    assert outcome.check is None and "sae.safetensors: checksum differs" in outcome.reason


def test_images_that_came_in_after_the_training_are_not_the_champions(checkout: Path) -> None:
    bring(old=range(180), new=range(1000, 1060))
    promote()
    outcome = check_drift(PARAMS)
    assert outcome.check and (outcome.check.row["n_known"], outcome.check.row["n_new"]) == (180, 60)


def test_a_folder_among_the_checks_that_is_none_does_no_harm(checkout: Path) -> None:
    promote()
    bring(old=range(180), new=range(1000, 1060))
    first = check_drift(PARAMS)
    assert first.check
    shutil.copytree(first.check.artefact.path, champion.CHECKS / "copy of a check")
    bring(old=range(180), new=range(1000, 1060), newer=range(2000, 2060))
    outcome = check_drift(PARAMS)
    assert outcome.check and outcome.check.row["check_id"].startswith("00002-")


def test_a_champion_whose_sae_is_gone_or_of_another_hookpoint_is_no_alarm_but_missing_images_are_an_error(checkout: Path) -> None:
    promote()
    shutil.move("data/activations/vision.blocks.1", "elsewhere")
    with pytest.raises(ArtefactError, match="data/activations"):
        check_drift(STOP)
    bring(old=range(180))
    shutil.rmtree(champion.folder_of(champion.find_champion()) / "sae")  # type: ignore[arg-type]
    outcome = check_drift(STOP)
    assert outcome.check is None and outcome.reason.startswith("new images are not compared: ")


def test_the_verb_prints_the_verdict_and_the_changed_latents_or_json(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promote()
    bring(shift=0.8, old=range(180), shifted=range(3000, 3060))
    lines = list(verb.iter_lines(check_drift(PARAMS), 3))
    assert lines[0].startswith("drift: 60 new images differ from the champion's 180: a classifier tells them apart with an AUROC of 0.9")
    assert lines[1].split()[:2] == ["compared", "found"] and lines[2].startswith("AUROC of a classifier") and lines[2].endswith("*")
    table = lines[lines.index(next(line for line in lines if line.startswith("latent"))) + 1 :]
    assert len(table) == 4 and "name " in table[0] and table[-1].startswith("pictures  /drift?check=00001-")
    settings = [option for override in OVERRIDES for option in ("--set", override)]
    ran = CliRunner().invoke(app, ["drift", "--json", *settings])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["verdict"] == "drift" and found["check"]["n_new"] == 60 and found["latents"][0]["label"].startswith("name ")
    stopped = CliRunner().invoke(app, ["drift", *settings, "--set", "drift.action=stop"])
    assert stopped.exit_code and isinstance(stopped.exception, DriftError)
    assert "differ from the champion's" in stopped.stdout
