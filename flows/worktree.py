"""The git worktree of an experiment: its files, its params.yaml, and its share of the checkout's DVC cache. Imports no Prefect."""

import configparser
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.commands import Say
from flows.dvc_files import LOCK, copy_lock
from ommatid.compute.commands import dvc, environment, git
from ommatid.config import Params, dotted, load_params
from ommatid.errors import RunError

Changes = dict[tuple[str, ...], tuple[Any, Any]]
"""Values that differ between two sets of params: path of the key to (old, new)."""
LOCK_SECONDS = 5.0
"""Age after which a lock of a ref, which is held for milliseconds, was left behind. The user's own DVC may hold one, too."""
ABSENT = object()
"""Stands for a value that one of two sets of params does not have."""


def differences(old: Params, new: Params) -> Changes:
    """Find the values that differ between two sets of params; `ABSENT` stands for a value that one of them lacks."""
    return dict(_walk(old.model_dump(mode="json"), new.model_dump(mode="json"), ()))


def _walk(old: Mapping[str, Any], new: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[Any, Any]]]:
    for key in {**old, **new}:
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _walk(before, after, (*path, key))
        elif before != after:
            yield (*path, key), (before, after)


def take_snapshot(checkout: Path) -> tuple[str, str]:
    """Write the current contents of tracked files as a tree of git, without touching the files or git's index.

    Returns:
        The tree, and the same tree without dvc.lock, which other runs may be changing.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"  # its own, so that neither other runs nor the user's git wait for it or fail
        shutil.copyfile(checkout / git(checkout, "rev-parse", "--git-path", "index"), index)
        own = {"GIT_INDEX_FILE": str(index)}
        git(checkout, "add", "--update", variables=own)
        tree = git(checkout, "write-tree", variables=own)
        git(checkout, "update-index", "--force-remove", LOCK, variables=own)
        return tree, git(checkout, "write-tree", variables=own)


def make_worktree(checkout: Path, root: Path, params: Params, changes: Changes, head: str, snapshot: str) -> None:
    """Make the worktree of an experiment, or bring one left by an earlier run up to date.

    Args:
        checkout: The checkout.
        root: Folder of the worktree.
        params: Params of the experiment.
        changes: How they differ from the checkout's params.yaml.
        head: Commit that the worktree is at.
        snapshot: Tree of the files that it holds.
    """
    if root.exists() and _is_worktree(root):
        os.utime(root)
        for lock in Path(git(root, "rev-parse", "--absolute-git-dir")).glob("*.lock"):  # of a git that was killed
            lock.unlink()
        git(root, "update-ref", "--no-deref", "HEAD", head)  # a killed `dvc exp save` may have moved it
    else:
        remove_worktree(checkout, root)
        # --force twice: also over one that was being made when its run was killed
        git(checkout, "worktree", "add", "--force", "--force", "--detach", "--no-checkout", str(root), head)
    git(root, "read-tree", "-u", "--reset", snapshot)
    _share_cache(checkout, root)
    _write_params(checkout, root, params, changes)
    _link_sources(checkout, root, params)
    copy_lock(checkout, root)


def _is_worktree(root: Path) -> bool:
    try:
        return Path(git(root, "rev-parse", "--show-toplevel")).resolve() == root.resolve()
    except RunError:
        return False


def remove_ref_locks(checkout: Path) -> None:
    """Remove the locks of refs of experiments that a killed DVC has left. The caller knows that no other run saves an experiment."""
    refs = checkout / git(checkout, "rev-parse", "--git-common-dir") / "refs/exps"
    for lock in refs.rglob("*.lock"):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > LOCK_SECONDS:
                lock.unlink()


def remove_worktree(checkout: Path, root: Path) -> None:
    """Remove a worktree and what git has recorded about it."""
    if root.exists():
        shutil.rmtree(root)
    git(checkout, "worktree", "prune")


def _share_cache(checkout: Path, root: Path) -> None:
    """Configure DVC in the worktree with the checkout's own settings (remotes, credentials) and its cache."""
    config = configparser.ConfigParser(interpolation=None, default_section="")
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config.read(checkout / ".dvc/config.local")
    cache = dvc(checkout, environment(checkout, checkout), "cache", "dir").strip()
    # DVC's records about the worktree stay inside it, and go when it is removed
    config.read_dict({"cache": {"dir": cache}, "core": {"site_cache_dir": str(root / ".dvc/tmp/site")}})
    with (root / ".dvc/config.local").open("w", encoding="utf-8") as file:
        config.write(file)


def _write_params(checkout: Path, root: Path, params: Params, changes: Changes) -> None:
    """Write the checkout's params.yaml with the changed values, keeping its comments."""
    from ruamel.yaml import YAML

    text = YAML()
    text.preserve_quotes = True
    text.width = 10_000
    text.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    values = text.load(checkout / "params.yaml")
    for path, (_, new) in changes.items():
        section = values
        for key in path[:-1]:
            section = section[key]
        if new is ABSENT:
            section.pop(path[-1], None)
        else:
            section[path[-1]] = new
    text.dump(values, root / "params.yaml")
    assert load_params(root / "params.yaml") == params, f"{root}/params.yaml does not hold the run's parameters"


def _link_sources(checkout: Path, root: Path, params: Params) -> None:
    """Link files that the params name by a relative path and that git does not track into the worktree."""
    for _, path in _iter_relative_paths(checkout, params):
        original, link = checkout / path, root / path
        if not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(original.resolve(), target_is_directory=original.is_dir())


def check_paths(checkout: Path, params: Params) -> None:
    """Check that the relative paths in the params stay inside the checkout, so that a worktree can hold them too.

    Raises:
        RunError: A path leads out of the checkout.
    """
    for key, path in _iter_relative_paths(checkout, params):
        if not Path(os.path.normpath(checkout / path)).is_relative_to(checkout):
            raise RunError(
                f"{key}: {path} leads out of the checkout, and cannot be reached from an experiment's worktree; "
                f"use the absolute path {(checkout / path).resolve()} in params.yaml and in the run"
            )


def _iter_relative_paths(checkout: Path, params: Params) -> Iterator[tuple[str, str]]:
    """Iterate over the values that name an existing file of the checkout by a relative path, as (key, path)."""
    for key, value in dotted(params).items():
        for path in filter(_is_relative, _iter_leaves(value)):
            if (checkout / path).exists():
                yield key, path


def _iter_leaves(value: Any) -> Iterator[Any]:
    """Iterate over the values inside nested lists and dicts."""
    if isinstance(value, list | dict):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _iter_leaves(inside)
    else:
        yield value


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not Path(value).is_absolute()


def warn_of_untracked_files(checkout: Path, say: Say) -> None:
    """Warn of new files that git does not track and that an experiment therefore runs without."""
    new = git(checkout, "ls-files", "--others", "--exclude-standard", "--", "src", "dvc.yaml", "data").splitlines()
    if new:
        say(f"warning: git does not track {', '.join(new[:5])}; the experiment runs without them, unless you `git add` them")
