"""The better SAE is published and every decision is kept; whenever a run dies, the next one ends in the same state."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import duckdb
import filelock
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from ommatid import store
from ommatid.catalog.reader import Catalog
from ommatid.cli.app import app
from ommatid.config import Margins, Params, load_params
from ommatid.errors import ArtefactError, ConfigError, RunError
from ommatid.events import ignore
from ommatid.pipeline import STAGES, open_stage
from ommatid.publish import approval, champion
from ommatid.publish.champion import compare
from ommatid.publish.decisions import DECISIONS, Decision, Matched, Scores, find_champion, read_decisions, stand
from support.processes import TESTS
from support.study import CHECKOUT

MARGINS = Margins(min_ms_gain=0.005, max_fvu_loss=0.01, max_dead_rise=0.02)
PARAMS = load_params(CHECKOUT / "params.yaml")
KEEP = PARAMS.retrain.keep
MATCHED = Matched(kept=5, split=1, changed=2, lost=3, new=4)


def scores(name: str = "a", ms: float | None = 0.45, fvu: float = 0.3, dead: float = 0.1, floor: float | None = 0.35) -> Scores:
    return Scores(sae=name, digest=name, fvu=fvu, l0=32.0, dead=dead, ms=ms, ms_floor=floor)


@pytest.mark.parametrize(
    ("champion_scores", "challenger", "wins", "reason"),
    [
        (None, scores("b"), True, "there was no champion"),
        (scores(), scores("b", ms=0.46), True, "better than the champion: MS above floor +0.0100 (at least +0.005)"),
        (scores(), scores("b", ms=0.455), True, "MS above floor +0.0050"),
        (scores(), scores("b", ms=0.454), False, "the champion stays: MS above floor +0.0040"),
        (scores(), scores("b", ms=0.5, floor=0.42), False, "MS above floor -0.0200"),
        (scores(), scores("b", ms=0.5, fvu=0.32), False, "the champion stays: FVU +0.0200 (at most +0.01); but MS above floor +0.0500"),
        (scores(), scores("b", ms=0.5, dead=0.13), False, "dead +0.0300 (at most +0.02)"),
        (scores(), scores("b", ms=0.5, fvu=0.31, dead=0.12), True, "FVU +0.0100"),
        (scores(), scores("b", ms=None), False, "MS above floor -inf"),
        (scores(ms=None), scores("b"), True, "MS above floor +inf"),
        (scores(ms=None), scores("b", ms=None), False, "MS above floor -inf"),
        (scores(), scores(), True, "the same SAE as the champion, with a new catalogue"),
    ],
)
def test_the_challenger_wins_by_its_margins_and_the_reason_gives_the_numbers(
    champion_scores: Scores | None, challenger: Scores, wins: bool, reason: str
) -> None:
    decided, text = compare(champion_scores, challenger, MARGINS)
    assert decided is wins
    assert reason in text


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make("first", ms=0.40)
    return tmp_path


def make(name: str, ms: float, d_model: int = 8, recipe: str | None = None, **others: float) -> None:
    """Make what a decision reads of the stages: an SAE, and others by name with their MS.

    Latent i of each SAE is nearest to latent i of each other, and the cosine is 1 but for the last of three. A recipe stands for the data
    and the params of the training.
    """
    activations = {"model": "lite0", "hookpoint": "blocks.15", "d_model": d_model}
    saes = {name: ms, **others}
    _write("images", {"": ({"n_eval": 3}, {})})
    _write("extract", {"blocks.15": (activations, {})})
    _write("train", {sae: ({"sae": sae}, {"cfg.json": json.dumps(activations).encode()}) for sae in saes})
    numbers = {"fvu": 0.3, "l0": 32.0, "dead": 0.1, "ms_floor": 0.35, "image_activation": "max"}
    latents = {sae: pa.table({"sae": [sae] * 3, "latent": [0, 1, 2], "is_dead": [False] * 3, "ms": [of] * 3}) for sae, of in saes.items()}
    inside = {sae: ({"sae": sae, "ms": of, **numbers}, {"latents.parquet": latents[sae]}) for sae, of in saes.items()}
    pairs = [(one, other, i, 1.0 if i < 2 else 0.1) for one in saes for other in saes if one != other for i in range(3)]
    columns = ("sae", "other_sae", "latent", "cosine")
    matches = pa.Table.from_pylist([dict(zip(columns, pair, strict=True)) | {"other_latent": pair[2], "jaccard": 0.5} for pair in pairs])
    _write("evaluate", inside, {"matches.parquet": matches} if pairs else {}, ("train",))
    path = Path("made.duckdb")
    with duckdb.connect(path) as connection:
        connection.execute("CREATE TABLE matches (sae VARCHAR, latent INTEGER, other_sae VARCHAR, other_latent INTEGER)")
        connection.execute(
            "CREATE TABLE runs AS SELECT sae, sae AS name, now()::TIMESTAMP AS created_at, NULL::VARCHAR AS decision, "
            "NULL::TIMESTAMP AS decided_at, NULL::VARCHAR AS reason, $recipe::VARCHAR AS activations_digest, "
            "json_object('train', json_object('seed', 0)) AS params FROM (SELECT unnest($saes) AS sae)",
            {"saes": list(saes), "recipe": recipe},
        )
        connection.execute("CREATE TABLE own AS SELECT unnest($saes) AS sae", {"saes": list(saes)})
    _write("catalog", {"": ({"saes": list(saes)}, {"catalog.duckdb": path.read_bytes()})}, None, ("train", "evaluate"))
    path.unlink()


def _write(
    stage: str, inside: dict[str, tuple[dict, dict]], beside: dict[str, pa.Table] | None = None, inputs: tuple[str, ...] = ()
) -> None:
    """Write an artefact with a summary and files, or with such artefacts inside, and tables beside them."""
    place, kind = STAGES[stage].place, STAGES[stage].kind
    with store.open_draft(place, kind, {}, {name: open_stage(name) for name in inputs}) as draft:
        for name, table in (beside or {}).items():
            draft.write_table(name, table)
        for name, (summary, files) in inside.items():
            target = draft.child(name, store.INSIDE[kind]) if name else draft
            for file, content in files.items():
                if isinstance(content, pa.Table):
                    target.write_table(file, content)
                    continue
                with target.write_file(file) as path:
                    path.write_bytes(content)
            target.seal(summary)
        if "" not in inside:
            draft.seal({})
        draft.publish(place)


def measured(ms: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Set the champion's score on the new split, and return the names for which it was requested."""
    asked: list[str] = []

    def measure(sae: store.Artefact, *_: object) -> tuple[Scores, Matched]:
        asked.append(sae.summary["sae"])
        return Scores(sae=sae.summary["sae"], digest=sae.digest, fvu=0.3, l0=32.0, dead=0.1, ms=ms, ms_floor=0.35), MATCHED

    monkeypatch.setattr(champion, "_measure", measure)
    return asked


def retrain(params: Params = PARAMS) -> Decision:
    champion.settle(KEEP)
    decision = champion.decide(params)
    champion.publish(decision, KEEP)
    return decision


def published() -> dict[str, str | None]:
    with Catalog(champion.CATALOG) as catalog:
        return dict(catalog.rows("SELECT sae, decision FROM runs"))


def test_the_first_sae_becomes_champion_and_is_decided_once(checkout: Path) -> None:
    assert not champion.is_decided()
    assert retrain().decision == "champion"
    assert published() == {"first": "champion"}
    assert champion.is_decided()
    with Catalog(champion.CATALOG) as catalog:
        ((decided_at, reason),) = catalog.rows("SELECT decided_at, reason FROM runs")
    assert decided_at == read_decisions()[0].decided_at.replace(tzinfo=None)
    assert reason == "there was no champion"


def test_the_champion_is_measured_again_and_a_worse_challenger_is_only_recorded(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain()
    make("second", ms=0.42)
    asked = measured(0.43, monkeypatch)
    decision = retrain()
    assert asked == ["first"]
    assert decision.decision == "challenger" and decision.champion and decision.champion.ms == 0.43
    assert published() == {"first": "champion", "second": "challenger"}
    assert find_champion() == read_decisions()[0]
    make("third", ms=0.45)
    assert retrain().decision == "champion"
    assert published() == {"first": "champion", "second": "challenger", "third": "champion"}
    assert [d.challenger.sae for d in read_decisions()] == ["first", "second", "third"]
    assert sorted(path.name for path in champion.CHAMPIONS.iterdir()) == sorted(d.key for d in read_decisions() if d.decision == "champion")


def _matched(monkeypatch: pytest.MonkeyPatch, ms: float) -> None:
    """Set the champion's score, and match its latent 0 with latent 2 of the challenger."""

    def measure(sae: store.Artefact, _params: object, _on_event: object, challenger: Scores, pair: str) -> tuple[Scores, Matched]:
        row = {"sae": challenger.sae, "latent": 2, "other_sae": sae.summary["sae"], "other_latent": 0}
        champion._write_matched(pair, {"matches": pa.Table.from_pylist([row])})
        return Scores(sae=sae.summary["sae"], digest=sae.digest, fvu=0.3, l0=32.0, dead=0.1, ms=ms, ms_floor=0.35), MATCHED

    monkeypatch.setattr(champion, "_measure", measure)


def test_a_new_champions_catalogue_matches_its_latents_with_the_last_champions(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain()
    make("second", ms=0.42)
    _matched(monkeypatch, ms=0.43)
    assert retrain().decision == "challenger"
    make("third", ms=0.5)
    assert retrain().decision == "champion"
    with Catalog(champion.CATALOG) as catalog:
        assert catalog.rows("FROM matches") == [("third", 2, "first", 0)]
    assert list(champion.MATCHED.iterdir()) == [], "matches are kept until the decision"


def test_only_the_best_sae_of_a_training_is_the_challenger(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("first", ms=0.40, better=0.44, worse=0.38)
    decision = retrain()
    assert decision.challenger.sae == "better" and decision.run["sae"] == "better"
    assert decision.reason == "there was no champion; it is the best of 3 SAEs"
    assert published() == {"first": None, "better": "champion", "worse": None}
    (kept,) = champion.CHAMPIONS.iterdir()
    assert store.open_artefact(kept / "sae", "sae").summary["sae"] == "better"
    asked = measured(0.43, monkeypatch)
    make("better", ms=0.44, best=0.47)
    assert retrain().challenger.sae == "best"
    assert asked == [], "the champion is one of the new training, and was measured with it"
    assert read_decisions()[-1].matched == Matched(kept=2, split=0, changed=0, lost=1, new=1)
    assert published() == {"better": "champion", "best": "champion"}


def test_a_champion_of_other_activations_is_replaced(checkout: Path) -> None:
    retrain()
    make("wide", ms=0.1, d_model=16)
    decision = retrain()
    assert decision.decision == "champion" and decision.champion is None
    assert "cannot be measured on these activations: d_model was 8, is 16" in decision.reason


def test_the_same_sae_with_a_new_catalogue_is_published_again(checkout: Path) -> None:
    retrain()
    _write("catalog", {"": ({"saes": ["first"], "again": True}, {"catalog.duckdb": champion.CATALOG.read_bytes()})})
    assert not champion.is_decided()
    assert retrain().reason == "the same SAE as the champion, with a new catalogue"


def test_readers_keep_the_catalogue_they_opened(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain()
    with Catalog(champion.CATALOG) as reader:
        make("second", ms=0.5)
        measured(0.4, monkeypatch)
        retrain()
        assert reader.rows("SELECT sae FROM runs") == [("first",)]
    assert "second" in published()


def test_a_truncated_decision_counts_as_not_written(checkout: Path) -> None:
    retrain()
    with DECISIONS.open("ab") as file:
        file.write(b'{"decision": "cham')
    assert len(read_decisions()) == 1
    assert champion.is_decided()
    champion.publish(champion.decide(PARAMS), KEEP)
    assert len(read_decisions()) == 2
    assert DECISIONS.read_bytes().count(b"\n") == 2


def test_a_lost_catalogue_is_restored(checkout: Path) -> None:
    retrain()
    champion.CATALOG.unlink()
    shutil.rmtree("data/sae")
    champion.settle(KEEP)
    assert published() == {"first": "champion"}


def test_a_line_that_is_not_a_decision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DECISIONS.parent.mkdir(parents=True)
    DECISIONS.write_text('{"decision": "champion"}\n{"decision"')
    with pytest.raises(ArtefactError, match=r"decisions\.jsonl: line 1 is not a decision \(reason: missing; add it"):
        read_decisions()


def _three(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Promote three SAEs, each better than the one before; return their keys."""
    retrain()
    measured(0.40, monkeypatch)
    for name, ms in (("second", 0.45), ("third", 0.5)):
        make(name, ms=ms, recipe=f"images of {name}")
        assert retrain().decision == "champion"
    return [made.key for made in read_decisions()]


@pytest.mark.usefixtures("checkout")
def test_the_only_champion_has_none_to_return_to() -> None:
    retrain()
    with pytest.raises(ConfigError, match="champion rollback: first is the first champion; there is no other to return to"):
        roll_back()


def roll_back(to: str | None = None) -> Decision:
    made, was_cut_short = champion.roll_back(to, KEEP, "Anna <anna@localhost>", "it flickers")
    assert not was_cut_short
    return made


@pytest.fixture
def aliases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the SAEs at which the alias was pointed, in place of a registry."""
    pointed: list[str] = []
    monkeypatch.setattr(champion, "point_alias", lambda: pointed.append(found.challenger.sae) if (found := find_champion()) else None)
    return pointed


def test_a_rollback_returns_to_the_champion_before_and_says_who_and_why(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    first, second, third = _three(monkeypatch)
    with Catalog(champion.CATALOG) as reader:
        made = roll_back()
        assert reader.rows("SELECT sae FROM runs WHERE decision = 'champion' ORDER BY sae") == [("first",), ("second",), ("third",)]
    assert (made.key, made.how, made.who, made.why) == (second, "rollback", "Anna <anna@localhost>", "it flickers")
    assert (champion.find_champion() or made).challenger.sae == "second" and aliases == ["second"]
    with Catalog(champion.CATALOG) as catalog:
        assert catalog.rows("SELECT reason FROM runs WHERE sae = 'second'") == [
            ("rolled back from third; it flickers (Anna <anna@localhost>)",)
        ]
    assert roll_back().key == first and aliases == ["second", "first"]
    with pytest.raises(ConfigError, match="first is the first champion; name another by --to"):
        roll_back()
    assert roll_back(third[:5]).key == third, "also forward, as its folder is kept"
    with pytest.raises(ConfigError, match="it is the champion already"):
        roll_back("third")


def test_new_catalogues_of_one_sae_displace_no_other_sae(checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]) -> None:
    first, second, _ = _three(monkeypatch)
    for _ in range(KEEP + 1):
        make("third", ms=0.5, recipe="images of third")  # as after somebody has named a feature
        assert "the same SAE as the champion, with a new catalogue" in retrain().reason
    newest = read_decisions()[-1].key
    assert stand(read_decisions()).keys[:3] == [newest, second, first]
    assert {first, second, newest} <= {folder.name for folder in champion.CHAMPIONS.iterdir()}
    assert roll_back().key == second


def test_what_was_rolled_back_does_not_win_again_by_the_same_comparison(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    _three(monkeypatch)
    roll_back()
    assert champion.is_decided(), "nothing is new, so that a retrain does nothing"
    make("third", ms=0.5, recipe="new labels of the same SAE")
    asked = measured(0.40, monkeypatch)
    made = retrain()
    assert (made.decision, asked) == ("challenger", []) and "third" in made.reason and "rolled back" in made.reason
    make("again", ms=0.6, recipe="images of third")
    made = retrain()
    assert made.decision == "challenger" and "third, trained on the same data with the same params, was rolled back" in made.reason
    make("fourth", ms=0.44, recipe="more images")
    assert retrain().decision == "champion" and asked == ["second"], "a new challenger is compared with the champion rolled back to"
    assert [one.challenger.sae for one in stand(read_decisions()).champions] == ["first", "second", "fourth"]


def test_of_several_saes_the_best_that_was_not_set_aside_is_the_challenger(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    _three(monkeypatch)
    roll_back()
    make("third", ms=0.5, fair=0.43)
    assert retrain().challenger.sae == "fair"


def test_a_person_promotes_an_sae_that_lost_and_one_that_was_rolled_back(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    retrain()
    make("second", ms=0.41, worse=0.3)
    measured(0.42, monkeypatch)
    assert retrain().decision == "challenger"
    made = champion.promote("worse", PARAMS, "Anna", "smaller")
    assert (made.decision, made.how, made.who, made.why) == ("champion", "promote", "Anna", "smaller")
    assert made.reason.startswith("promoted by hand; the comparison says: the champion stays: MS above floor -0.1200")
    assert made.matched == MATCHED and published() == {"first": "champion", "second": "challenger", "worse": "champion"}
    assert champion.is_decided()
    roll_back()
    assert champion.is_decided()
    assert champion.promote("worse", PARAMS, "Anna", None).key == made.key
    assert stand(read_decisions()).aside == (), "a promotion by hand takes back what a rollback set aside"
    former = champion.promote("first", PARAMS, "Anna", None)
    assert former.reason.startswith("promoted again; it was the champion since") and champion.is_decided()
    with pytest.raises(ConfigError, match="promote first: it is the champion already"):
        champion.promote("first", PARAMS, "Anna", None)
    with pytest.raises(ConfigError, match=r"'nobody' is no champion, present or former; there are .*first.*catalogue has second, worse"):
        champion.promote("nobody", PARAMS, "Anna", None)


def test_so_many_champions_are_kept_and_what_a_rollback_needs_always(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    first, second, third = _three(monkeypatch)
    champion.settle(2)
    assert {path.name for path in champion.CHAMPIONS.iterdir()} == {second, third}
    with pytest.raises(ConfigError, match=rf"champion {first} \(first\): .*{first} is no longer kept \(retrain.keep\); bring it back from"):
        roll_back("first")
    champion.roll_back(None, 2, "Anna", None)
    assert {path.name for path in champion.CHAMPIONS.iterdir()} == {second, third}, "what went is not counted"
    with pytest.raises(ConfigError, match="is no longer kept"):
        roll_back()
    assert [made.key for made in read_decisions()] == [first, second, third, second], "nothing was decided"


def test_a_challenger_is_not_published_over_a_champion_that_it_was_not_compared_with(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    _three(monkeypatch)
    make("fourth", ms=0.6, recipe="more images")
    made = champion.decide(PARAMS)
    roll_back()
    with pytest.raises(champion.SupersededError, match=r"fourth was compared with the champion .* and now it is second"):
        champion.publish(made, KEEP)
    assert retrain().decision == "champion"


def test_two_who_decide_at_once_leave_each_other_their_drafts_and_matches(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    retrain()
    make("second", ms=0.5, other=0.45)
    _matched(monkeypatch, ms=0.40)
    champion._write_matched("left", {})
    os.utime(champion.MATCHED / "left", (0, 0))
    by_hand = champion.decide(PARAMS, sae="other").model_copy(update={"how": "promote"})
    made = champion.decide(PARAMS)
    assert {path.name for path in champion.MATCHED.iterdir()} == {f"{one.key}-{made.against}" for one in (by_hand, made)}
    with store.open_draft(champion.MEASURED, "evaluation", {}, {}) as draft:  # as of a third
        champion.publish(by_hand, KEEP)
        assert draft.path.exists()
    with Catalog(champion.CATALOG) as catalog:
        assert catalog.rows("FROM matches") == [("other", 2, "first", 0)]
    assert retrain().decision == "champion"
    assert not list(champion.WORK.glob("champion-*"))


def test_only_what_was_compared_is_published(checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]) -> None:
    retrain()
    measured(0.40, monkeypatch)
    make("second", ms=0.5)
    made = champion.decide(PARAMS)
    make("second", ms=0.5, recipe="the same SAE with another catalogue")
    problem = "the SAEs or the catalogue of the checkout changed while second was compared with the champion; nothing was published"
    with pytest.raises(champion.SupersededError, match=problem):
        champion.publish(made, KEEP)
    made = champion.decide(PARAMS)
    monkeypatch.setattr(champion, "_write_reference", lambda *_: make("third", ms=0.6))  # while files are copied
    with pytest.raises(champion.SupersededError, match=problem):
        champion.publish(made, KEEP)
    assert len(read_decisions()) == 1 and published() == {"first": "champion"}
    monkeypatch.setattr(champion, "_write_reference", lambda *_: None)
    assert retrain().challenger.sae == "third"


def test_the_alias_is_set_while_nobody_can_change_the_champion(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain()

    def point_alias() -> str:
        with pytest.raises(filelock.Timeout), filelock.FileLock(champion.WORK / "published.lock", timeout=0):
            pass
        return "it was set"

    monkeypatch.setattr(champion, "point_alias", point_alias)
    assert champion.try_alias(ignore) == "it was set"


def test_a_champion_whose_sae_is_gone_stays_published_and_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = retrain()
    make("second", ms=0.5)
    shutil.rmtree(champion.folder_of(first))
    warned: list[str] = []
    champion.settle(KEEP, lambda event: warned.append(event.what))  # type: ignore[union-attr]
    made = champion.decide(PARAMS)
    assert made.decision == "challenger" and "the champion first stays, as it cannot be compared" in made.reason
    champion.publish(made, KEEP, lambda event: warned.append(event.what))  # type: ignore[union-attr]
    assert published() == {"first": "champion"} and "the catalogue of the champion first is gone" in warned[0]
    champion.CATALOG.unlink()
    make("third", ms=0.1)
    made = retrain()
    assert made.decision == "champion" and made.reason.startswith("nothing is left of the champion first: ")


def test_an_sae_that_was_trained_after_the_catalogue_was_made_is_not_promoted(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]
) -> None:
    first, *_ = _three(monkeypatch)
    config = {"cfg.json": json.dumps({"model": "lite0", "hookpoint": "blocks.15", "d_model": 8}).encode()}
    _write("train", {"third": ({"sae": "third", "seed": 1}, config), "rejected": ({"sae": "rejected"}, config)})
    with pytest.raises(ArtefactError, match=r"do not belong together: .*data/catalog was made from another version of data/sae"):
        champion.promote("third", PARAMS, "Anna", None)
    with pytest.raises(ArtefactError, match="do not belong together"):
        champion.decide(PARAMS)
    assert champion.promote(first, PARAMS, "Anna", None).key == first, "which does not concern a former champion"
    with pytest.raises(ConfigError, match="nobody"):
        champion.promote("nobody", PARAMS, "Anna", None)


def test_an_sae_that_a_gate_rejected_is_not_promoted(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("good", ms=0.5, worse=0.4)
    monkeypatch.setattr(champion, "_open_catalog", lambda: SimpleNamespace(summary={"saes": ["good"]}))
    with pytest.raises(ConfigError, match="champion promote worse: the catalogue does not have it, as a gate rejected it"):
        champion.promote("worse", PARAMS, "Anna", None)


def test_champions_outlive_the_log(checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str]) -> None:
    keys = set(_three(monkeypatch))
    log, made = DECISIONS.read_bytes(), read_decisions()[0]
    for rest in (b"", log.splitlines(keepends=True)[0], log[:-1]):
        DECISIONS.write_bytes(rest)
        for act in (lambda: champion.settle(KEEP), roll_back, lambda: champion.publish(made, KEEP)):
            with pytest.raises(ArtefactError, match=r"and had .* so some are lost: bring the file back"):
                act()
        assert {path.name for path in champion.CHAMPIONS.iterdir()} == keys
    DECISIONS.write_bytes(log)
    champion.settle(KEEP)
    DECISIONS.write_bytes(log.splitlines(keepends=True)[0])
    champion.SETTLED.unlink()  # as the message says
    champion.settle(KEEP)
    assert published() == {"first": "champion"}


def test_a_torn_last_line_is_not_counted(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain()
    measured(0.40, monkeypatch)
    with DECISIONS.open("ab") as log:
        log.write(b'{"decision": "' + b"x" * 100_000)
    champion.CATALOG.unlink()
    champion.settle(KEEP)
    make("second", ms=0.5, recipe="more images")
    retrain()
    assert published() == {"first": "champion", "second": "champion"}


def test_a_line_of_an_older_version_is_read(checkout: Path) -> None:
    made = retrain()
    line = json.loads(DECISIONS.read_text())
    for key in ("how", "who", "why", "against", "matched", "key"):
        del line[key]
    DECISIONS.write_text(json.dumps(line) + "\n")
    champion.SETTLED.unlink()
    (champion.folder_of(made)).rename(champion.CHAMPIONS / made.catalog[:16])
    champion.settle(KEEP)
    assert published() == {"first": "champion"} and champion.is_decided()


def verb(*arguments: str) -> str:
    """Run `ommatid champion` with the params of the checkout and return what it prints."""
    ran = CliRunner().invoke(app, ["champion", *arguments])
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran.stdout


@pytest.fixture
def user(checkout: Path, aliases: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Somebody whom git does not know, in a checkout with params.yaml."""
    shutil.copyfile(CHECKOUT / "params.yaml", "params.yaml")
    monkeypatch.setattr("ommatid.cli.champion.git", _no_git)
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    monkeypatch.setattr("socket.gethostname", lambda: "desk")
    return "anna@desk"


def _no_git(*_: object) -> str:
    raise RunError("git is not installed")


def test_the_verb_lists_every_decision_with_its_status(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verb("list") == (
        "nothing was decided yet: data/published/decisions.jsonl does not exist; the flow `retrain` writes it, or `ommatid champion "
        "promote SAE`\n"
    )
    assert json.loads(verb("list", "--json")) == []
    first, second, third = _three(monkeypatch)
    make("worse", ms=0.3)
    worse = retrain().key
    roll_back()
    head, *rows = verb("list").splitlines()
    assert head.split()[:3] == ["key", "status", "SAE"]
    assert [row.split()[0] for row in rows] == [second, worse, third, second, first]
    assert "second  +0.1000     0.3000  0.1000" in rows[0] and "rollback  Anna  yes" in rows[0]
    assert "it flickers; rolled back from third" in rows[0] and rows[2].rstrip().endswith("…")
    listed = json.loads(verb("list", "--json"))
    statuses = [(row["sae"], row["status"], row["is_kept"]) for row in listed]
    assert statuses == [
        ("second", "champion", True),
        ("worse", "challenger", False),
        ("third", "rolled back", True),
        ("second", "champion", True),
        ("first", "former", True),
    ]
    assert (listed[0]["who"], listed[0]["why"], listed[0]["over_floor"]) == ("Anna <anna@localhost>", "it flickers", pytest.approx(0.1))


def test_the_verb_counts_champions_that_are_not_kept(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = _three(monkeypatch)
    champion.settle(1)
    assert verb("list").splitlines()[-1] == "2 former champions are on the log, but no longer kept (retrain.keep)"
    assert [(row["key"], row["is_kept"]) for row in json.loads(verb("list", "--json"))] == [(third, True), (second, False), (first, False)]
    shutil.rmtree(champion.CHAMPIONS / third)
    *_, former, present = verb("list").splitlines()
    assert former == "2 former champions are on the log, but no longer kept (retrain.keep)"
    assert present == f"the folder of the champion third is gone or damaged: {champion.CHAMPIONS / third}; bring it back from DVC"


def test_the_verb_shows_a_champion_with_scores_features_lineage_and_history(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = _three(monkeypatch)
    roll_back()
    lines = verb("show").splitlines()
    assert lines[:2] == [f"second ({second}): champion", f"folder     {champion.CHAMPIONS / second}"]
    assert ["MS", "-", "floor", "+0.1000", "+0.0500"] in [line.split() for line in lines], lines
    assert "features   of the champion before 5 kept, 1 split, 2 changed, 3 lost; 4 new" in lines
    assert "git commit        unknown" in lines and "activations       images of second" in lines
    assert lines[-1].endswith("UTC  rollback by Anna <anna@localhost>: rolled back from third (it flickers)")
    assert verb("show", third[:5]).startswith(f"third ({third}): rolled back\n")
    assert verb("show", "first").startswith(f"first ({first}): former\n")
    assert "features   not matched with a champion before" in verb("show", first)
    about = json.loads(verb("show", "second", "--json"))
    assert (about["key"], about["scores"]["ms"], about["previous"]["sae"]) == (second, 0.45, "first")
    assert about["matched"] == MATCHED.model_dump() and about["margins"]["min_ms_gain"] == PARAMS.retrain.min_ms_gain
    assert [made["how"] for made in about["history"]] == ["retrain", "rollback"]


def test_the_verb_promotes_and_rolls_back_in_the_users_name(user: str, monkeypatch: pytest.MonkeyPatch, aliases: list[str]) -> None:
    retrain()
    make("second", ms=0.41)
    measured(0.42, monkeypatch)
    retrain()
    warned, line = verb("promote", "second", "--why", "\nsmaller\n \udcff").splitlines()
    assert "new images will not be compared with those of second" in warned  # of which this checkout has none
    made = read_decisions()[-1]
    assert line == f"champion: second ({made.key}) is the champion; {made.reason}" and "the comparison says: the champion stays" in line
    assert (made.how, made.who, made.why, published()["second"]) == ("promote", user, "smaller ?", "champion")
    first = read_decisions()[0]
    (line,) = verb("rollback", "--why", "it flickers").splitlines()
    assert line == f"champion: first ({first.key}) is the champion again; rolled back from second"
    assert read_decisions()[-1].who == user and aliases == ["second", "first"]
    assert verb("rollback", "--to", "second").startswith(f"champion: second ({made.key}) is the champion again; ")
    champion.append(read_decisions()[0].model_copy(update={"how": "rollback"}))  # a rollback that was killed after its line
    lines = verb("rollback").splitlines()
    assert lines[0] == "an earlier rollback was cut short; it is complete now, and nothing else was done"
    assert lines[1].startswith("champion: first (") and len(read_decisions()) == 6


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("show",), "champion show: nothing was promoted yet"),
        (("show", "nobody"), "'nobody' is no champion, present or former; there are none"),
        (("rollback",), "champion rollback: nothing was promoted yet, so there is nothing to return to"),
        (("rollback", "--to", "first"), "champion rollback: nothing was promoted yet"),
        (("promote", "nobody"), "'nobody' is no champion, present or former; there are none; .*catalogue has first"),
        (("promote", "first", "--params", "none.yaml"), "none.yaml"),
    ],
)
def test_the_verb_says_what_it_cannot_do_and_changes_nothing(user: str, arguments: tuple[str, ...], problem: str) -> None:
    make("first", ms=0.4)
    with pytest.raises(ConfigError, match=problem):
        verb(*arguments)
    assert not DECISIONS.exists() and not champion.CHAMPIONS.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"decision', "invalid JSON: "),
        ("{}", "decision: missing; add it"),
        ("", "invalid JSON: "),
        ('{"decision": 1}', "decision: got 1; "),
    ],
)
def test_a_question_that_cannot_be_read_is_named_before_anything_is_decided(
    user: str, monkeypatch: pytest.MonkeyPatch, content: str, problem: str
) -> None:
    retrain()
    make("second", ms=0.5)
    measured(0.4, monkeypatch)
    retrain()
    make("third", ms=0.6)
    approval.PLACE.write_text(content)
    log = DECISIONS.read_bytes()
    for act in (lambda: champion.settle(KEEP), lambda: verb("promote", "third"), lambda: verb("rollback")):
        with pytest.raises(ArtefactError) as raised:
            act()
        said = str(raised.value)
        assert said.startswith(f"data/approval.json: does not say which challenger waits for a person ({problem}")
        assert said.endswith("delete the file: the next retrain compares the challenger again")
    assert DECISIONS.read_bytes() == log and published() == {"first": "champion", "second": "champion"}


KILLED = """
import json, os, sys
from pathlib import Path

import duckdb

from ommatid.publish import champion
from ommatid.publish.decisions import Decision, find_champion, read_decisions
from support.killed import kill_at_each_write

def point_alias():
    Path("alias").write_text(find_champion().challenger.sae)

def publish():
    champion.settle(2)
    if not champion.is_decided():
        champion.publish(Decision.model_validate_json(Path("made.json").read_text()), 2)
    point_alias()

def rollback():
    champion.roll_back(None, 2, "Anna", None)

def own(path):
    with duckdb.connect(path, read_only=True) as connection:
        return connection.execute("FROM own").fetchall()[0][0]

def look():
    names = {made.key: made.challenger.sae for made in read_decisions()}
    folders = sorted(names.get(path.name, path.name) for path in champion.CHAMPIONS.iterdir())
    n_lines = champion.DECISIONS.read_bytes().count(b"\\n")
    return [own(champion.CATALOG), find_champion().challenger.sae, n_lines, folders, Path("alias").read_text()]

champion.point_alias = point_alias
kills = kill_at_each_write(Path.cwd(), {"publish": publish, "rollback": rollback}[sys.argv[1]], look)
print(json.dumps([[kill.event, kill.between[0], kill.end] for kill in kills]))
"""


@pytest.mark.parametrize(("verb", "wanted"), [("publish", "fourth"), ("rollback", "second")])
def test_killed_at_any_write_the_next_run_ends_as_if_it_had_not_been(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, aliases: list[str], verb: str, wanted: str
) -> None:
    _three(monkeypatch)
    champion.settle(2)
    Path("alias").write_text("third")
    if verb == "publish":
        make("fourth", ms=0.6, recipe="more images")
        Path("made.json").write_text(champion.decide(PARAMS).model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run([sys.executable, "-c", KILLED, verb], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    kills = json.loads(ran.stdout.splitlines()[-1])
    kept = ["fourth", "third"] if verb == "publish" else ["second", "third"]
    assert [kill for kill in kills if kill[2] != [wanted, wanted, 4, kept, wanted]] == []
    assert {between for _, between, _ in kills} == {"third", wanted}, "readers see one champion or the other"
    events = " ".join(event for event, _, _ in kills)
    assert all(name in events for name in ("decisions.jsonl", "catalog.new", "settled", "alias")), events
