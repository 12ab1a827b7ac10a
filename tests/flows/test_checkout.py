"""A run works in the checkout, or in a worktree of its own that leaves the checkout unchanged, byte for byte."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from flows.checkout import KEEP_SECONDS, Workplace, name_experiment, open_workplace
from flows.worktree import differences
from ommatid.compute.commands import find_error
from ommatid.config import Params, load_params
from ommatid.errors import RunError
from support.checkout import bytes_of, run
from support.processes import wait_for, wait_for_end

UP_TO_DATE = "sources:\n\talways changed\n"
"""Output of `dvc status` if nothing changed; it cannot know about the sources without running their stage."""


def params_of(root: Path, *overrides: str) -> Params:
    return load_params(root / "params.yaml", overrides)


def run_all(checkout: Path, params: Params, said: list[str] | None = None, flow_run: str | None = "run-1") -> str | None:
    lines = said if said is not None else []
    with open_workplace(checkout, params, flow_run, lines.append) as place:
        for stage, is_clean in place.plan():
            if not is_clean:
                place.repro(stage, lines.append)
    return place.experiment


def ran(checkout: Path) -> list[list[str]]:
    log = checkout / "ran.log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@contextmanager
def opened(checkout: Path, *overrides: str) -> Iterator[tuple[Workplace, list[str]]]:
    """Open a workplace that is left before anything is saved."""
    said: list[str] = []
    with contextlib.suppress(Leave), open_workplace(checkout, params_of(checkout, *overrides), None, said.append) as place:
        yield place, said
        raise Leave


class Leave(Exception):
    pass


def test_a_run_with_unchanged_params_works_in_the_checkout_and_runs_only_what_changed(checkout: Path) -> None:
    (checkout / "src/train.py").write_text("changed = True\n")
    said: list[str] = []
    with open_workplace(checkout, params_of(checkout), "run-1", said.append) as place:
        assert place.plan() == [("images", True), ("train", False), ("evaluate", False)]
        place.repro("train", said.append)
        place.repro("evaluate", said.append)
    assert ran(checkout) == [["train", "-", "run-1"]]  # its output is the same, so evaluate need not run
    assert "train things: 3 of 3" in said
    assert not any("git add" in line for line in said)
    assert run(checkout, "dvc", "status") == UP_TO_DATE
    assert ran(checkout) == [["train", "-", "run-1"]] and run(checkout, "dvc", "repro").count("didn't change, skipping") == 3


def test_dvc_depends_on_what_the_stages_read(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (checkout / "photos/ext").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/new.jpg").write_text("new")
    (checkout / "photos/gone.jpg").symlink_to("nowhere")
    os.mkfifo(checkout / "photos/pipe")
    (checkout / os.fsdecode(b"photos/caf\xe9.jpg")).write_text("latin-1")
    place = Workplace(checkout, checkout)
    assert place.stale() == {"images"}
    run(checkout, "dvc", "repro", "images")
    assert place.stale() == {"train", "evaluate"}  # the fake stage wrote other images
    (tmp_path / "elsewhere/another.jpg").write_text("another")
    run(checkout, "dvc", "repro", "images")
    assert [line[0] for line in ran(checkout)] == ["images", "images"]
    before = (checkout / "data/images/out.json").read_bytes()
    shutil.rmtree(checkout / "photos")
    with pytest.raises(RunError, match=r"^sources: photos: no such folder; bring it back with `dvc pull` if DVC keeps it, or set images"):
        place.plan()
    assert (checkout / "data/images/out.json").read_bytes() == before


def test_the_log_says_what_changed_since_a_stage_was_last_run(checkout: Path) -> None:
    with opened(checkout) as (place, said):
        place.plan()
        (checkout / "photos/two.jpg").write_text("two")
        place.stale()
        place.plan()
    assert said == ["images: changed since its last run: images.source.path"], "it is said once"


def test_a_run_with_an_override_is_an_experiment_that_leaves_the_checkout_alone(checkout: Path) -> None:
    params = checkout / "params.yaml"  # what follows is not committed: part of the experiment all the same
    params.write_text(params.read_text().replace("seed: 0", "seed: 5", 1))
    (checkout / "src/train.py").write_text("not_committed = True\n")
    (checkout / "photos/two.jpg").write_text("two")
    before, status = bytes_of(checkout), run(checkout, "git", "status", "--porcelain", "--ignored")

    name = run_all(checkout, params_of(checkout, "train.k=12"))
    assert name is not None and name.startswith("train-k-12-")
    assert ran(checkout) == [[stage, name, "run-1"] for stage in ("images", "train", "evaluate")]
    assert run_all(checkout, params_of(checkout, "train.k=12")) == name
    assert len(ran(checkout)) == 3  # the second run took everything from the cache
    assert bytes_of(checkout) == before
    assert run(checkout, "git", "status", "--porcelain", "--ignored").replace("!! .worktrees/\n", "").replace("!! ran.log\n", "") == status
    assert not (checkout / ".worktrees" / name).exists()
    assert run(checkout, "git", "worktree", "list").count("\n") == 1

    (shown,) = [revision for revision in experiments(checkout) if revision["name"] == name]
    assert shown["data"]["params"]["params.yaml"]["data"]["train"]["k"] == 12
    assert shown["data"]["metrics"]["data/quality/evaluate.json"]["data"]["summary"]["fvu"] == pytest.approx(0.488)

    run(checkout, "dvc", "exp", "apply", name)
    assert params_of(checkout) == params_of(checkout, "train.k=12", "train.seed=5")
    assert params.read_text().startswith("# All params of Ommatid")  # comments survive
    assert json.loads((checkout / "data/sae/out.json").read_text())[0]["k"] == 12
    assert json.loads((checkout / "data/images/out.json").read_text())[1] == ["one.jpg", "two.jpg"]
    assert (checkout / "src/train.py").read_text() == "not_committed = True\n"
    assert sorted(p.name for p in (checkout / "photos").iterdir()) == ["one.jpg", "two.jpg"] and not (checkout / "photos").is_symlink()
    assert run(checkout, "dvc", "status") == UP_TO_DATE


def experiments(checkout: Path) -> list[dict]:
    shown = json.loads(run(checkout, "dvc", "exp", "show", "--json"))
    return [revision for base in shown for group in base["experiments"] or [] for revision in group["revs"]]


def test_images_under_dvc_add_reach_an_experiment(checkout: Path) -> None:
    ignore = checkout / ".gitignore"
    ignore.write_text(ignore.read_text().replace("/photos/\n", ""))
    run(checkout, "dvc", "add", "photos")
    run(checkout, "git", "add", "-A")
    run(checkout, "git", "commit", "-qm", "Photos")
    before = bytes_of(checkout)
    said: list[str] = []
    run_all(checkout, params_of(checkout, "train.k=12"), said)
    assert "'photos.dvc' didn't change, skipping" in said
    assert bytes_of(checkout) == before
    assert [line[0] for line in ran(checkout)] == ["train", "evaluate"]


def test_a_failing_stage_reports_its_error_and_leaves_no_lock_entry(checkout: Path) -> None:
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("k: 32", "k: 13"))
    with pytest.raises(RunError, match=r"^train: 13 is unlucky$"):
        Workplace(checkout, checkout).repro("train", print)
    assert yaml.safe_load((checkout / "dvc.lock").read_text())["stages"]["train"]["params"]["params.yaml"]["train"]["k"] == 32
    assert "train" in Workplace(checkout, checkout).stale()


def test_a_failing_stage_of_an_experiment_names_the_worktree_in_which_its_files_are(checkout: Path) -> None:
    with opened(checkout, "train.k=13") as (place, said):
        place.plan()
        place.repro("images", said.append)
        with pytest.raises(RunError) as error:
            place.repro("train", said.append)
    assert str(error.value) == f"train: 13 is unlucky (in the experiment's worktree, {place.root})"
    assert place.root.is_dir() and place.root != checkout


def test_the_worktree_of_an_interrupted_run_is_continued_and_removed_after_a_day(checkout: Path) -> None:
    with opened(checkout, "train.k=14") as (place, said):
        tree = place.root
        (tree / "data/.work").mkdir(parents=True)
    assert any("run it again to continue there" in line for line in said)
    with opened(checkout, "train.k=14") as (place, said):
        assert place.root == tree and (tree / "data/.work").exists()
        assert (place.root / "photos/one.jpg").exists()
    shutil.rmtree(checkout / ".git/worktrees")
    with opened(checkout, "train.k=14") as (place, said):
        assert place.root == tree and not (tree / "data/.work").exists()  # git lost it: made anew
    long_ago = time.time() - KEEP_SECONDS - 1
    os.utime(tree, (long_ago, long_ago))
    with opened(checkout, "train.k=15") as (place, said):
        assert not tree.exists()


def test_a_stage_ends_with_its_run(checkout: Path) -> None:
    (checkout / "fake.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    (checkout / "src/train.py").write_text("changed = True\n")
    pids: list[int] = []

    def stop(line: str) -> None:
        if line.isdigit():
            pids.append(int(line))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Workplace(checkout, checkout).repro("train", stop)
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_for_end([psutil.Process(pids[0])], "the stage's process")


def test_runs_in_the_checkout_wait_for_each_other(checkout: Path) -> None:
    events: list[str] = []
    waiting = "another run is working in checkout; waiting for it to end"

    def work() -> None:
        with open_workplace(checkout, params_of(checkout), None, events.append):
            events.append("in")
            wait_for(lambda: waiting in events, "the other run to come")
            events.append("out")

    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    events.remove(waiting)
    assert events == ["in", "out", "in", "out"]


def test_a_folder_that_is_not_a_usable_checkout_is_refused(checkout: Path, tmp_path: Path) -> None:
    params = params_of(checkout)
    plain = tmp_path / "plain"
    plain.mkdir()
    for root, message in [(plain, "not a git checkout"), (checkout / "src", "not the top of its git checkout; start the run in ")]:
        with pytest.raises(RunError, match=message), open_workplace(root, params, None, print):
            pass
    run(plain, "git", "init", "-q")
    with pytest.raises(RunError, match="no commit yet"), open_workplace(plain, params, None, print):
        pass


def test_errors_of_git_are_told_apart_from_a_folder_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of(checkout)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(RunError, match="dubious ownership"), open_workplace(checkout, params, None, print):
        pass
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match=r"git cannot be started in .* is it installed"), open_workplace(checkout, params, None, print):
        pass


def test_a_path_that_leads_out_of_the_checkout_is_refused_in_an_experiment(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with (
        pytest.raises(RunError, match=r"images.source.path: \.\./elsewhere leads out of the checkout.*absolute path"),
        opened(checkout, "images.source.path=../elsewhere"),
    ):
        pass
    assert not list((checkout / ".worktrees").glob("*/"))


def test_untracked_files_cause_a_warning(checkout: Path) -> None:
    (checkout / "src/new.py").write_text("")
    with opened(checkout, "evaluate.n_top=32") as (_, said):
        assert any(line.startswith("warning: git does not track src/new.py") for line in said)


def test_an_experiment_is_named_for_its_first_overrides(checkout: Path) -> None:
    old = params_of(checkout)
    new = params_of(checkout, "train.k=12", "train.lr=0.001", "images.source={kind: parquet, path: x.parquet}")
    assert name_experiment(differences(old, new), "seed").startswith("source-kind-parquet-source-path-x-parquet-and-5-more-")
    assert name_experiment(differences(old, params_of(checkout, "train.lr=0.001")), "a").startswith("train-lr-0-001-")


def test_an_override_of_a_kind_leaves_a_valid_params_yaml(checkout: Path) -> None:
    (checkout / "elsewhere").mkdir()
    params = params_of(checkout, "images.source={kind: parquet, path: elsewhere}", "images.limit=null")
    with opened(checkout, "images.source={kind: parquet, path: elsewhere}", "images.limit=null") as (place, _):
        text = (place.root / "params.yaml").read_text()
        assert load_params(place.root / "params.yaml") == params
        assert "# or {kind: folder, path: photos}" in text and "lr: null" in text and "limit: null" in text
        assert (place.root / "elsewhere").is_symlink()


def test_files_that_lists_in_the_params_name_are_reachable_too(checkout: Path) -> None:
    (checkout / "data/naming").mkdir(parents=True)
    (checkout / "data/naming/birds.txt").write_text("heron\n")
    with opened(checkout, "label.labellers=[{kind: vocabulary, words: [imagenet, data/naming/birds.txt]}]") as (place, _):
        assert (place.root / "data/naming/birds.txt").read_text() == "heron\n"
    (checkout.parent / "birds.txt").write_text("heron\n")
    with (
        pytest.raises(RunError, match=r"label\.labellers: \.\./birds\.txt leads out of the checkout"),
        opened(checkout, "label.labellers=[{kind: vocabulary, words: [../birds.txt]}]"),
    ):
        pass


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("-9", "killed by SIGKILL: almost always by the system, because memory ran out"),
        ("137", "killed by SIGKILL: almost always by the system, because memory ran out"),
        ("-6", "killed by SIGABRT: a library gave up, most often because memory ran out"),
        ("-11", "killed by SIGSEGV: a library crashed"),
        ("3", "failed to reproduce 'train': failed to run: ommatid train, exited with 3"),
    ],
)
def test_a_stage_ended_by_a_signal_says_what_that_means(status: str, said: str) -> None:
    lines = ["terminate called after throwing an instance of 'std::bad_alloc'"]
    dvc = f"ERROR: failed to reproduce 'train': failed to run: ommatid train, exited with {status}"
    assert find_error([*lines, dvc], 255).startswith(said)
    assert find_error(["error: train: too few tokens", dvc], 255) == "train: too few tokens"
