"""Weights of an SAE during conversion: tensors are checked, folded in double precision, and rounded once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop.overrides import Overrides, need
from ommatid.sae.model import SAE, Activation, SAEConfig

Shape = tuple[str, ...]

VECTORS = {"b_enc": ("d_sae",), "b_dec": ("d_model",)}
MATRICES = {"W_enc": ("d_model", "d_sae"), "W_dec": ("d_sae", "d_model")}
PLAIN: Mapping[str, Shape] = VECTORS | MATRICES
"""Names and shapes of tensors that most libraries share with Ommatid."""


def take(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], where: Path) -> dict[str, Tensor]:
    """Check tensors and convert them to float64.

    Args:
        tensors: Tensors by name.
        shapes: Names of each tensor's axes. Axes with the same name must have the same size.
        where: File of the tensors, for messages.

    Returns:
        The tensors in float64, by name.

    Raises:
        ModelError: A tensor is missing, unknown, of the wrong shape, or not finite.
    """
    if odd := sorted(tensors.keys() ^ shapes.keys()):
        words = [f"{name} ({'missing' if name in shapes else 'not known'})" for name in odd]
        raise ModelError(f"{where}: {', '.join(words)}; expected {', '.join(sorted(shapes))}")
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
    """The weights of an SAE in Ommatid's form, in float64: see `ommatid.sae.model.SAE`."""

    W_enc: Float[Tensor, "d_model d_sae"]
    """Encoder, `(d_model, d_sae)`."""
    b_enc: Float[Tensor, " d_sae"]
    """Bias of the encoder, `(d_sae,)`."""
    W_dec: Float[Tensor, "d_sae d_out"]
    """Decoder directions, `(d_sae, d_out)`."""
    b_dec: Float[Tensor, " d_out"]
    """Bias of the decoder, `(d_out,)`."""
    threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"] | float = 0.0
    """Threshold of all latents, `()`, or of each, `(d_sae,)`. Negative values count as 0, because the libraries apply a ReLU first."""
    gate_scale: Float[Tensor, " d_sae"] | None = None
    """Scale of magnitudes relative to gates, `(d_sae,)`."""
    gate_shift: Float[Tensor, " d_sae"] | None = None
    """Shift of magnitudes relative to scaled gates, `(d_sae,)`."""

    def after_subtracting(self, b: Tensor) -> "Folded":
        """Return weights that encode x as these encode x − b, for b `(d_model,)`."""
        return replace(self, b_enc=self.b_enc - b @ self.W_enc)

    def scaled(self, factor: Tensor) -> "Folded":
        """Return weights whose pre-activations are multiplied, and directions divided, by `factor` `(d_sae,)`, with the same threshold."""
        return replace(self, W_enc=self.W_enc * factor, b_enc=self.b_enc * factor, W_dec=self.W_dec / factor[:, None])


@dataclass(frozen=True)
class Kind:
    """What the files record about an SAE besides its weights. A field is None if the files do not record it."""

    variant: str
    """Training method."""
    activation: Activation = "threshold"
    """Activation of `SAE`."""
    k: float | None = None
    """Mean number of latents that fire per token."""
    hookpoint: str | None = None
    """Hookpoint whose activations are encoded."""
    model: str | None = None
    """Name of the model that the activations come from."""
    is_transcoder: bool = False
    """Whether the SAE decodes another hookpoint."""
    target: str | None = None
    """Hookpoint whose activations a transcoder decodes."""
    prefixes: tuple[int, ...] | None = None
    """Sizes of the Matryoshka levels, if there are any."""


def make_sae(folded: Folded, kind: Kind, overrides: Overrides, path: Path) -> SAE:
    """Make the SAE in float32.

    Args:
        folded: Weights.
        kind: What the files record besides the weights.
        overrides: Values that the user gives.
        path: Path of the SAE, for messages.

    Returns:
        The SAE.

    Raises:
        ModelError: k, hookpoint, model or target is needed but missing, k is out of range, or a folded weight is not finite.
    """
    config = _make_config(folded, kind, overrides, path)
    gated = {"gate_scale": folded.gate_scale, "gate_shift": folded.gate_shift} if kind.activation == "gated" else {}
    tensors = {"W_enc": folded.W_enc, "b_enc": folded.b_enc, "W_dec": folded.W_dec, "b_dec": folded.b_dec, **gated}
    tensors["threshold"] = _as_simple(torch.as_tensor(folded.threshold).clamp(min=0))
    rounded = {name: tensor.float().contiguous() for name, tensor in tensors.items() if tensor is not None}
    if broken := [name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(f"{path}: {', '.join(broken)}: not finite after folding; a direction has norm 0, or a scale is out of range")
    return SAE(config, **rounded)


def _as_simple(threshold: Tensor) -> Tensor:
    """Return one number, `()`, if all latents have the same threshold, because encoding is then faster."""
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
        model=need(overrides.model or kind.model, path, "which model the activations come from", "--model"),
        activation=kind.activation,
        target=target,
        prefixes=kind.prefixes,
    )


def _choose_k(kind: Kind, override: int | None, d_sae: int, path: Path) -> int:
    """Return k, or 0 if neither the files nor the user give it and encoding does not need it."""
    if kind.k is not None and kind.k <= 0:
        raise ModelError(f"{path}: k is {kind.k:g}; the number of latents that fire per token must be above 0")
    recorded = None if kind.k is None else max(round(kind.k), 1)
    k = override or recorded or 0
    if kind.activation == "topk" and not 0 < k <= d_sae:
        raise ModelError(
            f"{path}: k is {k or 'missing'}; a TopK SAE with {d_sae} latents needs one from 1 to {d_sae}; give it with --set k=N"
        )
    if kind.activation == "topk" and recorded not in (None, k):
        raise ModelError(f"{path}: its TopK has k {recorded}; with {k} it would be a different SAE; leave out --set k={k}")
    return k


def check_prefixes(widths: object, d_sae: int, where: Path) -> tuple[int, ...]:
    """Check the sizes of Matryoshka levels, and append d_sae if it is missing.

    Args:
        widths: Sizes of the levels, as found in the files.
        d_sae: Number of latents.
        where: File, for messages.

    Returns:
        The sizes; the last is d_sae.

    Raises:
        ModelError: The sizes are not whole numbers that increase to at most d_sae.
    """
    if not isinstance(widths, list | tuple) or not all(isinstance(width, int) for width in widths):
        raise ModelError(f"{where}: matryoshka levels are {widths!r}; expected a list of whole numbers")
    levels = (*widths, d_sae) if not widths or widths[-1] != d_sae else tuple(widths)
    if any(a >= b for a, b in zip((0, *levels), levels, strict=False)):
        raise ModelError(f"{where}: matryoshka levels are {list(widths)}; expected numbers that increase to at most {d_sae}")
    return levels


def refuse_transcoder(sae: SAE, format_name: str) -> None:
    """Refuse to write a transcoder as an autoencoder.

    Raises:
        ModelError: `sae` is a transcoder.
    """
    if sae.config.target is not None or sae.d_out != sae.config.d_model:
        raise ModelError(f"{format_name} has no transcoders, and this SAE decodes {sae.config.target}; write it as saelens")


def before_subtracting(sae: SAE) -> Tensor:
    """Return the b_enc `(d_sae,)` of an equivalent encoder that takes x − b_dec, for libraries that subtract b_dec."""
    W_enc, b_enc, b_dec = (tensor.detach().cpu().double() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec))
    return (b_enc + b_dec @ W_enc).float()


def float_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the SAE's tensors by name, in float32 on the CPU."""
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in sae.tensors().items()}
