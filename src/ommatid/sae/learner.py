"""The learner: one SAE in training, with its weights, optimiser, counters and checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ommatid.compute.checkpoint import Accumulator, State, flatten, inside
from ommatid.compute.hardware import product_dtype
from ommatid.config import Imported, TrainParams
from ommatid.errors import TrainingError
from ommatid.metrics import Fidelity
from ommatid.sae import distributed
from ommatid.sae.init import fit_scale, make_weights
from ommatid.sae.model import SAE, SAEConfig
from ommatid.sae.optimiser import Optimiser
from ommatid.sae.schedule import Plan
from ommatid.sae.step import Batch, Step
from ommatid.sae.variants import Guides, Settings, Variant, make_variant
from ommatid.sae.weights import Weights, align

BINS = 24
"""Number of bins of a histogram."""

Histogram = tuple[list[float], list[int]]
"""Bin edges and counts; there is one more edge than counts."""


def histograms(weights: Weights, density: Float[Tensor, " d_sae"]) -> dict[str, Histogram]:
    """Return histograms over latents by name: encoder norms and biases, and the log of densities above 0.

    Args:
        weights: Weights of the SAE.
        density: Firings per token of each latent, `(d_sae,)`.

    Returns:
        The histograms. The histogram of densities is left out if all densities are 0.
    """
    found = {
        "log10_density": density[density > 0].double().log10(),
        "encoder_norm": weights.W_enc.norm(dim=1).double(),
        "encoder_bias": weights.b_enc.double(),
    }
    return {name: histogram(values.cpu()) for name, values in found.items() if len(values)}


def histogram(values: Float[Tensor, " n"]) -> Histogram:
    """Return the histogram of values `(n,)`, in `BINS` bins from the smallest value to the largest."""
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high) if high > low else torch.zeros(BINS)
    if high <= low:
        counts[0] = len(values)
    return torch.linspace(low, high, BINS + 1).tolist(), [int(n) for n in counts.tolist()]


PROGRESS = 0.001
"""Relative fall in FVU that counts as progress."""
ALIGNMENT = 0.01
"""Share of an encoder row's component orthogonal to its direction that one step removes at the peak learning rate. The share falls with the
learning rate, as in decoupled weight decay."""
SMOOTHED = 10
"""Number of measurements (hundredths of the run) over which FVU is averaged to judge progress; single ones fluctuate with their batches."""
CURVE_COLUMNS = ("step", "loss", "fvu", "l0", "dead", "lr", "grad_norm")
"""Columns of `Learner.curves`."""


@dataclass(frozen=True)
class Sample:
    """A sample of training tokens, from which weights and scales are initialised."""

    x: Float[Tensor, "tokens d_model"]
    """Activations, `(tokens, d_model)` float32, on the CPU."""
    target: Float[Tensor, "tokens d_out"] | None = None
    """Activations to reconstruct for the same tokens, `(tokens, d_out)` float32; None means x itself."""


@dataclass(frozen=True)
class Scales:
    """Factors by which activations are multiplied, so that the mean of their squared norm is 1."""

    x: float
    """Factor of the activations that are encoded."""
    target: float
    """Factor of the activations that are reconstructed."""

    @classmethod
    def of(cls, sample: Sample) -> "Scales":
        """Measure the factors on a sample."""
        x = _scale(sample.x)
        return cls(x, x if sample.target is None else _scale(sample.target))


def _scale(x_nd: Float[Tensor, "tokens d_model"]) -> float:
    return 1 / float(x_nd.double().square().sum(1).mean().sqrt())


class Learner(Accumulator):
    """One SAE in training."""

    STATE = ("guides", "idle", "firings", "density", "threshold", "curves", "_window", "_sums")
    """Attributes that are saved in addition to the weights, the optimiser, the scales and the number of steps."""

    def __init__(self, name: str, params: TrainParams, plan: Plan, device: torch.device) -> None:
        self.name = name
        """Key of `TrainParams.each`."""
        self.params = params
        self.plan = plan
        self.scales: Scales
        """Factors of the activations; set by `begin` and `load_state_dict`, like the weights."""
        assert not isinstance(params.variant, Imported), f"{name}: an imported SAE is not trained"
        self.variant: Variant = make_variant(params.variant, _settings(params, self.plan, device))
        self.guides = Guides()
        self.weights: Weights
        self.idle = torch.zeros(params.d_sae, dtype=torch.int64, device=device)
        """Tokens since each latent last fired, `(d_sae,)`."""
        self.firings = torch.zeros(params.d_sae, dtype=torch.int64, device=device)
        """Firings of each latent since the last measurement, `(d_sae,)`."""
        self.density = torch.zeros(params.d_sae, dtype=torch.float64, device=device)
        """Firings per token of each latent between the last two measurements, `(d_sae,)`."""
        self.threshold = 0.0
        """Moving average over steps of the smallest firing activation; 0 until step `Plan.threshold_start`."""
        self.curves = torch.zeros(0, len(CURVE_COLUMNS), dtype=torch.float64)
        """Training curves, one row per measurement, `(points, columns)`."""
        self._window = Fidelity()
        self._sums = torch.zeros(3, dtype=torch.float64)
        """Sums of losses and gradient norms, and the number of steps, since the last measurement, `(3,)`."""

    @classmethod
    def begin(cls, name: str, params: TrainParams, plan: Plan, sample: Sample, device: torch.device, start: SAE | None = None) -> "Learner":
        """Make a new learner.

        Args:
            name: Key of `TrainParams.each`.
            params: Its params.
            plan: The schedule.
            sample: Tokens from which scales are measured, and weights initialised.
            device: Device of the weights.
            start: Trained SAE of the same widths and variant to begin with in place of new weights: latent i stays latent i. The variant
                must be one that `can_continue`.
        """
        learner = cls(name, params, plan, device)
        scales = learner.scales = Scales.of(sample)
        x, target = sample.x * scales.x, None if sample.target is None else sample.target * scales.target
        weights = make_weights(params.d_sae, x, target, params.seed)
        weights.derives_W_dec = learner.variant.derives_W_dec
        if start is not None:
            assert not isinstance(params.variant, Imported) and params.variant.can_continue, params.variant
            _unfold(weights, start, scales)
            learner._set_weights({key: distributed.broadcast(tensor.contiguous().to(device)) for key, tensor in weights.tensors().items()})
            return learner
        centred = x - x.mean(0)
        fit_scale(weights, centred, params.k, None if target is None else target - target.mean(0))
        learner.variant.begin(weights, centred, learner.guides)
        learner._set_weights({key: distributed.broadcast(tensor.contiguous().to(device)) for key, tensor in weights.tensors().items()})
        return learner

    def _set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights = Weights.of(tensors, self.variant.derives_W_dec)
        self._optimiser = Optimiser(self.weights, self.variant.rates(self.plan.lr))

    @property
    def dead(self) -> Int[Tensor, " n_dead"]:
        """Indices of the latents that have not fired for `Plan.dead_after` tokens, `(n_dead,)`."""
        return (self.idle >= self.plan.dead_after).nonzero()[:, 0]

    @torch.no_grad()
    def learn(self, batch: Batch) -> None:
        """Take one training step on raw activations.

        Raises:
            TrainingError: The loss or the gradient is not finite. The weights are left as they were before the step.
        """
        scaled = self._scaled(batch)
        step = self.variant.step(self.weights, scaled, self.guides, self.dead)
        loss = float(distributed.all_reduce(step.loss.double()))
        lr = self.plan.lr_at(self.guides.step)
        norm = self._optimiser.step(lr) if math.isfinite(loss) else math.nan
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"train: {self.name}: the loss is {loss} and the gradient's norm {norm} at step {self.guides.step}; the last checkpoint "
                f"is kept; lower train.lr (now {self.plan.lr:.2g}), or look for activations that are far larger than the rest"
            )
        if self.params.is_aligned:
            align(self.weights, ALIGNMENT * lr / self.plan.lr)
        self.variant.constrain(self.weights)
        self._count(step, scaled)
        self._window.add(scaled.target, step.x_hat, step.n_firings)
        self._sums += torch.tensor([loss, norm, 1.0], dtype=torch.float64)

    def _scaled(self, batch: Batch) -> Batch:
        device = self.idle.device
        x = batch.x.to(device).float() * self.scales.x
        target = x if batch.target is batch.x else batch.target.to(device).float() * self.scales.target
        return Batch(x, target, None if batch.joint is None else batch.joint.to(device).float())

    def _count(self, step: Step, batch: Batch) -> None:
        counts = distributed.all_reduce(torch.bincount(step.firing_latents, minlength=self.params.d_sae))
        self.firings += counts
        self.idle += batch.n_total
        self.idle[counts > 0] = 0
        if self.guides.step >= self.plan.threshold_start and step.threshold:
            decay = self.plan.threshold_decay if self.threshold else 0.0
            self.threshold = decay * self.threshold + (1 - decay) * step.threshold
        self.guides.step += 1
        revived = self.variant.revive(self.weights, batch, step, self.guides, self.idle)
        if len(revived):
            self._optimiser.forget(("W_enc", "b_enc", "W_dec"), revived)
            self.idle[revived] = 0

    def shorten(self, n_steps: int) -> None:
        """Change the total number of steps to `n_steps`."""
        self.plan = replace(self.plan, n_steps=n_steps)

    @property
    def fvu(self) -> float:
        """FVU at the last measurement; NaN once the learner has been given up."""
        return float(self.curves[-1, CURVE_COLUMNS.index("fvu")])

    @property
    def has_diverged(self) -> bool:
        """Whether the learner has been given up. The last row of its curves then has no FVU, which the quality gate rejects."""
        return len(self.curves) > 0 and math.isnan(self.fvu)

    def give_up(self) -> None:
        """Stop learning: keep the weights from before the step that diverged, and end the curves with a row of NaN."""
        row = torch.full((1, len(CURVE_COLUMNS)), math.nan, dtype=torch.float64)
        row[0, 0] = self.guides.step
        self.curves = torch.cat([self.curves, row])

    @property
    def n_stalled(self) -> int:
        """Number of measurements without progress.

        Progress means that FVU, averaged over the last `SMOOTHED` measurements, falls below its lowest value so far by the share
        `PROGRESS`. The number is 0 until there are `SMOOTHED` measurements.
        """
        best, since = math.inf, 0
        if len(self.curves) < SMOOTHED:
            return since
        for fvu in self.curves[:, CURVE_COLUMNS.index("fvu")].unfold(0, SMOOTHED, 1).mean(1).tolist():
            best, since = (fvu, 0) if fvu < best * (1 - PROGRESS) else (best, since + 1)
        return since

    def take_density(self) -> Float64[Tensor, " d_sae"]:
        """Return each latent's firings per token since the last measurement, `(d_sae,)` float64, and reset the counts."""
        self.density = self.firings.double() / max(1, int(self._sums[2]) * self.plan.batch_size)
        self.firings = torch.zeros_like(self.firings)
        return self.density

    def measure(self) -> dict[str, float]:
        """Append a row to the curves and return its values by name, without the step. Means are over steps since the last measurement."""
        loss, norm, n = self._sums.tolist()
        window = self._window.merged(distributed.all_reduce)
        values = {
            "loss": loss / n,
            "fvu": window.fvu,
            "l0": window.l0,
            "dead": len(self.dead) / self.params.d_sae,
            "lr": self.plan.lr_at(self.guides.step - 1),
            "grad_norm": norm / n,
        }
        row = torch.tensor([[self.guides.step, *values.values()]], dtype=torch.float64)
        self.curves = torch.cat([self.curves, row])
        self._window, self._sums = Fidelity(), torch.zeros(3, dtype=torch.float64)
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, the state of the optimiser, the scales, the number of steps, and the attributes that `STATE` names."""
        scales = {"x": self.scales.x, "target": self.scales.target}
        parts = {"weights": self.weights.tensors(), "optimiser": self._optimiser, "scales": scales, "n_steps": self.plan.n_steps}
        return flatten(parts) | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        """Load the state that `state_dict` returned."""
        state = {key: tensor.to(self.idle.device) for key, tensor in state.items()}
        self.scales = Scales(float(state["scales/x"]), float(state["scales/target"]))
        self.shorten(int(state["n_steps"]))
        self._set_weights(inside(state, "weights"))
        self._optimiser.load_state_dict(inside(state, "optimiser"))
        super().load_state_dict(state)

    @classmethod
    def restore(cls, name: str, params: TrainParams, plan: Plan, state: State, device: torch.device) -> "Learner":
        """Make a learner with the state that `state_dict` returned."""
        learner = cls(name, params, plan, device)
        learner.load_state_dict(state)
        return learner

    def finish(self, hookpoint: str, model: str, target: str | None) -> SAE:
        """Make the trained SAE for raw activations, with scales and the subtracted bias folded into its weights.

        Let c and e be the scales of x and of the target, b_pre the bias that training subtracts from x, and b = b_enc − W_enc · b_pre. Then
        pre_acts = (c W_enc · x + b) / e for a raw x, and x̂ = acts W_dec + b_dec / e. Directions are unchanged, and activations are in
        units of the raw target.

        Args:
            hookpoint: Hookpoint of the activations that are encoded.
            model: Name of the model.
            target: Hookpoint that a transcoder decodes; None for an autoencoder.

        Returns:
            The SAE.
        """
        weights, (c, e) = self.weights, (self.scales.x, self.scales.target)
        pre = weights.fixed.get("b_pre", weights.b_dec)
        W_enc = (weights.W_enc.T * (c / e)).contiguous()
        b_enc = (weights.b_enc - weights.W_enc @ pre) / e
        thresholds = self.variant.thresholds(weights, self.threshold)
        gates = {key: value / e if key != "gate_scale" else value for key, value in thresholds.items()}
        params, (d_sae, d_model) = self.params, weights.W_enc.shape
        config = SAEConfig(
            params.variant.kind, d_model, d_sae, params.k, hookpoint, model, self.variant.activation, target, self.variant.prefixes()
        )
        return SAE(config, W_enc, b_enc, weights.W_dec, weights.b_dec / e, **gates)


def _unfold(weights: Weights, sae: SAE, scales: Scales) -> None:
    """Set weights in place to those of a trained SAE, in the units of scaled activations: the inverse of `Learner.finish`."""
    c, e = scales.x, scales.target
    weights.W_dec = sae.W_dec.clone()
    weights.b_dec = sae.b_dec * e
    weights.W_enc = (sae.W_enc * (e / c)).T.contiguous()
    weights.b_enc = sae.b_enc * e + weights.W_enc @ weights.fixed.get("b_pre", weights.b_dec)


def _settings(params: TrainParams, plan: Plan, device: torch.device) -> Settings:
    return Settings(
        k=params.k,
        d_sae=params.d_sae,
        n_steps=plan.n_steps,
        dead_after=plan.dead_after,
        seed=params.seed,
        aux_coefficient=params.aux_coefficient,
        ms_weight=params.ms_weight,
        dtype=product_dtype(device),
        device=device,
    )
