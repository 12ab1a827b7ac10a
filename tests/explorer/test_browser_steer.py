"""Proves in a real browser that people can steer: slider, curves, patches by pointer and by keys, own images, without scripts, on a phone.

The model is the study's own, in its process.
"""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from support.browser import Windows, assert_accessible
from support.small_study import NAMES, Study

SAE = NAMES[0]
LATENT = 6
LOADING = 120_000
"""Milliseconds within which the model is loaded."""


def open_steered(windows: Windows, explorer: str, width: int = 1280) -> Page:
    """Open the page of a feature, and steer it on its strongest image."""
    page = windows.open(f"{explorer}/features/{SAE}/{LATENT}", width=width)
    page.get_by_role("button", name="Steer", exact=True).click()
    expect(page.locator("#steered .steered")).to_be_visible(timeout=LOADING)
    return page


def asked(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(url).query)


def test_the_slider_shows_what_was_computed_without_a_request(windows: Windows, explorer: str) -> None:
    page = open_steered(windows, explorer)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    slider, shown = page.get_by_label("Move between doses"), page.locator("#steered [data-at]:visible")
    expect(shown).to_contain_text("Dose 1 = activation")
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(shown).to_contain_text("Dose 2 = activation")
    expect(shown).to_have_count(1)
    assert (slider.get_attribute("aria-valuetext") or "").startswith("dose 2, activation ")
    expect(page.get_by_label("Dose", exact=True)).to_have_value("2")
    expect(page.locator("[data-steer-said]")).to_have_text(shown.locator("[data-said]").inner_text())
    marks = page.locator("#steered [data-curve]:visible line.at")
    assert marks.evaluate_all("marks => marks.map(mark => mark.checkVisibility())") == [False] * 8 + [True]
    assert requests == []


def test_every_curve_has_all_its_controls(windows: Windows, explorer: str) -> None:
    page = open_steered(windows, explorer)
    curves, choice = page.locator("#steered [data-curve]"), page.get_by_label("Curve of")
    assert curves.count() == choice.locator("option").count() > 2
    choice.select_option(index=1)
    for arm in ("targeted", "sign_flipped", "random_latent", "random_direction", "untouched"):
        assert curves.nth(1).locator(f"svg .{arm}").evaluate("shape => shape.checkVisibility() && shape.points.length > 1"), arm
    expect(curves.nth(0)).to_be_hidden()
    name = choice.evaluate("choice => choice.selectedOptions[0].text")
    with page.expect_response(re.compile("/steer")):
        page.get_by_label("where it fires").check()
    expect(page.locator("#steered.htmx-request")).to_have_count(0)
    assert choice.evaluate("choice => choice.selectedOptions[0].text") == name, "the curve that was chosen stays"


def test_patches_are_drawn_over_with_the_pointer(windows: Windows, explorer: str) -> None:
    page = open_steered(windows, explorer)
    box = page.locator("#steer-brush").bounding_box()
    assert box
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    with page.expect_response(re.compile("tokens=patches")) as response:
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 3, steps=12)
        page.mouse.up()
    cols = int((page.locator("#steer-brush").get_attribute("data-grid") or "").split()[1])
    assert asked(response.value.url)["patches"] == [f"0-{cols - 1}"], "the first row"
    expect(page.locator("[data-brush-said]")).to_have_text(re.compile(rf"{cols} of \d+ patches are edited"))
    expect(page.get_by_label("chosen patches")).to_be_checked()
    with page.expect_response(re.compile("tokens=all")):
        page.get_by_role("button", name="All tokens again").click()
    expect(page.locator("[data-brush-said]")).to_have_text("")


def test_patches_are_chosen_by_keys_and_the_focus_stays(windows: Windows, explorer: str) -> None:
    page = open_steered(windows, explorer)
    box = page.locator("#steer-brush")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    with page.expect_response(re.compile("tokens=patches")) as response:
        page.keyboard.press(" ")
    rows, cols = map(int, (box.get_attribute("data-grid") or "").split())
    assert asked(response.value.url)["patches"] == [str(cols + 1)]
    expect(page.locator("#steered.htmx-request")).to_have_count(0)
    expect(box).to_have_attribute("aria-label", f"Patches of the image: row 2, column 2, chosen; 1 of {rows * cols} chosen")
    expect(box).to_be_focused()
    with page.expect_response(re.compile("tokens=all")):
        page.keyboard.press(" ")


def test_other_images_texts_and_mistakes(windows: Windows, explorer: str) -> None:
    page = open_steered(windows, explorer)
    with page.expect_response(re.compile("/steer")) as response:
        page.locator("#steer-form [name=image]").nth(1).check()
    assert asked(response.value.url)["image"] != asked(page.get_by_role("link", name="Link to this").get_attribute("href") or "")
    texts = page.get_by_label("Compare with texts")
    texts.fill("a red circle\na blue ring")
    texts.press("Tab")
    expect(page.locator("#steered [data-at]:visible")).to_contain_text("a blue ring (your text)")
    windows.expect("status of 400")
    windows.expect("Response Status Error Code 400")
    texts.fill("\n".join("abcdefghi"))
    page.get_by_role("button", name="Steer", exact=True).click()
    expect(page.locator("[data-steer-problem]").first).to_have_text("texts: got 9; at most 8 are compared at once")
    expect(page.locator("#steered .steered")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 360])
def test_the_box_is_accessible_and_fits(windows: Windows, explorer: str, width: int) -> None:
    page = open_steered(windows, explorer, width=width)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    assert_accessible(page)


def test_an_address_gives_the_same_without_scripts(windows: Windows, explorer: str) -> None:
    page = open_steered(windows, explorer)
    address = page.get_by_role("link", name="Link to this").get_attribute("href")
    said = page.locator("#steered [data-at]:visible [data-said]").inner_text()
    plain = windows.open(f"{explorer}{address}", javascript=False)
    assert plain.locator("[data-at]:visible [data-said]").inner_text() == said
    assert plain.locator("svg.plot:visible").count() == 1
    plain.get_by_label("Dose", exact=True).fill("0.3")
    plain.get_by_label("where it fires").check()
    plain.get_by_role("button", name="Steer", exact=True).click()
    expect(plain.locator("[data-at]:visible")).to_contain_text("Dose 0.3 = activation")
    assert {"dose": ["0.3"], "tokens": ["firing"]}.items() <= asked(plain.url).items()


def test_an_image_of_ones_own_is_steered_several_latents_at_once_and_attributed(windows: Windows, explorer: str, study: Study) -> None:
    page = windows.open(f"{explorer}/my-image")
    page.get_by_label("Image", exact=True).set_input_files(next(Path(study.root / "photos").rglob("1?.png")))
    page.get_by_role("button", name="Look at it").click()
    expect(page.get_by_role("heading", name=re.compile("features fire"))).to_be_visible(timeout=LOADING)
    page.locator("[data-steer-latent]").nth(1).click()
    expect(page.locator("#steered .steered")).to_be_visible(timeout=LOADING)
    boxes = page.locator("#steer-form [name=latents]")
    assert [box.is_checked() for box in boxes.all()].index(True) == 1
    boxes.nth(0).check()
    expect(page.locator("#steered ul.notice")).to_contain_text("2 latents are edited at once, which do not compose")
    page.get_by_label("For", exact=True).fill("a red circle")
    page.get_by_label("against", exact=True).fill("a blue ring")
    page.get_by_role("button", name="Show them").click()
    expect(page.get_by_role("heading", name="Speak for “a red circle”")).to_be_visible()
    expect(page.locator("#attributed .card").first).to_be_visible()
    assert_accessible(page)


def test_an_image_of_ones_own_on_the_page_of_a_feature(windows: Windows, explorer: str, study: Study) -> None:
    page = open_steered(windows, explorer)
    with page.expect_response(lambda response: response.request.method == "POST") as response:
        page.get_by_label("or an image of yours").set_input_files(next(Path(study.root / "photos").rglob("1?.png")))
    assert response.value.ok
    expect(page.get_by_role("link", name="Link to this")).to_have_count(0)
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.get_by_label("where it fires").check()


def test_a_file_that_is_no_image_is_told_in_place(windows: Windows, explorer: str, tmp_path: Path) -> None:
    windows.expect("status of 400")
    windows.expect("Response Status Error Code 400")
    (tmp_path / "x.png").write_bytes(b"hello")
    page = windows.open(f"{explorer}/my-image")
    page.get_by_label("Image", exact=True).set_input_files(tmp_path / "x.png")
    page.get_by_role("button", name="Look at it").click()
    expect(page.locator("[data-upload-state]")).to_contain_text("the image cannot be read (not an image)", timeout=LOADING)


def test_an_image_of_ones_own_without_scripts(windows: Windows, explorer: str, study: Study) -> None:
    photo = next(Path(study.root / "photos").rglob("1?.png"))
    page = windows.open(f"{explorer}/my-image", javascript=False)
    page.get_by_label("Image", exact=True).set_input_files(photo)
    page.get_by_role("button", name="Look at it").click()
    page.locator("#steer-form [name=latents]").first.check(timeout=LOADING)
    page.locator("#steer-file").set_input_files(photo)
    page.get_by_role("button", name="Steer", exact=True).click()
    expect(page.locator("[data-at]:visible")).to_contain_text("Dose 1 = activation", timeout=LOADING)
