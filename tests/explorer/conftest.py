"""Fixtures of tests of pages: a small study, visitors without a browser, and a real browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import pytest
from starlette.testclient import TestClient

from ommatid.catalog.reader import Catalog
from ommatid.explorer.app import make_app
from ommatid.explorer.web import Settings
from support.browser import RunningBrowser, Windows, find_chromium, opening, running
from support.servers import ExplorerServer, serving_explorer
from support.small_study import HOSTILE, NAMES, Study, make_once

ServeExplorer = Callable[..., ExplorerServer]
"""Serves a study until the test ends; takes fields of the explorer's settings by name."""


@pytest.fixture(scope="session")
def browser() -> Iterator[RunningBrowser]:
    """A browser, which all tests of this process share."""
    with running(find_chromium()) as run:
        yield run


@pytest.fixture
def windows(browser: RunningBrowser, serve_explorer: ServeExplorer) -> Iterator[Windows]:
    """Windows of the browser, closed before the test's servers are; a fault of a page fails the test that opened it."""
    with opening(browser) as opened:
        yield opened


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A small study with hostile texts, made once for all processes of the run; tests only read it."""
    folder = tmp_path_factory.getbasetemp()
    return make_once((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "study")


@pytest.fixture
def own_study(study: Study, tmp_path: Path) -> Study:
    """A copy of the study, which a test may change."""
    return study.copy(tmp_path / "study")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a tiny catalogue in which every free text is hostile; made in a second, for tests that need no images of their own."""
    from support.hostile import make

    return make(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="session")
def explorer(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an explorer of the study that all tests of this process share, without a slash at its end; it takes no reviews."""
    log = tmp_path_factory.mktemp("explorer") / "log"
    with serving_explorer(study.catalog, log, data=str(study.data), is_read_only=True) as server:
        yield server.url


@pytest.fixture
def serve_explorer(tmp_path: Path) -> Iterator[ServeExplorer]:
    """A function that serves a study with settings of the test's own, as often as the test likes."""
    with ExitStack() as running_servers:

        def serve(study: Study, **settings: object) -> ExplorerServer:
            log = tmp_path / f"explorer-{len(list(tmp_path.glob('explorer-*')))}.log"
            return running_servers.enter_context(serving_explorer(study.catalog, log, **{"data": str(study.data), **settings}))

        yield serve


@pytest.fixture(scope="session")
def catalogue(study: Study) -> Path:
    """File of the study's catalogue."""
    return study.catalog


Visit = Callable[..., TestClient]
"""Makes a client of the pages of a catalogue; takes the file and fields of the explorer's settings by name."""


@pytest.fixture(scope="session")
def visit() -> Iterator[Visit]:
    """A function that opens the pages of a catalogue without a server."""
    with ExitStack() as opened:

        def open_pages(path: Path, **settings: Any) -> TestClient:
            return opened.enter_context(TestClient(make_app(Settings(catalog=path, **settings)), base_url="http://127.0.0.1"))

        yield open_pages


@pytest.fixture(scope="session")
def client(visit: Visit, study: Study) -> TestClient:
    """A visitor of the study's pages; the model is loaded when a test first asks for it."""
    return visit(study.catalog, data=str(study.data))


@pytest.fixture(scope="session")
def catalog(catalogue: Path) -> Iterator[Catalog]:
    """The study's catalogue, open."""
    with Catalog(catalogue) as opened:
        yield opened


@pytest.fixture(scope="session")
def published(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue as it is published: of the champion before, only the row of `runs` and the matches are left."""
    path = tmp_path_factory.mktemp("published") / "catalog.duckdb"
    shutil.copy(catalogue, path)
    wide, narrow = NAMES
    with duckdb.connect(path) as connection:
        names = dict(connection.execute("SELECT name, sae FROM runs").fetchall())
        columns = connection.execute("SELECT table_name FROM duckdb_columns() WHERE column_name = 'sae'").fetchall()
        for relation in {relation for (relation,) in columns} - {"runs", "matches", "stability"}:
            connection.execute(f"DELETE FROM {relation} WHERE sae = ?", [names[narrow]])
        decide = "UPDATE runs SET decision = 'champion', decided_at = ?, reason = ?, prefect_flow_run_id = 'flow 1' WHERE name = ?"
        connection.execute(decide, ["2026-11-01 10:00", HOSTILE["markup"], narrow])
        connection.execute(decide, ["2026-11-20 10:00", "+0.033 is above +0.013", wide])
    return path
