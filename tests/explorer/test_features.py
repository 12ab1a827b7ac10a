"""Proves that lists of features hold exactly what their filters say, in order, and that pages by key visit each feature once."""

import ast
import csv
import html
import io
import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from ommatid.catalog.reader import Catalog
from ommatid.explorer.app import make_app
from ommatid.explorer.features import Causal, Sort, State
from ommatid.explorer.web import Settings
from ommatid.show.doses import STATUSES_IN_WORDS
from support.small_study import HOSTILE, NAMES, Study


@pytest.fixture(scope="module")
def features(catalog: Catalog) -> pd.DataFrame:
    """The features of the first SAE, with the differences that lists sort by."""
    frame = catalog.pandas("SELECT * FROM features WHERE starts_with(sae, $name)", {"name": NAMES[0]})
    return frame.assign(
        over_control=frame.label_score - frame.control_score,
        over_floor=frame.ms - frame.ms_floor,
        over_best=frame.effect - frame.best_control,
    )


def ask(client: TestClient, **parameters: Any) -> dict[str, Any]:
    answer = client.get("/api/features", params={"sae": NAMES[0], **parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def latents(page: dict[str, Any]) -> list[int]:
    return [row["latent"] for row in page["features"]]


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("sort", get_args(Sort))
def test_pages_by_key_visit_each_feature_once(client: TestClient, features: pd.DataFrame, sort: str, order: str) -> None:
    by_latent = features.sort_values("latent")
    if sort == "label":
        by_latent = by_latent.assign(label=[None if pd.isna(label) else label[:80].lower().encode() for label in by_latent.label])
    expected = by_latent.sort_values(sort, ascending=order == "asc", na_position="last", kind="stable").latent.tolist()
    if sort == "latent" and order == "desc":
        expected = sorted(expected, reverse=True)
    first = page = ask(client, sort=sort, order=order, n=7)
    found, pages = latents(page), [page]
    while page["next"]:
        page = client.get(page["next"]).json()
        pages.append(page)
        found += latents(page)
    assert found == expected and {page["total"] for page in pages} == {len(expected)}
    assert first["previous"] is None
    for before in reversed(pages[:-1]):
        page = client.get(page["previous"]).json()
        assert latents(page) == latents(before), "the way back gives the same pages"
    assert page["previous"] is None or not latents(client.get(page["previous"]).json())


@pytest.mark.parametrize(
    ("parameters", "condition"),
    [
        ({"state": "dead"}, lambda f: f.is_dead),
        ({"state": "live"}, lambda f: ~f.is_dead),
        ({"state": "dense"}, lambda f: f.is_dense),
        ({"state": "rare"}, lambda f: f.is_rare),
        ({"state": "duplicate"}, lambda f: f.duplicate_of.notna()),
        ({"state": "unnamed"}, lambda f: f.label.isna() & ~f.is_dead),
        ({"state": "doubtful"}, lambda f: f.label_score <= f.control_score),
        *[({"causal": status}, lambda f, status=status: f.causal == status) for status in get_args(Causal)],
        ({"over_control": 0.1}, lambda f: f.over_control >= 0.1),
        ({"over_floor": 0.0}, lambda f: f.over_floor >= 0),
        ({"ms_min": 0.4, "ms_max": 0.6}, lambda f: (f.ms >= 0.4) & (f.ms < 0.6)),
        ({"density_min": 0.01, "density_max": 0.1}, lambda f: (f.density >= 0.01) & (f.density < 0.1)),
        ({"images_min": 10}, lambda f: f.n_images >= 10),
        ({"labeller": "human"}, lambda f: f.labeller == "human"),
        ({"status": "ok"}, lambda f: f.label_status == "ok"),
        ({"label": "OMELET"}, lambda f: f.label.str.lower().str.contains("omelet", regex=False, na=False)),
        *[
            (
                {"label": text.lower()[:200]},
                lambda f, text=text: f.label.str.lower().str.contains(text.lower()[:200], regex=False, na=False),
            )
            for text in HOSTILE.values()
        ],
        *[
            ({"class": text[:500]}, lambda f, text=text: f.top_classes.map(lambda some: text[:500] in list(some)))
            for text in HOSTILE.values()
        ],
        ({"state": "live", "images_min": 5, "ms_min": 0.3}, lambda f: ~f.is_dead & (f.n_images >= 5) & (f.ms >= 0.3)),
    ],
)
def test_filters_choose_what_they_say(client: TestClient, features: pd.DataFrame, parameters: dict[str, Any], condition: Any) -> None:
    chosen = features[condition(features).fillna(False).astype(bool)]
    page = ask(client, sort="latent", order="asc", n=200, **parameters)
    assert latents(page) == sorted(chosen.latent) and page["total"] == len(chosen)


def test_states_are_all_tested() -> None:
    assert len(get_args(State)) == 7


def test_another_sae_in_which_no_direction_is_alike(client: TestClient, catalog: Catalog) -> None:
    (first, second) = (client.get("/api/saes").json()[i]["sae"] for i in (0, 1))
    sql = """
        SELECT latent FROM features WHERE sae = $sae AND NOT is_dead AND latent NOT IN
            (SELECT latent FROM matches WHERE sae = $sae AND other_sae = $other AND cosine >= 0.9) ORDER BY latent
    """
    expected = [latent for (latent,) in catalog.rows(sql, {"sae": first, "other": second})]
    assert expected and latents(ask(client, sae=first, unmatched=second, sort="latent", order="asc", n=200)) == expected


def test_the_sql_shown_gives_the_features_shown(client: TestClient, catalog: Catalog) -> None:
    page = ask(client, label="'", images_min=2, sort="over_floor", n=5)
    assert page["features"], "a label with a quote is there"
    found = catalog.ask(page["sql"])
    assert [row["latent"] for row in found.dicts()] == latents(page)


def test_downloads_hold_all_features_in_order(client: TestClient) -> None:
    parameters = {"sae": NAMES[0], "images_min": 2, "sort": "ms"}
    expected = latents(ask(client, **parameters, n=200))
    text = client.get("/features.csv", params=parameters)
    rows = list(csv.DictReader(io.StringIO(text.text)))
    assert [int(row["latent"]) for row in rows] == expected and "attachment" in text.headers["content-disposition"]
    table = pq.read_table(pa.BufferReader(client.get("/features.parquet", params=parameters).content))
    assert table["latent"].to_pylist() == expected
    assert not any(cell[:1] in ("=", "+", "@") for row in rows for cell in row.values() if cell), "no cell is a formula"


def test_pictures_are_the_strongest(client: TestClient, catalog: Catalog) -> None:
    page = client.get("/features", params={"sae": NAMES[0], "sort": "n_images", "n": 3}).text
    cards = re.findall(r'<article class="card" data-latent="(\d+)">(.*?)</article>', page, re.DOTALL)
    assert len(cards) == 3
    for latent, card in cards:
        sql = "SELECT image FROM examples WHERE starts_with(sae, $sae) AND latent = $latent ORDER BY decile DESC, rank LIMIT 4"
        expected = [image for (image,) in catalog.rows(sql, {"sae": NAMES[0], "latent": int(latent)})]
        assert [int(image) for image in re.findall(r'data-image="(\d+)"', card)] == expected


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/features?sort=price", "latent"),
        ("/features?state=alive", "doubtful"),
        ("/features?ms_min=high", "number"),
        ("/features?ms_min=nan", "ms_min"),
        ("/features?n=0", "greater than or equal to 1"),
        ("/features?n=1000000", "less than or equal to 200"),
        ("/features?colour=red", "there is no such parameter"),
        ("/features?after=7", "key of a page"),
        ("/features?after=[NaN,1]", "key of a page"),
        ('/features?sort=label&after=["a",9999999999]', "key of a page"),
        ("/features?unmatched=nothing", "no matches of"),
        ("/features?rated=9", "less than or equal to 5"),
        ("/features?label=" + "x" * 201, "200"),
    ],
)
def test_bad_parameters_are_explained(client: TestClient, address: str, said: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 400 and said in answer.text
    assert client.get(address.replace("/features", "/api/features")).json()["error"]


@pytest.mark.parametrize("label", ["red", "a \\ b", '"""); import os; ("""', "'" * 3, "$sae"])
def test_copied_python_asks_the_question_and_nothing_else(client: TestClient, label: str) -> None:
    page = client.get("/features", params={"label": label}).text
    sql, code = (html.unescape(double or single) for double, single in re.findall(r"""data-copy=(?:"([^"]*)"|'([^']*)')""", page))
    *loaded, opened = ast.parse(code).body
    assert all(isinstance(one, ast.ImportFrom) for one in loaded) and isinstance(opened, ast.With) and len(opened.body) == 1
    asked = opened.body[0]
    assert isinstance(asked, ast.Assign) and isinstance(asked.value, ast.Call) and len(asked.value.args) == 1
    assert ast.literal_eval(asked.value.args[0]).strip() == sql
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["rows"]) == len(ask(client, sae=None, label=label)["features"])


def test_missing_features_lead_to_near_ones(client: TestClient) -> None:
    answer = client.get(f"/features/{NAMES[0]}/4000")
    assert answer.status_code == 404 and "its latents are 0 to 47" in answer.text and "/47" in answer.text
    assert client.get("/features/no-such-sae/1").status_code == 404
    assert client.get(f"/features/{NAMES[0]}/{10**30}").status_code in (400, 404)


def test_a_features_page_says_what_the_catalogue_says(client: TestClient, catalog: Catalog, features: pd.DataFrame) -> None:
    row = features.loc[features.label_score.notna()].sort_values("n_images").iloc[-1]
    found = client.get(f"/api/features/{row.sae}/{row.latent}").json()
    firings = catalog.pandas(
        "SELECT act, label FROM firings JOIN images USING (image) WHERE sae = $sae AND latent = $latent",
        {"sae": row.sae, "latent": int(row.latent)},
    )
    assert sum(bin_["n"] for bin_ in found["histogram"]) == len(firings) == row.n_images
    shares = firings.label.value_counts(normalize=True)
    for shown in found["classes"]:
        assert math.isclose(shown["share"], shares[shown["label"]]) and shown["lift"] > 0 and 0 < shown["coverage"] <= 1
    assert {image["image"] for image in found["silent"]}.isdisjoint(
        image
        for (image,) in catalog.rows("SELECT image FROM firings WHERE sae = $sae AND latent = $l", {"sae": row.sae, "l": int(row.latent)})
    )
    page = client.get(f"/features/{row.sae}/{row.latent}").text
    assert f"{100 * row.label_score:.1f} %" in page and f"{100 * row.control_score:.1f} %" in page and f"{row.ms:.3f}" in page


def test_every_feature_has_a_page(client: TestClient, features: pd.DataFrame) -> None:
    for latent in features.latent:
        answer = client.get(f"/features/{NAMES[0]}/{latent}")
        assert answer.status_code == 200 and len(answer.content) < 150_000


def test_the_start_page_shows_headlines_and_lists(client: TestClient) -> None:
    page = client.get("/").text
    assert len(page.encode()) < 200_000
    assert all(text in page for text in ("of labels beat their control", "mean MS above its floor", "Most monosemantic", "floor"))
    cells = re.findall(r'<a href="(/features\?[^"]*density_min[^"]*)"><title>([\d,]+) features?;', page)
    assert sum(int(n.replace(",", "")) for _, n in cells) == sum(not math.isnan(row["ms"] or math.nan) for row in _live(client))
    for address, n in cells:
        assert client.get("/api" + address.replace("&amp;", "&")).json()["total"] == int(n), "a cell leads to the features it counts"


def test_lists_of_the_start_page_hold_what_their_titles_say(client: TestClient, study: Study, tmp_path: Path) -> None:
    """Also where nothing is like that, as in a set without classes, names and scores: then they are not shown."""
    addresses = dict(re.findall(r'<h2><a href="(/features[^"]*)">([^<]+)</a>', client.get("/").text))
    found = {title: client.get("/api" + address.replace("&amp;", "&")).json()["features"] for address, title in addresses.items()}
    claims = {
        "Most monosemantic": lambda row: row["ms"] is not None and row["n_images"] >= 16,
        "Best named": lambda row: row["label_score"] - row["control_score"] >= 0.2,
        "Causal": lambda row: row["causal"] == "causal" and row["effect"] > row["best_control"],
        "Names not to believe": lambda row: row["label_score"] <= row["control_score"],
        "Of one class": lambda row: row["purity"] >= 0.9,
    }
    assert {"Most monosemantic", "Best named"} <= set(found)
    assert all(rows and all(map(claim, rows)) for title, claim in claims.items() if (rows := found.get(title)) is not None)
    shutil.copy(study.catalog, bare := tmp_path / "bare.duckdb")
    with duckdb.connect(bare) as connection:
        nothing = "label = NULL, label_score = NULL, control_score = NULL, purity = NULL, ms = NULL, causal = 'untested'"
        connection.execute(f"UPDATE features SET {nothing}")
    with TestClient(make_app(Settings(catalog=bare)), base_url="http://127.0.0.1") as other:
        page = other.get("/").text
    assert not any(f">{title}</a>" in page for title in claims)


def test_the_histogram_of_equal_activations_has_one_bar_at_their_value(study: Study, tmp_path: Path) -> None:
    shutil.copy(study.catalog, path := tmp_path / "equal.duckdb")
    with duckdb.connect(path) as connection:
        sae, latent, n = connection.execute(
            "SELECT sae, latent, count(*) AS n FROM firings GROUP BY ALL ORDER BY n DESC LIMIT 1"
        ).fetchall()[0]
        connection.execute("UPDATE firings SET act = 3.25 WHERE sae = ? AND latent = ?", [sae, latent])
    with TestClient(make_app(Settings(catalog=path)), base_url="http://127.0.0.1") as client:
        page = client.get(f"/features/{sae}/{latent}").text
        found = client.get(f"/api/features/{sae}/{latent}").json()["histogram"]
    assert found == [{"bin": 0, "n": n, "low": 3.25, "high": 3.25}] and f"3.25 to 3.25: {n} images" in page


def _live(client: TestClient) -> list[dict[str, Any]]:
    best = client.get("/api/saes").json()[0]["sae"]
    return [row for row in ask(client, sae=best, n=200)["features"] if row["density"] > 0]


def test_a_page_shows_what_a_tested_latent_does_beside_its_controls(client: TestClient, catalog: Catalog) -> None:
    """The numbers are those of `interventions`; of a latent that was not tested the page says why."""
    sql = "SELECT sae, latent, causal FROM features WHERE causal {} 'untested' AND NOT is_dead ORDER BY sae, latent LIMIT 1"
    ((sae, latent, status),) = catalog.rows(sql.format("<>"))
    page = client.get(f"/features/{sae}/{latent}").text
    said = {"causal": "Causal", "reads_only": "Reads only", "breaks_model": "Breaks the model"}[status]
    assert f"<b>{said}</b>" in page and all(f">{name}</text>" in page for name in ("this latent", "other latents", "random directions"))
    doses = client.get(f"/api/features/{sae}/{latent}").json()["doses"]
    wanted = "SELECT arm, dose, value FROM interventions WHERE sae = $sae AND latent = $latent AND outcome = 'toward_label' ORDER BY ALL"
    assert sorted((row["arm"], row["dose"], row["value"]) for row in doses) == catalog.rows(wanted, {"sae": sae, "latent": latent})
    row = client.get(f"/api/features/{sae}/{latent}").json()["feature"]
    where = "below" if row["best_control"] < row["effect_low"] else "above" if row["best_control"] > row["effect_high"] else "within"
    assert f", lies {where} this interval." in page
    ((sae, latent, _),) = catalog.rows(sql.format("="))
    untested = client.get(f"/features/{sae}/{latent}").text
    assert "Not tested: not chosen by the param intervene.latents." in untested and "this latent</text>" not in untested


def test_a_catalogue_of_an_older_version_does_not_offer_what_it_does_not_know(study: Study, tmp_path: Path) -> None:
    shutil.copy(study.catalog, old := tmp_path / "old.duckdb")
    with duckdb.connect(old) as connection:
        (kind,) = connection.execute("SELECT table_type FROM information_schema.tables WHERE table_name = 'interventions'").fetchall()[0]
        connection.execute(f"DROP {'VIEW' if kind == 'VIEW' else 'TABLE'} interventions")
    with TestClient(make_app(Settings(catalog=old)), base_url="http://127.0.0.1") as client:
        page = client.get("/features").text
        assert 'name="causal"' not in page and "effect − best control" not in page and client.get("/").status_code == 200
        for query in ("causal=causal", "sort=over_best"):
            answer = client.get(f"/features?{query}")
            assert answer.status_code == 400 and "as an older version of Ommatid built it" in answer.text


@pytest.mark.parametrize("view", ["grid", "table"])
def test_lists_say_what_tested_features_do(client: TestClient, catalog: Catalog, view: str) -> None:
    sql = "SELECT sae, latent, causal, effect, best_control FROM features WHERE causal <> 'untested' ORDER BY sae, latent LIMIT 1"
    ((sae, _, status, effect, best_control),) = catalog.rows(sql)
    page = client.get("/features", params={"sae": sae, "causal": status, "view": view, "n": 200}).text
    said = f'{STATUSES_IN_WORDS[status]} {effect:+.3f} <span class="control">control {best_control:+.3f}</span>'.replace("-", "−")
    assert said in page
    assert "reads only" not in client.get("/features", params={"sae": sae, "causal": "untested", "n": 1}).text.split('id="results"')[1]


def test_a_page_says_what_the_latents_like_it_do(client: TestClient, catalog: Catalog) -> None:
    """Statuses and effects of neighbours are those of `features`: in the JSON of all, and on the page of those that were tested."""
    sql = """
        SELECT n.sae, n.latent, n.other, x.effect, x.best_control FROM neighbours AS n
        JOIN features AS x ON x.sae = n.sae AND x.latent = n.other WHERE x.causal <> 'untested' ORDER BY ALL LIMIT 1
    """
    ((sae, latent, other, effect, best_control),) = catalog.rows(sql)
    found = client.get(f"/api/features/{sae}/{latent}").json()["neighbours"]
    wanted = "SELECT latent, causal, effect, attribution FROM features WHERE sae = $sae AND latent IN $others ORDER BY latent"
    others = sorted(row["latent"] for row in found)
    rows = [tuple(row[key] for key in ("latent", "causal", "effect", "attribution")) for row in found]
    assert sorted(rows) == catalog.rows(wanted, {"sae": sae, "others": others})
    n_tested = sum(row["causal"] != "untested" for row in found)
    page = html.unescape(client.get(f"/features/{sae}/{latent}").text)
    assert f"Tested for what they do: {n_tested} of {len(found)}." in page and other in others
    assert f"effect {effect:+.3f}, best control {best_control:+.3f}".replace("-", "−") in page
