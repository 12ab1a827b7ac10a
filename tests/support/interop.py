"""SAEs for the tests of interoperability: files that other libraries wrote, and random SAEs of Ommatid's own."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ommatid.sae.interop import Overrides
from ommatid.sae.model import SAE, Activation, SAEConfig

FIXTURES = Path(__file__).parents[1] / "sae" / "interop_fixtures"
SAID: dict[str, dict[str, str]] = json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))["said"]
EXPECTED = load_file(FIXTURES / "expected.safetensors")
TOLD = Overrides(hookpoint="vision.blocks.11", model="clip", target="vision.blocks.11.mlp")

D_MODEL, D_SAE, K = 5, 20, 3


def fixture(name: str) -> Path:
    """Return the path of a fixture to import."""
    inside = FIXTURES / name / "checkpoints" / "ae_5.pt"
    return inside if inside.exists() else FIXTURES / name


def make_own(activation: Activation = "threshold", threshold: Tensor | float = 0.4, d_out: int = D_MODEL, b_dec: bool = True) -> SAE:
    """Make an SAE with random weights and biases."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    config = SAEConfig("batch_topk", D_MODEL, D_SAE, K, "vision.blocks.11", "clip", activation)
    gated = {"gate_scale": draw(D_SAE).exp(), "gate_shift": draw(D_SAE)} if activation == "gated" else {}
    b = draw(d_out) if b_dec else torch.zeros(d_out)
    return SAE(config, draw(D_MODEL, D_SAE), draw(D_SAE), draw(D_SAE, d_out), b, torch.as_tensor(threshold), **gated)


def as_transcoder(sae: SAE) -> SAE:
    """Return the same SAE as a transcoder to another hookpoint."""
    return SAE(replace(sae.config, target="vision.blocks.11.mlp"), **sae.tensors())


def with_prefixes(sae: SAE) -> SAE:
    """Return the same SAE with two Matryoshka levels."""
    return SAE(replace(sae.config, prefixes=(8, D_SAE)), **sae.tensors())


def per_latent() -> Tensor:
    """Return the same SAE with a threshold for each latent."""
    return torch.linspace(0.1, 1.2, D_SAE)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of `a`."""
    return float((a - b).abs().max() / a.abs().max())
