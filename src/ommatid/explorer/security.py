"""The guard in front of every page: who may ask, from where, how much may be sent, and what a browser may do with the answer."""

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from asyncio import get_running_loop, timeout_at
from collections import deque
from typing import Annotated
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from fastapi import Form, Header, HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ommatid.errors import ConfigError
from ommatid.explorer.model_client import MAX_UPLOAD
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
"""Beginning of the name of the cookie with the visitor's session; the port follows, as browsers share cookies between ports."""
MOST_BYTES = 2**18
"""Largest body of a request, in bytes, except those of `UPLOADS`."""
UPLOADS = {
    "/my-image": MAX_UPLOAD + MOST_BYTES,
    "/api/my-image": MAX_UPLOAD + MOST_BYTES,
    "/steer": MAX_UPLOAD + MOST_BYTES,
    "/attribute": MAX_UPLOAD + MOST_BYTES,
    "/search": MAX_UPLOAD + MOST_BYTES,
    "/review/import": 8 * 2**20,
}
"""Largest body of the addresses that take files, in bytes."""
BODY_SECONDS = 60.0
"""Seconds within which the whole body of a request has to arrive."""
MOST_WRONG, WINDOW = 10, 60.0
"""Wrong tokens after which an address is refused, and the seconds for which each is remembered."""
MOST_ADDRESSES = 1000
"""Addresses with wrong tokens after which a new address is refused: somebody guesses from many."""
LEAST_TOKEN, LEAST_DIFFERENT = 16, 8
"""Fewest characters of a token, and fewest different ones."""


def is_local(host: str) -> bool:
    """Return whether a host, as in an address to listen on, is this machine and reached from it alone."""
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
    if settings.token is not None and not (
        re.fullmatch(rf"[!-~][ -~]{{{LEAST_TOKEN - 2},998}}[!-~]", settings.token) and len(set(settings.token)) >= LEAST_DIFFERENT
    ):
        raise ConfigError(
            f"OMMATID_TOKEN can be guessed or is not plain text: set it to at least {LEAST_TOKEN} ASCII characters, no blank at an end, "
            f"of which {LEAST_DIFFERENT} differ, such as `python -c 'import secrets; print(secrets.token_urlsafe())'` prints"
        )


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
            return await send({"type": "websocket.close", "code": 1008})  # no page uses websockets
        headers = Headers(scope=scope)
        session, is_known = self._session(headers)
        scope["session"], scope["secret"] = session, self._secret

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                harden(answered)
                if self._settings.token:  # no cache that people share may keep what needs a token
                    answered["cache-control"] = answered["cache-control"].replace("public", "private")
                is_kept = answered["cache-control"] != "no-store"  # and shared: a cache would give the session to others
                if not is_known and not self._settings.token and message["status"] < 400 and not is_kept:
                    answered.append("set-cookie", self._cookie(scope, headers))
            await send(message)

        if refusal := self._refusal(scope, headers) or self._challenge(scope, headers, is_known):
            return await refusal(scope, receive, send_guarded)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves out the body
        await self._app(scope, _limited(scope, headers, receive), send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Refuse requests that another site makes a visitor's browser send, and bodies in encodings that hide what they hold."""
        host = headers.get("host", "")
        if not self._settings.token and not is_local(_hostname(host)):
            # a name of another site that resolves to this machine (DNS rebinding); where a token is needed, that site has no cookie
            return PlainTextResponse(f"Ask http://{self._settings.host}:{self._settings.port}/ instead.", 421)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_foreign = site not in (None, "same-origin", "none") or (origin is not None and _netloc(origin) != host)
        if scope["method"] in SAFE:
            # links from other sites are followed; their pages can neither embed ours nor run statements by asking for pictures
            is_link = headers.get("sec-fetch-mode", "navigate") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
            return _foreign() if is_foreign and not is_link else None
        if is_foreign or site == "none":
            return _foreign()
        kind = headers.get("content-type", "").lower()
        if kind.count("charset") != len(re.findall(r';\s*charset="?utf-8"?\s*(?:;|$)', kind)):
            return PlainTextResponse("Send text as UTF-8.", 415)  # others, such as unicode_escape, make texts that no page can show
        return None

    def _challenge(self, scope: Scope, headers: Headers, is_known: bool) -> Response | None:
        """Ask for the token, or exchange it for a cookie."""
        token = self._settings.token
        parameters = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True) if b"token" in scope["query_string"] else []
        given = next((value for name, value in parameters if name == "token"), None) if scope["method"] in SAFE else None
        if token is None or is_known:
            return None if given is None else _without_token(scope, parameters)
        if scope["path"] in OPEN:
            return None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        offered = given if given is not None else bearer.strip() if kind.lower() == "bearer" else None
        if offered is None:
            return PlainTextResponse(
                "A token is needed: open the address that ends in ?token=..., or send Authorization: Bearer <token>.",
                401,
                {"www-authenticate": "Bearer"},
            )
        address = _address(scope)
        if self._is_blocked(address):
            return PlainTextResponse("Too many wrong tokens; try again in a minute.", 429, {"retry-after": str(int(WINDOW))})
        if not hmac.compare_digest(hashlib.sha256(offered.encode()).digest(), hashlib.sha256(token.encode()).digest()):
            self._wrong.setdefault(address, deque(maxlen=MOST_WRONG)).append(time.monotonic())
            return PlainTextResponse("The token is wrong.", 401, {"www-authenticate": "Bearer"})
        if given is None:
            return None
        answer = _without_token(scope, parameters)
        answer.headers.append("set-cookie", self._cookie(scope, headers))
        return answer

    def _is_blocked(self, address: str) -> bool:
        now = time.monotonic()
        for old in [address for address, times in self._wrong.items() if times[-1] < now - WINDOW]:
            del self._wrong[old]
        times = self._wrong.get(address, ())
        return len(self._wrong) >= MOST_ADDRESSES if not times else len(times) == MOST_WRONG and times[0] > now - WINDOW

    def _session(self, headers: Headers) -> tuple[str, bool]:
        """Return the visitor's session, a new one if there is none, and whether the visitor had one that this server signed."""
        session, _, signature = cookie_parser(headers.get("cookie", "")).get(_cookie_name(headers), "").partition(".")
        if session and hmac.compare_digest(signature.encode(), self._sign(session).encode()):
            return session, True
        return secrets.token_urlsafe(16), False

    def _sign(self, session: str) -> str:
        return hmac.new(self._secret, b"session:" + session.encode(), hashlib.sha256).hexdigest()

    def _cookie(self, scope: Scope, headers: Headers) -> str:
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        value = f"{scope['session']}.{self._sign(scope['session'])}"
        return f"{_cookie_name(headers)}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000{secure}"


def _foreign() -> Response:
    return PlainTextResponse("This request comes from another site; use the explorer's own pages.", 403)


def harden(headers: MutableHeaders) -> None:
    """Add the headers of every answer that it does not have yet."""
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("cache-control", "no-store")


def _limited(scope: Scope, headers: Headers, receive: Receive) -> Receive:
    """Return a function that receives a body as long as it is neither too large nor too late, and raises HTTPException otherwise."""
    limit = UPLOADS.get(scope["path"], MOST_BYTES)
    given = headers.get("content-length", "0")
    left = -1 if given.isdecimal() and int(given[:20]) > limit else limit
    deadline = get_running_loop().time() + BODY_SECONDS
    is_complete = False

    async def receive_limited() -> Message:
        nonlocal left, is_complete
        if is_complete:
            return await receive()  # which waits for the visitor to leave
        if left >= 0:
            try:
                async with timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The request did not arrive within {BODY_SECONDS:.0f} s.") from None
            left -= len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if left >= 0:
                return message
        raise HTTPException(413, f"The request is too large; at most {limit / 2**20:g} MiB are taken here.")

    return receive_limited


def _without_token(scope: Scope, parameters: list[tuple[str, str]]) -> Response:
    """Send a visitor to the same address without the token, so that it stays neither in the history nor in links."""
    rest = urlencode([(name, value) for name, value in parameters if name != "token"])
    path = quote(scope.get("raw_path", b"").decode("latin-1").lstrip("/\\"), safe="/%")
    return RedirectResponse(f"/{path}" + (f"?{rest}" if rest else ""), 303)


def _netloc(url: str) -> str:
    """Host and port of an address; empty if it has none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    """The host of the header Host, without the port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie_name(headers: Headers) -> str:
    port = re.search(r":(\d{1,5})$", headers.get("host", ""))
    return f"{COOKIE}-{port[1]}" if port else COOKIE


def _address(scope: Scope) -> str:
    """The visitor's address, or the network of a house if it is of IPv6, where everybody has many."""
    try:
        address = ipaddress.ip_address((scope.get("client") or ("",))[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address) and not address.ipv4_mapped:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


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
    bearer = authorization.partition(" ")[2].encode()
    if token and hmac.compare_digest(hashlib.sha256(bearer).digest(), hashlib.sha256(token.encode()).digest()):
        return
    if not hmac.compare_digest(x_csrf_token.encode(), form_token(request).encode()):
        raise BadRequest(
            "Send the token that GET /api/review/csrf answers as X-CSRF-Token, with its cookie, or Authorization: Bearer <token>."
        )
