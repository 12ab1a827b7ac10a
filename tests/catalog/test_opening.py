"""A catalogue that cannot be opened says why, with a message for each cause, and what to do."""

import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from ommatid.catalog.database import open_file
from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError


def checksum(data: bytes) -> int:
    """Return DuckDB's checksum of a block."""
    found = 5381
    for (word,) in struct.iter_unpack("<Q", data):
        found ^= word * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    return found


def of_version(path: Path, version: int) -> None:
    """Change the file's header to name another version of DuckDB."""
    content = bytearray(path.read_bytes())
    assert content[8:12] == b"DUCK" and struct.unpack("<Q", content[:8])[0] == checksum(bytes(content[8:4096]))
    content[12:20] = struct.pack("<Q", version)
    content[:8] = struct.pack("<Q", checksum(bytes(content[8:4096])))
    path.write_bytes(content)


def sqlite(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE features (x)")
    connection.close()


def other(path: Path) -> None:
    path.unlink()
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE birds AS SELECT 1 AS x")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.duckdb")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CAUSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"does not exist; build it with `dvc repro` \(or `make demo`\)"),
    "broken link": (link, r"links to gone\.duckdb, which does not exist; build it with"),
    "folder": (folder, r"a folder; name the file in it, such as --catalog .*it's\.duckdb/catalog\.duckdb"),
    "pipe": (pipe, r"not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), r"empty, as it was not completely written or copied"),
    "text": (lambda path: path.write_text("words " * 5000), r"not a catalogue, as it is not a DuckDB database"),
    "short text": (lambda path: path.write_text("word"), r"not a catalogue, as it is not a DuckDB database|cut short"),
    "sqlite": (sqlite, r"not a catalogue, as it is not a DuckDB database"),
    "other database": (other, r"a DuckDB database, but not a catalogue: it has neither a relation features nor runs"),
    "cut in its header": (lambda path: os.truncate(path, 5000), r"cut short, as it was not completely written or copied"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), r"cut short|damaged"),
    "header changed": (lambda path: flip(path, 100), r"damaged \(.*checksum"),
    "newer DuckDB": (lambda path: of_version(path, 9999), r"written by another version of DuckDB \(.*9999"),
    "older DuckDB": (lambda path: of_version(path, 1), r"written by another version of DuckDB \(.*version number 1\b"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_its_own_message(file: Path, tmp_path: Path, cause: str) -> None:
    path = tmp_path / "it's.duckdb"
    shutil.copy(file, path)
    spoil, words = CAUSES[cause]
    spoil(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QueryError, match=rf"(?s)^{path}: ({words})") as said:
        Catalog(path)
    assert "\n" not in str(said.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_writer_is_named(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "held.duckdb"
    shutil.copy(file, path)
    script = f"import duckdb, sys; held = duckdb.connect({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout and writer.stdin and writer.stdout.readline() == "held\n"
        with pytest.raises(
            QueryError, match=rf"another program has it open for writing \(.*python.*, process {writer.pid}\); close it there"
        ):
            Catalog(path)
        writer.stdin.close()
    with Catalog(path) as catalog:
        assert catalog.rows("SELECT count(*) FROM features") == [(4,)]


def test_a_file_that_may_not_be_read_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ommatid.catalog.database.os.open", refuse)  # root may read all
    with pytest.raises(QueryError, match="no permission to read it; `ls -l` shows its owner"):
        open_file(file)


def test_damage_found_by_a_query_is_named(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.duckdb"
    content = bytearray(file.read_bytes())
    for at in range(3 * 4096 + 20_000, len(content), 50_000):
        content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(QueryError, match=r"damaged"), Catalog(path) as catalog:
        for relation in catalog.relations():
            catalog.rows(f"FROM {relation}")


def test_a_catalogue_replaced_while_it_is_open_stays_as_it_was(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.duckdb"
    shutil.copy(file, path)
    with Catalog(path) as before:
        with duckdb.connect(str(path.with_name("n.duckdb"))) as connection:
            connection.execute("CREATE TABLE features AS SELECT 1 AS x")
        os.replace(path.with_name("n.duckdb"), path)
        with pytest.raises(QueryError):
            before.rows("SELECT sleep_ms(100000)", timeout=0.1)  # its process is killed: the next one opens the same file
        assert before.rows("SELECT count(*) FROM features") == [(4,)]
        with Catalog(path) as after:
            assert after.rows("SELECT count(*) FROM features") == [(1,)]
