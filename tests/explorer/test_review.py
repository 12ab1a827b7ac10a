"""Proves that what people say in the pages of review is recorded, shown everywhere, safe, and kept when two people work at once."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import duckdb
import numpy as np
import pytest
from starlette.testclient import TestClient

from explorer.conftest import Visit
from ommatid.catalog.vectors import pack
from ommatid.explorer import reviewed
from ommatid.explorer.reviewed import Reviews
from ommatid.explorer.web import feature_url
from ommatid.reviews import KINDS, ReviewLog
from support.hostile import SAES
from support.processes import wait_for
from support.small_study import HOSTILE, MARKUP

SAE, OTHER = SAES
N = 16
"""Latents of each SAE of the planted catalogue; those from 4 on are named `name 4` and so on, each worse than the one before."""
WORST_FIRST = [latent for latent in range(N - 1, 3, -1) if latent != 7]
"""The queue of doubtful names; 7 fires on too few images."""
LOST = 5
"""Latent whose direction the other SAE lacks; latent i of one is latent N - 1 - i of the other."""


@pytest.fixture(scope="session")
def planted(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hostile catalogue with more latents, whose order in the queue and directions are known."""
    path = tmp_path_factory.mktemp("planted") / "catalog.duckdb"
    shutil.copy(hostile, path)
    with duckdb.connect(path) as connection:
        for latent in range(4, N):
            change = f"{latent} AS latent, 'name {latent}' AS label, {0.5 - latent / 100} AS label_score, 0.5 AS control_score"
            images = 15 if latent == 7 else 16
            connection.execute(f"INSERT INTO features SELECT * REPLACE ({change}, {images} AS n_images) FROM features WHERE latent = 0")
        connection.execute("UPDATE features SET n_images = 20 WHERE latent = 2")
        connection.execute("INSERT INTO neighbours SELECT * REPLACE (4 AS latent, 5 AS other) FROM neighbours WHERE latent = 0")
        labeller = "(SELECT any_value(labeller) FROM features WHERE latent = 4)"
        connection.execute(f"INSERT INTO mistakes SELECT * REPLACE (4 AS latent, {labeller} AS labeller) FROM mistakes")
        connection.execute("UPDATE runs SET n_latents = ?", [N])
        connection.execute("DELETE FROM directions")
        for sae in SAES:
            directions = np.eye(N, dtype=np.float32)
            if sae == OTHER:
                directions = directions[::-1].copy()
                directions[N - 1 - LOST, 0] = 1.0
            for latent, blob in enumerate(pack(directions).to_pylist()):
                connection.execute("INSERT INTO directions VALUES (?, ?, ?)", [sae, latent, blob])
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


Meet = Callable[..., TestClient]
"""Makes another visitor of the planted catalogue, with a name or without; takes fields of the explorer's settings by name."""


@pytest.fixture
def meet(visit: Visit, planted: Path, data: Path) -> Iterator[Meet]:
    """A function that makes visitors. They share an explorer for each kind of settings, whose log of reviews is the test's own."""

    def make(who: str | None = None, data: Path = data, **settings: Any) -> TestClient:
        app = _explorer_of(visit, planted, **settings).app
        app.state.explorer.reviews = Reviews(data / "reviews" / "log.jsonl", app.state.explorer.library)
        client = TestClient(app, base_url="http://127.0.0.1")
        return introduced(client, who) if who else client

    yield make
    for thread in threading.enumerate():
        if thread.name.startswith("find reviewed features"):
            thread.join(60)


@cache
def _explorer_of(visit: Visit, planted: Path, **settings: Any) -> Any:
    return visit(planted, **settings)


@pytest.fixture
def visitor(meet: Meet) -> TestClient:
    return meet("Ada")


def introduced(client: TestClient, who: str) -> TestClient:
    """Give a visitor a name, as the form does."""
    answer = post(client, "/review/who", who=who)
    assert answer.status_code == 303, answer.text
    return client


def csrf(client: TestClient) -> str:
    return client.get("/api/review/csrf").json()["csrf"]


def post(client: TestClient, path: str, **fields: Any) -> Any:
    return client.post(path, data={"csrf": csrf(client), **fields}, follow_redirects=False)


def say(client: TestClient, latent: int, kind: str, value: Any = "", sae: str = SAE, **fields: Any) -> None:
    back = feature_url(sae, latent)
    answer = post(client, "/review/event", sae=sae, latent=latent, kind=kind, value=value, back=back, **fields)
    assert (answer.status_code, answer.headers.get("location")) == (303, back), answer.text


def said(client: TestClient, latent: int, sae: str = SAE) -> dict[str, Any]:
    answer = client.get(f"/api/review{feature_url(sae, latent).removeprefix('/features')}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def page(client: TestClient, latent: int, sae: str = SAE) -> str:
    answer = client.get(feature_url(sae, latent))
    assert answer.status_code == 200, answer.text
    return " ".join(unescape(re.sub(r"<[^>]*>", "", re.sub(r"\n", " ", answer.text))).split())


def queue(client: TestClient, **parameters: Any) -> str:
    answer = client.get("/review", params={"sae": SAE, **parameters})
    assert answer.status_code == 200, answer.text
    return answer.text


def steps(text: str) -> dict[str, int]:
    """Return the latents to which the keys j and k lead."""
    found = re.findall(r'<a [^>]*data-key="([jk])" href="([^"]+)"', text)
    return {key: int(parse_qs(urlsplit(unescape(url)).query)["at"][0]) for key, url in found}


def test_what_can_be_said(visitor: TestClient) -> None:
    say(visitor, 4, "rename", "  a  ship ")
    say(visitor, 4, "rate", 4)
    say(visitor, 4, "flag", "polysemantic")
    say(visitor, 4, "list_add", "boats")
    say(visitor, 4, "comment", "two\r\nlines")
    found = said(visitor, 4)
    assert (found["name"], found["ratings"], found["lists"]) == ("a ship", {"Ada": 4}, ["boats"])
    assert found["flags"] == {"polysemantic": ["Ada"]} and [event["value"] for event in found["comments"]] == ["two\nlines"]
    text = page(visitor, 4)
    for part in ("a ship", "named by Ada", "the name by", "name 4", "4.0 of 5", "its images show several", "boats", "two lines", "5 edits"):
        assert part in text, part
    say(visitor, 4, "unflag", "polysemantic")
    say(visitor, 4, "list_remove", "boats")
    say(visitor, 4, "rename", "")
    for event in found["history"][1:2] + found["comments"]:
        say(visitor, 4, "undo", event["id"])
    found = said(visitor, 4)
    assert not any(found[name] for name in ("name", "rating", "ratings", "flags", "lists", "comments"))
    assert {event["kind"] for event in found["history"]} == set(KINDS) and len(found["undone"]) == 2
    assert "undid: Ada rated it 4 of 5" in page(visitor, 4) and "took the name away" in page(visitor, 4)
    say(visitor, 4, "undo", found["history"][-2]["id"])
    assert said(visitor, 4)["ratings"] == {"Ada": 4}, "an undo can be undone"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "rate", "value": "6"}, "Rating: got '6'; allowed are 1 to 5"),
        ({"kind": "rate", "value": ""}, "Rating: got ''"),
        ({"kind": "flag", "value": "ugly"}, "Flag: got 'ugly'; allowed are wrong_name"),
        ({"kind": "list_add", "value": "a;b"}, "give a name without a semicolon"),
        ({"kind": "comment", "value": " \n "}, "Comment: is empty"),
        ({"kind": "rename", "value": HOSTILE["long"]}, "has 10,000 characters; at most 500"),
        ({"kind": "shout", "value": "x"}, "Kind: got 'shout'"),
        ({"kind": "undo", "value": "0" * 32}, "latent 4 has no event 0000"),
        ({"kind": "rename", "value": "x", "latent": "-1"}, "latent: got '-1'"),
        ({"kind": "rename", "value": "x", "who": ""}, "Your name: is empty"),
        ({"kind": "rename", "value": "x", "who": "a" * 81}, "Your name: has 81 characters; at most 80"),
        ({"kind": "rename", "value": "x", "csrf": "wrong"}, "This form is too old"),
    ],
)
def test_what_cannot_be_said(visitor: TestClient, data: Path, fields: Mapping[str, str], says: str) -> None:
    answer = post(visitor, "/review/event", **{"sae": SAE, "latent": "4", **fields})
    assert answer.status_code == 400 and says in unescape(answer.text)
    assert post(visitor, "/review/event", sae=SAE, latent="99", kind="rate", value="3").status_code == 404
    assert not (data / "reviews").exists(), "nothing was recorded"


def test_who_is_asked_once(meet: Meet) -> None:
    client = meet()
    text = client.get(feature_url(SAE, 4)).text
    assert 'action="/review/who"' in text and 'action="/review/event"' not in text
    answer = post(client, "/review/event", sae=SAE, latent=4, kind="rate", value=3)
    assert answer.status_code == 400 and "give a name, so that others know who said it" in answer.text
    introduced(client, f"{HOSTILE['right to left']}, Ω")
    assert 'action="/review/event"' in client.get(feature_url(SAE, 4)).text
    say(client, 4, "rate", 3)
    (event,) = said(client, 4)["history"]
    assert event["who"] == f"{HOSTILE['right to left']}, Ω"


def test_forms_lead_back_to_this_explorer_only(visitor: TestClient) -> None:
    for back in ("https://example.com/", "//example.com", "/review\\..\\x", "/features/x\r\nset-cookie: a=b", "javascript:alert(1)"):
        assert post(visitor, "/review/who", who="Ada", back=back).headers["location"] == "/review"
    assert post(visitor, "/review/who", who="Ada", back="/review?at=4").headers["location"] == "/review?at=4"


@pytest.mark.parametrize("text", [HOSTILE[kind] for kind in ("markup", "quotes", "lines", "right to left")])
def test_hostile_texts_are_shown_and_nothing_else(visitor: TestClient, text: str) -> None:
    introduced(visitor, text[:70])
    say(visitor, 4, "rename", text)
    say(visitor, 4, "list_add", text.replace(";", ",")[:80])
    say(visitor, 4, "comment", text)
    say(visitor, 4, "undo", said(visitor, 4)["history"][0]["id"])
    say(visitor, 4, "rename", text)
    line = " ".join(text.split())
    (listed,) = said(visitor, 4)["lists"]
    addresses = {"sae": SAE}
    for path, more in (
        (feature_url(SAE, 4), {}),
        ("/review", {"at": 4}),
        ("/review", {"at": 5}),
        ("/review/log", {}),
        ("/review/lists", {}),
        ("/features", {"listed": listed}),
        ("/features", {"label": line[:20]}),
        ("/review/orphans", {"sae": OTHER}),
    ):
        answer = visitor.get(path, params=({} if path.startswith("/features/") else addresses) | more)
        assert answer.status_code == 200, (path, answer.text)
        assert MARKUP not in answer.text and "<script>alert" not in answer.text and "onerror='" not in answer.text, path
        if (path, more) not in (("/review", {"at": 5}), ("/review/orphans", {"sae": OTHER})):
            assert line[:30] in unescape(answer.text), path


def test_names_by_people_are_shown_everywhere(visitor: TestClient) -> None:
    say(visitor, 4, "rename", "Zeppelin")
    mark = 'title="named by Ada"'
    for path, parameters in (
        ("/features", {"label": "zepp"}),
        ("/search", {"q": "zeppelin"}),
        ("/features", {"label": "ZEPP", "view": "table"}),
    ):
        text = visitor.get(path, params={"sae": SAE, **parameters}).text
        assert "Zeppelin" in text and mark in text, path
    assert "name not scored yet" in visitor.get("/features", params={"sae": SAE, "label": "zeppelin"}).text
    row = re.search(r"<tr><td><a[^>]*>4</a>.*?</tr>", visitor.get("/features", params={"sae": SAE, "label": "zepp", "view": "table"}).text)
    of_a_name = re.compile(r"control\s[\d.]+\s%")
    assert of_a_name.search(visitor.get("/features", params={"sae": SAE, "view": "table"}).text)
    assert row and "not scored yet" in row[0] and not of_a_name.search(row[0]), "the score is of another name"
    answer = visitor.get("/api/features", params={"sae": SAE, "label": "zeppelin"}).json()
    assert [(row["latent"], row["label"], row["person_label"]) for row in answer["features"]] == [(4, "name 4", "Zeppelin")]
    assert not visitor.get("/api/features", params={"sae": SAE, "label": "name 4"}).json()["features"], "the name it had is not its name"
    assert "<title>Zeppelin: Ommatid</title>" in visitor.get(feature_url(SAE, 4)).text
    assert "<title>Zeppelin: Review: Ommatid</title>" in queue(visitor, at=4)


def test_filters(visitor: TestClient) -> None:
    say(visitor, 4, "flag", "other")
    say(visitor, 5, "rate", 2)
    say(visitor, 6, "rate", 5)
    say(visitor, 6, "list_add", "a 'list'")

    def found(**parameters: Any) -> set[int]:
        return {row["latent"] for row in visitor.get("/api/features", params={"sae": SAE, "n": 200, **parameters}).json()["features"]}

    assert found(flagged=True) == {4} and found(flagged=False) == {*range(N)} - {4}
    assert found(rated=2) == {5, 6} and found(rated=3) == {6}
    assert found(listed="a 'list'") == {6} and found(listed="none") == set()
    sql = visitor.get("/api/features", params={"sae": SAE, "rated": 2}).json()["sql"]
    assert "[5, 6]::INTEGER[]" in sql


def test_two_people_at_once_lose_nothing(meet: Meet) -> None:
    clients = [meet(who) for who in ("Ada", "Bob")]
    tokens = [csrf(client) for client in clients]
    start, n = threading.Barrier(2), 12

    def work(client: TestClient, token: str) -> None:
        start.wait()
        for number in range(n):
            fields = {"csrf": token, "sae": SAE, "latent": 4 + number % 3, "kind": "comment", "value": f"comment {number}"}
            assert client.post("/review/event", data=fields, follow_redirects=False).status_code == 303

    threads = [threading.Thread(target=work, args=pair) for pair in zip(clients, tokens, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(event["who"], event["value"]) for latent in (4, 5, 6) for event in said(clients[0], latent)["comments"]]
    assert sorted(found) == sorted((who, f"comment {number}") for who in ("Ada", "Bob") for number in range(n))


def test_a_conflict_is_shown_until_somebody_settles_it(meet: Meet) -> None:
    ada, bob = (meet(who) for who in ("Ada", "Bob"))
    seen = said(ada, 4)["last"]
    assert seen == ""
    say(ada, 4, "rename", "ship", seen=seen)
    say(bob, 4, "rename", "boat", seen=seen)
    assert "Different names were given by people who had not seen each other's: Ada named it" in page(ada, 4)
    assert said(ada, 4)["name"] == "boat"
    form = re.search(r'name="seen" value="([0-9a-f]*)"', ada.get(feature_url(SAE, 4)).text)
    assert form and form[1] == said(ada, 4)["last"], "forms hold what their reader has seen"
    say(ada, 4, "rename", "ship", seen=form[1])
    assert "Different names" not in page(bob, 4) and said(bob, 4)["name"] == "ship"


def test_queue_goes_from_the_worst_name_on(visitor: TestClient) -> None:
    answer = visitor.get("/review", params={"sae": SAE}, follow_redirects=False)
    assert answer.status_code == 303 and f"at={WORST_FIRST[0]}" in answer.headers["location"]
    seen, at = [], WORST_FIRST[0]
    while at not in seen:
        seen.append(at)
        at = steps(queue(visitor, at=at))["j"]
    assert (seen, at) == (WORST_FIRST, WORST_FIRST[0]), "after the last come those that were left out"
    assert [steps(queue(visitor, at=at))["k"] for at in WORST_FIRST[1:]] == WORST_FIRST[:-1]
    text = queue(visitor, at=WORST_FIRST[3])
    assert f"0 of {len(WORST_FIRST)} reviewed; this is number 4" in text
    for part in ("classes of its images", "nearest directions", "name 5", "What the name by", "It fires, but the name does not fit"):
        assert part in queue(visitor, at=4), part


def test_queue_does_not_jump_when_others_review(visitor: TestClient, meet: Meet) -> None:
    bob = meet("Bob")
    at, following = WORST_FIRST[4], WORST_FIRST[5]
    before = steps(queue(visitor, at=at))
    say(bob, WORST_FIRST[0], "rename", "x")
    say(bob, WORST_FIRST[9], "flag", "other")
    say(visitor, at, "rate", 1)
    text = queue(visitor, at=at)
    assert steps(text) == before == {"j": following, "k": WORST_FIRST[3]} and f"3 of {len(WORST_FIRST)} reviewed" in text
    say(bob, following, "rate", 3)
    assert steps(queue(visitor, at=at)) == {"j": WORST_FIRST[6], "k": WORST_FIRST[3]}, "what somebody else did is not done twice"
    assert steps(queue(visitor, at=following)) == {"j": WORST_FIRST[6], "k": at}, "its address still shows it in its place"
    for latent in WORST_FIRST:
        say(visitor, latent, "rate", 2)
    done = queue(visitor)
    assert "Everything here is reviewed" in done and "Nothing is left after this one" in queue(visitor, at=at)


def test_other_queues(visitor: TestClient, meet: Meet) -> None:
    bob = meet("Bob")
    assert "Nothing to review here" in queue(visitor, queue="flagged")
    for latent in (9, 4, 2):
        say(bob, latent, "flag", "wrong_name")
    say(visitor, 12, "flag", "wrong_name")
    text = queue(visitor, queue="flagged")
    assert "0 of 3 reviewed; this is number 1" in text and steps(text) == {"j": 4}, "the worst first, and not what one flagged oneself"
    say(visitor, 9, "comment", "no, it is right")
    assert "1 of 3 reviewed" in queue(visitor, queue="flagged") and "1 of 1 reviewed" not in queue(bob, queue="flagged")
    assert "this is number 1" in queue(visitor, queue="unnamed", at=2) and "1 of 1 reviewed" in queue(visitor, queue="unnamed", at=2)
    assert f"0 of {len(WORST_FIRST)} reviewed" in queue(visitor, queue="unrated"), "flags are no ratings"
    say(visitor, WORST_FIRST[0], "rate", 5)
    assert f"1 of {len(WORST_FIRST)} reviewed; this is number 2" in queue(visitor, queue="unrated")
    assert visitor.get("/review", params={"queue": "best"}).status_code == 400


def test_what_was_said_of_another_sae_is_found_or_kept(visitor: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    search, may_go = reviewed.follow, threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_go.wait(60)
        return search(*arguments)

    monkeypatch.setattr(reviewed, "follow", slow)
    say(visitor, 4, "rename", "found again")
    say(visitor, LOST, "rename", "lost")
    say(visitor, LOST, "list_add", "some")
    there = N - 1 - 4
    waiting = "still being searched"
    assert waiting in page(visitor, there, OTHER) and waiting in visitor.get("/review/orphans", params={"sae": OTHER}).text
    assert visitor.get("/review/export.csv", params={"sae": OTHER}).status_code == 503, "half of it is not what was said"
    may_go.set()
    wait_for(lambda: not said(visitor, there, OTHER)["is_pending"], "the search")
    assert said(visitor, there, OTHER)["name"] == "found again" and waiting not in page(visitor, there, OTHER)
    assert "of latent 4 of" in page(visitor, there, OTHER), "the history says where it was said"
    orphans = unescape(visitor.get("/review/orphans", params={"sae": OTHER}).text)
    assert "lost" in orphans and "<bdi>found again" not in orphans and "cosine 0.70" in orphans and f"latent {N - 1 - LOST}<" in orphans
    assert "0 features, and 1 of other SAEs" in visitor.get("/review/lists", params={"sae": OTHER}).text
    assert "There is none." in visitor.get("/review/orphans", params={"sae": SAE}).text
    say(visitor, there, "undo", said(visitor, there, OTHER)["history"][0]["id"], sae=OTHER)
    assert said(visitor, 4)["name"] is None, "an edit can be undone where it is found"


def test_search_runs_once_for_a_set_of_features(visitor: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = Reviews._search
    monkeypatch.setattr(Reviews, "_search", lambda self, sae: (searches.append(sae), search(self, sae)))
    say(visitor, 4, "rename", "ship")
    wait_for(lambda: not said(visitor, 3, OTHER)["is_pending"], "the search")
    say(visitor, 4, "rate", 4)
    say(visitor, 6, "rate", 4, sae=OTHER)
    assert said(visitor, N - 1 - 4, OTHER)["ratings"] == {"Ada": 4} and not said(visitor, 3, OTHER)["is_pending"]
    assert searches.count(OTHER) == 1


@pytest.mark.parametrize("what", ["state", "history"])
def test_csv_goes_round_through_the_pages(visitor: TestClient, meet: Meet, tmp_path: Path, what: str) -> None:
    for latent in (4, 6):
        say(visitor, latent, "rename", f"={HOSTILE['quotes']}")
        say(visitor, latent, "comment", HOSTILE["lines"])
        say(visitor, latent, "list_add", "a list")
    say(visitor, 4, "rate", 2)
    exported = visitor.get("/review/export.csv", params={"sae": SAE, "what": what})
    assert exported.headers["content-disposition"] == f'attachment; filename="reviews-{what}.csv"'
    before = {latent: said(visitor, latent) for latent in (4, 6)}
    other = meet("Bob", data=tmp_path / "elsewhere")
    for n_events, n_known in ((7, 0), (0, 7)):
        answer = upload(other, exported.content)
        assert answer.status_code == 200, answer.text
        text = re.sub(r"<[^>]*>", "", answer.text)
        assert re.search(rf"{n_events} edits? w\w+ recorded; {n_known} w\w+ known", text), text
    for latent in (4, 6):
        first, second = before[latent], said(other, latent)
        for name in ("name", "ratings", "lists"):
            assert first[name] == second[name]
        assert [event["value"] for event in first["comments"]] == [event["value"] for event in second["comments"]]
        assert {event["who"] for event in second["history"]} == {"Ada"}
        assert what == "state" or first == second


def upload(client: TestClient, content: bytes, **fields: str) -> Any:
    given = {"csrf": csrf(client), "sae": SAE, **fields}
    return client.post("/review/import", data=given, files={"file": ("reviews.csv", content, "text/csv")})


def test_a_bad_csv_file_is_refused_as_a_whole(visitor: TestClient, data: Path) -> None:
    rows = "sae,latent,name,rating\n" + "".join(
        f'"{SAE.replace(chr(34), chr(34) * 2)}",{latent},x,{rating}\n' for latent, rating in ((4, 3), (99, 3), (5, 9))
    )
    answer = upload(visitor, rows.encode())
    text = unescape(answer.text)
    assert answer.status_code == 400 and "line 3, column latent: got '99'" in text and "line 4, column rating: got" in text
    assert not ReviewLog(data / "reviews" / "log.jsonl").state().keys
    assert upload(visitor, b"latent,name\n4,x\n", csrf="wrong").status_code == 400
    assert upload(visitor, b"\xff\xfe,nonsense").status_code == 400
    assert upload(visitor, b"x" * (8 * 2**20 + 1)).status_code == 413
    assert not (data / "reviews" / "log.jsonl").exists()


def test_read_only(visitor: TestClient, meet: Meet, data: Path) -> None:
    say(visitor, 4, "rename", "a ship")
    closed = meet(is_read_only=True)
    for path, parameters in ((feature_url(SAE, 4), {}), ("/review", {"sae": SAE, "at": 4}), ("/review/log", {"sae": SAE})):
        text = closed.get(path, params=parameters).text
        assert "a ship" in text and 'method="post"' not in text, path
    before = (data / "reviews" / "log.jsonl").read_bytes()
    for answer in (
        post(closed, "/review/event", sae=SAE, latent=4, kind="rate", value=1, who="Eve"),
        post(closed, "/review/who", who="Eve"),
        upload(closed, b"latent,name\n4,x\n", who="Eve"),
        closed.post("/api/review/event", json={}, headers={"x-csrf-token": csrf(closed)}),
    ):
        assert answer.status_code == 403 and "shows reviews and takes none" in answer.text, answer.text
    assert (data / "reviews" / "log.jsonl").read_bytes() == before


def test_json(visitor: TestClient, meet: Meet) -> None:
    body = {"sae": SAE, "latent": 4, "kind": "rename", "value": "ship", "who": "Program", "seen": ""}
    assert visitor.post("/api/review/event", json=body).status_code == 400
    header = {"x-csrf-token": visitor.get("/api/review/csrf").json()["csrf"]}
    answer = visitor.post("/api/review/event", json=body, headers=header)
    assert answer.status_code == 201 and answer.json()["value"] == "ship"
    assert visitor.post("/api/review/event", json=body | {"kind": "rate"}, headers=header).status_code == 400
    assert visitor.post("/api/review/event", json=body | {"more": 1}, headers=header).status_code == 400
    assert visitor.get("/api/review/log").json()["events"] == [answer.json()] == said(visitor, 4)["history"]
    token = "a secret that nobody guesses"
    program = meet(token=token)
    assert program.post("/api/review/event", json=body).status_code == 401
    found = program.post("/api/review/event", json=body | {"value": "boat"}, headers={"authorization": f"Bearer {token}"})
    assert found.status_code == 201, found.text
    assert said(visitor, 4)["name"] == "boat"


def test_log_has_pages(visitor: TestClient, data: Path) -> None:
    log = ReviewLog(data / "reviews" / "log.jsonl")
    events = [log.append("Ada", SAE, 4, "comment", f"number {number}", direction=lambda: np.eye(N)[4]) for number in range(120)]
    seen, address = [], "/api/review/log"
    while address:
        answer = visitor.get(address).json()
        seen += [event["id"] for event in answer["events"]]
        address = answer["next"]
    assert seen == [event.id for event in reversed(events)]
    text = page(visitor, 4)
    assert "number 70 2" in text and "number 69 2" not in text.partition("History")[2] and "The latest 50" in text
    first = visitor.get("/review/log", params={"sae": SAE}).text
    assert "number 119" in first and "number 69" not in first
    following = re.search(r'rel="next" href="([^"]+)"', first)
    assert following and "number 69" in visitor.get(unescape(following[1])).text
    assert visitor.get("/review/log", params={"before": "0" * 32}).status_code == 400
    with (data / "reviews" / "log.jsonl").open("ab") as file:
        file.write(b'{"torn')
    assert "the last line has no end" in visitor.get("/review/log").text
