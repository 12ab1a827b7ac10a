"""Proves that an imported SAE stands beside those trained here, with its own width and k, and that unsuitable ones are refused."""

from pathlib import Path

import pytest
import torch

from ommatid.errors import ModelError
from ommatid.events import ignore
from ommatid.pipeline import open_stage
from ommatid.pipeline.run import run_stage
from ommatid.sae.interop import export_sae, write_native
from ommatid.sae.model import SAE, SAEConfig
from support.activations import make_params, prepare, write_activations


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_activations(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def test_an_imported_sae_is_one_of_several(folder: Path) -> None:
    prepare(folder, make_params(folder))
    run_stage("train", make_params(folder, d_sae=40, k=4), ignore)
    (first,) = (open_stage("train").child(name, "sae") for name in open_stage("train").children)
    theirs, fvu = SAE.load(first.path), first.summary["fvu"]
    export_sae(theirs, "saelens", folder / "theirs")
    write_native(theirs, folder / "ours")
    runs = [{"k": 2}, {"variant": {"kind": "imported", "path": "theirs"}}, {"variant": {"kind": "imported", "path": "ours"}}]
    made = run_stage("train", make_params(folder, runs=runs), ignore)
    assert len(made.children) == 3
    x = torch.randn(50, 16)
    for name in made.children[1:] if made.children[0].startswith("batch") else made.children[:2]:
        child = made.child(name, "sae")
        sae = SAE.load(child.path)
        torch.testing.assert_close(sae.encode(x), theirs.encode(x), rtol=1e-4, atol=1e-5)
        assert (child.manifest.params["d_sae"], sae.config.d_sae) == (40, 40)
        assert (sae.config.hookpoint, sae.config.model) == ("x", "planted")
        assert child.summary["fvu"] == pytest.approx(fvu, rel=0.2)
        assert child.rows("curves") == 1


def test_another_width_is_refused_before_training(folder: Path) -> None:
    prepare(folder, make_params(folder))
    W = torch.nn.functional.normalize(torch.randn(30, 20), dim=1)
    sae = SAE(SAEConfig("topk", 20, 30, 3, "x", "m", "topk"), W.T.contiguous(), torch.zeros(30), W, torch.zeros(20), torch.tensor(0.0))
    write_native(sae, folder / "wide")
    params = make_params(folder, runs=[{"k": 2}, {"variant": {"kind": "imported", "path": "wide"}}])
    with pytest.raises(
        ModelError, match=r"train.variant.path: wide: the SAE encodes activations of width 20.*the activations have width 16"
    ):
        run_stage("train", params, ignore)
