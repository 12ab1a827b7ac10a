"""Proves that the comparison of two SAEs counts what brute force over their directions counts, and lists each feature once."""

import itertools
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from safetensors.numpy import load_file
from starlette.testclient import TestClient

from explorer.conftest import Visit
from support.small_study import HOSTILE, NAMES, Study

WIDE, NARROW = NAMES
KINDS = ("kept", "split", "changed", "lost", "new")


@pytest.fixture(scope="module")
def features(catalogue: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows of `features` by latent, by the SAE's name in its training."""
    with duckdb.connect(catalogue, read_only=True) as connection:
        names = dict(connection.execute("SELECT sae, name FROM runs").fetchall())
        rows = connection.execute("SELECT sae, latent, ms, is_dead, label FROM features ORDER BY latent").fetchall()
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in NAMES}
    for sae, latent, ms, is_dead, label in rows:
        found[names[sae]][latent] = {"ms": ms, "is_dead": is_dead, "label": label}
    return found


def directions(study: Study, name: str) -> np.ndarray:
    weights = load_file(study.data / "sae" / name / "sae.safetensors")["W_dec"].astype(np.float32)
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def expect_kinds(study: Study, a: str, b: str, alive_a: set[int], alive_b: set[int]) -> dict[int | str, set[int]]:
    """Sort the features of both SAEs into kinds, one after the other and by their definition."""
    cosines = directions(study, a) @ directions(study, b).T
    there, back = cosines.argmax(1), cosines.argmax(0)
    found: dict[Any, set[int]] = {kind: set() for kind in KINDS}
    for latent in alive_a:
        other = int(there[latent])
        parts = [j for j in alive_b if back[j] == latent and cosines[latent, j] >= 0.6]
        if cosines[latent, other] >= 0.9 and back[other] == latent and other in alive_b:
            found["kept"].add(latent)
        elif len(parts) > 1:
            found["split"].add(latent)
        elif cosines[latent, other] >= 0.6:
            found["changed"].add(latent)
        else:
            found["lost"].add(latent)
    found["new"] = {j for j in alive_b if cosines[:, j].max() < 0.6}
    return found


def list_all(client: TestClient, **parameters: Any) -> list[dict[str, Any]]:
    """All rows of a list, page after page."""
    found = client.get("/api/compare", params=parameters).json()
    rows = found["features"]
    while found["next"]:
        assert len(found["features"]) == parameters["n"]
        found = client.get(found["next"]).json()
        rows += found["features"]
    return rows


@pytest.mark.parametrize(("a", "b"), [(WIDE, NARROW), (NARROW, WIDE)])
def test_brute_force(client: TestClient, study: Study, features: Any, a: str, b: str) -> None:
    alive = {name: {latent for latent, row in features[name].items() if not row["is_dead"]} for name in NAMES}
    expected = expect_kinds(study, a, b, alive[a], alive[b])
    assert sum(map(bool, expected.values())) >= 4, "the study has nearly every kind"
    found = client.get("/api/compare", params={"a": a, "b": b}).json()
    assert found["counts"] == {kind: len(latents) for kind, latents in expected.items()}
    assert [side["n_alive"] for side in (found["alive"][found["a"]], found["alive"][found["b"]])] == [len(alive[a]), len(alive[b])]
    cosines = directions(study, a) @ directions(study, b).T
    for kind, sort in itertools.product(KINDS, ("ms", "cosine")):
        rows = list_all(client, a=a, b=b, kind=kind, sort=sort, n=5)
        latents = [row["latent"] for row in rows]
        assert len(latents) == len(set(latents)) and set(latents) == expected[kind], "each feature once"
        mine, table = (features[b], cosines.T) if kind == "new" else (features[a], cosines)
        for row in rows:
            assert row["other_latent"] == table[row["latent"]].argmax()
            assert row["cosine"] == pytest.approx(table[row["latent"]].max(), abs=1e-5)
        if sort == "cosine":
            assert [row["cosine"] for row in rows] == sorted(row["cosine"] for row in rows)
        else:
            values = [mine[latent]["ms"] for latent in latents if mine[latent]["ms"] is not None]
            assert values == sorted(values, reverse=True)
        if kind == "split":
            for row in rows:
                parts = [j for j in alive[b] if cosines[:, j].argmax() == row["latent"] and cosines[row["latent"], j] >= 0.6]
                assert {other["latent"] for other in row["others"]} == set(parts) and len(parts) > 1


PLANTED = {
    WIDE: [(0, 0, 0.95), (1, 0, 0.92), (2, 1, 0.7), (3, 2, 0.3), (4, 3, 0.85), (5, 5, 0.9), (6, 6, 0.6), (7, 7, 0.59)],
    NARROW: [(0, 0, 0.95), (1, 4, 0.65), (2, 4, 0.6), (3, 4, 0.85), (4, 3, 0.59), (5, 5, 0.9), (6, 0, 0.62), (7, 4, 0.3)],
}
"""Matches of the first features that fire of each SAE: place of the feature, place of its nearest, and cosine."""


def test_planted_matches(visit: Visit, catalogue: Path, features: Any, tmp_path: Path) -> None:
    """Of two latents with the same nearest only one is kept, bounds belong to the upper kind, and what is kept is not split."""
    alive = {name: [latent for latent, row in features[name].items() if not row["is_dead"]] for name in NAMES}
    shutil.copy(catalogue, path := tmp_path / "catalog.duckdb")
    with duckdb.connect(path) as connection:
        saes = dict(connection.execute("SELECT name, sae FROM runs").fetchall())
        connection.execute("DELETE FROM matches")
        for name, other in ((WIDE, NARROW), (NARROW, WIDE)):
            for mine, theirs, cosine in PLANTED[name]:
                row = [saes[name], alive[name][mine], saes[other], alive[other][theirs], cosine]
                connection.execute("INSERT INTO matches VALUES (?, ?, ?, ?, ?, NULL)", row)
    client = visit(path)
    expected = {"kept": [0, 5], "split": [4], "changed": [1, 2, 6], "lost": [3, 7], "new": [4, 7]}
    for kind, places in expected.items():
        listed = {row["latent"] for row in list_all(client, a=WIDE, b=NARROW, kind=kind, n=2)}
        assert listed == {alive[NARROW if kind == "new" else WIDE][place] for place in places}, kind
    assert client.get("/compare", params={"a": WIDE, "b": NARROW, "kind": "kept"}).status_code == 200, "without shared images"


def test_numbers(client: TestClient, catalogue: Path) -> None:
    with duckdb.connect(catalogue, read_only=True) as connection:
        sql = "SELECT * FROM comparisons JOIN runs USING (sae) WHERE dictionary = $dictionary"
        own = connection.execute(sql, {"dictionary": "sae"}).df().set_index("name")
        untrained = connection.execute(sql, {"dictionary": "untrained"}).df().set_index("name")
        stable = connection.execute("SELECT stability.*, name FROM stability JOIN runs USING (sae)").df().set_index("name")
    found = client.get("/api/compare", params={"a": NARROW, "b": WIDE}).json()
    for name, numbers in zip((NARROW, WIDE), found["numbers"], strict=True):
        (row,), (control,) = own.loc[[name]].to_dict("records"), untrained.loc[[name]].to_dict("records")
        assert numbers["variance unexplained (FVU)"][0] == f"{row['fvu']:.3f}"
        assert numbers["latents per token (L0)"][0] == f"{row['l0']:.1f}"
        assert numbers["dead latents"][0] == f"{100 * row['dead']:.1f} %"
        value, beside = numbers["MS − floor"]
        assert value == f"{row['ms'] - row['ms_floor']:+.3f}"
        assert f"{row['ms_high'] - row['ms_floor']:+.3f}" in beside
        assert f"untrained SAE {control['ms'] - control['ms_floor']:+.3f}" in beside
    assert [row["mutual"] for row in found["stability"]] == stable.mutual[[NARROW, WIDE]].tolist()
    page = client.get("/compare").text
    assert f"by chance {stable.chance[WIDE]:.3f}" in page


def test_pictures_side_by_side(client: TestClient, catalogue: Path) -> None:
    page = client.get("/compare", params={"a": WIDE, "b": NARROW, "kind": "changed", "n": 3}).text
    rows = client.get("/api/compare", params={"a": WIDE, "b": NARROW, "kind": "changed", "n": 3}).json()
    pairings = page.split('<div class="pairing">')[1:]
    assert len(pairings) == 3
    with duckdb.connect(catalogue, read_only=True) as connection:
        for pairing, row in zip(pairings, rows["features"], strict=True):
            strongest = "SELECT image FROM examples WHERE sae = ? AND latent = ? ORDER BY decile DESC, rank LIMIT 3"
            images = [
                image
                for sae, latent in ((rows["a"], row["latent"]), (rows["b"], row["other_latent"]))
                for (image,) in connection.execute(strongest, [sae, latent]).fetchall()
            ]
            assert [int(image) for image in re.findall(r'data-image="(\d+)"', pairing)] == images
    assert "<script>alert" not in page and len(page) < 200_000


def test_published(visit: Visit, published: Path, study: Study, features: Any) -> None:
    client = visit(published)
    found = client.get("/api/compare").json()
    assert (found["a"].startswith(NARROW), found["b"].startswith(WIDE)) == (True, True), "the champion before and the champion"
    alive = {latent for latent, row in features[WIDE].items() if not row["is_dead"]}
    expected = expect_kinds(study, NARROW, WIDE, set(features[NARROW]), alive)
    assert found["counts"] == {kind: len(latents) for kind, latents in expected.items()}
    for kind in KINDS:
        assert {row["latent"] for row in list_all(client, kind=kind, n=7)} == expected[kind]
        page = client.get("/compare", params={"kind": kind})
        assert page.status_code == 200
        assert not expected[kind] or ("Its name and images are not in this catalogue" in page.text and "/thumbs/" in page.text)
    assert "as its own catalogue had it" in client.get("/compare").text
    swapped = client.get("/api/compare", params={"a": WIDE, "b": NARROW, "n": 100}).json()
    assert [row["latent"] for row in swapped["features"]] and swapped["a"].startswith(WIDE)


def test_no_matches(visit: Visit, catalogue: Path, tmp_path: Path) -> None:
    shutil.copy(catalogue, path := tmp_path / "apart.duckdb")
    with duckdb.connect(path) as connection:
        connection.execute("DELETE FROM matches")
        connection.execute("DELETE FROM stability")
    client = visit(path)
    page = client.get("/compare").text
    assert "has no matches of these two" in page and "dvc repro evaluate catalog" in page and "variance unexplained" in page
    shutil.copy(path, alone := tmp_path / "alone.duckdb")
    with duckdb.connect(alone) as connection:
        for relation in ("runs", "comparisons", "features"):
            connection.execute(f"DELETE FROM {relation} WHERE sae LIKE 'batch_topk-32%'")
    client = visit(alone)
    page = client.get("/compare")
    assert page.status_code == 200 and "train.runs" in page.text and "retrain" in page.text
    assert client.get("/api/compare").json()["b"] is None
    assert client.get("/compare", params={"a": WIDE, "b": WIDE}).status_code == 200, "there is nothing else to choose"


def test_what_makes_directions_alike(visit: Visit, catalogue: Path, tmp_path: Path) -> None:
    page = visit(catalogue).get("/compare").text
    assert "began with the same directions" not in page and "few dimensions" not in page
    shutil.copy(catalogue, path := tmp_path / "catalog.duckdb")
    with duckdb.connect(path) as connection:
        connection.execute('UPDATE runs SET params = json_merge_patch(params, \'{"train": {"seed": 7}}\')')
        connection.execute("UPDATE stability SET chance = 0.7")
    page = visit(path).get("/compare").text
    assert "Both were trained with seed 7" in page and "few dimensions" in page and "cosine of 0.700" in page


def test_choice(client: TestClient) -> None:
    for parameters in ({"sae": NARROW}, {"a": NARROW}, {"a": NARROW, "b": ""}, {"b": WIDE}):
        found = client.get("/api/compare", params=parameters).json()
        assert (found["a"].startswith(NARROW), found["b"].startswith(WIDE)) == (True, True), parameters
    page = client.get("/compare", params={"a": NARROW, "kind": "lost"}).text
    assert re.search(rf'<option value="{NARROW}-\w+" selected>', page[page.index('id="c-a"') :]), "the form holds the choice"
    swap = re.search(r'href="([^"]+)">Swap', page)
    assert swap and client.get(unescape(swap[1])).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "status", "said"),
    [
        ({"a": WIDE, "b": WIDE}, 400, "choose two different ones"),
        ({"kind": "gone"}, 400, "'kept'"),
        ({"n": 0}, 400, "greater than or equal to 1"),
        ({"n": 101}, 400, "less than or equal to 100"),
        ({"after": "x"}, 400, "after: got 'x'"),
        ({"after": 47_000}, 400, "expected a latent that is kept"),
        ({"after": -1}, 400, "greater than or equal to 0"),
        ({"c": "1"}, 400, "there is no such parameter"),
        ({"a": "batch_topk-48-k2-s1"}, 404, "batch_topk-48-k2-s0"),
        ({"b": HOSTILE["markup"]}, 404, "there is no SAE"),
        ({"a": "x" * 501}, 400, "at most 500 characters"),
    ],
)
def test_refused(client: TestClient, parameters: dict[str, Any], status: int, said: str) -> None:
    answer = client.get("/compare", params=parameters)
    assert answer.status_code == status and said in unescape(answer.text) and "<script>alert" not in answer.text
    assert client.get("/api/compare", params=parameters).status_code == status
