"""Proves that the pages of runs show what the catalogue says of each, decisions in their order, and exactly the params that differ."""

import json
import re
from html import unescape
from pathlib import Path

import duckdb
import pytest
import yaml
from starlette.testclient import TestClient

from explorer.conftest import Visit
from ommatid.explorer.runs import compare_params
from support.small_study import HOSTILE, NAMES

WIDE, NARROW = NAMES


def test_runs(client: TestClient, catalogue: Path) -> None:
    with duckdb.connect(catalogue, read_only=True) as connection:
        runs = connection.execute("SELECT * FROM runs").df().set_index("name")
    found = {row["name"]: row for row in client.get("/api/runs").json()}
    assert list(found) == sorted(NAMES, key=lambda name: runs.ms[name] - runs.ms_floor[name], reverse=True)
    page = client.get("/runs").text
    for name, row in found.items():
        for column in ("fvu", "l0", "dead", "ms", "n_latents", "beats_control", "mlflow_run_id", "sae_digest"):
            assert row[column] == runs.loc[name, column]
        assert row["is_here"] and f"{row['fvu']:.3f}" in page and row["mlflow_run_id"] in page
    assert "Nothing has been decided" in page and '<a href="http' not in page, "no server is known"


def test_decisions(visit: Visit, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = visit(published)
    page = client.get("/runs").text
    places = [page.index(text) for text in ("2026-11-20 10:00", "+0.033 is above +0.013", "2026-11-01 10:00", "planted")]
    assert places == sorted(places), "the newest first, each with its reason"
    assert "not in this catalogue" in page and "<script>alert" not in page and HOSTILE["markup"] in unescape(page)
    old = client.get(f"/runs/{NARROW}")
    assert old.status_code == 200 and "its features are not in this catalogue" in old.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:5001/")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4201/api")
    for address in ("/runs", f"/runs/{WIDE}"):
        page = client.get(address).text
        run = client.get(f"/api/runs/{WIDE}").json()["run"]
        assert f'href="http://127.0.0.1:5001/#/runs/{run["mlflow_run_id"]}"' in page and "secret" not in page
        assert 'href="http://127.0.0.1:4201/runs/flow-run/flow%201"' in page


def test_run(client: TestClient, catalogue: Path) -> None:
    with duckdb.connect(catalogue, read_only=True) as connection:
        params = {name: json.loads(text) for name, text in connection.execute("SELECT name, params FROM runs").fetchall()}
    page = client.get(f"/runs/{WIDE}").text
    shown = unescape(re.search(r"<pre tabindex.*?<code>(.*?)</code>", page, re.DOTALL)[1])  # type: ignore[index]
    assert yaml.safe_load(shown) == params[WIDE]
    found = client.get(f"/api/runs/{WIDE}", params={"against": NARROW}).json()
    assert found["params"] == params[WIDE]
    assert found["differences"] == [{"key": "train.d_sae", "one": 48, "other": 32}, {"key": "train.seed", "one": 0, "other": 1}]
    assert [row["key"] for row in found["traces"]] == ["mlflow_run_id", "sae_digest"]
    page = client.get(f"/runs/{WIDE}", params={"against": NARROW, "sae": ""}).text
    assert "train.d_sae" in page and "train.k<" not in page
    assert "All params are the same" in client.get(f"/runs/{WIDE}", params={"against": WIDE}).text


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": {"b": 1}}, {"a": {"b": True}}, [("a.b", 1, True)]),
        ({"a": {"b": None}}, {"a": {}}, [("a.b", None, "absent"), ("a", "absent", {})]),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, [("a", [1, {"b": 2}], [1, {"b": 3}])]),
        ({}, {"x": {"y": "z"}}, [("x.y", "absent", "z")]),
    ],
)
def test_differences(one: dict, other: dict, expected: list) -> None:
    assert [(row["key"], row.get("one", "absent"), row.get("other", "absent")) for row in compare_params(one, other)] == expected


@pytest.mark.parametrize("name", ["batch_topk-48-k2", "x" * 3000, HOSTILE["markup"].replace("/", "|")])
def test_missing(client: TestClient, name: str) -> None:
    for address in (f"/runs/{name}", f"/api/runs/{name}"):
        answer = client.get(address)
        assert answer.status_code == 404 and "batch_topk-48-k2-s0" in answer.text, "near ones"
        assert "<script>alert" not in answer.text or answer.headers["content-type"] == "application/json"
    assert client.get(f"/runs/{WIDE}", params={"against": name[:400]}).status_code == 404


def test_bad_parameters(client: TestClient) -> None:
    assert "there is no such parameter" in client.get("/runs", params={"what": "1"}).text
    answer = client.get(f"/runs/{WIDE}", params={"against": "x" * 501})
    assert answer.status_code == 400 and "against" in answer.text and "at most 500 characters" in answer.text
