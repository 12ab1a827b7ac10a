"""The sparse autoencoder as it is used: encode, decode, load, save."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import threshold

from ommatid.errors import ModelError

WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
"""Of every SAE; a gated one has GATED besides."""
GATED = ("gate_scale", "gate_shift")

Activation = Literal["threshold", "topk", "gated"]


@dataclass(frozen=True)
class SAEConfig:
    """What cfg.json says of an SAE."""

    variant: str
    """How it was trained, such as batch_topk."""
    d_model: int
    """Width of the activations that are encoded."""
    d_sae: int
    """Latents."""
    k: int
    """Mean number of latents that fire a token."""
    hookpoint: str
    """Where the activations were captured."""
    model: str
    """The model that is explained."""
    activation: Activation = "threshold"
    """Which pre-activations become activations: see `SAE`."""
    target: str | None = None
    """Hookpoint whose activations are decoded, where it is another (a transcoder)."""
    prefixes: tuple[int, ...] | None = None
    """Matryoshka: so many first latents are a dictionary by themselves, for each level; the last is d_sae."""


class SAE:
    """A sparse autoencoder: pre_acts = x W_enc + b_enc;  x̂ = acts W_dec + b_dec.

    `activation` says what acts are:
    threshold: pre_acts where pre_acts > threshold, else 0 (JumpReLU, arXiv 2407.14435); ReLU is the threshold 0.
    topk: the k largest positive pre_acts of each token, else 0 (arXiv 2406.04093).
    gated: relu(pre_acts · gate_scale + gate_shift) where pre_acts > 0, else 0 (arXiv 2404.16014, equations 6 and 7: the gate's
    pre-activation with magnitudes that share its weights).

    x is the activation as the model gives it: the scale of training, and what is subtracted before the encoder, are folded into the
    biases. A direction is a row of W_dec, of unit norm where it was trained here; one of another library keeps its norm, and so its acts.
    """

    def __init__(
        self,
        config: SAEConfig,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        gate_scale: Tensor | None = None,
        gate_shift: Tensor | None = None,
    ):
        self.config = config
        self.W_enc = W_enc
        """(d_model, d_sae)"""
        self.b_enc = b_enc
        """(d_sae,)"""
        self.W_dec = W_dec
        """(d_sae, d_out): d_out is d_model, but for a transcoder."""
        self.b_dec = b_dec
        """(d_out,)"""
        self.threshold = threshold
        """() or (d_sae,), >= 0"""
        self.gate_scale = gate_scale
        """(d_sae,), > 0, where gated"""
        self.gate_shift = gate_shift
        """(d_sae,), where gated"""

    @property
    def name(self) -> str:
        """How it was trained, such as batch_topk."""
        return self.config.variant

    @property
    def n_latents(self) -> int:
        """Latents."""
        return self.config.d_sae

    @property
    def d_model(self) -> int:
        """Width of the activations that are encoded."""
        return self.config.d_model

    @property
    def d_out(self) -> int:
        """Width of what is decoded."""
        return self.W_dec.shape[1]

    def pre_acts(self, x_bd: Tensor) -> Tensor:
        """Latents before the nonlinearity (batch, d_sae) of x (batch, d_model)."""
        return torch.addmm(self.b_enc, x_bd, self.W_enc)

    def encode(self, x_bd: Tensor) -> Tensor:
        """Latent activations (batch, d_sae) of x (batch, d_model)."""
        pre_acts = self.pre_acts(x_bd)
        match self.config.activation:
            case "threshold":
                if self.threshold.ndim == 0:
                    return threshold(pre_acts, float(self.threshold), 0.0, inplace=True)
                return pre_acts.mul_(pre_acts > self.threshold)
            case "topk":
                return keep_topk(pre_acts, self.config.k)
            case "gated":
                assert self.gate_scale is not None and self.gate_shift is not None, self.config
                is_open = pre_acts > 0
                return pre_acts.mul_(self.gate_scale).add_(self.gate_shift).relu_().mul_(is_open)
            case _:
                assert_never(self.config.activation)

    def decode(self, acts_bs: Tensor) -> Tensor:
        """Reconstruction x̂ (batch, d_out) of acts (batch, d_sae)."""
        return torch.addmm(self.b_dec, acts_bs, self.W_dec)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as sae.safetensors has them."""
        names = (*TENSORS, *(GATED if self.config.activation == "gated" else ()))
        return {name: getattr(self, name) for name in names}

    def save(self, weights: Path, config: Path) -> None:
        """Write sae.safetensors and cfg.json."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}, weights)
        config.write_text(json.dumps(asdict(self.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "SAE":
        """Read what `save` wrote into a folder.

        Raises:
            ModelError: cfg.json is of another version of Ommatid.
        """
        return cls(load_config(folder), **load_file(folder / WEIGHTS, device=device))


def load_config(folder: Path) -> SAEConfig:
    """Read cfg.json in a folder.

    Raises:
        ModelError: it lacks something, has what is not known here, or names an activation that is not known.
    """
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = set(SAEConfig.__dataclass_fields__)
    if odd := sorted(values.keys() ^ known):
        raise ModelError(f"{folder / CONFIG}: {', '.join(odd)}: missing or not known to this version; it takes {', '.join(sorted(known))}")
    if values["activation"] not in get_args(Activation):
        allowed = ", ".join(get_args(Activation))
        raise ModelError(f"{folder / CONFIG}: activation: {values['activation']!r} is not known; allowed are {allowed}")
    prefixes = values.pop("prefixes")
    return SAEConfig(prefixes=None if prefixes is None else tuple(prefixes), **values)


def keep_topk(pre_acts_bs: Tensor, k: int) -> Tensor:
    """Zero all but the k largest positive entries of each row."""
    top = pre_acts_bs.topk(k, dim=1)
    return torch.zeros_like(pre_acts_bs).scatter_(1, top.indices, top.values.relu_())


def make_untrained(config: SAEConfig, sample_nd: Tensor, seed: int) -> SAE:
    """An SAE of the same width with random unit directions, centred on `sample` (tokens, d_model).

    Its threshold lets k latents a token fire on the sample: the control for what training adds.
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
