"""Proves that a user is told which modules and which files made a stage stale, and only since the stage was last run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ommatid.sources.changes import explain_changes
from ommatid.sources.stage import PLACE

BEFORE = {"code": {"vlm/lite.py": "a", "vlm/hub.py": "a", "schemas.py": "a"}, "extract.model.path": {"sha256": "a"}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PLACE.mkdir(parents=True)
    Path(".dvc").mkdir()


def write(sources: dict[str, Any]) -> bytes:
    text = json.dumps(sources, indent=1, sort_keys=True).encode() + b"\n"
    (PLACE / "extract.json").write_bytes(text)
    return text


def run(sources: dict[str, Any], cache: Path = Path(".dvc/cache")) -> None:
    """Leave what DVC leaves when the stage has run with these sources."""
    text = write(sources)
    md5 = hashlib.md5(text).hexdigest()
    kept = cache / "files/md5" / md5[:2] / md5[2:]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(text)
    deps = [{"path": "data/images", "md5": "0.dir"}, {"path": f"{PLACE}/extract.json", "hash": "md5", "md5": md5}]
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"extract": {"cmd": "ommatid extract", "deps": deps}}}))


def test_what_differs_from_the_last_run_is_named() -> None:
    run(BEFORE)
    assert explain_changes() == {}
    code = {"vlm/lite.py": "b", "vlm/hub.py": "a", "vlm/clip.py": "a"}
    write({"code": code, "extract.model.path": {"sha256": "b"}})
    expected = "schemas.py (no longer used), vlm/clip.py (new), vlm/lite.py, extract.model.path"
    assert explain_changes() == {"extract": expected} == explain_changes()  # as long as the stage has not run
    write(BEFORE)
    assert explain_changes() == {}


def test_the_cache_may_lie_elsewhere() -> None:
    Path(".dvc/config").write_text('[core]\n    autostage = false\n[cache]\n    type = "reflink,copy"\n')
    Path(".dvc/config.local").write_text("['remote \"store\"']\n    url = s3://%bucket\n[cache]\n    dir = ../shared\n")
    run(BEFORE, Path("shared"))
    write(BEFORE | {"code": {}})
    assert explain_changes()["extract"].startswith("schemas.py (no longer used), ")


def test_many_changes_are_counted() -> None:
    run({"code": {f"m{i}.py": "a" for i in range(9)}})
    write({"code": {f"m{i}.py": "b" for i in range(9)}})
    assert explain_changes() == {"extract": "m0.py, m1.py, m2.py, m3.py, m4.py and 4 more"}


def test_a_lock_from_before_digests_of_code_and_a_missing_cache_are_said() -> None:
    run({"extract.model.path": {"sha256": "a"}})
    write(BEFORE)
    assert explain_changes() == {"extract": "its code, which was not recorded before"}
    for file in Path(".dvc/cache").rglob("*"):
        if file.is_file():
            file.unlink()
    assert explain_changes() == {"extract": "its code, or files that its params name"}


@pytest.mark.parametrize("lock", [None, "", "stages: [", "stages: {extract: 3}", "stages: {extract: {cmd: x}}", "[]"])
def test_without_a_run_there_is_nothing_to_explain(lock: str | None) -> None:
    write(BEFORE)
    if lock is not None:
        Path("dvc.lock").write_text(lock)
    assert explain_changes() == {}
