"""SAEs of overcomplete: a bare state dict, and overcomplete.json, in which Ommatid records what the state dict lacks."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop.files import PT, read_json, read_tensors, write_json
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.interop.weights import Folded, Kind, Shape, float_tensors, make_sae, refuse_transcoder, take
from ommatid.sae.model import SAE, Activation

FILES: str = "a .pt or .safetensors file with dictionary._weights or dictionary.C"

CONFIG = "overcomplete.json"
WEIGHTS = "sae.pt"
BATCH_NORM_EPS = 1e-5
"""The default of torch.nn.BatchNorm1d, which overcomplete uses."""
EPS = 1e-8
"""Number that overcomplete adds to norms before it divides by them."""


@dataclass(frozen=True)
class Class:
    """One of the library's SAE classes."""

    variant: str
    """Ommatid's name for its variant."""
    activation: Activation
    """Activation of `ommatid.sae.model.SAE`."""


CLASSES = {
    "SAE": Class("relu", "threshold"),
    "TopKSAE": Class("topk", "topk"),
    "BatchTopKSAE": Class("batch_topk", "threshold"),
    "JumpSAE": Class("jumprelu", "threshold"),
    "RATopKSAE": Class("archetypal", "topk"),
    "RAJumpSAE": Class("archetypal", "threshold"),
}
NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda rows: rows / (rows.norm(dim=1, keepdim=True) + EPS),
    "max_l2": lambda rows: rows / rows.norm(dim=1).amax(),
    "l1": lambda rows: rows / (rows.norm(p=1, dim=1, keepdim=True) + EPS),
    "max_l1": lambda rows: rows / rows.norm(p=1, dim=1).amax(),
    "identity": lambda rows: rows,
}
TAKES: Mapping[str, str] = {
    "class": f"one of {', '.join(CLASSES)}",
    "running_threshold": "sae.running_threshold of a BatchTopKSAE, which its state dict lacks",
    "normalization": f"normalization of the dictionary, one of {', '.join(NORMALIZATIONS)}; by default l2, if rows have roughly unit norm",
    "delta": "delta of an archetypal dictionary, by default 1.0",
}

DICTIONARY: Mapping[str, Shape] = {"dictionary._weights": ("d_sae", "d_model"), "dictionary.multiplier": ()}
ARCHETYPAL: Mapping[str, Shape] = {
    "dictionary.C": ("n_points", "d_model"),
    "dictionary.W": ("d_sae", "n_points"),
    "dictionary.Relax": ("d_sae", "d_model"),
    "dictionary.multiplier": (),
}
LINEAR: Mapping[str, Shape] = {"encoder.final_block.0.weight": ("d_sae", "d_model"), "encoder.final_block.0.bias": ("d_sae",)}
BATCH_NORM: Mapping[str, Shape] = {
    f"encoder.final_block.1.{name}": ("d_sae",) for name in ("weight", "bias", "running_mean", "running_var")
} | {"encoder.final_block.1.num_batches_tracked": ()}
TIED = "encoder.tied_to."


def detect(path: Path) -> bool:
    """Return whether the path is a file, or a folder with sae.pt, that holds a dictionary of overcomplete."""
    file = _locate(path)
    if file.suffix not in (*PT, ".safetensors") or not file.is_file():
        return False
    return bool({"dictionary._weights", "dictionary.C"} & read_tensors(file).keys())


def read(path: Path, overrides: Overrides) -> SAE:
    """Read an SAE; fold the dictionary's normalization and multiplier, and a batch normalization after the encoder.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `Format.read`; or a value that the state dict lacks is not given, or the encoder is not linear.
    """
    file = _locate(path)
    tensors = read_tensors(file)
    beside = file.with_name(CONFIG)
    recorded = {name: str(value) for name, value in (read_json(beside) if beside.is_file() else {}).items() if name in (*TAKES, "k")}
    overrides = Overrides(overrides.hookpoint, overrides.model, overrides.target, {**recorded, **overrides.values})
    name = _choose_class(tensors, overrides, file)
    is_tied = any(key.startswith(TIED) for key in tensors)
    # A tied encoder stores the dictionary a second time.
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(TIED)}
    weights = take(tensors, _shapes(tensors.keys(), is_tied, file), file)
    W_dec = _read_dictionary(weights, overrides, file)
    W_enc, b_enc = _read_encoder(weights, W_dec, is_tied)
    b_dec = torch.zeros(W_dec.shape[1], dtype=torch.float64)
    folded = Folded(W_enc, b_enc, W_dec, b_dec, _threshold(name, weights.get("thresholds"), overrides, file))
    return make_sae(folded, Kind(CLASSES[name].variant, CLASSES[name].activation), overrides, file)


def _locate(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def _choose_class(tensors: Mapping[str, Tensor], overrides: Overrides, file: Path) -> str:
    if "Q" in tensors:
        raise ModelError(f"{file}: a QSAE of overcomplete rounds its codes to learnt levels, which Ommatid cannot represent; {_readable()}")
    if not any(name.startswith("encoder.") for name in tensors):
        raise ModelError(f"{file}: has no encoder, like an MpSAE or OMPSAE, which choose latents one after another; {_readable()}")
    is_jump, is_archetypal = "thresholds" in tensors, "dictionary.C" in tensors
    if is_jump:
        return "RAJumpSAE" if is_archetypal else "JumpSAE"
    possible = ("RATopKSAE",) if is_archetypal else ("SAE", "TopKSAE", "BatchTopKSAE")
    named = overrides.choice("class", CLASSES)
    if named is None and not is_archetypal:
        raise ModelError(f"{file}: SAE, TopKSAE and BatchTopKSAE have the same state dict; name the class with --set class=...")
    if named is not None and named not in possible:
        raise ModelError(f"{file}: class {named} has other tensors; these belong to {' or '.join(possible)}")
    return named or possible[0]


def _readable() -> str:
    return f"Ommatid reads {', '.join(CLASSES)} with a linear encoder"


def _threshold(name: str, thresholds: Tensor | None, overrides: Overrides, file: Path) -> Tensor:
    """Return the threshold: the next float below overcomplete's, because there latents fire at the threshold, and here only above it."""
    if thresholds is not None:
        below = thresholds.float().exp()
    elif name == "BatchTopKSAE":
        if (given := overrides.number("running_threshold")) is None:
            raise ModelError(
                f"{file}: a BatchTopKSAE keeps its threshold outside its state dict; give it with "
                "--set running_threshold=<sae.running_threshold>"
            )
        below = torch.tensor(given)
    else:
        return torch.tensor(0.0)
    return torch.nextafter(below, torch.tensor(-torch.inf))


def _shapes(names: Set[str], is_tied: bool, file: Path) -> Mapping[str, Shape]:
    dictionary = ARCHETYPAL if "dictionary.C" in names else DICTIONARY
    thresholds: Mapping[str, Shape] = {"thresholds": ("d_sae",)} if "thresholds" in names else {}
    return {**dictionary, **thresholds, **_encoder_shapes({name for name in names if name.startswith("encoder.")}, is_tied, file)}


def _encoder_shapes(names: Set[str], is_tied: bool, file: Path) -> Mapping[str, Shape]:
    bias: dict[str, Shape] = {"encoder.bias": ("d_sae",)} if "encoder.bias" in names else {}
    if is_tied:
        return bias
    if "encoder.weight" in names:
        return {"encoder.weight": ("d_sae", "d_model"), **bias}
    if deep := sorted(name for name in names if not name.startswith("encoder.final_block.")):
        raise ModelError(f"{file}: the encoder has several layers ({deep[0]}, ...), and Ommatid's is one matrix; {_readable()}")
    if "encoder.final_block.1.weight" not in names:
        return LINEAR
    if "encoder.final_block.1.running_mean" not in names:
        raise ModelError(
            f"{file}: a layer normalization after the encoder depends on each activation and cannot be folded into weights; {_readable()}"
        )
    return {**LINEAR, **BATCH_NORM}


def _read_encoder(weights: Mapping[str, Tensor], W_dec: Tensor, is_tied: bool) -> tuple[Tensor, Tensor]:
    """Return W_enc `(d_model, d_sae)` and b_enc `(d_sae,)`."""
    if is_tied or "encoder.weight" in weights:
        W_enc = W_dec.T if is_tied else weights["encoder.weight"].T
        return W_enc, weights.get("encoder.bias", torch.zeros(len(W_dec), dtype=torch.float64))
    W_enc, b_enc = weights["encoder.final_block.0.weight"].T, weights["encoder.final_block.0.bias"]
    if "encoder.final_block.1.weight" not in weights:
        return W_enc, b_enc
    scale, shift, mean, variance = (weights[f"encoder.final_block.1.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))
    factor = scale / (variance + BATCH_NORM_EPS).sqrt()
    return W_enc * factor, (b_enc - mean) * factor + shift


def _read_dictionary(weights: Mapping[str, Tensor], overrides: Overrides, file: Path) -> Tensor:
    """Return the directions `(d_sae, d_model)`, as overcomplete's get_dictionary does."""
    if "dictionary.C" in weights:
        mix = weights["dictionary.W"].relu()
        mix = mix / (mix.sum(dim=1, keepdim=True) + EPS)
        relax, delta = weights["dictionary.Relax"], overrides.number("delta")
        relax = relax * ((1.0 if delta is None else delta) / relax.norm(dim=1, keepdim=True)).clamp(max=1)
        rows = mix @ weights["dictionary.C"] + relax
    else:
        rows = NORMALIZATIONS[_normalization(weights["dictionary._weights"], overrides, file)](weights["dictionary._weights"])
    return rows * weights["dictionary.multiplier"].exp()


def _normalization(rows: Tensor, overrides: Overrides, file: Path) -> str:
    if named := overrides.choice("normalization", NORMALIZATIONS):
        return named
    norms = rows.norm(dim=1)
    if norms.min() < 0.8 or norms.max() > 1.25:
        raise ModelError(
            f"{file}: rows of the dictionary have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}, "
            f"not unit norm; name the normalization with --set normalization=... ({', '.join(NORMALIZATIONS)})"
        )
    return "l2"


def write(sae: SAE, folder: Path) -> None:
    """Write sae.pt, for a TopKSAE, JumpSAE or SAE with dictionary_params={"normalization": "identity"}, and overcomplete.json.

    Raises:
        ModelError: The SAE is gated, a transcoder, or has a b_dec other than 0: overcomplete's decoder has no bias.
    """
    refuse_transcoder(sae, "overcomplete")
    weights = float_tensors(sae)
    if sae.config.activation == "gated":
        raise ModelError("overcomplete has no gated SAE; write it as saelens or dictionary_learning")
    if weights["b_dec"].any():
        raise ModelError("overcomplete's decoder has no bias, and this SAE has one; write it as saelens or dictionary_learning")
    name = "TopKSAE" if sae.config.activation == "topk" else "JumpSAE" if (weights["threshold"] > 0).any() else "SAE"
    encoder = {"encoder.final_block.0.weight": weights["W_enc"].T.contiguous(), "encoder.final_block.0.bias": weights["b_enc"]}
    state = {"dictionary._weights": weights["W_dec"], "dictionary.multiplier": torch.tensor(0.0), **encoder}
    if name == "JumpSAE":
        state["thresholds"] = weights["threshold"].double().log().float().expand(sae.config.d_sae).contiguous()
    torch.save(state, folder / WEIGHTS)
    sizes = {"input_shape": sae.config.d_model, "nb_concepts": sae.config.d_sae, "k": sae.config.k}
    write_json(folder / CONFIG, {"class": name, "normalization": "identity", **{key: n for key, n in sizes.items() if n}})
