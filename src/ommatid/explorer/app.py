"""The explorer's application: its routes, its errors as pages, its static files, and how it is served."""

import asyncio
import gc
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.types import ASGIApp, Receive, Scope, Send

from ommatid import __version__
from ommatid.errors import ConfigError, OmmatidError
from ommatid.explorer import (
    audit,
    classes,
    compare,
    console,
    drift,
    feature,
    features,
    image,
    model,
    monitoring,
    review,
    runs,
    search,
    start,
    steer,
)
from ommatid.explorer.library import CONSOLE_MB, CONSOLE_RETAINED_MB, Library, NoCatalogue, OldCatalogue
from ommatid.explorer.model_client import ModelClient
from ommatid.explorer.security import UPLOADS, Guard, check_exposure, harden, is_local
from ommatid.explorer.web import FOREVER, STATIC, BadRequest, Explorer, Json, NotFound, Settings, asset

SWITCH_SECONDS = 0.001
"""Seconds after which a thread that computes lets another one go on, which usually has an answer of a reader process to pass on."""
PAGES_AT_ONCE = 3
"""Pages that are made at the same time, and as many searches beside them."""
QUICK = (
    "/features",
    "/images",
    "/class",
    "/audit",
    "/drift",
    "/compare",
    "/runs",
    "/review",
    "/thumbs",
    "/heat",
    "/api/features",
    "/api/images",
    "/api/class",
    "/api/audit",
    "/api/drift",
)
"""Beginnings of the addresses whose pages wait for nothing but the catalogue."""
SEARCHES = ("/search",)
"""Beginnings of the addresses of searches."""
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".txt": "text/plain"}
"""Content type of static files, by suffix."""
MOST_PROBLEMS = 10
"""Most parameters whose problems are listed."""


def make_app(settings: Settings) -> FastAPI:
    """Make the application.

    Args:
        settings: How the explorer is run. The catalogue need not exist yet.

    Returns:
        The application, which opens the catalogue at the first request.

    Raises:
        ConfigError: The settings would let other machines in without a token.
    """
    check_exposure(settings)
    console_library = Library(settings.catalog, CONSOLE_MB, answer_mb=32, niceness=10, retained_mb=CONSOLE_RETAINED_MB)
    explorer = Explorer(settings, Library(settings.catalog), console_library, ModelClient(settings.catalog, settings.data))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        explorer.close()

    app = FastAPI(
        title="Ommatid explorer",
        summary="The queries of the explorer's pages, as JSON.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        redirect_slashes=False,
        lifespan=lifespan,
    )
    MultiPartParser.spool_max_size = 2 * max(UPLOADS.values())  # what is uploaded stays in memory
    app.state.explorer = explorer
    for module in (
        start,
        features,
        feature,
        image,
        model,
        search,
        steer,
        classes,
        audit,
        drift,
        compare,
        runs,
        review,
        console,
        monitoring,
    ):
        app.include_router(module.router)
    app.add_api_route("/static/{digest}/{name}", _static, include_in_schema=False)
    app.add_exception_handler(OmmatidError, _explain)
    app.add_exception_handler(RequestValidationError, _explain_parameters)
    app.add_exception_handler(HTTPException, _explain_status)
    app.add_exception_handler(Exception, _explain_fault)
    app.add_middleware(Turnstile)
    app.add_middleware(monitoring.Meter)
    app.add_middleware(Guard, settings=settings, secret=explorer.secret)
    return app


class Turnstile:
    """ASGI middleware that makes few pages at the same time, in the order in which they were asked for.

    More would only take turns on the interpreter's lock and the reader processes: each would take as long as all together. Searches, which
    may wait for the model, hold up no other pages. Addresses that may wait for minutes, or for a long statement, pass by.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lanes = {QUICK: asyncio.Semaphore(PAGES_AT_ONCE), SEARCHES: asyncio.Semaphore(PAGES_AT_ONCE)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, when it is its turn."""
        is_page = scope["type"] == "http" and b"where=" not in scope["query_string"]
        lanes = [free for begins, free in self._lanes.items() if is_page and scope["path"].startswith(begins)]
        async with lanes[0] if lanes else nullcontext():
            await self._app(scope, receive, send)


def serve(settings: Settings) -> None:
    """Serve the explorer until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: The address cannot be used.
    """
    import uvicorn

    from ommatid.explorer.connection import Connection

    sys.setswitchinterval(SWITCH_SECONDS)
    app = make_app(settings)
    config = uvicorn.Config(
        app, settings.host, settings.port, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=5, limit_concurrency=512, h11_max_incomplete_event_size=2**16, lifespan="on",
        http=Connection, ws="none",
    )  # fmt: skip
    try:
        listening = config.bind_socket()
    except (OSError, SystemExit):
        raise ConfigError(
            f"port {settings.port} of {settings.host} cannot be used, probably because it is taken; name another with --port"
        ) from None
    listening.listen(config.backlog)  # before the address is printed, so that whoever reads it is heard
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or a small answer waits 40 ms for the client's acknowledgement
    host, port = listening.getsockname()[:2]
    print(f"explorer  http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    if settings.token:
        place = "this address" if is_local(host) else "the same address of this machine's name"
        print(f"visitors  open {place} once with ?token= and the value of OMMATID_TOKEN at its end", flush=True)
    gc.freeze()  # circular garbage is looked for less often, as in the reader processes
    gc.set_threshold(20_000, 50, 1000)
    uvicorn.Server(config).run(sockets=[listening])


def _static(digest: str, name: str) -> Response:
    try:
        if asset(name) == f"/static/{digest}/{name}":
            content = (STATIC / name).read_bytes()
            return Response(
                content, media_type=TYPES.get(Path(name).suffix, "application/octet-stream"), headers={"cache-control": FOREVER}
            )
    except KeyError:
        pass
    raise NotFound(f"There is no file {name!r} of this version.")


def _respond(request: Request, status: int, title: str, message: str, near: Any = (), hint: str = "") -> Response:
    """Answer with an error, as JSON in the JSON API and as a page elsewhere."""
    if request.url.path.startswith("/api/"):
        return Json({"error": message, "near": dict(near)}, status)
    explorer: Explorer = request.app.state.explorer
    return explorer.render(request, "error.html", status, title=title, message=message, near=dict(near), hint=hint)


def _explain(request: Request, error: Exception) -> Response:
    match error:
        case NotFound():
            return _respond(request, 404, "Not found", str(error), error.near)
        case BadRequest():
            return _respond(request, 400, "That cannot be asked", str(error))
        case OldCatalogue():
            return _respond(request, 503, "An old catalogue", str(error), hint="dvc repro")
        case NoCatalogue():
            return _respond(request, 503, "No catalogue", str(error), hint="make demo")
    return _respond(request, 503, "That did not work", str(error))


def _explain_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(request, 400, "That cannot be asked", _list_problems(error.errors()))


def _list_problems(errors: Sequence[Any]) -> str:
    """Say what is wrong with the parameters of an address, a line each."""
    more = f"\nand {len(errors) - MOST_PROBLEMS:,} more" if len(errors) > MOST_PROBLEMS else ""
    return "\n".join(map(_problem, errors[:MOST_PROBLEMS])) + more


def _problem(error: Any) -> str:
    """Say which parameter of an address is wrong, what came and what is allowed."""
    name = ".".join(str(part) for part in error["loc"][1:])[:200] or "the request"
    given = "" if error["type"] in ("missing", "model_type") else f" got {str(error['input'])[:80]!r};"
    said = "there is no such parameter" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
    return f"{name}:{given} {said[:1].lower()}{said[1:]}"


def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _respond(request, 404, "Not found", f"There is no page {request.url.path[:200]!r}.", {"the start page": "/"})
    return _respond(request, error.status_code, "That cannot be asked", str(error.detail))


def _explain_fault(request: Request, error: Exception) -> Response:
    response = _respond(request, 500, "A fault", "The explorer failed to make this page; its log has the reason.")
    harden(response.headers)  # faults are answered outside the guard
    return response
