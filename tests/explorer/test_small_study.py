"""Proves that the study of the browser's tests has what pages show and is as hostile as it is meant to be, and that its server ends."""

import urllib.request
from pathlib import Path

import psutil
import pytest

from ommatid.catalog.reader import Catalog
from support.servers import serving_explorer
from support.small_study import FILE_NAMES, HOSTILE, NAMES, Study, make_once

SERVER = """
import http.server, sys
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(f"explorer  http://127.0.0.1:{server.server_port}  (Ctrl-C ends it)", flush=True)
server.serve_forever()
"""


def test_every_relation_has_rows(study: Study) -> None:
    with Catalog(study.catalog) as catalog:
        counts = {name: catalog.ask(f"SELECT count(*) FROM {name}").rows[0][0] for (name,) in catalog.ask("SHOW TABLES").rows}
        assert len(counts) > 10 and [name for name, n in counts.items() if not n] == ["audit_images"], counts  # no pair is suspicious
        saes = catalog.ask("SELECT sae, count(*) AS n, count(ms) AS ms, count(label) AS labelled FROM features GROUP BY ALL").dicts()
    assert sorted(row["sae"].rpartition("-")[0] for row in saes) == sorted(NAMES)
    assert all(row["n"] > row["ms"] > row["n"] / 2 and row["labelled"] > row["n"] / 2 for row in saes), saes


def test_every_text_is_hostile(study: Study) -> None:
    assert max(map(len, HOSTILE.values())) == 10_000
    with Catalog(study.catalog) as catalog:
        for column, relation in (("label", "images"), ("unnest(captions)", "images"), ("label", "labels")):
            texts = {text for (text,) in catalog.ask(f"SELECT DISTINCT {column} FROM {relation}").rows}
            assert set(HOSTILE.values()) <= texts, f"{relation}.{column} lacks some"
        assert {f"{name}.png" for name in FILE_NAMES} <= {path for (path,) in catalog.ask("SELECT path FROM images").rows}
        (probed,) = catalog.ask("SELECT count(DISTINCT class) FROM probes").rows[0]
        best = [label for (label,) in catalog.ask("SELECT DISTINCT label FROM features").rows if label]
    assert probed == len(HOSTILE) + 1, "every class has enough images"
    assert all(any(mark in label for label in best) for mark in ("<b>", "\u202e")) and max(map(len, best)) > 9_000, "as names, too"


def test_made_once(study: Study) -> None:
    before = study.catalog.stat()
    assert make_once(study.root) == study
    assert study.catalog.stat().st_ino == before.st_ino


def test_server_ends(study: Study, tmp_path: Path) -> None:
    with serving_explorer(study.catalog, tmp_path / "log", SERVER) as server:
        with urllib.request.urlopen(f"{server.url}/") as page:
            assert page.status == 200
        assert server.process.is_running()
    assert not psutil.pid_exists(server.process.pid)


def test_server_faults(study: Study, tmp_path: Path) -> None:
    missing = serving_explorer(study.catalog, tmp_path / "log", "import no_such_module")
    with pytest.raises(AssertionError, match=r"(?s)the explorer ended with 1:.*no_such_module"), missing:
        pass
    raising = serving_explorer(study.catalog, tmp_path / "log", f"print('Traceback (most recent call last)'){SERVER}")
    with pytest.raises(AssertionError, match="the explorer raised an error"), raising as server:
        urllib.request.urlopen(server.url).close()
