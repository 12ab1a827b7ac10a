"""The whole stage `train`: against bare steps on tensors in memory, and eight SAEs in one pass against one."""

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
"""Tokens of an image."""
N_SAES = 8
"""In one pass."""


@dataclass
class Watch:
    """Hears what a stage tells, and when."""

    root: Path
    """Below it the stage works."""
    written: set[int] = field(default_factory=set)
    """When its checkpoint was written, as far as was noticed."""
    times: list[tuple[int, float]] = field(default_factory=list)
    """Steps done, and when that was said."""
    waiting: list[float] = field(default_factory=list)
    """Share of the time since the last measurement that was spent on waiting for data."""

    def __call__(self, event: Event) -> None:
        """Listen."""
        if isinstance(event, Progress) and event.what == "train steps":
            self.times.append((event.done, time.perf_counter()))
            self.written |= {path.stat().st_mtime_ns for path in self.root.rglob(CHECKPOINT)}
        if isinstance(event, Measured):
            self.waiting.append(event.values["waiting"])

    @property
    def ms_a_step(self) -> float:
        """Between the first measurement and the last: loading, logging and checkpoints are in it."""
        (first, start), (last, end) = self.times[0], self.times[-1]
        return 1000 * (end - start) / (last - first)


class Place:
    """A folder with the activations of so many images, in which the stage runs."""

    def __init__(self, root: Path, size: Size, n_images: int) -> None:
        self._root = root
        self._params = load_params(CHECKOUT / "params.yaml")
        self.activations = _write(root / "activations", self._params.hookpoint, size.d_model, n_images)

    def stage(self, section: TrainParams) -> tuple[float, Watch]:
        """Seconds of the stage as `ommatid train` runs it, with MLflow, gate and publishing, and what it told."""
        params, watch, start = self._params.model_copy(update={"train": section}), Watch(self._root), time.perf_counter()
        run_stage("train", params, watch, str(self._root), must_pass=False)
        return time.perf_counter() - start, watch


def _write(place: Path, hookpoint: str, d_model: int, n_images: int) -> Artefact:
    """Training rows as extraction writes a shard: in its order, row groups of its size."""
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
        own = draft.child(hookpoint, "activations")
        groups = (table(number, rows[start : start + per_group]) for number, start in enumerate(range(0, len(rows), per_group)))
        write_rows(own, store.part_name("train", 0), groups, schema)
        own.seal({"window": window(np.bincount(order.stratum), PATCHES), "model": "synthetic", "hookpoint": hookpoint, "d_model": d_model})
        draft.seal({"hookpoints": [hookpoint]})
        return draft.publish(place).child(hookpoint, "activations")


class Bare:
    """Steps of the same run without a stage around them, on an epoch's batches in float16: on fewer, other latents would be dead."""

    def __init__(self, activations: Artefact, section: TrainParams) -> None:
        sample = Sample(load_sample(activations, SAMPLE))
        self._learner = Learner.begin("bare", section, make_plan(section, activations.rows("train")), sample, CPU)
        with closing(iter_batches(activations, section.batch_size, section.seed)) as batches:  # pyright: ignore[reportArgumentType]
            self._batches = list(islice(batches, self._learner.plan.n_tokens // section.batch_size))
        self.n_steps = self._learner.plan.n_steps

    @property
    def n_left(self) -> int:
        """Steps of the run that are not made yet."""
        return self.n_steps - self._learner.guides.step

    def steps(self, n: int) -> float:
        """Seconds of so many."""
        start = time.perf_counter()
        for _ in range(n):
            self._learner.learn(self._batches[self._learner.guides.step % len(self._batches)])
        return time.perf_counter() - start


def record_runs(root: Path) -> None:
    """Stages record their runs below a folder from here on, in a database that a first run has made, as it is for all but the first."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root / 'mlflow.db'}"
    tiny = Size(d_model=32, d_sae=64, k=4, batch_size=256)
    Place(root / "first", tiny, 64).stage(tiny.section(variant="batch_topk", epochs=1))


def against_bare_steps(root: Path, size: Size, n_images: int, epochs: int) -> Iterator[Row]:
    """The stage's steps by bare ones: half of these before it, half after."""
    place = Place(root, size, n_images)
    section = size.section(variant="batch_topk", epochs=epochs, seed=0)
    bare = Bare(place.activations, section)
    bare.steps(max(1, bare.n_steps // 100))  # as many as the stage makes before its first measurement
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
    """Eight seeds in one pass against one seed: whole stages in turn."""
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
