"""What has changed of a stage's sources since its last run: why DVC runs it again."""

import configparser
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ommatid.sources.stage import CODE, PLACE

SHOWN = 5
"""Number of changes that a sentence names; it counts the rest."""


def explain_changes(root: Path = Path()) -> dict[str, str]:
    """Say what has changed in the files of `data/sources` since each stage was last run.

    dvc.lock has the checksum of the file that a stage's last run depended on, and DVC's cache keeps that file. A stage that was never
    run is left out. Changed artefacts and params are no business of `sources`, and `dvc status` names them.

    Args:
        root: The checkout, which needs neither dvc.lock nor a cache.

    Returns:
        For each stage whose file has changed, a list of what did in one line, such as `vlm/lite.py, images.source.path`.
    """
    found: dict[str, str] = {}
    for stage, last in _last_seen(root).items():
        file = root / PLACE / f"{stage}.json"
        if not file.is_file() or hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() == last:
            continue
        before = _cached(root, last)
        changes = list(_changes(before, json.loads(file.read_text(encoding="utf-8")))) if before is not None else []
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        found[stage] = ", ".join(changes[:SHOWN]) + more if changes else "its code, or files that its params name"
    return found


def _last_seen(root: Path) -> dict[str, str]:
    """Return the md5 of the file in data/sources that each stage's last run depended on."""
    try:
        lock = yaml.load((root / "dvc.lock").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        deps = {stage: entry.get("deps", ()) for stage, entry in lock["stages"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}  # DVC itself reports a damaged dvc.lock
    return {stage: dep["md5"] for stage, of in deps.items() for dep in of if dep.get("path") == f"{PLACE}/{stage}.json" and "md5" in dep}


def dvc_cache(root: Path) -> Path:
    """Return the folder of a checkout's DVC cache, read from its configuration without DVC, which takes longer."""
    config = configparser.ConfigParser(interpolation=None)
    folder = root / ".dvc"
    with suppress(OSError, ValueError, configparser.Error):  # DVC itself reports a damaged configuration
        config.read([folder / "config", folder / "config.local"], encoding="utf-8")
    return folder / config.get("cache", "dir", fallback="cache").strip('"')


def _cached(root: Path, md5: str) -> dict[str, Any] | None:
    """Return the contents of a file in DVC's cache; None if this machine does not have it."""
    try:
        return json.loads((dvc_cache(root) / "files/md5" / md5[:2] / md5[2:]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over what differs: modules and data files of the code, and keys of the params."""
    if CODE not in before:
        yield "its code, which was not recorded before"
    else:
        yield from _differing(before[CODE], after[CODE])
    yield from _differing(*({key: value for key, value in of.items() if key != CODE} for of in (before, after)))


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield key if key in before and key in after else f"{key} ({'new' if key in after else 'no longer used'})"
