"""The report is one self-contained page whose numbers and SQL agree with the catalogue, and data in it is never markup."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import pytest

from ommatid.catalog.question import Question
from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError
from ommatid.show.numbers import wilson
from ommatid.show.pictures.page import Page
from ommatid.show.report import Report, make_report, plots, write_report
from support import catalog as artefacts

OTHER = f"{artefacts.OTHER}-00000000"
EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    root = tmp_path_factory.mktemp("report")
    artefacts.build(root, artefacts.make_inputs(root, names=[artefacts.NAME, artefacts.OTHER]))
    with Catalog(artefacts.path_in(root)) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(two: Catalog) -> Report:
    return make_report(two)


@pytest.fixture(scope="module")
def page(two: Catalog, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(two, tmp_path_factory.mktemp("page"))


def changed(tmp_path: Path, file: Path, *statements: str) -> Catalog:
    """Copy a catalogue and change rows."""
    copy = tmp_path / "changed.duckdb"
    copy.write_bytes(file.read_bytes())
    with duckdb.connect(copy) as connection:
        for statement in statements:
            connection.execute(statement)
    return Catalog(copy)


def page_of(catalog: Catalog, tmp_path: Path, sae: str | None = None) -> str:
    write_report(catalog, tmp_path / "made" / "report.html", sae)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["report.html"]
    return (tmp_path / "made" / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects every element with its attributes, and those that are still open."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another"


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "object", "embed", "form", "a"}
    sources = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(sources) >= 5
    assert all(source and re.match(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+$", source) for source in sources)
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"},
    ) in (tags.found)


def test_every_statement_on_the_page_can_be_run(two: Catalog, page: str, report: Report) -> None:
    statements = [unescape(sql) for sql in re.findall(r"<summary>SQL</summary><pre>(.*?)</pre>", page, re.DOTALL)]
    assert len(statements) == len(report.sections)
    for statement in statements:
        assert "$" not in statement
        assert two.ask(statement).columns


def test_every_section_says_how_to_read_it(report: Report) -> None:
    for section in report.sections:
        assert len(section.reading) > 40 and section.reading.endswith(".")


def test_numbers_are_those_of_the_catalogue(report: Report) -> None:
    assert report.sae == artefacts.NAME
    # one of two named latents is better than its control: 0.9 over 0.4, 0.6 under 0.7
    assert [headline.value for headline in report.headlines] == ["50 %", "0.350", "0.200", "25.0 %"]
    assert "9 to 91 %, from 2 labels" in report.headlines[0].meaning
    assert "untrained SAE 0.150; raw neurons 0.050; unrelated images score the floor, 0.350" in report.headlines[1].meaning
    tables = {section.title: section.table for section in report.sections if section.table}
    saes = tables["The SAEs and their controls"]
    assert saes and saes.strong == 0 and [row[:2] for row in saes.rows] == [(artefacts.NAME, "4"), (artefacts.OTHER, "2")]
    assert dict(zip(saes.head, saes.rows[0], strict=True))["MS − floor"] == "0.350"
    controls = tables["This SAE and all its controls"]
    assert controls and [row[0] for row in controls.rows] == ["this SAE", "untrained SAE", "raw neurons"]
    assert {len(row) for row in controls.rows} == {len(controls.head)}
    stability = tables["Stability"]
    assert stability and stability.rows == ((artefacts.OTHER, "50.0 %", "50.0 %", "0.800", "0.500"),)
    facts = dict(report.facts)
    assert facts["Model"] == "lite0" and facts["Code"] == "1f2e3d" and facts["Judge"] == "lite2"
    assert facts["Images"] == "0 for training, 6 others for everything measured here; 3 classes"
    assert "DVC experiment" not in facts


def test_a_report_may_be_about_another_sae(two: Catalog, tmp_path: Path) -> None:
    report = make_report(two, artefacts.OTHER)
    assert report.sae == artefacts.OTHER
    saes = next(section.table for section in report.sections if section.title == "The SAEs and their controls")
    assert saes and saes.strong == 1
    with pytest.raises(QueryError, match="no SAE 'none'"):
        write_report(two, tmp_path / "report.html", "none")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_section_on_stability_for_a_single_sae(catalog: Catalog) -> None:
    titles = [section.title for section in make_report(catalog).sections]
    assert "The SAE and its controls" in titles and "Stability" not in titles


def test_the_same_catalogue_gives_the_same_bytes(two: Catalog, page: str, tmp_path: Path) -> None:
    assert page_of(two, tmp_path) == page


def test_text_from_data_is_never_markup(file: Path, tmp_path: Path) -> None:
    evil = EVIL.replace("'", "''")
    statements = [f"UPDATE {relation} SET {column} = '{evil}'" for relation, column in (("features", "label"), ("images", "label"))]
    statements += [f"UPDATE runs SET {column} = '{evil}'" for column in ("name", "model", "hookpoint", "variant", "judge", "git_commit")]
    statements += [f'UPDATE runs SET params = \'{{"images": {{"path": "{evil[:25]}"}}}}\'', "UPDATE features SET n_images = 20"]
    with changed(tmp_path, file, *statements) as catalog:
        page = page_of(catalog, tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 8
    assert Tags(page).open == []


def test_features_are_the_best_the_worst_and_the_mislabelled(file: Path, tmp_path: Path) -> None:
    with changed(tmp_path, file, "UPDATE features SET n_images = 20, control_score = 0.7 WHERE latent < 2") as catalog:
        report = make_report(catalog)
    shown = {section.title: [feature.label for feature in section.features] for section in report.sections if section.features}
    assert shown.pop("The features that do most, and their controls")
    assert shown == {"The best features": ["cat", "truck"], "The worst features": ["truck", "cat"], "Labels not to believe": ["truck"]}
    (truck,) = next(section.features for section in report.sections if section.title == "Labels not to believe")
    assert truck.numbers == ("MS 0.600", "label score 60.0 %, control 70.0 %", "latent 1, fires on 20 images", "purity 1.000")
    assert truck.picture[:4] == b"RIFF"
    assert report.headlines[0].value == "50 %"


def test_what_features_do_is_counted_beside_random_latents(report: Report) -> None:
    of = {section.title: section for section in report.sections}
    counted = of["What the features do"]
    assert counted.table and [row[:3] for row in counted.table.rows] == [
        ("causal", "1", "50 %"),
        ("reads only", "1", "50 %"),
        ("breaks the model", "0", "0 %"),
        ("random latents called causal by the same rule", "1", "50 %"),
    ]
    assert counted.table.rows[0][3] == "9 to 91 %"  # Wilson
    assert counted.reading.startswith("1 of the 2 latents that were tested is causal.") and "not chosen" in counted.reading
    strongest = of["The features that do most, and their controls"].features
    assert [feature.label for feature in strongest] == ["cat", "truck"]  # by effect less best control: 0.375, then -0.1
    assert strongest[0].numbers[:3] == ("causal, at dose 1", "effect +0.500 (+0.250 to +0.750)", "best control +0.125")
    assert strongest[0].plot and [kind for _, kind in strongest[0].plot.curves] == ["curve", "curve control"]
    assert {words.text for words in strongest[0].plot.words} >= {"this latent", "other latents", "closer to its label, cosine"}
    attributed = of["Which latents a class rests on"].table
    assert attributed and attributed.rows[0] == ("cat", "cat (0)", "+0.500", "truck (1)", "−0.250", "2", "–")
    assert attributed.rows[1] == ("label of latent 0", "cat (0)", "+0.250", "–", "–", "1", "–")


def test_the_rank_correlation_of_ms_and_effect_is_that_of_scipy(file: Path, tmp_path: Path) -> None:
    """Eight tested latents, two of which have the same MS and two the same effect."""
    from scipy.stats import spearmanr

    ms, effects = [0.9, 0.5, 0.5, 0.7, 0.4, 0.8, 0.6, 0.3], [0.4, 0.1, 0.2, 0.2, 0.0, 0.5, -0.3, -0.1]
    ends = "{effect} AS effect_low, {effect} + 0.2 AS effect_high, 0.1 AS best_control"
    ends += ", {attribution} AS attribution, 16 AS n_images"
    row = f"SELECT * REPLACE ({{n}} AS latent, {{ms}} AS ms, {{effect}} + 0.1 AS effect, {ends}) FROM features WHERE latent = 0"
    added = [
        f"INSERT INTO features {row.format(n=n, ms=one, effect=effect, attribution=other)}"
        for n, (one, effect, other) in enumerate(zip(ms, effects, ms[::-1], strict=True), 10)
    ]
    with changed(tmp_path, file, *added, "DELETE FROM features WHERE latent < 10") as catalog:
        section = next(section for section in make_report(catalog).sections if section.title.startswith("Does monosemanticity"))
    expected, live = (f"{spearmanr(ms, other)[0]:+.3f}" for other in (effects, ms[::-1]))
    assert "Of 8 latents that fire on at least 16 evaluation images" in section.reading
    assert f"MS with it is {live} (".replace("-", "−") in section.reading
    assert section.reading.startswith(f"The rank correlation of MS and effect is {expected} (95 % interval ") and section.picture


@pytest.mark.parametrize("reason", ["the model has no text tower", None])
def test_a_report_without_interventions_says_why(file: Path, tmp_path: Path, reason: str | None) -> None:
    untested = "causal = 'untested', effect = NULL, effect_low = NULL, best_control = NULL, dose = NULL, control_causal = NULL"
    value = "NULL" if reason is None else f"'{reason}'"
    statements = [f"UPDATE features SET {untested}, causal_reason = {value}", "DELETE FROM interventions", "DELETE FROM attributions"]
    with changed(tmp_path, file, *statements) as catalog:
        titles = {section.title: section.reading for section in make_report(catalog).sections}
    said = reason or "the stage intervene gave no result"
    assert titles["What the features do"] == f"Nothing to show, as no latent was tested: {said}."
    assert not {"The features that do most, and their controls", "Which latents a class rests on"} & set(titles)


@pytest.mark.parametrize(
    ("statement", "empty"),
    [
        ("UPDATE features SET label_score = NULL", {"Do the labels hold up on held-out images?"}),
        (
            "UPDATE latents SET ms = NULL; UPDATE judged SET ms = NULL",
            {"Monosemanticity of the latents", "Monosemanticity against density"},
        ),
        (
            "UPDATE latents SET density = 0, ms = NULL; UPDATE judged SET ms = NULL",
            {"Monosemanticity of the latents", "Monosemanticity against density", "How often latents fire"},
        ),
    ],
)
def test_missing_data_are_explained_and_not_drawn(file: Path, tmp_path: Path, statement: str, empty: set[str]) -> None:
    with changed(tmp_path, file, statement) as catalog:
        report = make_report(catalog)
    plots = [section for section in report.sections if not section.table and not section.is_wide]
    assert {section.title for section in plots if not section.picture} == empty
    assert {section.title for section in plots if section.reading.startswith("Nothing to show: ")} == empty


def test_an_sae_without_any_monosemanticity_has_a_report(file: Path, tmp_path: Path) -> None:
    nothing = (
        "UPDATE latents SET ms = NULL",
        "UPDATE judged SET ms = NULL",
        "UPDATE comparisons SET ms = NULL",
        "UPDATE features SET ms = NULL",
    )
    with changed(tmp_path, file, *nothing) as catalog:
        headline = make_report(catalog).headlines[1]
    assert (headline.value, headline.meaning) == ("–", "the MonoSemanticity score is undefined for every latent")


def test_scores_of_the_controls_are_drawn(file: Path, tmp_path: Path) -> None:
    pictures = []
    for statements in ((), ("DELETE FROM judged WHERE dictionary <> 'sae'",)):
        with changed(tmp_path, file, *statements) as catalog:
            section = next(section for section in make_report(catalog).sections if section.title == "Monosemanticity of the latents")
            pictures.append(section.picture)
    assert "FROM judged" in section.question.text and "judge = 'lite2'" in section.question.text
    assert pictures[0] and pictures[1] and pictures[0] != pictures[1]


def test_values_are_literals_in_the_sql_shown() -> None:
    question = Question("SELECT $n, $name, $n_images", {"n": 2, "name": "it's", "n_images": 16})
    assert question.text == "SELECT 2, 'it''s', 16"
    assert Question("SELECT $a, $b, '$.c'", {"a": "$b", "b": "$a"}).text == "SELECT '$b', '$a', '$.c'", "a value is no parameter"


@pytest.mark.parametrize(("part", "whole", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_the_interval_of_a_share_is_wilsons(part: int, whole: int, low: float, high: float) -> None:
    assert wilson(part, whole) == pytest.approx((low, high), abs=1e-4)  # Newcombe 1998, method 3


def test_the_verb_writes_the_page_and_prints_its_path(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", "from ommatid.cli import main; main()", "report", "--catalog", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    page = file.parents[1] / "report.html"  # below the root of the catalogue's study
    assert done.stdout.strip() == str(page), done.stderr
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    command[-2:] = ["--catalog", str(file), "--sae", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("error: no SAE 'none'")) == (1, True)


def test_a_report_needs_no_torch() -> None:
    script = "import sys, ommatid.show.report; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_no_legend_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Page] = []
    monkeypatch.setattr(Page, "png", lambda page, density: drawn.append(page) or b"")
    plots.draw_monosemanticity({name: [0.3, 0.4] for name in plots.NAMES}, floor=0.3)
    figure = drawn[0].figure
    figure.canvas.draw()
    legend = figure.axes[0].get_legend()
    assert legend is not None and len(legend.get_texts()) == len(plots.NAMES) + 1
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawn[0].width and box.y1 <= drawn[0].height
