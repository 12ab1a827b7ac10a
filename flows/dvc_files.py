"""Files that DVC writes in place, so that a killed process may leave them half-written. Imports no Prefect."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from flows.commands import Say
from ommatid.compute.commands import git
from ommatid.errors import RunError
from ommatid.sources.changes import dvc_cache
from ommatid.store.filesystem import temporary_path

LOCK = "dvc.lock"
_BACKUP = Path(".dvc/tmp/ommatid.lock")
_RWLOCK = Path(".dvc/tmp/rwlock")
_ABANDONED_SECONDS = 5.0
"""Age of an empty folder in DVC's cache of runs after which nobody is about to write into it."""
_SETTLE_SECONDS = 1.0
"""Seconds after which a file that is still not valid was not just being written."""


@contextmanager
def keeping_lock(root: Path) -> Iterator[str]:
    """Keep a copy of dvc.lock while DVC may write it, in case DVC is ended meanwhile; `mend` uses it if this process is killed.

    Yields:
        The text of dvc.lock; empty if there is none.
    """
    backup = root / _BACKUP
    if (root / LOCK).exists():
        backup.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(backup)
        shutil.copyfile(root / LOCK, temporary)
        os.replace(temporary, backup)
    try:
        yield backup.read_text(encoding="utf-8") if backup.exists() else ""
    finally:
        _mend_lock(root)


def mend(root: Path, say: Say) -> None:
    """Restore what killed processes left half-written. The caller knows that no other run works in this folder.

    A dvc.lock that is damaged, or lacks a stage that it had when the killed process began, is replaced by the copy from then. The stage
    that was just recorded is taken from DVC's cache of runs when it is run again.
    """
    if _mend_lock(root):
        say(f"{LOCK} was left half-written by a run that was killed; the version from before is restored")
    for folder in (dvc_cache(root) / "runs").glob("*/*"):
        with suppress(OSError):  # not empty, as nearly all are
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                folder.rmdir()  # DVC was killed before it wrote a run into it, and fails on an empty one
    rwlock = root / _RWLOCK
    if (left := _broken(rwlock)) is not None:
        time.sleep(_SETTLE_SECONDS)  # a DVC command of the user's own may be writing it
        if _broken(rwlock) == left:
            rwlock.unlink(missing_ok=True)


def _mend_lock(root: Path) -> bool:
    backup = root / _BACKUP
    kept, found = read_stages(backup), read_stages(root / LOCK)
    is_damaged = kept is not None and (found is None or bool(kept.keys() - found.keys()))
    if is_damaged:
        os.replace(backup, root / LOCK)
    backup.unlink(missing_ok=True)
    return is_damaged


def copy_lock(source: Path, target: Path) -> None:
    """Copy a checkout's dvc.lock, as it was before the stage that a run there may be recording now; do nothing if there is none."""
    for _ in range(100):
        with suppress(FileNotFoundError):
            lock = next(path for path in (source / _BACKUP, source / LOCK, None) if path is None or path.exists())
            if lock is None:
                return
            text = lock.read_bytes()
            if _stages(text) is not None:
                (target / LOCK).write_bytes(text)
                return
        time.sleep(0.1)
    raise RunError(f"{source / LOCK}: not valid YAML; restore it with `git checkout {LOCK}`")


def take_back(root: Path, stage: str, before: str, since: float) -> None:
    """Make DVC forget that it has just run a stage.

    Args:
        root: The checkout.
        stage: Name of the stage.
        before: Text of the dvc.lock whose entry for the stage is restored; the entry is removed if there is none.
        since: Time at which DVC began; runs of the stage's command that its cache has recorded since then are removed, as it looks
            there before it runs a stage.
    """
    text = (root / LOCK).read_text(encoding="utf-8")
    kept, recorded = _block(before, stage), _block(text, stage)
    temporary = temporary_path(root / LOCK)
    temporary.write_text(text.replace(recorded, kept), encoding="utf-8")
    os.replace(temporary, root / LOCK)
    command = next(re.finditer("^    cmd: .*$", recorded, re.MULTILINE))[0].strip()
    for run in (dvc_cache(root) / "runs").glob("*/*/*"):
        with suppress(OSError):
            if run.stat().st_mtime >= since - 1 and command in run.read_text(encoding="utf-8").splitlines():
                run.unlink()
                run.parent.rmdir()  # DVC fails on an empty one


def _block(text: str, stage: str) -> str:
    """Return the lines of a stage in the text of a dvc.lock, which DVC writes with a fixed indentation."""
    found = re.search(rf"^  {re.escape(stage)}:\n(?:    .*\n)*", text, re.MULTILINE)
    return found[0] if found else ""


def committed_lock(root: Path) -> str:
    """Return the text of the dvc.lock in the branch's last commit; empty if it has none."""
    with suppress(RunError):
        return git(root, "show", f"HEAD:./{LOCK}") + "\n"
    return ""


def read_stages(lock: Path) -> dict[str, Any] | None:
    """Read the entries of a dvc.lock by stage; None if it is missing or damaged."""
    try:
        return _stages(lock.read_bytes())
    except OSError:
        return None


def _stages(text: bytes) -> dict[str, Any] | None:
    try:
        stages = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return stages if isinstance(stages, dict) and all(isinstance(entry, dict) for entry in stages.values()) else None


def _broken(path: Path) -> bytes | None:
    """Return the bytes of a file that is not valid JSON; None if it is, or if there is no such file."""
    try:
        text = path.read_bytes()
    except OSError:
        return None
    try:
        json.loads(text)
    except ValueError:
        return text
    return None
