"""The log of decisions: which SAE became the champion, when, why and through whom; and what follows from it.

`data/published/decisions.jsonl` has a line for each decision, of a retrain or of a person. Lines are only ever appended, and all that is
said of champions is derived from them. All paths are relative to the current directory.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ommatid.config import Margins
from ommatid.config.messages import explain
from ommatid.errors import ArtefactError
from ommatid.store.filesystem import sync

PUBLISHED = Path("data/published")
DECISIONS = PUBLISHED / "decisions.jsonl"


class Scores(BaseModel):
    """Scores of an SAE on an evaluation split."""

    model_config = ConfigDict(frozen=True)

    sae: str
    """Name of the SAE."""
    digest: str
    """sha256 of the SAE's manifest."""
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of latents that fire per token."""
    dead: float
    """Share of latents that never fire."""
    ms: float | None
    """Mean monosemanticity score (MS); None if it is undefined for every latent."""
    ms_floor: float | None
    """MS of unrelated images."""

    @property
    def gain(self) -> float:
        """Mean MS above its floor; minus infinity if undefined."""
        return -math.inf if self.ms is None or self.ms_floor is None else self.ms - self.ms_floor


class Matched(BaseModel):
    """Numbers of features of two SAEs by their kind, as `ommatid.catalog.identity` defines them."""

    model_config = ConfigDict(frozen=True)

    kept: int
    """Features of the champion that the challenger has, too."""
    split: int
    """Features of the champion that are several in the challenger."""
    changed: int
    """Features of the champion to which one of the challenger is only alike."""
    lost: int
    """Features of the champion that the challenger does not have."""
    new: int
    """Features that only the challenger has."""


class Decision(BaseModel):
    """A decision about one SAE; one line of decisions.jsonl."""

    model_config = ConfigDict(frozen=True)

    decision: Literal["champion", "challenger"]
    """`champion` if the SAE is published from then on; `challenger` if the previous champion stays."""
    how: Literal["retrain", "promote", "rollback"] = "retrain"
    """Whether a comparison by the flow `retrain` decided, or a person by one of these verbs."""
    reason: str
    """Sentence with the numbers behind the decision."""
    who: str | None = None
    """Who decided: a person, or a Prefect flow run; None in lines of older versions."""
    why: str | None = None
    """What the person said about it."""
    flow_run: str | None = None
    """Id of the Prefect run that recorded the decision; None for what a person did by a verb, and in lines of older versions."""
    decided_at: datetime
    """Time of the decision, UTC."""
    challenger: Scores
    """Scores of the SAE that the decision is about, on the evaluation split of its own training."""
    champion: Scores | None
    """Scores of the champion of that time on the same split; None if there was none or it was not measured there."""
    against: str | None = None
    """Key of the champion of that time; None if there was none."""
    matched: Matched | None = None
    """What became of the champion's features; None if the two SAEs were not matched."""
    margins: Margins
    """Margins by which a challenger had to win."""
    catalog: str
    """sha256 of the manifest of the SAE's catalogue."""
    run: dict[str, Any]
    """The SAE's row of the relation `runs`, which has its lineage."""
    key: str
    """Name of the SAE's folder in data/published/champions if it is, or was, the champion."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Add the key to lines of older versions, which named folders by the catalogue alone."""
        if isinstance(values, dict) and "key" not in values and isinstance(values.get("catalog"), str):
            return {**values, "key": values["catalog"][:16]}
        return values


def recipe_of(run: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the activations that an SAE was trained on and the params of its training.

    Args:
        run: The SAE's row of the relation `runs`.

    Returns:
        The digest of the activations and the section `train` as JSON; None if the row does not have them.
    """
    params = run.get("params")
    section = (json.loads(params) if isinstance(params, str) else params or {}).get("train")
    activations = run.get("activations_digest")
    return (activations, json.dumps(section, sort_keys=True)) if activations and section else None


def make_key(catalog: str, sae: str) -> str:
    """Make the key of an SAE in a catalogue from the digests of their manifests."""
    return hashlib.sha256(f"{catalog} {sae}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Standing:
    """What the log amounts to."""

    champions: tuple[Decision, ...]
    """Champions in the order in which they were promoted, the present one last, each by the line that promoted it. A rollback removes
    those after the one that it returns to."""
    aside: tuple[Decision, ...]
    """Champions that a rollback set aside, oldest first. By the same comparison they do not win again."""
    last_said: dict[str, Decision]
    """The last line about each champion, present or former, by key, the most recent last."""

    @property
    def champion(self) -> Decision | None:
        """The present champion."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> Decision | None:
        """The champion that a rollback returns to: the last one with another SAE, and not only another catalogue."""
        return next((one for one in reversed(self.champions) if one.challenger.digest != self.champions[-1].challenger.digest), None)

    def find_bar(self, digest: str, run: Mapping[str, Any]) -> Decision | None:
        """Find the champion that was set aside and that an SAE repeats: the same weights, or a training on the same data and params.

        The SAE of the present champion is never barred, as then only a catalogue of it can have been set aside.

        Args:
            digest: sha256 of the SAE's manifest.
            run: The SAE's row of the relation `runs`.
        """
        if self.champion and self.champion.challenger.digest == digest:
            return None
        recipe = recipe_of(run)
        repeated = (one for one in reversed(self.aside) if one.challenger.digest == digest or (recipe and recipe_of(one.run) == recipe))
        return next(repeated, None)

    @property
    def keys(self) -> list[str]:
        """Keys of all champions, those first whose folders are most needed: the present one, the one before it, then the most recent.

        Of an SAE that became the champion with several catalogues, only the newest comes before other SAEs.
        """
        ordered = [one for one in (self.champion, self.previous) if one] + [*reversed(self.last_said.values())]
        newest = {one.challenger.digest: one.key for one in reversed(ordered)}
        return list(dict.fromkeys([*sorted(newest.values(), key=[one.key for one in ordered].index), *(one.key for one in ordered)]))


def stand(decisions: Iterable[Decision]) -> Standing:
    """Derive from decisions, oldest first, who is the champion, who was, and who was set aside."""
    champions: list[Decision] = []
    aside: list[Decision] = []
    said: dict[str, Decision] = {}
    for made in decisions:
        if made.decision != "champion":
            continue
        said.pop(made.key, None)
        said[made.key] = made
        places = [place for place, one in enumerate(champions) if one.key == made.key]
        if made.how == "rollback" and places:
            aside += champions[places[-1] + 1 :]
            del champions[places[-1] + 1 :]
        else:
            champions.append(made)
        aside = [one for one in aside if one.key != made.key and one.challenger.digest != made.challenger.digest]
    return Standing(tuple(champions), tuple(aside), said)


def find_champion() -> Decision | None:
    """Find the decision that made the current champion; None if there is no champion."""
    return stand(read_decisions()).champion


def read_decisions() -> list[Decision]:
    """Read all decisions, oldest first; an incomplete last line, left by a killed run, is ignored.

    Raises:
        ArtefactError: A complete line is not a valid decision.
    """
    decisions = []
    for number, line in enumerate(_read_lines().splitlines(), 1):
        try:
            decisions.append(Decision.model_validate_json(line))
        except ValidationError as error:
            raise ArtefactError(
                f"{DECISIONS}: line {number} is not a decision ({explain(error, Decision)}); if a newer version of Ommatid wrote it, "
                "update; otherwise bring the file back, such as by `dvc checkout data/published.dvc`"
            ) from None
    return decisions


def log_size() -> int:
    """Return the number of bytes of all complete lines."""
    return len(_read_lines())


def _read_lines() -> bytes:
    """Read all complete lines."""
    content = DECISIONS.read_bytes() if DECISIONS.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def append(decision: Decision) -> None:
    """Append a decision to the log, after removing an incomplete last line."""
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    with DECISIONS.open("ab") as file:
        file.truncate(log_size())
        file.write(decision.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(PUBLISHED)
