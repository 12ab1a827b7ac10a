"""`ommatid query` prints the answer in each format, quickly: without importing torch, pandas or pyarrow, and without a traceback."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ommatid.cli.query import answer
from ommatid.errors import QueryError
from support.processes import HANG_SECONDS

EVERY_KIND = """
    SELECT latent, label, ms, 'nan'::DOUBLE AS odd, top_classes, {'a': 1} AS s, 'ab'::BLOB AS b, '{"k": [1]}'::JSON AS j,
           1.50::DECIMAL(4, 2) AS d, DATE '2024-02-29' AS t, 1e-9 AS small, is_dead
    FROM features WHERE latent IN (0, 3) ORDER BY latent
"""


def ask(
    file: Path, sql: str, output: str = "table", max_rows: int = 1000, timeout: float = 30.0, memory: int | None = None, tty: bool = False
) -> str:
    stream = io.StringIO()
    stream.isatty = lambda: tty
    answer(sql, file, output, max_rows, timeout, stream, memory)
    return stream.getvalue()


def test_table_is_aligned_and_readable(file: Path) -> None:
    assert ask(file, "SELECT latent, label, ms, density, top_classes FROM features ORDER BY latent") == (
        "latent  label      ms  density  top_classes\n"
        "──────  ─────  ──────  ───────  ────────────\n"
        "     0  cat    0.8000   0.4000  [cat, truck]\n"
        "     1  truck  0.6000   0.2000  [truck]\n"
        "     2  NULL     NULL   0.1000  [ship]\n"
        "     3  NULL     NULL   0.0000  []\n"
    )


def test_table_shows_sizes_escapes_and_small_numbers(file: Path) -> None:
    found = ask(file, "SELECT thumbnail, chr(27) || '[31m' || chr(10) AS steer, 1e-9 AS small, '猫' AS wide, 1 AS n FROM images LIMIT 1")
    row = found.splitlines()[2]
    assert "bytes>" in row and "\\x1b[31m\\n" in row and "1.000e-09" in row
    assert row.endswith("猫    1")


def test_table_without_rows_has_its_header(file: Path) -> None:
    assert ask(file, "SELECT latent FROM features WHERE false").splitlines() == ["latent", "──────", "(no rows)"]


def test_table_fits_a_terminal(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    answer("SELECT latent, repeat('word ', 50) AS text, repeat('猫', 50) AS cats FROM features", file, "table", 10, 30, stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert "…" in lines[2]


def test_csv_reads_back(file: Path) -> None:
    (row, dead) = csv.DictReader(io.StringIO(ask(file, EVERY_KIND, "csv")))
    assert (row["label"], row["ms"], row["top_classes"], row["b"]) == ("cat", "0.8", '["cat", "truck"]', "YWI=")
    assert (dead["label"], dead["ms"], dead["top_classes"]) == ("", "", "[]")


def test_json_is_valid_and_typed(file: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row, dead = json.loads(ask(file, EVERY_KIND, "json"), parse_constant=refuse)
    assert row == {
        "latent": 0, "label": "cat", "ms": 0.8, "odd": None, "top_classes": ["cat", "truck"], "s": {"a": 1}, "b": "YWI=",
        "j": {"k": [1]}, "d": 1.5, "t": "2024-02-29", "small": 1e-9, "is_dead": False,
    }  # fmt: skip
    assert (dead["label"], dead["is_dead"]) == (None, True)


def test_json_keeps_columns_of_one_name(file: Path) -> None:
    assert json.loads(ask(file, "SELECT 1 AS a, 2 AS a, 3 AS a", "json")) == [{"a": 1, "a_2": 2, "a_3": 3}]
    assert json.loads(ask(file, "SELECT 1 AS a WHERE false", "json")) == []


STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\x00\x08\x7f\r\u202e\u2066\u200b\u2028\U000e0041"
"""OSC, CSI in both forms, NUL, backspace, delete, carriage return, reversed reading directions, invisible characters."""
STEERS = {c for c in STEERING if not c.isprintable()}


@pytest.mark.parametrize("output", ["table", "csv", "json"])
def test_no_value_can_control_a_terminal(file: Path, output: str) -> None:
    chars = " || ".join(f"chr({ord(c)})" for c in STEERING)
    sql = f"SELECT {chars} AS t, [{chars}] AS l, {{'k': {chars}}} AS s, map([{chars}], [1]) AS m, 1 AS \"{STEERING.replace(chr(0), '')}\""
    found = ask(file, sql, output, tty=True)
    assert not set(found) & STEERS
    if output == "json":
        assert json.loads(found)[0]["t"] == STEERING
    if output == "csv":
        assert "\\x1b]0;title\\x07" in found


def test_json_and_csv_written_elsewhere_than_to_a_terminal_are_not_escaped(file: Path) -> None:
    chars = " || ".join(f"chr({ord(c)})" for c in STEERING)
    assert json.loads(ask(file, f"SELECT {chars} AS t", "json")) == [{"t": STEERING}]
    assert next(csv.reader(io.StringIO(ask(file, f"SELECT 1, {chars.replace('chr(0) || ', '')} AS t", "csv"), newline="")))[0] == "1"
    assert "\x1b[2J" in ask(file, f"SELECT {chars} AS t", "csv")
    assert not set(ask(file, f"SELECT {chars} AS t")) & STEERS


def test_letters_and_emoji_are_not_escaped(file: Path) -> None:
    text = "Grüße 猫 \U0001f469\u200d\U0001f52c می‌خواهم a\u00a0b"
    for output in ("table", "csv", "json"):
        assert text in ask(file, f"SELECT '{text}' AS t", output, tty=True)


@pytest.mark.parametrize("output", ["table", "csv", "json"])
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT repeat('1', 5000)::JSON AS j",
        "SELECT '1e999'::JSON AS j",
        "SELECT (repeat('[', 900) || repeat(']', 900))::JSON AS j",
        "SELECT " + "[" * 200 + "]" * 200 + " AS l",
        "SELECT 'infinity'::DATE AS d, '-infinity'::TIMESTAMP AS t, 170141183460469231731687303715884105727 AS h, 1e308 * 10 AS i",
        "FROM test_all_types()",
    ],
)  # fmt: skip
def test_odd_values_are_printed(file: Path, output: str, sql: str) -> None:
    try:
        assert ask(file, sql, output)
    except QueryError as error:
        assert output == "json" and "repeat('['" in sql and "nested too deeply to be printed; unnest them in SQL" in str(error)


@pytest.mark.parametrize("output", ["table", "csv", "json"])
def test_the_row_limit_is_reported_on_stderr_only(file: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    found = ask(file, "SELECT latent FROM features ORDER BY latent", output, max_rows=2)
    assert "2" not in found
    assert capsys.readouterr().err == "… 2 rows shown, more exist; raise --max-rows\n"
    ask(file, "SELECT latent FROM features", output, max_rows=4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "xml"}, "--format 'xml': expected table, csv, json"),
        ({"max_rows": 0}, "--max-rows 0: expected 1 or more"),
        ({"timeout": 0.0}, "--timeout 0: expected seconds, more than 0"),
        ({"max_rows": 1000001}, "--max-rows 1000001: expected 1000000 or fewer; Catalog.arrow in Python"),
        ({"timeout": float("nan")}, "--timeout nan: expected seconds, more than 0"),
        ({"timeout": -1.0}, "--timeout -1: expected seconds, more than 0 and 86400 at most"),
        ({"timeout": float("inf")}, "--timeout inf: expected seconds, more than 0 and 86400 at most"),
        ({"memory": 31}, "--memory-limit 31: expected MB, 32 to the [0-9]+ of this machine"),
        ({"memory": 10**9}, "--memory-limit 1000000000: expected MB, 32 to the [0-9]+ of this machine"),
    ],
)
def test_wrong_options_name_what_is_allowed(file: Path, options: dict, message: str) -> None:
    with pytest.raises(QueryError, match=message.replace("(", r"\(")):
        ask(file, "SELECT 1", **options)


# ---- the process


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"{before}\nimport sys\nfrom ommatid.cli import main\nmain()"
    return subprocess.run([sys.executable, "-W", "error", "-c", script, *arguments], capture_output=True, text=True, check=False)


def test_query_imports_neither_torch_nor_pandas_nor_pyarrow(file: Path) -> None:
    report = "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = run("query", "SELECT label FROM features ORDER BY latent", "--catalog", str(file), "--format", "csv", before=report)
    assert (done.returncode, done.stdout) == (0, "label\ncat\ntruck\n\"\"\n\"\"\n")  # fmt: skip
    heavy = {"torch", "transformers", "pandas", "pyarrow", "numpy", "matplotlib", "PIL", "mlflow", "prefect", "great_expectations"}
    assert heavy & set(done.stderr.split()) == set()


def test_a_wrong_query_gives_one_message_and_status_1(file: Path, tmp_path: Path) -> None:
    done = run("query", "FROM featurs", "--catalog", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no relation 'featurs'; did you mean features?")
    missing = run("query", "SELECT 1", "--catalog", str(tmp_path / "none.duckdb"))
    assert missing.returncode == 1 and "make demo" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.parametrize("n", [3, 100000])
def test_a_closed_pipe_is_not_an_error(file: Path, n: int) -> None:
    command = [sys.executable, "-c", "from ommatid.cli import main; main()", "query", f"FROM range({n})", "--max-rows", "1000000"]
    with subprocess.Popen([*command, "--catalog", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_the_whole_package_needs_no_torch() -> None:
    script = "import sys, ommatid.catalog.stage, ommatid.show.pictures; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_process_whose_standard_streams_are_closed_answers(file: Path, closed: str) -> None:
    ended = in_shell(f"$QUERY {closed}", file)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("7" in ended.stdout) == (closed in ("<&-", "2>&-"))


def test_a_process_that_may_open_few_files_says_so(file: Path) -> None:
    ended = in_shell("ulimit -n 9; $QUERY", file)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "Too many open files" in ended.stderr


def in_shell(command: str, file: Path) -> "subprocess.CompletedProcess[str]":
    """Run a line of shell in which $QUERY queries the catalogue for 7."""
    query = f"'{sys.executable}' -m ommatid query --catalog '{file}' 'SELECT 7'"
    return subprocess.run(["sh", "-c", command.replace("$QUERY", query)], capture_output=True, text=True, timeout=HANG_SECONDS)
