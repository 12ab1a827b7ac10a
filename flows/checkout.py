"""Where a run works, and what git and DVC do there: the checkout itself, or the worktree of an experiment. Imports no Prefect.

A run whose parameters equal params.yaml works in the checkout, one at a time. A run that overrides any of them is an experiment: it
works in `.worktrees/<name>`, a git worktree of what the checkout holds now, with its own params.yaml and the checkout's DVC cache.
The name follows from the parameters and the code, so that a run that died is continued by the next run of the same experiment.
"""

import configparser
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import filelock
import psutil

from ommatid.config import Params, dotted, load_params
from ommatid.errors import RunError

WORKTREES = Path(".worktrees")
SOURCES = "sources"
"""The stage of dvc.yaml that looks at what the params name by path; it is part of asking what must run, and makes no artefact."""
KEEP_SECONDS = 24 * 3600
"""How long the worktree of an experiment that failed waits to be continued before another experiment clears it away."""

Say = Callable[[str], None]

_BUSY = ("another DVC process seems to be running", "is busy, it is being blocked by")
_HINTS = ("To track the changes with git", "git add dvc.lock", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")


class Workplace:
    """A folder in which a run works: the checkout, or an experiment's worktree."""

    def __init__(self, root: Path, checkout: Path, experiment: str | None = None, run: str | None = None):
        self.root = root
        self.checkout = checkout
        self.experiment = experiment
        """Name of the DVC experiment; None: the run works in the checkout."""
        self._run = run

    @property
    def name(self) -> str:
        """What to call the place: the experiment's name, or `the checkout`."""
        return self.experiment or "the checkout"

    def stages(self) -> list[str]:
        """The stages but `sources`, each after those it needs: DVC's graph, DVC's words."""
        graph: dict[str, set[str]] = {}
        for name, needed_by in re.findall(r'^"(.+?)"(?: -> "(.+?)")?;$', self.dvc("dag", "--dot"), re.MULTILINE):
            graph.setdefault(name, set())
            if needed_by:
                graph.setdefault(needed_by, set()).add(name)
        return [stage for stage in TopologicalSorter(graph).static_order() if stage != SOURCES]

    def stale(self) -> set[str]:
        """The stages whose sources, inputs, params, code or outputs differ from what DVC noted; those after them may follow.

        Raises:
            RunError: a source is missing.
        """
        self._look()
        return set(json.loads(self.dvc("status", "--json"))) - {SOURCES}

    def plan(self) -> list[tuple[str, bool]]:
        """(stage, is up to date), in order; from the first stage that is not, DVC is asked again one by one."""
        stages = self.stages()
        if self.experiment is None:
            stale = self.stale()
        else:  # a worktree begins without outputs
            self._look()
            stale = set(stages)
        first = next((i for i, stage in enumerate(stages) if stage in stale), len(stages))
        return [(stage, i < first) for i, stage in enumerate(stages)]

    def _look(self) -> None:
        self.repro(SOURCES, lambda line: None)

    def repro(self, stage: str, say: Say) -> None:
        """`dvc repro --single-item <stage>`, each of its lines to `say`.

        Raises:
            RunError: the stage failed; the message is its `error:` line.
        """
        command = [*_DVC, "repro", "--single-item", stage]
        while True:
            code, lines = _stream(command, self.root, self._environment(), say)
            if code and any(busy in line for line in lines for busy in _BUSY):
                say("another DVC process works here; waiting for it to end")
                time.sleep(5)
                continue
            if code:
                where = "" if self.experiment is None else f" (in the experiment's worktree, {self.root})"
                raise RunError(f"{stage}: {_error_in(lines, code).removeprefix(f'{stage}: ')}{where}")
            return

    def dvc(self, *arguments: str) -> str:
        """What a DVC command prints.

        Raises:
            RunError: it failed.
        """
        return _ask([*_DVC, "--wait-for-lock", *arguments], self.root, {**self._environment(), **_identity(self.root)})

    def _environment(self) -> dict[str, str]:
        return environment(self.root, self.checkout, self.experiment, self._run)


def environment(root: Path, checkout: Path, experiment: str | None = None, run: str | None = None) -> dict[str, str]:
    """What a stage's process sees: the code of the folder it works in, and who asked for it."""
    ours = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",  # or progress lines come all at once, at the end
        "OMMATID_CHECKOUT": str(checkout),
        "OMMATID_EXPERIMENT": experiment or "",
        "OMMATID_FLOW_RUN": run or "",
    }
    hidden = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}  # set by git for its hooks; they would redirect ours
    return {**{key: value for key, value in os.environ.items() if key not in hidden}, **{k: v for k, v in ours.items() if v}}


@contextmanager
def open_workplace(checkout: Path, params: Params, run: str | None, say: Say) -> Iterator[Workplace]:
    """The place where a run with these params works; an experiment is saved and its worktree removed when the block ends well.

    Raises:
        RunError: the folder is not a checkout with a commit and DVC, or a path in the params cannot be reached from a worktree.
    """
    checkout = checkout.resolve()
    _check(checkout)
    changes = differences(load_params(checkout / "params.yaml"), params)
    if changes:
        say("an experiment: " + ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in _flat(changes).items()))
        with _worktree(checkout, params, changes, run, say) as place:
            yield place
    else:
        with _locked(checkout, "checkout", say):
            yield Workplace(checkout, checkout, run=run)


Changes = dict[tuple[str, ...], tuple[Any, Any]]
_ABSENT = object()


def differences(old: Params, new: Params) -> Changes:
    """The values that differ: path of the key to (old, new); a value that one side lacks is `_ABSENT` there."""
    return dict(_walk(old.model_dump(mode="json"), new.model_dump(mode="json"), ()))


def _walk(old: Mapping[str, Any], new: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[Any, Any]]]:
    for key in {**old, **new}:
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _walk(before, after, (*path, key))
        elif before != after:
            yield (*path, key), (before, after)


def _flat(changes: Changes) -> dict[str, tuple[Any, Any]]:
    return {".".join(path): tuple(None if value is _ABSENT else value for value in pair) for path, pair in changes.items()}  # type: ignore[misc]


def name_experiment(changes: Changes, seed: str) -> str:
    """Such as `train-k-16-3f2a91`: the first overrides to read, and a checksum of everything to tell it from others."""
    words = [f"{'-'.join(path[-2:])}-{new}" for path, (_, new) in changes.items() if new is not _ABSENT]
    more = f"-and-{len(words) - 2}-more" if len(words) > 2 else ""
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", "-".join(words[:2])).strip("-").lower()[:48].strip("-")
    return f"{slug}{more}-{hashlib.sha256(seed.encode()).hexdigest()[:6]}".lstrip("-")


@contextmanager
def _worktree(checkout: Path, params: Params, changes: Changes, run: str | None, say: Say) -> Iterator[Workplace]:
    _refuse_paths_outside(checkout, params)
    head = _git(checkout, "rev-parse", "HEAD")
    snapshot = _snapshot(checkout) or head
    tree = _git(checkout, "rev-parse", f"{snapshot}^{{tree}}")
    name = name_experiment(changes, f"{head} {tree} {params.model_dump_json()}")
    _warn_of_new_files(checkout, say)
    _clear(checkout, name)
    with _locked(checkout, name, say):
        place = Workplace(checkout / WORKTREES / name, checkout, name, run)
        _make_worktree(place, head, snapshot)
        _share_cache(place)
        _write_params(place, params, changes)
        _link_sources(place, params)
        if (checkout / "dvc.lock").exists():
            shutil.copyfile(checkout / "dvc.lock", place.root / "dvc.lock")
        try:
            yield place
            place.dvc("exp", "save", "--name", name, "--force", "--message", f"{name}: Prefect run {run}" if run else name)
        except BaseException:
            say(f"what {name} finished stays in {place.root} for a day; the same run continues there")
            raise
        _remove_worktree(checkout, place.root)
    say(f"saved as DVC experiment {name}: `dvc exp show` compares it, `dvc exp apply {name}` brings it back")


def _snapshot(checkout: Path) -> str | None:
    """A commit of what tracked files hold now, made without touching them; None: they hold what HEAD does."""
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return _git(checkout, "stash", "create") if changed else None


def _make_worktree(place: Workplace, head: str, snapshot: str) -> None:
    if place.root.exists() and _is_worktree(place.root):
        os.utime(place.root)
    else:
        _remove_worktree(place.checkout, place.root)
        _git(place.checkout, "worktree", "add", "--detach", "--no-checkout", str(place.root), head)
    _git(place.root, "read-tree", "-u", "--reset", snapshot)


def _is_worktree(root: Path) -> bool:
    try:
        return Path(_git(root, "rev-parse", "--show-toplevel")).resolve() == root.resolve()
    except RunError:
        return False


def _remove_worktree(checkout: Path, root: Path) -> None:
    if root.exists():
        shutil.rmtree(root)
    _git(checkout, "worktree", "prune")


def _clear(checkout: Path, name: str) -> None:
    """Remove worktrees that nobody works in and nobody came back to."""
    for root in (checkout / WORKTREES).glob("*/"):
        if root.name == name or time.time() - root.stat().st_mtime < KEEP_SECONDS:
            continue
        lock = filelock.FileLock(_lock_path(checkout, root.name), timeout=0)
        try:
            with lock:
                _remove_worktree(checkout, root)
        except filelock.Timeout:
            continue


def _share_cache(place: Workplace) -> None:
    """The checkout's own settings (remotes, credentials), its cache, and DVC's notes about the worktree inside the worktree."""
    config = configparser.ConfigParser(interpolation=None, default_section="")
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config.read(place.checkout / ".dvc/config.local")
    cache = Workplace(place.checkout, place.checkout).dvc("cache", "dir").strip()
    config.read_dict({"cache": {"dir": cache}, "core": {"site_cache_dir": str(place.root / ".dvc/tmp/site")}})
    with (place.root / ".dvc/config.local").open("w", encoding="utf-8") as file:
        config.write(file)


def _write_params(place: Workplace, params: Params, changes: Changes) -> None:
    """The checkout's params.yaml, comments and all, with the changed values."""
    from ruamel.yaml import YAML

    text = YAML()
    text.preserve_quotes = True
    text.width = 10_000
    text.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    values = text.load(place.checkout / "params.yaml")
    for path, (_, new) in changes.items():
        section = values
        for key in path[:-1]:
            section = section[key]
        if new is _ABSENT:
            section.pop(path[-1], None)
        else:
            section[path[-1]] = new
    text.dump(values, place.root / "params.yaml")
    assert load_params(place.root / "params.yaml") == params, f"{place.root}/params.yaml does not hold the run's parameters"


def _link_sources(place: Workplace, params: Params) -> None:
    """Make what the params name by a relative path, and git does not carry, reachable in the worktree."""
    for _, path in _relative_paths(place.checkout, params):
        ours, theirs = place.checkout / path, place.root / path
        if not os.path.lexists(theirs):
            theirs.parent.mkdir(parents=True, exist_ok=True)
            theirs.symlink_to(ours.resolve(), target_is_directory=ours.is_dir())


def _refuse_paths_outside(checkout: Path, params: Params) -> None:
    for key, path in _relative_paths(checkout, params):
        if not Path(os.path.normpath(checkout / path)).is_relative_to(checkout):
            raise RunError(
                f"{key}: {path} leads out of the checkout, where an experiment's worktree cannot follow; "
                f"use the absolute path {(checkout / path).resolve()} in params.yaml and in the run"
            )


def _relative_paths(checkout: Path, params: Params) -> Iterator[tuple[str, str]]:
    """(key, path) of every value that names something in the checkout."""
    for key, value in dotted(params).items():
        for path in filter(_is_relative, _leaves(value)):
            if (checkout / path).exists():
                yield key, path


def _leaves(value: Any) -> Iterator[Any]:
    """The values in lists, and in what lists hold."""
    if isinstance(value, list | dict):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inside)
    else:
        yield value


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not Path(value).is_absolute()


def _warn_of_new_files(checkout: Path, say: Say) -> None:
    new = _git(checkout, "ls-files", "--others", "--exclude-standard", "--", "src", "dvc.yaml", "data").splitlines()
    if new:
        say(f"warning: git does not know {', '.join(new[:5])}; the experiment runs without, `git add` makes them part of it")


def _check(checkout: Path) -> None:
    """Refuse a folder in which no run can work, saying what is missing."""
    try:
        top = Path(_git(checkout, "rev-parse", "--show-toplevel")).resolve()
    except RunError as error:
        if "not a git repository" not in str(error):  # such as a folder of another user's, which git does not trust
            raise
        raise RunError(f"{checkout}: not a git checkout; a run works in a clone of the repository") from None
    if top != checkout:
        raise RunError(f"{checkout}: not the top of its git checkout; run in {top}")
    try:
        _git(checkout, "rev-parse", "--verify", "HEAD")
    except RunError:
        raise RunError(f"{checkout}: the git repository has no commit yet; experiments start from one: commit first") from None
    if not (checkout / "dvc.yaml").exists() or not (checkout / ".dvc").is_dir():
        raise RunError(f"{checkout}: no DVC pipeline here (dvc.yaml and .dvc); run in a clone of the repository")


def _lock_path(checkout: Path, name: str) -> Path:
    return checkout / WORKTREES / f"{name}.lock"


@contextmanager
def _locked(checkout: Path, name: str, say: Say) -> Iterator[None]:
    """One run at a time in one place."""
    path = _lock_path(checkout, name)
    path.parent.mkdir(exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another run works in {name}; waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


_DVC = [sys.executable, "-m", "dvc"]


def _git(root: Path, *arguments: str) -> str:
    who = _identity(root) if arguments[0] == "stash" else {}
    return _ask(["git", *arguments], root, {**environment(root, root), **who}).strip()


def _identity(root: Path) -> dict[str, str]:
    """Whose name experiments carry where git knows nobody, as in a fresh container: it refuses to make a commit then."""
    try:
        known = _ask(["git", "config", "user.email"], root, environment(root, root))
    except RunError:
        known = ""
    who = {"NAME": "ommatid", "EMAIL": "ommatid@localhost"}
    return {} if known else {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}


def _ask(command: list[str], root: Path, env: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started in {root} ({error.strerror}); is it installed, and is the folder there?") from None
    if done.returncode:
        what = " ".join(command).replace(" ".join([*_DVC, "--wait-for-lock"]), "dvc")
        raise RunError(f"{what}: {_error_in(done.stderr.splitlines(), done.returncode)}")
    return done.stdout


def _stream(command: list[str], root: Path, env: Mapping[str, str], say: Say) -> tuple[int, list[str]]:
    """Run a command and pass its lines on as they come.

    It ends with us: by `end` when a block is left, and by sharing our process group, which is what a Prefect worker kills.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as child:  # fmt: skip
        assert child.stdout
        try:
            for line in map(str.rstrip, child.stdout):
                if line and not any(hint in line for hint in _HINTS):
                    lines.append(line)
                    say(line)
            return child.wait(), lines
        except BaseException:
            end(child)
            raise


def end(child: "subprocess.Popen[Any]", seconds: float = 60) -> None:
    """End a child and all that it started; they get so long to do it themselves."""
    try:
        process = psutil.Process(child.pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    end_all(tree, seconds)
    child.wait()


def end_all(tree: Sequence[psutil.Process], seconds: float = 60) -> None:
    """End some processes; they get so long to do it themselves."""
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    until = time.monotonic() + seconds
    while any(map(_runs, tree)) and time.monotonic() < until:
        time.sleep(0.05)
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended yet. A zombie has: only its parent, often init in a container, never asked how."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _error_in(lines: list[str], code: int) -> str:
    """The line that says what went wrong: the stage's own, else what killed it, else DVC's or git's, else the last."""
    if own := _last(lines, "error: "):
        return own
    if killer := _killer(lines, code):
        return killer
    if found := _last(lines, "ERROR: ") or _last(lines, "fatal: "):
        return found
    return next((line for line in reversed(lines) if line.strip()), f"ended with status {code} and no message")


def _last(lines: list[str], start: str) -> str | None:
    return next((line.removeprefix(start) for line in reversed(lines) if line.startswith(start)), None)


_KILLED_BY = {
    signal.SIGKILL: "almost always the system, for want of memory (`dmesg` says so): use less of it, or a machine with more",
    signal.SIGABRT: "a library gave up, most often for want of memory: use less of it, or a machine with more",
    signal.SIGSEGV: "a library crashed: run the stage again, and report it if that happens twice",
    signal.SIGBUS: "a file that was being read was cut short, or the disk failed: check the disk's health (`dmesg`)",
    signal.SIGILL: "a library was built for another kind of processor: install the one for this machine",
    signal.SIGXCPU: "its limit of processor time was reached (`ulimit -t`)",
}
_EXITED = re.compile(r"exited with (-?\d+)")
"""As DVC tells how a stage's command ended."""


def _killer(lines: list[str], code: int) -> str | None:
    """Which signal ended a stage that said nothing itself, and what that means."""
    said = [int(found[1]) for line in lines if (found := _EXITED.search(line))]
    status = said[-1] if said else code
    number = -status if status < 0 else status - 128  # a shell between adds 128
    meaning = next((meaning for known, meaning in _KILLED_BY.items() if known == number), None)
    return f"killed by {signal.Signals(number).name}: {meaning}; what is finished is kept" if meaning else None
