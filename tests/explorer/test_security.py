"""Proves that nothing hostile gets through the explorer: texts of the catalogue, parameters, forms, other sites, tokens, slow visitors."""

import csv
import html
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import pytest
from fastapi import Depends, FastAPI, Form, UploadFile
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from ommatid.catalog.reader import Catalog
from ommatid.errors import ConfigError
from ommatid.explorer import security
from ommatid.explorer.app import make_app
from ommatid.explorer.features import safe_cell
from ommatid.explorer.model_client import Unavailable
from ommatid.explorer.security import HEADERS, MOST_ADDRESSES, MOST_WRONG, check_exposure, check_form
from ommatid.explorer.web import Settings
from support.hostile import SAES
from support.html import read
from support.processes import HANG_SECONDS
from support.servers import EXPLORER, ExplorerServer, serving_explorer
from support.small_study import HOSTILE, LONG, MARKUP, QUOTES

TOKEN = "k3-Jq9_vX2mPz8Lw"
CSP = HEADERS["content-security-policy"]


class NoModel:
    """Stands for the process with the model, which no test here needs."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise Unavailable("this test has no model")

        return refuse

    def close(self) -> None:
        pass


def open_app(file: Path, **settings: Any) -> FastAPI:
    """Make the application over a catalogue, with forms that take what visitors send."""
    app = make_app(Settings(file, str(file.parent / "no-data"), **settings))
    app.state.explorer.model.close()
    app.state.explorer.model = NoModel()

    @app.post("/try/form", dependencies=[Depends(check_form)])
    def take_form(text: Annotated[str, Form()] = "") -> PlainTextResponse:
        return PlainTextResponse(f"taken {len(text)}")

    @app.post("/my-image/try", dependencies=[Depends(check_form)])
    def take_file(upload: UploadFile) -> PlainTextResponse:
        return PlainTextResponse(f"taken {len(upload.file.read())} {getattr(upload.file, '_rolled', None)}")

    @app.get("/try/fault", include_in_schema=False)
    def fail() -> None:
        raise RuntimeError(f"{MARKUP} planted")

    return app


@pytest.fixture(scope="module")
def app(hostile: Path) -> FastAPI:
    return open_app(hostile)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    """A visitor without a past, of a server that needs no token; the catalogue stays open from test to test."""
    return TestClient(app, base_url="http://localhost:8321", follow_redirects=False, raise_server_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def _close(app: FastAPI) -> Iterator[None]:
    yield
    app.state.explorer.close()


@pytest.fixture
def guarded(hostile: Path) -> Iterator[TestClient]:
    """A visitor without a past, of a server that other machines reach."""
    app = open_app(hostile, host="0.0.0.0", token=TOKEN)
    yield TestClient(app, base_url="http://study.example:8321", follow_redirects=False, raise_server_exceptions=False)
    app.state.explorer.close()


def csrf_of(client: TestClient) -> str:
    """Token of the forms that a visitor is shown."""
    found = re.search(r'<meta name="csrf" content="(\w+)">', client.get("/openapi").text)
    assert found
    return found[1]


# What pages hold


def check_headers(response: Any, what: str) -> None:
    for name, value in HEADERS.items():
        assert response.headers.get_list(name) == [value], (what, name)
    assert len(response.headers.get_list("cache-control")) == 1, what


def routes_of(app: FastAPI) -> list[APIRoute]:
    found: list[APIRoute] = []
    waiting: list[Any] = list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()) and not route.path.startswith("/try"):
            found.append(route)
        waiting += getattr(getattr(route, "original_router", None), "routes", [])  # of routers, which newer versions of FastAPI keep apart
    assert len(found) > 25, "every module's routes"
    return found


def filled(app: FastAPI, path: str) -> str:
    """Address of a route with values that exist."""
    with app.state.explorer.library.open() as opened:
        row = opened.rows("SELECT image, left(image_id, 12) AS hash, label FROM images WHERE label = $label LIMIT 1", label=MARKUP)[0]
    known = {
        "sae": SAES[0],
        "latent": 0,
        "image": row["image"],
        "hash": row["hash"],
        "name": MARKUP,
        "class": MARKUP,
        "digest": "0",
        "other": 1,
    }
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: quote(str(known.get(found[1], "x")), safe=""), path)


def test_no_page_runs_what_the_catalogue_holds(app: FastAPI, client: TestClient) -> None:
    """Follows every link from every route's page, as far as there are pages of another kind to see."""
    waiting = [filled(app, route.path) for route in routes_of(app)]
    waiting += [f"/search?q={quote('script')}", f"/class?name={quote(MARKUP)}", f"/sql?q={quote('SELECT * FROM labels')}"]
    waiting += [
        f"/sql?q={quote('SELECT * FROM images')}",
        f"/features?view=table&class={quote(MARKUP)}",
        f"/features?label={quote(QUOTES)}",
    ]
    seen: dict[str, int] = {}
    kinds: dict[str, int] = {}
    n_marked = 0
    while waiting:
        address = waiting.pop(0)
        path = urlsplit(address).path
        kind = re.sub(r"[^/]*[\d%][^/]*", "*", path)
        if address in seen or kinds.get(kind, 0) >= 12:
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        response = client.get(address)
        seen[address] = response.status_code
        assert response.status_code < 500, (address, response.text[-500:])
        check_headers(response, address)
        assert urlsplit(address).fragment or not address.startswith("//")
        if response.headers["content-type"].startswith("text/html"):
            page = read(response.text)
            assert page.problems == [], address
            n_marked += MARKUP[:40] in "".join(page.text)
            waiting += [link.partition("#")[0] for link in page.links if link.startswith("/")]
        elif response.headers["content-type"].startswith("application/json"):
            json.loads(response.content, parse_constant=pytest.fail)
    assert sum(status == 200 for status in seen.values()) > 40 and n_marked > 10, "the hostile texts are shown"
    assert not [
        address
        for address, status in seen.items()
        if status == 200 and address.startswith("/static") and ".css" not in address and ".js" not in address and ".svg" not in address
    ]


ATTACKS = ("1' OR '1'='1'; DROP TABLE features; --", f"\0{MARKUP}{{{{7*7}}}}$sae", "9" * 400, "nan")


@pytest.mark.parametrize("attack", ATTACKS, ids=("sql", "markup", "huge", "nan"))
def test_no_parameter_reaches_sql_or_pages_unescaped(app: FastAPI, client: TestClient, hostile: Path, attack: str) -> None:
    with Catalog(hostile) as catalog:
        before = catalog.rows("SELECT count(*), count(label) FROM features")
    n = 0
    for route in routes_of(app):
        if route.path in ("/metrics", "/health", "/robots.txt"):
            continue
        names = [name for one in route.dependant.query_params for name in names_of(one)]
        places = re.findall(r"\{(\w+)", route.path)
        addresses = [(filled(app, route.path), {name: attack}) for name in [*names, "unknown"]]
        addresses += [(filled(app, route.path.replace(f"{{{place}}}", quote(attack, safe=""))), {}) for place in places]
        for address, parameters in addresses:
            response = client.get(address, params=parameters or None)
            n += 1
            assert response.status_code in (200, 400, 404, 503), (address, parameters, response.text[-500:])
            if response.status_code == 503:
                assert "no model" in response.text, (address, parameters, response.text[-800:])
            check_headers(response, address)
            if response.headers["content-type"].startswith("text/html"):
                assert read(response.text).problems == [], (address, parameters)
            assert "<script>alert" not in response.text or "html" not in response.headers["content-type"]
    assert n > 60
    with Catalog(hostile) as catalog:
        assert catalog.rows("SELECT count(*), count(label) FROM features") == before


def names_of(parameter: Any) -> list[str]:
    fields = getattr(parameter.field_info.annotation, "model_fields", None)
    return [one.alias or name for name, one in fields.items()] if fields else [parameter.alias]


ADDRESSES = [
    ("a page that is none, with markup", f"/{quote(MARKUP)}", 404),
    ("a page that is none, of 30,000 characters", "/" + "x" * 30_000, 404),
    ("a path with a zero byte", "/features/%00/0", 404),
    ("a path that is no UTF-8", "/features/%ff%fe/0", 404),
    ("a path with a line break", "/features/a%0d%0aset-cookie:%20x=1/0", 404),
    ("a latent beyond 64 bits", f"/features/{quote(SAES[0])}/{2**63}", 404),
    ("a latent of 5,000 digits", f"/features/{quote(SAES[0])}/{'9' * 5000}", 400),
    ("a latent that is negative", f"/features/{quote(SAES[0])}/-1", 404),
    ("an image beyond 64 bits", f"/images/{2**63}", 404),
    ("a thumbnail beyond 64 bits", f"/thumbs/{2**64}/000000000000.webp", 404),
    ("a thumbnail of any checksum", "/thumbs/0/%25%25%25%25%25%25%25%25%25%25%25%25.webp", 404),
    ("a thumbnail without a checksum", "/thumbs/0/.webp", 404),
    ("a heat map beyond 64 bits", f"/heat/{quote(SAES[0])}/{2**63}/{2**63}.svg", 404),
    ("a static file outside", "/static/0/..%2f..%2f..%2f..%2fetc%2fpasswd", 404),
    ("a static file outside, by dots", "/static/../app.py", 404),
    ("a static file outside, by backslashes", "/static/0/..%5c..%5capp.py", 404),
    ("a static file by a full path", "/static/%2fetc/passwd", 404),
    ("an original outside", "/originals/0/..%2f..%2fetc%2fpasswd", 404),
    ("an original of a bad checksum", "/originals/0/zzzzzzzzzzzz", 400),
    ("a key of a page that is SQL", "/features?after=1);DROP TABLE features", 400),
    ("a key of a page with half of a character", '/features?sort=label&after=["\\ud800",1]', 400),
    ("a key of a page beyond floats", f"/features?after=[{'9' * 400},1]", 400),
    ("a key of a page that is nested", f"/features?after={'[' * 900}", 400),
    ("a key of a page that is no number", "/features?after=[NaN,1]", 400),
    ("a sort that is SQL", "/features?sort=(SELECT 1)", 400),
    ("an order that is SQL", "/features?order=desc; DROP TABLE features", 400),
    ("an unknown parameter", "/features?__class__=1", 400),
    ("7,000 unknown parameters", "/features?" + "&".join(f"p{i}=1" for i in range(7_000)), 400),
    ("a parameter twice", "/features?sae=x&sae=y", 404),
    ("a count of rows beyond reason", "/features?n=1000000", 400),
    ("a statement that writes", "/sql?q=CREATE TABLE x (y INT)", 400),
    ("a statement that reads files", "/sql?q=SELECT * FROM read_csv('/etc/passwd')", 400),
    ("a statement that asks the network", "/sql?q=SELECT * FROM 'https://evil.example/x.parquet'", 400),
    ("a statement that changes settings", "/sql?q=SET enable_external_access = true", 400),
    ("a statement that loads code", "/sql?q=LOAD httpfs", 400),
    ("an error that quotes markup", f"/sql?q={quote('SELECT ' + MARKUP)}", 400),
]


@pytest.mark.parametrize(("address", "status"), [case[1:] for case in ADDRESSES], ids=[case[0] for case in ADDRESSES])
def test_hostile_addresses(client: TestClient, address: str, status: int) -> None:
    response = client.get(address)
    assert response.status_code == status, response.text[-600:]
    check_headers(response, address)
    assert len(response.content) < 250_000 and "set-cookie" not in response.headers and "root:" not in response.text
    if response.headers["content-type"].startswith("text/html"):
        assert read(response.text).problems == []


def test_faults_say_nothing_and_have_the_headers(client: TestClient) -> None:
    response = client.get("/try/fault")
    assert response.status_code == 500 and "planted" not in response.text and "Traceback" not in response.text
    check_headers(response, "a fault")
    assert read(response.text).problems == []


def test_texts_in_csv_are_no_formulas(client: TestClient) -> None:
    for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"):
        assert safe_cell(text) == f"'{text}"
        answer = client.get("/sql.csv", params={"q": f"SELECT '{text}' AS x, -1 AS number"})
        assert list(csv.reader(io.StringIO(answer.text, newline="")))[1:] == [[f"'{text}", "-1"]]
    assert client.get("/sql.csv", params={"q": 'SELECT 1 AS "=1+1"'}).text.startswith("'=1+1")


def test_names_of_downloads_cannot_end_the_header(client: TestClient) -> None:
    for name in SAES:
        for suffix in ("csv", "parquet"):
            response = client.get(f"/features.{suffix}", params={"sae": name})
            assert re.fullmatch(rf'attachment; filename="features-[\w.-]+\.{suffix}"', response.headers["content-disposition"], re.ASCII)


# Who may ask


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8321",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "[",
        "[::1",
        "",
        "0.0.0.0",
        "evil.example#localhost",
        "evil.example/localhost",
    ],
)
def test_a_name_of_another_site_for_this_machine(client: TestClient, host: str) -> None:
    response = client.get("/", headers={"host": host})
    assert response.status_code == 421, "DNS rebinding"
    check_headers(response, host)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8321", "127.0.0.1:8321", "[::1]:8321", "127.8.9.1"])
def test_names_of_this_machine(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


OWN = {"origin": "http://localhost:8321", "sec-fetch-site": "same-origin"}
FOREIGN = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:8322"},
    {"origin": "http://localhost:8321.evil.example"},
    {"origin": "http://["},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
    {"origin": "http://localhost:8321", "sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_forms_of_other_sites(client: TestClient, headers: dict[str, str]) -> None:
    token = csrf_of(client)
    assert client.post("/try/form", data={"csrf": token}, headers=OWN).text == "taken 0"
    response = client.post("/try/form", data={"csrf": token}, headers=headers)
    assert response.status_code == 403
    check_headers(response, str(headers))


def test_forms_need_the_token_of_the_visitor(app: FastAPI, client: TestClient) -> None:
    other = TestClient(app, base_url="http://localhost:8321")
    theirs, ours = csrf_of(other), csrf_of(client)
    assert theirs != ours
    for token in (None, "", "0", theirs, ours[:-1], ours + "0", ours.upper(), "\ufffd", "x" * 100_000):
        response = client.post("/try/form", data={} if token is None else {"csrf": token}, headers=OWN)
        assert response.status_code == 400 and "too old" in response.text, token
    assert client.post("/try/form", headers=OWN | {"x-csrf-token": ours}).status_code == 200
    assert client.post(f"/try/form?csrf={ours}", headers=OWN).status_code == 400, "addresses are kept in histories"
    client.cookies.clear()
    assert client.post("/try/form", data={"csrf": ours}, headers=OWN).status_code == 400, "without the cookie"


def test_nobody_can_choose_a_session(app: FastAPI, client: TestClient) -> None:
    for value in ("chosen", "chosen.", "chosen.0", ".", f"chosen.{'0' * 64}", '"x', "é", "a=b;c", "x" * 10_000):
        response = client.get("/", headers={b"cookie": f"ommatid-8321={value}".encode("latin-1")})
        assert response.status_code == 200 and "chosen" not in response.headers["set-cookie"]


def test_cookie(client: TestClient) -> None:
    cookie = client.get("/").headers["set-cookie"]
    assert re.fullmatch(r"ommatid-8321=[\w-]{22}\.[0-9a-f]{64}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000", cookie)
    assert "set-cookie" not in client.get("/").headers, "known by now"
    odd = {"cookie": f'other={{"a": 1}}; b="; {cookie.partition(";")[0]}; c'}
    assert "set-cookie" not in client.get("/", headers=odd).headers, "cookies of other programs of this machine do not hide ours"
    behind = TestClient(client.app, base_url="https://localhost")
    assert "; Secure" in behind.get("/").headers["set-cookie"]
    fresh = TestClient(client.app, base_url="http://localhost")
    style = re.search(r"/static/\w+/explorer\.css", client.get("/").text)
    assert style and "set-cookie" not in fresh.get(style[0]).headers, "no shared cache keeps a session"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 403),
    ],
)
def test_other_sites_may_link_but_not_embed(client: TestClient, headers: dict[str, str], status: int) -> None:
    response = client.get("/sql?q=SELECT 1", headers=headers)
    assert response.status_code == status and response.headers["content-security-policy"].endswith("frame-ancestors 'none'")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "CONNECT", "PROPFIND"])
def test_other_methods(client: TestClient, method: str) -> None:
    response = client.request(method, "/features", headers=OWN | {"x-http-method-override": "GET"})
    assert response.status_code == 405
    check_headers(response, method)


def test_head_is_answered_without_a_body(client: TestClient) -> None:
    response = client.head("/features")
    assert response.status_code == 200 and response.content == b"" and int(response.headers["content-length"]) > 1000


def test_no_address_leads_elsewhere(client: TestClient, guarded: TestClient) -> None:
    for opened in (client, guarded):
        for path in (
            "//evil.example",
            "/\\evil.example",
            "/%5cevil.example",
            "///evil.example/..",
            "/%2f/evil.example",
            "/.//evil.example/",
        ):
            response = opened.get(f"{path}?token={TOKEN}")
            place = response.headers.get("location", "/")
            assert re.match(r"/(?![/\\])", place), (path, place)
            assert "token" not in place
            opened.cookies.clear()


# Tokens


def test_without_a_token_nothing_is_answered(guarded: TestClient) -> None:
    for path in (
        "/",
        "/features",
        "/api/saes",
        "/api/openapi.json",
        "/openapi",
        "/metrics",
        "/nothing",
        "/static/0/explorer.css",
        "/sql?q=SELECT 1",
    ):
        response = guarded.get(path)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer" and len(response.content) < 200
        check_headers(response, path)
        assert response.headers["cache-control"] == "no-store" and "set-cookie" not in response.headers
    assert guarded.get("/robots.txt").status_code == guarded.get("/health").status_code == 200
    assert guarded.post("/try/form").status_code == 401
    for cookie in ("ommatid-8321=x", f"ommatid-8321={TOKEN}", "ommatid-8321=a." + "0" * 64):
        assert guarded.get("/", headers={"cookie": cookie}).status_code == 401


def test_health_names_no_path_to_strangers(tmp_path: Path) -> None:
    for token, is_told in ((None, True), (TOKEN, False)):
        app = make_app(Settings(tmp_path / "missing.duckdb", token=token))
        response = TestClient(app, base_url="http://localhost").get("/health")
        assert response.status_code == 503 and ("missing.duckdb" in response.text) is is_told
        app.state.explorer.close()


def test_the_token_is_exchanged_for_a_cookie(guarded: TestClient) -> None:
    answer = guarded.get(f"/features?sort=ms&token={TOKEN}&label=a%26b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/features?sort=ms&label=a%26b")
    assert TOKEN not in str(answer.headers) and TOKEN not in answer.text
    assert "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
    page = guarded.get(answer.headers["location"])
    assert page.status_code == 200 and TOKEN not in page.text
    again = guarded.get(f"/?token={TOKEN}")
    assert (again.status_code, again.headers["location"]) == (303, "/"), "the link of the first time still works"
    thumb = re.search(r"/thumbs/\d+/\w+\.webp", guarded.get("/features").text)
    assert thumb and guarded.get(thumb[0]).headers["cache-control"] == "private, max-age=31536000, immutable"
    assert page.headers["cache-control"] == "no-store"


def test_programs_send_the_token_as_a_header(guarded: TestClient) -> None:
    for scheme in ("Bearer", "bearer"):
        answer = guarded.get("/api/saes", headers={"authorization": f"{scheme} {TOKEN}"})
        assert answer.status_code == 200 and "set-cookie" not in answer.headers
    assert guarded.post(f"/try/form?token={TOKEN}").status_code == 401, "no form is sent with a token in its address"


@pytest.mark.parametrize(
    "token", ["", " ", "0", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), f"{TOKEN}\0", "\ud7ff" * 16, "é" * 16, "x" * 30_000, f"{TOKEN} ", "%ff"]
)
def test_wrong_tokens(guarded: TestClient, token: str) -> None:
    response = guarded.get("/", params={"token": token})
    assert response.status_code == 401 and "set-cookie" not in response.headers and (len(token) < 4 or token not in response.text)
    sent = f"Bearer {token}".encode("utf-8", "replace")
    assert guarded.get("/", headers={b"authorization": sent}).status_code == (401 if token != f"{TOKEN} " else 200)


def test_tokens_are_compared_in_constant_time(guarded: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    guarded.get("/?token=x")
    ((one, other),) = compared
    assert len(one) == len(other) == 32, "digests of one length, whatever was sent"


def test_wrong_tokens_are_limited(guarded: TestClient) -> None:
    for _ in range(MOST_WRONG):
        assert guarded.get("/?token=wrong").status_code == 401
    blocked = guarded.get(f"/?token={TOKEN}")
    assert blocked.status_code == 429 and blocked.headers["retry-after"] == "60", "the right one, too, or guessing would go on"
    assert guarded.get("/").status_code == 401, "asking without one costs nothing"
    other = TestClient(guarded.app, base_url="http://study.example:8321", client=("192.0.2.7", 1), follow_redirects=False)
    assert other.get(f"/?token={TOKEN}").status_code == 303, "others are let in"
    network = [TestClient(guarded.app, base_url="http://study.example", client=(f"2001:db8::{i:x}", 1)) for i in range(1, MOST_WRONG + 2)]
    assert [visitor.get("/?token=wrong").status_code for visitor in network] == [401] * MOST_WRONG + [429], "an IPv6 network is one visitor"


def test_wrong_tokens_take_little_memory(guarded: TestClient) -> None:
    guarded.get("/")
    (guard,) = [found for found in stack_of(guarded.app) if isinstance(found, security.Guard)]
    for i in range(MOST_ADDRESSES + 50):
        scope = {
            "type": "http",
            "client": (f"198.51.{i // 250}.{i % 250}", 1),
            "method": "GET",
            "path": "/",
            "query_string": b"token=wrong",
        }
        answer = guard._challenge({**scope, "session": "x"}, security.Headers({}), False)
        assert answer and answer.status_code == (401 if i < MOST_ADDRESSES else 429)
    assert len(guard._wrong) == MOST_ADDRESSES


def stack_of(app: Any) -> Iterator[Any]:
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None) or getattr(layer, "_app", None)


@pytest.mark.parametrize("token", [None, "", "short", "x" * 15, "x" * 40, " a blank in front of it", "tab\tabcdefghijklmno", "é" * 20])
def test_other_machines_need_a_token_that_cannot_be_guessed(token: str | None) -> None:
    with pytest.raises(ConfigError, match="OMMATID_TOKEN"):
        check_exposure(Settings(host="0.0.0.0", token=token))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "study.example", "", "127.0.0.1.nip.io", "0", "127.1"])
def test_hosts_that_others_reach(host: str) -> None:
    with pytest.raises(ConfigError, match=r"OMMATID_TOKEN.*secrets"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, token=TOKEN))


def test_settings_do_not_print_the_token() -> None:
    assert TOKEN not in repr(Settings(token=TOKEN))
    check_exposure(Settings(host="0.0.0.0", token="a secret that nobody guesses"))


# What is sent


def test_bodies_are_limited(client: TestClient) -> None:
    token = csrf_of(client)
    assert client.post("/try/form", data={"csrf": token, "text": "x" * 200_000}, headers=OWN).text == "taken 200000"
    for content in (b"csrf=" + b"x" * 300_000, iter([b"csrf=", *[b"x" * 50_000] * 8])):
        response = client.post("/try/form", content=content, headers=OWN | {"content-type": "application/x-www-form-urlencoded"})
        assert response.status_code == 413 and "0.25 MiB" in response.text
        check_headers(response, "a large body")
    lying = OWN | {"content-type": "application/x-www-form-urlencoded", "content-length": "99999999999999999999999"}
    assert client.post("/try/form", content=b"csrf=x", headers=lying).status_code == 413


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (
            "multipart/form-data; boundary=b",
            b"".join(b'--b\r\ncontent-disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(2000)) + b"--b--",
        ),
        (
            "multipart/form-data; boundary=b",
            b"".join(b'--b\r\ncontent-disposition: form-data; name="f"; filename="%d"\r\n\r\nx\r\n' % i for i in range(2000)) + b"--b--",
        ),
        ("application/x-www-form-urlencoded", b"&".join(b"f%d=1" % i for i in range(20_000))),
        ("multipart/form-data; boundary=b", b'--b\r\ncontent-disposition: form-data; name="text"\r\n\r\nwithout end'),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"x"),
        ("application/json", b'{"csrf": "x", "csrf": NaN}'),
        ("application/json", b"[" * 100_000),
        ("text/plain", b"csrf=x"),
        ("image/png", b"\x89PNG"),
        ("", b"csrf=x"),
    ],
    ids=(
        "many parts",
        "many files",
        "many fields",
        "no end",
        "no boundary",
        "long boundary",
        "json",
        "nested json",
        "text",
        "picture",
        "nothing",
    ),
)
def test_bodies_that_are_no_forms(client: TestClient, kind: str, body: bytes) -> None:
    csrf_of(client)
    began = time.process_time()
    response = client.post("/try/form", content=body, headers=OWN | {"content-type": kind})
    assert response.status_code == 400, response.text[-300:]
    check_headers(response, kind)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "charset", ["unicode_escape", "utf-16", "utf-7", "rot13", "latin-1", "utf-8; charset=utf-7", '"utf-7', "UTF-8-SIG"]
)
def test_encodings_that_hide_texts(client: TestClient, charset: str) -> None:
    body = b'--b\r\ncontent-disposition: form-data; name="csrf"\r\n\r\n\\ud800\r\n--b--\r\n'
    response = client.post("/try/form", content=body, headers=OWN | {"content-type": f"multipart/form-data; boundary=b; charset={charset}"})
    assert response.status_code == 415, "unicode_escape makes halves of characters, which no page could be written with"


def test_encodings_that_are_taken(client: TestClient) -> None:
    token = csrf_of(client)
    for kind in ("application/x-www-form-urlencoded; charset=utf-8", "application/x-www-form-urlencoded;charset=UTF-8"):
        assert client.post("/try/form", content=f"csrf={token}", headers=OWN | {"content-type": kind}).status_code == 200


def test_what_people_say_is_stored_and_shown_as_text(hostile: Path, tmp_path: Path) -> None:
    app = make_app(Settings(hostile, str(tmp_path / "data")))
    app.state.explorer.model.close()
    app.state.explorer.model = NoModel()
    with TestClient(app, base_url="http://localhost", follow_redirects=False, raise_server_exceptions=False) as client:
        header = {"x-csrf-token": client.get("/api/review/csrf").json()["csrf"]}
        statuses = []
        for value in (*HOSTILE.values(), '=HYPERLINK("http://evil.example")', "\ud800", "\0", "", "x" * 100_000):
            for who in ("Ada", MARKUP[:60], "=1+1", "\ud800", "a\r\nset-cookie: x=1"):
                for kind in ("name", "comment", "list", "rate", "__class__"):
                    body = {"sae": SAES[0], "latent": 0, "kind": kind, "value": value, "who": who}
                    raw = json.dumps(body).encode()  # which writes halves of characters as JSON can
                    response = client.post("/api/review/event", content=raw, headers=header | {"content-type": "application/json"})
                    statuses.append(response.status_code)
                    assert response.status_code in (201, 400), (body, response.text[-300:])
                    check_headers(response, str(body)[:200])
        assert 10 < statuses.count(201) < len(statuses) / 2
        for raw in (b'{"sae": NaN}', b'{"latent": 1e999}', b"[" * 50_000, b'{"latent": %s}' % (b"9" * 5000), b"\xff", b"null", b""):
            assert client.post("/api/review/event", content=raw, headers=header | {"content-type": "application/json"}).status_code == 400
        for address in ("/review", "/review/log", "/review/lists", "/review/orphans", f"/features/{quote(SAES[0])}/0", "/features", "/"):
            response = client.get(address)
            assert response.status_code == 200 and read(response.text).problems == [], address
        for what in ("state", "history"):
            rows = list(csv.reader(io.StringIO(client.get(f"/review/export.csv?what={what}").text, newline="")))
            assert len(rows) > 1 and not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "@", "\t", "\r")]
        for back in ("//evil.example", "/\\evil.example", "http://evil.example", "javascript:alert(1)", "/review\r\nset-cookie: x=1"):
            form = {"csrf": header["x-csrf-token"], "who": "Ada", "back": back}
            answer = client.post("/review/who", data=form)
            assert answer.status_code == 303 and answer.headers["location"] == "/review" and "x=1" not in str(answer.headers), back


def test_uploads_stay_in_memory(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(security.UPLOADS, "/my-image/try", 32 * 2**20)
    token = csrf_of(client)
    response = client.post("/my-image/try", files={"upload": ("../../x.png", b"x" * 2**22)}, data={"csrf": token}, headers=OWN)
    assert response.text == f"taken {2**22} False", "nothing was rolled over to a file"


# Over real sockets


@dataclass
class Wire:
    """Raw connections to a server."""

    server: ExplorerServer

    def connect(self) -> socket.socket:
        address = urlsplit(self.server.url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=HANG_SECONDS)

    def send(self, text: bytes) -> bytes:
        """Send bytes, and return all that is answered until the server closes."""
        with self.connect() as connection:
            connection.sendall(text)
            return receive(connection)


def receive(connection: socket.socket) -> bytes:
    found = b""
    while chunk := connection.recv(2**16):
        found += chunk
    return found


QUICK = (
    """
import ommatid.explorer.connection as connection, ommatid.explorer.security as security
connection.HEAD_SECONDS, security.BODY_SECONDS, connection.STALLED_SECONDS, connection.LINGER_SECONDS = 3, 2, 2, 1
"""
    + EXPLORER
)
"""Program that serves with less patience."""


@pytest.fixture(scope="module")
def wire(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with serving_explorer(hostile, tmp_path_factory.mktemp("wire") / "log", QUICK) as server:
        yield Wire(server)


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
RAW = [
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ("a request of another protocol", b"EHLO evil.example\r\n\r\n", 400),
    ("no host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("two hosts", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    ("an address of another server", b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 421),
    ("headers of 70 kB", HEAD + b"X: " + b"x" * 70_000, 400),
    ("an address of 70 kB", b"GET /" + b"x" * 70_000, 400),
    ("a header with a line break", HEAD + b"X: a\rSet-Cookie: b\r\n\r\n", 400),
    ("two lengths", b"POST /sql HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
    ("a negative length", b"POST /sql HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    (
        "a websocket",
        HEAD.replace(b"/health", b"/") + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n\r\n",
        200,
    ),
]


@pytest.mark.parametrize(("text", "status"), [case[1:] for case in RAW], ids=[case[0] for case in RAW])
def test_what_is_no_request(wire: Wire, text: bytes, status: int) -> None:
    answer = wire.send(text)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert CSP.encode() in answer and b"101" not in answer[:20]
    assert b"HTTP/1.1 200 OK" in wire.send(HEAD + b"Connection: close\r\n\r\n"), "the next is answered"


def test_a_body_in_pieces_is_limited(wire: Wire) -> None:
    with wire.connect() as connection:
        connection.sendall(
            b"POST /my-image HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
        part = b'--b\r\ncontent-disposition: form-data; name="upload"; filename="x"\r\n\r\n'
        connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        try:
            for _ in range(200):
                connection.sendall(b"80000\r\n" + b"x" * 2**19 + b"\r\n")
            answer = receive(connection)
        except OSError:
            answer = b""  # it was closed while more was sent, which takes the answer along
        assert not answer or b" 413 " in answer[:20], answer[:300]
    assert wire.server.process.memory_info().rss < 600 * 2**20


def test_a_slow_body_ends(wire: Wire) -> None:
    with wire.connect() as connection:
        connection.sendall(
            b"POST /my-image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n"
        )
        began = time.monotonic()
        try:
            for _ in range(int(HANG_SECONDS)):
                connection.sendall(b"x")  # each byte in time, the whole never
                time.sleep(0.3)
                if time.monotonic() - began > 2.5:
                    break
            answer = receive(connection)
        except OSError:
            answer = b" 408 "
        assert b" 408 " in answer[:20] and time.monotonic() - began < HANG_SECONDS


def test_pages_are_answered_beside_200_slow_visitors(wire: Wire) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(wire.connect()) for _ in range(200)]
        for connection in slow:
            connection.sendall(HEAD)  # and never the end
        body = b"POST /try HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Type: text/plain\r\n\r\nx"
        bodies = [stack.enter_context(wire.connect()) for _ in range(100)]
        for connection in bodies:
            connection.sendall(body)
        for path in (b"/features", b"/", b"/features?view=table"):
            answer = wire.send(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        assert [receive(connection) for connection in slow] == [b""] * 200, "each was closed in the end"


def test_a_head_that_trickles_ends(wire: Wire) -> None:
    with wire.connect() as connection:
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        try:
            while time.monotonic() - began < HANG_SECONDS:
                connection.sendall(b"G" if time.monotonic() - began < 0.2 else b"E")
                time.sleep(0.2)
                connection.setblocking(False)
                try:
                    if not connection.recv(1):
                        break
                except BlockingIOError:
                    pass
                connection.setblocking(True)
        except OSError:
            pass
        assert time.monotonic() - began < HANG_SECONDS / 2, "a second request is no way to hold a connection either"


def test_a_reader_that_stalls_is_left(wire: Wire) -> None:
    with wire.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        address = f"/api/sql?rows=10000&q={quote('SELECT repeat($$x$$, 2000) AS x FROM range(10000)')}"
        connection.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        began = time.monotonic()
        while True:
            time.sleep(0.5)
            held = [
                one
                for one in wire.server.process.net_connections("tcp")
                if one.status == "ESTABLISHED" and one.raddr[1] == connection.getsockname()[1]
            ]
            if not held:
                break
            assert time.monotonic() - began < HANG_SECONDS, "the server still waits"


# The command line


def serve_by_cli(file: Path, token: str | None, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMMATID_TOKEN"} | (
        {} if token is None else {"OMMATID_TOKEN": token}
    )
    command = [sys.executable, "-m", "ommatid", "serve", "--catalog", str(file), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("token", [None, "", "too-short"])
def test_serve_refuses_other_machines_without_a_token(hostile: Path, token: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a port that is taken, so that opening it first would be another error
        process = serve_by_cli(hostile, token, "--host", "0.0.0.0", "--port", str(taken.getsockname()[1]))
        said, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0 and "OMMATID_TOKEN" in said and "http://" not in said and "Traceback" not in said


def test_serve_says_how_to_use_the_token(hostile: Path) -> None:
    process = serve_by_cli(hostile, TOKEN, "--host", "0.0.0.0", "--port", "0")
    assert process.stdout
    address = how = ""
    try:
        address, how = process.stdout.readline(), process.stdout.readline()
        port = re.search(r"http://0\.0\.0\.0:(\d+)", address)
        assert port and "?token=" in how and "OMMATID_TOKEN" in how
        with socket.create_connection(("127.0.0.1", int(port[1])), timeout=HANG_SECONDS) as connection:
            connection.sendall(f"GET /?token={TOKEN} HTTP/1.1\r\nHost: study.example\r\nConnection: close\r\n\r\n".encode())
            assert b"303 See Other" in receive(connection)
    finally:
        process.terminate()
        said = address + how + process.communicate(timeout=HANG_SECONDS)[0]
    assert TOKEN not in said, "terminals and logs are read by others"


def test_hostile_texts_are_what_the_table_says() -> None:
    assert len(LONG) == 10_000 and html.escape(MARKUP) != MARKUP and len(HOSTILE) == 5
    assert len(ADDRESSES) + len(RAW) + len(FOREIGN) > 50
