"""The challenger that waits for a person: it won by the margins, and is published once somebody has approved it.

data/approval.json names it. Its folder among the champions' is complete before, so that a later training may replace the artefacts.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ommatid.config.messages import explain
from ommatid.errors import ArtefactError
from ommatid.publish.decisions import Decision
from ommatid.store.filesystem import sync

PLACE = Path("data/approval.json")


class Waiting(BaseModel):
    """A challenger that waits for a person."""

    model_config = ConfigDict(frozen=True)

    decision: Decision
    """The decision to publish it, which counts once it is in the log."""
    asked_at: datetime
    """Time of the question, UTC."""
    hours: float
    """Hours that a person has to answer."""
    n_decisions: int
    """Number of decisions in the log when it was asked; the answer comes after them."""
    flow_run: str
    """Id of the Prefect flow run that was suspended until somebody answers in the Prefect UI."""
    artifact: str
    """Id of the Prefect artifact that shows champion and challenger."""
    alarm: str | None = None
    """Id of the flow run that is scheduled for the end of the wait."""

    @property
    def until(self) -> datetime:
        """End of the wait, UTC."""
        return self.asked_at + timedelta(hours=self.hours)

    @property
    def is_over(self) -> bool:
        """Whether the time to answer has passed."""
        return datetime.now(UTC) >= self.until

    @property
    def pause_key(self) -> str:
        """Name of the question, by which Prefect keeps the answer."""
        return f"{self.decision.key}-{self.asked_at:%Y%m%d%H%M%S}"


def read_waiting() -> Waiting | None:
    """Read which challenger waits; None if none does.

    Raises:
        ArtefactError: The file is not a valid question, as one of another version or one that somebody changed.
    """
    try:
        return Waiting.model_validate_json(PLACE.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ArtefactError(
            f"{PLACE}: does not say which challenger waits for a person ({explain(error, Waiting)}); delete the file: the next retrain "
            "compares the challenger again"
        ) from None


def find_end(waiting: Waiting, decisions: Sequence[Decision]) -> Decision | None:
    """Find the decision by which a question ended, through an answer or because somebody promoted the challenger; None if it is open."""
    return next((made for made in reversed(decisions[waiting.n_decisions :]) if made.key == waiting.decision.key), None)


def write_waiting(waiting: Waiting) -> None:
    """Record which challenger waits, in place of the one that waited before."""
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    temporary = PLACE.with_suffix(".tmp")
    temporary.write_text(waiting.model_dump_json(), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, PLACE)
    sync(PLACE.parent)


def forget_waiting() -> None:
    """Record that no challenger waits any more."""
    PLACE.unlink(missing_ok=True)
