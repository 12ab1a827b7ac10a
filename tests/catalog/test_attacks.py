"""No SQL statement can harm the process that holds a Catalog: statements end within their limits and touch nothing else."""

import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import duckdb
import psutil
import pytest

from ommatid.catalog import sandbox_client as child_module
from ommatid.catalog.reader import Catalog
from ommatid.catalog.sandbox import REFUSED, SLACK_MB
from ommatid.catalog.sandbox_client import AnswerUnpickler, Child
from ommatid.errors import QueryError
from support import attacks
from support.processes import HANG_SECONDS, wait_for, wait_for_end

SECRET = "c4n4ry"
MEMORY_MB = 256
OWN_MB = 128
"""Memory of a process before its first statement, in MB, most of it the files of Python and DuckDB; no limit counts it."""
TIMEOUT = 0.2


@dataclass
class World:
    """What statements could reach: a secret file in a folder, a server, and the processes that run them."""

    folder: Path
    url: str
    calls: list[object] = field(default_factory=list)
    """Number of connections to the server."""
    peaks: list[int] = field(default_factory=list)
    """Peak memory of each process that was still alive, in MB."""

    def try_all(self, file: Path, statements: Sequence[str]) -> list[str | QueryError]:
        """Run statements two at a time and return their outcomes; one that neither answers nor fails in time fails the test."""
        with Catalog(file, MEMORY_MB, at_once=2) as catalog, ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda sql: self._try(catalog, sql), statements))
            assert catalog.rows("SELECT count(*) FROM features") == [(4,)]
        assert [path.name for path in self.folder.iterdir()] == ["secret.csv"]
        assert (self.folder / "secret.csv").read_text() == f"a\n{SECRET}\n"
        assert self.calls == []
        assert not [text for text in found if SECRET in str(text)]
        assert max(self.peaks) < MEMORY_MB + SLACK_MB + OWN_MB
        return found

    def _try(self, catalog: Catalog, sql: str) -> str | QueryError:
        sql = attacks.fill(sql, str(self.folder / "secret.csv"), str(self.folder), self.url)
        began = time.monotonic()
        try:
            return str(catalog.ask(sql, max_rows=100, timeout=TIMEOUT).rows)[:10_000]
        except QueryError as error:
            return error
        finally:
            assert time.monotonic() - began < HANG_SECONDS, sql[:200]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "secret.csv").write_text(f"a\n{SECRET}\n")
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        found = World(folder, f"http://127.0.0.1:{server.getsockname()[1]}")
        patch.setenv("CANARY", SECRET)
        patch.chdir(folder)
        patch.setattr(Child, "end", noting_peak(Child.end, found.peaks))
        threading.Thread(target=listen, args=(server, found.calls), daemon=True).start()
        yield found


def noting_peak(end: Callable[[Child], None], peaks: list[int]) -> Callable[[Child], None]:
    def noted(child: Child) -> None:
        status = Path(f"/proc/{child.pid}/status")
        if status.exists() and "VmHWM" in (text := status.read_text()):
            peaks.append(int(text.split("VmHWM:")[1].split()[0]) // 1024)
        end(child)

    return noted


def listen(server: socket.socket, calls: list[object]) -> None:
    while True:
        try:
            calls.append(server.accept()[1])
        except OSError:
            return


@pytest.mark.parametrize("kind", ["READ", "REACH", "WRITE", "SETTINGS", "SHAPE"])
def test_statements_that_could_escape_are_refused(world: World, file: Path, kind: str) -> None:
    statements = getattr(attacks, kind)
    found = world.try_all(file, statements)
    answered = [(sql[:100], text) for sql, text in zip(statements, found, strict=True) if not isinstance(text, QueryError)]
    assert answered == []


@pytest.mark.parametrize("kind", ["LOOK", "SLOW", "LARGE"])
def test_statements_that_run_end_within_their_limits(world: World, file: Path, kind: str) -> None:
    found = world.try_all(file, getattr(attacks, kind))
    assert all("Traceback" not in str(text) for text in found)
    if kind == "SLOW":
        assert sum("stopped after 0.2 s" in str(text) for text in found) > len(found) / 2


def test_every_table_function_only_reads_or_is_refused() -> None:
    with duckdb.connect() as connection:
        names = {
            name for (name,) in connection.execute("SELECT function_name FROM duckdb_functions() WHERE function_type = 'table'").fetchall()
        }
    reads = {
        name for name in names if name.startswith(("duckdb_", "pragma_", "read_", "parquet_", "icu_", "json_each", "json_tree", "pg_"))
    }
    reads |= {
        "generate_series",
        "glob",
        "query_table",
        "range",
        "repeat",
        "repeat_row",
        "seq_scan",
        "sniff_csv",
        "summary",
        "test_all_types",
    }
    reads |= {"test_vector_types", "unnest", "which_secret"}
    assert names - reads <= REFUSED


# ---- the process


def test_a_crash_is_an_error_and_the_next_statement_is_answered(catalog: Catalog) -> None:
    with pytest.raises(QueryError, match=r"the process that ran it died \(SIG\w+\): DuckDB cannot run this statement, or not within"):
        catalog.rows("SELECT json_structure(" + attacks.nested(100_000) + ")", timeout=HANG_SECONDS)
    assert catalog.rows("SELECT 1") == [(1,)]


@pytest.mark.parametrize(
    "sql", ["SELECT len(range(1000000000))", "SELECT repeat('x', 1000000000)", "SELECT list(range) FROM range(100000000)"]
)
def test_a_statement_over_its_memory_limit_fails_and_the_next_is_answered(file: Path, sql: str) -> None:
    with Catalog(file, memory_mb=100) as catalog:
        with pytest.raises(QueryError, match=r"(needs more than|not within) 100MB of memory"):
            catalog.rows(sql, timeout=HANG_SECONDS)
        assert catalog.rows("SELECT 1") == [(1,)]


def test_a_process_that_does_not_free_memory_is_replaced(file: Path) -> None:
    with Catalog(file, memory_mb=200) as catalog:
        (first,) = {child.pid for child in catalog._idle}

        def is_replaced() -> bool:
            """Query, and return whether the process was replaced: on a busy machine, DuckDB may free memory before it is measured."""
            catalog.rows("SELECT count(DISTINCT range) FROM range(2000000)", timeout=HANG_SECONDS)
            return first not in {child.pid for child in catalog._idle}

        wait_for(is_replaced, "another process")
        assert catalog.rows("SELECT 1") == [(1,)]


def test_an_answer_over_the_callers_memory_limit_is_refused(file: Path) -> None:
    with Catalog(file, answer_mb=2) as catalog:
        assert len(catalog.rows("FROM range(10000)")) == 10_000
        for sql in ("FROM range(100000)", "SELECT repeat('x', 3000000)", "SELECT list_transform(range(60000), x -> []::INT[])"):
            with pytest.raises(QueryError, match="its answer takes more than 2MB"):
                catalog.rows(sql)
        with pytest.raises(QueryError, match="its answer takes more than 2MB"):
            catalog.arrow("FROM range(1000000)")
        assert catalog.arrow("FROM range(100000)").num_rows == 100_000


def test_a_statement_that_is_too_long_is_refused(catalog: Catalog) -> None:
    with pytest.raises(QueryError, match="the statement has 2,000,007 characters: expected 1,048,576 or fewer"):
        catalog.rows("SELECT " + "x" * 2_000_000)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_limits_out_of_bounds_are_named(catalog: Catalog, timeout: float) -> None:
    with pytest.raises(QueryError, match=r"a timeout of .*: expected seconds, more than 0 and 86400 at most, or None"):
        catalog.rows("SELECT 1", timeout=timeout)
    with pytest.raises(QueryError, match="at most -1 rows: expected 0 or more, or None"):
        catalog.rows("SELECT 1", max_rows=-1)
    assert (catalog.ask("SELECT 1", max_rows=0).rows, catalog.ask("SELECT 1", max_rows=0).more) == ([], True)


def test_no_other_file_can_be_opened_once_the_catalogue_is_open(file: Path) -> None:
    """The kernel's limits hold whatever DuckDB allows."""
    with Catalog(file) as catalog:
        (child,) = catalog._idle
        limits = {line[:26].strip(): line[26:].split()[:2] for line in Path(f"/proc/{child.pid}/limits").read_text().splitlines()}
        assert (limits["Max open files"][0], limits["Max file size"][0], limits["Max core file size"][0]) == ("0", "0", "0")
        assert int(limits["Max data size"][0]) < 2 * catalog.memory_mb * 2**20
        held = {os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()}
        assert {Path(path).name for path in held if path.startswith("/") and path != os.devnull} == {"catalog.duckdb", "statm"}
        environment = dict(line.split("=", 1) for line in Path(f"/proc/{child.pid}/environ").read_text().split("\0") if line)
        assert environment.keys() <= {"ARROW_DEFAULT_MEMORY_POOL", "TZ", "LD_LIBRARY_PATH"}


@pytest.mark.parametrize("sql", ["SELECT 1", "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))"], ids=["idle", "busy"])
def test_the_process_ends_with_its_parent(file: Path, sql: str) -> None:
    script = (
        "import os, sys, threading, time\nfrom pathlib import Path\nfrom ommatid.catalog.reader import Catalog\n"
        f"catalog = Catalog(Path({str(file)!r}))\n(child,) = catalog._idle\nprint(child.pid, flush=True)\n"
        f"threading.Thread(target=catalog.rows, args=({sql!r},), daemon=True).start()\ntime.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    with suppress(psutil.NoSuchProcess):
        wait_for_end([psutil.Process(child)], "the process that answers")


def test_only_values_are_unpickled() -> None:
    values = [None, True, 2**100, 1.5, "x", b"x", [1, (2,)], {"a": 1}, Decimal("1.5"), UUID(int=1), date(2024, 2, 29), timedelta(1)]
    assert AnswerUnpickler(io.BytesIO(pickle.dumps(values))).load() == values
    for evil in (os.system, Path("x"), subprocess.run, QueryError("x")):
        with pytest.raises(QueryError, match="which no answer can"):
            AnswerUnpickler(io.BytesIO(pickle.dumps(evil))).load()


AS_ON_MACOS = """
from pathlib import Path
from ommatid.catalog import sandbox_client
from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError
sandbox_client.WORKER, file = Path("worker.py").absolute(), Path(%r)
with Catalog(file, memory_mb=100) as catalog:
    try:
        catalog.rows("SELECT len(repeat('x', 400000000)) + len(repeat('y', 400000000)), sleep_ms(2000)", timeout=%d)
    except QueryError as error:
        print(error)
    print(catalog.rows("SELECT 1"))
"""


def test_where_the_kernel_has_no_limit_the_process_ends_itself(file: Path, tmp_path: Path) -> None:
    """The worker believes that this is not Linux. It runs in a small process, because on Linux the peak of memory is inherited."""
    (tmp_path / "worker.py").write_text(
        child_module.WORKER.read_text()
        .replace('IS_LINUX = sys.platform == "linux"', "IS_LINUX = False")
        .replace("// 2**20\n        return int(os.p", "// 2**10\n        return int(os.p")
    )
    command = [sys.executable, "-c", AS_ON_MACOS % (str(file), HANG_SECONDS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "not within 100MB of memory" in done.stdout
    assert done.stdout.endswith("[(1,)]\n")


# ---- several at a time


def test_concurrent_threads_get_their_own_answers(file: Path) -> None:
    with Catalog(file, at_once=2) as catalog, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: catalog.rows("SELECT ?, count(*) FROM features", [i], timeout=HANG_SECONDS), range(100)))
        assert found == [[(i, 4)] for i in range(100)]
        assert len(catalog._idle) <= 2


def test_waiting_too_long_for_a_process_is_an_error(file: Path) -> None:
    with Catalog(file, at_once=1) as catalog, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(catalog.rows, "SELECT sleep_ms(3000)", timeout=HANG_SECONDS)
        wait_for(lambda: not catalog._idle, "the question to be asked")
        with pytest.raises(QueryError, match=r"other statements were running for 0\.2 s; try again, or raise --timeout"):
            catalog.rows("SELECT 1", timeout=0.2)
        assert len(slow.result()) == 1
        assert catalog.rows("SELECT 1", timeout=HANG_SECONDS) == [(1,)]


def test_a_closed_catalogue_says_so(file: Path) -> None:
    with Catalog(file) as catalog:
        pass
    with pytest.raises(QueryError, match="this Catalog has been closed"):
        catalog.rows("SELECT 1")


def test_each_statement_has_its_own_time_limit(catalog: Catalog) -> None:
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"stopped after 0\.3 s"):
        catalog.rows("SELECT sleep_ms(100000)", timeout=0.3)
    assert 0.3 <= time.monotonic() - began < HANG_SECONDS
    assert catalog.rows("SELECT sleep_ms(400)", timeout=HANG_SECONDS) == [(None,)]
