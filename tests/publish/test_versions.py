"""Any clone gets the champion: DVC stores data/published, and git commits and pushes its name, never more, and never to another branch."""

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import psutil
import pytest

from flows.checkout import open_workplace
from ommatid.catalog.reader import Catalog
from ommatid.config import Margins, load_params
from ommatid.publish import champion, versions
from ommatid.publish.decisions import DECISIONS, Decision, Scores, make_key, read_decisions
from support.checkout import make_checkout, run
from support.processes import HANG_SECONDS, wait_for_end

MARGINS = Margins(min_ms_gain=0.005, max_fvu_loss=0.01, max_dead_rise=0.02)


def decision(name: str, reason: str = "there was no champion") -> Decision:
    scores = Scores(sae=name, digest=name, fvu=0.3, l0=32.0, dead=0.1, ms=0.45, ms_floor=0.35)
    values = {"decision": "champion", "reason": reason, "who": "Anna", "why": "it is time", "decided_at": datetime.now(UTC)}
    values |= {"challenger": scores, "champion": None, "margins": MARGINS, "catalog": name, "run": {"sae": name}}
    return Decision.model_validate(values | {"key": make_key(name, name)})


def promote(name: str) -> Decision:
    """Make an SAE the champion: its folder, its line, and the published catalogue."""
    made = decision(name)
    folder = champion.folder_of(made)
    (folder / "sae").mkdir(parents=True)
    (folder / "sae/weights").write_text(name)
    with duckdb.connect(folder / "catalog.duckdb") as connection:
        connection.execute(f"CREATE TABLE runs AS SELECT '{name}' AS sae, NULL::VARCHAR AS decision, NULL::VARCHAR AS reason")
    champion.append(made)
    champion.settle(2)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with remotes of git and DVC beside it."""
    root = make_checkout(tmp_path_factory.mktemp("made") / "checkout")
    run(root, "git", "init", "-q", "--bare", "-b", "main", "../remote.git")
    run(root, "dvc", "remote", "add", "--default", "store", "../dvc-remote")
    run(root, "git", "add", ".dvc/config")
    run(root, "git", "commit", "-qm", "Name a DVC remote")
    run(root, "git", "remote", "add", "origin", "../remote.git")
    run(root, "git", "push", "-q", "origin", "main")
    return root.parent


@pytest.fixture
def checkout(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout with its remotes, which is the current folder; on this machine git knows no name."""
    shutil.copytree(made, tmp_path / "made")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path / "made/checkout")
    return Path.cwd()


@pytest.fixture
def said() -> list[str]:
    return []


def bring_out(root: Path, made: Decision, say: Callable[[str], None], branch: str | None = "main") -> None:
    versions.commit(root, made, branch, say, warn_by(say))
    versions.push(root, branch, say, warn_by(say))


def warn_by(say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: say(f"warning: {text}")


def files_of(root: Path, commit: str = "HEAD") -> list[str]:
    return run(root, "git", "show", "--format=", "--name-only", commit).split()


def test_a_second_clone_pulls_the_champion_and_then_the_next(checkout: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    bring_out(checkout, promote("first"), said.append)
    assert said[0].startswith("committed dvc.lock and data/published.dvc to main as ") and said[1].startswith("pushed data/published"), said
    assert files_of(checkout) == ["data/published.dvc", "dvc.lock"]
    message = run(checkout, "git", "log", "-1", "--format=%an %ae|%B")
    assert message.startswith("ommatid ommatid@localhost|Publish first\n\nthere was no champion\nit is time\nBy Anna")
    assert run(checkout, "git", "status", "--porcelain") == ""

    clone = checkout.parent / "clone"
    run(checkout.parent, "git", "clone", "-q", "remote.git", str(clone))
    run(clone, "dvc", "pull", "-q", "data/published.dvc")
    monkeypatch.chdir(clone)
    with Catalog(champion.CATALOG) as catalog:
        assert catalog.rows("SELECT sae, decision FROM runs") == [("first", "champion")]
    assert [made.challenger.sae for made in read_decisions()] == ["first"]
    champion.settle(2)
    assert run(clone, "git", "status", "--porcelain") == "" and "data/published.dvc" not in run(
        clone, "dvc", "status", "data/published.dvc"
    )

    monkeypatch.chdir(checkout)
    first, commit = read_decisions()[0], run(checkout, "git", "rev-parse", "HEAD").strip()
    bring_out(checkout, promote("second"), said.append)
    run(clone, "git", "pull", "-q")
    run(clone, "dvc", "pull", "-q", "data/published.dvc")
    assert (clone / DECISIONS).read_bytes() == DECISIONS.read_bytes()
    assert (clone / champion.CATALOG).read_bytes() == champion.CATALOG.read_bytes()

    promote("third")
    folder = champion.folder_of(first)
    assert not folder.exists(), "two are kept"
    run(checkout, "dvc", "get", "-q", "--rev", commit, ".", str(folder), "-o", str(folder))
    assert (folder / "sae/weights").read_text() == "first" and (folder / "catalog.duckdb").exists(), "as docs/users/operations.md says"


def test_a_commit_has_none_of_the_users_work(checkout: Path, said: list[str]) -> None:
    (checkout / "fake.py").write_text("staged")
    run(checkout, "git", "add", "fake.py")
    (checkout / "fake.py").write_text("staged, and changed again")
    with (checkout / "params.yaml").open("a") as file:
        file.write("# changed")
    (checkout / "new.txt").write_text("new")
    before = run(checkout, "git", "status", "--porcelain")
    versions.commit(checkout, promote("first"), "main", said.append, warn_by(said.append))
    assert files_of(checkout) == ["data/published.dvc"]
    assert run(checkout, "git", "status", "--porcelain") == before
    assert run(checkout, "git", "show", ":fake.py") == "staged"
    versions.commit(checkout, read_decisions()[-1], "main", said.append, warn_by(said.append))
    assert len(said) == 1, "nothing is new, so nothing is committed or said"


def test_a_lock_of_a_run_that_is_half_way_is_committed_neither_alone_nor_by_a_person(checkout: Path, said: list[str]) -> None:
    first = promote("first")
    versions.commit(checkout, first, "main", said.append, warn_by(said.append))
    tip = run(checkout, "git", "rev-parse", "HEAD")
    (checkout / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    versions.commit(checkout, first, "main", said.append, warn_by(said.append))
    assert run(checkout, "git", "rev-parse", "HEAD") == tip and len(said) == 1, "nothing new was published"
    for how in ("rollback", "promote"):
        by_person = promote(how).model_copy(update={"how": how})
        versions.commit(checkout, by_person, "main", said.append, warn_by(said.append), is_half_way=True)
        assert files_of(checkout) == ["data/published.dvc"] and "?? dvc.lock" in run(checkout, "git", "status", "--porcelain")
        assert said[-1].startswith("committed data/published.dvc to main as "), said
    assert len(said) == 3


def test_nothing_is_committed_to_another_branch(checkout: Path, said: list[str]) -> None:
    made = promote("first")
    tips = run(checkout, "git", "for-each-ref", "--format=%(objectname)", "refs/heads")
    run(checkout, "git", "checkout", "-q", "-b", "other")
    versions.commit(checkout, made, "main", said.append, warn_by(said.append))
    run(checkout, "git", "checkout", "-q", "--detach")
    versions.commit(checkout, made, "main", said.append, warn_by(said.append))
    versions.commit(checkout, made, versions.find_branch(checkout), said.append, warn_by(said.append))
    run(checkout, "git", "checkout", "-q", "main")
    (checkout / ".git/MERGE_HEAD").write_text(tips)
    versions.commit(checkout, made, "main", said.append, warn_by(said.append))
    (checkout / ".git/MERGE_HEAD").unlink()
    whys = [
        "the branch was switched from main to other since the run began",
        "HEAD is detached, so there is no branch to commit to; check one out",
        "HEAD is detached, so there is no branch to commit to; check one out",
        "a merge is under way; finish it",
    ]
    assert said == [f"warning: data/published was not committed: {why}; the next run tries again" for why in whys]
    assert set(run(checkout, "git", "for-each-ref", "--format=%(objectname)", "refs/heads").split()) == set(tips.split())
    versions.commit(checkout, made, "main", said.append, warn_by(said.append))
    assert said[-1].startswith("committed data/published.dvc to main")


def test_a_push_that_fails_is_said_and_made_up_for(checkout: Path, said: list[str]) -> None:
    made = promote("first")
    run(checkout, "git", "remote", "remove", "origin")
    bring_out(checkout, made, said.append)
    assert said.pop() == (
        "warning: the champion was not pushed: main has no upstream, and there is no remote; run `git push -u` once; "
        "the next run tries again"
    )
    assert champion.find_champion() is not None, "the decision stands"
    run(checkout, "git", "remote", "add", "origin", "../remote.git")
    other = checkout.parent / "other"
    run(checkout.parent, "git", "clone", "-q", "remote.git", str(other))
    (other / "theirs.txt").write_text("theirs")
    run(other, "git", "add", "-A")
    run(other, "git", "commit", "-qm", "Theirs")
    run(other, "git", "push", "-q")
    said.clear()
    bring_out(checkout, made, said.append)
    (line,) = said
    assert line.startswith("warning: the champion was not pushed: git push") and "run `git pull --rebase`" in line, line
    run(checkout, "git", "pull", "-q", "--rebase", "origin", "main")
    said.clear()
    bring_out(checkout, made, said.append)
    assert said == ["pushed data/published to the DVC remote, and main to origin"]
    bring_out(checkout, made, said.append)
    assert len(said) == 1, "it has been pushed"
    assert files_of(checkout, "origin/main") == ["data/published.dvc"]
    run(checkout, "dvc", "remote", "remove", "store")
    said.clear()
    bring_out(checkout, promote("second"), said.append)
    assert "warning: the champion was not pushed: dvc push" in said[-1] and "no remote" in said[-1], said


def test_a_push_that_hangs_is_ended_with_all_that_it_started(checkout: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = promote("first")
    versions.commit(checkout, made, "main", said.append, warn_by(said.append))
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(versions, "dvc", lambda root, env, *arguments, seconds: ran.append((*arguments, f"{seconds:.0f}")))
    monkeypatch.setattr(versions, "GIT_PUSH_SECONDS", 2.0)
    seconds = f"{HANG_SECONDS}{os.getpid()}"  # which no other process sleeps
    hook = checkout.parent / "remote.git/hooks/pre-receive"
    hook.write_text(f"#!/bin/sh\nexec sleep {seconds}\n")
    hook.chmod(0o755)
    said.clear()
    versions.push(checkout, "main", said.append, warn_by(said.append))
    (line,) = said
    assert line.startswith("warning: the champion was not pushed: git push ") and ran == [("push", "21600")]
    assert "took longer than 2 seconds and was ended" in line and line.endswith("; the next run tries again")
    wait_for_end((one for one in psutil.process_iter(["cmdline"]) if seconds in (one.info["cmdline"] or [])), "the hook")


def test_published_files_are_no_stage_and_experiments_leave_them_alone(checkout: Path, said: list[str]) -> None:
    versions.commit(checkout, promote("first"), "main", said.append, warn_by(said.append))
    (champion.PUBLISHED / "settled").write_text("changed since")
    before = (checkout / "data/published.dvc").read_bytes()
    params = load_params()
    changed = params.model_copy(update={"train": params.train.model_copy(update={"k": 12})})
    with open_workplace(checkout, changed, None, said.append) as place:
        plan = place.plan()
        for stage, _ in plan:
            place.repro(stage, lambda line: None)
    assert [stage for stage, _ in plan] == ["images", "train", "evaluate"] and place.experiment
    assert "data/published.dvc" not in run(checkout, "git", "diff", "--name-only", f"main..{find_experiment(checkout, place.experiment)}")
    assert (checkout / "data/published.dvc").read_bytes() == before
    with open_workplace(checkout, params, None, said.append) as place:
        assert place.stages() == ["images", "train", "evaluate"] and "data/published.dvc" not in place.stale()


def find_experiment(root: Path, name: str) -> str:
    (ref,) = [line for line in run(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split() if line.endswith(f"/{name}")]
    return ref
