"""Planted dictionaries: tokens x = codes · directions + offset + noise with known directions and codes, and a score for finding them.

What is planted follows SAELens' synthetic data (sae_lens.synthetic, MIT): features fire on their own, in pairs by a Gaussian copula,
or in a tree in which a child fires only when its parent does. Every function is a function of its seed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.config import TrainParams
from ommatid.sae.learner import Learner, Sample
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch


@dataclass(frozen=True)
class Planted:
    """Planted tokens, with their directions and codes."""

    x: Tensor
    """Tokens, (tokens, d_model) float32."""
    directions: Tensor
    """Planted directions, (features, d_model), unit norm."""
    codes: Tensor
    """Planted codes, (tokens, features), not negative; x is codes times directions, plus an offset and noise."""


def make_planted(
    n_tokens: int, n_features: int = 48, d_model: int = 32, k: int = 3, strength: float = 5.0, noise: float = 0.0, seed: int = 0
) -> Planted:
    """Plant tokens with exactly k features each, all equally frequent, whose activations lie between one and two strengths."""
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    chosen = torch.rand(n_tokens, n_features, generator=generator).topk(k, dim=1).indices
    strengths = 1 + torch.rand(n_tokens, k, generator=generator)
    codes = strength * torch.zeros(n_tokens, n_features).scatter_(1, chosen, strengths)
    x = codes @ directions + torch.randn(d_model, generator=generator)
    return Planted(x + noise * torch.randn(x.shape, generator=generator), directions, codes)


def make_correlated(
    n_tokens: int, n_pairs: int = 24, d_model: int = 32, density: float = 0.05, correlation: float = 0.8, noise: float = 0.0, seed: int = 0
) -> Planted:
    """Features 2 i and 2 i + 1 fire together more often than chance, each on a share `density` of the tokens.

    A Gaussian copula: both fire where normal variables with this correlation exceed the quantile 1 - density.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n_tokens, n_pairs, generator=generator).repeat_interleave(2, dim=1)
    own = torch.randn(shared.shape, generator=generator)
    normal = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    fires = normal > math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * density))
    return _mix(fires, d_model, noise, generator)


def make_hierarchical(
    n_tokens: int,
    n_parents: int = 8,
    n_children: int = 4,
    d_model: int = 48,
    density: float = 0.2,
    child_share: float = 0.8,
    noise: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Features 0 to n_parents - 1 are parents; the children of parent p are the n_children from n_parents + p n_children on.

    A parent fires on a share `density` of the tokens; on a share `child_share` of these one of its children does too, never two
    (mutually exclusive children), and no child fires without its parent.
    """
    generator = torch.Generator().manual_seed(seed)
    parents = torch.rand(n_tokens, n_parents, generator=generator) < density
    has_child = parents & (torch.rand(n_tokens, n_parents, generator=generator) < child_share)
    which = torch.randint(n_children, (n_tokens, n_parents), generator=generator)
    children = has_child[:, :, None] & torch.nn.functional.one_hot(which, n_children).bool()
    return _mix(torch.cat([parents, children.flatten(1)], dim=1), d_model, noise, generator)


def mmcs(found_sd: Tensor, planted_fd: Tensor) -> float:
    """Return the mean cosine of planted directions with those matched by the Hungarian method; unmatched ones count as 0."""
    cosines = normalize(planted_fd.double(), dim=1) @ normalize(found_sd.double(), dim=1).T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return float(cosines[rows, columns].sum()) / len(planted_fd)


def _mix(fires: Tensor, d_model: int, noise: float, generator: torch.Generator) -> Planted:
    """Mix random directions with activations 1 + N(0, 0.2²), at least 0.1, where features fire, and add an offset."""
    directions = normalize(torch.randn(fires.shape[1], d_model, generator=generator), dim=1)
    codes = fires * (1 + 0.2 * torch.randn(fires.shape, generator=generator)).clamp(min=0.1)
    x = codes @ directions + 0.2 * torch.randn(d_model, generator=generator)
    return Planted(x + noise * torch.randn(x.shape, generator=generator), directions, codes)


def make_train_params(**changes: object) -> TrainParams:
    """Return params of a training on planted tokens, with some values changed."""
    values = {
        "d_sae": 64,
        "k": 3,
        "epochs": 60,
        "batch_size": 512,
        "lr": 3e-3,
        "aux_coefficient": 1 / 32,
        "seed": 0,
        "max_dead": 0.5,
        "hookpoint": "blocks.0",
        "target": None,
        "variant": "batch_topk",
        "ms_weight": 0.0,
        "patience": None,
        "runs": [],
        "grid": {},
    }
    return TrainParams.model_validate(values | changes)


def iter_planted(x: torch.Tensor, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """Iterate over batches of `x` from step `start` on without end, in another order in each epoch."""
    per_epoch = len(x) // batch_size
    step = start
    while True:
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        rows = x[order[i * batch_size : (i + 1) * batch_size]]
        yield Batch(rows, rows)
        step += 1


def begin(params: TrainParams, x: torch.Tensor, name: str = "one") -> Learner:
    """Make a learner of `x` before its first step."""
    return Learner.begin(name, params, make_plan(params, len(x)), Sample(x), torch.device("cpu"))
