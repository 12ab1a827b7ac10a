"""What is said now: the events of the log, folded by feature."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ommatid.reviews.event import ANCHOR, Event, Key, decode_direction


@dataclass(frozen=True)
class Feature:
    """What is said now of a feature. It stands under several keys if events about other SAEs were found to be about the same direction."""

    keys: tuple[Key, ...]
    """Features that the events name, the one asked for first."""
    history: tuple[Event, ...]
    """Every event in the order of time, with those that were undone and the undos themselves."""
    undone: Mapping[str, Event]
    """Undo that took an event back, by the event's id."""
    renames: tuple[Event, ...]
    """Renames that were not undone; the last one counts."""
    ratings: Mapping[str, Event]
    """Last rating by each person."""
    flags: Mapping[str, Mapping[str, Event]]
    """Reasons of the flags that stand, and who raised each. An unflag takes a reason away, whoever raised it."""
    lists: Mapping[str, Event]
    """Lists that hold the feature, with the event that added it first."""
    comments: tuple[Event, ...]
    """Comments that were not undone."""
    conflicts: Mapping[str, tuple[Event, ...]]
    """Contradictions by kind, `rename` or `rate`: the last event, preceded by what other people had said and its author had not seen.

    They are resolved by the next event of that kind by someone who has seen them all.
    """

    @property
    def rename(self) -> Event | None:
        """The rename that counts; None if there is none, or the last one took the name away."""
        return self.renames[-1] if self.renames and self.renames[-1].value else None

    @property
    def name(self) -> str | None:
        """The name that people gave; None if there is none."""
        return str(self.rename.value) if self.rename else None

    @property
    def rating(self) -> float | None:
        """Mean of the last ratings by each person; None if there is none."""
        return sum(int(event.value) for event in self.ratings.values()) / len(self.ratings) if self.ratings else None

    @property
    def last(self) -> str:
        """Id of the last event, to give back as `seen`; empty if there is none."""
        return self.history[-1].id if self.history else ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said now, though something may have been and was undone."""
        return not (self.rename or self.ratings or self.flags or self.lists or self.comments)


def fold(keys: Sequence[Key], events: Iterable[Event]) -> Feature:
    """Fold the events of a feature, in any order, into what they say together."""
    history = tuple(sorted(events, key=lambda event: event.when))
    undone: dict[str, Event] = {}
    for event in reversed(history):  # an undo counts unless a later one undoes it
        if event.kind == "undo" and event.id not in undone:
            undone.setdefault(str(event.value), event)
    standing = [event for event in history if event.id not in undone]
    flags: dict[str, dict[str, Event]] = {}
    lists: dict[str, Event] = {}
    for event in standing:
        value = str(event.value)
        match event.kind:
            case "flag":
                flags.setdefault(value, {})[event.who] = event
            case "unflag":
                flags.pop(value, None)
            case "list_add":
                lists.setdefault(value, event)
            case "list_remove":
                lists.pop(value, None)
    of_kind = {kind: tuple(event for event in standing if event.kind == kind) for kind in ("rename", "rate", "comment")}
    ratings = {event.who: event for event in of_kind["rate"]}
    conflicts = {kind: found for kind in ("rename", "rate") if (found := _conflict(of_kind[kind]))}
    return Feature(tuple(keys), history, undone, of_kind["rename"], ratings, flags, lists, of_kind["comment"], conflicts)


def _conflict(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return what other people had said last and the author of the last event had not seen, and that event; empty if they agree."""
    last = events[-1] if events else None
    if last is None or last.seen_until is None:
        return ()
    others = {event.who: event for event in events[:-1] if event.who != last.who}
    unseen = [event for event in others.values() if event.when > last.seen_until and event.value != last.value]
    return (*unseen, last) if unseen else ()


@dataclass(frozen=True, eq=False)
class State:
    """Everything in a log at one moment. It does not change; `ReviewLog.state` returns a new one when something was added."""

    until: str = ""
    """Time of the latest event; empty if there is none."""
    anchors: Mapping[Key, Event] = field(default_factory=dict)
    """Event that keeps the direction, by feature."""
    _of: Mapping[Key, tuple[Event, ...]] = field(default_factory=dict)
    _known: Mapping[str, Event] = field(default_factory=dict)
    _problems: tuple[str, ...] = ()
    _is_torn: bool = False
    _folded: dict[Key, Feature] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[str, ...]:
        """Lines of the log that are left out, and why."""
        return (*self._problems, _TORN) if self._is_torn else self._problems

    @property
    def version(self) -> str:
        """Text that changes whenever something is said."""
        return f"{len(self._known)} {self.until}"

    @property
    def keys(self) -> tuple[Key, ...]:
        """Features of which something was said, in the order of the first event about each."""
        return tuple(self._of)

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def event(self, event_id: str) -> Event | None:
        """Return the event with an id; None if there is none."""
        event = self._known.get(event_id)
        return event if event and event.kind != ANCHOR else None

    def events(self) -> list[Event]:
        """Return all events in the order of time, without anchors."""
        return sorted((event for events in self._of.values() for event in events), key=lambda event: event.when)

    def feature(self, *keys: Key) -> Feature:
        """Return what is said of a feature, merged over its keys in the order of time. It may be nothing."""
        if len(keys) != 1:
            return fold(keys, (event for key in keys for event in self._of.get(key, ())))
        (key,) = keys
        if key not in self._of:
            return fold(keys, ())
        if key not in self._folded:
            self._folded[key] = fold(keys, self._of[key])
        return self._folded[key]

    def features(self) -> dict[Key, Feature]:
        """Return what is said of every feature, by its key."""
        return {key: self.feature(key) for key in self._of}

    @cached_property
    def lists(self) -> dict[str, tuple[Key, ...]]:
        """Features of each list, by the list's name, in the order in which they were added."""
        return lists_of(self.features())

    def direction(self, key: Key) -> np.ndarray:
        """Return the direction of a feature, `(d_model,)` float16, unit norm or zeros.

        Raises:
            KeyError: Nothing was said of the feature.
        """
        return decode_direction(self.anchors[key].value)

    def known(self) -> dict[str, Event]:
        """Return all events by id, with anchors; the caller may change the dict."""
        return dict(self._known)

    def with_events(self, events: Sequence[Event], problems: Sequence[str], known: Mapping[str, Event]) -> "State":
        """Return the state after more events. `known` holds all of them by id."""
        changed: dict[Key, list[Event]] = {}
        anchors = dict(self.anchors)
        for event in events:
            if event.kind == ANCHOR:
                anchors.setdefault(event.key, event)
            else:
                changed.setdefault(event.key, []).append(event)
        of = {**self._of, **{key: (*self._of.get(key, ()), *added) for key, added in changed.items()}}
        folded = {key: feature for key, feature in self._folded.items() if key not in changed}
        until = max([self.until, *(event.at for event in events)])
        return State(until, anchors, of, known, (*self._problems, *problems), self._is_torn, folded)

    def with_torn(self, is_torn: bool) -> "State":
        """Return the state of a log whose last line has no end yet, or has one."""
        return self if is_torn == self._is_torn else replace(self, _is_torn=is_torn)


def lists_of(features: Mapping[Key, Feature]) -> dict[str, tuple[Key, ...]]:
    """Return the features of each list, by the list's name, in the order in which they were added."""
    found: dict[str, list[Key]] = {}
    for _, name, key in sorted((event.when, name, key) for key, feature in features.items() for name, event in feature.lists.items()):
        found.setdefault(name, []).append(key)
    return {name: tuple(found[name]) for name in sorted(found)}


_TORN = "the last line has no end; it is ignored, and kept, for it is what a killed process leaves"
