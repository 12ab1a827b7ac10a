"""Proves that two processes that train one SAE together, as `torchrun` starts them, make the SAE that one makes, and write it once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import make_test_params
from waiting import HANG_SECONDS

from ommatid.config import Params
from ommatid.events import ignore
from ommatid.sae.model import SAE
from ommatid.stage import open_stage, run_stage
from ommatid.store import Artefact

D_MODEL = 16


def write_activations(folder: Path, n: int = 4096) -> Path:
    """Sparse mixtures of 24 directions, so that some latents are better than others."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((24, D_MODEL))
    codes = rng.random((n, 24)) * (rng.random((n, 24)) < 0.1)
    np.save(folder / "x.npy", (codes @ directions + 0.5).astype(np.float32))
    return folder / "x.npy"


def make_params(folder: Path, **train: object) -> Params:
    section = {"d_sae": 32, "k": 3, "epochs": 6, "batch_size": 256, "lr": 3e-3, "max_dead": 1.0} | train
    source = {"source": "files", "path": str(folder / "x.npy"), "name": "x", "model": "planted", "eval_share": 0.2}
    values = make_test_params(train=section).model_dump(mode="json") | {"extract": source}
    return Params.model_validate(values)


def together(folder: Path, n: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "ommatid", "train"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_activations(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(folder: Path, params: Params) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    run_stage("extract", params, ignore)


def only_sae(artefact: Artefact) -> SAE:
    return SAE.load(artefact.child(artefact.children[0], "sae").path)


@pytest.mark.parametrize("variant", ["batch_topk", "jumprelu"])
def test_two_ranks_make_the_sae_of_one(folder: Path, variant: str) -> None:
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
    close = {"rtol": 2e-2, "atol": 1e-3} if variant == "batch_topk" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(both.threshold, alone.threshold, **close)


def test_what_cannot_be_shared_is_refused_by_all(folder: Path) -> None:
    prepare(folder, make_params(folder, batch_size=255))
    done = together(folder, 2)
    assert done.returncode != 0
    assert "train.batch_size: 255 tokens a step cannot be shared evenly by 2 processes; set a multiple of 2" in done.stderr
