"""The git worktree of an experiment: its files, its params.yaml, and its share of the checkout's DVC cache. Imports no Prefect."""

import configparser
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.commands import Say
from ommatid.compute.commands import dvc, environment, git
from ommatid.config import Params, dotted, load_params
from ommatid.errors import RunError

Changes = dict[tuple[str, ...], tuple[Any, Any]]
"""Values that differ between two sets of params: path of the key to (old, new)."""
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


def take_snapshot(checkout: Path) -> str | None:
    """Commit the current contents of tracked files without touching them; return the commit, or None if nothing differs from HEAD."""
    changed = git(checkout, "status", "--porcelain", "--untracked-files=no")
    return git(checkout, "stash", "create") if changed else None


def make_worktree(checkout: Path, root: Path, params: Params, changes: Changes, head: str, snapshot: str) -> None:
    """Make the worktree of an experiment, or bring one left by an earlier run up to date.

    Args:
        checkout: The checkout.
        root: Folder of the worktree.
        params: Params of the experiment.
        changes: How they differ from the checkout's params.yaml.
        head: Commit that the worktree is at.
        snapshot: Commit whose files it holds.
    """
    if root.exists() and _is_worktree(root):
        os.utime(root)
    else:
        remove_worktree(checkout, root)
        git(checkout, "worktree", "add", "--detach", "--no-checkout", str(root), head)
    git(root, "read-tree", "-u", "--reset", snapshot)
    _share_cache(checkout, root)
    _write_params(checkout, root, params, changes)
    _link_sources(checkout, root, params)
    if (checkout / "dvc.lock").exists():
        shutil.copyfile(checkout / "dvc.lock", root / "dvc.lock")


def _is_worktree(root: Path) -> bool:
    try:
        return Path(git(root, "rev-parse", "--show-toplevel")).resolve() == root.resolve()
    except RunError:
        return False


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
