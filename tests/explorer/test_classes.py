"""Proves that the pages of classes give the numbers that pandas counts over the same catalogue, and take any class's name."""

import json
import math
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import duckdb
import pandas as pd
import pytest
from starlette.testclient import TestClient

from explorer.conftest import Visit
from support.small_study import HOSTILE, NAMES

WIDE, NARROW = NAMES
CLASSES = ["warm on white", *HOSTILE.values()]


class Tables:
    """Relations of the study as frames, each read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saes = self.ask("SELECT name, sae FROM runs").set_index("name").sae.to_dict()

    def ask(self, sql: str, **values: Any) -> pd.DataFrame:
        with duckdb.connect(self.path, read_only=True) as connection:
            return connection.execute(sql, values or None).df()


@pytest.fixture(scope="module")
def tables(catalogue: Path) -> Tables:
    return Tables(catalogue)


def test_classes(client: TestClient, tables: Tables) -> None:
    images = tables.ask("SELECT label FROM images WHERE split = 'eval'").label
    for name, sae in tables.saes.items():
        features = tables.ask("SELECT latent, purity, top_classes FROM features WHERE sae = $sae", sae=sae)
        probes = tables.ask("SELECT * FROM probes WHERE sae = $sae", sae=sae)
        found = client.get("/api/classes", params={"sae": name}).json()
        assert found["total"] == len(CLASSES) and {row["class"] for row in found["classes"]} == set(CLASSES)
        assert [row["auroc"] for row in found["classes"]] == sorted((row["auroc"] for row in found["classes"]), reverse=True)
        for row in found["classes"]:
            mine = probes[probes["class"] == row["class"]]
            best, x = (pd.DataFrame(mine[chosen]).iloc[0] for chosen in ((mine.probe == "latents") & (mine.k == 1), mine.probe == "x"))
            pure = features[(features.purity >= 0.75) & features.top_classes.map(lambda top, name=row["class"]: [*top][:1] == [name])]
            assert row["n_images"] == (images == row["class"]).sum() and row["n_own"] == len(pure)
            assert [row[key] for key in ("auroc", "auroc_low", "auroc_high")] == [best.auroc, best.auroc_low, best.auroc_high]
            assert (row["latent"], row["x_auroc"], row["x_low"]) == (best.latents[0], x.auroc, x.auroc_low)
            assert row["gap"] == pytest.approx(x.auroc - best.auroc)
    page = client.get("/classes").text
    assert f"{len(images)} evaluation images count here" in page and "6 of 6 classes have probes" in page


@pytest.mark.parametrize("sort", ["class", "n_images", "auroc", "x_auroc", "gap", "n_own"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_classes(client: TestClient, tables: Tables, sort: str, order: str) -> None:
    address, rows = f"/api/classes?sort={sort}&order={order}&n=4", []
    first = client.get(address).json()
    while address:
        found = client.get(address).json()
        assert (found["previous"] is None) == (not rows)
        rows, address = [*rows, *found["classes"]], found["next"]
    assert sorted(row["class"] for row in rows) == sorted(CLASSES), "each class once"
    values = [row[sort] for row in rows]
    assert values == sorted(values, reverse=order == "desc")
    shown = tables.ask(first["sql"])
    assert shown["class"].tolist() == [row["class"] for row in rows[:4]], "the SQL behind a page gives that page"


@pytest.mark.parametrize("text", ["WARM", "longest", "'single'", '"', "\u202eשלום", "%", "_", "\\"])
def test_search(client: TestClient, text: str) -> None:
    found = client.get("/api/classes", params={"text": text}).json()
    assert {row["class"] for row in found["classes"]} == {name for name in CLASSES if text.lower() in name.lower()}
    page = client.get("/classes", params={"text": text})
    assert page.status_code == 200 and f'value="{text}"' in unescape(page.text)


@pytest.mark.parametrize("name", CLASSES, ids=["plain", *HOSTILE])
@pytest.mark.parametrize("which", NAMES)
def test_class(client: TestClient, tables: Tables, name: str, which: str) -> None:
    sae = tables.saes[which]
    images = tables.ask("SELECT image, label FROM images WHERE split = 'eval'")
    firings = tables.ask("SELECT image, latent FROM firings WHERE sae = $sae", sae=sae)
    probes = tables.ask("SELECT * FROM probes WHERE sae = $sae AND class = $class", sae=sae, **{"class": name})
    mine = set(images.image[images.label == name])
    found = client.get("/api/class", params={"name": name, "sae": which, "n": 200}).json()
    assert (found["n_images"], found["n_eval"]) == (len(mine), len(images))
    shown = [(row["probe"], row["k"], row["auroc"], row["auroc_low"]) for row in found["probes"]]
    assert shown == [*probes[["probe", "k", "auroc", "auroc_low"]].itertuples(index=False, name=None)]
    probed = probes.latents[probes.k == 10].iloc[0].tolist()
    assert found["probed"] == probed
    telling = found["telling"].values()
    labelled = set(images.image[images.label.notna()])
    for row in telling:
        fired = set(firings.image[firings.latent == row["latent"]]) & labelled
        share, coverage = len(fired & mine) / len(fired), len(fired & mine) / len(mine)
        assert row["n_both"] == len(fired & mine)
        assert (row["share"], row["coverage"]) == pytest.approx((share, coverage))
        assert row["lift"] == pytest.approx(share / (len(mine) / len(labelled)))
    for by, least in (("lift", 1), ("coverage", 1.5)):
        listed = [found["telling"][str(latent)] for latent in found[f"by_{by}"]]
        assert [row[by] for row in listed] == sorted((row[by] for row in listed), reverse=True)
        assert {row["latent"] for row in listed} == {row["latent"] for row in telling if row["lift"] >= least}
    assert found["best"] == [latent for latent in probed if found["telling"].get(str(latent), {"lift": 0})["lift"] > 1] != []
    told = set(firings.image[firings.latent.isin(found["best"])])
    others = set(images.image) - mine
    assert (found["n_missing"], found["n_others"], found["n_others_told"]) == (len(mine - told), len(others), len(others & told))
    counts = firings[firings.latent.isin(found["best"])].image.value_counts()
    assert [(row["image"], row["n_told"]) for row in found["images"]] == [(image, counts.get(image, 0)) for image in sorted(mine)]
    missing = client.get("/api/class", params={"name": name, "sae": which, "n": 200, "show": "missing"}).json()
    assert [row["image"] for row in missing["images"]] == sorted(mine - told)
    page = client.get("/class", params={"name": name, "sae": which})
    statements = re.search(r"<pre><code>(.*?)</code></pre>", page.text, re.DOTALL)
    assert statements
    by_sql = tables.ask(unescape(statements[1]).split("\n;\n")[-1])
    for column in ("n_missing", "n_others", "n_others_told"):
        assert set(by_sql[column]) == {found[column]}
    images = [(row["image"], row["n_told"]) for row in found["images"][:24]]
    assert [*by_sql[["image", "n_told"]].itertuples(index=False, name=None)] == images, "the SQL behind the page gives its images"
    assert page.status_code == 200 and "<script>alert" not in page.text and len(page.text) < 400_000
    assert ("No feature is of this class alone" in page.text) == (not found["n_own"])
    links = [unescape(link) for link in re.findall(r'href="(/class\?[^"]+)"', page.text)]
    assert links and all(client.get(link).status_code == 200 for link in links[:2]), "links to itself hold the name"


def test_pages_of_images(client: TestClient, tables: Tables) -> None:
    images = tables.ask("SELECT image FROM images WHERE split = 'eval' AND label = $label", label=HOSTILE["quotes"]).image
    address, seen = f"/class?{urlencode({'name': HOSTILE['quotes'], 'n': 10})}", []
    while address:
        page = client.get(address).text
        seen += [int(image) for image in re.findall(r'data-image="(\d+)"', page[page.index('id="images"') :])]
        following = re.search(r'rel="next" href="([^"]+)"', page)
        address = unescape(following[1]) if following else ""
    assert seen == sorted(images)


def test_class_without_probes(visit: Visit, catalogue: Path, tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    shutil.copy(catalogue, path)
    with duckdb.connect(path) as connection:
        connection.execute("DELETE FROM probes WHERE class = 'warm on white'")
        connection.execute("UPDATE images SET split = 'train' WHERE label = $1", [HOSTILE["lines"]])
    client = visit(path)
    page = client.get("/classes").text
    assert "4 of 5 classes have probes" in page and "not among the 64 most common" in page
    last = client.get("/api/classes").json()["classes"][-1]
    assert (last["class"], last["auroc"], last["latent"]) == ("warm on white", None, None), "without a value comes last"
    found = client.get("/api/class", params={"name": "warm on white"}).json()
    more = [int(latent) for latent, row in found["telling"].items() if row["lift"] > 1]
    assert found["probed"] == [] and found["best"] == more[:10] != []
    assert "no probe" in client.get("/class", params={"name": "warm on white"}).text
    training = client.get("/class", params={"name": HOSTILE["lines"]})
    assert training.status_code == 200 and "None of its images is for evaluation" in training.text
    shutil.copy(catalogue, alone := tmp_path / "alone.duckdb")
    with duckdb.connect(alone) as connection:
        connection.execute("UPDATE images SET label = 'only'; DELETE FROM probes; UPDATE class_latents SET class = 'only', lift = 1")
    only = visit(alone).get("/class", params={"name": "only"})
    assert only.status_code == 200 and "no other class to tell it from" in only.text and "more on it than on others" not in only.text
    shutil.copy(catalogue, bare := tmp_path / "bare.duckdb")
    with duckdb.connect(bare) as connection:
        connection.execute("UPDATE images SET label = NULL")
        connection.execute("DELETE FROM probes")
    unlabelled = visit(bare).get("/classes")
    assert unlabelled.status_code == 200 and "No evaluation image has a class" in unlabelled.text


@pytest.mark.parametrize("name", ["warm on wite", "<SCRIPT>alert('planted')", "nothing like it", "x" * 20_000])
def test_missing_class(client: TestClient, name: str) -> None:
    for address in ("/class", "/api/class"):
        answer = client.get(address, params={"name": name})
        assert answer.status_code == 404 and "No image is of the class" in answer.text
    near = client.get("/api/class", params={"name": name}).json()["near"]
    assert near and all(client.get(address).status_code == 200 for address in near.values())
    if name == "warm on wite":
        assert next(iter(near)) == "warm on white"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/class", "name: "),
        ("/class?name=", "name: "),
        (f"/class?name={'x' * 20_001}", "at most 20000 characters"),
        ("/class?name=x&sort=purity", "'lift' or 'coverage'"),
        ("/class?name=x&n=0", "greater than or equal to 1"),
        ("/class?name=x&after=99999999999", "less than or equal to"),
        ("/class?name=x&show=DROP", "'all' or 'missing'"),
        ("/classes?sort=sae;", "sort: "),
        ("/classes?page=0", "page: "),
        ("/classes?what=1", "there is no such parameter"),
    ],
)
def test_bad_parameters(client: TestClient, address: str, said: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 400 and said in unescape(answer.text)
    assert said in json.dumps(client.get(f"/api{address}").json(), ensure_ascii=False)


def test_past_the_end(client: TestClient) -> None:
    page = client.get("/classes", params={"page": 9})
    assert page.status_code == 200 and "The list ends before this page" in page.text
    assert not math.isnan(client.get("/api/classes", params={"page": 9}).json()["total"])
