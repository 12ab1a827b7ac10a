"""A connection of the explorer's server that slow visitors cannot hold: uvicorn itself waits for ever for a request or a reader."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ommatid.explorer.security import HEADERS

HEAD_SECONDS = 30.0
"""Seconds within which the address and the headers of a request have to arrive; they begin with the connection, or the answer before."""
LINGER_SECONDS = 5.0
"""Seconds for which a visitor who is answered before the body was sent, as it is too large, may go on sending."""
STALLED_SECONDS = 30.0
"""Seconds within which a visitor has to take at least one byte of an answer."""


class Connection(H11Protocol):
    """Connection that is closed if the head of a request does not arrive in time, or if nobody takes the answer."""

    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch_head()

    def handle_events(self) -> None:
        """Handle what has arrived."""
        super().handle_events()
        self._watch_head()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        is_unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        self._watch_head()
        if is_unread:
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """End all waiting."""
        super().connection_lost(exc)
        for timer in filter(None, (self._head, self._reader)):
            timer.cancel()

    def pause_writing(self) -> None:
        """Begin to watch a visitor who does not take an answer as fast as it is sent."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """End that, as the visitor has caught up."""
        super().resume_writing()
        if self._reader:
            self._reader.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request."""
        text = b"This is no request of HTTP, or its address and headers exceed 64 kB."
        headers = [
            *HEADERS.items(),
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(text))),
            ("connection", "close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=text), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_head(self) -> None:
        """Wait for the head of a request if none has arrived."""
        is_waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if is_waiting and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not is_waiting and self._head:
            self._head.cancel()
            self._head = None

    def _watch_reader(self, before: int) -> None:
        """Look later whether a visitor has taken some of an answer."""

        def look() -> None:
            now = self.transport.get_write_buffer_size()
            if now < before:
                self._watch_reader(now)
            else:
                self.transport.abort()

        self._reader = self.loop.call_later(STALLED_SECONDS, look)
