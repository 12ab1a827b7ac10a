"""Proves that SAEs that cannot be read or expressed are refused with the file and the reason, and that no file runs code."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ommatid.errors import ModelError
from ommatid.sae.interop import Overrides, find_format, import_sae, load_native, write_native
from support.interop import SAID, TOLD, fixture, make_own

LENS, LEARNT, SPARSE, SAEV = "saelens-standard", "dictionary_learning-BatchTopKSAE", "sparsify-topk", "saev-relu"
JUMP, TOPK, BATCH = "overcomplete-JumpSAE", "overcomplete-TopKSAE", "overcomplete-BatchTopKSAE"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture, so that a test may damage it."""
    return lambda name: Path(shutil.copytree(fixture(name), tmp_path / name))


def change(path: Path, **values: Any) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def refuse(path: Path, *reasons: str, overrides: Overrides = TOLD) -> None:
    with pytest.raises(ModelError) as caught:
        import_sae(path, overrides)
    for reason in reasons:
        assert reason in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "skip_transcoder"}, "adds x W_skip"),
        ({"architecture": "abstopk"}, "negative activations"),
        ({"architecture": "temporal"}, "by those before it"),
        ({"architecture": "matching_pursuit"}, "one after another"),
        ({"architecture": "crosscoder"}, "architecture 'crosscoder' is not known; Ommatid reads standard"),
        ({"architecture": 5}, "architecture is 5; expected text"),
        ({"architecture": None, "k": -1}, "k is -1; expected a number above 0"),
        ({"normalize_activations": "layer_norm"}, "standard deviation"),
        ({"normalize_activations": "constant_norm_rescale"}, "its own norm"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"normalize_activations": "expected_average_only_in"}, "--set scaling_factor=F"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"architecture": "topk"}, "k is missing"),
        ({"architecture": "topk", "k": 19}, "from 1 to 18"),
        ({"architecture": "topk", "k": "4"}, "k is '4'; expected a number"),
        ({"architecture": "jumprelu"}, "threshold (missing)"),
        ({"matryoshka_widths": [9, 9]}, "expected numbers that increase"),
        ({"metadata": [1]}, "expected an object"),
    ],
)
def test_saelens_saes_without_an_equivalent_are_refused(changes: dict[str, Any], reason: str, copy: Callable[[str], Path]) -> None:
    folder = copy(LENS)
    change(folder / "cfg.json", **changes)
    refuse(folder, str(folder), reason)


def test_a_given_scale_is_folded_into_the_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("saelens-scaled")
    scaled = import_sae(folder, TOLD).W_enc
    (folder / "activation_scaler.json").unlink()
    assert torch.equal(import_sae(folder, replace(TOLD, values={"scaling_factor": "1.7"})).W_enc, scaled)


def test_sparsify_saes_without_an_equivalent_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy(SPARSE)
    change(folder / "cfg.json", activation="groupmax")
    refuse(folder, "groupmax", "Ommatid reads topk")
    change(folder / "cfg.json", activation="topk", skip_connection=True)
    refuse(folder, "skip connection")


def test_saev_files_of_later_schemas_are_refused(copy: Callable[[str], Path]) -> None:
    file = copy(SAEV) / "sae.pt"
    weights = file.read_bytes().partition(b"\n")[2]
    file.write_bytes(b'{"schema": 2, "cfg": {}}\n' + weights)
    refuse(file, "schema 2", "b_dec")
    file.write_bytes(b'{"d": 1}\n' + weights)
    refuse(file, "lacks d_vit")
    file.write_bytes(b'{"d_vit": 6\n' + weights)
    refuse(file, "not JSON")


def test_a_checkpoint_without_config_must_say_its_class(copy: Callable[[str], Path]) -> None:
    folder = copy(LEARNT)
    (folder / "config.json").unlink()
    refuse(folder, "AutoEncoderTopK or BatchTopKSAE", "--set class=")
    assert import_sae(folder, replace(TOLD, values={"class": "AutoEncoderTopK"})).config.activation == "topk"
    refuse(folder, "'Other' is not known", overrides=replace(TOLD, values={"class": "Other"}))
    (folder / "config.json").write_text('{"trainer": {"dict_class": "MySAE"}}', encoding="utf-8")
    refuse(folder, "class MySAE is not known", "BatchTopKSAE")


def test_impossible_levels_and_k_are_refused(tmp_path: Path) -> None:
    state = torch.load(fixture("dictionary_learning-MatryoshkaBatchTopKSAE") / "ae.pt", weights_only=True)
    for change_to, reason in (
        ({"group_sizes": torch.tensor([6, 6])}, "group_sizes add up to 12, but there are 18 latents"),
        ({"group_sizes": torch.tensor([20, -2])}, "expected numbers that increase"),
        ({"k": torch.tensor(-1)}, "k is -1"),
    ):
        torch.save(state | change_to, tmp_path / "ae.pt")
        refuse(tmp_path, str(tmp_path / "ae.pt"), reason)


def test_overcomplete_needs_what_its_state_dict_lacks(copy: Callable[[str], Path]) -> None:
    refuse(fixture(TOPK), "the same state dict", "--set class=")
    refuse(fixture(TOPK), "--set k=N", overrides=replace(TOLD, values={"class": "TopKSAE"}))
    refuse(fixture(TOPK), "class JumpSAE has other tensors", overrides=replace(TOLD, values={"class": "JumpSAE"}))
    refuse(fixture(BATCH), "--set running_threshold=", overrides=replace(TOLD, values={"class": "BatchTopKSAE"}))
    l1 = {**SAID["overcomplete-TopKSAE-l1"]}
    del l1["normalization"]
    refuse(fixture("overcomplete-TopKSAE-l1"), "--set normalization=", overrides=replace(TOLD, values=l1))


@pytest.mark.parametrize(
    ("add", "drop", "reason"),
    [
        ({"Q": (4,)}, "thresholds", "QSAE"),
        ({}, "encoder.", "no encoder"),
        ({"encoder.mlp_blocks.0.0.weight": (6, 6)}, "", "several layers"),
        ({"encoder.final_block.1.weight": (18,), "encoder.final_block.1.bias": (18,)}, "", "layer normalization"),
        ({"thresholds": (7,)}, "", "thresholds has shape (7,)"),
        ({"more": (2,)}, "", "more (not known)"),
    ],
)
def test_overcomplete_saes_without_an_equivalent_are_refused(
    add: dict[str, tuple[int, ...]], drop: str, reason: str, tmp_path: Path
) -> None:
    state = torch.load(fixture(JUMP) / "sae.pt", weights_only=True)
    state = {name: tensor for name, tensor in state.items() if not drop or not name.startswith(drop)}
    torch.save(state | {name: torch.ones(shape) for name, shape in add.items()}, tmp_path / "sae.pt")
    refuse(tmp_path / "sae.pt", str(tmp_path / "sae.pt"), reason)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("b_enc", None, "b_enc (missing); expected W_dec, W_enc, b_dec, b_enc"),
        ("W_skip", torch.zeros(2), "W_skip (not known)"),
        ("b_enc", torch.zeros(17), "b_enc has shape (17,); expected (d_sae) with"),
        ("W_dec", torch.zeros(6, 18), "expected (d_sae, d_model)"),
        ("W_dec", torch.full((18, 6), torch.nan), "W_dec: has NaN"),
        ("b_dec", torch.full((6,), torch.inf), "b_dec: has NaN or infinite"),
        ("scaling_factor", torch.full((18,), 2.0), "finetuned"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(name: str, value: torch.Tensor | None, reason: str, copy: Callable[[str], Path]) -> None:
    file = copy(LENS) / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file(tensors if value is None else tensors | {name: value}, file)
    refuse(file.parent, str(file), reason)


def test_a_direction_of_norm_0_is_refused_if_activations_are_scaled_by_it(copy: Callable[[str], Path]) -> None:
    folder = copy("saelens-topk-rescaled")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][3] = 0
    save_file(tensors, folder / "sae_weights.safetensors")
    refuse(folder, "W_dec: not finite", "norm 0")


class Spy:
    """An object that touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["dictionary", "overcomplete", "saev"])
def test_no_file_runs_code(place: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    file = tmp_path / ("ae.pt" if place == "dictionary" else "sae.pt")
    torch.save({"W_enc": Spy(touched)}, file)
    if place == "saev":
        file.write_bytes(b'{"d_vit": 6}\n' + file.read_bytes())
    refuse(tmp_path, "would run code", "torch.save(sae.state_dict(), path)")
    assert not touched.exists()


def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
    refuse(tmp_path, "never compresses")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"W_enc": torch.zeros(1).expand(10**9, 10**9)}, tmp_path / "ae.pt")
    refuse(tmp_path, "W_enc: larger than the values")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a complete file"),
        (b"text", "not a complete file"),
        (b"PK\x03\x04 and no more", "not a complete file"),
        (pickle.dumps({"a": 1}, protocol=2), "not a complete file"),
    ],
)
def test_files_that_torch_did_not_write_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(content)
    refuse(tmp_path, str(tmp_path / "ae.pt"), reason)


def test_truncated_files_are_refused(copy: Callable[[str], Path]) -> None:
    for name, inside in ((LEARNT, "ae.pt"), (SAEV, "sae.pt"), (LENS, "sae_weights.safetensors")):
        file = copy(name) / inside
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        refuse(file.parent, str(file), "not a complete")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "epoch: not plain tensors"),
        ({"state_dict": {"W_enc": torch.zeros(2)}}, "state_dict: not plain tensors"),
        ({3: torch.zeros(2)}, "3: not plain tensors"),
        ({"W_enc": torch.zeros(2, dtype=torch.complex64)}, "W_enc: not plain tensors"),
    ],
)
def test_objects_that_are_not_a_state_dict_are_refused(state: object, reason: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "ae.pt")
    refuse(tmp_path, reason, "sae.state_dict()")


def test_values_that_the_files_lack_must_be_given() -> None:
    refuse(fixture(SPARSE), "--hookpoint", overrides=Overrides(model="m"))
    refuse(fixture(SPARSE), "--model", overrides=Overrides("h"))
    refuse(fixture("sparsify-transcoder"), "--target", overrides=Overrides("h", "m"))


def test_given_values_must_be_known_and_possible() -> None:
    refuse(fixture(SAEV), "scale: not a value that saev takes; it takes k", overrides=replace(TOLD, values={"scale": "1"}))
    refuse(fixture(SAEV), "'0' is not a whole number above 0", overrides=replace(TOLD, values={"k": "0"}))
    refuse(fixture(SPARSE), "its TopK has k 4", overrides=replace(TOLD, values={"k": "5"}))
    refuse(fixture("saelens-scaled"), "'x' is not a number", overrides=replace(TOLD, values={"scaling_factor": "x"}))


def test_folders_without_an_sae_are_named(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "no such file or folder")
    refuse(tmp_path, "an empty folder")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    refuse(tmp_path, "among notes.txt; known formats are saelens")
    refuse(tmp_path / "notes.txt", "not an SAE of a known library")
    refuse(fixture(LENS).parent, "holds SAEs in dictionary_learning-AutoEncoder", "name one of these folders")
    with pytest.raises(ModelError, match="'keras' is not known"):
        import_sae(fixture(LENS), TOLD, "keras")
    with pytest.raises(ModelError, match="missing"):
        import_sae(fixture(LENS), TOLD, "saev")


def test_importing_an_sae_of_ommatid_is_refused(tmp_path: Path) -> None:
    write_native(make_own(), tmp_path)
    with pytest.raises(ModelError, match="use it as it is"):
        find_format(tmp_path)
    with pytest.raises(ModelError, match="no SAE in Ommatid's format"):
        load_native(fixture(LENS))
