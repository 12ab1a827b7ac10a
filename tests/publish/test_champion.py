"""The better SAE is published and every decision is kept; whenever a run dies, the next one ends in the same state."""

import json
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from ommatid import store
from ommatid.catalog.reader import Catalog
from ommatid.config import Params, RetrainParams, load_params
from ommatid.errors import ArtefactError
from ommatid.pipeline import STAGES
from ommatid.publish import champion
from ommatid.publish.champion import Decision, Scores, compare
from support.study import CHECKOUT

MARGINS = RetrainParams(min_ms_gain=0.005, max_fvu_loss=0.01, max_dead_rise=0.02)
PARAMS = load_params(CHECKOUT / "params.yaml")


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


def make(name: str, ms: float, d_model: int = 8, **others: float) -> None:
    """Make what a decision reads of the stages: an SAE, and others by name with their MS."""
    activations = {"model": "lite0", "hookpoint": "blocks.15", "d_model": d_model}
    saes = {name: ms, **others}
    _write("images", {"": ({"n_eval": 3}, {})})
    _write("extract", {"blocks.15": (activations, {})})
    _write("train", {sae: ({"sae": sae}, {"cfg.json": json.dumps(activations).encode()}) for sae in saes})
    numbers = {"fvu": 0.3, "l0": 32.0, "dead": 0.1, "ms_floor": 0.35}
    _write("evaluate", {sae: ({"sae": sae, "ms": of, **numbers}, {}) for sae, of in saes.items()})
    path = Path("made.duckdb")
    with duckdb.connect(path) as connection:
        columns = "sae, now()::TIMESTAMP AS created_at, '{}'::JSON AS params, NULL::VARCHAR AS decision, NULL::TIMESTAMP AS decided_at"
        connection.execute("CREATE TABLE matches (sae VARCHAR, latent INTEGER, other_sae VARCHAR, other_latent INTEGER)")
        connection.execute(f"CREATE TABLE runs AS SELECT {columns}, NULL::VARCHAR AS reason FROM (SELECT unnest(?) AS sae)", [list(saes)])
    _write("catalog", {"": ({"saes": list(saes)}, {"catalog.duckdb": path.read_bytes()})})
    path.unlink()


def _write(stage: str, inside: dict[str, tuple[dict, dict[str, bytes]]]) -> None:
    """Write an artefact with a summary and files, or with such artefacts inside."""
    place, kind = STAGES[stage].place, STAGES[stage].kind
    with store.open_draft(place, kind, {}, {}) as draft:
        for name, (summary, files) in inside.items():
            target = draft.child(name, store.INSIDE[kind]) if name else draft
            for file, content in files.items():
                with target.write_file(file) as path:
                    path.write_bytes(content)
            target.seal(summary)
        if "" not in inside:
            draft.seal({})
        draft.publish(place)


def measured(ms: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Set the champion's score on the new split, and return the names for which it was requested."""
    asked: list[str] = []

    def measure(sae: store.Artefact, *_: object) -> Scores:
        asked.append(sae.summary["sae"])
        return Scores(sae=sae.summary["sae"], digest=sae.digest, fvu=0.3, l0=32.0, dead=0.1, ms=ms, ms_floor=0.35)

    monkeypatch.setattr(champion, "_measure", measure)
    return asked


def retrain(params: Params = PARAMS) -> Decision:
    champion.settle()
    decision = champion.decide(params)
    champion.publish(decision)
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
    assert decided_at == champion.read_decisions()[0].decided_at.replace(tzinfo=None)
    assert reason == "there was no champion"


def test_the_champion_is_measured_again_and_a_worse_challenger_is_only_recorded(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain()
    make("second", ms=0.42)
    asked = measured(0.43, monkeypatch)
    decision = retrain()
    assert asked == ["first"]
    assert decision.decision == "challenger" and decision.champion and decision.champion.ms == 0.43
    assert published() == {"first": "champion", "second": "challenger"}
    assert champion.find_champion() == champion.read_decisions()[0]
    make("third", ms=0.45)
    assert retrain().decision == "champion"
    assert published() == {"first": "champion", "second": "challenger", "third": "champion"}
    assert [d.challenger.sae for d in champion.read_decisions()] == ["first", "second", "third"]
    assert len(list(champion.CHAMPIONS.iterdir())) == 1


def _matched(monkeypatch: pytest.MonkeyPatch, ms: float) -> None:
    """Set the champion's score, and match its latent 0 with latent 2 of the challenger."""

    def measure(sae: store.Artefact, _params: object, _on_event: object, challenger: Scores, catalog: str) -> Scores:
        row = {"sae": challenger.sae, "latent": 2, "other_sae": sae.summary["sae"], "other_latent": 0}
        champion._write_matched(catalog, {"matches": pa.Table.from_pylist([row])})
        return Scores(sae=sae.summary["sae"], digest=sae.digest, fvu=0.3, l0=32.0, dead=0.1, ms=ms, ms_floor=0.35)

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
    assert not champion.MATCHED.exists()


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


@pytest.mark.parametrize("dies_in", ["_append", "_publish_catalog", "sync", "settle"])
def test_a_run_that_dies_after_its_decision_is_finished_by_the_next(checkout: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    retrain()
    make("second", ms=0.5)
    measured(0.4, monkeypatch)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(champion, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            champion.publish(champion.decide(PARAMS))
    assert set(published()) == {"first"}  # never something in between
    champion.settle()
    if not champion.is_decided():
        retrain()
    assert published() == {"first": "champion", "second": "champion"}
    assert len(champion.read_decisions()) == 2
    assert [p.name for p in champion.PUBLISHED.iterdir() if p.suffix in {".new", ".tmp", ".wal"}] == []


def test_a_truncated_decision_counts_as_not_written(checkout: Path) -> None:
    retrain()
    with champion.DECISIONS.open("ab") as file:
        file.write(b'{"decision": "cham')
    assert len(champion.read_decisions()) == 1
    assert champion.is_decided()
    champion.publish(champion.decide(PARAMS))
    assert len(champion.read_decisions()) == 2
    assert champion.DECISIONS.read_bytes().count(b"\n") == 2


def test_a_lost_catalogue_is_restored(checkout: Path) -> None:
    retrain()
    champion.CATALOG.unlink()
    shutil.rmtree("data/sae")
    champion.settle()
    assert published() == {"first": "champion"}


def test_a_line_that_is_not_a_decision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    champion.DECISIONS.parent.mkdir(parents=True)
    champion.DECISIONS.write_text('{"decision": "champion"}\n{"decision"')
    with pytest.raises(ArtefactError, match=r"decisions\.jsonl: line 1 is not a decision \(reason: missing; add it"):
        champion.read_decisions()
