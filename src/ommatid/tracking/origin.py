"""Where a run comes from: git, DVC and Prefect, as tags."""

import hashlib
import os
import subprocess
from pathlib import Path

_SECONDS = 60.0
"""After which git is taken to hang; on a busy machine a large checkout takes seconds."""


def origin(is_versioned: bool) -> dict[str, str]:
    """Tags that name the code, the DVC state and the flow run; what is not known is left out.

    Args:
        is_versioned: Whether dvc.lock is about these artefacts: not where they are below another root than the checkout's.
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
    # dvc.lock changes with every stage that runs: it is a result, not code
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
