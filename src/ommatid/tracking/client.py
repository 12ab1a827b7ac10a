"""The MLflow client: where the server is, how long to wait for it, and what to say when it does not answer."""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ommatid.errors import RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SAE = "ommatid.sae"
"""Tag of runs, models and versions: the digest of the SAE's manifest."""

_log = logging.getLogger("ommatid.tracking")
_our_timeout = False
T = TypeVar("T")


def _uri() -> str:
    """Where MLflow is: its own variable, else a file of the checkout that the run came from."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_folder() / 'mlflow.db'}"


def _folder() -> Path:
    return Path(os.environ.get("OMMATID_CHECKOUT") or ".").absolute() / ".mlflow"


def database() -> Path | None:
    """The sqlite file in which runs are recorded; None: there is none yet, or they go elsewhere."""
    path = Path(_uri().removeprefix("sqlite:///"))
    return path if _uri().startswith("sqlite:///") and path.exists() else None


def shown_uri() -> str:
    """The URI without the user name and password it may carry."""
    return _public(_uri())


def _public(text: str) -> str:
    secret = urlsplit(_uri()).netloc.rpartition("@")[0]
    return text.replace(f"{secret}@", "") if secret else text


def join_seconds() -> float:
    """How long to wait for a request under way: a file may have to be made or migrated, a server should answer."""
    return 10.0 if _uri().startswith("http") else 60.0


def make_client() -> "MlflowClient":
    """A client of the server that the environment names."""
    import_mlflow()
    from mlflow import MlflowClient

    uri = _uri()
    if uri == f"sqlite:///{_folder() / 'mlflow.db'}":
        _folder().mkdir(parents=True, exist_ok=True)
        follow_move(_folder())
    return MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def follow_move(folder: Path) -> None:
    """Let a store of ours find its files where it is now: MLflow records absolute places, and a checkout may have been moved or copied.

    Args:
        folder: `.mlflow` of a checkout, with mlflow.db and artifacts; nothing happens where there is no store yet.
    """
    path, here = folder / "mlflow.db", (folder.absolute() / "artifacts").as_uri()
    if not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=60)) as store, store:
        for table, column in _PLACES:
            if not store.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)).fetchone():
                continue  # an older MLflow's store, or one that is being made
            begin = f"instr({column}, '/.mlflow/artifacts') + {len('/.mlflow/artifacts')}"
            elsewhere = f"{column} LIKE 'file://%/.mlflow/artifacts%' AND substr({column}, 1, {begin} - 1) <> ?"
            if store.execute(f"SELECT 1 FROM {table} WHERE {elsewhere} LIMIT 1", (here,)).fetchone():
                store.execute(f"UPDATE {table} SET {column} = ? || substr({column}, {begin}) WHERE {elsewhere}", (here, here))


_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's store in which places of files stand."""


def import_mlflow() -> None:
    """Import MLflow, quiet, without telemetry, and unwilling to wait; what the user set in the environment stays."""
    global _our_timeout
    _our_timeout = _our_timeout or "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    ours = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    for key, value in ours.items():
        os.environ.setdefault(key, value)
    import mlflow  # noqa: F401


@contextmanager
def patience() -> Iterator[None]:
    """Files may take a server longer than a few numbers: only used after it has just answered."""
    if not _our_timeout:
        yield
        return
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "120"
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


def quietly(question: Callable[["MlflowClient"], T]) -> T | None:
    """The answer, or None with a warning when there is none; None at once where nothing was ever tracked."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (_folder() / "mlflow.db").exists():
        return None
    try:
        return question(make_client())
    except Exception as error:
        warn(error)
        return None


def ask(question: Callable[["MlflowClient"], T]) -> T:
    """The answer.

    Raises:
        RunError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return question(make_client())
    except (MlflowException, OSError) as error:
        by_server = "start the server, or unset MLFLOW_TRACKING_URI"
        by_file = "another program may hold the file, or another version of MLflow have written it"
        raise RunError(f"MLflow at {shown_uri()}: {_line(error)}; {by_server if _uri().startswith('http') else by_file}") from error


def warn(error: Exception) -> None:
    """Say in one line that tracking does not work."""
    _log.warning("MLflow at %s cannot be used: %s; the stage goes on without it", shown_uri(), _line(error))


def _line(error: Exception) -> str:
    return _public((str(error).splitlines() or [type(error).__name__])[0])[:200]


def experiment_of(client: "MlflowClient") -> str:
    """Id of the experiment, made when missing; on sqlite its files lie beside the database."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ommatid")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    uri = _uri()
    beside = Path(uri.removeprefix("sqlite:///")).absolute().parent / "artifacts" if uri.startswith("sqlite:///") else None
    return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)
