"""Proves that a stage that DVC runs publishes nothing if the branch or its params change under it, and loses nothing either."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ommatid.cli import stage as verbs
from ommatid.config import Params, load_params
from ommatid.errors import RunError
from ommatid.events import Event
from ommatid.pipeline.checkout import read_checkout
from ommatid.pipeline.run import run_stage
from support.study import make_test_params
from support.tiles import write_tile_folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on the branch main, in which DVC runs a stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "images")
    write_tile_folder(tmp_path / "photos", 40)
    params = make_test_params(images={"source": {"kind": "folder", "path": "photos"}, "limit": None})
    Path("params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    git("init", "-q", "-b", "main")


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True)


def switch() -> None:
    git("symbolic-ref", "HEAD", "refs/heads/topic")


def set_value(section: str, key: str, value: object) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values[section][key] = value
    Path("params.yaml").write_text(yaml.safe_dump(values))


def run(change: Callable[[], object], params: Params | None = None) -> int:
    """Run the stage `images` with a change at its first event; return the number of events."""
    events: list[Event] = []

    def hear(event: Event) -> None:
        if not events:
            change()
        events.append(event)

    run_stage("images", params or load_params(), hear)
    return len(events)


@pytest.mark.parametrize(
    ("change", "undo", "said"),
    [
        (switch, lambda: git("symbolic-ref", "HEAD", "refs/heads/main"), "branch main -> topic"),
        (lambda: set_value("images", "thumbnail", 64), lambda: set_value("images", "thumbnail", 96), "images.thumbnail 96 -> 64"),
        (lambda: Path("params.yaml").rename("away"), lambda: Path("away").rename("params.yaml"), "params.yaml cannot be read"),
    ],
)
def test_nothing_is_published_until_the_checkout_is_put_back(change: Callable[[], None], undo: Callable[[], None], said: str) -> None:
    set_value("images", "thumbnail", 96)
    params = load_params()
    with pytest.raises(
        RunError, match=rf"^images: the checkout changed while the stage ran: {said}; nothing is published .*git switch main"
    ):
        run(change)
    assert not Path("data/images").exists()
    undo()
    read = (Path("data/.work")).rglob("part-*.parquet")
    before = {path: path.stat().st_mtime_ns for path in read}
    run_stage("images", params, lambda event: None)
    published = list(Path("data/images").rglob("part-*.parquet"))
    assert sorted(path.stat().st_mtime_ns for path in published) == sorted(before.values())  # the draft, and not another run


def test_an_edit_between_reading_the_params_and_the_stage_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_and_edit(*arguments: Any) -> Params:
        params = load_params(*arguments)
        set_value("images", "thumbnail", 64)
        return params

    set_value("images", "thumbnail", 96)
    monkeypatch.setattr(verbs, "load_params", load_and_edit)
    with pytest.raises(RunError, match=r"the checkout changed while the stage ran: images.thumbnail 96 -> 64"):
        verbs.run("images", Path("params.yaml"), [], "data")
    assert not Path("data/images").exists()


def test_what_does_not_concern_the_stage_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run(lambda: set_value("train", "k", 1))
    assert Path("data/images/manifest.json").exists()


def test_a_stage_that_dvc_does_not_run_may_have_its_params_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE")
    run(lambda: (switch(), set_value("images", "limit", 3)))
    assert Path("data/images/manifest.json").exists()


def test_the_branch_is_read_as_git_names_it(tmp_path: Path) -> None:
    assert read_checkout().branch == "main"
    git("-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-q", "--allow-empty", "-m", "Begin")
    git("switch", "-q", "-c", "some/topic")
    assert read_checkout().branch == "some/topic" and read_checkout().way_back == "git switch some/topic"
    git("worktree", "add", "-q", "--detach", "tree")
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    detached = read_checkout(Path("tree"))
    assert detached.branch == f"commit {commit}" and detached.way_back == f"git switch --detach {commit}"
    assert read_checkout(tmp_path / "photos").branch == ""
