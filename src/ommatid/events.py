"""What a running stage tells whoever listens: the terminal, MLflow, Prefect. Stages know none of these."""

from collections.abc import Callable
from dataclasses import dataclass, replace


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

    step: int
    """Optimiser steps done."""
    values: dict[str, float]
    """Name (fvu, l0, dead, loss, lr) to value."""
    sae: str = ""
    """Name of the SAE, as `TrainParams.each` gives it; stage `train` says it where its trainer does not."""


Listener = Callable[[Progress | Measured], None]


def ignore(event: Progress | Measured) -> None:
    """The listener that does nothing."""


def about(sae: str, is_only: bool, listener: Listener) -> Listener:
    """A listener for work on one SAE: what it measures carries the SAE's name, and so does its progress where there are others."""

    def listen(event: Progress | Measured) -> None:
        match event:
            case Measured():
                listener(replace(event, sae=sae))
            case Progress():
                listener(event if is_only else replace(event, what=f"{sae}: {event.what}"))

    return listen
