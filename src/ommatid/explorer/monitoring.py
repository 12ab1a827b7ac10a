"""What machines ask of the explorer: its health, its metrics, and what robots may read."""

import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ommatid.errors import QueryError
from ommatid.explorer.web import Json, TheExplorer

router = APIRouter(include_in_schema=False)

_REGISTRY = CollectorRegistry()
_REQUESTS = Counter(
    "ommatid_explorer_requests", "Requests, by the pattern of their address and the status.", ["route", "status"], registry=_REGISTRY
)
_SECONDS = Histogram(
    "ommatid_explorer_request_seconds",
    "Seconds from the arrival of a request to the end of its answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
    registry=_REGISTRY,
)
_UP = Gauge("ommatid_explorer_catalogue_readable", "1 if the catalogue can be read, else 0.", registry=_REGISTRY)


class Meter:
    """ASGI middleware that counts and times requests by route, so that addresses with numbers do not become metrics of their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record its route, status and time."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            _REQUESTS.labels(route, str(status)).inc()
            _SECONDS.labels(route).observe(time.perf_counter() - began)


@router.get("/health")
def health(explorer: TheExplorer) -> Response:
    """Answer 200 if the catalogue can be read, else 503 with the reason, unless visitors need a token, which this address does not."""
    found = _check(explorer)
    if explorer.settings.token:
        found.pop("reason", None)
    return Json(found, 200 if found["status"] == "ok" else 503)


@router.get("/metrics")
def metrics(explorer: TheExplorer) -> Response:
    """Answer the metrics in Prometheus's text format."""
    _UP.set(_check(explorer)["status"] == "ok")
    return Response(generate_latest(_REGISTRY), media_type=CONTENT_TYPE_LATEST)


@router.get("/robots.txt")
def robots() -> Response:
    """Ask robots to stay away, as every page is made on request."""
    return PlainTextResponse("User-agent: *\nDisallow: /\n")


def _check(explorer: TheExplorer) -> dict[str, Any]:
    try:
        with explorer.library.open() as opened:
            opened.rows("SELECT 1")
    except QueryError as error:
        return {"status": "no catalogue", "reason": str(error)}
    return {"status": "ok"}
