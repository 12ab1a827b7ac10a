"""A server of the champion's catalogue follows each promotion without a restart, from before there is a champion."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ommatid.config import load_params
from ommatid.explorer.app import make_app
from ommatid.explorer.web import Settings
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
