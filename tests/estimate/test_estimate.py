"""Proves that the arithmetic finds planted costs within its budget, and that a real estimate agrees with the real run.

The command line runs the built-in models on drawn pictures. Tests that need the estimate of the fixture run after it.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ommatid.config import EvaluateParams, load_params
from ommatid.errors import ConfigError, ModelError, OmmatidError, SourceError
from ommatid.estimate import Estimate, estimate, trial_client, trial_worker, trials
from ommatid.estimate.fit import LARGEST, SMALLEST, Timing, expect, fit, grow, trial_sizes
from ommatid.estimate.sample import draw_images
from ommatid.estimate.totals import expect_examples
from ommatid.estimate.trial_client import RunCost, StageProcess
from ommatid.estimate.trials import trained_tokens
from ommatid.events import ignore
from ommatid.pipeline import STAGES
from ommatid.pipeline.run import run_stage
from ommatid.sae.schedule import make_plan
from support.processes import HANG_SECONDS, wait_for, wait_for_end
from support.study import make_test_params, run_verb
from support.tiles import make_images_artefact, write_tile_folder

N_IMAGES = 256


@dataclass
class Planted:
    """A stage with given costs: `start` seconds per process, `fixed` per run and `each` per unit of work."""

    start: float
    fixed: float
    each: float

    def __post_init__(self) -> None:
        self.runs: list[float] = []

    def run(self, work: float) -> float:
        self.runs.append(work)
        return (self.start if len(self.runs) == 1 else 0.0) + self.fixed + self.each * work


@given(start=st.floats(0, 60), fixed=st.floats(0, 60), each=st.floats(1e-4, 10), whole=st.integers(64, 10**7))
def test_planted_costs_are_found_exactly(start: float, fixed: float, each: float, whole: int) -> None:
    planted = Planted(start, fixed, each)
    sizes = trial_sizes(whole)
    warm = grow(lambda i: planted.run(sizes[i]), sizes, 10.0)
    largest = planted.runs[-1]
    cost = fit(warm, Timing(largest, start + fixed + each * largest))
    assert cost.seconds(whole) == pytest.approx(start + fixed + each * whole, rel=1e-6)


@given(fixed=st.floats(0, 30), each=st.floats(1e-4, 10), budget=st.floats(1, 30))
def test_trials_are_within_the_budget_and_as_large_as_it_allows(fixed: float, each: float, budget: float) -> None:
    planted = Planted(5.0, fixed, each)
    sizes = trial_sizes(10**6)
    grow(lambda i: planted.run(sizes[i]), sizes, budget)
    first, again, second, *others = planted.runs
    assert first == again == sizes[0] < second
    assert [fixed + each * work for work in others] == pytest.approx([fixed + each * work for work in sorted(others)])
    assert all(fixed + each * work <= budget * 1.001 for work in others)
    beyond = [work for work in sizes if work > planted.runs[-1]]
    assert not beyond or fixed + each * beyond[0] > budget * 0.999


def test_costs_from_a_single_trial_are_proportional() -> None:
    assert expect([Timing(32, 2.0)], 64) == 4.0
    assert expect([Timing(32, 2.0), Timing(64, 3.0)], 128) == 5.0


@pytest.mark.parametrize("n", [1, 31, 32, 63, 64, 300, 10_000, 10**9])
def test_trial_sizes_ascend_and_stay_small(n: int) -> None:
    sizes = trial_sizes(n)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= min(n, LARGEST, max(2 * SMALLEST, n / 2))
    assert len(sizes) > 1 or n < 2 * SMALLEST


def test_without_trials_of_other_sizes_the_measured_seconds_are_used() -> None:
    assert fit([Timing(20, 1.0)], Timing(20, 4.0)).seconds(20) == 4.0
    assert fit([], Timing(20, 4.0)).seconds(20) == 4.0


@given(n_tokens=st.integers(2, 10**6), batch_size=st.integers(2, 4096), epochs=st.integers(1, 100))
def test_the_number_of_training_tokens_follows_the_plan(n_tokens: int, batch_size: int, epochs: int) -> None:
    params = make_test_params().train.model_copy(update={"batch_size": batch_size, "epochs": epochs})
    plan = make_plan(params, n_tokens)
    assert trained_tokens(n_tokens, batch_size, epochs) == plan.n_steps * plan.batch_size


def test_the_number_of_examples_is_that_of_evaluation() -> None:
    params = EvaluateParams(image_activation="max", n_top=16, n_per_decile=4, baselines=(), max_dead=0.9)

    def drawn(n: int) -> int:
        below = [10 * place // n for place in range(params.n_top, n)]
        return min(n, params.n_top) + sum(min(below.count(tenth), params.n_per_decile) for tenth in range(1, 10))

    fired = np.random.default_rng(0).geometric(0.02, 2000)
    assert expect_examples(fired, params) == pytest.approx(sum(drawn(int(n)) for n in fired), rel=0.02)


def test_a_sample_of_images_is_evenly_spread_and_complete(tmp_path: Path) -> None:
    images = make_images_artefact(tmp_path, 300)
    sample = draw_images(images, 50, tmp_path / "sample")
    rows, all_rows = sample.read("images"), images.read("images").to_pylist()
    numbers = rows["image"].to_pylist()
    assert numbers == sorted(set(numbers)) and abs(len(numbers) - 50) <= 2
    assert max(np.diff([0, *numbers, 300])) < 30
    assert rows.to_pylist() == [all_rows[number] for number in numbers]
    assert sample.summary["n_train"] == rows["split"].to_pylist().count("train")
    assert sample.summary["n_train"] + sample.summary["n_eval"] == sample.summary["n_images"] == len(numbers)
    assert draw_images(images, 1000, tmp_path / "all").read("images")["image"].to_pylist() == list(range(300))


# the real thing


def write_checkout(root: Path) -> None:
    """A folder with params.yaml and pictures."""
    write_tile_folder(root / "photos", N_IMAGES)
    (root / "words.txt").write_text("red\ngreen\nblue\ngrey\ncar\nhorse\n")
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"model": {"kind": "lite", "image_size": 64}, "judge": {"kind": "lite", "variant": "lite2", "image_size": 64}},
        train={"d_sae": 24, "k": 2, "epochs": 10, "batch_size": 64, "max_dead": 1.0, "runs": [{}, {"d_sae": 16}]},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
        intervene={"latents": {"kind": "best", "by": "ms", "n": 2}, "n_images": 32},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))


class InThisProcess:
    """Stands for a trial's process but runs in this one, so that heavy imports are paid once."""

    def __init__(self, stage: str, environment: dict[str, str], log: Path) -> None:
        self._stage = stage
        self._environment = environment

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, params: Any, data: Path, whole: dict[str, int] | None = None) -> RunCost:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._environment.items():
                patch.setenv(name, value)
            return RunCost(**trial_worker._run(self._stage, params, str(data), whole))

    def end(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    write_checkout(root)
    return root


@pytest.fixture(scope="module")
def estimated(checkout: Path) -> Estimate:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(trials, "StageProcess", InThisProcess)
        patch.setattr(trials, "BUDGET", math.inf)  # the same trials on every machine
        before = sorted(path.name for path in checkout.iterdir())
        found = estimate(load_params())
        assert sorted(path.name for path in checkout.iterdir()) == before, "trials leave nothing"
    return found


def test_a_real_run_makes_what_was_estimated(estimated: Estimate, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    params = load_params()
    made = {}
    for stage in STAGES:
        run_stage(stage, params, ignore)
        made[stage] = sum(path.stat().st_size for path in STAGES[stage].place.rglob("*") if path.is_file())
    said = {stage.stage: stage.bytes for stage in estimated.stages}
    assert said == pytest.approx(made, rel=0.1)
    assert estimated.n_images == N_IMAGES


def test_every_stage_has_minutes_and_memory(estimated: Estimate) -> None:
    for stage in estimated.stages:
        assert stage.seconds is not None and 0 < stage.seconds < math.inf  # how many: benchmarks/estimate.py
        assert stage.peak is not None and 1e8 < stage.peak < 4e9
        assert max(stage.sizes) <= N_IMAGES / 2
    assert estimated.seconds == pytest.approx(sum(stage.seconds or math.nan for stage in estimated.stages))
    assert estimated.free is not None and estimated.missing <= estimated.free


def test_the_command_uses_existing_images_and_says_so(
    estimated: Estimate, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    run_stage("images", load_params(), ignore)
    monkeypatch.setattr(trials, "StageProcess", InThisProcess)
    monkeypatch.setattr(trials, "BUDGET", 0.0)
    (checkout / "photos").rename(checkout / "elsewhere")  # whoever reads the source again fails
    try:
        labellers = "[{kind: vocabulary, words: [words.txt]}, {kind: vlm, model: any}]"
        assert run_verb("estimate", "--set", f"label.labellers={labellers}") == 0
    finally:
        (checkout / "elsewhere").rename(checkout / "photos")
    out = capsys.readouterr().out
    table = {line.split()[0]: line for line in out.splitlines() if line}
    assert "exists already" in table["images"]
    assert all(f"{SMALLEST} and " in table[stage] for stage in ("extract", "train"))
    assert f"of {N_IMAGES} images" in table["total"]
    assert "it fits" in table["disk:"]
    assert table["label:"] == "label: not included is what vlm will take, as no model is asked before the run"
    assert not list(checkout.rglob(".estimate-*"))


def test_ctrl_c_leaves_nothing(checkout: Path) -> None:
    command = [sys.executable, "-m", "ommatid.cli", "estimate", "--data", "nowhere"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None and running.stderr is not None
        assert "trial: images" in running.stdout.readline()
        children = wait_for_children(running.pid)
        assert list(checkout.glob(".estimate-*"))
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=HANG_SECONDS)
    assert running.returncode != 0
    assert "Traceback" not in error
    assert not list(checkout.glob(".estimate-*")) and not (checkout / "nowhere").exists()
    wait_for_end(children, "the trials")


def test_trials_end_with_their_parent(checkout: Path) -> None:
    command = [sys.executable, "-m", "ommatid.cli", "estimate", "--data", "nowhere"]
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL) as running:
        children = wait_for_children(running.pid)
        time.sleep(1)
        running.kill()
    wait_for_end(children, "the trials")
    for leftover in checkout.glob(".estimate-*"):
        shutil.rmtree(leftover)


def wait_for_children(pid: int) -> list[psutil.Process]:
    return wait_for(lambda: psutil.Process(pid).children(recursive=True), "a trial to start")


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["train.k=100"], ConfigError, "k is 100, larger than d_sae 24"),
        (["images.source.path=nowhere"], SourceError, "nowhere"),
        (["extract.hookpoints=[blocks.99]"], ModelError, "blocks.9"),
        (["extract={source: files, path: x, name: y, model: z}"], ConfigError, "not estimated"),
    ],
)
def test_an_estimate_refuses_what_a_run_would_refuse(
    overrides: list[str], error: type[OmmatidError], says: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    before = sorted(path.name for path in checkout.iterdir())
    with pytest.raises(error, match=says):
        estimate(load_params(overrides=overrides))
    assert sorted(path.name for path in checkout.iterdir()) == before


def test_a_trial_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_client, "MODULE", "ommatid.no_such_module")
    with StageProcess("images", {}, tmp_path / "log") as trial, pytest.raises(OmmatidError, match=r"stage images died \(exit status 1\)"):
        trial.run({}, tmp_path)
