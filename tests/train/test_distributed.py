"""Proves that two processes that train one SAE together, as started by `torchrun`, give the same SAE as one, and write it once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ommatid.events import ignore
from ommatid.pipeline import open_stage
from ommatid.pipeline.run import run_stage
from ommatid.sae.model import SAE
from ommatid.store import Artefact
from support.activations import make_params, prepare, write_activations
from support.processes import HANG_SECONDS


def together(folder: Path, n: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "ommatid", "train"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_activations(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_sae(artefact: Artefact) -> SAE:
    return SAE.load(artefact.child(artefact.children[0], "sae").path)


@pytest.mark.parametrize("variant", ["batch_topk", "jumprelu"])
def test_two_ranks_train_the_same_sae_as_one(folder: Path, variant: str) -> None:
    # JumpReLU's step of a latent across its threshold enlarges what rounding leaves between the two: a short run, held tightly
    params = make_params(folder, variant=variant, epochs=6 if variant == "batch_topk" else 4)
    prepare(folder, params)
    alone = only_sae(run_stage("train", params, ignore))
    done = together(folder, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("holds") == 1
    both = only_sae(open_stage("train"))
    cosines = torch.cosine_similarity(alone.W_dec, both.W_dec, dim=1)
    assert float(cosines.min()) > 0.98 and float(cosines.mean()) > 0.999
    torch.testing.assert_close(both.b_dec, alone.b_dec, rtol=1e-2, atol=1e-2)
    close: dict[str, Any] = {"rtol": 2e-2, "atol": 1e-3} if variant == "batch_topk" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(both.threshold, alone.threshold, **close)


def test_all_ranks_refuse_a_training_that_cannot_be_shared(folder: Path) -> None:
    prepare(folder, make_params(folder, batch_size=255))
    done = together(folder, 2)
    assert done.returncode != 0
    assert "train.batch_size: 255 tokens cannot be shared evenly among 2 processes; set a multiple of 2" in done.stderr
