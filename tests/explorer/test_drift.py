"""The page of drift shows every check, its numbers beside chance, and old and new pictures of what has changed; to everybody, safely."""

import io
import re
from datetime import datetime
from html import unescape
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from explorer.conftest import Visit
from ommatid import schemas
from ommatid.publish.catalog import N_CHECKS, write_drift
from support.browser import Windows, assert_accessible
from support.html import read
from support.servers import serving_explorer
from support.small_study import MARKUP

DRIFTED, FINE, FEW = "00003-cccc", "00002-bbbb", "00001-aaaa"
NUMBERS = {
    "mmd": 0.043, "mmd_chance": 0.0002, "mmd_p": 0.01, "auroc": 0.91, "auroc_chance": 0.53, "auroc_p": 0.01, "auroc_found": 0.55,
    "fvu": 0.6, "fvu_before": 0.36, "fvu_chance": 0.01, "fvu_low": 0.2, "fvu_high": 0.3, "fvu_p": 0.01, "fvu_found": 0.02,
    "n_embedded": 600, "n_encoded": 590, "n_latents": 40, "n_changed": 3, "latents_p": 1e-9,
}  # fmt: skip
QUIET = {"mmd_p": 1.0, "auroc": 0.497, "auroc_p": 1.0, "fvu": 0.352, "fvu_p": 0.7, "n_changed": 0, "latents_p": 1.0}


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "WEBP")
    return buffer.getvalue()


def write_check(folder: Path, check_id: str, sae: str, verdict: str, reason: str, numbers: dict[str, Any], changed: bool) -> Path:
    """Write the tables of a check; of its three latents two are changed, one of them with pictures of both sides."""
    made = folder / check_id
    made.mkdir(parents=True)
    row = {name: None for name in schemas.DRIFT_CHECKS.names} | {
        "check_id": check_id, "checked_at": datetime(2026, 11, 30, 4, int(check_id[4])), "sae": sae, "verdict": verdict, "reason": reason,
        "action": "stop", "n_new": 600, "n_known": 10_000, "alpha": 0.05, "champion": "key", "images_digest": "digest",
    }  # fmt: skip
    rows = [
        {
            "check_id": check_id, "sae": sae, "latent": latent, "rank": latent + 1, "label": MARKUP if latent == 0 else None, "rate": 0.775,
            "rate_before": 0.096, "act": 6.65 if latent == 0 else None, "act_before": 6.22, "rate_p": 1e-9, "act_p": None, "p": 1e-9,
            "is_changed": changed and latent < 2, "change": "more" if changed and latent < 2 else None,
        }
        for latent in range(3)
    ]  # fmt: skip
    images = [
        {"check_id": check_id, "latent": 0, "side": side, "rank": rank, "image_id": "0" * 64, "path": MARKUP, "act": 9.5 - rank,
         "thumbnail": picture("red" if side == "new" else "blue")}
        for side in ("before", "new")
        for rank in ((1, 2) if changed else ())
    ]  # fmt: skip
    for table, some in (("drift_checks", [row | numbers]), ("drift", rows if numbers else []), ("drift_images", images)):
        pq.write_table(pa.Table.from_pylist(some, schema=schemas.TABLES[table].schema), made / f"{table}.parquet")
    return made


@pytest.fixture(scope="module")
def drifted(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published catalogue with three checks, the last of which found drift."""
    root = tmp_path_factory.mktemp("drifted")
    path = root / "catalog.duckdb"
    path.write_bytes(hostile.read_bytes())
    with duckdb.connect(path) as connection:
        (sae,) = connection.execute("SELECT min(sae) FROM comparisons").fetchone() or ("",)
    few = write_check(root, FEW, sae, "too_few", "8 new images are too few to tell", {}, False)
    fine = write_check(root, FINE, sae, "none", "600 new images look like the champion's", NUMBERS | QUIET, False)
    found = write_check(root, DRIFTED, sae, "drift", f"600 new images differ {MARKUP}", NUMBERS, True)
    write_drift(path, [few, fine, found])
    return path


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page[page.index("<main") :])))


def test_the_newest_check_is_shown_with_its_numbers_beside_chance_and_all_checks_below(visit: Visit, drifted: Path) -> None:
    page = visit(drifted).get("/drift")
    said = text_of(page.text)
    assert page.status_code == 200 and "600 new images against 10,000" in said and "drift.action: stop" in said
    assert "0.910 up to 0.530 0.010" in said
    assert "0.600, before 0.360 (difference +0.200 to +0.300) a difference up to 0.010 0.010" in said
    assert "3 of 40 any in 5 % of checks below 0.001" in said
    assert "with a probability of 95 % none of them is below 0.05 where nothing has changed" in said
    assert "an AUROC of 0.550 or a change of FVU by 0.020 would have been found with a probability of 80 %" in said
    assert re.findall(r"2026-11-30 04:0\d UTC (drift|no drift|too few to tell)", said[said.index(" Checks ") :]) == [
        "drift", "no drift", "too few to tell",
    ]  # fmt: skip


def test_changed_features_have_pictures_of_both_sides_and_others_are_listed(visit: Visit, drifted: Path) -> None:
    client = visit(drifted)
    page = client.get("/drift").text
    sources = re.findall(r'<img src="(/drift/pictures/[^"]+)"', page)
    assert sources == [f"/drift/pictures/{DRIFTED}/0/{side}/{rank}.webp" for side in ("before", "new") for rank in (1, 2)]
    for source, colour in zip(sources, ("blue", "blue", "red", "red"), strict=True):
        shown = client.get(source)
        assert shown.headers["content-type"] == "image/webp" and "immutable" in shown.headers["cache-control"]
        assert shown.content == picture(colour)
    assert "fires on 77.5 % of the new images, 9.6 % before; activation 6.65, 6.22 before" in text_of(page)
    assert "Other changed features" in page and client.get(f"/drift/pictures/{DRIFTED}/0/new/9.webp").status_code == 404


def test_an_earlier_check_has_an_address_and_an_unknown_one_leads_to_those_there_are(visit: Visit, drifted: Path) -> None:
    client = visit(drifted)
    fine = text_of(client.get(f"/drift?check={FINE}").text)
    assert "600 new images look like the champion's" in fine and "0.497 up to 0.530 1.000" in fine and "Changed features" not in fine
    few = text_of(client.get(f"/drift?check={FEW}").text)
    assert "8 new images are too few to tell" in few and "up to" not in few[: few.index(" Checks ")]
    missing = client.get("/drift?check=nothing")
    assert missing.status_code == 404 and f'href="/drift?check={DRIFTED}"' in missing.text
    assert client.get("/drift?checks=1").status_code == 400


def test_json_has_the_rows_and_the_relations_have_comments(visit: Visit, drifted: Path) -> None:
    found = visit(drifted).get("/api/drift").json()
    assert [one["check_id"] for one in found["checks"]] == [DRIFTED, FINE, FEW]
    assert found["check"]["verdict"] == "drift" and [row["latent"] for row in found["latents"]] == [0, 1]
    with duckdb.connect(drifted, read_only=True) as connection:
        bare = "SELECT table_name, column_name FROM duckdb_columns() WHERE table_name LIKE 'drift%' AND comment IS NULL"
        assert connection.execute(bare).fetchall() == []
        comments = connection.execute("SELECT table_name, comment FROM duckdb_tables() WHERE table_name LIKE 'drift%'").fetchall()
        assert len(comments) == 3 and all(comment.startswith(f"{name}(check_id") for name, comment in comments)


def test_the_start_page_leads_there_only_if_there_are_checks(visit: Visit, drifted: Path, hostile: Path) -> None:
    assert 'href="/drift"' in visit(drifted).get("/").text
    assert 'href="/drift"' not in visit(hostile).get("/").text
    empty = visit(hostile).get("/drift")
    assert empty.status_code == 200 and "No new images have been compared" in empty.text
    assert visit(hostile).get("/api/drift").json() == {"checks": [], "check": None, "latents": []}
    assert visit(hostile).get(f"/drift/pictures/{DRIFTED}/0/new/1.webp").status_code == 404


def test_of_old_checks_only_the_headline_numbers_are_published(hostile: Path, tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    path.write_bytes(hostile.read_bytes())
    write_drift(path, [write_check(tmp_path, f"{number:05d}-x", "a", "drift", "", NUMBERS, True) for number in range(1, N_CHECKS + 4)])
    with duckdb.connect(path, read_only=True) as connection:
        counts = [connection.execute(f"SELECT count(DISTINCT check_id) FROM {name}").fetchone() for name in ("drift_checks", "drift")]
    assert counts == [(N_CHECKS + 3,), (N_CHECKS,)]


def test_nothing_of_a_hostile_text_is_run(visit: Visit, drifted: Path) -> None:
    page = visit(drifted).get("/drift").text
    assert "&lt;script&gt;alert" in page and not read(page).problems


@pytest.mark.parametrize("javascript", [True, False])
def test_the_page_is_accessible_and_fits_a_phone(windows: Windows, drifted: Path, tmp_path: Path, javascript: bool) -> None:
    with serving_explorer(drifted, tmp_path / "log") as server:
        for address in ("/drift", f"/drift?check={FEW}"):
            page = windows.open(f"{server.url}{address}", width=360, javascript=javascript)
            if javascript:
                assert_accessible(page)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
            assert page.locator("h1").count() == 1 and page.locator("article img").count() == (4 if address == "/drift" else 0)
        windows.close()
