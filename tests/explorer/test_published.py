"""A server of the champion's catalogue follows each promotion without a restart, from before there is a champion."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ommatid.catalog.reader import Catalog
from ommatid.config import load_params
from ommatid.explorer.app import make_app
from ommatid.explorer.web import Settings
from ommatid.pipeline import open_stage
from ommatid.publish import champion
from support.small_study import Study


def test_a_promotion_is_followed(own_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_study.root)
    params = load_params(Path("params.yaml"))
    app = make_app(Settings(champion.CATALOG, is_published=True))
    with TestClient(app, base_url="http://127.0.0.1") as asks:
        early = asks.get("/")
        assert early.status_code == 503 and "data/published/catalog.duckdb: does not exist" in early.text

        champion.publish(first := champion.decide(params), keep=2)
        assert asks.get("/").status_code == 200
        assert "there was no champion" in asks.get("/runs").text
        page = asks.get(f"/features/{first.challenger.sae}/0")
        assert page.status_code == 200

        with app.state.explorer.library.open() as lent:  # as a request that is being answered
            champion.publish(champion.decide(params), keep=2)
            assert "the same SAE as the champion, with a new catalogue" in asks.get("/runs").text
            with app.state.explorer.library.open() as now:
                assert now is not lent and now.key != lent.key
            assert "there was no champion" in str(lent.rows("SELECT reason FROM runs")), "it keeps what it began with"
        assert asks.get(f"/features/{first.challenger.sae}/0").status_code == 200


def test_a_champion_of_an_earlier_training_is_measured_as_the_evaluation_would(own_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_study.root)
    params = load_params(Path("params.yaml"))
    champion.publish(first := champion.decide(params), keep=2)
    here = champion._read_scores(open_stage("catalog"))
    other = next(scores for digest, scores in here.items() if digest != first.challenger.digest)
    together = champion.decide(params, sae=other.sae)
    monkeypatch.setattr(champion, "_read_scores", lambda catalog: {other.digest: other})
    apart = champion.decide(params)
    assert apart.champion == together.champion == first.challenger and apart.matched == together.matched
    assert apart.matched and apart.matched.kept + apart.matched.split + apart.matched.changed + apart.matched.lost > 0
    assert apart.champion
    champion.publish(apart.model_copy(update={"decision": "champion"}), keep=2)
    with Catalog(champion.CATALOG) as catalog:
        (n,) = catalog.rows(
            "SELECT count(DISTINCT latent) FROM matches WHERE sae = $sae AND other_sae = $other",
            {"sae": other.sae, "other": apart.champion.sae},
        )
    assert n == (48 if other.sae.startswith("batch_topk-48") else 32,), "each latent has its nearest among the champion's"
