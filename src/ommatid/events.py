"""What a running stage tells whoever listens: the terminal, MLflow, Prefect. Stages know none of these."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Progress:
    """So much of a stage is done."""

    what: str
    """What is being done, such as `extract images`."""
    done: int
    """Units finished."""
    total: int
    """Units in all."""


@dataclass(frozen=True)
class Measured:
    """Numbers of one SAE at one step of training."""

    sae: str
    """Name of the SAE: key of `TrainParams.each`."""
    step: int
    """Optimiser steps done."""
    values: dict[str, float]
    """Name (fvu, l0, dead, loss, lr, tokens_per_second, waiting ...) to value."""
    histograms: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)
    """Name (density, decoder norms ...) to edges and counts, one edge more than counts."""


@dataclass(frozen=True)
class Noticed:
    """Something that whoever watches should know."""

    sae: str
    """Name of the SAE."""
    step: int | None
    """Optimiser steps done; None: it is not about training."""
    what: str
    """One sentence."""


Event = Progress | Measured | Noticed
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener that does nothing."""


def about(sae: str, is_only: bool, listener: Listener) -> Listener:
    """A listener for work on one SAE: progress carries the SAE's name where there are others."""

    def listen(event: Event) -> None:
        listener(replace(event, what=f"{sae}: {event.what}") if isinstance(event, Progress) and not is_only else event)

    return listen
