"""What people say of features: names, ratings, flags, lists and comments, kept in an append-only log beside the catalogue.

`event.py` defines what can be said, `log.py` keeps it, `state.py` folds it into what stands, `follow.py` finds reviewed features again in
another SAE, and `table.py` exports and imports CSV. Nothing here needs torch.
"""

from pathlib import Path

from ommatid.reviews.event import FLAGS, KINDS, Event, Key
from ommatid.reviews.follow import Followed, follow
from ommatid.reviews.log import ReviewLog
from ommatid.reviews.state import Feature, State
from ommatid.reviews.table import Imported, from_csv, history_to_csv, to_csv

__all__ = [
    "FLAGS",
    "KINDS",
    "PLACE",
    "Event",
    "Feature",
    "Followed",
    "Imported",
    "Key",
    "ReviewLog",
    "State",
    "follow",
    "from_csv",
    "history_to_csv",
    "to_csv",
]

PLACE = Path("data/reviews/log.jsonl")
"""Where the log of a checkout is."""
