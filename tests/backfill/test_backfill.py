"""Proves that a backfill computes what is new about past SAEs and nothing else, and that its numbers are those of computing all anew.

Drawn tiles and the model that sees their colours: three SAEs, of which two were champions. The tests of this file run in order: each adds
something to the study, and compares the backfill with one that begins with an empty folder.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import yaml

from ommatid.backfill import keys, work
from ommatid.backfill.measure import Backfill, backfill
from ommatid.backfill.work import PLACE
from ommatid.catalog.reader import Catalog
from ommatid.config import Params, load_params
from ommatid.config.params import Margins
from ommatid.events import Event, Progress, ignore
from ommatid.extract import networks
from ommatid.pipeline import open_stage, place_of
from ommatid.pipeline.run import run_stage
from ommatid.publish import champion
from ommatid.publish.decisions import Decision, Scores, append, make_key
from ommatid.sources.stage import write_sources
from ommatid.store import Artefact
from ommatid.store.caches import CACHES
from support.study import make_test_params, run_verb
from support.tiles import COLOURS, TileModel, use_tile_model, write_tile_folder

CATALOG = PLACE / "catalog.duckdb"
FIRST = datetime(2026, 11, 1, tzinfo=UTC)
VOCABULARY = {"kind": "vocabulary", "words": ["words.txt"]}
SMALL = {"kind": "lite", "variant": "lite2", "image_size": 64}


class OtherJudge(TileModel):
    """A judge that sees where in a picture there is colour, and not which."""

    name = "places"

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.colours(pixels).sum((1, 3)) + 0.1


@pytest.fixture(scope="module", autouse=True)
def _checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with three SAEs: two former champions, and the checkout's own."""
    root = tmp_path_factory.mktemp("checkout")
    write_tile_folder(root / "photos", 90)
    (root / "words.txt").write_text("\n".join(COLOURS))
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"hookpoints": ["tiles", "cls"], "tokens": "all", "dtype": "float32"},
        train={"hookpoint": "tiles", "epochs": 6, "batch_size": 64, "lr": 0.01, "max_dead": 1.0, "d_sae": 12, "k": 2},
        evaluate={"max_dead": 1.0},
        label={"labellers": [VOCABULARY], "min_examples": 2},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_tile_model(patch)
        patch.setattr(networks, "load_judge", lambda one, dtype, device: (OtherJudge if one.image_size == 64 else TileModel)())
        for stage in ("images", "extract"):
            run_stage(stage, load_params(), ignore)
        for seed in (0, 1, 2):
            run_stage("train", load_params(overrides=[f"train.seed={seed}"]), ignore)
            if seed < 2:
                crown(only_sae(), FIRST + timedelta(days=seed))
        yield


def only_sae() -> Artefact:
    (sae,) = open_stage("train").each().values()
    return sae


def crown(sae: Artefact, when: datetime, **run: Any) -> Path:
    """Keep an SAE as a champion, and return its folder."""
    scores = Scores(sae=sae.summary["sae"], digest=sae.digest, fvu=0.5, l0=2, dead=0, ms=0.5, ms_floor=0.1)
    key = make_key("catalogue", sae.digest)
    made = Decision(
        decision="champion",
        reason="better",
        decided_at=when,
        challenger=scores,
        champion=None,
        margins=Margins(min_ms_gain=0, max_fvu_loss=0, max_dead_rise=0),
        catalog="catalogue",
        run=run,
        key=key,
    )
    folder = champion.folder_of(made) / "sae"
    shutil.copytree(sae.path, folder)
    append(made)
    return folder


class Spies:
    """Counts the SAEs that are evaluated and labelled, and those whose firings are scored."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for name in ("evaluate", "label", "judge_firings"):
            patch.setattr(work, name, self._counted(name, getattr(work, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> Spies:
    return Spies(monkeypatch)


def relations(path: Path = CATALOG) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of a catalogue, by relation."""
    with duckdb.connect(path, read_only=True) as connection:
        names = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        return {name: connection.execute(f'FROM "{name}" ORDER BY ALL').fetchall() for name in names}


def anew(params: Params) -> dict[str, list[tuple[Any, ...]]]:
    """What a backfill that begins with an empty folder writes."""
    kept = PLACE.with_name("kept")
    PLACE.rename(kept)
    try:
        backfill(params)
        return relations()
    finally:
        shutil.rmtree(PLACE)
        kept.rename(PLACE)


def counted(made: Backfill) -> dict[str, Mapping[str, int]]:
    return {"computed": {kind: n for kind, n in made.computed.items() if n}, "reused": {kind: n for kind, n in made.reused.items() if n}}


def with_labeller(**more: Any) -> Params:
    params = load_params()
    labellers = [labeller.model_dump(mode="json") for labeller in params.label.labellers]
    return load_params(overrides=[f"label.labellers={[*labellers, {**VOCABULARY, **more}]}"])


def test_the_first_backfill_continues_where_it_was_killed(spies: Spies) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, Progress) and "second pass" in event.what and spies.calls["evaluate"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backfill(load_params(), kill)
    assert not CATALOG.exists() and spies.calls == {"evaluate": 2, "label": 1}
    made = backfill(load_params())
    assert counted(made) == {"computed": {"evaluation": 2, "labeller": 2}, "reused": {"evaluation": 1, "judge": 3, "labeller": 1}}
    assert len(made.saes) == 3 and not made.left_out
    assert relations() == anew(load_params())


def test_the_catalogue_compares_saes_over_time_and_has_the_numbers_of_the_stages() -> None:
    for stage in ("evaluate", "label"):
        run_stage(stage, load_params(overrides=["train.seed=2"]), ignore)
    (evaluation,), (labels,) = (open_stage(stage).each().values() for stage in ("evaluate", "label"))
    with Catalog(CATALOG) as catalog:
        rows = catalog.ask("SELECT * FROM runs").dicts()
        assert [row["decided_at"] for row in rows] == [FIRST.replace(tzinfo=None), (FIRST + timedelta(days=1)).replace(tzinfo=None), None]
        assert [row["is_here"] for row in rows] == [False, False, True]
        own = rows[-1]
        for key in ("fvu", "l0", "dead", "ms", "ms_low", "ms_high", "ms_floor", "coverage", "n_latents", "judge"):
            assert own[key] == evaluation.summary[key], key
        assert own["n_labelled"] == labels.summary["n_labelled"]
        assert own["label_score"] == pytest.approx(labels.summary["score"], rel=1e-12)
        assert own["control_score"] == pytest.approx(labels.summary["control_score"], rel=1e-12)
        found = catalog.rows("SELECT latent, ms FROM judged WHERE sae = $sae ORDER BY latent", {"sae": own["sae"]})
        assert found == [(row["latent"], row["ms"]) for row in evaluation.read("latents", ["latent", "ms"]).to_pylist()]
        assert all(column.comment for columns in catalog.relations().values() for column in columns)


def test_the_checkouts_own_evaluation_is_taken_only_if_dvc_says_that_it_is_up_to_date(spies: Spies) -> None:
    expected, params = relations(), load_params()
    write_sources(params)
    recorded = Path("data/sources/evaluate.json")

    def lock(digest: str) -> None:
        deps = [{"path": recorded.as_posix(), "md5": digest}]
        Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": {"deps": deps}}}))

    lock(hashlib.md5(recorded.read_bytes()).hexdigest())
    assert anew(params) == expected and spies.calls["evaluate"] == 2
    lock("that of other code")
    assert anew(params) == expected and spies.calls["evaluate"] == 2 + 3
    Path("dvc.lock").unlink()


def test_nothing_is_computed_twice(spies: Spies, capsys: pytest.CaptureFixture[str]) -> None:
    before = relations()
    assert run_verb("backfill") == 0
    said = capsys.readouterr().out
    assert "backfill: 3 SAEs in data/backfill/catalog.duckdb; evaluations: 0 computed, 3 found, judges: 0 computed, 3 found" in said
    assert not spies.calls and relations() == before
    assert run_verb("query", "--catalog", str(CATALOG), "SELECT sae, decided_at, ms, ms_floor, label_score FROM runs") == 0


def test_a_new_labeller_labels_and_nothing_else_runs(spies: Spies) -> None:
    params = with_labeller(by="soft_wpmi")
    made = backfill(params)
    assert counted(made) == {"computed": {"labeller": 3}, "reused": {"evaluation": 3, "judge": 3, "labeller": 3}}
    assert spies.calls == {"label": 3}
    found = relations()
    assert len(found["labellers"]) == 6 and {row[1] for row in found["labellers"]} == {"vocabulary", "vocabulary-2"}
    assert found == anew(params)
    # the order of labellers is no reason to ask one again
    turned = load_params(overrides=[f"label.labellers={[one.model_dump(mode='json') for one in params.label.labellers[::-1]]}"])
    assert counted(backfill(turned)) == {"computed": {}, "reused": {"evaluation": 3, "judge": 3, "labeller": 6}}


def test_a_new_judge_scores_firings_and_nothing_else_runs(spies: Spies) -> None:
    params = load_params(overrides=[f"extract.judge={[load_params().extract.model_dump(mode='json')['judge'], SMALL]}"])
    run_stage("extract", params, ignore)
    made = backfill(params)
    assert counted(made) == {"computed": {"judge": 3}, "reused": {"evaluation": 3, "judge": 3, "labeller": 3}}
    assert spies.calls == {"judge_firings": 3}
    found = relations()
    assert {row[1] for row in found["judges"]} == {"tiles", "places"} and len(found["judges"]) == 6
    assert found == anew(params)
    (turned,) = [load_params(overrides=[f"extract.judge={[SMALL, load_params().extract.model_dump(mode='json')['judge']]}"])]
    run_stage("extract", turned, ignore)
    assert counted(backfill(turned)) == {"computed": {}, "reused": {"evaluation": 3, "judge": 6, "labeller": 3}}
    with Catalog(CATALOG) as catalog:
        assert catalog.rows("SELECT DISTINCT judge FROM runs") == [("places",)]


def test_a_new_metric_evaluates_and_does_not_label(spies: Spies, monkeypatch: pytest.MonkeyPatch) -> None:
    known = keys.code_of
    monkeypatch.setattr(keys, "code_of", lambda stage, *rest: {**known(stage, *rest), **({"new": "metric"} if stage == "evaluate" else {})})
    made = backfill(load_params())
    assert counted(made) == {"computed": {"evaluation": 3}, "reused": {"judge": 6, "labeller": 3}}
    assert spies.calls == {"evaluate": 3}


def test_results_are_a_cache_that_may_be_emptied() -> None:
    backfill(load_params())
    before = relations()
    (cache,) = [one for one in CACHES if one.name == "backfill"]
    entries = cache.by_use(Path("data"))
    assert {entry.path.parent.name for entry in entries} == {"evaluation", "labels", "judged"}
    for entry in entries:
        entry.remove()
    assert counted(backfill(load_params()))["computed"] == {"evaluation": 3, "labeller": 3}
    assert relations() == before


def test_a_damaged_result_is_computed_again(spies: Spies) -> None:
    before = relations()
    sae = only_sae().summary["sae"]
    for folder in (PLACE / "labels").glob(f"{sae}-*"):
        (folder / "labels.parquet").write_bytes(b"")
    backfill(load_params())
    assert spies.calls["label"] == 1 and relations() == before


def flip(path: Path) -> None:
    """Change a byte in the middle of a file, and not its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-20])])
@pytest.mark.parametrize("kind", ["evaluation", "labels", "judged"])
def test_results_whose_bytes_changed_are_computed_again(kind: str, damage: Callable[[Path], None]) -> None:
    before = relations()
    for path in (PLACE / kind).rglob("*.parquet"):
        damage(path)
    backfill(load_params())
    assert relations() == before


def test_a_champion_whose_bytes_changed_is_left_out_and_the_others_are_measured() -> None:
    before = relations()
    (folder,) = (champion.folder_of(one) for one in champion.read_decisions()[:1])
    file = folder / "sae/sae.safetensors"
    whole = file.read_bytes()
    flip(file)
    kept = PLACE.rename(PLACE.with_name("kept"))
    try:
        made = backfill(load_params())
        assert len(made.saes) == 2 and len(made.left_out) == 1
        assert f"{folder / 'sae'}: damaged (1): sae.safetensors: checksum differs" in made.left_out[0].reason
    finally:
        file.write_bytes(whole)
        shutil.rmtree(PLACE)
        kept.rename(PLACE)
    backfill(load_params())
    assert relations() == before


def test_what_cannot_be_measured_is_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for name, when in (("deeper", 5), ("gone", 6), ("broken", 7)):
        run_stage("train", load_params(overrides=[f"train.seed={when}", "train.hookpoint=cls"]), ignore)
        folder = crown(only_sae(), FIRST + timedelta(days=when))
        if name == "gone":
            shutil.rmtree(folder)
        if name == "broken":
            (folder / "sae.safetensors").unlink()
    run_stage("train", load_params(overrides=["train.seed=2"]), ignore)
    run_stage("extract", load_params(overrides=["extract.hookpoints=[tiles]"]), ignore)
    assert run_verb("backfill") == 0
    said = capsys.readouterr()
    assert "backfill: 3 SAEs in data/backfill/catalog.duckdb; 3 left out; evaluations: " in said.out
    with Catalog(CATALOG) as catalog:
        reasons = [reason for (reason,) in catalog.rows("SELECT reason FROM left_out ORDER BY decided_at")]
    assert reasons[0] == "extract.hookpoints no longer names cls; it has tiles"
    assert reasons[1].endswith("/sae is gone: former champions are kept as retrain.keep says")
    assert "sae.safetensors: missing" in reasons[2]
    assert all(reason in (said.out + said.err).replace("\n", " ") for reason in reasons[:1])
    shutil.rmtree(place_of("train").url)
    shutil.rmtree(champion.CHAMPIONS)
    assert run_verb("backfill") == 1
    assert "there is no past SAE that fits these activations" in capsys.readouterr().err
