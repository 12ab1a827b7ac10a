"""Proves that the page and the verb of the audit say what the catalogue says, in words, and that the page is fit for everybody."""

import re
import sys
from html import unescape
from pathlib import Path

import duckdb
import pytest

from explorer.conftest import Visit
from ommatid.cli.audit import iter_lines
from ommatid.errors import QueryError
from ommatid.explorer.site import write_site
from support.browser import Windows, assert_accessible
from support.ruler import RULER, SHADOW, make_ruler_study
from support.servers import serving_explorer
from support.small_study import MARKUP
from support.study import run_verb


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogue of the pictures with a ruler, which the audit is told of."""
    root = tmp_path_factory.mktemp("ruled")
    return make_ruler_study(root, intervene={"draws": 8, "n_images": 16, "audit": {"attributes": str(root / "rulers.csv")}})


def change(catalog: Path, to: Path, *statements: str) -> Path:
    """Copy a catalogue, and change the copy."""
    to.write_bytes(catalog.read_bytes())
    with duckdb.connect(to) as connection:
        for statement in statements:
            connection.execute(statement)
    return to


def text_of(page: str) -> str:
    """Return the text of a page, without its tags."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page[page.index("<main") :])))


def of_ruler(catalog: Path) -> dict[str, float]:
    with duckdb.connect(catalog, read_only=True) as connection:
        row = connection.execute("FROM audit WHERE latent = ? AND class = 'red'", [RULER]).fetch_df()
    return row.to_dict("records")[0]


def test_the_page_says_why_and_what_the_model_does_without_it(visit: Visit, ruled: Path) -> None:
    page = visit(ruled).get("/audit")
    said, row = text_of(page.text), of_ruler(ruled)
    assert page.status_code == 200
    assert f"{RULER} draws the model to red" in said and f"{SHADOW} may draw the model to red" in said
    assert said.index(f"{RULER} draws") < said.index(f"{SHADOW} may"), "the suspect comes first"
    expected = row["mistaken_with"] - row["mistaken_more"]
    mistaken = round(row["mistaken_with"] * row["n_others_with"])
    assert f"calls {mistaken} of the {row['n_others_with']} images of other classes that have this feature “red”" in said
    assert f"of all images of those classes, {100 * expected:.0f} %" in said
    assert f"right in {100 * row['trust_with']:.0f} % of the images with the feature, and in {100 * row['trust_without']:.0f} %" in said
    assert "follows “ruler” and not the class" in said and "images of other classes with ruler" in said
    for name in ("worst", "worst_ablated", "worst_random", "worst_leace"):
        assert f"{100 * row[name]:.0f} %" in said, name
    assert "A coin is right in 50 %" in said and "1 suspect remains" in said


def test_the_pictures_are_those_of_the_relation_with_what_the_model_calls_them(visit: Visit, ruled: Path) -> None:
    page = visit(ruled).get("/audit").text
    section = page[page.index('aria-labelledby="p1"') : page.index('aria-labelledby="p2"')]
    with duckdb.connect(ruled, read_only=True) as connection:
        sql = (
            "SELECT image FROM audit_images WHERE latent = ? ORDER BY list_position(['class_with', 'class_without'], part) NULLS LAST, rank"
        )
        images = [str(image) for (image,) in connection.execute(sql, [RULER]).fetchall()]
    assert re.findall(r'data-image="(\d+)"', section) == images and len(images) == 24
    assert section.count("blue, called red") == 8 and "called blue" in section
    assert 'class="plot"' in section and section.count("<title>") == 4


def test_pages_of_the_feature_and_of_the_class_lead_to_the_audit(visit: Visit, ruled: Path) -> None:
    client = visit(ruled)
    feature = client.get(f"/features/planted/{RULER}").text
    assert "names this feature" in feature and '<a href="/audit?name=red">' in feature
    assert "no better without it" in client.get(f"/features/planted/{SHADOW}").text
    assert "audit" not in text_of(client.get("/features/planted/0").text).lower()
    assert "names a feature that draws the model to this class" in text_of(client.get("/class?name=red").text)
    assert "audit" not in text_of(client.get("/class?name=blue").text).lower()


def test_json_has_the_rows_and_one_class_can_be_asked_for(visit: Visit, ruled: Path) -> None:
    client = visit(ruled)
    found = client.get("/api/audit").json()
    assert [(row["latent"], row["class"], row["status"]) for row in found["pairs"]] == [
        (RULER, "red", "suspect"),
        (SHADOW, "red", "unconfirmed"),
    ]
    assert found["counts"]["n_suspects"] == 1 and found["classes"] == ["red"]
    assert client.get("/api/audit?name=blue").json()["pairs"] == []
    assert "No feature is a suspect of blue" in text_of(client.get("/audit?name=blue").text)
    missing = client.get("/audit?name=green")
    assert missing.status_code == 404 and "No evaluation image is of a class" in missing.text and 'href="/audit?name=red"' in missing.text


def test_pairs_that_were_not_tested_are_listed_with_the_reason_why_they_may_be_nothing(visit: Visit, ruled: Path, tmp_path: Path) -> None:
    tested = "n_tested = NULL, worst_group = NULL"
    changed = change(ruled, tmp_path / "c.duckdb", f"UPDATE audit SET status = 'of_another_class', {tested} WHERE suspicion > 0")
    said = text_of(visit(changed).get("/audit").text)
    assert "No feature is a suspect" in said and "the model confuses the two" in said and "of another class" in said
    lines = list(iter_lines(changed, None, None, 1))
    assert any("It is a feature of the classes whose images are mistaken" in line for line in lines)
    nothing = change(ruled, tmp_path / "n.duckdb", "UPDATE audits SET n_suspicious = 0", "DELETE FROM audit WHERE suspicion > 0")
    assert (
        "None looked suspicious." in text_of(visit(nothing).get("/audit").text)
        and "pictures  " in list(iter_lines(nothing, None, None, 1))[-1]
    )


def test_a_catalogue_without_an_audit_says_so(visit: Visit, ruled: Path, tmp_path: Path) -> None:
    old = change(ruled, tmp_path / "old.duckdb", "DROP TABLE audit", "DROP TABLE audits", "DROP TABLE audit_images")
    client = visit(old)
    assert "built before there was an audit" in client.get("/audit").text
    assert client.get(f"/features/planted/{RULER}").status_code == client.get("/class?name=red").status_code == 200
    with pytest.raises(QueryError, match=r"before there was an audit; run `dvc repro`"):
        list(iter_lines(old, None, None, 10))
    none = change(ruled, tmp_path / "none.duckdb", "UPDATE audits SET status = 'the model is gone'", "DELETE FROM audit")
    assert "Nothing was audited: the model is gone." in text_of(visit(none).get("/audit").text)
    assert list(iter_lines(none, None, None, 10)) == ["Nothing was audited: the model is gone."]


def test_hostile_texts_are_escaped(visit: Visit, hostile: Path) -> None:
    client = visit(hostile)
    page = client.get("/audit")
    assert page.status_code == 200 and "<script>alert" not in page.text and "&lt;script&gt;alert" in page.text
    assert MARKUP in [row["class"] for row in client.get("/api/audit").json()["pairs"]]


def test_the_verb_prints_the_suspects_first_and_where_the_pictures_are(
    ruled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    lines = list(iter_lines(ruled, None, None, 1))
    text = "\n".join(lines)
    assert "56 pairs of a class and a feature were examined on 499 evaluation images of 2 classes" in lines[0]
    assert f"red: latent {RULER}, green (suspect, suspicion " in text and f"latent {SHADOW}" not in text and "1 of 2 shown" in text
    assert "If it answers “red”, it is right in" in text and lines[-1].endswith("/audit?sae=planted")
    assert f"latent {SHADOW}, green (not confirmed" in "\n".join(iter_lines(ruled, "red", "planted", 10))
    assert any("No feature is a suspect of blue. That is no proof" in line for line in iter_lines(ruled, "blue", None, 10))
    with pytest.raises(QueryError, match=r"--class 'bleu': no evaluation image has it; did you mean 'blue'"):
        list(iter_lines(ruled, "bleu", None, 10))


def test_the_verb_takes_the_study(ruled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("audit", "--data", str(ruled.parents[1]), "--limit", "1", "--class", "red") == 0
    assert "(suspect, suspicion" in capsys.readouterr().out
    assert run_verb("audit", "--catalog", str(ruled), "--sae", "other") == 1
    assert "no SAE 'other'" in capsys.readouterr().err


def test_the_copy_without_a_server_has_the_page_with_its_pictures(ruled: Path, tmp_path: Path) -> None:
    write_site(ruled, tmp_path / "site", latents=[RULER])
    page = (tmp_path / "site" / "audit.html").read_text(encoding="utf-8")
    assert "draws the model to" in text_of(page) and 'href="audit.html"' in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="([^"]+\.webp)"', page)
    assert len(pictures) == 48 and all((tmp_path / "site" / picture).exists() for picture in pictures)


@pytest.mark.parametrize("javascript", [True, False])
def test_people_can_read_it_on_a_phone_with_and_without_javascript(windows: Windows, ruled: Path, tmp_path: Path, javascript: bool) -> None:
    with serving_explorer(ruled, tmp_path / "log", is_read_only=True) as server:
        page = windows.open(f"{server.url}/audit", javascript=javascript, width=360)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it does not scroll sideways"
        if javascript:
            page.locator("summary", has_text="Pictures").click()
            assert_accessible(page)
        page.locator(".suspect h2 a").first.click()
        page.wait_for_url("**/features/planted/1**")
        page.locator(".notice a", has_text="The audit").click()
        page.wait_for_url("**/audit?name=red**")
