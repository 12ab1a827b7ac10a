"""Proves that the search finds names, classes, captions, numbers, meanings and images, and says which kind of match each hit is."""

import re
from html import unescape

import pytest
from starlette.testclient import TestClient

from ommatid.catalog.reader import Catalog
from ommatid.explorer.search import N_HITS
from support.small_study import HOSTILE, NAMES, QUOTES


def find(client: TestClient, q: str) -> dict[str, list[int]]:
    answer = client.get("/api/search", params={"q": q, "sae": NAMES[0]})
    assert answer.status_code == 200, answer.text
    return {group["title"]: [row["latent"] for row in group["rows"]] or group["images"] for group in answer.json()["words"]}


def token(client: TestClient) -> str:
    found = re.search(r'name="csrf" value="(\w+)"', client.get("/my-image").text)
    assert found
    return found[1]


def test_words_are_found_in_names(client: TestClient, catalog: Catalog) -> None:
    sql = "SELECT latent FROM features WHERE starts_with(sae, $sae) AND contains(lower(label), 'aeroplane')"
    expected = {latent for (latent,) in catalog.rows(sql, {"sae": NAMES[0]})}
    found = set(find(client, "AEROPLANE")["Names"])
    assert found <= expected and len(found) == min(len(expected), N_HITS) > 0
    page = client.get("/search", params={"q": "AEROPLANE", "sae": NAMES[0]}).text
    (listed,) = re.findall(r'href="(/features\?[^"]+)">All by name', page)
    assert client.get(f"/api{unescape(listed)}").json()["total"] == len(expected)


def test_words_are_found_in_names_that_another_labeller_gave(client: TestClient, catalog: Catalog) -> None:
    sql = """
        SELECT labels.label FROM labels JOIN features USING (sae, latent)
        WHERE starts_with(sae, $sae) AND labels.label IS NOT NULL AND labels.label <> features.label AND len(labels.label) < 150
        AND labels.label NOT IN (SELECT label FROM features WHERE label IS NOT NULL) LIMIT 1
    """
    ((label,),) = catalog.rows(sql, {"sae": NAMES[0]})
    found = find(client, label)
    other = "SELECT latent FROM labels WHERE starts_with(sae, $sae) AND label = $label"
    assert set(found["Other names"]) >= {latent for (latent,) in catalog.rows(other, {"sae": NAMES[0], "label": label})} - set(
        found.get("Names", [])
    )


@pytest.mark.parametrize("held_mb", [0, 32], ids=["asked of the catalogue", "held in memory"])
def test_captions_lead_to_latents_whose_strongest_images_have_them(
    client: TestClient, catalog: Catalog, held_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ommatid.explorer.texts.MOST_CAPTIONS_MB", held_mb)
    sql = """
        WITH captioned AS (SELECT image FROM images WHERE len(list_filter(captions, lambda one: contains(lower(one), 'red'))) > 0)
        SELECT latent, count(*) AS n FROM (SELECT latent, unnest(images) AS image FROM previews WHERE starts_with(sae, $sae))
        JOIN captioned USING (image) GROUP BY latent ORDER BY n DESC, latent LIMIT $n
    """
    answer = client.get("/api/search", params={"q": "RED", "sae": NAMES[0]}).json()
    (found,) = (group["rows"] for group in answer["words"] if group["title"] == "Captions")
    assert found and [(row["latent"], row["n_captioned"]) for row in found] == catalog.rows(sql, {"sae": NAMES[0], "n": N_HITS})


@pytest.mark.parametrize("kind", ["quotes", "right to left", "markup"])
def test_hostile_classes_are_found_and_lead_to_latents_that_tell_them(client: TestClient, catalog: Catalog, kind: str) -> None:
    text = HOSTILE[kind][:60]
    found = find(client, text)
    sql = "SELECT latent FROM class_latents WHERE starts_with(sae, $sae) AND class = $class"
    telling = {latent for (latent,) in catalog.rows(sql, {"sae": NAMES[0], "class": HOSTILE[kind]})}
    assert found["Classes"] and set(found["Classes"]) <= telling
    assert found["Captions"], "captions hold the same texts"
    page = client.get("/search", params={"q": text, "sae": NAMES[0]})
    assert page.status_code == 200 and "<script>alert" not in page.text and "onerror='" not in page.text


def test_a_number_finds_the_latent_and_its_neighbours(client: TestClient, catalog: Catalog) -> None:
    found = find(client, "12")
    sql = "SELECT other FROM neighbours WHERE starts_with(sae, $sae) AND latent = 12 ORDER BY rank LIMIT $n"
    assert found["Number"] == [12] and found["Neighbours"] == [other for (other,) in catalog.rows(sql, {"sae": NAMES[0], "n": N_HITS})]
    assert "Number" not in find(client, "4000") and find(client, "9" * 30) == {}


def test_a_number_finds_the_image(client: TestClient) -> None:
    page = client.get("/search", params={"q": "12", "sae": NAMES[0]}).text
    shown = re.search(r"<h2>Image</h2>(.*?)</section>", page, re.DOTALL)
    assert shown and re.findall(r'data-image="(\d+)"', shown[1]) == ["12"] and find(client, "12")["Image"] == [12]


def test_meaning_finds_features_that_no_text_matches(client: TestClient) -> None:
    answer = client.get("/api/search", params={"q": "a red ball", "sae": NAMES[0]}).json()
    assert answer["words"] == [] and answer["problem"] is None
    hits = [row["hit"] for row in answer["meaning"]]
    assert len(hits) == N_HITS and hits == sorted(hits, reverse=True) and -1 <= hits[-1] < hits[0] <= 1


@pytest.mark.parametrize("sae", NAMES)
def test_an_image_of_the_set_is_most_like_itself(client: TestClient, catalog: Catalog, sae: str) -> None:
    image, hash_ = catalog.rows("SELECT image, left(image_id, 12) FROM images WHERE split = 'eval' ORDER BY image LIMIT 1 OFFSET 20")[0]
    encoded = client.get(f"/originals/{image}/{hash_}").content
    answer = client.post("/search", data={"csrf": token(client), "sae": sae}, files={"upload": ("one.png", encoded)})
    assert answer.status_code == 200 and all(title in answer.text for title in ("Fire on it", "Of like meaning", "Images like it"))
    shown = re.search(r"<h2>Images like it</h2>(.*?)</section>", answer.text, re.DOTALL)
    assert shown and re.findall(r'data-image="(\d+)"', shown[1])[0] == str(image)
    strongest = catalog.rows(
        "SELECT latent FROM firings WHERE starts_with(sae, $sae) AND image = $image ORDER BY act DESC LIMIT 1",
        {"sae": sae, "image": image},
    )
    fire = re.search(r"<h2>Fire on it</h2>(.*?)</section>", answer.text, re.DOTALL)
    assert fire and re.findall(r'data-latent="(\d+)"', fire[1])[0] == str(strongest[0][0])
    assert f'href="/features/{sae}-' in fire[1], "of the SAE that was chosen"


@pytest.mark.parametrize("path", ["/search", "/my-image", "/api/my-image"])
@pytest.mark.parametrize(
    ("encoded", "said"), [(b"", "empty"), (b"not an image", "not an image"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "image")]
)
def test_uploads_that_are_no_images_are_refused(client: TestClient, path: str, encoded: bytes, said: str) -> None:
    answer = client.post(path, data={"csrf": token(client), "sae": NAMES[0]}, files={"upload": ("x.png", encoded)})
    assert answer.status_code == 400 and said in answer.text


def test_a_search_for_nothing_explains_itself(client: TestClient) -> None:
    assert "Type a word" in client.get("/search").text
    assert client.get("/search", params={"q": "x" * 201}).status_code == 400
    assert find(client, QUOTES[:30][::-1]) == {}
    assert client.get("/search", params={"q": "\u202e"}).status_code == 200
