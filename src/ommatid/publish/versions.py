"""Versions of the published files: DVC stores data/published, git commits what names its content, and both are pushed.

Any clone then gets the champion, its predecessors and the log by `git pull` and `dvc pull data/published.dvc`. A commit contains dvc.lock
and data/published.dvc and nothing else, whatever is staged or changed beside them. Failures are said, and never undo a decision: the
next run tries again.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ommatid.compute.commands import dvc, environment, git
from ommatid.errors import RunError
from ommatid.publish.decisions import PUBLISHED, Decision

POINTER = f"{PUBLISHED}.dvc"
"""File in which DVC names the content of data/published."""
FILES = ("dvc.lock", POINTER)
"""Files that a commit contains."""
_UNFINISHED = {
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
}
"""Files in .git while something is under way into which a commit must not fall."""
DVC_PUSH_SECONDS = 6 * 3600.0
"""Time after which a push of data is given up, as a remote that accepts it and then hangs would hold up all later runs."""
GIT_PUSH_SECONDS = 1800.0
"""The same of a push of commits."""
_QUIET = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1",  # bytes per second
    "GIT_HTTP_LOW_SPEED_TIME": "120",  # seconds
}
"""Variables by which git asks nobody for a password, and gives up a server that is silent; those of the user's own come first."""
Say = Callable[[str], None]


def find_branch(root: Path) -> str | None:
    """Return the name of the branch that is checked out; None if HEAD is detached or there is no repository."""
    try:
        return git(root, "symbolic-ref", "--short", "--quiet", "HEAD")
    except RunError:
        return None


def commit(root: Path, made: Decision, branch: str | None, say: Say, warn: Say, is_half_way: bool = False) -> None:
    """Store data/published in DVC, and commit dvc.lock and data/published.dvc to a branch, if data/published differs from what it has.

    Args:
        root: The checkout.
        made: The decision that the message is about.
        branch: Branch that was checked out when the run began; None if HEAD was detached.
        say: Called with one sentence that says what was done.
        warn: Called with one sentence that says why nothing was.
        is_half_way: Whether a run in the checkout is, or may be, half-way, and dvc.lock with it, which is then left out.
    """
    try:
        _check_branch(root, branch)
        dvc(root, environment(root, root), "add", str(PUBLISHED))
        names = [name for name in ((POINTER,) if is_half_way else FILES) if (root / name).exists()]
        if made_commit := _commit_files(root, f"{branch}", names, _message(made)):
            say(f"committed {' and '.join(names)} to {branch} as {made_commit[:12]}")
    except RunError as error:
        warn(f"data/published was not committed: {error}; the next run tries again")


def push(root: Path, branch: str | None, say: Say, warn: Say) -> None:
    """Push what DVC stores and then the branch, unless the last commit of data/published.dvc has been pushed.

    Args:
        root: The checkout.
        branch: The branch.
        say: Called with one sentence that says what was pushed.
        warn: Called with one sentence that says why nothing was.
    """
    try:
        if branch is None or not (last := git(root, "log", "-1", "--format=%H", f"refs/heads/{branch}", "--", POINTER)):
            return
        remote, target = _find_remote(root, branch)
        known = f"refs/remotes/{remote}/{target.removeprefix('refs/heads/')}"
        if git(root, "for-each-ref", known) and not git(root, "rev-list", "-n", "1", last, f"^{known}"):
            return
        dvc(root, environment(root, root), "push", seconds=DVC_PUSH_SECONDS)
        quiet = {key: os.environ.get(key, value) for key, value in _QUIET.items()}
        try:
            git(root, "push", remote, f"refs/heads/{branch}:{target}", variables=quiet, seconds=GIT_PUSH_SECONDS)
        except RunError as error:
            raise RunError(f"{error}; if {remote} has commits that {branch} lacks, run `git pull --rebase`") from None
        say(f"pushed data/published to the DVC remote, and {branch} to {remote}")
    except RunError as error:
        warn(f"the champion was not pushed: {error}; the next run tries again")


def _check_branch(root: Path, branch: str | None) -> None:
    """Check that a commit to the branch is what the user expects.

    Raises:
        RunError: It is not; the message says why.
    """
    now = find_branch(root)
    if branch is None or now is None:
        raise RunError("HEAD is detached, so there is no branch to commit to; check one out")
    if now != branch:
        raise RunError(f"the branch was switched from {branch} to {now} since the run began")
    for name, what in _UNFINISHED.items():
        if (root / git(root, "rev-parse", "--git-path", name)).exists():
            raise RunError(f"a {what} is under way; finish it")


def _commit_files(root: Path, branch: str, names: Sequence[str], message: str) -> str | None:
    """Commit files as they are on disk on top of a branch, by an index of its own; return the commit, None if nothing new was published.

    The user's index gets the same entries for these files before the branch moves: whenever this is cut short, they are at most staged.
    """
    tip = git(root, "rev-parse", "--verify", f"refs/heads/{branch}")
    blobs = {name: git(root, "hash-object", "-w", "--", name) for name in names}
    if blobs[POINTER] == git(root, "rev-parse", "--verify", "--quiet", f"{tip}:{POINTER}", ok=(0, 1)):
        return None
    entries = [part for name, blob in blobs.items() for part in ("--cacheinfo", f"100644,{blob},{name}")]
    with tempfile.TemporaryDirectory() as folder:
        own = {"GIT_INDEX_FILE": f"{folder}/index"}
        git(root, "read-tree", tip, variables=own)
        git(root, "update-index", "--add", *entries, variables=own)
        tree = git(root, "write-tree", variables=own)
    made = git(root, "commit-tree", tree, "-p", tip, "-m", message)
    _check_branch(root, branch)
    git(root, "update-index", "--add", *entries)
    git(root, "update-ref", "-m", "commit: data/published", f"refs/heads/{branch}", made, tip)  # fails if the branch has moved
    return made


def _message(made: Decision) -> str:
    verb = {"rollback": "Roll back to", "promote": "Promote"}.get(made.how, "Publish" if made.decision == "champion" else "Do not publish")
    lines = [f"{verb} {made.challenger.sae}", "", made.reason, *([made.why] if made.why else []), *([f"By {made.who}"] if made.who else [])]
    return "\n".join(lines)


def _find_remote(root: Path, branch: str) -> tuple[str, str]:
    """Find where a branch is pushed to: its upstream, or the branch of the same name of the only remote, or of `origin`.

    Raises:
        RunError: There is no such remote.
    """
    remote, target = (git(root, "config", f"branch.{branch}.{key}", ok=(0, 1)) for key in ("remote", "merge"))
    if remote and target and remote != ".":
        return remote, target
    remotes = git(root, "remote").splitlines()
    if len(remotes) == 1 or "origin" in remotes:
        return remotes[0] if len(remotes) == 1 else "origin", f"refs/heads/{branch}"
    problem = "none of the remotes is origin" if remotes else "there is no remote"
    raise RunError(f"{branch} has no upstream, and {problem}; run `git push -u` once")
