"""Prefect servers: the one that a flow reports to, which is the one at PREFECT_API_URL or a temporary one, and the one of `make up`.

Also, how failures of flows are logged.
"""

import atexit
import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prefect import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.commands import take_no_arguments
from flows.processes import POLICY, Services, free_port
from ommatid.cli.error_boundary import at_edge
from ommatid.errors import OmmatidError, RunError, without_credentials

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from prefect import Flow
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PORTS = range(8000, 9000)
"""Ports of temporary servers; one is chosen at random, so that two runs started at the same time rarely collide."""
EARLIER_EVENT = timedelta(seconds=5)
"""Time for which an automation waits for the event that comes before its own."""
_TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""Settings that Prefect uses for its own temporary servers: no UI, and only the services that a short run needs."""


@contextmanager
def prefect_server() -> Iterator[None]:
    """Make sure that a Prefect server answers before the block begins, starting a temporary one if PREFECT_API_URL is not set.

    A temporary server ends with this process. We don't use the one that Prefect itself would start, as it prints to our output, may be
    dead for minutes before anybody notices, and is abandoned if an answer takes more than five seconds, as can happen on a busy machine.

    Raises:
        RunError: The server does not answer or refuses, the temporary one does not start, or the server goes away during the block.
    """
    url = PREFECT_API_URL.value()
    if not url:  # Prefect treats an empty value as unset
        url = _start_temporary()
    else:
        _check(url)
    try:
        yield
    except httpx.TransportError as error:
        raise RunError(
            f"the Prefect server at {without_credentials(url)} went away: {_root_cause(error)}; start it and run again: "
            "what is finished is kept"
        ) from error


def _start_temporary() -> str:
    port = free_port(random.choice(PORTS))
    url = f"http://127.0.0.1:{port}/api"
    server = Services({**os.environ, **_TEMPORARY}, Path(PREFECT_HOME.value()) / "logs")
    stack = ExitStack()
    atexit.register(stack.close)  # no earlier, as Prefect sends its last log lines when the interpreter exits
    stack.callback(server.end)
    create = ("uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error")
    server.start("temporary-server", *create, "--host", "127.0.0.1", "--port", str(port))
    server.wait_for("temporary-server", f"{url}/health")
    stack.enter_context(temporary_settings({PREFECT_API_URL: url}))
    return url


def create_app() -> "ASGIApp":
    """Make the application of the server of `make up`: Prefect's, but no page of it reaches another host, and messages come at once.

    The second UI, which asks an analytics host, is left out. Other pages ask for logos, and are told not to. An automation waits a quarter
    of an hour for the event that comes before its own, and there is none before the first of a run that a schedule made or, after a
    restart, of a run from before.
    """
    import prefect
    from prefect.server.api import server
    from prefect.server.events.ordering import memory

    import flows.messages  # noqa: F401  (registers the block that sends them)

    assert hasattr(prefect, "__ui_v2_static_path__"), "this version of Prefect keeps its second UI elsewhere"
    prefect.__ui_v2_static_path__ = Path(os.devnull) / "none"
    assert hasattr(memory, "PRECEDING_EVENT_LOOKBACK"), "this version of Prefect keeps the wait for earlier events elsewhere"
    memory.PRECEDING_EVENT_LOOKBACK = EARLIER_EVENT  # pyright: ignore[reportPrivateImportUsage]
    return lock_to_resume(_stay_here(server.create_app(final=True)))


def lock_to_resume(app: "ASGIApp") -> "ASGIApp":
    """Let requests that resume a run wait for SQLite's lock before they read.

    Prefect's transaction reads first, and if anybody else writes before it does, SQLite refuses it at once: "database is locked". All that
    the person who presses Submit sees is that something went wrong. Other writing requests take the lock first in Prefect itself.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    is_resuming = ContextVar("is_resuming", default=False)
    begin = AioSqliteConfiguration.begin_transaction

    @asynccontextmanager
    async def begin_transaction(
        self: AioSqliteConfiguration, session: "AsyncSession", with_for_update: bool = False
    ) -> "AsyncGenerator[AsyncSessionTransaction, None]":
        async with begin(self, session, with_for_update or is_resuming.get()) as transaction:
            yield transaction

    AioSqliteConfiguration.begin_transaction = begin_transaction

    async def wrapped(scope: "Scope", receive: "Receive", send: "Send") -> None:
        token = is_resuming.set(scope["type"] == "http" and scope["path"].endswith("/resume"))
        try:
            await app(scope, receive, send)
        finally:
            is_resuming.reset(token)

    return wrapped


def _stay_here(app: "ASGIApp") -> "ASGIApp":
    """Add a Content-Security-Policy with which browsers ask no host but the page's own."""

    async def wrapped(scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await app(scope, receive, send_with_policy)

    return wrapped


def _check(url: str) -> None:
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except (RuntimeError, PrefectHTTPStatusError) as error:
        problem = error
    if problem is not None:
        raise RunError(
            f"the Prefect server at {without_credentials(url)} (PREFECT_API_URL) cannot be used: {_root_cause(problem)}; "
            "start it, or correct the address, or unset PREFECT_API_URL to run with a temporary server"
        ) from problem


def _root_cause(error: BaseException) -> str:
    """First line of the error at the root of another, as Prefect wraps errors of the connection."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def run_once(flow: "Flow[..., Any]", description: str | None, fault: OmmatidError | None = None) -> None:
    """Run a flow as the main program, on a temporary Prefect server if PREFECT_API_URL is not set.

    Args:
        flow: The flow, whose parameters have defaults.
        description: What `--help` prints.
        fault: Why it cannot run, if that is known before a server is started.
    """
    take_no_arguments(f"flows.{flow.name}", description)
    leave_out_tracebacks(Exception)  # `at_edge` writes tracebacks to a file
    with at_edge():
        if fault:
            raise fault
        with prefect_server():
            flow()


class _WithoutTraceback(logging.Filter):
    """Log filter that drops the traceback of errors of some kinds, whose message is enough."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        super().__init__()
        self._kinds = kinds

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], self._kinds):
            record.exc_info = None
        return True


def leave_out_tracebacks(*kinds: type[BaseException]) -> None:
    """Log flow and task failures with errors of these kinds on one line."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_WithoutTraceback(*kinds))


leave_out_tracebacks(OmmatidError)
