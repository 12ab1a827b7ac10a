"""Proves in a real browser that people can review by keyboard alone, two at once, without JavaScript and on a phone, and correct names."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import duckdb
import yaml
from playwright.sync_api import Page, expect

from explorer.conftest import ServeExplorer
from support.browser import Windows, assert_accessible
from support.small_study import MARKUP, NAMES, Study, run_stages

SAE = NAMES[0]
QUEUE = f"/review?sae={SAE}&queue=unrated"


def introduce(page: Page, who: str) -> None:
    page.get_by_label("Your name, which stands beside what you say").fill(who)
    page.get_by_role("button", name="Review under this name").click()
    expect(page.get_by_text(f"You review as {who}")).to_be_visible()


def at(page: Page) -> str:
    return parse_qs(urlsplit(page.url).query)["at"][0]


def test_by_keyboard_alone(windows: Windows, study: Study, serve_explorer: ServeExplorer, tmp_path: Path) -> None:
    server = serve_explorer(study, data=str(tmp_path / "data"))
    page = windows.open(f"{server.url}{QUEUE}")
    first, keys = at(page), page.keyboard
    keys.press("3")
    expect(page.get_by_label("Your name, which stands beside what you say")).to_be_focused()
    keys.type("Ada")
    keys.press("Enter")
    expect(page.locator("#review-name")).to_be_visible()
    expect(page.locator("[data-keys-switch]")).not_to_have_attribute("hidden", "")  # now keys are listened to
    assert at(page) == first
    keys.press("2")
    expect(page.get_by_role("button", name="2 of 5", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#queue-bar")).to_contain_text("1 of ")
    keys.press("e")
    expect(page.locator("#review-name")).to_be_focused()
    keys.type("j is no key 2 here")
    keys.press("Enter")
    expect(page.locator("#called h1")).to_contain_text("j is no key 2 here")
    expect(page.locator("#called")).to_contain_text("in the catalogue after the next run of label, intervene and catalog")
    expect(page.locator("#review-report")).to_have_text("Recorded.")
    keys.press("f")
    expect(page.locator("#review .flag.warn")).to_have_text("the name is wrong")
    keys.press("u")
    expect(page.locator("#review .flag.warn")).to_have_count(0)
    keys.press("?")
    expect(page.locator("details.keys")).to_have_attribute("open", "")
    keys.press("j")
    page.wait_for_url(lambda url: f"at={first}" not in url)
    second = at(page)
    keys.press("k")
    page.wait_for_url(f"**at={first}")
    expect(page.locator("#called h1")).to_contain_text("j is no key 2 here")
    page.go_back()
    page.wait_for_url(f"**at={second}")
    expect(page.locator("#queue-bar")).to_contain_text("this is number 2")
    page.locator("summary", has_text="Keys").click()
    page.get_by_label("Single keys do something").uncheck()
    page.locator("h1").click()
    keys.press("5")
    page.reload()
    expect(page.get_by_role("button", name="5 of 5", exact=True)).to_have_attribute("aria-pressed", "false")


def test_two_browsers_at_once(windows: Windows, study: Study, serve_explorer: ServeExplorer, tmp_path: Path) -> None:
    server = serve_explorer(study, data=str(tmp_path / "data"))
    ada, bob = (windows.open(f"{server.url}/features/{SAE}/2") for _ in range(2))
    introduce(ada, "Ada")
    introduce(bob, "Bob")
    for page, name in ((ada, "ship"), (bob, "boat")):
        page.get_by_label("Name", exact=True).fill(name)
        page.get_by_role("button", name="Rename").click()
        expect(page.locator("#called h1")).to_contain_text(name)
    expect(bob.locator(".conflict")).to_contain_text("Ada named it ship")
    expect(ada.locator(".conflict")).to_have_count(0)
    ada.reload()
    expect(ada.locator("#called h1")).to_contain_text("boat")
    expect(ada.locator(".conflict")).to_contain_text("Bob named it boat")
    ada.get_by_label("Name", exact=True).fill("ship")
    ada.get_by_role("button", name="Rename").click()
    expect(ada.locator(".conflict")).to_have_count(0)
    bob.reload()
    expect(bob.locator(".conflict")).to_have_count(0)
    expect(bob.locator("#called h1")).to_contain_text("ship")
    bob.locator("summary", has_text="History: 3 edits").click()
    bob.locator(".history li", has_text="Bob named it").get_by_role("button").click()
    expect(bob.locator(".history li.undone")).to_contain_text("undone by Bob")


def test_without_javascript(windows: Windows, study: Study, serve_explorer: ServeExplorer, tmp_path: Path) -> None:
    server = serve_explorer(study, data=str(tmp_path / "data"))
    page = windows.open(f"{server.url}{QUEUE}", javascript=False)
    first = at(page)
    introduce(page, "Ada")
    page.get_by_label("Name", exact=True).fill(MARKUP)
    page.get_by_role("button", name="Rename").click()
    expect(page.locator("#called h1")).to_contain_text(MARKUP)
    page.get_by_role("button", name="4 of 5", exact=True).click()
    page.get_by_label("Flag", exact=True).select_option("polysemantic")
    page.get_by_role("button", name="Flag", exact=True).click()
    page.get_by_label("List", exact=True).fill("to look at again")
    page.get_by_role("button", name="Add").click()
    page.get_by_label("Comment", exact=True).fill("two\nlines")
    page.get_by_role("button", name="Comment").click()
    expect(page.locator("dd.comment")).to_have_text("two\nlines")
    page.get_by_role("button", name="Undo my last").click()
    expect(page.locator("dd.comment")).to_have_count(0)
    assert at(page) == first
    page.get_by_role("link", name="to look at again").click()
    expect(page.locator("#results .card")).to_have_count(1)
    page.goto(f"{server.url}{QUEUE}")
    assert at(page) != first, "what is done does not come again"
    page.get_by_role("link", name="Previous").click()
    assert at(page) == first


def test_pages_are_accessible_and_fit_a_phone(windows: Windows, study: Study, serve_explorer: ServeExplorer, tmp_path: Path) -> None:
    server = serve_explorer(study, data=str(tmp_path / "data"))
    page, other = windows.open(f"{server.url}{QUEUE}"), windows.open(f"{server.url}/review?sae={NAMES[1]}&at=1")
    assert_accessible(page)
    introduce(page, "Ada")
    introduce(other, "Bob")
    for kind, text in (("Name", "two words"), ("List", "a list"), ("Comment", MARKUP)):
        for one in (page, other):
            one.get_by_label(kind, exact=True).fill(text)
            one.locator("form", has=one.get_by_label(kind, exact=True)).get_by_role("button").click()
            expect(one.locator("#review")).to_contain_text(text if kind != "Name" else "edit")
    page.get_by_role("button", name="Flag", exact=True).click()
    expect(page.locator("#review .flag.warn")).to_be_visible()
    page.locator("summary", has_text="History").click()
    page.locator("summary", has_text="Keys").click()
    addresses = [page.url, f"{server.url}/features/{SAE}/{at(page)}"]
    addresses += [f"{server.url}/review{path}?sae={NAMES[1]}" for path in ("/log", "/lists", "/orphans")]
    for address in addresses:
        page.set_viewport_size({"width": 1280, "height": 800})
        if page.url != address:
            page.goto(address)
        assert_accessible(page)
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, f"{address} scrolls sideways"


def test_what_is_half_written_stays_also_when_another_form_is_refused(
    windows: Windows, study: Study, serve_explorer: ServeExplorer, tmp_path: Path
) -> None:
    server = serve_explorer(study, data=str(tmp_path / "data"))
    page = windows.open(f"{server.url}/features/{SAE}/2")
    introduce(page, "Ada")
    page.get_by_label("Comment", exact=True).fill("half a thought")
    page.get_by_role("button", name="2 of 5", exact=True).press("Enter")
    expect(page.get_by_role("button", name="2 of 5", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="2 of 5", exact=True)).to_be_focused()
    expect(page.get_by_label("Comment", exact=True)).to_have_value("half a thought")
    page.context.clear_cookies()
    windows.expect("console error: .*status of 400")
    windows.expect("console error: Response Status Error Code 400 from /review/event")  # htmx says so
    page.get_by_role("button", name="3 of 5", exact=True).click()
    expect(page.locator("#review-report")).to_contain_text("This form is too old")
    expect(page.get_by_label("Comment", exact=True)).to_have_value("half a thought")


def test_corrections_are_in_the_next_catalogue(windows: Windows, own_study: Study, serve_explorer: ServeExplorer) -> None:
    params = yaml.safe_load((own_study.root / "params.yaml").read_text())
    params["label"]["labellers"][1]["path"] = "data/reviews/log.jsonl"
    (own_study.root / "params.yaml").write_text(yaml.safe_dump(params))
    server = serve_explorer(own_study)
    page = windows.open(f"{server.url}{QUEUE}")
    introduce(page, "Ada")
    corrected = {}
    for name in ("first correction", "second <b>correction</b>", "third correction"):
        page.get_by_label("Name", exact=True).fill(name)
        page.get_by_role("button", name="Rename").click()
        expect(page.locator("#called h1")).to_contain_text(name)
        corrected[int(at(page))] = name
        page.get_by_role("link", name="Next").click()
        page.wait_for_url(lambda url: not re.search(rf"at=({'|'.join(map(str, corrected))})$", url))
    run_stages(own_study.root, "sources", "label", "intervene", "catalog")
    with duckdb.connect(own_study.catalog, read_only=True) as connection:
        sql = "SELECT latent, label, labeller FROM features JOIN runs USING (sae) WHERE name = ? AND starts_with(labeller, 'human')"
        found = connection.execute(sql, [SAE]).fetchall()
    assert {latent: label for latent, label, _ in found} == corrected
    latent, name = next(iter(corrected.items()))
    page.goto(f"{server.url}/features/{SAE}/{latent}")
    expect(page.locator("#called")).to_contain_text(f"{name} ✎ named by Ada", use_inner_text=True)
    expect(page.locator("#called")).not_to_contain_text("after the next run")
