"""A static copy opens from a disk: no link in it is dead, it has all or some features, and a folder gets it whole or not at all."""

import functools
import html
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from ommatid.catalog.reader import Catalog
from ommatid.catalog.vectors import unpack
from ommatid.cli.app import app as cli
from ommatid.errors import ConfigError, QueryError, RunError
from ommatid.explorer import site, start
from ommatid.explorer.app import make_app
from ommatid.explorer.site import MARK, Site, write_site
from ommatid.explorer.web import Settings
from ommatid.reviews import ReviewLog
from support.browser import Windows, assert_accessible
from support.small_study import Study

LINK = re.compile(r'<(\w+)[^>]*?\s(?:href|src)="([^"]*)"')


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Tag and address of each link of a page."""
    for tag, address in LINK.findall(page.read_text(encoding="utf-8")):
        yield tag, html.unescape(address)


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def living(study: Study) -> dict[str, list[int]]:
    """Latents that fire, by SAE, the best SAE first."""
    sql = "SELECT sae, list(latent ORDER BY latent) FROM features WHERE NOT is_dead GROUP BY sae"
    with Catalog(study.catalog) as catalog, TestClient(make_app(Settings(study.catalog)), base_url="http://127.0.0.1") as asks:
        found = dict(catalog.ask(sql).rows)
        return {row["sae"]: found[row["sae"]] for row in asks.get("/api/saes").json()}


@pytest.fixture(scope="module")
def whole(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Site]:
    """A copy of everything."""
    out = tmp_path_factory.mktemp("whole") / "site"
    return out, write_site(study.catalog, out, str(study.data))


def test_no_link_is_dead_and_none_leaves_the_copy(whole: tuple[Path, Site], study: Study) -> None:
    out, written = whole
    named = set()
    for page in pages(out):
        for tag, address in links(page):
            assert not re.match(r"/|\w+:", address), f"{page}: {tag} {address}"
            target = (page.parent / unquote(address.partition("#")[0])).resolve() if not address.startswith("#") else page
            assert target.is_file() and target.is_relative_to(out.resolve()), f"{page}: {tag} {address}"
            named.add(target)
    files = {path.resolve() for path in out.rglob("*") if path.is_file()}
    assert files - named <= {(out / MARK).resolve()}, "each file is reached"
    assert written.n_pages == len(pages(out)) and written.n_pictures == len(list((out / "thumbs").iterdir()))
    assert written.n_bytes == sum(path.stat().st_size for path in files) - (out / MARK).stat().st_size
    assert json.loads((out / MARK).read_text())["pages"] == written.n_pages
    latents = living(study)
    assert written.n_features == sum(map(len, latents.values())) > 40
    assert all((out / "features" / sae / f"{latent}.html").is_file() for sae in latents for latent in latents[sae])


def test_nothing_in_it_needs_a_server_or_runs_what_data_says(whole: tuple[Path, Site]) -> None:
    out, _ = whole
    for page in pages(out):
        text = page.read_text(encoding="utf-8")
        assert 'http-equiv="Content-Security-Policy"' in text
        assert not re.search(r"<form|csrf|htmx|/api/|/originals/|<noscript", text), page
        assert not re.search(r"<script>|<img src=x|<b>[a-z]", text), page


def test_lists_lead_forth_and_back(whole: tuple[Path, Site], study: Study) -> None:
    out, _ = whole
    latents = next(iter(living(study).values()))
    seen, page, chain = [], next(one for one in pages(out) if "by-name" in one.name or one.parent.name == "features"), []
    firsts = [p for p in (out / "features").glob("*.html") if 'rel="next"' in p.read_text() and 'rel="prev"' not in p.read_text()]
    longest = []
    for page in firsts:
        chain, seen = [page], []
        while True:
            text = chain[-1].read_text()
            seen += [int(latent) for latent in re.findall(r'<article class="card" data-latent="(\d+)"', text)]
            if not (found := re.search(r'rel="next" href="([^"]*)"', text)):
                break
            chain.append(chain[-1].parent / found[1])
        assert len(seen) == len(set(seen))
        back = [chain[-1]]
        while found := re.search(r'rel="prev" href="([^"]*)"', back[-1].read_text()):
            back.append(back[-1].parent / found[1])
        assert back == chain[::-1]
        longest = max(longest, sorted(seen), key=len)
    assert longest == latents, "the list by name has every feature"
    start = (out / "index.html").read_text()
    lists = re.findall(r'<section class="list"><h2><a([^>]*)>', start)
    assert len(lists) > 3 and all("href=" in link for link in lists), "the start page leads to the first page of each"


def test_the_same_catalogue_gives_the_same_bytes(study: Study, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_site(study.catalog, tmp_path / name, "data", latents=[0, 1])
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_some_features(study: Study, tmp_path: Path) -> None:
    (best, latents), *_ = living(study).items()
    chosen = latents[:3]
    written = write_site(study.catalog, tmp_path / "site", "data", latents=[*chosen, chosen[0]])
    assert written.n_features == 3
    assert [int(path.stem) for path in sorted((tmp_path / "site/features" / best).iterdir(), key=lambda path: int(path.stem))] == chosen
    rows = re.findall(r"<tr><td>(\d+)</td>", (tmp_path / "site/all.html").read_text())
    assert sorted(map(int, rows)) == chosen
    first = (tmp_path / "site/features" / best / f"{chosen[0]}.html").read_text()
    assert re.search(r"<a>", first), "a neighbour outside the copy is named without a link"
    named = write_site(study.catalog, tmp_path / "named", "data", sae=best, most=2)
    assert named.n_features == 2 and [path.name for path in (tmp_path / "named/features").iterdir() if path.is_dir()] == [best]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"latents": [0, 48]}, ConfigError, r"--latents: there is no latent 48 in \S+; its latents are 0 to \d+"),
        ({"latents": [-1]}, ConfigError, "there is no latent -1"),
        ({"sae": "none"}, QueryError, "--sae: there is no SAE 'none' in .*; it has batch_topk"),
        ({"catalog": Path("missing.duckdb")}, QueryError, "missing.duckdb: does not exist"),
    ],
)
def test_bad_choices(study: Study, tmp_path: Path, changes: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        write_site(**{"catalog": study.catalog, "out": tmp_path / "site", **changes})
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_left_alone_and_an_earlier_copy_replaced(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "site"
    out.mkdir()
    write_site(study.catalog, out, "data", latents=[0])
    (out / "features" / "old.html").write_text("old")
    write_site(study.catalog, out, "data", latents=[0])
    assert not (out / "features" / "old.html").exists() and (out / "index.html").exists()
    (out / MARK).unlink()
    before = content(out)
    for place in (out, out / "index.html"):
        with pytest.raises(ConfigError, match=r"there is something else already"):
            write_site(study.catalog, place, "data", latents=[0])
    assert content(out) == before and list(tmp_path.iterdir()) == [out]


def test_a_page_that_fails_leaves_nothing(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise QueryError("planted: a statement failed")

    monkeypatch.setattr(start, "_find_lists", fail)
    with pytest.raises(RunError, match=r"the page /(\?sae=\S+)? cannot be made \(planted: a statement failed\)"):
        write_site(study.catalog, tmp_path / "site", "data", most=2)
    assert list(tmp_path.iterdir()) == []


def test_command_line(study: Study, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["export", "--out", str(tmp_path / "site"), *arguments])
        return done.exit_code, done.output + str(done.exception)

    code, said = run("site", "--catalog", str(study.catalog), "--latents", "0, 1")
    assert code == 0 and re.search(r"site holds 2 features, \d+ pages and \d+ pictures, .*; open file:///\S+/site/index.html", said)
    for arguments, expected in (
        (("pages",), "export 'pages': expected site"),
        (("site", "--latents", "1,x"), "--latents: got 'x'; expected numbers"),
        (("site", "--latents", "1", "--most", "2"), "leave out one of them"),
        (("site", "--to", "saelens"), "--to names the format of an SAE"),
        (("--latents", "1", "--to", "saelens"), "--latents belongs to `ommatid export site`"),
        ((), "export needs --to FORMAT: saelens"),
    ):
        code, said = run(*arguments)
        assert code and expected in said, said


def test_what_people_said_is_in_it(study: Study, tmp_path: Path) -> None:
    (best, (one, other, *_)), *_ = living(study).items()
    with Catalog(study.catalog) as catalog:
        sql = "SELECT direction FROM directions WHERE sae = $sae AND latent = $latent"
        rows = [catalog.ask(sql, {"sae": best, "latent": latent}).rows[0][0] for latent in (one, other)]
    directions = unpack(rows)
    log = ReviewLog(tmp_path / "data/reviews/log.jsonl")
    log.append("Ada", best, one, "rename", "a name by Ada", direction=lambda: directions[0])
    log.append("Ada", "an SAE of before", 7, "rename", "found by its direction", direction=lambda: directions[1])
    write_site(study.catalog, tmp_path / "site", str(tmp_path / "data"), latents=[one, other])
    for page in (tmp_path / "site/all.html", *[tmp_path / f"site/features/{best}/{latent}.html" for latent in (one, other)]):
        assert "a name by Ada" in page.read_text() or page.stem == str(other), page
        assert "found by its direction" in page.read_text() or page.stem == str(one), page


def test_names_of_files() -> None:
    plain = {"/": "index.html", "/features/a-b/1": "features/a-b/1.html", "/static/0a/x.css": "static/0a-x.css"}
    plain["/thumbs/3/ab.webp"] = "thumbs/3-ab.webp"
    assert {address: site._file_of(address) for address in plain} == plain
    hostile = ["/features/..%2F..%2Fetc/1", "/class?name=..%2F%00", "/runs/%3Cb%3E", "/runs/" + "x" * 3000, "/runs/.ssh", "/runs/%2E%2E"]
    names = [site._file_of(address) for address in hostile]
    assert all(re.fullmatch(r"[a-z]+/[A-Za-z0-9_-][A-Za-z0-9._/-]{0,130}\.html", name) and "/." not in name for name in names), names
    assert len(set(names)) == len(names)


def test_from_a_disk_in_a_browser(whole: tuple[Path, Site], windows: Windows) -> None:
    out, _ = whole
    page = windows.open((out / "index.html").as_uri())
    page.locator("article.card h3 a").first.click()
    page.wait_for_url("**/features/**")
    assert page.locator("a.tile img").first.evaluate("image => image.complete && image.naturalWidth > 0")
    page.locator("a.tile canvas").first.wait_for()
    page.get_by_role("link", name="Search").click()
    rows = page.locator("tbody tr:visible")
    before = rows.count()
    name = page.locator("tbody tr a bdi").first.inner_text().split()[0]
    page.get_by_label("Show those whose row contains").fill(name)
    assert 0 < rows.count() <= before
    page.get_by_label("Show those whose row contains").fill("no such word at all")
    assert rows.count() == 0 and f"0 of {before}" in page.content()
    still = windows.open((out / "all.html").as_uri(), javascript=False)
    assert still.locator("tbody tr:visible").count() == before
    still.locator("tbody tr a").first.click()
    still.wait_for_url("**/features/**")


def test_from_any_web_server(whole: tuple[Path, Site], windows: Windows) -> None:
    out, _ = whole
    handler = functools.partial(Quiet, directory=out)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        page = windows.open(f"http://127.0.0.1:{server.server_port}/")
        assert_accessible(page)
        page.locator("article.card h3 a").first.click()
        page.wait_for_url("**/features/**")
        page.locator("a.tile canvas").first.wait_for()
        assert_accessible(page)
        page.get_by_role("link", name="Search").click()
        page.wait_for_url("**/all.html")
        assert_accessible(page)
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass
