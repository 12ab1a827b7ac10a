"""Weights of an SAE on their way from another library: checked, folded in double precision, and rounded once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop.overrides import Overrides, need
from ommatid.sae.model import SAE, Activation, SAEConfig

Shape = tuple[str, ...]

VECTORS = {"b_enc": ("d_sae",), "b_dec": ("d_model",)}
MATRICES = {"W_enc": ("d_model", "d_sae"), "W_dec": ("d_sae", "d_model")}
PLAIN: Mapping[str, Shape] = VECTORS | MATRICES
"""The names and shapes that most libraries share with Ommatid."""


def take(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], where: Path) -> dict[str, Tensor]:
    """The tensors that `shapes` names, in float64.

    Args:
        tensors: By name.
        shapes: Names of each one's axes; the same name is the same size everywhere.
        where: The file, for errors.

    Raises:
        ModelError: a tensor is missing, not known, of another shape, or not finite.
    """
    if odd := sorted(tensors.keys() ^ shapes.keys()):
        words = [f"{name} ({'missing' if name in shapes else 'not known'})" for name in odd]
        raise ModelError(f"{where}: {', '.join(words)}; expected are {', '.join(sorted(shapes))}")
    _check_shapes(tensors, shapes, where)
    if broken := [name for name in shapes if not torch.isfinite(tensors[name]).all()]:
        raise ModelError(f"{where}: {', '.join(broken)}: has NaN or infinite entries; the SAE diverged or the file is damaged")
    return {name: tensors[name].double() for name in shapes}


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], where: Path) -> None:
    sizes: dict[str, int] = {}
    for name, axes in sorted(shapes.items(), key=lambda item: -len(item[1])):
        shape = tuple(tensors[name].shape)
        if len(shape) != len(axes) or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
            known = ", ".join(f"{axis} {n}" for axis, n in sizes.items())
            raise ModelError(f"{where}: {name} has shape {shape}; expected ({', '.join(axes)}) with {known}")


@dataclass(frozen=True)
class Folded:
    """An SAE in Ommatid's form, in float64: see `ommatid.sae.model.SAE`."""

    W_enc: Tensor
    """(d_model, d_sae)"""
    b_enc: Tensor
    """(d_sae,)"""
    W_dec: Tensor
    """(d_sae, d_out)"""
    b_dec: Tensor
    """(d_out,)"""
    threshold: Tensor | float = 0.0
    """() or (d_sae,); below 0 is the same as 0, where acts are relu(pre_acts) at most"""
    gate_scale: Tensor | None = None
    """(d_sae,)"""
    gate_shift: Tensor | None = None
    """(d_sae,)"""

    def after_subtracting(self, b: Tensor) -> "Folded":
        """The encoder sees x - b, for b (d_model,)."""
        return replace(self, b_enc=self.b_enc - b @ self.W_enc)

    def scaled(self, factor: Tensor) -> "Folded":
        """Pre-activations times `factor` (d_sae,), directions divided by it; the threshold stays."""
        return replace(self, W_enc=self.W_enc * factor, b_enc=self.b_enc * factor, W_dec=self.W_dec / factor[:, None])


@dataclass(frozen=True)
class Kind:
    """What an SAE is, beside its weights."""

    variant: str
    """How it was trained."""
    activation: Activation = "threshold"
    """See `SAE`."""
    k: float | None = None
    """Mean number of latents that fire a token, where the files say it."""
    hookpoint: str | None = None
    """Where the activations were captured, where the files say it."""
    model: str | None = None
    """The model that is explained, where the files say it."""
    is_transcoder: bool = False
    """What is decoded is another hookpoint."""
    target: str | None = None
    """That hookpoint, where the files say it."""
    prefixes: tuple[int, ...] | None = None
    """Matryoshka levels."""


def make_sae(folded: Folded, kind: Kind, overrides: Overrides, path: Path) -> SAE:
    """The SAE, in float32.

    Raises:
        ModelError: k, hookpoint, model or target is needed and neither the files nor the user say it, or k cannot be.
    """
    config = _make_config(folded, kind, overrides, path)
    gated = {"gate_scale": folded.gate_scale, "gate_shift": folded.gate_shift} if kind.activation == "gated" else {}
    tensors = {"W_enc": folded.W_enc, "b_enc": folded.b_enc, "W_dec": folded.W_dec, "b_dec": folded.b_dec, **gated}
    tensors["threshold"] = _as_simple(torch.as_tensor(folded.threshold).clamp(min=0))
    rounded = {name: tensor.float().contiguous() for name, tensor in tensors.items() if tensor is not None}
    if broken := [name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(f"{path}: {', '.join(broken)}: not finite once folded; a direction has norm 0, or a scale is out of range")
    return SAE(config, **rounded)


def _as_simple(threshold: Tensor) -> Tensor:
    """One number where all latents have the same: encoding is faster."""
    return threshold.flatten()[0].clone() if (threshold == threshold.flatten()[0]).all() else threshold


def _make_config(folded: Folded, kind: Kind, overrides: Overrides, path: Path) -> SAEConfig:
    d_model, d_sae = folded.W_enc.shape
    k = _choose_k(kind, overrides.integer("k"), d_sae, path)
    target = (
        need(overrides.target or kind.target, path, "which hookpoint the transcoder decodes", "--target") if kind.is_transcoder else None
    )
    return SAEConfig(
        variant=kind.variant,
        d_model=d_model,
        d_sae=d_sae,
        k=k,
        hookpoint=need(overrides.hookpoint or kind.hookpoint, path, "where the activations were captured", "--hookpoint"),
        model=need(overrides.model or kind.model, path, "which model is explained", "--model"),
        activation=kind.activation,
        target=target,
        prefixes=kind.prefixes,
    )


def _choose_k(kind: Kind, said: int | None, d_sae: int, path: Path) -> int:
    """0 where nobody says it and nothing is computed with it."""
    if kind.k is not None and kind.k <= 0:
        raise ModelError(f"{path}: k is {kind.k:g}; so many latents fire a token, and it must be above 0")
    found = None if kind.k is None else max(round(kind.k), 1)
    k = said or found or 0
    if kind.activation == "topk" and not 0 < k <= d_sae:
        raise ModelError(
            f"{path}: k is {k or 'not said'}; a TopK SAE with {d_sae} latents needs one from 1 to {d_sae}; say it with --set k=N"
        )
    if kind.activation == "topk" and found not in (None, k):
        raise ModelError(f"{path}: its TopK has k {found}; with {k} it would be another SAE; leave out --set k={k}")
    return k


def check_prefixes(widths: object, d_sae: int, where: Path) -> tuple[int, ...]:
    """Matryoshka levels that end with d_sae.

    Raises:
        ModelError: they are not whole numbers that grow to at most d_sae.
    """
    if not isinstance(widths, list | tuple) or not all(isinstance(width, int) for width in widths):
        raise ModelError(f"{where}: matryoshka levels are {widths!r}; expected a list of whole numbers")
    levels = (*widths, d_sae) if not widths or widths[-1] != d_sae else tuple(widths)
    if any(a >= b for a, b in zip((0, *levels), levels, strict=False)):
        raise ModelError(f"{where}: matryoshka levels are {list(widths)}; expected numbers that grow, to at most {d_sae}")
    return levels


def refuse_transcoder(sae: SAE, format_name: str) -> None:
    """Refuse to write a transcoder as an autoencoder.

    Raises:
        ModelError: `sae` decodes another hookpoint.
    """
    if sae.config.target is not None or sae.d_out != sae.config.d_model:
        raise ModelError(f"{format_name} has no transcoders, and this SAE decodes {sae.config.target}; write it as saelens")


def before_subtracting(sae: SAE) -> Tensor:
    """b_enc (d_sae,) of an encoder that sees x - b_dec, for libraries that subtract it."""
    W_enc, b_enc, b_dec = (tensor.detach().cpu().double() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec))
    return (b_enc + b_dec @ W_enc).float()


def float_tensors(sae: SAE) -> dict[str, Tensor]:
    """The SAE's tensors by name, float32 on the CPU."""
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in sae.tensors().items()}
