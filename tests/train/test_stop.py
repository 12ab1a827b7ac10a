"""Proves, on real processes, that a training that is stopped or killed ends with the same result after the next run.

Planted activations come from a file, so that `ommatid train` is the whole command, with its gate and its MLflow store.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from flows.commands import end
from ommatid.config import load_params
from ommatid.events import ignore
from ommatid.pipeline import STAGES, open_stage
from ommatid.pipeline.run import run_stage
from support.activations import draw_activations
from support.processes import HANG_SECONDS, alive
from support.study import make_test_params

N_KILLS = 3
COMMAND = [sys.executable, "-m", "ommatid.cli"]
OFTEN = """
import sys
from ommatid import cli
from ommatid.cli import terminal
from ommatid.compute import checkpoint
checkpoint.SECONDS = terminal.SECONDS = 0.0
cli.main()
"""
"""`ommatid` with a checkpoint at every measurement, as a training of seconds would otherwise have none, and a line for every event."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml and activations, and in `whole` an uninterrupted training."""
    root = tmp_path_factory.mktemp("planted")
    np.save(root / "x.npy", draw_activations())
    values = make_test_params(
        train={"d_sae": 128, "k": 4, "epochs": 20, "batch_size": 256, "lr": 1e-3, "max_dead": 1.0, "runs": [{}, {"variant": "topk"}]}
    ).model_dump(mode="json")
    values["extract"] = {"source": "files", "path": str(root / "x.npy"), "name": "planted", "model": "drawn"}
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    with chdir(root):
        run_stage("extract", load_params(), ignore)
    shutil.copytree(root, root / "whole")
    run(root / "whole", "train")
    return root


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the folder without a training."""
    return shutil.copytree(prepared, tmp_path / "copy", ignore=shutil.ignore_patterns("whole", ".mlflow"))


def run(folder: Path, stage: str) -> str:
    done = subprocess.run([*COMMAND, stage], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """Return the environment of a process outside the tests, with its MLflow store in the folder."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "OMMATID_"))} | {"PYTHONUNBUFFERED": "1"}


def begin(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """Start training, and return when it has printed its first line."""
    process = subprocess.Popen(
        [*command, "train"], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline()
    return process


def digest(folder: Path) -> str:
    """Return a digest of every byte of the training."""
    return open_stage("train", data=str(folder / "data")).digest


def test_a_training_that_is_asked_to_stop_says_so_and_continues_later(prepared: Path, folder: Path) -> None:
    process = begin(folder, *COMMAND)
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143, complained
    (line,) = [line for line in complained.splitlines() if line.startswith("stopped: ")]
    assert "run it again to continue from there" in line
    assert "error" not in said + complained and "Traceback" not in complained
    assert not (folder / STAGES["train"].place).exists()
    runs = MlflowClient(f"sqlite:///{folder}/.mlflow/mlflow.db").search_runs(["1"])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    assert all(run.data.tags["mlflow.note.content"] == f"S{line[1:]}" for run in runs)
    before = int(line.split("step ")[1].split()[0])
    assert before > 0
    steps = [int(line.split("step ")[1].split(":")[0]) for line in run(folder, "train").splitlines() if ": step " in line]
    assert min(steps) > before
    assert digest(folder) == digest(prepared / "whole")


def test_a_cancelled_flow_ends_its_processes_and_keeps_the_checkpoint(folder: Path) -> None:
    stage = " ".join(map(shlex.quote, COMMAND))
    process = begin(folder, "sh", "-c", f"{stage} train; exit 0")  # as DVC stands between the flow and the stage
    tree = psutil.Process(process.pid).children(recursive=True)
    end(process)
    assert tree and not alive(tree)
    assert process.stdout and process.stderr
    assert "stopped: train: stopped at step " in process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert any((folder / "data/.work").glob("sae-*/scratch/checkpoint.safetensors"))


def test_training_killed_again_and_again_ends_with_the_same_bytes(prepared: Path, folder: Path) -> None:
    chance, checkpoints = random.Random(0), 0
    for _ in range(N_KILLS):
        process = begin(folder, sys.executable, "-c", OFTEN)
        assert process.stdout
        for _ in range(chance.randint(20, 200)):  # by what it has done and not by time: a busy machine is slow
            process.stdout.readline()
        process.kill()
        process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == -signal.SIGKILL
        checkpoints += any((folder / "data/.work").glob("sae-*/scratch/checkpoint.safetensors"))
    assert checkpoints
    run(folder, "train")
    assert digest(folder) == digest(prepared / "whole")
