"""The sparse autoencoder as it is used: encode, decode, load, save."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"


@dataclass(frozen=True)
class SAEConfig:
    """What cfg.json says of an SAE."""

    variant: str
    """How it was trained, such as batch_topk."""
    d_model: int
    """Width of the activations."""
    d_sae: int
    """Latents."""
    k: int
    """Mean number of latents that fire a token."""
    hookpoint: str
    """Where the activations were captured."""
    model: str
    """The model that is explained."""


class SAE:
    """A sparse autoencoder that fires above a threshold (JumpReLU, arXiv 2407.14435).

    pre_acts = (x − b_dec) W_enc + b_enc;  acts = pre_acts where pre_acts > threshold, else 0;  x̂ = acts W_dec + b_dec.
    x is the activation as the model gives it: the scale of training is folded into biases and threshold.
    A direction is a row of W_dec, of unit norm.
    """

    def __init__(self, config: SAEConfig, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor):
        self.config = config
        self.W_enc = W_enc
        """(d_model, d_sae)"""
        self.b_enc = b_enc
        """(d_sae,)"""
        self.W_dec = W_dec
        """(d_sae, d_model)"""
        self.b_dec = b_dec
        """(d_model,)"""
        self.threshold = threshold
        """(), > 0"""

    def encode(self, x_bd: Tensor) -> Tensor:
        """Latent activations (batch, d_sae) of x (batch, d_model)."""
        pre_acts = torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x_bd, self.W_enc)
        return torch.nn.functional.threshold(pre_acts, float(self.threshold), 0.0, inplace=True)

    def decode(self, acts_bs: Tensor) -> Tensor:
        """Reconstruction x̂ (batch, d_model) of acts (batch, d_sae)."""
        return torch.addmm(self.b_dec, acts_bs, self.W_dec)

    def save(self, weights: Path, config: Path) -> None:
        """Write sae.safetensors and cfg.json."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        save_file({name: getattr(self, name).detach().cpu().contiguous() for name in names}, weights)
        config.write_text(json.dumps(asdict(self.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "SAE":
        """Read what `save` wrote into a folder."""
        config = SAEConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        return cls(config, **load_file(folder / WEIGHTS, device=device))


def make_untrained(config: SAEConfig, sample_nd: Tensor, seed: int) -> SAE:
    """An SAE of the same shape with random unit directions, centred on `sample` (tokens, d_model).

    Its threshold lets k latents a token fire on the sample: the control for what training adds.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(config.d_sae, config.d_model, generator=generator)
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    b_dec = sample_nd.mean(0)
    pre_acts = (sample_nd - b_dec) @ W_dec.T
    n_firings = min(config.k * len(sample_nd), pre_acts.numel() - 1)
    threshold = pre_acts.flatten().topk(n_firings + 1).values[-1].clamp(min=0)
    return SAE(config, W_dec.T.contiguous(), torch.zeros(config.d_sae), W_dec, b_dec, threshold)
