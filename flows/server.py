"""The Prefect server that a flow reports to, named by PREFECT_API_URL or a temporary one, and what its log says of a failure."""

import atexit
import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from prefect import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.services import Services, free_port
from ommatid.errors import OmmatidError, RunError, without_credentials

PORTS = range(8000, 9000)
"""Of temporary servers; drawn, so that two runs that start at once do not meet."""
_TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""What Prefect sets for a temporary server of its own: no pages, and only the services that a short run needs."""


@contextmanager
def prefect_server() -> Iterator[None]:
    """A server that answers, found before any work begins; without PREFECT_API_URL a temporary one, which ends with this process.

    Prefect would start a temporary server by itself. That one prints into our output, may be dead for minutes before anybody notices,
    and is given up where an answer takes more than five seconds, as happens on a busy machine.

    Raises:
        RunError: the server does not answer, or refuses, or the temporary one did not start; or it went away during the block.
    """
    url = PREFECT_API_URL.value()
    if not url:  # an empty one is none to Prefect
        url = _start_temporary()
    else:
        _ask(url)
    try:
        yield
    except httpx.TransportError as error:
        raise RunError(
            f"the Prefect server at {without_credentials(url)} went away: {_cause(error)}; start it and run again: what finished stays"
        ) from error


def _start_temporary() -> str:
    port = free_port(random.choice(PORTS))
    url = f"http://127.0.0.1:{port}/api"
    server = Services({**os.environ, **_TEMPORARY}, Path(PREFECT_HOME.value()) / "logs")
    stack = ExitStack()
    atexit.register(stack.close)  # not earlier: Prefect sends its last log lines when the interpreter ends
    stack.callback(server.end)
    create = ("uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error")
    server.start("temporary-server", *create, "--host", "127.0.0.1", "--port", str(port))
    server.wait_for("temporary-server", f"{url}/health")
    stack.enter_context(temporary_settings({PREFECT_API_URL: url}))
    return url


def _ask(url: str) -> None:
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except (RuntimeError, PrefectHTTPStatusError) as error:
        problem = error
    if problem is not None:
        raise RunError(
            f"the Prefect server at {without_credentials(url)} (PREFECT_API_URL) cannot be used: {_cause(problem)}; "
            "start it, or correct the address, or unset PREFECT_API_URL to run with a temporary server"
        ) from problem


def _cause(error: BaseException) -> str:
    """First line of what lies behind an error: Prefect wraps what the connection said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class _WithoutTraceback(logging.Filter):
    """Leaves the traceback of some kinds of errors out of the log: their message says all there is to say."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        super().__init__()
        self._kinds = kinds

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], self._kinds):
            record.exc_info = None
        return True


def leave_out_tracebacks(*kinds: type[BaseException]) -> None:
    """Log errors of these kinds that end a flow or a task in one line."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_WithoutTraceback(*kinds))


leave_out_tracebacks(OmmatidError)
