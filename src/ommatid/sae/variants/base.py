"""The interface between the trainer and SAE variants."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ommatid.compute.checkpoint import Accumulator
from ommatid.sae import distributed
from ommatid.sae.entries import Levels
from ommatid.sae.model import Activation
from ommatid.sae.select import Scorer
from ommatid.sae.step import Batch, Step
from ommatid.sae.weights import Weights


@dataclass(frozen=True)
class Settings:
    """Settings that all variants share."""

    k: int
    """Mean number of latents that fire per token: imposed by selection, or the target of a steered penalty."""
    d_sae: int
    """Number of latents."""
    n_steps: int
    """Number of steps of the run."""
    dead_after: int
    """Tokens without a firing after which a latent counts as dead."""
    seed: int
    """Seed of random draws."""
    aux_coefficient: float
    """Weight of the AuxK loss."""
    ms_weight: float
    """Weight of the monosemanticity loss, 1 − MS."""
    dtype: torch.dtype
    """Data type of the encoder's product."""
    device: torch.device
    """Device of the weights."""


@dataclass
class Guides(Accumulator):
    """State that a variant carries from step to step and that checkpoints hold."""

    STATE = ("step", "floor", "penalty", "mean_act", "firings")

    step: int = 0
    """Steps completed."""
    floor: float = 0.0
    """Guess at the smallest firing entry of the next step; 0 means none."""
    penalty: float = 0.0
    """Weight of the sparsity penalty; 0 for variants without one."""
    mean_act: float = 0.0
    """Moving average, over steps, of the mean activation of firing entries; only JumpReLU uses it."""
    firings: float = 0.0
    """Firings per token in the last step; 0 before the first step, or if the penalty is not steered."""


class Variant(ABC):
    """A kind of SAE in training."""

    activation: Activation = "threshold"
    """Activation of the trained SAE: see `SAE`."""
    derives_W_dec = False
    """Whether W_dec is computed from the variant's own tensors: see `Weights`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._levels = Levels((settings.d_sae,), settings.device)

    @abstractmethod
    def begin(self, weights: Weights, x_nd: Float[Tensor, "tokens d_model"], guides: Guides) -> None:
        """Add the variant's own tensors to the weights, and set its initial state.

        Args:
            weights: Initial weights, changed in place.
            x_nd: Scaled, centred activations from which the weights were initialised, `(tokens, d_model)`.
            guides: Initial state, changed in place.
        """

    @abstractmethod
    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Int[Tensor, " n_dead"]) -> Step:
        """Compute the loss and the gradients of one batch.

        Args:
            weights: Weights whose `.grad` is set to this rank's share.
            batch: Scaled batch of this rank.
            guides: State, updated in place.
            dead: Indices of the dead latents, `(n_dead,)`.

        Returns:
            The results of the step.
        """

    @abstractmethod
    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """Return the threshold of the trained SAE, and its gates if it is gated, in units of scaled activations.

        Args:
            weights: Trained weights.
            average: Moving average, over steps, of `Step.threshold`.

        Returns:
            The tensors, by their name in `SAE`.
        """

    def rates(self, lr: float) -> dict[str, float]:
        """Return the learning rates of tensors that need their own, by name, as multiples of the peak rate `lr`."""
        return {}

    def constrain(self, weights: Weights) -> None:  # noqa: B027 most variants have no constraints
        """Restore the variant's constraints on weights after the optimiser has updated them."""

    def revive(self, weights: Weights, batch: Batch, step: Step, guides: Guides, idle: Int[Tensor, " d_sae"]) -> Int[Tensor, " revived"]:
        """Re-initialise dead latents after a step, if the variant does so.

        Args:
            weights: Weights, changed in place.
            batch: Scaled batch of the step.
            step: Results of the step.
            guides: State after the step.
            idle: Tokens since each latent last fired, `(d_sae,)`.

        Returns:
            Indices of the re-initialised latents, `(n,)`.
        """
        return idle.new_zeros(0)

    def prefixes(self) -> tuple[int, ...] | None:
        """Return the sizes of the levels of a Matryoshka SAE, or None for other variants."""
        return None


def make_scorer(settings: Settings, weights: Weights, inputs: Float[Tensor, "batch d_model"], levels: Levels) -> Scorer:
    """Make the scorer of a batch. Its data type is that of the settings for float32 weights, and the weights' own otherwise (in tests)."""
    dtype = settings.dtype if weights.b_enc.dtype == torch.float32 else weights.b_enc.dtype
    return Scorer(weights, inputs, levels, dtype)


FIRST_PENALTY = 1e-3
"""Initial weight of a steered penalty, for mean ‖x‖² = 1. It is so small that steering begins with too many firings."""


class Steered(Variant):
    """A variant with a sparsity penalty, whose weight is fixed or steered so that k latents fire per token."""

    def __init__(self, settings: Settings, weight: float | None) -> None:
        super().__init__(settings)
        self._weight = weight

    def begin(self, weights: Weights, x_nd: Float[Tensor, "tokens d_model"], guides: Guides) -> None:
        """Set the initial weight of the penalty."""
        guides.penalty = FIRST_PENALTY if self._weight is None else self._weight

    @property
    def most(self) -> float:
        """Upper bound on the weight of a steered penalty. With an L1 penalty of this weight, nothing fires if mean ‖x‖² is 1."""
        return 2.0

    def _steer(self, guides: Guides, n_firings: int, n_total: int) -> None:
        """Adjust the penalty so that k latents fire per token: raise it while more fire, lower it while fewer do.

        Each step adds rate · clip(2 log(firings / k), −1, 1) to the logarithm of the penalty. The rate, between 0.002 and 0.1, allows a
        change by a factor of e^20 over the run. The change of log(firings) since the last step is added as damping: latents respond to a
        change of the penalty only some steps later, so that without damping a short run would end oscillating around k. The penalty is
        bounded by `most`, because it would otherwise grow without limit while latents lag behind.
        """
        if self._weight is not None:
            return
        rate = min(0.1, max(0.002, 20 / self._settings.n_steps))
        firings = max(distributed.total(n_firings) / n_total, 1e-3)
        change = math.log(firings / guides.firings) if guides.firings else 0.0
        toward = max(-1.0, min(1.0, 2 * math.log(firings / self._settings.k)))
        guides.penalty = min(self.most, guides.penalty * math.exp(rate * toward + change))
        guides.firings = firings


def average_act(guides: Guides, acts: Float[Tensor, "*entries"]) -> None:
    """Update `guides.mean_act` with the mean activation of the entries that fire, over all ranks."""
    sums = distributed.all_reduce(torch.stack([acts.sum().double(), (acts > 0).sum().double()]))
    if float(sums[1]):
        mean = float(sums[0] / sums[1])
        guides.mean_act = mean if not guides.mean_act else 0.99 * guides.mean_act + 0.01 * mean


def quantile(pre_acts: Float[Tensor, "batch d_sae"], per_token: float) -> float:
    """Return the value that, on average, `per_token` of each token's pre_acts `(batch, d_sae)` reach."""
    n = int(min(max(per_token * len(pre_acts), 1), pre_acts.numel()))
    return float(pre_acts.flatten().topk(n, sorted=False).values.min())
