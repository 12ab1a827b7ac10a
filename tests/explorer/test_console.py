"""Proves that the SQL console answers, limits, stops and plots statements, that pages never wait, and that the list of the API is whole."""

import csv
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from ommatid.explorer import console
from ommatid.explorer.app import make_app
from ommatid.explorer.console import EXAMPLES, MOST_CHARACTERS
from ommatid.explorer.web import Settings, link
from support.processes import HANG_SECONDS, wait_for
from support.servers import serving_explorer
from support.small_study import HOSTILE

ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range + b.range = 7"


@pytest.fixture(scope="module")
def client(hostile: Path) -> Iterator[TestClient]:
    with TestClient(make_app(Settings(hostile)), base_url="http://localhost") as opened:
        yield opened


def ask(client: TestClient, q: str, path: str = "/api/sql", **parameters: Any) -> Any:
    return client.get(path, params={"q": q, **parameters})


def test_answers_in_three_forms(client: TestClient) -> None:
    sql = "SELECT 1 AS one, 'a,b' AS text, NULL AS none, [1, 2] AS list ORDER BY one"
    assert ask(client, sql).json() == {
        "columns": ["one", "text", "none", "list"],
        "types": ["INTEGER", "VARCHAR", "INTEGER", "INTEGER[]"],
        "rows": [[1, "a,b", None, [1, 2]]],
        "more": False,
    }
    assert list(csv.reader(io.StringIO(ask(client, sql, "/sql.csv").text))) == [["one", "text", "none", "list"], ["1", "a,b", "", "[1,2]"]]
    page = ask(client, sql, "/sql").text
    assert re.search(r"<bdi>a,b</bdi>.*NULL.*\[1,2\]", page, re.DOTALL)
    assert f">{sql}</textarea>" in page.replace("&#39;", "'").replace(">\n", ">"), "the statement stays in the editor"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("'nan'::DOUBLE", None),
        ("'-inf'::FLOAT", None),
        ("1.50::DECIMAL(9, 2)", "1.50"),
        ("'ab'::BLOB", "YWI="),
        ("MAP {[1]: 2}", {"key": [[1]], "value": [2]}),
        ("170141183460469231731687303715884105727::HUGEINT", 2**127 - 1),
        ("DATE '2026-01-02'", "2026-01-02"),
        ("INTERVAL 3 DAY", "P3D"),
        ("chr(55296)", None),
    ],
)
def test_every_value_becomes_json(client: TestClient, expression: str, value: Any) -> None:
    answer = ask(client, f"SELECT {expression} AS value")
    if expression.startswith("chr"):
        assert answer.status_code == 400, "half of a surrogate pair is no text"
    else:
        assert json.loads(answer.content, parse_constant=pytest.fail)["rows"] == [[value]]
        assert ask(client, f"SELECT {expression} AS value", "/sql").status_code == 200
        assert ask(client, f"SELECT {expression} AS value", "/sql.csv").status_code == 200


def test_examples_run(client: TestClient) -> None:
    page = client.get("/sql").text
    for title, parameters, sql in EXAMPLES:
        assert link("/sql", q=sql, **parameters).replace("&", "&amp;") in page, title
        answer = ask(client, sql, "/sql", **parameters)
        assert answer.status_code == 200 and 'id="answer"' in answer.text, (title, answer.text)
        if "x" in parameters:
            assert 'class="plot"' in answer.text, title


def test_relations_with_comments(client: TestClient) -> None:
    page = client.get("/sql").text
    assert "<code data-insert>label_score</code>" in page and "<code data-insert>probes</code>" in page
    assert "Share of tokens" in page or "share of" in page.lower(), "comments of columns"


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT labl FROM features", "labl"),
        ("DELETE FROM features", "DELETE is refused"),
        ("COPY features TO '/tmp/stolen.csv'", "COPY is refused"),
        ("SELECT * FROM read_text('/etc/passwd')", "disabled|Permission|not allowed"),
        ("SET memory_limit = '99GB'", "SET is refused"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT '<script>alert(1)</script>' + 1", "<script>"),
    ],
)
def test_wrong_statements_are_explained(client: TestClient, sql: str, reason: str) -> None:
    answer = ask(client, sql)
    assert answer.status_code == 400 and re.search(reason, answer.json()["error"])
    page = ask(client, sql, "/sql")
    assert page.status_code == 400 and 'class="problem"' in page.text and "<textarea" in page.text
    assert "<script>alert" not in page.text


@pytest.mark.parametrize(
    "parameters",
    [
        {"rows": 10_001},
        {"rows": 0},
        {"rows": "many"},
        {"timeout": 61},
        {"timeout": 0},
        {"timeout": "nan"},
        {"kind": "pie"},
        {"z": "1"},
        {"q": "x" * (MOST_CHARACTERS + 1)},
    ],
)
def test_limits_of_parameters(client: TestClient, parameters: dict[str, Any]) -> None:
    answer = client.get("/sql", params={"q": "SELECT 1", **parameters})
    assert answer.status_code == 400 and next(iter(parameters)) in answer.text


def test_limits_of_answers(client: TestClient) -> None:
    assert len(ask(client, "FROM range(100)", rows=7).json()["rows"]) == 7 and ask(client, "FROM range(100)", rows=7).json()["more"]
    assert "more than 7 rows, the limit" in ask(client, "FROM range(100)", "/sql", rows=7).text
    page = ask(client, "FROM range(5000)", "/sql", rows=10_000).text
    assert page.count("<tr>") == 1001 and "the table shows the first 1,000" in page
    wide = ask(client, "SELECT " + ", ".join(f"{i} AS c{i}" for i in range(150)), "/sql").text
    assert wide.count("<td") == 100 and "first 100 of 150 columns" in wide
    long = ask(client, "SELECT repeat('x', 100000) AS long", "/sql").text
    assert len(long) < 100_000 and f"{'x' * 500}…" in long
    assert "32MB" in ask(client, "SELECT repeat('x', 40000000)").json()["error"]
    memory = ask(client, "SELECT list(range) FROM range(1000000000)", timeout=60).json()["error"]
    assert "512MB" in memory and "--memory-limit" not in memory


def test_plots(client: TestClient) -> None:
    sql = "SELECT i AS a, CASE i WHEN 3 THEN 'inf'::DOUBLE WHEN 4 THEN NULL ELSE i * i END AS b, 'x' AS c FROM range(10) t(i)"
    page = ask(client, sql, "/sql", x="a", y="b").text
    (dots,) = re.findall(r'<path class="dots" d="([^"]*)"', page)
    assert dots.count("M") == 8 and "8 rows; 2 lack a finite number" in page
    assert re.search(r'<polyline class="curve" points="[\d., ]+"', ask(client, sql, "/sql", x="a", y="b", kind="line").text)
    assert "is no column of numbers" in ask(client, sql, "/sql", x="a", y="c").text
    for values in ("0, 1e-320", "1e299, -1e299", "1e16::DOUBLE, 1e16 + 2", "5, 5", "1e308, -1e308"):
        drawn = ask(client, f"SELECT v, v AS w FROM unnest([{values}]::DOUBLE[]) t(v)", "/sql", x="v", y="w")
        assert drawn.status_code == 200 and "nan" not in drawn.text.partition("<svg")[2], values


def test_links_and_pictures(client: TestClient) -> None:
    page = ask(client, "SELECT image, sae, latent FROM examples LIMIT 3", "/sql").text
    picture = re.search(r'<td class="value"><img src="(/thumbs/[^"]+)"[^>]*> <a href="/images/\d+">', page)
    feature = re.search(r'<a href="(/features/[^"]+)">', page)
    assert picture and feature and client.get(picture[1]).headers["content-type"] == "image/webp"
    assert client.get(feature[1]).status_code == 200
    assert '<img src="data:image/webp;base64,' in ask(client, "SELECT thumbnail FROM images LIMIT 1", "/sql").text
    odd = "SELECT -1 AS image, 2::HUGEINT ** 100 AS latent, 'x' AS sae UNION ALL SELECT 99999999, -5, NULL"
    assert ask(client, odd, "/sql").status_code == 200, "numbers that are no images"


def test_hostile_texts_are_escaped(client: TestClient) -> None:
    for text in HOSTILE.values():
        page = client.get("/sql", params={"q": f"SELECT {quote(text)} AS {name(text)}, 1 AS n, 2 AS m", "x": text[:400], "y": "m"})
        assert page.status_code in (200, 400) and "<script>alert" not in page.text and "onerror='" not in page.text


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def name(text: str) -> str:
    return '"' + text[:200].replace('"', '""') + '"'


def test_a_third_statement_is_told_to_wait(client: TestClient) -> None:
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client, "SELECT sleep_ms(60000)", timeout=3))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: console._PLACES._value == 0, "two statements to run")
    refused = ask(client, "SELECT 1", "/sql")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "5" and "2 other statements are running" in refused.text
    for path in ("/features", "/", "/sql", "/api/features?n=1"):
        assert client.get(path).status_code == 200, "pages do not wait"
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [400, 400]
    assert "stopped after 3 s" in answers[0].text and "raise the time limit" in answers[0].text
    assert ask(client, "SELECT 1").status_code == 200


def test_leaving_stops_the_statement(hostile: Path, tmp_path: Path) -> None:
    with serving_explorer(hostile, tmp_path / "log") as server:
        address = urlsplit(server.url)

        def busy() -> list[Any]:
            return [child for child in server.process.children(recursive=True) if child.nice() == 10 and child.cpu_times().user > 0.5]

        with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
            target = link("/sql", q=ENDLESS, timeout=60)
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            (running,) = wait_for(busy, "the statement to run")
        began = time.monotonic()
        wait_for(lambda: not running.is_running(), "the end of the statement")
        assert time.monotonic() - began < min(30, HANG_SECONDS), "long before its time limit"


def test_the_server_ends_beside_a_statement(hostile: Path, tmp_path: Path) -> None:
    with serving_explorer(hostile, tmp_path / "log") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=HANG_SECONDS) as connection:
            connection.sendall(f"GET {link('/api/sql', q=ENDLESS, timeout=60)} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            wait_for(lambda: [child for child in server.process.children() if child.nice() == 10], "the statement to run")
            began = time.monotonic()
            server.process.terminate()
            assert b" 503 " in connection.recv(2**16)[:20] and time.monotonic() - began < 30
    # that its log has no traceback is checked when the block ends


def test_openapi_page(client: TestClient) -> None:
    page = client.get("/openapi").text
    paths = client.get("/api/openapi.json").json()["paths"]
    assert len(paths) > 4 and all(f"<code>{path}</code>" in page for path in paths)
    tries = re.findall(r'href="([^"]+)">Try it', page)
    assert len(tries) >= 5
    for url in tries:
        assert client.get(url.replace("&amp;", "&")).status_code == 200, url
    assert "Seconds after which the statement is stopped." in page and "at most 60" in page
