"""A Catalog only reads: it returns rows, Arrow and pandas, changes nothing, and its errors say what to do."""

import multiprocessing
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import psutil
import pytest

from ommatid.catalog.reader import Catalog, Stop, Stopped
from ommatid.errors import QueryError
from support.processes import HANG_SECONDS

ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range + b.range = 7"


def test_rows_arrow_and_pandas_agree(catalog: Catalog) -> None:
    sql, values = "SELECT latent, ms FROM features WHERE latent <= $most ORDER BY latent", {"most": 1}
    assert catalog.rows(sql, values) == [(0, 0.8), (1, 0.6)]
    assert catalog.ask(sql, values).dicts() == [{"latent": 0, "ms": 0.8}, {"latent": 1, "ms": 0.6}]
    assert catalog.arrow(sql, values).to_pydict() == {"latent": [0, 1], "ms": [0.8, 0.6]}
    assert catalog.pandas(sql, values).to_dict("list") == {"latent": [0, 1], "ms": [0.8, 0.6]}


def test_values_are_parameters_not_sql(catalog: Catalog) -> None:
    assert catalog.rows("SELECT count(*) FROM features WHERE label = ?", ["cat' OR true --"]) == [(0,)]


@pytest.mark.parametrize(
    "value", [None, True, 2**70, 1.5, "猫\0", b"\xff", [[1], [2, 3]], {"a": [1]}, Decimal("1.20"), UUID(int=7), datetime(2026, 1, 2)]
)
def test_values_survive_the_round_trip_through_sql(catalog: Catalog, value: Any) -> None:
    assert catalog.rows("SELECT ?", [value]) == [(value,)]
    assert catalog.rows("SELECT ?", [datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2)))]) == [
        (datetime(2026, 1, 1, 22, tzinfo=UTC),)
    ]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float32(1), "numpy.float32"),
        (np.float64(1), "numpy.float64"),
        ([np.arange(2)], "numpy.ndarray"),
        ({1}, "builtins.set"),
        (Path("x"), "pathlib.PosixPath"),
        (len, "builtins.builtin_function_or_method"),
        (datetime(2026, 1, 2, tzinfo=ZoneInfo("UTC")), "zoneinfo.ZoneInfo"),
    ],
)  # fmt: skip
def test_a_value_that_sql_cannot_take_is_named_and_the_next_statement_is_answered(catalog: Catalog, value: Any, kind: str) -> None:
    with pytest.raises(QueryError, match=f"a parameter is or holds a {kind}: expected"):
        catalog.rows("SELECT ?", [value])
    assert catalog.rows("SELECT 1") == [(1,)]


def test_text_that_is_not_unicode_is_named(catalog: Catalog) -> None:
    for sql, parameters in (("SELECT '\udcff'", None), ("SELECT ?", ["\ud800"])):
        with pytest.raises(QueryError, match=r"ud.* is not Unicode: "):
            catalog.rows(sql, parameters)


def test_a_forked_process_queries_and_closes_on_its_own(file: Path) -> None:
    def ask(catalog: Catalog, answers: Any) -> None:
        answers.send([catalog.rows("SELECT ?", [i]) for i in range(9)])
        catalog.close()

    fork = multiprocessing.get_context("fork")
    with Catalog(file, at_once=1) as catalog:
        forks = []
        for _ in range(2):
            ours, theirs = fork.Pipe()
            # while this process asks: the fork holds a copy of the one permit that is lent
            answer = catalog._answer("ask", "FROM range(1000)", None, None, timeout=None)
            next(answer)
            process = fork.Process(target=ask, args=(catalog, theirs))
            process.start()
            list(answer)
            forks.append((process, ours))
        assert [catalog.rows("SELECT ?", [i]) for i in range(9)] == [[(i,)] for i in range(9)]
        for process, ours in forks:
            assert ours.poll(HANG_SECONDS) and ours.recv() == [[(i,)] for i in range(9)]
            process.join(HANG_SECONDS)
            assert process.exitcode == 0
        assert catalog.rows("SELECT 1") == [(1,)]


def test_rows_are_capped_and_the_result_says_that_there_are_more(catalog: Catalog) -> None:
    found = catalog.ask("FROM range(1000000000)", max_rows=3)
    assert ([value for (value,) in found.rows], found.more) == ([0, 1, 2], True)
    assert not catalog.ask("FROM range(3)", max_rows=3).more


@pytest.mark.parametrize(
    "sql",
    [
        "DESCRIBE features", "SHOW TABLES", "SUMMARIZE features", "FROM features", "VALUES (1)", "TABLE images",
        "WITH x AS (SELECT 1) FROM x", "SELECT 1;", "-- a note\nSELECT 1 -- another", "SELECT 'query(' AS \"query\"",
        "PIVOT firings ON latent IN (0, 1) USING count(*) GROUP BY sae", "SELECT '猫' AS \"猫\"",
    ],
)  # fmt: skip
def test_reading_statements_are_answered(catalog: Catalog, sql: str) -> None:
    assert catalog.rows(sql)


REFUSED = {
    "": "expected one statement, found 0",
    "-- nothing": "expected one statement, found 0",
    "SELECT 1; SELECT 2": "expected one statement, found 2",
    "SELECT 1; DROP TABLE features": "expected one statement, found 2",
    "DROP TABLE features": "DROP is refused",
    "DELETE FROM features": "DELETE is refused",
    "UPDATE features SET label = 'x'": "UPDATE is refused",
    "INSERT INTO features SELECT * FROM features": "INSERT is refused",
    "CREATE TABLE x AS SELECT 1": "CREATE is refused",
    "CREATE TEMP VIEW features AS SELECT 1": "CREATE is refused",
    "CREATE TABLE memory.x AS SELECT 1": "CREATE is refused",
    "COPY features TO 'x.csv'": "COPY is refused",
    "EXPORT DATABASE 'x'": "EXPORT is refused",
    "ATTACH 'x.duckdb'": "ATTACH is refused",
    "DETACH catalogue": "DETACH is refused",
    "USE memory": "SET is refused",
    "SET enable_external_access = true": "SET is refused",
    "RESET lock_configuration": "SET is refused",
    "SET VARIABLE x = 1": "SET is refused",
    "PRAGMA enable_verification": "PRAGMA is refused",
    "/* x */ pragma database_list": "PRAGMA is refused",
    "INSTALL httpfs": "LOAD is refused",
    "LOAD httpfs": "LOAD is refused",
    "CALL enable_logging(storage = 'file', storage_path = 'logs')": "enable_logging() is refused",
    "FROM enable_logging(storage = 'file', storage_path = 'logs')": "enable_logging() is refused",
    'FROM system.main."Enable_Logging" /* x */ ()': "enable_logging() is refused",
    "FROM query('FROM enable_' || 'logging()')": "query() is refused",
    "FROM query--\n('SELECT 1')": "query() is refused",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))": "json_execute_serialized_sql() is refused",
    "PREPARE x AS SELECT 1": "PREPARE is refused",
    "EXPLAIN ANALYZE CREATE TEMP TABLE features AS SELECT 1": "EXPLAIN is refused",
    "BEGIN": "TRANSACTION is refused",
    "CHECKPOINT": "CALL is refused",
    "VACUUM": "VACUUM is refused",
    "PIVOT features ON label USING count(*)": "PIVOT must name its values",
    "FROM read_csv('{outside}')": "file system operations are disabled",
    "FROM read_text('{outside}')": "file system operations are disabled",
    "FROM read_blob('{outside}')": "file system operations are disabled",
    "FROM glob('/*')": "file system operations are disabled",
    "FROM read_duckdb('{outside}')": "file system operations are disabled",
    "FROM '{outside}'": "file system operations are disabled",
    "FROM duckdb_secrets()": "file system operations are disabled",
    "FROM sqlite_scan('x', 'y')": "sqlite_scan",
    "SELECT getenv('HOME')": "getenv does not exist",
    "FROM outside": "no relation 'outside'",
}


@pytest.mark.parametrize("sql", REFUSED)
def test_statements_that_could_escape_are_refused(catalog: Catalog, sql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside.csv"
    outside.write_text("secret\n42\n")
    with pytest.raises(QueryError) as refused:
        catalog.rows(sql.replace("{outside}", str(outside)))
    assert REFUSED[sql] in str(refused.value)
    assert "42" not in str(refused.value).replace(str(tmp_path), "")
    assert [path.name for path in tmp_path.iterdir()] == ["outside.csv"]
    assert catalog.rows("SELECT count(*) FROM features") == [(4,)]


def test_python_variables_are_out_of_reach(catalog: Catalog) -> None:
    secret = catalog.arrow("SELECT 42 AS x")
    assert secret.num_rows == 1
    with pytest.raises(QueryError, match="no relation 'secret'"):
        catalog.rows("FROM secret")


def test_an_endless_query_is_stopped_and_the_next_is_answered(catalog: Catalog) -> None:
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"stopped after 0\.3 s; make the query narrower, or raise --timeout"):
        catalog.rows(ENDLESS, timeout=0.3)
    assert time.monotonic() - began < HANG_SECONDS
    assert catalog.rows("SELECT 1", timeout=HANG_SECONDS) == [(1,)]


def test_a_statement_is_stopped_by_another_thread(catalog: Catalog) -> None:
    stop = Stop()
    threading.Timer(0.2, stop).start()
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped, as was asked"):
        catalog.ask(ENDLESS, timeout=HANG_SECONDS, stop=stop)
    assert 0.1 < time.monotonic() - began < HANG_SECONDS / 2
    with pytest.raises(Stopped, match="before it ran"):
        catalog.ask("SELECT 1", stop=stop)
    later = Stop()
    assert catalog.ask("SELECT 1", stop=later).rows == [(1,)]
    later()
    assert catalog.rows("SELECT 2", timeout=HANG_SECONDS) == [(2,)], "a late stop reaches no later statement"


def test_processes_can_give_way(file: Path) -> None:
    with Catalog(file, niceness=7) as catalog:
        assert catalog.rows("SELECT sum(range) FROM range(10)") == [(45,)]
        (process,) = [child for child in psutil.Process().children() if child.nice() == 7]
        threads = [
            int(Path(f"/proc/{process.pid}/task/{thread.id}/stat").read_text().rpartition(")")[2].split()[16])
            for thread in process.threads()
        ]
        assert set(threads) == {7}, "those of DuckDB, too"


def test_a_timer_does_not_outlive_its_query(catalog: Catalog) -> None:
    assert catalog.rows("SELECT 1", timeout=2.0) == [(1,)]
    assert catalog.rows("SELECT sleep_ms(2200)", timeout=HANG_SECONDS) == [(None,)]


def test_wrong_sql_is_explained(catalog: Catalog) -> None:
    with pytest.raises(
        QueryError, match=r"no relation 'featurs'; did you mean features\? the catalogue has attributions, audit, .*class_latents, .*runs"
    ):
        catalog.rows("SELECT * FROM featurs")
    with pytest.raises(QueryError, match=r'(?s)column "labl" not found.*label'):
        catalog.rows("SELECT labl FROM features")
    with pytest.raises(QueryError, match='syntax error at or near "SELEC"'):
        catalog.rows("SELEC 1")
    with pytest.raises(QueryError, match="unterminated"):
        catalog.rows("SELECT 'x")


def test_a_query_too_large_for_memory_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ommatid.catalog.reader.READER_MB", 256)
    with Catalog(file) as catalog, pytest.raises(QueryError, match="needs more than 256MB of memory; aggregate or filter more"):
        catalog.rows("SELECT list(range) FROM range(100000000)")


def test_a_path_with_a_quote_opens(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "it's here.duckdb"
    copy.write_bytes(file.read_bytes())
    with Catalog(copy) as catalog:
        assert catalog.rows("SELECT count(*) FROM features") == [(4,)]


def test_several_questions_are_answered_at_once_each_with_its_own_values(catalog: Catalog) -> None:
    questions = [
        ("SELECT 1 AS one, [1, 2] AS two", None),
        ("SELECT $x AS x UNION ALL SELECT $x", {"x": "a"}),
        ("SELECT 1 WHERE false", None),
    ]
    first, second, third = catalog.ask_all(questions)
    assert first.dicts() == [{"one": 1, "two": [1, 2]}] and second.rows == [("a",), ("a",)] and third.rows == [] and len(third.columns) == 1
    with pytest.raises(QueryError, match="no relation 'nothing'"):
        catalog.ask_all([("SELECT 1", None), ("SELECT * FROM nothing", None)])
    with pytest.raises(QueryError, match="INSERT is refused"):
        catalog.ask_all([("INSERT INTO features DEFAULT VALUES", None)])
    assert catalog.ask_all([("SELECT 2", None)])[0].rows == [(2,)], "an error leaves the catalogue usable"


def test_the_answers_to_several_questions_are_limited_together(file: Path) -> None:
    with Catalog(file, answer_mb=1) as opened, pytest.raises(QueryError, match="its answer takes more than 1MB"):
        opened.ask_all([("SELECT repeat('x', 400000) AS x", None)] * 4)


def test_a_process_that_retains_more_than_it_may_is_replaced(file: Path) -> None:
    def pids(catalog: Catalog) -> set[int]:
        catalog.rows("SELECT max(x) FROM (SELECT unnest(range(200000)) AS x)")
        return {child.pid for child in catalog._idle}

    with Catalog(file, retained_mb=0) as opened:
        assert opened.rows("SELECT 1") == [(1,)] and not pids(opened)
    with Catalog(file, retained_mb=4096) as opened:
        assert pids(opened) == pids(opened) and len(pids(opened)) == 1
