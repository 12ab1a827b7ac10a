"""Proves that a kept array has the bits of the first, that nothing else is taken for it, and that a broken cache stops nobody."""

import errno
from pathlib import Path

import numpy as np
import pytest

from ommatid.store import caches, memo
from ommatid.store.memo import remember

MADE = np.array([[0.1, -0.0, np.nan], [1e-42, np.inf, 3.0]], dtype=np.float32)


class Maker:
    """Makes the array, and counts how often."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> np.ndarray:
        self.n += 1
        return MADE


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path))
    return tmp_path / "texts"


def test_what_is_kept_has_the_same_bits_and_can_be_written(folder: Path) -> None:
    make = Maker()
    for _ in range(3):
        found = remember("ommatid.store.memo", ["a", 1], make)
        assert found.tobytes() == MADE.tobytes() and (found.dtype, found.shape) == (MADE.dtype, MADE.shape)
    found[:] = 0
    assert make.n == 1 and len(list(folder.iterdir())) == 1


def test_other_facts_and_other_code_are_computed_anew(folder: Path) -> None:
    make = Maker()
    for n, (module, facts) in enumerate([("ommatid.store.memo", "a"), ("ommatid.store.memo", "b"), ("ommatid.store.code", "a")], 1):
        remember(module, facts, make)
        assert make.n == n


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_computed_again(folder: Path, damage: bytes | None) -> None:
    make = Maker()
    remember("ommatid.store.memo", "a", make)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:] if damage is None else damage)
    assert remember("ommatid.store.memo", "a", make).tobytes() == MADE.tobytes()
    assert make.n == 2 and path.read_bytes() == whole


def test_a_cache_that_cannot_be_used_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_CACHE", "/proc/nowhere")
    make = Maker()
    for n in (1, 2):
        assert remember("ommatid.store.memo", "a", make) is MADE and make.n == n


def test_a_cache_that_can_only_be_read_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    remember("ommatid.store.memo", "a", make)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(memo.os, "utime", refuse)
    assert remember("ommatid.store.memo", "a", make).tobytes() == MADE.tobytes() and make.n == 1


def test_what_is_larger_than_the_cache_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "TEXTS", caches.Cache("texts", "", caches.TEXTS.folder, bound=lambda: MADE.nbytes - 1))
    assert remember("ommatid.store.memo", "a", Maker()) is MADE and not folder.exists()


def test_the_files_used_longest_ago_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 200
    monkeypatch.setattr(memo, "TEXTS", caches.Cache("texts", "", caches.TEXTS.folder, bound=lambda: 3 * size))
    for i in range(10):
        remember("ommatid.store.memo", i, Maker())
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 3 * size
    make = Maker()
    remember("ommatid.store.memo", 9, make)
    assert make.n == 0
