"""Proves that `ommatid import` and `ommatid export` print what they found and wrote, and which values are still missing."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ommatid.cli.app import app
from ommatid.errors import ConfigError, ModelError
from ommatid.sae.interop import import_sae, load_native
from support.interop import fixture


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_sae_of_saelens_is_exported_to_dictionary_learning(tmp_path: Path) -> None:
    own, out = tmp_path / "imported", tmp_path / "out"
    said = run("import", str(fixture("saelens-batchtopk")), "--to", str(own), "--hookpoint", "vision.blocks.11")
    assert "recognised saelens (cfg.json and sae_weights.safetensors)" in said
    assert "batch_topk (threshold), 6 -> 18, k 4, of vision.blocks.11 of clip-vit-base-patch32" in said
    assert load_native(own).config.hookpoint == "vision.blocks.11"
    assert "as dictionary_learning: ae.pt, config.json" in run(
        "export", "--sae", str(own), "--to", "dictionary_learning", "--out", str(out)
    )
    assert import_sae(out).config == load_native(own).config


def test_an_import_asks_for_a_k_that_the_files_lack(tmp_path: Path) -> None:
    arguments = ("import", str(fixture("saev-relu")), "--to", str(tmp_path), "--hookpoint", "h", "--model", "m")
    assert "--set k=N" in run(*arguments)
    assert "--set k=N" not in run(*arguments, "--set", "k=3")
    assert load_native(tmp_path).config.k == 3


def test_mistakes_of_the_user_are_errors_that_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        run("import", str(fixture("saev-relu")), "--set", "k")
    with pytest.raises(ModelError, match="no SAE in Ommatid's format"):
        run("export", "--sae", str(tmp_path), "--to", "saev", "--out", str(tmp_path / "out"))
