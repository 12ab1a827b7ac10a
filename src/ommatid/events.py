"""What a running stage tells whoever listens: the terminal, MLflow, Prefect. Stages know none of these."""

from collections.abc import Callable
from dataclasses import dataclass


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
    """Numbers at one step of training."""

    step: int
    """Optimiser steps done."""
    values: dict[str, float]
    """Name (fvu, l0, dead, loss, lr) to value."""


Listener = Callable[[Progress | Measured], None]


def ignore(event: Progress | Measured) -> None:
    """The listener that does nothing."""
