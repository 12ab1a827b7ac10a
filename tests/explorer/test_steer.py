"""Proves what the boxes for steering and attribution ask the model, what they show of its answers, and what they refuse.

The model is a double that keeps what it was asked, so that every number in a page is known; `test_model_worker.py` proves the real answers,
and `test_browser_steer.py` the boxes in a browser. The texts of the catalogue and of the answers are hostile.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from ommatid.errors import ModelError
from ommatid.explorer.app import make_app
from ommatid.explorer.model_client import (
    DOSES,
    MAX_UPLOAD,
    AttributedImage,
    AttributedLatent,
    ModelClient,
    Starting,
    SteeredImage,
    SteeredLatent,
    SteeredName,
    Unavailable,
)
from ommatid.explorer.web import Settings
from support.hostile import SAES
from support.hostile import make as make_hostile
from support.html import read
from support.small_study import MARKUP

SAE = quote(SAES[0], safe="")
SEEN = {
    "width": 32, "height": 32, "picture": b"RIFF", "picture_width": 32, "picture_height": 32,
    "seen_width": 1.0, "seen_height": 1.0, "rows": 2, "cols": 2,
}  # fmt: skip


def make_name(name: str, kind: str, change: float, control: float, rank: int = 2) -> SteeredName:
    """A name whose score changes by so much a dose, and by up to so much under each control."""
    ends = [(0.5 - control * dose, 0.5 + control * dose) for dose in DOSES]
    arms = ("untouched", "sign_flipped", "random_latent", "random_direction")
    scores = [0.5 + change * dose for dose in DOSES]
    return SteeredName(name, kind, 0.5, rank, scores, [rank if dose < 1 else 1 for dose in DOSES], dict.fromkeys(arms, ends))


STEERED = SteeredImage(
    **SEEN,
    latents=[SteeredLatent(0, 2.5, 1.0, [0.0, 1.0, 0.0, 0.0])],
    doses=DOSES,
    measure="cosine",
    n_names=3,
    names=[
        make_name("a plain class", "class", 0.01, 0.2, 1),
        make_name(MARKUP, "label", 0.3, 0.1),
        make_name("my text", "text", -0.3, 0.1),
    ],
    n_draws=4,
    warnings=[f"a warning with {MARKUP}"],
)
ATTRIBUTED = AttributedImage(
    **SEEN,
    score=-0.25,
    measure="cosine",
    n_firing=3,
    latents=[AttributedLatent(1, -0.05, -0.04, [0.0, -0.04, 0.0, 0.0]), AttributedLatent(0, 0.02, 0.03, [0.03, 0.0, 0.0, 0.0])],
    others=[-0.00012, 0.01],
    warnings=[],
)


class Double:
    """Stands for the process with the model; it checks questions as the client does, and keeps them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.answer: Any = None
        """An error to raise instead of an answer."""

    def _ask(self, _needs: Any, what: str, *values: Any, wait: float, timeout: float) -> dict[str, Any]:
        self.asked.append((what, values))
        if self.answer:
            raise self.answer
        found = STEERED if what == "steer" else ATTRIBUTED
        rows = {key: [vars(row) for row in getattr(found, key)] for key in ("latents", "names") if hasattr(found, key)}
        return {**vars(found), **rows}

    steer = ModelClient.steer
    attribute = ModelClient.attribute

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    file: Path = make_hostile(tmp_path_factory.mktemp("steer"))
    with duckdb.connect(file) as connection:
        connection.execute("""UPDATE runs SET params = '{"extract": {"model": "lite"}}' WHERE sae = ?""", [SAES[0]])
    made = make_app(Settings(file, str(file.parent / "no-data")))
    made.state.explorer.model.close()
    made.state.explorer.originals.get = lambda image, hash_: (f"image {image}".encode(), "image/png")
    yield made
    made.state.explorer.close()


@pytest.fixture
def model(app: FastAPI) -> Double:
    app.state.explorer.model = Double()
    return app.state.explorer.model


@pytest.fixture
def client(app: FastAPI, model: Double) -> TestClient:
    return TestClient(app, base_url="http://localhost:8321", follow_redirects=False)


def steer(client: TestClient, query: str, status: int = 200) -> str:
    response = client.get(f"/steer?sae={SAE}&{query}")
    assert response.status_code == status, response.text[-500:]
    assert read(response.text).problems == []
    return response.text


def csrf_of(client: TestClient) -> str:
    """Token of the forms that a visitor is shown."""
    found = re.search(r'<meta name="csrf" content="(\w+)">', client.get("/openapi").text)
    assert found
    return found[1]


def send(client: TestClient, address: str, status: int, file: bytes | None = b"image", **fields: Any) -> str:
    files = {"upload": ("mine.png", file)} if file is not None else None
    response = client.post(address, data={"csrf": csrf_of(client), "sae": SAES[0], **fields}, files=files)
    assert response.status_code == status, response.text[-500:]
    return response.text


def shown(page: str) -> str:
    """Text of the dose that is shown."""
    (found,) = re.findall(r"<div data-at data-dose=.*?</table>", page, re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", found)).split())


def test_the_page_of_a_feature_has_the_box_with_its_strongest_images(client: TestClient, model: Double) -> None:
    page = client.get(f"/features/{SAE}/0").text
    assert read(page).problems == [] and page.count('type="radio" name="image"') == 4
    assert '<div id="steered">' in page and "data-at" not in page and model.asked == [], "nothing is asked before the visitor does"
    assert '<section id="steer"' not in client.get(f"/features/{SAE}/3").text, "a latent that fires on no image"


def test_defaults_ask_for_the_strongest_image_all_tokens_and_a_dose_of_1(client: TestClient, model: Double) -> None:
    page = steer(client, "latents=0")
    ((what, (sae, encoded, latents, doses, tokens, patches, texts)),) = model.asked
    assert (what, sae, latents, doses, tokens, patches, texts) == ("steer", SAES[0], [0], list(DOSES), "all", [], [])
    checked = re.search(r'name="image" value="(\d+)" checked', page)
    assert checked and encoded == f"image {checked[1]}".encode()


def test_what_was_chosen_is_asked_and_is_the_whole_state_of_the_address(client: TestClient, model: Double) -> None:
    page = steer(client, "latents=0&latents=1&image=2&dose=0.3&tokens=patches&patches=0-1,3&texts=a%20%20b%0A%0Ac")
    ((_, (_, encoded, latents, doses, tokens, patches, texts)),) = model.asked
    assert (encoded, latents, tokens, patches, texts) == (b"image 2", [0, 1], "patches", [0, 1, 3], ["a b", "c"])
    assert doses == sorted([*DOSES, 0.3])
    again = re.search(r'href="(/steer\?[^"]+)">Link to this', page)
    assert again and client.get(html.unescape(again[1])).status_code == 200
    assert model.asked[1] == model.asked[0]
    assert "patches" not in re.findall(r'href="(/steer[^"]+)">Link to', steer(client, "latents=0&patches=0-1"))[0], "all tokens are steered"


def test_every_dose_is_shown_with_its_controls_ranks_and_absolute_value(client: TestClient) -> None:
    page = steer(client, "latents=0&dose=2")
    assert page.count("data-at") == len(DOSES) and page.count("<tr class") == 2 * (len(DOSES) - 1), "no change is beyond no control"
    text = shown(page)
    assert text.startswith("Dose 2 = activation 5 above what was observed")
    assert "“\u2068my text\u2069” goes from rank 2 to 1 of 3; change −0.6, below every control (−0.2 to +0.2)." in text
    assert "my text (your text) 2 → 1 −0.6 −0.2 to +0.2" in text and "a plain class 1 +0.02 −0.4 to +0.4" in text
    assert "change +0, within the controls" in re.findall(r"<p data-said>(.*?)</p>", page)[0]
    assert "20 % of rows are by chance" in page, "one of 1 + 2 x 4 controls and the edit"
    for arm in ("targeted", "sign_flipped", "random_latent", "random_direction", "untouched"):
        assert page.count(f'class="{arm}"') == len(STEERED.names) + 1, f"{arm} is in each curve, and in the legend"
    warnings = html.unescape(page)
    assert "A warning with" in warnings and "drawn 4 times instead of 8" in warnings and "no difference of means" in warnings


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("latents=0&dose=strong", "dose: got 'strong'; input should be a valid number"),
        ("latents=0&dose=nan", "dose: got 'nan'; input should be"),
        ("latents=0&dose=1e309", "dose: got '1e309'; input should be"),
        ("latents=0&dose=-1", "dose: got '-1'; input should be greater than or equal to 0"),
        ("latents=0&dose=11", "dose: got '11'; input should be less than or equal to 10"),
        ("latents=99", "latents: got 99; "),
        ("latents=-1", "latents: got -1; "),
        (f"latents={'9' * 400}", "latents: got 9999999999999999999999999999999999999999; "),
        ("latents=0&latents=0", "name each latent once"),
        ("&".join(f"latents={i}" for i in range(9)), "at most 8 items"),
        ("image=0", "latents: field required"),
        ("latents=0&tokens=some", "tokens: got 'some'; input should be 'all', 'firing', 'cls' or 'patches'"),
        ("latents=0&tokens=patches", "patches: none is chosen"),
        ("latents=0&tokens=patches&patches=1,x", "patches: got '1,x'; string should match pattern"),
        ("latents=0&tokens=patches&patches=3-1", "patches: got '3-1'; expected numbers below 4,096"),
        ("latents=0&tokens=patches&patches=0-999999", "patches: got '0-999999'; expected numbers below 4,096"),
        ("latents=0&texts=" + quote("\n".join("abcdefghi")), "texts: got 9; at most 8 are compared at once"),
        ("latents=0&texts=" + "x" * 201, "the text has 201 characters"),
        ("latents=0&texts=" + "x" * 5000, "at most 1616 characters"),
        ("latents=0&texts=%00", "characters that cannot be printed"),
        ("latents=0&price=1", "there is no such parameter"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_before_the_model_is_asked(client: TestClient, model: Double, query: str, says: str) -> None:
    assert says in html.unescape(steer(client, query, 400))
    assert model.asked == []


@pytest.mark.parametrize(("query", "says"), [("latents=0&image=99", "There is no image 99"), ("latents=3", "Latent 3 fires on no image")])
def test_what_does_not_exist_is_not_found(client: TestClient, model: Double, query: str, says: str) -> None:
    assert says in html.unescape(steer(client, query, 404)) and model.asked == []


def test_forms_are_checked_as_addresses_are(client: TestClient, model: Double) -> None:
    assert "dose: got 'nan'" in html.unescape(send(client, "/steer", 400, latents="0", dose="nan"))
    assert "latents: field required" in html.unescape(send(client, "/steer", 400))
    assert "latents: got 99" in html.unescape(send(client, "/steer", 400, latents="99"))
    assert "patches: got '7-'" in html.unescape(send(client, "/steer", 400, latents="0", patches="7-"))
    assert "upload: no image was chosen" in send(client, "/steer", 400, file=b"", latents="0")
    assert "upload: field required" in send(client, "/steer", 400, file=None, latents="0")
    assert "text: nothing was typed" in send(client, "/attribute", 400, text=" ")
    assert "text: got" in html.unescape(send(client, "/attribute", 400, text="x" * 201))
    assert "'a truck' twice" in html.unescape(send(client, "/attribute", 400, text="a truck", against="a  truck"))
    assert model.asked == []
    for address in ("/steer", "/attribute"):
        files = {"upload": ("x.png", b"x")}
        assert client.post(address, data={"csrf": "0" * 64, "latents": "0", "text": "a"}, files=files).status_code == 400
        assert (
            client.post(address, data={"csrf": csrf_of(client)}, files=files, headers={"origin": "http://evil.example"}).status_code == 403
        )
        large = {"upload": ("x.png", b"x" * (MAX_UPLOAD + 2**19))}
        assert client.post(address, data={"csrf": csrf_of(client), "latents": "0"}, files=large).status_code == 413
    assert model.asked == []


def test_an_uploaded_image_is_steered_and_gets_no_address(client: TestClient, model: Double) -> None:
    page = send(client, "/steer", 200, latents=["0", "1"], dose="0.5", texts="my text\r\n", image="1", unknown="ignored")
    ((_, (_, encoded, latents, _, _, _, texts)),) = model.asked
    assert (encoded, latents, texts) == (b"image", [0, 1], ["my text"]) and "Link to this" not in page
    assert shown(page).startswith("Dose 0.5 = activation 1.25") and "mine.png" in page


def test_which_latents_speak_for_a_text_against_another(client: TestClient, model: Double) -> None:
    page = send(client, "/attribute", 200, text=MARKUP, against="b")
    assert model.asked == [("attribute", (SAES[0], b"image", [MARKUP, "b"]))] and read(page).problems == []
    speak_for, against = page.split("Speak against")
    assert 'data-latent="0"' in speak_for and "+0.02" in speak_for and 'data-latent="1"' not in speak_for
    assert 'data-latent="1"' in against and "−0.05" in against and 'data-heat="AP8AAA=="' in against, "where it speaks against"
    assert "at most by 20 % of its size. For scale: 2 others that fire, drawn at random, have effects of −0.00012 to +0.01." in page
    send(client, "/attribute", 200, text="a", against="")
    assert model.asked[1][1][2] == ["a"]


def test_without_an_answer_the_page_says_why(client: TestClient, model: Double) -> None:
    for answer, says in (
        (ModelError("the study is not at hand"), "the study is not at hand"),
        (Unavailable("4 other questions wait"), "4 other questions wait"),
        (Starting(1, 9), "The model is being loaded"),
    ):
        model.answer = answer
        page = steer(client, "latents=0")
        assert says in page and "data-at" not in page
        assert says.lower() in send(client, "/attribute", 200, text="a").lower()
        assert says.lower() in send(client, "/steer", 200, latents="0").lower()


def test_imported_activations_are_said_in_one_sentence_instead_of_the_form(client: TestClient) -> None:
    page = client.get(f"/features/{quote(SAES[1], safe='')}/0").text
    assert "so the model that they come from is not known, and nothing can be steered." in page and "steer-form" not in page


def test_programs_get_the_same_as_json(client: TestClient, model: Double) -> None:
    found = client.get(f"/api/steer?sae={SAE}&latents=0").json()
    assert (
        found["doses"] == list(DOSES)
        and found["names"][1]["kind"] == "label"
        and found["names"][1]["controls"]["random_latent"][4] == [0.4, 0.6]
    )
    assert "picture" not in found
    model.answer = Unavailable("busy")
    assert client.get(f"/api/steer?sae={SAE}&latents=0").status_code == 503
    assert "texts: got 9" in client.get(f"/api/steer?sae={SAE}&latents=0&texts={quote(chr(10).join('abcdefghi'))}").json()["error"]
