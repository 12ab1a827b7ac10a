"""The guard in front of every page: who may ask, from where, how much may be sent, and what a browser may do with the answer."""

import hashlib
import hmac
import ipaddress
import secrets
import time
from asyncio import timeout
from collections import deque
from http.cookies import CookieError, SimpleCookie
from typing import Annotated
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Form, Header, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ommatid.errors import ConfigError
from ommatid.explorer.web import BadRequest, Settings

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), browsing-topics=()",
}
"""Headers of every answer."""
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""
OPEN = ("/health", "/robots.txt")
"""Addresses that need no token."""
COOKIE = "ommatid"
"""Cookie with the visitor's session, signed if a token is required."""
MOST_BYTES = 2**18
"""Largest body of a request, in bytes, except those of `UPLOADS`."""
UPLOADS = {
    "/my-image": 32 * 2**20,
    "/api/my-image": 32 * 2**20,
    "/search": 32 * 2**20,
    "/api/search": 32 * 2**20,
    "/review/import": 8 * 2**20,
}
"""Largest body of the addresses that take files, in bytes."""
BODY_SECONDS = 60.0
"""Seconds in which a request's body has to arrive."""
MOST_WRONG, WINDOW = 10, 60.0
"""Wrong tokens after which an address is refused, and the seconds for which each is remembered."""


def is_local(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(settings: Settings) -> None:
    """Refuse to serve other machines without a token.

    Raises:
        ConfigError: The address can be reached from other machines, and there is no token, or one that could be guessed.
    """
    if not is_local(settings.host) and not settings.token:
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines, so visitors need a token: set OMMATID_TOKEN to a secret of at "
            "least 16 characters, such as one that `python -c 'import secrets; print(secrets.token_urlsafe())'` prints, or leave out --host"
        )
    if settings.token is not None and (len(settings.token) < 16 or not settings.token.isascii() or not settings.token.isprintable()):
        raise ConfigError("OMMATID_TOKEN is too short or not plain text: set it to at least 16 printable ASCII characters")


class TooLarge(Exception):
    """A request's body exceeds its limit."""


class Guard:
    """ASGI middleware that lets requests through to the pages.

    Args:
        app: The application behind it.
        settings: How the explorer is run.
        secret: Key with which sessions are signed.
    """

    def __init__(self, app: ASGIApp, settings: Settings, secret: bytes) -> None:
        self._app = app
        self._settings = settings
        self._secret = secret
        self._wrong: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with the visitor's session in `scope["session"]`."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return  # no page uses websockets
        headers = Headers(scope=scope)
        session, is_known = self._session(headers)
        scope["session"], scope["secret"] = session, self._secret

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answered.setdefault(name, value)
                answered.setdefault("cache-control", "no-store")
                if not is_known and not self._settings.token and message["status"] < 400:
                    answered.append("set-cookie", self._cookie(session))
            await send(message)

        if refusal := self._refusal(scope, headers) or self._challenge(scope, headers, is_known):
            return await refusal(scope, receive, send_guarded)
        limit = UPLOADS.get(scope["path"], MOST_BYTES)
        if (given := headers.get("content-length", "0")).isdecimal() and int(given) > limit:
            return await _too_large(limit)(scope, receive, send_guarded)
        left, is_started = limit, False

        async def receive_limited() -> Message:
            nonlocal left
            if left < 0:
                return {"type": "http.disconnect"}
            async with timeout(BODY_SECONDS if scope["method"] not in SAFE else None):
                message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise TooLarge
            return message

        async def send_noted(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send_guarded(message)

        try:
            await self._app(scope, receive_limited, send_noted)
        except (TooLarge, TimeoutError):
            if is_started:
                raise
            answer = _too_large(limit) if left < 0 else PlainTextResponse("The request did not arrive in time.", 408)
            await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Refuse requests that another site makes a visitor's browser send."""
        host = headers.get("host", "")
        if is_local(self._settings.host) and not is_local(urlsplit(f"//{host}").hostname or ""):
            # a name of another site that resolves to this machine (DNS rebinding)
            return PlainTextResponse(f"Ask http://{self._settings.host}:{self._settings.port}/ instead.", 421)
        if scope["method"] in SAFE:
            return None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_foreign = site not in (None, "same-origin") or (origin is not None and urlsplit(origin).netloc != host)
        return PlainTextResponse("This request comes from another site; use the explorer's own pages.", 403) if is_foreign else None

    def _challenge(self, scope: Scope, headers: Headers, is_known: bool) -> Response | None:
        """Ask for the token, or exchange it for a cookie."""
        token = self._settings.token
        if token is None or is_known or scope["path"] in OPEN:
            return None
        client = (scope.get("client") or ("unknown", 0))[0]
        parameters = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for name, value in parameters if name == "token"), None)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        offered = given if given is not None else bearer or None
        if offered is None:
            return PlainTextResponse(
                "A token is needed: open the address that ends in ?token=..., or send Authorization: Bearer <token>.", 401
            )
        if self._is_blocked(client):
            return PlainTextResponse("Too many wrong tokens; try again in a minute.", 429, {"retry-after": str(int(WINDOW))})
        if not hmac.compare_digest(hashlib.sha256(offered.encode()).digest(), hashlib.sha256(token.encode()).digest()):
            self._wrong.setdefault(client, deque(maxlen=MOST_WRONG)).append(time.monotonic())
            return PlainTextResponse("The token is wrong.", 401)
        if given is None:
            return None
        # the token leaves the address at once, so that it does not stay in the history or in links
        rest = urlencode([(name, value) for name, value in parameters if name != "token"])
        answer = RedirectResponse("/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else ""), 303)
        answer.headers.append("set-cookie", self._cookie(scope["session"]))
        return answer

    def _is_blocked(self, client: str) -> bool:
        now = time.monotonic()
        for address in [address for address, times in self._wrong.items() if times[-1] < now - WINDOW]:
            del self._wrong[address]
        times = self._wrong.get(client, ())
        return len(times) == MOST_WRONG and times[0] > now - WINDOW

    def _session(self, headers: Headers) -> tuple[str, bool]:
        """Return the visitor's session, a new one if there is none, and whether the visitor had one that this server signed."""
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            found = None
        session, _, signature = (found.value if found else "").partition(".")
        if session and hmac.compare_digest(signature.encode(), self._sign(session).encode()):
            return session, True
        return secrets.token_urlsafe(16), False

    def _sign(self, session: str) -> str:
        return hmac.new(self._secret, b"session:" + session.encode(), hashlib.sha256).hexdigest()

    def _cookie(self, session: str) -> str:
        return f"{COOKIE}={session}.{self._sign(session)}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"


def _too_large(limit: int) -> Response:
    return PlainTextResponse(f"The request is too large; at most {limit / 2**20:g} MiB are taken here.", 413)


def form_token(request: Request) -> str:
    """Token that proves that a form came from a page of this server, shown to this visitor."""
    return hmac.new(request.scope["secret"], b"form:" + request.scope["session"].encode(), hashlib.sha256).hexdigest()


def check_form(
    request: Request, csrf: Annotated[str | None, Form()] = None, x_csrf: Annotated[str | None, Header(alias="x-csrf-token")] = None
) -> None:
    """Check the token of a form; a dependency of every route that changes something.

    Raises:
        BadRequest: The token is missing or wrong.
    """
    if not hmac.compare_digest((csrf or x_csrf or "").encode(), form_token(request).encode()):
        raise BadRequest("This form is too old, as the server has been restarted since; reload the page and send it again.")


def check_program(request: Request, authorization: Annotated[str, Header()] = "", x_csrf_token: Annotated[str, Header()] = "") -> None:
    """Check that a request to the JSON API which changes something was not made by another site; a dependency of such routes.

    Raises:
        BadRequest: It has neither the server's token as `Authorization: Bearer` nor a form's token as `X-CSRF-Token`.
    """
    token: str | None = request.app.state.explorer.settings.token
    bearer = authorization.removeprefix("Bearer ").encode()
    if token and hmac.compare_digest(hashlib.sha256(bearer).digest(), hashlib.sha256(token.encode()).digest()):
        return
    if not hmac.compare_digest(x_csrf_token.encode(), form_token(request).encode()):
        raise BadRequest(
            "Send the token that GET /api/review/csrf answers as X-CSRF-Token, with its cookie, or Authorization: Bearer <token>."
        )
