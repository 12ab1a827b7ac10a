"""The MLflow client: where the server is, how long to wait for it, and what to report if it doesn't answer."""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ommatid.compute.collector import collector_paused
from ommatid.errors import RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SAE = "ommatid.sae"
"""Tag of runs, models and versions that holds the digest of the SAE's manifest."""

_log = logging.getLogger("ommatid.tracking")
_our_timeout = False
T = TypeVar("T")


def _uri() -> str:
    """URI of the tracking server: MLflow's own variable, or else a file in the checkout that the run came from."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_folder() / 'mlflow.db'}"


def _folder() -> Path:
    return Path(os.environ.get("OMMATID_CHECKOUT") or ".").absolute() / ".mlflow"


def database() -> Path | None:
    """Path of the SQLite file that records the runs; None if it doesn't exist yet or runs are recorded elsewhere."""
    path = Path(_uri().removeprefix("sqlite:///"))
    return path if _uri().startswith("sqlite:///") and path.exists() else None


def shown_uri() -> str:
    """The tracking URI without user name and password."""
    return _without_credentials(_uri())


def _without_credentials(text: str) -> str:
    secret = urlsplit(_uri()).netloc.rpartition("@")[0]
    return text.replace(f"{secret}@", "") if secret else text


def join_seconds() -> float:
    """Seconds to wait for a request in progress; more for a file, which MLflow may have to create or migrate, than for a server."""
    return 10.0 if _uri().startswith("http") else 60.0


def make_client() -> "MlflowClient":
    """Make a client of the server named by the environment."""
    import_mlflow()
    with collector_paused():
        from mlflow import MlflowClient

    uri = _uri()
    if uri == f"sqlite:///{_folder() / 'mlflow.db'}":
        _folder().mkdir(parents=True, exist_ok=True)
        follow_move(_folder())
    with collector_paused():  # a client imports what its store needs, such as SQLAlchemy
        return MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def follow_move(folder: Path) -> None:
    """Update the paths in a checkout's MLflow store after the checkout was moved or copied, as MLflow records absolute paths.

    Args:
        folder: Folder `.mlflow` of a checkout, with mlflow.db and artifacts; if there is no store yet, nothing happens.
    """
    path, here = folder / "mlflow.db", (folder.absolute() / "artifacts").as_uri()
    if not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=60)) as store, store:
        for table, column in _PLACES:
            if not store.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)).fetchone():
                continue  # the store is still being created, or an older MLflow wrote it
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
"""Tables and columns of MLflow's store that hold paths of files."""


def import_mlflow() -> None:
    """Import MLflow with logging, telemetry and long timeouts turned off; variables that the user has set keep their values."""
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
    with collector_paused():
        import mlflow  # noqa: F401


@contextmanager
def patience() -> Iterator[None]:
    """Allow longer requests inside the block, for uploads to a server that has just answered."""
    if not _our_timeout:
        yield
        return
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "120"
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


def call_or_warn(request: Callable[["MlflowClient"], T]) -> T | None:
    """Call `request` with a client and return its result; None, with a warning, if it fails, or if nothing was ever tracked."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (_folder() / "mlflow.db").exists():
        return None
    try:
        return request(make_client())
    except Exception as error:
        warn(error)
        return None


def call(request: Callable[["MlflowClient"], T]) -> T:
    """Call `request` with a client and return its result.

    Args:
        request: Function that sends requests with the client.

    Returns:
        The result of `request`.

    Raises:
        RunError: The server does not answer, or refuses the request.
    """
    from mlflow.exceptions import MlflowException

    try:
        return request(make_client())
    except (MlflowException, OSError) as error:
        by_server = "start the server, or unset MLFLOW_TRACKING_URI"
        by_file = "another program may have locked the file, or another version of MLflow may have written it"
        raise RunError(f"MLflow at {shown_uri()}: {_first_line(error)}; {by_server if _uri().startswith('http') else by_file}") from error


def warn(error: Exception) -> None:
    """Log a one-line warning that tracking does not work."""
    _log.warning("MLflow at %s cannot be used: %s; the stage goes on without it", shown_uri(), _first_line(error))


def _first_line(error: Exception) -> str:
    return _without_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]


def experiment_of(client: "MlflowClient") -> str:
    """Return the id of the experiment, creating it if it is missing; with SQLite, its files are stored beside the database."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ommatid")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    uri = _uri()
    beside = Path(uri.removeprefix("sqlite:///")).absolute().parent / "artifacts" if uri.startswith("sqlite:///") else None
    return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)
