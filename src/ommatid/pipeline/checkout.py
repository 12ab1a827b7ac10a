"""The state of the checkout that must not change while a stage or a run works in it: the branch, and the values in params.yaml.

DVC writes dvc.lock when a stage has ended, into whatever branch is checked out then, with the params that it reads then. If somebody
switches the branch or edits params.yaml in between, dvc.lock would say that artefacts were made with values that they were not made with,
and on a branch that has nothing to do with them. So a stage that DVC runs looks again before it publishes its artefact.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ommatid.config import dotted
from ommatid.errors import RunError

PARAMS = "params.yaml"
_SHOWN = 5
"""Number of changed values that a message names; it counts the rest."""
_MISSING = "nothing"


@dataclass(frozen=True)
class CheckoutState:
    """The branch and the params of a checkout at one time."""

    branch: str
    """Name of the branch; the commit if none is checked out, and empty if there is no git."""
    params: Mapping[str, Any]
    """Values in params.yaml by dotted key, not validated; empty if it cannot be read."""

    def explain_change(self, now: "CheckoutState", section: str | None = None) -> str:
        """Say how a later state differs, such as `branch main -> topic, train.k 32 -> 16`; empty if it does not.

        Args:
            now: The later state.
            section: Section of params.yaml that matters; None for all.
        """
        changes = list(self._changes(now, section))
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        return ", ".join(changes[:_SHOWN]) + more

    def _changes(self, now: "CheckoutState", section: str | None) -> Iterator[str]:
        if now.branch != self.branch:
            yield f"branch {self.branch} -> {now.branch}"
        if self.params and not now.params:
            yield f"{PARAMS} cannot be read"
            return
        for key in sorted(self.params.keys() | now.params.keys()):
            before, after = self.params.get(key, _MISSING), now.params.get(key, _MISSING)
            if before != after and (section is None or key.split(".")[0] == section):
                yield f"{key} {before} -> {after}"

    @property
    def way_back(self) -> str:
        """What to do to return to this state, such as `git switch main`."""
        return f"git switch {'--detach ' * (' ' in self.branch)}{self.branch.removeprefix('commit ')}"


def read_checkout(root: Path = Path()) -> CheckoutState:
    """Read the present state of a checkout."""
    return CheckoutState(_branch(root), _params(root / PARAMS))


def watch_stage(name: str, root: Path = Path()) -> "StageWatch | None":
    """Begin to watch the checkout for a stage that DVC runs; None if DVC does not run it, and therefore records nothing."""
    return StageWatch(name, root, read_checkout(root)) if os.environ.get("DVC_STAGE") else None


@dataclass(frozen=True)
class StageWatch:
    """Watches that the checkout stays as it was when a stage began."""

    name: str
    root: Path
    begun: CheckoutState

    def check(self) -> None:
        """Check that the checkout has not changed in a way that concerns the stage.

        Raises:
            RunError: It has; nothing of the stage may be recorded.
        """
        if change := self.begun.explain_change(read_checkout(self.root), self.name):
            raise RunError(
                f"{self.name}: the checkout changed while the stage ran: {change}; nothing is published or recorded in dvc.lock. The "
                f"finished draft is kept until the stage runs with other params: put the checkout back (`{self.begun.way_back}`, "
                f"{PARAMS} as it was) and run again, which publishes it at once; or run again to start with what is here now"
            )


def _branch(root: Path) -> str:
    """Read the branch without git, which takes longer."""
    folder = root / ".git"
    try:
        if folder.is_file():  # a worktree
            folder = root / folder.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return head.removeprefix("ref: refs/heads/") if head.startswith("ref: ") else f"commit {head[:12]}"


def _params(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return dotted(values)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}
