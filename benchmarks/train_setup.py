"""Parts shared by the benchmarks of training: params, steps on synthetic batches, ours and the peers', and alternating timing."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_process import Peers
from report import Row
from synthetic import Synthetic
from torch import Tensor

from ommatid.compute.hardware import product_dtype
from ommatid.config import TrainParams, load_params
from ommatid.sae.learner import Learner, Sample
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch

CHECKOUT = Path(__file__).parent.parent
CPU = torch.device("cpu")
POOL = 4
"""Number of batches made before steps are timed."""
RUN_STEPS = 100_000
"""Length of the run whose steps are timed, so that its schedule is realistic."""
WARM_UP = 3
"""Number of steps made before the timed ones."""


@dataclass(frozen=True)
class Size:
    """Size of an SAE and its batches."""

    d_model: int = 768
    d_sae: int = 8192
    k: int = 32
    batch_size: int = 2048

    def section(self, **changes: Any) -> TrainParams:
        """Make the section `train` for this size, with other values as in params.yaml and with `changes`."""
        values = load_params(CHECKOUT / "params.yaml").train.model_dump(mode="json")
        return TrainParams.model_validate(values | {"d_sae": self.d_sae, "k": self.k, "batch_size": self.batch_size} | changes)


class Ours:
    """Our training step on synthetic batches."""

    def __init__(self, variant: str, size: Size) -> None:
        data = Synthetic(size.d_model)
        pool = [data.batch(number, size.batch_size) for number in range(POOL)]
        params = size.section(variant=variant, epochs=1, seed=0)
        self._learner = Learner.begin(variant, params, make_plan(params, RUN_STEPS * size.batch_size), Sample(torch.cat(pool)), CPU)
        self._batches = [Batch(x, x) for x in pool]
        self.scale = self._learner.scales.x

    def step(self) -> float:
        """Make a step and return its seconds."""
        batch = self._batches[self._learner.guides.step % POOL]
        start = time.perf_counter()
        self._learner.learn(batch)
        return time.perf_counter() - start


class Floor:
    """The encoder's matrix product alone, a lower bound of any step, in the arithmetic that the hardware supports."""

    def __init__(self, size: Size) -> None:
        self.dtype = product_dtype(CPU)
        self._x: Tensor = torch.randn(size.batch_size, size.d_model).to(self.dtype)
        self._W: Tensor = torch.randn(size.d_sae, size.d_model).to(self.dtype)
        self._out = torch.empty(size.batch_size, size.d_sae, dtype=self.dtype)

    def step(self) -> float:
        """Make a step and return its seconds."""
        start = time.perf_counter()
        torch.mm(self._x, self._W.T, out=self._out)
        return time.perf_counter() - start


class Theirs:
    """A peer's training step on the same batches."""

    def __init__(self, peers: Peers, variant: str, size: Size, scale: float, peer: dict[str, Any]) -> None:
        self._peers = peers
        peers.ask("make", **request(variant, size, RUN_STEPS, scale) | peer)

    def step(self) -> float:
        """Make a step and return its seconds."""
        return self._peers.ask("steps", n=1)[0]


def request(variant: str, size: Size, n_steps: int, scale: float) -> dict[str, Any]:
    """Make the request for a peer's trainer, with our schedule as far as the trainer supports it."""
    plan = make_plan(size.section(epochs=1), n_steps * size.batch_size)
    schedule = {"warmup": plan.warmup, "decay_start": n_steps - n_steps // 5}
    threshold = {"threshold_start": plan.threshold_start, "threshold_decay": plan.threshold_decay}
    widths = {"d_model": size.d_model, "d_sae": size.d_sae, "k": size.k, "batch_size": size.batch_size}
    arithmetic = {"scale": scale, "n_threads": torch.get_num_threads()}
    return {"variant": variant, "n_steps": n_steps, "lr": plan.lr, "seed": 0} | widths | schedule | threshold | arithmetic


def in_turn(rounds: int, *steppers: Ours | Theirs | Floor) -> list[list[float]]:
    """Time steps in turn and return the milliseconds of each stepper's; the first step of every turn is a warm-up and does not count."""
    for stepper in steppers:
        for _ in range(WARM_UP):
            stepper.step()
    times: list[list[float]] = [[] for _ in steppers]
    for _ in range(rounds):
        for stepper, found in zip(steppers, times, strict=True):
            stepper.step()
            found.append(stepper.step() * 1000)
    return times


def print_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """Print rows as soon as they are measured, as the whole benchmark takes a while."""
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit} {row.verdict}", flush=True)
        yield row
