"""The origin of a run: the state of git and DVC and the Prefect flow run, as MLflow tags."""

import hashlib
import os
import subprocess
from pathlib import Path

_SECONDS = 60.0
"""Timeout of git, in seconds; generous, as a large checkout on a busy machine takes several."""


TAGS = {
    "git_commit": "mlflow.source.git.commit",
    "git_dirty": "git.dirty",
    "dvc_experiment": "dvc.experiment",
    "dvc_lock": "dvc.lock",
    "prefect_flow_run_id": "prefect.flow_run",
}
"""Tags of a run, by the column of the relation `runs` that has the same value."""


def origin(is_versioned: bool) -> dict[str, str]:
    """Collect tags that identify the code, the state of DVC and the flow run.

    Args:
        is_versioned: Whether dvc.lock describes these artefacts; it does not if their root lies outside the checkout's own `data`.

    Returns:
        Values by tag; tags whose value is not known are left out.
    """
    values = {
        "mlflow.source.git.commit": _git("rev-parse", "HEAD"),
        "git.dirty": _dirty(),
        "dvc.experiment": os.environ.get("OMMATID_EXPERIMENT"),
        "dvc.lock": _sha256(Path("dvc.lock")) if is_versioned else None,
        "prefect.flow_run": os.environ.get("OMMATID_FLOW_RUN"),
    }
    return {key: value for key, value in values.items() if value}


def _dirty() -> str | None:
    # dvc.lock is excluded because it is a result, not code: every stage that runs changes it
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    return None if status is None else str(bool(status)).lower()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
