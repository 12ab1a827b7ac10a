"""The sparse autoencoder at inference: encode, decode, load and save."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import threshold

from ommatid.errors import ModelError

WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
"""Names of the tensors that every SAE has."""
GATED = ("gate_scale", "gate_shift")
"""Names of the additional tensors of a gated SAE."""

Activation = Literal["threshold", "topk", "gated"]


@dataclass(frozen=True)
class SAEConfig:
    """The configuration of an SAE, as stored in cfg.json."""

    variant: str
    """Training method, such as batch_topk."""
    d_model: int
    """Width of the activations that are encoded."""
    d_sae: int
    """Number of latents."""
    k: int
    """Mean number of latents that fire per token."""
    hookpoint: str
    """Hookpoint whose activations are encoded."""
    model: str
    """Name of the model that the activations come from."""
    activation: Activation = "threshold"
    """How activations follow from pre-activations: see `SAE`."""
    target: str | None = None
    """Hookpoint whose activations a transcoder decodes; None for an autoencoder."""
    prefixes: tuple[int, ...] | None = None
    """Sizes of a Matryoshka SAE's levels: the first `prefixes[l]` latents form a dictionary by themselves. The last is d_sae."""


class SAE:
    """A sparse autoencoder: pre_acts = x W_enc + b_enc;  x̂ = acts W_dec + b_dec.

    `SAEConfig.activation` selects how acts follow from pre_acts:

    - threshold: acts = pre_acts where pre_acts > threshold, else 0 (JumpReLU, arXiv 2407.14435). With threshold 0, this is ReLU.
    - topk: acts = pre_acts where they are among the k largest positive ones of their token, else 0 (arXiv 2406.04093).
    - gated: acts = relu(pre_acts · gate_scale + gate_shift) where pre_acts > 0, else 0 (arXiv 2404.16014, equations 6 and 7).
      pre_acts are the gate's pre-activations; magnitudes share the gate's weights.

    x is the raw activation of the model: the scale used in training and the bias subtracted before the encoder are folded into the
    weights. A direction is a row of W_dec. Directions trained here have unit norm; those of an imported SAE keep their norm, and with it
    the scale of their acts.
    """

    def __init__(
        self,
        config: SAEConfig,
        W_enc: Float[Tensor, "d_model d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"],
        gate_scale: Float[Tensor, " d_sae"] | None = None,
        gate_shift: Float[Tensor, " d_sae"] | None = None,
    ):
        self.config = config
        self.W_enc = W_enc
        """Encoder, `(d_model, d_sae)`."""
        self.b_enc = b_enc
        """Bias of the encoder, `(d_sae,)`."""
        self.W_dec = W_dec
        """Decoder directions, `(d_sae, d_out)`; d_out is d_model unless the SAE is a transcoder."""
        self.b_dec = b_dec
        """Bias of the decoder, `(d_out,)`."""
        self.threshold = threshold
        """Threshold of all latents, `()`, or of each, `(d_sae,)`; non-negative."""
        self.gate_scale = gate_scale
        """Scale of magnitudes relative to gates, `(d_sae,)`, positive; None unless the SAE is gated."""
        self.gate_shift = gate_shift
        """Shift of magnitudes relative to scaled gates, `(d_sae,)`; None unless the SAE is gated."""

    @property
    def name(self) -> str:
        """Training method, such as batch_topk."""
        return self.config.variant

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.config.d_sae

    @property
    def d_model(self) -> int:
        """Width of the activations that are encoded."""
        return self.config.d_model

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.W_dec.shape[1]

    def pre_acts(self, x_bd: Float[Tensor, "batch d_model={self.d_model}"]) -> Float[Tensor, "batch d_sae={self.n_latents}"]:
        """Return the pre-activations `(batch, d_sae)` of x `(batch, d_model)`."""
        return torch.addmm(self.b_enc, x_bd, self.W_enc)

    def encode(self, x_bd: Float[Tensor, "batch d_model={self.d_model}"]) -> Float[Tensor, "batch d_sae={self.n_latents}"]:
        """Return the latent activations `(batch, d_sae)` of x `(batch, d_model)`."""
        return self._activate(self.pre_acts(x_bd))

    def encode_latents(
        self, x_bd: Float[Tensor, "batch d_model={self.d_model}"], latents: Int64[Tensor, " latents"]
    ) -> Float[Tensor, "batch latents"]:
        """Return the activations `(batch, latents)` of some latents, `(latents,)` int64, on x `(batch, d_model)`.

        Only their pre-activations are computed, except in a TopK SAE, where all latents compete. The values equal those of `encode` except
        for rounding.
        """
        if self.config.activation == "topk":
            return self.encode(x_bd)[:, latents]
        config = replace(self.config, d_sae=len(latents), prefixes=None)
        per_latent = {name: tensor[..., latents] for name, tensor in self.tensors().items() if name in ("W_enc", "b_enc", *GATED)}
        threshold = self.threshold[latents] if self.threshold.ndim else self.threshold
        return SAE(config, **per_latent, W_dec=self.W_dec[latents], b_dec=self.b_dec, threshold=threshold).encode(x_bd)

    def encode_with_margins(
        self, x_bd: Float[Tensor, "batch d_model={self.d_model}"]
    ) -> tuple[Float[Tensor, "batch d_sae={self.n_latents}"], Float[Tensor, "batch d_sae={self.n_latents}"]]:
        """Return the latent activations of x `(batch, d_model)`, and the margins of its pre-activations, `(batch, d_sae)` each.

        A margin is a pre-activation minus what it must exceed for its latent to fire: the latent's own threshold or, if k other latents of
        a TopK SAE fire on the token, the smallest of their activations. Margins of latents that fire are at least 0, and those of others
        at most 0, except for rounding.
        """
        pre_acts = self.pre_acts(x_bd)
        acts = self._activate(pre_acts.clone())
        needed = self.thresholds
        if self.config.activation == "topk":
            is_full = (acts > 0).sum(1, keepdim=True) == self.config.k
            needed = torch.where(is_full, acts.masked_fill(acts == 0, torch.inf).amin(1, keepdim=True), 0.0)
        return acts, pre_acts.sub_(needed)

    @property
    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """Value that each latent's pre-activation must exceed for it to fire, `(d_sae,)`; necessary but not sufficient in a TopK SAE."""
        match self.config.activation:
            case "threshold" | "topk":
                return self.threshold.expand(self.n_latents)
            case "gated":
                assert self.gate_scale is not None and self.gate_shift is not None, self.config
                return (-self.gate_shift / self.gate_scale).clamp_min(0.0)
            case _:
                assert_never(self.config.activation)

    def _activate(self, pre_acts: Float[Tensor, "batch d_sae={self.n_latents}"]) -> Float[Tensor, "batch d_sae={self.n_latents}"]:
        """Return the activations of pre-activations, whose memory may be reused."""
        match self.config.activation:
            case "threshold":
                if self.threshold.ndim == 0:
                    return threshold(pre_acts, float(self.threshold), 0.0, inplace=True)
                return pre_acts.mul_(pre_acts > self.threshold)
            case "topk":
                return keep_topk(pre_acts, self.config.k)
            case "gated":
                assert self.gate_scale is not None and self.gate_shift is not None, self.config
                is_closed = pre_acts <= 0
                # The ReLU comes last, because autograd needs its result unchanged.
                return pre_acts.mul_(self.gate_scale).add_(self.gate_shift).masked_fill_(is_closed, 0.0).relu_()
            case _:
                assert_never(self.config.activation)

    def decode(self, acts_bs: Float[Tensor, "batch d_sae={self.n_latents}"]) -> Float[Tensor, "batch d_out={self.d_out}"]:
        """Return the reconstruction x̂ `(batch, d_out)` of acts `(batch, d_sae)`."""
        return torch.addmm(self.b_dec, acts_bs, self.W_dec)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as sae.safetensors stores them."""
        names = (*TENSORS, *(GATED if self.config.activation == "gated" else ()))
        return {name: getattr(self, name) for name in names}

    def save(self, weights: Path, config: Path) -> None:
        """Write sae.safetensors to the path `weights`, and cfg.json to the path `config`."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}, weights)
        config.write_text(json.dumps(asdict(self.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "SAE":
        """Read an SAE that `save` wrote into a folder.

        Args:
            folder: Folder with sae.safetensors and cfg.json.
            device: Device for the weights.

        Returns:
            The SAE.

        Raises:
            ModelError: As for `load_config`.
        """
        return cls(load_config(folder), **load_file(folder / WEIGHTS, device=device))


def load_config(folder: Path) -> SAEConfig:
    """Read cfg.json from a folder.

    Args:
        folder: Folder with cfg.json.

    Returns:
        The configuration.

    Raises:
        ModelError: cfg.json lacks a key, has an unknown key, or names an unknown activation.
    """
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = set(SAEConfig.__dataclass_fields__)
    if odd := sorted(values.keys() ^ known):
        keys = ", ".join(sorted(known))
        raise ModelError(f"{folder / CONFIG}: {', '.join(odd)}: missing or unknown; this version of Ommatid expects the keys {keys}")
    if values["activation"] not in get_args(Activation):
        allowed = ", ".join(get_args(Activation))
        raise ModelError(f"{folder / CONFIG}: activation: {values['activation']!r} is not known; allowed values are {allowed}")
    prefixes = values.pop("prefixes")
    return SAEConfig(prefixes=None if prefixes is None else tuple(prefixes), **values)


def keep_topk(pre_acts_bs: Float[Tensor, "batch d_sae"], k: int) -> Float[Tensor, "batch d_sae"]:
    """Return pre_acts `(batch, d_sae)` with all but the k largest positive entries of each row set to 0."""
    top = pre_acts_bs.topk(k, dim=1)
    return torch.zeros_like(pre_acts_bs).scatter_(1, top.indices, top.values.relu_())


def make_untrained(config: SAEConfig, sample_nd: Float[Tensor, "tokens d_model={config.d_model}"], seed: int) -> SAE:
    """Make an untrained SAE with random unit directions, a control that shows what training adds.

    Args:
        config: Configuration of the trained SAE; the control has the same widths and k.
        sample_nd: Tokens, `(tokens, d_model)`. Their mean becomes b_dec, and the threshold is set so that, on average, k latents fire per
            token.
        seed: Seed of the directions.

    Returns:
        The untrained SAE.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(config.d_sae, config.d_model, generator=generator)
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    b_dec = sample_nd.mean(0)
    b_enc = -(W_dec @ b_dec)
    pre_acts = torch.addmm(b_enc, sample_nd, W_dec.T)
    n_firings = min(config.k * len(sample_nd), pre_acts.numel() - 1)
    threshold = pre_acts.flatten().topk(n_firings + 1).values[-1].clamp(min=0)
    untrained = SAEConfig("untrained", config.d_model, config.d_sae, config.k, config.hookpoint, config.model)
    return SAE(untrained, W_dec.T.contiguous(), b_enc, W_dec, b_dec, threshold)
