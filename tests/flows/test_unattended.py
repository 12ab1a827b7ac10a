"""Proves that nobody has to watch: runs that are killed all at once lose nothing, and a checkout that changes under a run is noticed."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.checkout import Workplace, open_workplace
from flows.dvc_files import mend
from flows.worktree import remove_ref_locks
from ommatid.config import Params, load_params
from ommatid.errors import RunError
from support.checkout import REPOSITORY, run
from support.processes import HANG_SECONDS, wait_for, wait_for_end

RUN = """
import pathlib, sys
from flows.checkout import open_workplace
from ommatid.config import load_params
root = pathlib.Path.cwd()
def say(line):
    print(line, flush=True)
with open_workplace(root, load_params(root / "params.yaml", sys.argv[1:]), None, say) as place:
    for stage, is_clean in place.plan():
        if not is_clean:
            place.repro(stage, say)
"""
UP_TO_DATE = "sources:\n\talways changed\n"


def params_of(root: Path) -> Params:
    return load_params(root / "params.yaml")


def lock_of(checkout: Path) -> dict[str, Any]:
    return yaml.safe_load((checkout / "dvc.lock").read_text())["stages"]


def start(checkout: Path, *overrides: str) -> "subprocess.Popen[str]":
    """Start a run in a process of its own, which finds `flows` in this repository: it is not installed with the package."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", RUN, *overrides]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def in_thread(target: Any, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments)
    thread.start()
    return thread


def working_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


def saved(checkout: Path) -> dict[str, dict[str, Any]]:
    """Return the stages of the dvc.lock of each DVC experiment, by name."""
    refs = run(checkout, "git", "for-each-ref", "refs/exps", "--format=%(refname)").split()
    named = {ref.rpartition("/")[2]: ref for ref in refs if "/exec/" not in ref}
    return {name: yaml.safe_load(run(checkout, "git", "show", f"{ref}:dvc.lock"))["stages"] for name, ref in named.items()}


def digest_of(stage: dict[str, Any], kind: str, path: str) -> str:
    return next(entry["md5"] for entry in stage[kind] if entry["path"] == path)


def trained(checkout: Path, stage: dict[str, Any]) -> list[Any]:
    """Return what the fake stage `train` wrote that has this entry in a dvc.lock, from DVC's cache."""
    cache = checkout / ".dvc/cache/files/md5"
    digest = digest_of(stage, "outs", "data/sae")
    (file,) = json.loads((cache / digest[:2] / digest[2:]).read_text())
    return json.loads((cache / file["md5"][:2] / file["md5"][2:]).read_text())


def test_four_runs_at_once_that_are_each_killed_once_lose_nothing(checkout: Path, tmp_path: Path) -> None:
    """Two wait for each other in the checkout, and two are experiments; then the same four are started again, at once."""
    fake = checkout / "fake.py"
    fake.write_text(
        fake.read_text().replace("import json, os,", "import json, os, time,").replace('of 3")', 'of 3", flush=True); time.sleep(0.3)')
    )
    (checkout / "src/train.py").write_text("changed = True\n")
    runs = [(), (), ("train.k=12",), ("train.k=14",)]
    draw = random.Random(16)
    killed: list[tuple[int, str]] = []

    def kill(overrides: tuple[str, ...], n_lines: int) -> None:
        with start(checkout, *overrides) as process:
            assert process.stdout
            output = "".join(itertools.islice(process.stdout, n_lines))
            process.send_signal(signal.SIGKILL)
            status = process.wait()
            killed.append((status, "" if status == -signal.SIGKILL else output + process.stdout.read()))

    for thread in [in_thread(kill, overrides, draw.randrange(1, 7)) for overrides in runs]:
        thread.join(HANG_SECONDS)
    assert killed == [(-signal.SIGKILL, "")] * 4

    said: list[str] = []

    def finish(overrides: tuple[str, ...]) -> None:
        process = start(checkout, *overrides)
        output = process.communicate(timeout=HANG_SECONDS)[0]
        said.append("" if process.returncode == 0 else output)

    for thread in [in_thread(finish, overrides) for overrides in runs]:
        thread.join(HANG_SECONDS)
    assert said == ["", "", "", ""]
    assert run(checkout, "dvc", "status") == UP_TO_DATE
    assert trained(checkout, lock_of(checkout)["train"])[0]["k"] == 32
    assert lock_of(checkout).keys() == {"sources", "images", "train", "evaluate"}
    experiments = saved(checkout)
    assert sorted(name.rpartition("-")[0] for name in experiments) == ["train-k-12", "train-k-14"]
    for name, stages in experiments.items():
        k = int(name.split("-")[2])
        assert stages["train"]["params"]["params.yaml"]["train"]["k"] == k == trained(checkout, stages["train"])[0]["k"]
        assert digest_of(stages["evaluate"], "deps", "data/sae") == digest_of(stages["train"], "outs", "data/sae")
        assert stages["images"] == lock_of(checkout)["images"]
    assert not list((checkout / ".worktrees").glob("*/")) and run(checkout, "git", "worktree", "list").count("\n") == 1
    assert working_in(checkout) == []


def test_the_stage_of_a_killed_run_ends_before_the_next_run_begins(checkout: Path) -> None:
    slow = 'import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), open("saved", "w"), sys.exit(1)))\n'
    (checkout / "fake.py").write_text(slow + "print(os.getpid(), flush=True)\ntime.sleep(600)\n")
    (checkout / "src/train.py").write_text("changed = True\n")
    with start(checkout) as killed:
        assert killed.stdout
        output: list[str] = []
        for line in killed.stdout:
            output.append(line)
            if line.strip().isdigit():
                break
        else:
            pytest.fail("the run ended by itself:\n" + "".join(output))
        stage = psutil.Process(int(output[-1]))
        killed.kill()
    with open_workplace(checkout, params_of(checkout), None, print):
        assert (checkout / "saved").exists()  # the stage saved its work first
        wait_for_end([stage], "the stage")


def test_a_lock_file_left_half_written_is_restored(checkout: Path) -> None:
    whole = (checkout / "dvc.lock").read_bytes()
    for left in (b"", whole[: len(whole) // 2], b"stages: [", whole.replace(b"  train:", b"  other:")):
        (checkout / ".dvc/tmp").mkdir(exist_ok=True)
        (checkout / ".dvc/tmp/ommatid.lock").write_bytes(whole)
        (checkout / "dvc.lock").write_bytes(left)
        said: list[str] = []
        mend(checkout, said.append)
        assert (checkout / "dvc.lock").read_bytes() == whole and not (checkout / ".dvc/tmp/ommatid.lock").exists()
        assert said == ["dvc.lock was left half-written by a run that was killed; the version from before is restored"]
    newer = whole + b"  later:\n    cmd: x\n"
    (checkout / "dvc.lock").write_bytes(newer)
    (checkout / ".dvc/tmp/ommatid.lock").write_bytes(whole)
    (checkout / ".dvc/tmp/rwlock").write_text('{"read": {')
    mend(checkout, pytest.fail)
    assert (checkout / "dvc.lock").read_bytes() == newer
    (checkout / "dvc.lock").write_bytes(whole)
    assert run(checkout, "dvc", "status") == UP_TO_DATE  # DVC refuses a broken rwlock


def test_experiments_that_end_at_once_are_all_saved(checkout: Path) -> None:
    """DVC keeps what it is saving in refs that all worktrees share, and fails if another one uses them."""
    together = threading.Barrier(2, timeout=HANG_SECONDS)

    def save(k: int) -> None:
        with open_workplace(checkout, load_params(checkout / "params.yaml", [f"train.k={k}"]), None, print) as place:
            for stage in ("sources", "images", "train", "evaluate"):
                place.repro(stage, lambda line: None)
            together.wait()

    for thread in [in_thread(save, k) for k in (12, 14)]:
        thread.join(HANG_SECONDS)
    assert sorted(name.rpartition("-")[0] for name in saved(checkout)) == ["train-k-12", "train-k-14"]


def interrupted(checkout: Path) -> Workplace:
    """Begin an experiment that is interrupted at once."""
    found: list[Workplace] = []
    with (
        suppress(KeyboardInterrupt),
        open_workplace(checkout, load_params(checkout / "params.yaml", ["train.k=14"]), None, print) as place,
    ):
        found.append(place)
        raise KeyboardInterrupt
    return found[0]


def test_what_git_left_locked_when_it_was_killed_does_not_stop_an_experiment(checkout: Path) -> None:
    tree = interrupted(checkout).root
    (tree / "draft").write_text("work")
    git_folder = Path(run(tree, "git", "rev-parse", "--absolute-git-dir").strip())
    run(tree, "git", "commit", "-q", "--allow-empty", "-m", "What `dvc exp save` commits")
    (git_folder / "index.lock").touch()
    (checkout / ".git/index.lock").touch()  # the user's own git was killed, or is at work
    assert interrupted(checkout).root == tree and (tree / "draft").read_text() == "work"
    assert run(tree, "git", "rev-parse", "HEAD") == run(checkout, "git", "rev-parse", "HEAD")

    (git_folder / "locked").write_text("initializing")  # `git worktree add` was killed
    (tree / ".git").unlink()
    assert interrupted(checkout).root == tree and not (tree / "draft").exists()

    refs = checkout / ".git/refs/exps"
    refs.mkdir(parents=True, exist_ok=True)
    for name, changed in (("stash.lock", 1), ("own.lock", time.time())):
        (refs / name).touch()
        os.utime(refs / name, (changed, changed))
    remove_ref_locks(checkout)
    assert [path.name for path in refs.glob("*.lock")] == ["own.lock"]


@contextmanager
def opened(checkout: Path) -> Iterator[Workplace]:
    """Open the checkout, in which train must run, with all committed but that."""
    run(checkout, "git", "add", "-A")
    run(checkout, "git", "commit", "-qm", "All")
    run(checkout, "git", "branch", "topic")
    (checkout / "src/train.py").write_text("changed = True\n")
    with open_workplace(checkout, params_of(checkout), None, print) as place:
        assert place.plan() == [("images", True), ("train", False), ("evaluate", False)]
        yield place


def set_value(checkout: Path, old: str, new: str) -> None:
    params = checkout / "params.yaml"
    assert old in params.read_text()
    params.write_text(params.read_text().replace(old, new, 1))


def test_a_branch_switched_under_a_run_gets_none_of_its_results(checkout: Path) -> None:
    def switch(line: str) -> None:
        if line == "train things: 1 of 3":
            run(checkout, "git", "switch", "-q", "topic")
            set_value(checkout, "k: 32", "k: 20")

    with opened(checkout) as place:
        with pytest.raises(RunError) as error:
            place.repro("train", switch)
        assert str(error.value) == (
            "the checkout changed while the run was going on: branch main -> topic, train.k 32 -> 20; train has run, and is not recorded "
            "in dvc.lock. What is finished is kept: put the checkout back (`git switch main`, params.yaml as it was) and start the run "
            "again, or start it to go on with what is here now"
        )
        with pytest.raises(RunError, match=r"branch main -> topic, .* evaluate was not run"):
            place.repro("evaluate", print)
    assert run(checkout, "git", "status", "--porcelain") == " M params.yaml\n M src/train.py\n"
    run(checkout, "dvc", "repro", "train")  # with k 20, which DVC might believe to have in its cache
    assert trained(checkout, lock_of(checkout)["train"])[0]["k"] == 20


def test_params_edited_under_a_run_stop_it_before_the_next_stage(checkout: Path) -> None:
    with opened(checkout) as place:
        run(checkout, "git", "commit", "-q", "--allow-empty", "-m", "Something else")  # changes nothing that matters

        def edit(line: str) -> None:
            if line == "train things: 2 of 3":
                set_value(checkout, "n_top: 16", "n_top: 32")

        place.repro("train", edit)
        with pytest.raises(
            RunError, match=r"^the checkout changed .*: evaluate\.n_top 16 -> 32; evaluate was not run\. What is finished is"
        ):
            place.repro("evaluate", print)
        set_value(checkout, "n_top: 32", "n_top: 16")
        place.repro("evaluate", print)
    assert run(checkout, "dvc", "status") == UP_TO_DATE


def test_params_of_a_stage_edited_while_it_runs_are_not_recorded(checkout: Path) -> None:
    before = lock_of(checkout)["train"]
    with opened(checkout) as place, pytest.raises(RunError, match=r"train\.k 32 -> 20; train has run, and is not recorded"):
        place.repro("train", lambda line: set_value(checkout, "k: 32", "k: 20") if line == "train things: 1 of 3" else None)
    assert lock_of(checkout)["train"] == before


def test_a_run_that_waited_for_another_sees_that_params_were_edited_meanwhile(checkout: Path) -> None:
    said: list[str] = []
    failed: list[str] = []

    def wait() -> None:
        try:
            with open_workplace(checkout, params, None, said.append):
                pass
        except RunError as error:
            failed.append(str(error))

    params = params_of(checkout)
    with open_workplace(checkout, params, None, print):
        thread = in_thread(wait)
        wait_for(lambda: said, "the other run to come")
        set_value(checkout, "k: 32", "k: 20")
    thread.join(HANG_SECONDS)
    assert failed == ["params.yaml changed before the run could begin: train.k 32 -> 20; start it again"]
