"""Benchmark of the whole stage `train`: against bare steps on tensors in memory, and eight SAEs in one pass against a single one."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from report import Row, middle
from synthetic import Synthetic
from train_setup import CHECKOUT, CPU, Size

from ommatid import schemas, store
from ommatid.activations.batches import iter_batches, load_sample
from ommatid.activations.columns import to_binary
from ommatid.config import TrainParams, load_params
from ommatid.events import Event, Measured, Progress
from ommatid.extract.rows import BYTES_PER_ROW_GROUP, order_rows, window, write_rows
from ommatid.pipeline.run import run_stage
from ommatid.sae.learner import Learner, Sample
from ommatid.sae.schedule import make_plan
from ommatid.store import Artefact
from ommatid.train.stage import CHECKPOINT, SAMPLE

PATCHES = 49
"""Number of tokens per image."""
N_SAES = 8
"""Number of SAEs trained in one pass."""


@dataclass
class Watch:
    """Listener that records the progress of a stage."""

    root: Path
    """Folder that the stage works in."""
    written: set[int] = field(default_factory=set)
    """Modification times at which checkpoints were seen, in nanoseconds."""
    times: list[tuple[int, float]] = field(default_factory=list)
    """Numbers of finished steps, each with the time at which it was reported."""
    waiting: list[float] = field(default_factory=list)
    """Shares of the time between measurements that were spent waiting for data."""

    def __call__(self, event: Event) -> None:
        """Record an event."""
        if isinstance(event, Progress) and event.what == "train steps":
            self.times.append((event.done, time.perf_counter()))
            self.written |= {path.stat().st_mtime_ns for path in self.root.rglob(CHECKPOINT)}
        if isinstance(event, Measured):
            self.waiting.append(event.values["waiting"])

    @property
    def ms_a_step(self) -> float:
        """Milliseconds per step between the first and the last measurement, including loading, logging and checkpoints."""
        (first, start), (last, end) = self.times[0], self.times[-1]
        return 1000 * (end - start) / (last - first)


class Place:
    """A folder with activations of `n_images` images, in which the stage runs."""

    def __init__(self, root: Path, size: Size, n_images: int) -> None:
        self._root = root
        self._params = load_params(CHECKOUT / "params.yaml")
        self.activations = _write(root / "activations", self._params.hookpoint, size.d_model, n_images)

    def stage(self, section: TrainParams) -> tuple[float, Watch]:
        """Run the stage as `ommatid train` does, with MLflow, gate and publishing; return its seconds and its events."""
        params, watch, start = self._params.model_copy(update={"train": section}), Watch(self._root), time.perf_counter()
        run_stage("train", params, watch, str(self._root), must_pass=False)
        return time.perf_counter() - start, watch


def _write(place: Path, hookpoint: str, d_model: int, n_images: int) -> Artefact:
    """Write training rows as extraction writes a shard, in the same order and with row groups of the same size."""
    image = np.arange(n_images).repeat(PATCHES)
    order = order_rows(image, np.random.default_rng(0))
    rows, schema, data = order.argsort(), schemas.activations(d_model, {}), Synthetic(d_model)
    per_group = max(1, BYTES_PER_ROW_GROUP // (2 * d_model))

    def table(number: int, index: np.ndarray) -> pa.Table:
        n, token = len(index), index % PATCHES
        columns = {
            "image": pa.array(image[index], pa.int32()),
            "token": pa.array(token, pa.int32()),
            "kind": pa.array(["patch"] * n),
            "row": pa.array(token // 7, pa.int16()),
            "col": pa.array(token % 7, pa.int16()),
            "x": to_binary(data.batch(number, n), torch.float16),
        }
        return pa.table(columns, schema=schema)

    with store.open_draft(place, "extraction", {}, {}) as draft:
        child = draft.child(hookpoint, "activations")
        groups = (table(number, rows[start : start + per_group]) for number, start in enumerate(range(0, len(rows), per_group)))
        write_rows(child, store.part_name("train", 0), groups, schema)
        child.seal(
            {"window": window(np.bincount(order.stratum), PATCHES), "model": "synthetic", "hookpoint": hookpoint, "d_model": d_model}
        )
        draft.seal({"hookpoints": [hookpoint]})
        return draft.publish(place).child(hookpoint, "activations")


class Bare:
    """Steps of the same run without the stage, on the float16 batches of a whole epoch; with fewer, other latents would be dead."""

    def __init__(self, activations: Artefact, section: TrainParams) -> None:
        sample = Sample(load_sample(activations, SAMPLE))
        self._learner = Learner.begin("bare", section, make_plan(section, activations.rows("train")), sample, CPU)
        with closing(iter_batches(activations, section.batch_size, section.seed)) as batches:  # pyright: ignore[reportArgumentType]
            self._batches = list(islice(batches, self._learner.plan.n_tokens // section.batch_size))
        self.n_steps = self._learner.plan.n_steps

    @property
    def n_left(self) -> int:
        """Number of steps of the run that are still to be made."""
        return self.n_steps - self._learner.guides.step

    def steps(self, n: int) -> float:
        """Make `n` steps and return their seconds."""
        start = time.perf_counter()
        for _ in range(n):
            self._learner.learn(self._batches[self._learner.guides.step % len(self._batches)])
        return time.perf_counter() - start


def record_runs(root: Path) -> None:
    """Make stages record their runs in an MLflow database below `root`, which a first run creates so that later ones find it."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root / 'mlflow.db'}"
    tiny = Size(d_model=32, d_sae=64, k=4, batch_size=256)
    Place(root / "first", tiny, 64).stage(tiny.section(variant="batch_topk", epochs=1))


def against_bare_steps(root: Path, size: Size, n_images: int, epochs: int) -> Iterator[Row]:
    """Compare the stage's steps with bare ones, half of which are made before the stage and half after."""
    place = Place(root, size, n_images)
    section = size.section(variant="batch_topk", epochs=epochs, seed=0)
    bare = Bare(place.activations, section)
    bare.steps(max(1, bare.n_steps // 100))  # as the stage does before its first measurement
    half = bare.n_left // 2
    before = bare.steps(half)
    seconds, watch = place.stage(section)
    after = bare.steps(half)
    ms = 1000 * (before + after) / (2 * half)
    tokens = f"{place.activations.rows('train')} tokens x {size.d_model}, d_sae {size.d_sae}, {bare.n_steps} steps"
    yield Row(f"bare step on float16 tensors in memory ({tokens})", ms, "ms")
    yield Row(f"step of the whole stage: loading, logging to MLflow, {len(watch.written)} checkpoints", watch.ms_a_step, "ms")
    yield Row("tokens a second, whole stage / bare steps", ms / watch.ms_a_step, "ratio", 0.9, 0.97)
    yield Row("share of the stage's time that steps waited for data", 100 * middle(watch.waiting), "%")
    yield Row("the stage from beginning to end", seconds, "s")


def several(root: Path, size: Size, n_images: int, epochs: int, rounds: int) -> Iterator[Row]:
    """Compare whole stages, run in turn, that train eight seeds in one pass or a single seed."""
    place = Place(root, size, n_images)
    one = size.section(variant="batch_topk", epochs=epochs, seed=0)
    eight = size.section(variant="batch_topk", epochs=epochs, seed=0, runs=[{"seed": seed} for seed in range(N_SAES)])
    alone, together = [place.stage(one)[0]], []
    for _ in range(rounds):
        together.append(place.stage(eight)[0])
        alone.append(place.stage(one)[0])
    what = f"d_model {size.d_model}, d_sae {size.d_sae}, k {size.k}, {place.activations.rows('train')} tokens, {epochs} epochs"
    yield Row(f"one SAE, whole stage ({what})", middle(alone), "s")
    yield Row(f"{N_SAES} SAEs in one pass, whole stage ({what})", middle(together), "s")
    yield Row(f"{N_SAES} SAEs in one pass / one (d_sae {size.d_sae})", middle(together) / middle(alone), "ratio", 5, None, "lower")


DEMO = replace(Size(), d_model=320, d_sae=2560, k=16)
