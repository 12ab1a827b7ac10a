"""Proves that SAEs of six libraries give the same activations and reconstructions here, with the right names and sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ommatid.errors import ModelError
from ommatid.sae import interop
from ommatid.sae.interop import Overrides, find_format, import_sae, load_native, with_measured_k, write_native
from ommatid.sae.model import SAE
from support.interop import D_SAE, EXPECTED, SAID, TOLD, difference, fixture, make_own


def read(name: str) -> SAE:
    return import_sae(fixture(name), replace(TOLD, values=SAID[name]))


@pytest.mark.parametrize("name", SAID)
def test_acts_and_reconstructions_equal_those_of_the_library(name: str) -> None:
    sae = read(name)
    acts = sae.encode(EXPECTED["x"])
    assert difference(EXPECTED[f"{name}.acts"], acts) < 2e-6
    assert difference(EXPECTED[f"{name}.x_hat"], sae.decode(acts)) < 2e-6


@pytest.mark.parametrize("name", SAID)
def test_an_imported_sae_is_the_same_after_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    sae = read(name)
    write_native(sae, tmp_path)
    again = load_native(tmp_path)
    assert again.config == sae.config
    assert torch.equal(again.encode(EXPECTED["x"]), sae.encode(EXPECTED["x"]))


@pytest.mark.parametrize("name", SAID)
def test_the_format_is_recognised(name: str) -> None:
    # sae-for-vlm's BatchTopK is dictionary_learning's, to the letter
    assert find_format(fixture(name)) == name.partition("-")[0].replace(
        "sae_for_vlm", "sae_for_vlm" if "Mat" in name else "dictionary_learning"
    )


@pytest.mark.parametrize(
    ("name", "variant", "activation", "k"),
    [
        ("saelens-standard", "relu", "threshold", 0),
        ("saelens-batchtopk", "batch_topk", "threshold", 4),
        ("saelens-topk", "topk", "topk", 4),
        ("saelens-old", "topk", "topk", 4),
        ("saelens-gated", "gated", "gated", 0),
        ("saelens-jumprelu-transcoder", "jumprelu", "threshold", 0),
        ("dictionary_learning-MatryoshkaBatchTopKSAE", "matryoshka", "threshold", 4),
        ("sparsify-topk", "topk", "topk", 4),
        ("saev-relu", "relu", "threshold", 0),
        ("overcomplete-RATopKSAE", "archetypal", "topk", 4),
    ],
)
def test_variant_and_sizes_are_read_from_the_files(name: str, variant: str, activation: str, k: int) -> None:
    config = read(name).config
    assert (config.variant, config.activation, config.k) == (variant, activation, k)


def test_the_levels_of_a_matryoshka_are_read() -> None:
    names = ("saelens-matryoshka", "dictionary_learning-MatryoshkaBatchTopKSAE", "sae_for_vlm-Matroyshka")
    assert {read(name).config.prefixes for name in names} == {(6, 18)}


def test_hookpoint_and_model_are_read_from_the_files() -> None:
    config = import_sae(fixture("saelens-transcoder")).config
    assert (config.hookpoint, config.model, config.target) == ("vision.blocks.11", "clip-vit-base-patch32", "vision.blocks.11.mlp")
    assert import_sae(fixture("dictionary_learning-AutoEncoder")).config.model == "clip"


def test_overrides_take_precedence_over_the_files() -> None:
    config = import_sae(fixture("saelens-standard"), Overrides("a", "b", values={"k": "7"})).config
    assert (config.hookpoint, config.model, config.k) == ("a", "b", 7)


def test_a_threshold_below_0_becomes_a_relu(tmp_path: Path) -> None:
    state = torch.load(fixture("dictionary_learning-BatchTopKSAE") / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    sae = import_sae(tmp_path, replace(TOLD, values={"class": "BatchTopKSAE"}))
    assert torch.equal(sae.encode(EXPECTED["x"]), sae.pre_acts(EXPECTED["x"]).relu())


def test_overcomplete_fires_at_its_threshold(tmp_path: Path) -> None:
    eye = {"encoder.final_block.0.weight": torch.eye(3), "encoder.final_block.0.bias": torch.zeros(3), "dictionary._weights": torch.eye(3)}
    torch.save(eye | {"dictionary.multiplier": torch.tensor(0.0)}, tmp_path / "sae.pt")
    sae = import_sae(tmp_path, replace(TOLD, values={"class": "BatchTopKSAE", "running_threshold": "0.3"}))
    at = torch.tensor([0.3])
    x = torch.stack([torch.nextafter(at, torch.tensor(0.0)), at, torch.nextafter(at, torch.tensor(1.0))], dim=1)
    assert (sae.encode(x) > 0).tolist() == [[False, True, True]]


def test_equal_thresholds_become_one_number() -> None:
    assert read("saelens-batchtopk").threshold.ndim == 0
    assert read("saelens-jumprelu").threshold.shape == (18,)


def test_k_is_measured_on_a_sample() -> None:
    sae = make_own(threshold=0.2)
    x = torch.randn(3000, sae.config.d_model, generator=torch.Generator().manual_seed(0))
    k = with_measured_k(sae, x).config.k
    assert k == round(float((sae.encode(x) > 0).sum(1).float().mean())) and 0 < k < D_SAE
    assert with_measured_k(make_own("topk"), x).config.k == make_own("topk").config.k


def test_an_import_does_not_write_over_its_source() -> None:
    name = "sparsify-topk"
    with pytest.raises(ModelError, match="name another folder"):
        write_native(read(name), fixture(name))


def test_the_old_name_of_overrides_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="is now called Overrides"):
        assert interop.Told is Overrides  # pyright: ignore[reportAttributeAccessIssue]
