"""What people say of features, as pages need it: the log, and where features that were reviewed in other SAEs are in the one shown."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from fastapi import Request
from jaxtyping import Float32

from ommatid.catalog.vectors import unpack
from ommatid.errors import OmmatidError, QueryError, ReviewError
from ommatid.explorer.library import Library, Opened
from ommatid.reviews import FLAGS, Event, Feature, Followed, Key, ReviewLog, State, follow
from ommatid.reviews.event import LIMITS, clean_who

if TYPE_CHECKING:
    from ommatid.explorer.web import Explorer, View

WHO = "ommatid-who"
"""Cookie with the name that a person gave."""
TILE = 1024
"""Directions that are in memory at a time while features are searched; the reader of pages is busy with them for milliseconds."""

_DIRECTIONS = "SELECT direction FROM directions WHERE sae = $sae AND latent >= $first AND latent < $first + $n ORDER BY latent"


@dataclass(frozen=True)
class Reviewed:
    """What is said of the features of one SAE at one moment."""

    sae: str
    """Name of the SAE in the tables."""
    state: State
    """What is said of all features."""
    followed: Followed
    """Where the features of other SAEs are in this one."""
    is_pending: bool = False
    """Whether features of other SAEs are still being searched, so that `followed` lacks some."""
    nearest: Mapping[Key, tuple[int, float]] = field(default_factory=dict)
    """Latent whose direction is most like that of a feature that was not found, and the cosine; without features of another width."""

    def feature(self, latent: int) -> Feature:
        """Return what is said of a latent; it may be nothing."""
        return self.followed.feature(self.state, latent)

    def name_of(self, latent: int) -> Event | None:
        """Return the event that gave a latent the name that counts; None if nobody named it."""
        found = self.features.get(latent)
        return found.rename if found else None

    @cached_property
    def features(self) -> dict[int, Feature]:
        """What is said of each latent of which something was said."""
        return self.followed.features(self.state)

    @cached_property
    def names(self) -> dict[int, str]:
        """Names that people gave, by latent."""
        return {latent: name for latent, feature in self.features.items() if (name := feature.name)}

    def named_like(self, text: str) -> list[int]:
        """Return the latents whose name by people contains a text, in any case."""
        return [latent for latent, name in self.names.items() if text.lower() in name.lower()]

    @cached_property
    def lists(self) -> dict[str, tuple[Key, ...]]:
        """Features of each list; those of other SAEs stand under their latent of this one, if they were found."""
        return self.followed.lists(self.state)

    @cached_property
    def orphans(self) -> dict[Key, Feature]:
        """What is said of features of other SAEs that were not found."""
        return self.followed.orphaned(self.state)

    @cached_property
    def known(self) -> dict[str, Event]:
        """Every event by its id."""
        return self.state.known()

    @cached_property
    def events(self) -> list[Event]:
        """Everything that was said of any feature, the latest first."""
        return self.state.events()[::-1]


class Reviews:
    """The log of reviews beside a catalogue, for all requests.

    Features that were reviewed in other SAEs are searched in a thread of its own, once for each catalogue and set of reviewed features.

    Args:
        path: The log, which need not exist yet.
        library: The catalogue, in whose directions features are searched.
    """

    def __init__(self, path: Path, library: Library) -> None:
        self.log = ReviewLog(path)
        self._library = library
        self._lock = threading.Lock()
        self._looks: dict[str, tuple[str, Reviewed]] = {}
        self._searching: set[str] = set()

    def look(self, opened: Opened, sae: str) -> Reviewed:
        """Return what is said now of the features of an SAE, as far as features of other SAEs have been searched.

        Raises:
            ReviewError: The log cannot be read.
        """
        state = self.log.state()
        with self._lock:
            key, look = self._looks.get(sae, (None, None))
            if look is None or key != opened.key:
                look = Reviewed(sae, State(), Followed(sae, {}, {}, ()))
            if look.state is not state:
                look = replace(look, state=state, is_pending=not look.followed.covers(state))
                self._looks[sae] = opened.key, look
            if look.is_pending and sae not in self._searching:
                self._searching.add(sae)
                threading.Thread(target=self._search, args=(sae,), name=f"find reviewed features in {sae}", daemon=True).start()
            return look

    def _search(self, sae: str) -> None:
        """Find the features of other SAEs; what the log or the catalogue gain meanwhile is found by the next search."""
        try:
            with self._library.open() as opened:
                state = self.log.state()
                followed = follow(state, sae, iter_directions(opened, sae))
                nearest = _find_nearest(opened, sae, state, followed.orphans)
            with self._lock:
                self._looks[sae] = opened.key, Reviewed(sae, state, followed, False, nearest)
        except OmmatidError:
            pass  # the catalogue has gone, which the next request says
        finally:
            with self._lock:
                self._searching.discard(sae)


def iter_directions(opened: Opened, sae: str) -> Iterator[Float32[np.ndarray, "latents d_model"]]:
    """Iterate over the directions of an SAE in the order of latents, a tile at a time, as rows of unit norm."""
    first = 0
    while rows := opened.rows(_DIRECTIONS, sae=sae, first=first, n=TILE):
        yield unpack([row["direction"] for row in rows])
        first += TILE


def find_direction(opened: Opened, sae: str, latent: int) -> Float32[np.ndarray, " d_model"]:
    """Return the direction of a latent, of unit norm.

    Raises:
        QueryError: The catalogue has none.
    """
    rows = opened.rows(_DIRECTIONS, sae=sae, first=latent, n=1)
    if not rows:
        raise QueryError(f"the catalogue has no direction of {sae} {latent}; build it again with `dvc repro catalog`")
    return unpack([row["direction"] for row in rows])[0]


def _find_nearest(opened: Opened, sae: str, state: State, keys: tuple[Key, ...]) -> dict[Key, tuple[int, float]]:
    """Return the latent that is most like each feature, and the cosine; features of another width are left out."""
    width = len(find_direction(opened, sae, 0)) if keys else 0
    known = {key: direction.astype(np.float32) for key in keys if len(direction := state.direction(key)) == width}
    if not known:
        return {}
    queries = np.stack([*known.values()])
    latents, cosines, first = np.zeros(len(known), np.int64), np.full(len(known), -np.inf, np.float32), 0
    for tile in iter_directions(opened, sae):
        products = queries @ tile.T
        best = products.argmax(axis=1)
        highest = products[np.arange(len(known)), best]
        latents, cosines = np.where(highest > cosines, first + best, latents), np.maximum(highest, cosines)
        first += len(tile)
    return {key: (int(latent), float(cosine)) for key, latent, cosine in zip(known, latents, cosines, strict=True)}


def is_closed(explorer: "Explorer") -> bool:
    """Return whether reviews are shown but not taken."""
    return explorer.settings.is_read_only or explorer.settings.is_static


def find_who(request: Request) -> str | None:
    """Return the name that a person gave before; None if there is none."""
    try:
        found = request.cookies.get(WHO)
        return clean_who(unquote(found, errors="strict")) if found else None
    except (ReviewError, UnicodeDecodeError):
        return None


def make_box(view: "View", sae: str, latent: int) -> dict[str, Any]:
    """Return what `review_box.html` shows of a feature: what is said of it, and what its forms need."""
    reviewed = view.reviewed(sae)
    said = reviewed.feature(latent)
    who = find_who(view.request)
    own = [event for event in said.history if event.who == who and event.id not in said.undone and event.kind != "undo"]
    return {
        "sae": sae,
        "latent": latent,
        "said": said,
        "is_pending": reviewed.is_pending,
        "who": who,
        "is_open": not is_closed(view.explorer),
        "last_own": own[-1] if own else None,
        "events": {event.id: event for event in said.history},
        "flags": FLAGS,
        "limits": LIMITS,
        "list_names": [name for name in reviewed.lists if name not in said.lists],
        "here": view.request.url.path + (f"?{view.request.url.query}" if view.request.url.query else ""),
    }
