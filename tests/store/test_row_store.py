"""Proves that rows are found again by their keys, whoever wrote them, that damage is noticed, and that space is bounded."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ommatid.store import row_store
from ommatid.store.row_store import RowStore, Space, as_keys

WIDTH = 24


def keys_of(numbers: list[int]) -> np.ndarray:
    return as_keys([f"{number % 3:064x}"[:-16] + f"{number:016x}" for number in numbers])


def rows_of(numbers: list[int]) -> np.ndarray:
    return np.array([np.random.default_rng(number).integers(0, 256, WIDTH) for number in numbers], np.uint8).reshape(-1, WIDTH)


def put(store: RowStore, numbers: list[int]) -> None:
    store.write([keys_of(numbers)], [rows_of(numbers)])


def read(store: RowStore, numbers: list[int]) -> tuple[list[bool], np.ndarray]:
    out = np.zeros((len(numbers), WIDTH), np.uint8)
    return store.read(keys_of(numbers), out).tolist(), out


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.rows"))


@given(st.lists(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12), max_size=6), st.lists(st.integers(0, 40), max_size=20))
@settings(max_examples=60, deadline=None)
def test_rows_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, written: list[list[int]], asked: list[int]) -> None:
    folder = tmp_path_factory.mktemp("store") / "rows"
    for numbers in written:
        put(RowStore(folder, WIDTH), numbers)
    store, there = RowStore(folder, WIDTH), {number for numbers in written for number in numbers}
    assert store.has(keys_of(asked)).tolist() == [number in there for number in asked]
    found, rows = read(store, asked)
    assert found == [number in there for number in asked]
    assert (rows == np.where(np.array(found).reshape(-1, 1), rows_of(asked), 0)).all()


def test_a_store_sees_what_others_wrote_only_when_it_looks(tmp_path: Path) -> None:
    store, other = RowStore(tmp_path, WIDTH), RowStore(tmp_path, WIDTH)
    put(other, [1, 2])
    assert not store.has(keys_of([1])).any()
    store.refresh()
    assert read(store, [2, 1])[0] == [True, True]


@pytest.mark.parametrize("place", ["magic", "key", "sum", "row", "end"])
def test_a_damaged_segment_is_removed_and_the_others_still_serve(tmp_path: Path, place: str) -> None:
    put(RowStore(tmp_path, WIDTH), [1, 2, 3])
    (damaged,) = segments(tmp_path)
    put(RowStore(tmp_path, WIDTH), [4])
    data = bytearray(damaged.read_bytes())
    header = 32
    position = {"magic": 3, "key": header + 32 + 5, "sum": header + 3 * 32 + 5, "row": len(data) - WIDTH - 1, "end": -1}[place]
    damaged.write_bytes(data[:-1]) if place == "end" else data.__setitem__(position, data[position] ^ 4)
    if place != "end":
        damaged.write_bytes(data)
    said: list[str] = []
    store = RowStore(tmp_path, WIDTH, said.append)
    found, rows = read(store, [1, 2, 3, 4])
    assert found == ([True, False, True, True] if place == "row" else [False, False, False, True])
    assert (rows[found] == rows_of([1, 2, 3, 4])[found]).all()
    assert not damaged.exists()
    assert len(said) == 1 and said[0].startswith(f"{damaged}: damaged (") and said[0].endswith("what it held is computed again")
    store.refresh()
    assert read(store, [1, 2, 3, 4])[0] == found  # rows that are whole were written anew


def test_a_segment_that_cannot_be_read_now_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(RowStore(tmp_path, WIDTH), [1])
    said: list[str] = []
    store = RowStore(tmp_path, WIDTH, said.append)
    (file,) = segments(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(row_store, "_iter_rows", fail)
        assert read(store, [1])[0] == [False]
        patch.setattr(row_store, "_read_header", fail)
        RowStore(tmp_path, WIDTH, said.append)
    assert [line.partition(": ")[2] for line in said] == [
        "cannot be read ([Errno 24] Too many open files); what it holds is computed again"
    ] * 2
    assert file.exists() and read(RowStore(tmp_path, WIDTH), [1])[0] == [True]


def test_a_segment_that_another_process_removed_is_no_error(tmp_path: Path) -> None:
    put(RowStore(tmp_path, WIDTH), [1])
    put(RowStore(tmp_path, WIDTH), [2])
    said: list[str] = []
    store = RowStore(tmp_path, WIDTH, said.append)
    segments(tmp_path)[0].unlink()
    assert read(store, [1, 2])[0] == [False, True]
    assert said == []


def test_unfinished_files_and_rows_of_another_width_are_not_read(tmp_path: Path) -> None:
    put(RowStore(tmp_path, WIDTH), [1])
    (file,) = segments(tmp_path)
    file.rename(tmp_path / "1-1.rows.77-ab.tmp")
    store = RowStore(tmp_path, WIDTH)
    assert not store.has(keys_of([1])).any()
    (tmp_path / "1-1.rows.77-ab.tmp").rename(file)
    other = RowStore(tmp_path, WIDTH + 1)
    assert not other.has(keys_of([1])).any()


def test_many_small_segments_become_one_without_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "MANY", 5)
    for i in range(6):
        put(RowStore(tmp_path, WIDTH), [i, i + 1])
    reader = RowStore(tmp_path, WIDTH)
    store = RowStore(tmp_path, WIDTH)
    store.merge()
    assert len(segments(tmp_path)) == 1
    assert segments(tmp_path)[0].stat().st_size == 32 + 7 * (32 + 4 + WIDTH) + 4
    found, rows = read(store, list(range(7)))
    assert all(found) and (rows == rows_of(list(range(7)))).all()
    assert not any(read(reader, list(range(7)))[0])  # it looks again before its next shard
    reader.refresh()
    assert all(read(reader, list(range(7)))[0])


def test_a_merge_keeps_rows_whose_other_copy_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has merged two segments into a third, and removes the two after this one has seen all three."""
    monkeypatch.setattr(row_store, "MANY", 3)
    put(RowStore(tmp_path, WIDTH), [0, 1])
    put(RowStore(tmp_path, WIDTH), [1, 2])
    old = segments(tmp_path)
    store = RowStore(tmp_path, WIDTH)
    put(RowStore(tmp_path, WIDTH), [0, 1, 2])
    store.refresh()
    for segment in old:
        segment.unlink()
    monkeypatch.setattr(store, "refresh", lambda: None)
    store.merge()
    found, rows = read(RowStore(tmp_path, WIDTH), [0, 1, 2])
    assert all(found) and (rows == rows_of([0, 1, 2])).all()


def test_many_may_write_and_merge_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "MANY", 4)

    def work(start: int) -> None:
        store = RowStore(tmp_path, WIDTH)
        for i in range(start, start + 10):
            put(store, [i, i + 5])
            store.merge()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0, 3, 50, 53)))
    store = RowStore(tmp_path, WIDTH)
    numbers = [*range(18), *range(50, 68)]
    found, rows = read(store, numbers)
    assert all(found) and (rows == rows_of(numbers)).all()


def test_space_is_made_by_removing_what_was_not_used_for_longest_but_not_what_is_in_use(tmp_path: Path) -> None:
    now, files = time.time(), []
    for i, age in enumerate((500, 400, 300, -1)):
        put(RowStore(tmp_path / "network" / "tokens", WIDTH), [i])
        (new,) = set(segments(tmp_path / "network" / "tokens")) - set(files)
        os.utime(new, (now - age, now - age))
        files.append(new)
    store = RowStore(tmp_path / "network" / "tokens", WIDTH)
    assert store.has(keys_of([0])).all()  # used again, so that the second is now the oldest
    size = files[0].stat().st_size
    assert Space(tmp_path, 4 * size, now - 1).admit(size)
    assert [file.exists() for file in files] == [True, False, True, True]
    assert not Space(tmp_path, 2 * size, now - 1).admit(size)
    assert [file.exists() for file in files] == [True, False, False, True]  # those of this run stay


def test_the_disk_is_not_filled_and_many_writers_keep_to_the_bound_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10_000]
    monkeypatch.setattr(row_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    reserving = Space(tmp_path / "gone", 10**6, time.time(), reserve=9_000)
    assert reserving.admit(1_000) and not reserving.admit(1_001)
    free[0] = 9_000
    assert not reserving.admit(1)

    monkeypatch.setattr(row_store, "AT_ONCE", 1)
    free[0] = 10**6
    many = [Space(tmp_path, 50_000, time.time()) for _ in range(3)]

    def write(space: Space) -> bool:
        is_admitted = space.admit(1_000)
        if is_admitted:
            (tmp_path / f"{len(segments(tmp_path))}.rows").write_bytes(bytes(1_000))
        return is_admitted

    while any([write(space) for space in many]):
        pass
    assert len(segments(tmp_path)) == 50
