"""Proves that an export for another library reads back the same and has the right class, or is refused with the reason.

benchmarks/interop.py shows that the libraries' own loaders open exports and compute the same.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ommatid.errors import ModelError
from ommatid.sae.interop import export_sae, find_format, import_sae, write_native
from ommatid.sae.model import SAE
from support.interop import D_MODEL, TOLD, as_transcoder, difference, make_own, per_latent, with_prefixes

GOES = {
    "saelens-jumprelu": make_own(),
    "saelens-standard": make_own(threshold=0.0),
    "saelens-jumprelu per latent": make_own(threshold=per_latent()),
    "saelens-topk": make_own("topk"),
    "saelens-gated": make_own("gated"),
    "saelens-transcoder": as_transcoder(make_own(threshold=0.0, d_out=7)),
    "saelens-jumprelu_transcoder": as_transcoder(make_own(d_out=7)),
    "dictionary_learning-BatchTopKSAE": make_own(),
    "dictionary_learning-MatryoshkaBatchTopKSAE": with_prefixes(make_own()),
    "dictionary_learning-JumpReluAutoEncoder": make_own(threshold=per_latent()),
    "dictionary_learning-AutoEncoderTopK": make_own("topk"),
    "dictionary_learning-GatedAutoEncoder": make_own("gated"),
    "sae_for_vlm-MatroyshkaBatchTopKSAE": with_prefixes(make_own()),
    "sparsify-topk": make_own("topk"),
    "sparsify-topk transcoder": as_transcoder(make_own("topk")),
    "saev-relu": make_own(threshold=0.0),
    "overcomplete-TopKSAE": make_own("topk", b_dec=False),
    "overcomplete-JumpSAE": make_own(threshold=per_latent(), b_dec=False),
    "overcomplete-SAE": make_own(threshold=0.0, b_dec=False),
}


@pytest.mark.parametrize("name", GOES)
def test_an_export_reads_back_the_same(name: str, tmp_path: Path) -> None:
    sae, form = GOES[name], name.partition("-")[0]
    export_sae(sae, form, tmp_path)
    assert find_format(tmp_path) == form
    again = import_sae(tmp_path, TOLD)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert difference(sae.encode(x), again.encode(x)) < 2e-6
    assert difference(sae.decode(sae.encode(x)), again.decode(again.encode(x))) < 2e-6
    assert (again.config.activation, again.config.target) == (sae.config.activation, sae.config.target)


@pytest.mark.parametrize("name", [name for name in GOES if name.startswith(("saelens", "dictionary", "sae_for"))])
def test_the_most_specific_class_is_written(name: str, tmp_path: Path) -> None:
    form, _, rest = name.partition("-")
    export_sae(GOES[name], form, tmp_path)
    path = tmp_path / ("cfg.json" if form == "saelens" else "config.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["architecture"] if form == "saelens" else written["trainer"]["dict_class"]) == rest.split()[0]


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning", "sae_for_vlm"])
def test_levels_and_k_are_kept(form: str, tmp_path: Path) -> None:
    sae = with_prefixes(make_own())
    export_sae(sae, form, tmp_path)
    again = import_sae(tmp_path, TOLD).config
    assert (again.prefixes, again.k) == (sae.config.prefixes, sae.config.k)


def test_variants_have_the_names_that_saelens_uses(tmp_path: Path) -> None:
    export_sae(make_own(), "saelens", tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text(encoding="utf-8"))["metadata"]["training_architecture"] == "batchtopk"
    assert import_sae(tmp_path, TOLD).config.variant == "batch_topk"


def test_exports_are_float32(tmp_path: Path) -> None:
    sae = make_own("topk")
    export_sae(SAE(sae.config, **{name: tensor.double() for name, tensor in sae.tensors().items()}), "sparsify", tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "sae.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("form", "sae", "reason"),
    [
        ("saelens", as_transcoder(make_own("topk")), "no topk transcoder"),
        ("saelens", as_transcoder(make_own("gated")), "no gated transcoder"),
        ("dictionary_learning", as_transcoder(make_own()), "has no transcoders"),
        ("sae_for_vlm", as_transcoder(make_own()), "has no transcoders"),
        ("saev", as_transcoder(make_own(threshold=0.0)), "has no transcoders"),
        ("overcomplete", as_transcoder(make_own(b_dec=False)), "has no transcoders"),
        ("sparsify", make_own(), "sparsify has TopK only, and this SAE is threshold"),
        ("sparsify", as_transcoder(make_own("topk", d_out=7)), "this one goes from 5 to 7"),
        ("saev", make_own(), "ReLU only, and this SAE has a threshold"),
        ("saev", make_own("topk"), "ReLU only, and this SAE has topk"),
        ("overcomplete", make_own("topk"), "decoder has no bias"),
        ("overcomplete", make_own("gated", b_dec=False), "no gated SAE"),
        ("keras", make_own(), "'keras' is not known; known formats are saelens"),
    ],
)
def test_an_sae_that_a_library_cannot_express_is_refused(form: str, sae: SAE, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        export_sae(sae, form, tmp_path / "out")


def test_a_d_sae_that_saev_cannot_express_is_refused(tmp_path: Path) -> None:
    sae = make_own(threshold=0.0)
    tensors = sae.tensors()
    cut = {"W_enc": tensors["W_enc"][:, :18], "b_enc": tensors["b_enc"][:18], "W_dec": tensors["W_dec"][:18]}
    odd = SAE(type(sae.config)("relu", D_MODEL, 18, 3, "h", "m"), **(tensors | cut))
    with pytest.raises(ModelError, match="multiple of d_model"):
        export_sae(odd, "saev", tmp_path)


def test_an_export_does_not_write_over_an_own_sae(tmp_path: Path) -> None:
    write_native(make_own("topk"), tmp_path)
    with pytest.raises(ModelError, match="name another folder"):
        export_sae(make_own("topk"), "sparsify", tmp_path)
