"""SAEs of the package dictionary_learning: ae.pt and config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop.files import PT, child, read_json, read_tensors, text, write_json
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.interop.weights import (
    PLAIN,
    Folded,
    Kind,
    Shape,
    before_subtracting,
    check_prefixes,
    float_tensors,
    make_sae,
    refuse_transcoder,
    take,
)
from ommatid.sae.model import SAE

FILES: str = "ae.pt and config.json, or a checkpoint ae_<step>.pt"

CONFIG = "config.json"
WEIGHTS = "ae.pt"
ENCODER: Mapping[str, Shape] = {"encoder.weight": ("d_sae", "d_model"), "decoder.weight": ("d_model", "d_sae")}


@dataclass(frozen=True)
class Class:
    """One of the library's dictionary classes."""

    shapes: Mapping[str, Shape]
    """Shapes of its tensors, by name."""
    variant: str
    """Ommatid's name for its variant."""


_TOPK = {**ENCODER, "encoder.bias": ("d_sae",), "b_dec": ("d_model",), "k": (), "threshold": ()}
CLASSES: Mapping[str, Class] = {
    "AutoEncoder": Class({**ENCODER, "encoder.bias": ("d_sae",), "bias": ("d_model",)}, "relu"),
    "AutoEncoderNew": Class({**ENCODER, "encoder.bias": ("d_sae",), "decoder.bias": ("d_model",)}, "relu"),
    "AutoEncoderTopK": Class(_TOPK, "topk"),
    "BatchTopKSAE": Class(_TOPK, "batch_topk"),
    "MatryoshkaBatchTopKSAE": Class({**PLAIN, "k": (), "threshold": (), "group_sizes": ("n_levels",)}, "matryoshka"),
    "JumpReluAutoEncoder": Class({**PLAIN, "threshold": ("d_sae",)}, "jumprelu"),
    "GatedAutoEncoder": Class(
        {**ENCODER, "decoder_bias": ("d_model",)} | {name: ("d_sae",) for name in ("r_mag", "gate_bias", "mag_bias")}, "gated"
    ),
}
TAKES: Mapping[str, str] = {"class": f"if there is no config.json, one of {', '.join(CLASSES)}"}


def detect(path: Path) -> bool:
    """Return whether the path is a folder with ae.pt, or a .pt file with the tensors of a known class."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    return path.suffix in PT and bool(classes_of(read_tensors(path)))


def read(path: Path, overrides: Overrides) -> SAE:
    """Read an SAE; fold the bias that is subtracted from x, and for AutoEncoder the norms of directions, as the library's loader does.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `Format.read`, or the class is ambiguous.
    """
    return read_as(path, overrides, find_config(path), {})


def read_as(path: Path, overrides: Overrides, config: Mapping[str, Any], spellings: Mapping[str, str]) -> SAE:
    """Read an SAE as `read` does, with a given configuration.

    Args:
        path: Folder or file.
        overrides: Values that the user gives.
        config: Contents of config.json.
        spellings: Usual spellings of class names, by the spellings in the files.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `read`.
    """
    file = path / WEIGHTS if path.is_dir() else path
    tensors = read_tensors(file)
    trainer = child(config, "trainer", file)
    named = overrides.choice("class", CLASSES) or text(trainer, "dict_class", file)
    name = choose_class(tensors, spellings.get(named, named) if named else None, file)
    weights = take(tensors, CLASSES[name].shapes, file)
    about = {"hookpoint": text(trainer, "submodule_name", file), "model": text(trainer, "lm_name", file)}
    kind = replace(_make_kind(name, weights, file), **about)
    return make_sae(_FOLD[name](weights), kind, overrides, file)


def find_config(path: Path) -> dict[str, Any]:
    """Read config.json beside the weights, or in the parent of a folder `checkpoints`. Return an empty dict if there is none."""
    folder = path if path.is_dir() else path.parent
    places = [folder / CONFIG, folder.parent / CONFIG] if folder.name == "checkpoints" else [folder / CONFIG]
    return next((read_json(place) for place in places if place.is_file()), {})


def classes_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the classes that have exactly these tensors, judged by their names."""
    return [name for name, known in CLASSES.items() if known.shapes.keys() == tensors.keys()]


def choose_class(tensors: Mapping[str, Tensor], named: str | None, file: Path) -> str:
    """Decide the class of an SAE.

    Args:
        tensors: Its tensors.
        named: Name of the class according to config.json or the user, if any.
        file: File of the tensors, for messages.

    Returns:
        The name of the class.

    Raises:
        ModelError: No class has such tensors, `named` is unknown, or several classes have such tensors and `named` is none of them.
    """
    possible = classes_of(tensors)
    if not possible:
        closest = min(CLASSES, key=lambda name: (name != named, len(CLASSES[name].shapes.keys() ^ tensors.keys())))
        take(tensors, CLASSES[closest].shapes, file)
    if named is not None and named not in CLASSES:
        raise ModelError(f"{file}: class {named} is not known; the tensors are named like those of {' or '.join(possible)}")
    # StandardTrainerAprilUpdate records AutoEncoder for an AutoEncoderNew, so tensors that only one class has outweigh the recorded name.
    if named not in possible and len(possible) > 1:
        raise ModelError(f"{file}: could be {' or '.join(possible)}, and no {CONFIG} says which; name the class with --set class=...")
    return named if named in possible else possible[0]


def _linear(weights: Mapping[str, Tensor], b_enc: str, b_dec: str) -> Folded:
    return Folded(weights["encoder.weight"].T, weights[b_enc], weights["decoder.weight"].T, weights[b_dec])


def _fold_standard(weights: Mapping[str, Tensor]) -> Folded:
    folded = _linear(weights, "encoder.bias", "bias").after_subtracting(weights["bias"])
    norms = folded.W_dec.float().norm(dim=1)
    # AutoEncoder.from_pretrained normalises directions that are not of unit norm, so acts are in those units.
    return folded if torch.allclose(norms, torch.ones_like(norms)) else folded.scaled(folded.W_dec.norm(dim=1))


def _fold_new(weights: Mapping[str, Tensor]) -> Folded:
    return _linear(weights, "encoder.bias", "decoder.bias")


def _fold_topk(weights: Mapping[str, Tensor]) -> Folded:
    return _linear(weights, "encoder.bias", "b_dec").after_subtracting(weights["b_dec"])


def _fold_batch_topk(weights: Mapping[str, Tensor]) -> Folded:
    return replace(_fold_topk(weights), threshold=weights["threshold"])


def _fold_matryoshka(weights: Mapping[str, Tensor]) -> Folded:
    return _fold_jumprelu(weights).after_subtracting(weights["b_dec"])


def _fold_jumprelu(weights: Mapping[str, Tensor]) -> Folded:
    return Folded(weights["W_enc"], weights["b_enc"], weights["W_dec"], weights["b_dec"], weights["threshold"])


def _fold_gated(weights: Mapping[str, Tensor]) -> Folded:
    folded = _linear(weights, "gate_bias", "decoder_bias").after_subtracting(weights["decoder_bias"])
    ratio = weights["r_mag"].exp()
    return replace(folded, gate_scale=ratio, gate_shift=weights["mag_bias"] - ratio * weights["gate_bias"])


_FOLD = {
    "AutoEncoder": _fold_standard,
    "AutoEncoderNew": _fold_new,
    "AutoEncoderTopK": _fold_topk,
    "BatchTopKSAE": _fold_batch_topk,
    "MatryoshkaBatchTopKSAE": _fold_matryoshka,
    "JumpReluAutoEncoder": _fold_jumprelu,
    "GatedAutoEncoder": _fold_gated,
}


def _make_kind(name: str, weights: Mapping[str, Tensor], file: Path) -> Kind:
    return Kind(
        variant=CLASSES[name].variant,
        activation="topk" if name == "AutoEncoderTopK" else "gated" if name == "GatedAutoEncoder" else "threshold",
        k=float(weights["k"]) if "k" in weights else None,
        prefixes=_levels(weights["group_sizes"], len(weights["b_enc"]), file) if "group_sizes" in weights else None,
    )


def _levels(sizes: Tensor, d_sae: int, file: Path) -> tuple[int, ...]:
    ends = [int(end) for end in sizes.cumsum(0)]
    levels = check_prefixes(ends, d_sae, file)
    if len(levels) != len(ends):
        raise ModelError(f"{file}: group_sizes add up to {ends[-1] if ends else 0}, but there are {d_sae} latents")
    return levels


def write(sae: SAE, folder: Path) -> None:
    """Write an AutoEncoderTopK, GatedAutoEncoder, BatchTopKSAE or MatryoshkaBatchTopKSAE; any other SAE becomes a JumpReluAutoEncoder.

    Raises:
        ModelError: The SAE is a transcoder.
    """
    write_as(sae, folder, {})


def write_as(sae: SAE, folder: Path, spellings: Mapping[str, str]) -> None:
    """Write an SAE as `write` does, with other spellings of some class names.

    Args:
        sae: The SAE.
        folder: Folder to write.
        spellings: Spellings to write, by the usual class names.

    Raises:
        ModelError: As for `write`.
    """
    refuse_transcoder(sae, "dictionary_learning")
    name, config = _class_for(sae), sae.config
    state = {key: tensor.contiguous() for key, tensor in _UNFOLD[name](sae).items()}
    torch.save(state, folder / WEIGHTS)
    trainer = {"dict_class": spellings.get(name, name), "activation_dim": config.d_model, "dict_size": config.d_sae, "k": config.k}
    about = {"lm_name": config.model, "submodule_name": config.hookpoint, "layer": None}
    write_json(folder / CONFIG, {"trainer": trainer | about})


def _class_for(sae: SAE) -> str:
    config = sae.config
    if config.activation == "topk":
        return "AutoEncoderTopK"
    if config.activation == "gated":
        return "GatedAutoEncoder"
    if sae.threshold.ndim or not config.k:
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if config.prefixes else "BatchTopKSAE"


def _unfold_batch_topk(sae: SAE) -> dict[str, Tensor]:
    weights = float_tensors(sae)
    encoder = {"encoder.weight": weights["W_enc"].T, "encoder.bias": before_subtracting(sae)}
    return {"k": _k(sae), "threshold": weights["threshold"], "b_dec": weights["b_dec"], "decoder.weight": weights["W_dec"].T, **encoder}


def _unfold_topk(sae: SAE) -> dict[str, Tensor]:
    # The library uses this threshold only for an alternative way to encode, and measures it in training; -1 means not measured.
    return _unfold_batch_topk(sae) | {"threshold": torch.tensor(-1.0)}


def _unfold_matryoshka(sae: SAE) -> dict[str, Tensor]:
    ends = torch.tensor(sae.config.prefixes)
    return float_tensors(sae) | {"k": _k(sae), "group_sizes": ends.diff(prepend=torch.tensor([0])), "b_enc": before_subtracting(sae)}


def _unfold_jumprelu(sae: SAE) -> dict[str, Tensor]:
    return float_tensors(sae) | {"threshold": sae.threshold.detach().cpu().float().expand(sae.config.d_sae)}


def _unfold_gated(sae: SAE) -> dict[str, Tensor]:
    weights = float_tensors(sae)
    gate_bias, ratio = before_subtracting(sae).double(), weights["gate_scale"].double()
    state = {"gate_bias": gate_bias, "mag_bias": weights["gate_shift"].double() + ratio * gate_bias, "r_mag": ratio.log()}
    linear = {"encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T, "decoder_bias": weights["b_dec"]}
    return linear | {name: tensor.float() for name, tensor in state.items()}


def _k(sae: SAE) -> Tensor:
    return torch.tensor(sae.config.k, dtype=torch.int)


_UNFOLD = {
    "AutoEncoderTopK": _unfold_topk,
    "BatchTopKSAE": _unfold_batch_topk,
    "MatryoshkaBatchTopKSAE": _unfold_matryoshka,
    "JumpReluAutoEncoder": _unfold_jumprelu,
    "GatedAutoEncoder": _unfold_gated,
}
