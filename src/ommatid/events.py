"""Events that a running stage sends to a listener. The stage does not know who listens: the terminal, MLflow or a Prefect flow."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Progress:
    """Progress of a stage."""

    what: str
    """What is being done, such as `extract images`."""
    done: int
    """Number of units done."""
    total: int
    """Number of units in all."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one SAE at one step of training."""

    sae: str
    """Name of the SAE, a key of `TrainParams.each`."""
    step: int
    """Number of optimiser steps done."""
    values: dict[str, float]
    """Measured values by name: fvu, l0, dead, loss, lr, tokens_per_second, waiting ..."""
    histograms: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)
    """Edges and counts of histograms by name (density, decoder norms ...); there is one edge more than counts."""


@dataclass(frozen=True)
class Noticed:
    """A notice about the training of one SAE."""

    sae: str
    """Name of the SAE."""
    step: int
    """Number of optimiser steps done."""
    what: str
    """The notice, one sentence."""


@dataclass(frozen=True)
class Warned:
    """A warning: a stage continues, but something in it did not work as requested."""

    what: str
    """What did not work, and what to do about it."""


@dataclass(frozen=True)
class Reused:
    """How much of a stage's work earlier runs had done."""

    what: str
    """What was found or computed, such as `images`."""
    found: int
    """Number that was found in a cache."""
    computed: int
    """Number that had to be computed."""


Event = Progress | Measured | Noticed | Warned | Reused
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignore an event; the default listener."""


def about(sae: str, is_only: bool, listener: Listener) -> Listener:
    """Return a listener for work on one SAE, which adds the SAE's name to progress unless it is the only SAE."""

    def listen(event: Event) -> None:
        listener(replace(event, what=f"{sae}: {event.what}") if isinstance(event, Progress) and not is_only else event)

    return listen
