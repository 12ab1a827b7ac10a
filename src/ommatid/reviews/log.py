"""The append-only log of what people say, a file of one JSON object per line. Several processes and threads may write to it at once.

A line is written in one piece, under a lock, and synced before `append` returns. A process that is killed while it writes may leave half a
line: it is ended before the next line is written, ignored by readers, and reported in `State.problems`. Nothing is ever removed.
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from ommatid.errors import ReviewError, find_lack
from ommatid.reviews.event import ANCHOR, Event, Key, clean, clean_who, encode_direction, now, parse_line, placed
from ommatid.reviews.state import State

Direction = Callable[[], np.ndarray]
"""Returns the direction of a latent, `(d_model,)`; it is called only if the log does not have the latent's direction yet."""

LOCK_SECONDS = 30.0
"""Seconds to wait for another process that writes, which takes milliseconds."""
_TAIL = 256
"""Number of bytes before the end of what was read that are compared, to notice that the file was rewritten."""


@dataclass(frozen=True)
class Draft:
    """Something that a person says, before it is in the log."""

    who: str
    """Name of the person."""
    sae: str
    """Name of the SAE in the tables."""
    latent: int
    """Index of the latent."""
    kind: str
    """One of `KINDS`."""
    value: str | int
    """Value of the event; see `Event.value`."""
    seen: str | None = None
    """Id of the last event about the feature that the person had seen; empty if there was none, None if it is not known."""
    direction: Direction | None = None
    """Returns the latent's direction; None if the log has it."""


class ReviewLog:
    """The log of reviews at a path. The file and its folder are made by the first event; until then the log is empty.

    All methods may be called from several threads.

    Args:
        path: The file, on a disk of this machine. Beside it lies a file of the same name that ends in `.lock`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._forget()

    def state(self) -> State:
        """Read what was added since the last call, and return what is said now. The returned state does not change later.

        It costs one `stat` if nothing was added, so it may be called for every request. The same object is returned until something is.

        Raises:
            ReviewError: The file cannot be read.
        """
        with self._reading:
            try:
                self._read()
            except OSError as error:
                raise ReviewError(f"{self.path}: the log of reviews cannot be read ({error.strerror}); see to it that it can") from None
            return self._state

    def append(
        self, who: str, sae: str, latent: int, kind: str, value: str | int, *, seen: str | None = None, direction: Direction | None = None
    ) -> Event:
        """Record what a person says of a feature.

        Args:
            who: Name of the person.
            sae: Name of the SAE in the tables.
            latent: Index of the latent.
            kind: One of `KINDS`.
            value: Value of the event; see `Event.value`.
            seen: `Feature.last` of the feature as the person saw it, so that a contradiction of what somebody else said meanwhile is
                reported as a conflict; None if it is not known.
            direction: Returns the latent's direction, `(d_model,)`. Needed for the first event about a latent, and only called then.

        Returns:
            The event, which is on the disk.

        Raises:
            ReviewError: The event is invalid, or cannot be written; nothing is recorded.
        """
        return self.extend([Draft(who, sae, latent, kind, value, seen, direction)])[0]

    def undo(self, who: str, event_id: str, *, seen: str | None = None) -> Event:
        """Take an event back. It stays in the history, with the undo, and an undo may be undone. See `append`."""
        event = self.state().event(event_id)
        if event is None:
            raise ReviewError(f"undo: there is no event {event_id!r}; take an id from the feature's history")
        return self.append(who, event.sae, event.latent, "undo", event_id, seen=seen)

    def extend(self, drafts: Sequence[Draft]) -> list[Event]:
        """Record several things, all or none of them. See `append`."""
        cleaned = [self._clean(draft) for draft in drafts]
        known = self.state().anchors
        needed = {(draft.sae, draft.latent): draft for draft in reversed(cleaned) if (draft.sae, draft.latent) not in known}
        anchors = {key: self._anchor_of(key, draft) for key, draft in needed.items()}  # before the lock, for it may take long
        events = [Event(uuid.uuid4().hex, "", draft.who, draft.sae, draft.latent, draft.kind, draft.value, draft.seen) for draft in cleaned]
        return self.record(lambda state: self._dated(state, anchors, events))

    def record(self, make: Callable[[State], Sequence[Event]]) -> list[Event]:
        """Write events that are made while nobody else can write.

        Args:
            make: Returns the events to write, complete and valid, given what is said now. Each feature must have its anchor first.

        Returns:
            The events as the log has them, without anchors.

        Raises:
            ReviewError: The events cannot be written; none is recorded.
        """
        with self._locked():
            events = make(self.state())
            if events:
                self._write(b"".join(event.line() for event in events))
            state = self.state()
        return [found for event in events if event.kind != ANCHOR and (found := state.event(event.id))]

    def _clean(self, draft: Draft) -> Draft:
        """Return the draft with its texts as they are kept.

        Raises:
            ReviewError: The draft is invalid.
        """
        value = clean(draft.kind, draft.value)
        if draft.kind == "undo":
            undone = self.state().event(str(value))
            if undone is None or undone.key != (draft.sae, draft.latent):
                raise ReviewError(f"undo: {draft.sae} {draft.latent} has no event {value!r}; take an id from the feature's history")
        assert draft.sae and int(draft.latent) >= 0, f"not a feature: {draft.sae!r} {draft.latent!r}"
        return Draft(clean_who(draft.who), draft.sae, int(draft.latent), draft.kind, value, draft.seen, draft.direction)

    def _anchor_of(self, key: Key, draft: Draft) -> Event:
        if draft.direction is None:
            raise ReviewError(f"{key[0]} {key[1]}: its direction is not known, so it could not be found again; review it where its SAE is")
        return make_anchor(key, draft.direction())

    def _dated(self, state: State, anchors: dict[Key, Event], events: Sequence[Event]) -> list[Event]:
        """Return the events with their time, each feature's anchor before its first event unless the log has it by now."""
        at = max(now(), state.until)
        added: list[Event] = []
        for event in events:
            if event.key not in state.anchors and event.key in anchors:
                added.append(_at(anchors.pop(event.key), at))
            added.append(_at(event, at))
        return added

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes from writing."""
        lock = filelock.FileLock(f"{os.path.realpath(self.path)}.lock", timeout=LOCK_SECONDS)  # an experiment's worktree links to the log
        with self._writing:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(poll_interval=0.005)
            except filelock.Timeout:
                raise ReviewError(f"{lock.lock_file}: another process has held the lock for {LOCK_SECONDS:g} s; end it") from None
            except OSError as error:
                raise self._cannot_write(error) from None
            try:
                yield
            finally:
                lock.release()

    def _write(self, data: bytes) -> None:
        """Append lines and sync them, after ending half a line that a killed process left. If that fails, the file is as it was before."""
        try:
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    data = b"\n" + data
                try:
                    n_written = os.write(descriptor, data)
                    if n_written < len(data):  # The disk is nearly full; writing the rest says so.
                        os.write(descriptor, data[n_written:])
                    os.fsync(descriptor)
                except BaseException:
                    with suppress(OSError):
                        os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
            if is_new:
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> ReviewError:
        lack = find_lack(error)
        what, todo = lack.value if lack else (error.strerror, "see to it that the file can be written")
        return ReviewError(f"{self.path}: nothing was recorded, for {what}; {todo}")

    def _forget(self) -> None:
        self._state = State()
        self._offset, self._n_lines = 0, 0
        self._stamp: tuple[int, ...] | None = None
        self._tail = b""

    def _read(self) -> None:
        """Read the lines that were added. If the file is another one, or was rewritten, read it from its beginning."""
        try:
            if self._stamp is not None and self._stamp == self._look():
                return
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if self._stamp and not self._continues(status, file.fileno()):
                    self._forget()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            if self._stamp is not None:
                self._forget()
            return
        whole = data.rfind(b"\n") + 1
        if whole:
            self._add(data[:whole].split(b"\n")[:-1])
            self._offset += whole
            self._tail = (self._tail + data[:whole])[-_TAIL:]
        self._state = self._state.with_torn(whole < len(data))
        self._stamp = _stamp_of(status)

    def _look(self) -> tuple[int, ...]:
        return _stamp_of(os.stat(self.path))

    def _continues(self, status: os.stat_result, descriptor: int) -> bool:
        """Return whether the file is the one read before, with more lines at its end or none."""
        assert self._stamp is not None
        if (status.st_dev, status.st_ino) != self._stamp[:2] or status.st_size < self._offset:
            return False
        return os.pread(descriptor, len(self._tail), self._offset - len(self._tail)) == self._tail

    def _add(self, lines: Sequence[bytes]) -> None:
        events, problems = [], []
        known = self._state.known()
        for line in lines:
            self._n_lines += 1
            if not line.strip():
                continue
            try:
                event = placed(parse_line(line), self._n_lines, known)
            except ValueError as error:
                problems.append(f"line {self._n_lines}: {error}")
                continue
            if event.id not in known:
                known[event.id] = event
                events.append(event)
        self._state = self._state.with_events(events, problems, known)


def make_anchor(key: Key, direction: np.ndarray) -> Event:
    """Make the event that keeps the direction of a latent, `(d_model,)`, without a time."""
    return Event(uuid.uuid4().hex, "", "", *key, ANCHOR, encode_direction(direction))


def _at(event: Event, at: str) -> Event:
    return Event(event.id, event.at or at, event.who, event.sae, event.latent, event.kind, event.value, event.seen)


def _stamp_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
