"""Makes, saves, loads and runs SAEs with the libraries they come from, in those libraries' environment (`make peers`).

.peers/bin/python benchmarks/peers.py make FOLDER [d_model d_sae n_inputs]    makes an SAE of each class, with its acts and x_hat
.peers/bin/python benchmarks/peers.py load FOLDER    loads the SAEs listed in FOLDER/exports.json with their libraries' loaders

tests/sae/interop_fixtures were made by `make` with 6 18 12.
"""

import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LIBRARIES = ("sae-lens", "dictionary-learning", "eai-sparsify", "saev", "overcomplete", "torch")
Made = tuple[str, Callable[[Path], tuple[Tensor, Tensor]], dict[str, str]]
"""Name of an SAE; function that saves it to a folder and returns acts and x_hat; values that a user has to give to import it."""

D_MODEL, D_SAE, N, K = 6, 18, 12, 4
X: Tensor | None = None
"""Inputs read from a file, if there is one."""


def randomize(sae: nn.Module) -> None:
    """Randomise all parameters, so that no weight, bias or norm has a special value."""
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))


def inputs() -> Tensor:
    return X if X is not None else torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.3


# SAELens


def lens(sae: Any, folder: Path, saver: str = "save_model") -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    getattr(sae, saver)(folder)
    return run_lens(SAE.load_from_disk(folder))


def run_lens(sae: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        acts = sae.encode(inputs())
        return acts, sae.decode(acts)


def lens_config(cls: Any, **more: Any) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    about = SAEMetadata(model_name="clip-vit-base-patch32", hook_name="vision.blocks.11", hook_name_out="vision.blocks.11.mlp")
    return cls(d_in=D_MODEL, d_sae=D_SAE, metadata=about, **more)


def make_lens(sae_class: Any, config: Any) -> Any:
    sae = sae_class(config)
    randomize(sae)
    if hasattr(sae, "threshold"):
        sae.threshold.data.uniform_(0.1, 0.8)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.4)
    return sae


def lens_scaled(folder: Path) -> tuple[Tensor, Tensor]:
    """Save a checkpoint whose activation scale is not yet folded in."""
    import sae_lens.saes as s

    sae = make_lens(s.StandardSAE, lens_config(s.StandardSAEConfig, normalize_activations="expected_average_only_in"))
    lens(sae, folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.7, "has_whitening": False}))
    sae.fold_activation_norm_scaling_factor(1.7)
    return run_lens(sae)


def lens_checkpoint(folder: Path) -> tuple[Tensor, Tensor]:
    """Save a checkpoint of training, whose threshold is a buffer."""
    import sae_lens.saes as s

    sae = make_lens(s.BatchTopKTrainingSAE, lens_config(s.BatchTopKTrainingSAEConfig, k=K))
    sae.save_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        return lens(sae, Path(scratch), "save_inference_model")


def lens_checkpoint_scaled(folder: Path) -> tuple[Tensor, Tensor]:
    """Save a checkpoint of training whose scale is not folded in; the scale changes the decoder norm, the unit of the threshold."""
    import sae_lens.saes as s

    config = lens_config(s.BatchTopKTrainingSAEConfig, k=K, normalize_activations="expected_average_only_in")
    sae = make_lens(s.BatchTopKTrainingSAE, config)
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.7, "has_whitening": False}))
    sae.fold_activation_norm_scaling_factor(1.7)
    with tempfile.TemporaryDirectory() as scratch:
        return lens(sae, Path(scratch), "save_inference_model")


def lens_old(folder: Path) -> tuple[Tensor, Tensor]:
    """Save an SAE under the names that SAELens used before 6.0."""
    import sae_lens.saes as s

    expected = lens(make_lens(s.TopKSAE, lens_config(s.TopKSAEConfig, k=K)), folder)
    old = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "hook_point": "vision.blocks.11", "model_name": "clip"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(old))
    from sae_lens import SAE

    assert torch.equal(run_lens(SAE.load_from_disk(folder))[0], expected[0])
    return expected


def all_of_lens() -> Iterator[Made]:
    import sae_lens.saes as s

    plain = {
        "standard": (s.StandardSAE, s.StandardSAEConfig, {}),
        "standard-no-b-dec": (s.StandardSAE, s.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "topk": (s.TopKSAE, s.TopKSAEConfig, {"k": K}),
        "topk-rescaled": (s.TopKSAE, s.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (s.JumpReLUSAE, s.JumpReLUSAEConfig, {}),
        "gated": (s.GatedSAE, s.GatedSAEConfig, {}),
        "transcoder": (s.Transcoder, s.TranscoderConfig, {"d_out": D_MODEL + 2, "apply_b_dec_to_input": False}),
        "jumprelu-transcoder": (s.JumpReLUTranscoder, s.JumpReLUTranscoderConfig, {"d_out": D_MODEL, "apply_b_dec_to_input": False}),
    }
    for name, (sae, config, more) in plain.items():
        yield f"saelens-{name}", lambda folder, a=(sae, config, more): lens(make_lens(a[0], lens_config(a[1], **a[2])), folder), {}
    trained = {
        "batchtopk": (s.BatchTopKTrainingSAE, s.BatchTopKTrainingSAEConfig, {"k": K}),
        "matryoshka": (
            s.MatryoshkaBatchTopKTrainingSAE,
            s.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [D_SAE // 3, D_SAE]},
        ),
    }
    for name, (sae, config, more) in trained.items():
        yield (
            f"saelens-{name}",
            lambda folder, a=(sae, config, more): lens(make_lens(a[0], lens_config(a[1], **a[2])), folder, "save_inference_model"),
            {},
        )
    yield "saelens-scaled", lens_scaled, {}
    yield "saelens-checkpoint", lens_checkpoint, {}
    yield "saelens-checkpoint-scaled", lens_checkpoint_scaled, {}
    yield "saelens-old", lens_old, {}


# dictionary_learning, and its copy in sae-for-vlm


def learn(trainer: Any, folder: Path, spelled: str | None = None, inside: str = "ae.pt") -> tuple[Tensor, Tensor]:
    """Save an SAE as trainSAE does; the loader needs its true class, as StandardTrainerAprilUpdate writes another one."""
    from dictionary_learning.utils import load_dictionary

    sae = trainer.ae
    randomize(sae)
    if hasattr(sae, "threshold"):
        sae.threshold.data.fill_(0.4) if sae.threshold.ndim == 0 else sae.threshold.data.uniform_(0.1, 0.8)
    config = {"trainer": trainer.config}
    spelled = spelled or config["trainer"]["dict_class"]
    config["trainer"]["dict_class"] = type(sae).__name__
    state = {key: tensor.cpu() for key, tensor in sae.state_dict().items()}
    (folder / inside).parent.mkdir(exist_ok=True, parents=True)
    torch.save(state, folder / inside)
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    run = run_learnt(load_dictionary(str(folder), "cpu")[0])
    config["trainer"]["dict_class"] = spelled
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    if inside != "ae.pt":
        (folder / "ae.pt").unlink()
    return run


def run_learnt(sae: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        acts = sae.encode(inputs())
        return acts, sae.decode(acts)


def trainers() -> dict[str, Callable[[], Any]]:
    import dictionary_learning.trainers.matryoshka_batch_top_k as m
    from dictionary_learning import trainers as t
    from dictionary_learning.dictionary import AutoEncoderNew

    about = {"activation_dim": D_MODEL, "dict_size": D_SAE, "lm_name": "clip", "layer": 11, "submodule_name": "vision.blocks.11"}
    about |= {"steps": 10, "device": "cpu"}
    levels = {"group_fractions": [1 / 3, 2 / 3]}
    return {
        "AutoEncoder": lambda: t.StandardTrainer(**about, warmup_steps=1, sparsity_warmup_steps=None),
        "AutoEncoderNew": lambda: t.standard.StandardTrainerAprilUpdate(
            **about, warmup_steps=1, sparsity_warmup_steps=None, dict_class=AutoEncoderNew
        ),
        "AutoEncoderTopK": lambda: t.TopKTrainer(**about, k=K, warmup_steps=1),
        "BatchTopKSAE": lambda: t.BatchTopKTrainer(**about, k=K, warmup_steps=1),
        "MatryoshkaBatchTopKSAE": lambda: m.MatryoshkaBatchTopKTrainer(**about, **levels, k=K, warmup_steps=1),
        "JumpReluAutoEncoder": lambda: t.JumpReluTrainer(**about, warmup_steps=1, sparsity_warmup_steps=None),
        "GatedAutoEncoder": lambda: t.GatedSAETrainer(**about, warmup_steps=1, sparsity_warmup_steps=None),
    }


def all_of_learning() -> Iterator[Made]:
    for name, trainer in trainers().items():
        yield f"dictionary_learning-{name}", lambda folder, make=trainer: learn(make(), folder), {}
    matryoshka = trainers()["MatryoshkaBatchTopKSAE"]
    yield "sae_for_vlm-Matroyshka", lambda folder: learn(matryoshka(), folder, "MatroyshkaBatchTopKSAE"), {}
    batch = trainers()["BatchTopKSAE"]
    yield "sae_for_vlm-checkpoint", lambda folder: learn(batch(), folder, inside="checkpoints/ae_5.pt"), {}


# sparsify and saev


def sparse_coder(folder: Path, is_transcoder: bool) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D_MODEL, SparseCoderConfig(num_latents=D_SAE, k=K, transcode=is_transcoder))
    randomize(sae)
    sae.save_to_disk(folder)
    return run_sparse(folder)


def run_sparse(folder: Path) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    with torch.no_grad():
        sae = SparseCoder.load_from_disk(folder)
        top = sae.encode(inputs())
        acts = torch.zeros(N, sae.num_latents).scatter_(1, top.top_indices, top.top_acts)
        return acts, sae.decode(top.top_acts, top.top_indices)


def make_saev(folder: Path) -> tuple[Tensor, Tensor]:
    import saev.config
    import saev.nn

    sae = saev.nn.SparseAutoencoder(saev.config.SparseAutoencoder(d_vit=D_MODEL, exp_factor=D_SAE // D_MODEL))
    randomize(sae)
    saev.nn.dump(str(folder / "sae.pt"), sae)
    return run_saev(folder)


def run_saev(folder: Path) -> tuple[Tensor, Tensor]:
    import saev.nn

    with torch.no_grad():
        x_hat, acts, _ = saev.nn.load(str(folder / "sae.pt"))(inputs())
    return acts, x_hat


def all_others() -> Iterator[Made]:
    yield "sparsify-topk", lambda folder: sparse_coder(folder, False), {}
    yield "sparsify-transcoder", lambda folder: sparse_coder(folder, True), {}
    yield "saev-relu", make_saev, {}


# overcomplete


def import_overcomplete() -> Any:
    """Import the subpackage of SAEs alone, as the package itself imports timm and cv2 for models and pictures."""
    if "overcomplete" not in sys.modules:
        spec = importlib.util.find_spec("overcomplete")
        assert spec is not None and spec.submodule_search_locations is not None
        package = types.ModuleType("overcomplete")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["overcomplete"] = package
    import overcomplete.sae as s

    return s


def over(make: Callable[[], Any], folder: Path, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """Save the state dict after a pass in training mode, and run it in a new object in evaluation mode, as a reader would."""
    sae = make()
    randomize(sae)
    for module in sae.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.momentum = 0.0
    sae(inputs())
    torch.save(sae.state_dict(), folder / "sae.pt")
    fresh = make()
    fresh.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
    if threshold is not None:
        fresh.running_threshold = torch.tensor(threshold)
    return run_over(fresh)


def run_over(sae: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        _, acts, x_hat = sae.eval()(inputs())
    return acts, x_hat


def all_of_overcomplete() -> Iterator[Made]:
    s = import_overcomplete()
    points = torch.randn(D_SAE + 3, D_MODEL, generator=torch.Generator().manual_seed(2))
    topk = {"class": "TopKSAE", "k": str(K)}
    cases: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
        "SAE": (lambda: s.SAE(D_MODEL, D_SAE), {"class": "SAE"}),
        "TopKSAE": (lambda: s.TopKSAE(D_MODEL, D_SAE, top_k=K), topk),
        "TopKSAE-batch-norm": (lambda: s.TopKSAE(D_MODEL, D_SAE, top_k=K, encoder_module="mlp_bn_1"), topk),
        "TopKSAE-tied": (lambda: s.TopKSAE(D_MODEL, D_SAE, top_k=K).tied(bias=True), topk),
        "TopKSAE-untied": (lambda: s.TopKSAE(D_MODEL, D_SAE, top_k=K).untied(), topk),
        "TopKSAE-l1": (
            lambda: s.TopKSAE(D_MODEL, D_SAE, top_k=K, dictionary_params={"normalization": "l1", "use_multiplier": True}),
            {**topk, "normalization": "l1"},
        ),
        "BatchTopKSAE": (lambda: s.BatchTopKSAE(D_MODEL, D_SAE, top_k=K * N), {"class": "BatchTopKSAE", "running_threshold": "0.4"}),
        "JumpSAE": (lambda: s.JumpSAE(D_MODEL, D_SAE), {}),
        "RATopKSAE": (lambda: s.RATopKSAE(D_MODEL, D_SAE, points, top_k=K), {"k": str(K)}),
        "RAJumpSAE": (lambda: s.RAJumpSAE(D_MODEL, D_SAE, points, delta=0.5), {"delta": "0.5"}),
    }
    for name, (make, said) in cases.items():
        threshold = float(said["running_threshold"]) if "running_threshold" in said else None
        yield f"overcomplete-{name}", lambda folder, a=(make, threshold): over(a[0], folder, a[1]), said


def load_over(folder: Path) -> tuple[Tensor, Tensor]:
    s = import_overcomplete()
    about = json.loads((folder / "overcomplete.json").read_text())
    more = {"top_k": about["k"]} if about["class"] == "TopKSAE" else {}
    sae = getattr(s, about["class"])(
        about["input_shape"], about["nb_concepts"], dictionary_params={"normalization": about["normalization"]}, **more
    )
    sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
    return run_over(sae)


# the two commands


def make(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    cases, expected = {}, {"x": inputs()}
    for i, (name, save, said) in enumerate([*all_of_lens(), *all_of_learning(), *all_others(), *all_of_overcomplete()]):
        torch.manual_seed(i)
        (root / name).mkdir(exist_ok=True)
        acts, x_hat = save(root / name)
        assert 0.02 < (acts > 0).float().mean() < 0.98, f"{name}: {(acts > 0).float().mean():.3f} of latents fire, which proves little"
        expected |= {f"{name}.acts": acts.contiguous(), f"{name}.x_hat": x_hat.contiguous()}
        cases[name] = said
    save_file(expected, root / "expected.safetensors")
    versions = {name: metadata.version(name) for name in LIBRARIES}
    (root / "cases.json").write_text(json.dumps({"versions": versions, "said": cases}, indent=1) + "\n")


def load(root: Path) -> None:
    """Save acts and x_hat of the SAEs that Ommatid exported."""
    from dictionary_learning.utils import load_dictionary
    from sae_lens import SAE

    def load_respelled(folder: Path) -> Any:
        text = (folder / "config.json").read_text().replace("Matroyshka", "Matryoshka")
        (folder / "config.json").write_text(text)
        return load_dictionary(str(folder), "cpu")[0]

    loaders: dict[str, Callable[[Path], tuple[Tensor, Tensor]]] = {
        "saelens": lambda folder: run_lens(SAE.load_from_disk(folder)),
        "dictionary_learning": lambda folder: run_learnt(load_dictionary(str(folder), "cpu")[0]),
        "sae_for_vlm": lambda folder: run_learnt(load_respelled(folder)),
        "sparsify": run_sparse,
        "saev": run_saev,
        "overcomplete": load_over,
    }
    loaded = {}
    for name, form in json.loads((root / "exports.json").read_text()).items():
        acts, x_hat = loaders[form](root / name)
        loaded |= {f"{name}.acts": acts.contiguous(), f"{name}.x_hat": x_hat.contiguous()}
    save_file(loaded, root / "loaded.safetensors")


if __name__ == "__main__":
    command, where, *sizes = sys.argv[1:]
    if sizes:
        D_MODEL, D_SAE, N = map(int, sizes)
        K = max(4, D_SAE // 32)
    elif (Path(where) / "x.safetensors").exists():
        X = load_file(Path(where) / "x.safetensors")["x"]
        N, D_MODEL = X.shape
    {"make": make, "load": load}[command](Path(where))
