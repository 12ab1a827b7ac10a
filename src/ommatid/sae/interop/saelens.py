"""SAEs of SAELens: cfg.json and sae_weights.safetensors."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop.files import child, number, read_json, read_safetensors, text, write_json
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.interop.weights import PLAIN, Folded, Kind, Shape, check_prefixes, float_tensors, make_sae, take
from ommatid.sae.model import SAE

FILES: str = "cfg.json and sae_weights.safetensors"
TAKES: Mapping[str, str] = {
    "scaling_factor": "factor by which SAELens multiplied activations, if normalize_activations is expected_average_only_in"
}

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
VERSION = "6.0.0"
"""SAELens version of the layout that is written: from 6.0 on, metadata is a separate object."""

TRANSCODER: Mapping[str, Shape] = {**PLAIN, "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
THRESHOLD: Mapping[str, Shape] = {"threshold": ("d_sae",)}
SHAPES: Mapping[str, Mapping[str, Shape]] = {
    "standard": PLAIN,
    "topk": PLAIN,
    "jumprelu": {**PLAIN, **THRESHOLD},
    "batchtopk": {**PLAIN, "topk_threshold": ()},
    "matryoshka_batchtopk": {**PLAIN, "topk_threshold": ()},
    "gated": {name: shape for name, shape in PLAIN.items() if name != "b_enc"}
    | {"b_gate": ("d_sae",), "b_mag": ("d_sae",), "r_mag": ("d_sae",)},
    "transcoder": TRANSCODER,
    "jumprelu_transcoder": {**TRANSCODER, **THRESHOLD},
}
"""Tensors of each supported architecture. batchtopk and matryoshka_batchtopk occur only in training checkpoints."""

VARIANTS = {"standard": "relu", "batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka", "transcoder": "relu"}
"""Ommatid's names for variants that SAELens calls differently. jumprelu_transcoder needs no entry, because only its suffix is dropped."""

REFUSED = {
    "skip_transcoder": "adds x W_skip to its reconstruction, which no latent explains",
    "jumprelu_skip_transcoder": "adds x W_skip to its reconstruction, which no latent explains",
    "abstopk": "has negative activations; in Ommatid a feature fires in one direction only",
    "temporal": "encodes a token by those before it; Ommatid encodes each token on its own",
    "matching_pursuit": "chooses latents one after another; Ommatid encodes with one matrix",
}
"""Architectures that are refused, with the reasons."""
NORMALIZED = {
    "layer_norm": "is divided by its own standard deviation",
    "constant_norm_rescale": "is divided by its own norm",
}
"""Values of normalize_activations that are refused, with what each does to an activation."""


def detect(path: Path) -> bool:
    """Return whether the path is a folder with sae_weights.safetensors."""
    return (path / WEIGHTS).is_file()


def read(path: Path, overrides: Overrides) -> SAE:
    """Read an SAE; fold b_dec if it is subtracted from x, decoder norms if they rescale acts, and the scale used in training.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `Format.read`.
    """
    cfg = _modernize(read_json(path / CONFIG), path)
    architecture = _check_architecture(cfg, path)
    weights = take(_drop_legacy(read_safetensors(path / WEIGHTS), path), SHAPES[architecture], path / WEIGHTS)
    folded = _fold(weights, cfg | {"architecture": architecture}, _scaling_factor(cfg, path, overrides))
    return make_sae(folded, _make_kind(architecture, cfg, path, folded.W_enc.shape[1]), overrides, path)


def _modernize(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert a cfg.json of a version before 6.0, as SAELens itself does: rename keys, and derive the architecture from activation_fn."""
    old = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    cfg = {old.get(name, name): value for name, value in cfg.items()}
    cfg.setdefault("architecture", "standard")
    if cfg.get("activation_fn") == "topk":
        cfg |= {"architecture": "topk", "k": child(cfg, "activation_fn_kwargs", path / CONFIG).get("k")}
    elif cfg.get("activation_fn", "relu") != "relu":
        raise ModelError(f"{path / CONFIG}: activation_fn is {cfg['activation_fn']!r}; Ommatid reads relu and topk")
    return cfg


def _check_architecture(cfg: Mapping[str, Any], path: Path) -> str:
    where = path / CONFIG
    architecture = text(cfg, "architecture", where) or "standard"
    allowed = ", ".join(SHAPES)
    if architecture in REFUSED:
        raise ModelError(f"{where}: a {architecture} SAE of SAELens {REFUSED[architecture]}; Ommatid reads {allowed}")
    if architecture not in SHAPES:
        raise ModelError(f"{where}: architecture {architecture!r} is not known; Ommatid reads {allowed}")
    # Before 6.0 the value was true or false.
    normalize = "none" if isinstance(cfg.get("normalize_activations"), bool) else text(cfg, "normalize_activations", where)
    if normalize in NORMALIZED:
        raise ModelError(
            f"{where}: normalize_activations is {normalize}: each activation {NORMALIZED[normalize]}, which cannot be folded into weights"
        )
    if normalize == "covariance_whitening":
        raise ModelError(
            f"{where}: normalize_activations is covariance_whitening; call sae.fold_activation_whitening in SAELens and save it again"
        )
    return architecture


def _scaling_factor(cfg: Mapping[str, Any], path: Path, overrides: Overrides) -> float:
    """Return the factor by which training multiplied activations: 1 unless cfg.json says that it scaled them."""
    if cfg.get("normalize_activations") not in ("expected_average_only_in", True):
        return 1.0
    if (given := overrides.number("scaling_factor")) is not None:
        return given
    if (path / SCALER).is_file() and (recorded := number(read_json(path / SCALER), "scaling_factor", path / SCALER)):
        return recorded
    raise ModelError(
        f"{path / CONFIG}: normalize_activations is expected_average_only_in, and the factor used in training is not folded into the "
        f"weights; give it with --set scaling_factor=F (a checkpoint of SAELens has it in {SCALER})"
    )


def _drop_legacy(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert tensors of older versions: drop a scaling_factor of ones, and turn the log_threshold of a checkpoint into threshold."""
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not torch.allclose(scale, torch.ones_like(scale)):
        raise ModelError(f"{path / WEIGHTS}: scaling_factor of a finetuned SAE is not 1; SAELens 6 does not read it either")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").double().exp()
    return tensors


def _fold(weights: dict[str, Tensor], cfg: Mapping[str, Any], scale: float) -> Folded:
    W_enc, W_dec, b_dec = weights["W_enc"] * scale, weights["W_dec"] / scale, weights["b_dec"] / scale
    is_gated = "b_gate" in weights
    threshold = weights.get("threshold", weights.get("topk_threshold", torch.tensor(0.0)))
    folded = Folded(W_enc, weights["b_gate" if is_gated else "b_enc"], W_dec, b_dec, threshold)
    if is_gated:
        ratio = weights["r_mag"].exp()
        # The magnitude's pre-activation is expressed by the gate's; neither bias depends on x.
        folded = replace(folded, gate_scale=ratio, gate_shift=weights["b_mag"] - ratio * weights["b_gate"])
    if "transcoder" not in cfg["architecture"] and cfg.get("apply_b_dec_to_input", True):
        folded = folded.after_subtracting(b_dec)
    if cfg.get("rescale_acts_by_decoder_norm", False):
        folded = _rescale(folded, scale)
    return folded


def _rescale(folded: Folded, scale: float) -> Folded:
    """Rescale acts by decoder norms, and divide the threshold of a checkpoint by the scale, as SAELens does when it divides directions."""
    return replace(folded.scaled(folded.W_dec.norm(dim=1)), threshold=torch.as_tensor(folded.threshold) / scale)


def _make_kind(architecture: str, cfg: Mapping[str, Any], path: Path, d_sae: int) -> Kind:
    where = path / CONFIG
    about = child(cfg, "metadata", where) or cfg
    details = child(about, "training_architecture_details", where)
    trained = (text(about, "training_architecture", where) or architecture).removesuffix("_transcoder")
    widths = cfg.get("matryoshka_widths") or details.get("matryoshka_widths")
    return Kind(
        variant=VARIANTS.get(trained, trained),
        activation="gated" if architecture == "gated" else "topk" if architecture == "topk" else "threshold",
        k=number(cfg, "k", where) or number(details, "k", where),
        hookpoint=text(about, "hook_name", where),
        model=text(about, "model_name", where),
        is_transcoder="transcoder" in architecture,
        target=text(about, "hook_name_out", where),
        prefixes=check_prefixes(widths, d_sae, where) if widths else None,
    )


def write(sae: SAE, folder: Path) -> None:
    """Write a jumprelu SAE, a standard one if all thresholds are 0, a topk or gated one, or a transcoder of the first two kinds.

    Raises:
        ModelError: The SAE is a topk or gated transcoder, which SAELens does not have.
    """
    config = sae.config
    weights = float_tensors(sae)
    threshold = weights.pop("threshold")
    is_transcoder = config.target is not None
    architecture: str = config.activation
    if config.activation == "threshold":
        architecture = "jumprelu" if (threshold > 0).any() else "standard"
    if is_transcoder and architecture in ("topk", "gated"):
        raise ModelError(f"SAELens has no {architecture} transcoder; its transcoders are ReLU and JumpReLU")
    if architecture == "jumprelu":
        weights["threshold"] = threshold.expand(config.d_sae).contiguous()
    if architecture == "gated":
        weights = _as_gated(weights)
    if is_transcoder:
        architecture = "transcoder" if architecture == "standard" else "jumprelu_transcoder"
    save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, _describe(sae, architecture))


def _as_gated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    b_gate, ratio, shift = weights.pop("b_enc"), weights.pop("gate_scale"), weights.pop("gate_shift")
    b_mag = shift.double() + ratio.double() * b_gate.double()
    return weights | {"b_gate": b_gate, "r_mag": ratio.double().log().float(), "b_mag": b_mag.float()}


def _describe(sae: SAE, architecture: str) -> dict[str, Any]:
    config = sae.config
    details = ({"k": config.k} if config.k else {}) | ({"matryoshka_widths": list(config.prefixes)} if config.prefixes else {})
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": VERSION,
        "model_name": config.model,
        "hook_name": config.hookpoint,
        "training_architecture": next((theirs for theirs, ours in VARIANTS.items() if ours == config.variant), config.variant),
        "training_architecture_details": details,
    }
    return {
        "architecture": architecture,
        "d_in": config.d_model,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | ({"hook_name_out": config.target} if config.target else {}),
        **({"d_out": sae.d_out} if "transcoder" in architecture else {}),
        **({"k": config.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
    }
