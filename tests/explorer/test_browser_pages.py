"""Proves in a real browser that people can look, filter, page, search and upload, with and without JavaScript, and reach all by keyboard.

Every test also fails on whatever a page does wrong: an error or warning in the console, a request to another server, a picture that is
missing, a violation of the content policy.
"""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from support.browser import Windows, assert_accessible
from support.processes import wait_for
from support.small_study import NAMES, Study

SAE = NAMES[0]
PAGES = (
    "/",
    "/features",
    "/features?images_min=2&view=table",
    "/features?label=nothing+has+this+name",
    f"/features/{SAE}/0",
    f"/features/{SAE}/6",
    "/images/3",
    "/classes",
    "/audit",
    "/compare",
    "/runs",
    "/search?q=circle",
    "/my-image",
    "/review",
    "/sql",
    "/openapi",
)
FAULTY = ("/features/no-such-sae/1", "/features?sort=price", "/nowhere")


def latents(page: Page) -> list[str | None]:
    return [card.get_attribute("data-latent") for card in page.locator("#results .card").all()]


@pytest.mark.parametrize("address", PAGES)
def test_pages_are_accessible(windows: Windows, explorer: str, address: str) -> None:
    page = windows.open(f"{explorer}{address}")
    assert_accessible(page)
    assert page.title() and page.locator("h1").count() == 1


@pytest.mark.parametrize("address", FAULTY)
def test_error_pages_are_accessible(windows: Windows, explorer: str, address: str) -> None:
    page = windows.open(f"{explorer}{address}", status=400 if "sort" in address else 404)
    assert_accessible(page)


@pytest.mark.parametrize("address", [address for address in PAGES if "?" not in address])
def test_pages_fit_a_phone(windows: Windows, explorer: str, address: str) -> None:
    page = windows.open(f"{explorer}{address}", width=360)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"


def test_filtering_changes_list_and_address(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features?sae={SAE}")
    before = latents(page)
    page.get_by_label("State").select_option("doubtful")
    expect(page).to_have_url(re.compile("state=doubtful"))
    expect(page.locator("#results .count")).to_contain_text("state: doubtful")
    assert latents(page) != before
    page.go_back()
    expect(page).not_to_have_url(re.compile("state=doubtful"))
    expect(page.locator("#results .count")).not_to_contain_text("state: doubtful")
    assert latents(page) == before, "the back button gives the list before"


def test_typing_filters_without_a_button(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features?sae={SAE}")
    page.get_by_label("Name contains").press_sequentially("aeroplane")
    expect(page.locator("#results .card")).to_have_count(1)
    expect(page.locator("#results .card h3")).to_contain_text("aeroplane")


def test_a_filter_that_is_refused_says_what_is_allowed(windows: Windows, explorer: str) -> None:
    windows.expect("status of 400")
    windows.expect("Response Status Error Code 400")
    page = windows.open(f"{explorer}/features?sae={SAE}")
    page.get_by_text("More filters").click()
    page.get_by_label("MS, at least").fill("high")
    page.get_by_label("MS, at least").press("Tab")
    expect(page.locator(".problem")).to_contain_text("ms_min: got 'high'")
    page.go_back()
    expect(page.locator("#results .card").first).to_be_visible()


def test_sorting_and_paging_visit_each_feature(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features?sae={SAE}&sort=latent&order=asc&n=20")
    found = latents(page)
    while page.get_by_role("link", name="Next →").count():
        page.get_by_role("link", name="Next →").click()
        found += latents(page)
    assert found == [str(latent) for latent in range(48)]


def test_an_address_gives_the_same_page_to_another_person(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features?sae={SAE}")
    page.get_by_label("Sort by").select_option("n_images")
    expect(page).to_have_url(re.compile("sort=n_images"))
    page.wait_for_load_state("networkidle")
    other = windows.open(page.url)
    assert latents(other) == latents(page)


def test_reading_works_without_scripts(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/", javascript=False)
    page.get_by_role("link", name="Features", exact=True).click()
    page.get_by_label("State").select_option("live")
    page.get_by_role("button", name="Show").click()
    assert "state=live" in page.url
    page.locator("#results .card h3 a").first.click()
    expect(page.get_by_role("heading", name="Strongest images")).to_be_visible()
    over = page.locator(".strongest noscript img, .strongest img.over")
    assert over.count() and over.first.is_visible(), "heat maps are drawn by the server"


def test_heat_maps_follow_the_slider(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features?sae={SAE}&sort=n_images")
    page.locator("#results .card h3 a").first.click()
    canvas = page.locator(".strongest .tile canvas").first
    expect(canvas).to_be_visible()
    opaque = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v > 60).length"
    low = canvas.evaluate(opaque)
    page.get_by_role("slider").first.fill("90")
    expect(page.locator("[data-threshold-shown]").first).to_have_text("90 %")
    wait_for(lambda: canvas.evaluate(opaque) < low, "fewer coloured patches")
    page.get_by_label("off").first.check()
    wait_for(lambda: canvas.evaluate(opaque) == 0, "no coloured patches")


def test_pictures_open_at_full_size_by_keyboard(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features/{SAE}/6")
    tile = page.locator(".strongest a.tile").first
    tile.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog.locator("img")).to_have_js_property("complete", True)
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert tile.evaluate("tile => tile === document.activeElement"), "the focus returns to the picture"


def test_the_start_page_leads_to_features_by_clicking(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/")
    cell = page.locator(".plot a").first
    counted = int((cell.locator("title").text_content() or "").split()[0])
    cell.click()
    expect(page.locator("#results .count")).to_contain_text(f"{counted} feature")


def test_searching_by_words_says_which_kind_of_match(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/")
    page.get_by_label("Search features").fill("aeroplane")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Names", exact=True)).to_be_visible()
    meaning = page.locator("#meaning .card")
    expect(meaning.first).to_be_visible(timeout=120_000)
    assert meaning.count() > 3, "hits by meaning appear once the model is loaded"


def test_an_uploaded_image_shows_what_fires_and_where(windows: Windows, explorer: str, study: Study) -> None:
    page = windows.open(f"{explorer}/my-image")
    page.get_by_label("Image", exact=True).set_input_files(next(Path(study.root / "photos").rglob("1?.png")))
    page.get_by_role("button", name="Look at it").click()
    expect(page.get_by_role("heading", name=re.compile("features fire"))).to_be_visible(timeout=120_000)
    box = page.locator("[data-patches]")
    box.focus()
    listed = page.locator("[data-patch-list] p")
    expect(listed).to_contain_text("Row 1, column 1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(listed).to_contain_text("Row 2, column 2")
    assert_accessible(page)


def test_where_features_fire_on_an_image_of_the_set(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/images/3")
    page.get_by_role("link", name="Show where").click()
    expect(page.locator("[data-patches]")).to_be_visible(timeout=120_000)
    assert "where=true" in page.url
    page.locator("[data-patches]").hover()
    expect(page.locator("[data-patch-list] p")).to_contain_text("Row")
    page.get_by_role("link", name=re.compile("^Steer latent")).first.click()
    assert "image=3" in page.url
    expect(page.locator("#steered .steered")).to_be_visible(timeout=120_000)


def test_a_finger_chooses_a_patch(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/images/3?sae={SAE}&where=true")
    expect(page.get_by_text("features fire").first).to_be_visible(timeout=60_000)
    page.locator("[data-patches]").evaluate("""box => {
        const at = box.getBoundingClientRect();
        const here = { clientX: at.right - 2, clientY: at.bottom - 2, pointerType: "touch", bubbles: true };
        box.dispatchEvent(new PointerEvent("pointerdown", here));
        box.focus();
    }""")
    expect(page.locator("[data-patch-list]")).to_contain_text(re.compile("Row [2-9]"))


def test_everything_is_reached_by_keyboard(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/features?sae={SAE}&n=3")
    page.wait_for_load_state("networkidle")
    number = """() => {
        const all = [...document.querySelectorAll('a[href], button, input, select, summary')];
        const reached = all.filter(e => e.checkVisibility() && e.tabIndex >= 0 && !e.disabled && e.type !== 'hidden');
        reached.forEach((e, i) => { e.dataset.place = i; });
        return reached.length;
    }"""
    n, places = page.evaluate(number), set()
    for _ in range(n):
        page.keyboard.press("Tab")
        place, outline = page.evaluate("[document.activeElement.dataset.place, getComputedStyle(document.activeElement).outlineStyle]")
        assert outline != "none", "the focus is visible"
        places.add(place)
    assert n > 20 and places == {str(place) for place in range(n)}


def test_texts_from_data_never_run(windows: Windows, explorer: str) -> None:
    for address in (f"/features?sae={SAE}&n=200", f"/features/{SAE}/0", "/search?q=%3Cscript%3Ealert(1)%3C/script%3E", "/images/0"):
        page = windows.open(f"{explorer}{address}")
        assert page.locator("main script").count() == 0 and page.locator("img[onerror]").count() == 0
