"""The folder in which a run works, and what DVC does there: the checkout itself, or the worktree of an experiment. Imports no Prefect.

A run whose parameters equal params.yaml works in the checkout, one run at a time. A run that overrides any of them is an experiment: it
works in `.worktrees/<name>`, a git worktree with the checkout's current files, its own params.yaml and the checkout's DVC cache.
The name is derived from the parameters and the code, so that a run of the same experiment continues one that was killed.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from flows.commands import Say, stream
from flows.dvc_files import LOCK, committed_lock, keeping_lock, mend, take_back
from flows.worktree import (
    ABSENT,
    Changes,
    check_paths,
    differences,
    make_worktree,
    remove_ref_locks,
    remove_worktree,
    take_snapshot,
    warn_of_untracked_files,
)
from ommatid.compute.commands import dvc, environment, find_error, git
from ommatid.config import Params, load_params
from ommatid.errors import OmmatidError, RunError
from ommatid.pipeline.checkout import read_checkout
from ommatid.publish.champion import resolve_start
from ommatid.publish.versions import POINTER
from ommatid.sources.changes import explain_changes
from ommatid.sources.stage import PLACE, write_sources

WORKTREES = Path(".worktrees")
SOURCES = "sources"
"""Stage of dvc.yaml that records the files named in the params; it runs before DVC is asked what is stale, and makes no artefact."""
CHANGED = "changed since its last run"
"""Words in the lines of `ommatid sources` that say why a stage must run."""
WORKTREES_LOCK = "worktrees"
"""Name of the lock that is held while git's list of worktrees or its refs of experiments are changed."""
KEEP_SECONDS = 24 * 3600
"""Seconds for which the worktree of a failed experiment is kept, before another experiment removes it."""
_BUSY = ("another DVC process seems to be running", "is busy, it is being blocked by")
"""DVC's messages when another process holds its lock."""


class Workplace:
    """A folder in which a run works: the checkout, or an experiment's worktree."""

    def __init__(
        self,
        root: Path,
        checkout: Path,
        experiment: str | None = None,
        run: str | None = None,
        say: Say = lambda line: None,
        held: Sequence[int] = (),
    ):
        self.root = root
        self.checkout = checkout
        self.experiment = experiment
        """Name of the DVC experiment; None if the run works in the checkout."""
        self._run = run
        self._say = say
        self._held = held
        self._begun = read_checkout(root)
        self._explained: set[str] = set()

    @property
    def name(self) -> str:
        """Name of the folder for messages: the experiment's, or `the checkout`."""
        return self.experiment or "the checkout"

    def stages(self) -> list[str]:
        """All stages except `sources` in topological order, read from DVC's graph; the published files are no stage."""
        graph: dict[str, set[str]] = {}
        for name, needed_by in re.findall(r'^"(.+?)"(?: -> "(.+?)")?;$', self.dvc("dag", "--dot"), re.MULTILINE):
            graph.setdefault(name, set())
            if needed_by:
                graph.setdefault(needed_by, set()).add(name)
        return [stage for stage in TopologicalSorter(graph).static_order() if stage not in (SOURCES, POINTER)]

    def stale(self) -> set[str]:
        """Return the stages whose sources, inputs, params, code or outputs have changed; the stages after them may have to run too.

        Raises:
            RunError: A source is missing.
        """
        is_here = Path.cwd() == self.root and self.experiment is None  # or paths in the params, and the code, would be others
        if is_here:
            self._write_sources()
        else:
            self._record_sources()
        status = json.loads(self.dvc("status", "--json"))
        if is_here and any(isinstance(change, dict) for change in status.get(SOURCES, ())):
            self.repro(SOURCES, lambda line: None)  # for dvc.lock and the cache
        return set(status) - {SOURCES, POINTER}

    def plan(self) -> list[tuple[str, bool]]:
        """List the stages in order as (stage, is_clean); from the first stale one on, none is clean, and DVC checks each when it is run."""
        stages = self.stages()
        if self.experiment is None:
            stale = self.stale()
        else:  # a worktree has no outputs at first
            self._record_sources()
            stale = set(stages)
        first = next((i for i, stage in enumerate(stages) if stage in stale), len(stages))
        return [(stage, i < first) for i, stage in enumerate(stages)]

    def _write_sources(self) -> None:
        """Do what `ommatid sources` does, in this process, which takes a tenth of the time."""
        try:
            write_sources(resolve_start(load_params(self.root / "params.yaml")), self.root / PLACE)
        except OmmatidError as error:
            raise RunError(f"{SOURCES}: {error}") from error
        for stage, changes in explain_changes(self.root).items():
            self._explain(f"{stage}: {CHANGED}: {changes}")

    def _record_sources(self) -> None:
        def tell(line: str) -> None:
            if line.startswith(f"{SOURCES}: ") and CHANGED in line:
                self._explain(line.removeprefix(f"{SOURCES}: "))

        self.repro(SOURCES, tell)

    def _explain(self, line: str) -> None:
        """Say once why a stage must run."""
        if line not in self._explained:
            self._explained.add(line)
            self._say(line)

    def repro(self, stage: str, say: Say) -> None:
        """Run `dvc repro --single-item <stage>`, waiting while another DVC process holds the lock.

        Args:
            stage: Name of the stage.
            say: Called with each line of its output.

        Raises:
            RunError: The stage failed, and the message is its `error:` line; or the checkout is not as it was when the run began.
        """
        self.check(f"{stage} was not run")
        began = time.time()
        with keeping_lock(self.root) as before:
            self._repro(stage, say)
        now = read_checkout(self.root)
        if self._begun.explain_change(now, stage):  # DVC has recorded it on the wrong branch, or with params that it was not run with
            take_back(self.root, stage, before if now.branch == self._begun.branch else committed_lock(self.root), began)
            self.check(f"{stage} has run, and is not recorded in {LOCK}")

    def check(self, consequence: str) -> None:
        """Check that the branch and the params are those with which the run began.

        Args:
            consequence: What follows if they are not, for the message.

        Raises:
            RunError: They are not; the message says what changed, and what to do.
        """
        if change := self._begun.explain_change(read_checkout(self.root)):
            raise RunError(
                f"{self.name} changed while the run was going on: {change}; {consequence}. What is finished is kept: put the checkout back "
                f"(`{self._begun.way_back}`, params.yaml as it was) and start the run again, or start it to go on with what is here now"
            )

    def _repro(self, stage: str, say: Say) -> None:
        command = ["dvc", "repro", "--single-item", stage]
        while True:
            code, lines = stream(command, self.root, self._environment(), say, self._held)
            if code and any(busy in line for line in lines for busy in _BUSY):
                say("another DVC process is working here; waiting for it to end")
                time.sleep(5)
                continue
            if code:
                where = "" if self.experiment is None else f" (in the experiment's worktree, {self.root})"
                raise RunError(f"{stage}: {find_error(lines, code).removeprefix(f'{stage}: ')}{where}")
            return

    def dvc(self, *arguments: str) -> str:
        """Run a DVC command and return its output.

        Raises:
            RunError: The command failed.
        """
        return dvc(self.root, self._environment(), *arguments)

    def _environment(self) -> dict[str, str]:
        return environment(self.root, self.checkout, self.experiment, self._run)


@contextmanager
def open_workplace(checkout: Path, params: Params, run: str | None, say: Say) -> Iterator[Workplace]:
    """Open the folder in which a run with these params works.

    If the block succeeds, an experiment is saved and its worktree removed.

    Args:
        checkout: The checkout.
        params: Params of the run.
        run: Id of the Prefect flow run, if there is one.
        say: Called with lines for the run's log.

    Yields:
        The folder, which no other run uses at the same time.

    Raises:
        RunError: The folder is not a checkout with a commit and DVC, or a path in the params cannot be reached from a worktree.
    """
    checkout = checkout.resolve()
    _check(checkout)
    changes = differences(load_params(checkout / "params.yaml"), params)
    if changes:
        say(f"an experiment: {_describe(changes)}")
        with _open_experiment(checkout, params, changes, run, say) as place:
            yield place
    else:
        with _locked(checkout, "checkout", say) as lock:
            mend(checkout, say)
            place = Workplace(checkout, checkout, run=run, say=say, held=[lock])
            if changed := differences(params, load_params(checkout / "params.yaml")):  # while this run waited for another
                raise RunError(f"params.yaml changed before the run could begin: {_describe(changed)}; start it again")
            yield place


def _describe(changes: Changes) -> str:
    return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in _flatten(changes).items())


def _flatten(changes: Changes) -> dict[str, tuple[Any, Any]]:
    return {".".join(path): tuple(None if value is ABSENT else value for value in pair) for path, pair in changes.items()}  # type: ignore[misc]


def name_experiment(changes: Changes, seed: str) -> str:
    """Name an experiment, such as `train-k-16-3f2a91`: by its first two overrides, and by a checksum of `seed`, which identifies it."""
    words = [f"{'-'.join(path[-2:])}-{new}" for path, (_, new) in changes.items() if new is not ABSENT]
    more = f"-and-{len(words) - 2}-more" if len(words) > 2 else ""
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", "-".join(words[:2])).strip("-").lower()[:48].strip("-")
    return f"{slug}{more}-{hashlib.sha256(seed.encode()).hexdigest()[:6]}".lstrip("-")


@contextmanager
def _open_experiment(checkout: Path, params: Params, changes: Changes, run: str | None, say: Say) -> Iterator[Workplace]:
    check_paths(checkout, params)
    head = git(checkout, "rev-parse", "HEAD")
    snapshot, code = take_snapshot(checkout)
    name = name_experiment(changes, f"{head} {code} {params.model_dump_json()}")
    warn_of_untracked_files(checkout, say)
    root = checkout / WORKTREES / name
    with _locked(checkout, name, say) as lock:
        with _locked(checkout, WORKTREES_LOCK, None):  # git's list of worktrees is changed by one run at a time
            _remove_abandoned(checkout, name)
            make_worktree(checkout, root, params, changes, head, snapshot)
        mend(root, say)
        place = Workplace(root, checkout, name, run, say, [lock])
        try:
            yield place
            message = f"{name}: Prefect run {run}" if run else name
            with _locked(checkout, WORKTREES_LOCK, None):  # DVC keeps what it saves in refs that all worktrees share
                remove_ref_locks(checkout)
                # dvc.yaml alone: a worktree does not hold what DVC stores beside the stages, such as data/published
                place.dvc("exp", "save", "--name", name, "--force", "--message", message, "dvc.yaml")
        except BaseException:
            say(f"the finished stages of {name} are kept in {place.root} for a day; run it again to continue there")
            raise
        with _locked(checkout, WORKTREES_LOCK, None):
            remove_worktree(checkout, root)
    say(f"saved as DVC experiment {name}: `dvc exp show` compares it, `dvc exp apply {name}` brings it back")


def _remove_abandoned(checkout: Path, name: str) -> None:
    """Remove worktrees that no run uses and that are older than `KEEP_SECONDS`, except the one of experiment `name`."""
    for root in (checkout / WORKTREES).glob("*/"):
        if root.name == name or time.time() - root.stat().st_mtime < KEEP_SECONDS:
            continue
        lock = os.open(_lock_path(checkout, root.name), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _try_lock(lock):
                remove_worktree(checkout, root)
        finally:
            os.close(lock)


def _check(checkout: Path) -> None:
    """Check that a run can work in a folder.

    Raises:
        RunError: It cannot; the message says what is missing.
    """
    try:
        top = Path(git(checkout, "rev-parse", "--show-toplevel")).resolve()
    except RunError as error:
        if "not a git repository" not in str(error):  # git may also refuse a folder that belongs to another user
            raise
        raise RunError(f"{checkout}: not a git checkout; start runs in a clone of the repository") from None
    if top != checkout:
        raise RunError(f"{checkout}: not the top of its git checkout; start the run in {top}")
    try:
        git(checkout, "rev-parse", "--verify", "HEAD")
    except RunError:
        raise RunError(f"{checkout}: the git repository has no commit yet, which experiments start from; commit first") from None
    if not (checkout / "dvc.yaml").exists() or not (checkout / ".dvc").is_dir():
        raise RunError(f"{checkout}: no DVC pipeline here (dvc.yaml and .dvc); start runs in a clone of the repository")


def _lock_path(checkout: Path, name: str) -> Path:
    return checkout / WORKTREES / f"{name}.lock"


@contextmanager
def _locked(checkout: Path, name: str, say: Say | None) -> Iterator[int]:
    """Hold the lock of a workplace, so that a single run works there at a time.

    Args:
        checkout: The checkout.
        name: Name of the lock.
        say: Called with a line if another run holds the lock.

    Yields:
        Its file descriptor. A child process that inherits it holds the lock too, until it ends.
    """
    path = _lock_path(checkout, name)
    path.parent.mkdir(exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if say and not _try_lock(lock):
            say(f"another run is working in {name}; waiting for it to end")
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
