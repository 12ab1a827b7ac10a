"""Copies of the tree in which tests follow the recipes of docs/developers, and the proof that only the named files were touched.

A recipe lists its files as bullets below the heading `## Files`, each beginning with the path in backticks. In a path, `<...>`
stands for one name.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from support.processes import HANG_SECONDS
from support.study import CHECKOUT

COUNTED = ("src", "flows", "infra", "params.yaml", "dvc.yaml")
"""Files and folders whose changes a recipe counts; documentation and tests come on top."""


@dataclass(frozen=True)
class Tree:
    """A copy of the counted files in `root`."""

    root: Path

    def replace(self, path: str, old: str, new: str) -> None:
        """Replace `old`, which must occur exactly once in the file, with `new`."""
        text = (self.root / path).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
        self.write(path, text.replace(old, new))

    def write(self, path: str, text: str) -> None:
        """Write a file, new or not."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command that imports the packages of this copy; returns its output.

        Args:
            command: Program and arguments; `python` is the interpreter of the tests.
            cwd: Where it runs; else the root of the copy.

        Raises:
            AssertionError: The command failed; the message has all that it wrote.
        """
        command = tuple(sys.executable if word == "python" else word for word in command)
        paths = (self.root / "src", self.root, CHECKOUT / "tests")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(command, cwd=cwd or self.root, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def changed(self) -> list[str]:
        """Counted files that are new, gone or different from the checkout's, sorted."""
        ours, theirs = _counted(self.root), _counted(CHECKOUT)
        kept = {path for path in ours & theirs if cmp(self.root / path, CHECKOUT / path, shallow=False)}
        return sorted((ours | theirs) - kept)


def copy_tree(root: Path) -> Tree:
    """Copy the counted files, and pyproject.toml, into `root`."""
    for name in (*COUNTED, "pyproject.toml"):
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            root.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, root / name)
    return Tree(root)


def assert_only_named(tree: Tree, page: str) -> None:
    """Check that the changed files are exactly those that the recipe docs/developers/`page` names."""
    named, changed = files_of(page), tree.changed()
    for path in named:
        assert sum(_fits(path, file) for file in changed) == 1, f"{page} names {path}, changed were {changed}"
    assert [file for file in changed if not any(_fits(path, file) for path in named)] == []


def files_of(page: str) -> list[str]:
    """Return the paths that a recipe lists below its heading `## Files`."""
    text = (CHECKOUT / "docs/developers" / page).read_text(encoding="utf-8")
    section = re.search(r"^## Files\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{page} has no heading '## Files'"
    return re.findall(r"^[-*] `([^`]+)`", section[1], re.MULTILINE)


def blocks_of(page: str, language: str = "python") -> list[str]:
    """Return the blocks of code in one language that a recipe shows, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (CHECKOUT / "docs/developers" / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def _fits(path: str, file: str) -> bool:
    """Return whether a file matches a path in which `<...>` stands for a name."""
    return re.fullmatch("[^/]+".join(map(re.escape, re.split(r"<[^>]+>", path))), file) is not None


def _counted(root: Path) -> set[str]:
    files = (path for name in COUNTED for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name]))
    return {path.relative_to(root).as_posix() for path in files if path.is_file() and "__pycache__" not in path.parts}
