"""Variant: what the trainer asks of every kind of SAE."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ommatid.sae import distributed
from ommatid.sae.entries import Levels
from ommatid.sae.model import Activation
from ommatid.sae.select import Scorer
from ommatid.sae.step import Batch, Step
from ommatid.sae.weights import Weights


@dataclass(frozen=True)
class Settings:
    """What all variants are told."""

    k: int
    """Mean latents that fire a token: chosen, or steered to."""
    d_sae: int
    """Latents."""
    n_steps: int
    """Of the run."""
    dead_after: int
    """Tokens without a firing after which a latent is dead."""
    seed: int
    """Of what is drawn."""
    aux_coefficient: float
    """Weight of AuxK."""
    ms_weight: float
    """Weight of 1 − MS."""
    dtype: torch.dtype
    """Arithmetic of the encoder's product."""
    device: torch.device
    """Where the weights are."""


@dataclass
class Guides:
    """Numbers that a variant carries from step to step; a checkpoint holds them."""

    step: int = 0
    """Steps done."""
    floor: float = 0.0
    """A guess at the next step's smallest firing entry."""
    penalty: float = 0.0
    """Weight of the sparsity penalty; 0: not begun."""
    mean_act: float = 0.0
    """Mean activation of the firing entries, averaged over steps."""
    firings: float = 0.0
    """Latents that fired a token in the last step, where a penalty is steered; 0: not begun."""

    def as_tensor(self) -> Tensor:
        """For a checkpoint."""
        return torch.tensor([self.step, self.floor, self.penalty, self.mean_act, self.firings], dtype=torch.float64)

    @classmethod
    def of(cls, tensor: Tensor) -> "Guides":
        """What `as_tensor` gave."""
        step, *rest = tensor.tolist()
        return cls(int(step), *rest)


class Variant(ABC):
    """One kind of SAE in training."""

    activation: Activation = "threshold"
    """At inference: see `SAE`."""
    derives_W_dec = False
    """See `Weights`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._levels = Levels((settings.d_sae,), settings.device)

    @abstractmethod
    def begin(self, weights: Weights, x_nd: Tensor, guides: Guides) -> None:
        """Add what the variant trains besides; x_nd: scaled, centred activations that the encoder was made from."""

    @abstractmethod
    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Tensor) -> Step:
        """Loss and gradients of one batch.

        Args:
            weights: Their `.grad` is set, to this rank's share.
            batch: Of this rank.
            guides: Updated.
            dead: Latents that have not fired for long, (n_dead,).
        """

    @abstractmethod
    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """The tensors of inference (threshold, and gates), of scaled activations; average: of `Step.threshold` over steps."""

    def rates(self, lr: float) -> dict[str, float]:
        """Learning rates of tensors that need one of their own, as multiples of the peak rate `lr`."""
        return {}

    def updated(self, weights: Weights) -> None:  # noqa: B027 most have nothing to keep to
        """After the optimiser: back to what the definition allows."""

    def revive(self, weights: Weights, batch: Batch, step: Step, guides: Guides, idle: Tensor) -> Tensor:
        """After each step: draw anew the latents that have been idle for so many tokens, (d_sae,), where the variant does so.

        Returns:
            Which were drawn, (n,).
        """
        return idle.new_zeros(0)

    def prefixes(self) -> tuple[int, ...] | None:
        """Latents of each level, where there are some."""
        return None


def make_scorer(settings: Settings, weights: Weights, inputs: Tensor, levels: Levels) -> Scorer:
    """The encoder over a batch, in the settings' arithmetic; float64 weights, as tests have them, stay exact."""
    dtype = settings.dtype if weights.b_enc.dtype == torch.float32 else weights.b_enc.dtype
    return Scorer(weights, inputs, levels, dtype)


FIRST_PENALTY = 1e-3
"""Of mean‖x‖² = 1, a token: weak, so that steering comes from above."""


class Steered(Variant):
    """A variant whose firing is penalised: by a weight that is given, or that is steered so that k latents fire a token."""

    def __init__(self, settings: Settings, weight: float | None) -> None:
        super().__init__(settings)
        self._weight = weight

    def begin(self, weights: Weights, x_nd: Tensor, guides: Guides) -> None:
        """See `Variant`."""
        guides.penalty = FIRST_PENALTY if self._weight is None else self._weight

    @property
    def most(self) -> float:
        """Of a penalty that is steered: an L1 norm of this weight, where mean‖x‖² is 1, leaves nothing to fire."""
        return 2.0

    def _steer(self, guides: Guides, n_firings: int, n_total: int) -> None:
        """Move the penalty toward k firings a token: up by at most a tenth a step while there are more, down while there are fewer.

        The rate lets the penalty cross twenty factors of e in a run, within bounds; close to k it moves by the logarithm of the ratio.
        It also follows the change of that logarithm since the last step: latents answer to a penalty some steps later, and without
        this damping a short run ends somewhere in a swing around k. Never above `most`: while what it acts on lags behind, it would
        grow without end.
        """
        if self._weight is not None:
            return
        rate = min(0.1, max(0.002, 20 / self._settings.n_steps))
        firings = max(distributed.total(n_firings) / n_total, 1e-3)
        change = math.log(firings / guides.firings) if guides.firings else 0.0
        toward = max(-1.0, min(1.0, 2 * math.log(firings / self._settings.k)))
        guides.penalty = min(self.most, guides.penalty * math.exp(rate * toward + change))
        guides.firings = firings


def average_act(guides: Guides, acts: Tensor) -> None:
    """Update the mean activation of what fires."""
    sums = distributed.sum_(torch.stack([acts.sum().double(), (acts > 0).sum().double()]))
    if float(sums[1]):
        mean = float(sums[0] / sums[1])
        guides.mean_act = mean if not guides.mean_act else 0.99 * guides.mean_act + 0.01 * mean


def quantile(pre_acts: Tensor, per_token: float) -> float:
    """The value above which so many entries a token are."""
    n = int(min(max(per_token * len(pre_acts), 1), pre_acts.numel()))
    return float(pre_acts.flatten().topk(n, sorted=False).values.min())
