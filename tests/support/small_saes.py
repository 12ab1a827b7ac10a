"""SAEs with random weights, one for every kind of activation, and their definition written out with loops."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.sae.model import SAE, SAEConfig

KINDS = ("relu", "threshold", "thresholds", "topk", "gated", "matryoshka", "imported")
"""Names that `make_sae` knows: one threshold for all latents, and one for each, are two kinds; decoder norms of `imported` are not 1."""


def make_sae(kind: str, d_model: int = 8, d_sae: int = 20, d_out: int | None = None, seed: int = 0) -> SAE:
    """Make an SAE of a kind whose latents fire on a part of tokens of unit variance; it decodes d_out if it is a transcoder."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = normalize(torch.randn(d_sae, d_out or d_model, generator=generator), dim=1)
    W_enc = torch.randn(d_model, d_sae, generator=generator) / 2
    b_enc, b_dec = torch.randn(d_sae, generator=generator) / 4, torch.randn(d_out or d_model, generator=generator)
    spread = torch.rand(d_sae, generator=generator)
    activation = kind if kind in ("topk", "gated") else "threshold"
    config = SAEConfig(kind, d_model, d_sae, 4, "vision.blocks.1", "tiny", activation)
    threshold = {"threshold": torch.tensor(0.3), "thresholds": 0.1 + spread, "imported": 0.1 + spread}.get(kind, torch.tensor(0.0))
    if kind == "matryoshka":
        config = replace(config, prefixes=(d_sae // 4, d_sae // 2, d_sae))
    if kind == "imported":
        W_dec = W_dec * (0.2 + 5 * spread[:, None])
    gates = (0.5 + spread, spread.flip(0) - 0.7) if kind == "gated" else ()
    return SAE(replace(config, target="target" if d_out else None), W_enc, b_enc, W_dec, b_dec, threshold, *gates)


def encode_by_hand(sae: SAE, x_bd: Tensor) -> np.ndarray:
    """Encode token by token and latent by latent in float64, (tokens, d_sae)."""
    x, W_enc, b_enc = (tensor.double().numpy() for tensor in (x_bd, sae.W_enc, sae.b_enc))
    thresholds = np.broadcast_to(sae.threshold.double().numpy(), sae.n_latents)
    acts = np.zeros((len(x), sae.n_latents))
    for token in range(len(x)):
        pre_acts = [float(sum(x[token] * W_enc[:, latent])) + b_enc[latent] for latent in range(sae.n_latents)]
        strongest = sorted(range(sae.n_latents), key=lambda latent, of=pre_acts: -of[latent])[: sae.config.k]
        for latent, pre_act in enumerate(pre_acts):
            if sae.gate_scale is not None and sae.gate_shift is not None:
                magnitude = pre_act * float(sae.gate_scale[latent]) + float(sae.gate_shift[latent])
                acts[token, latent] = max(0.0, magnitude) if pre_act > 0 else 0.0
            elif sae.config.activation == "topk":
                acts[token, latent] = max(0.0, pre_act) if latent in strongest else 0.0
            else:
                acts[token, latent] = pre_act if pre_act > thresholds[latent] else 0.0
    return acts
