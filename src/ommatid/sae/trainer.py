"""The trainer: recipe, schedule, dead latents, threshold, checkpoints. It is given batches and gives events.

Recipe and sources: Adam, lr 2e-4/√(d_sae/16384), warm-up, linear decay over the last fifth, clipping to 1, the gradient's part
parallel to each direction removed, directions renormalised, mean‖x‖² scaled to 1 (saprmarks/dictionary_learning);
datapoint init (saev); AuxK (arXiv 2406.04093); EMA threshold for inference (arXiv 2412.06410, appendix).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ommatid.config import TrainParams
from ommatid.errors import TrainingError
from ommatid.events import Listener, Measured, Progress
from ommatid.metrics import Fidelity
from ommatid.sae.batch_topk import Step, Weights, compute_step
from ommatid.sae.model import SAE, SAEConfig

DATAPOINT_BLEND = 0.8
"""Share of a data point in the initial direction, the rest random (saev)."""
FLOOR_FACTOR = 0.8
"""The last threshold times this is the next selection's first guess: few candidates, rarely too few."""
CURVE_POINTS = 100
"""Rows of the training curves."""
CURVE_COLUMNS = ("step", "loss", "fvu", "l0", "dead", "lr")
"""Columns of `State.curves`."""


@dataclass(frozen=True)
class Plan:
    """What follows from params and the number of tokens."""

    n_tokens: int
    """Training tokens of an epoch."""
    batch_size: int
    """Tokens a step."""
    n_steps: int
    """Optimiser steps in all."""
    lr: float
    """Peak learning rate."""
    dead_after: int
    """Tokens without a firing after which a latent is dead: min(10 M, 8 epochs)."""

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up: 1000 or a twentieth of the run."""
        return max(1, min(1000, self.n_steps // 20))

    @property
    def threshold_start(self) -> int:
        """Step at which the threshold's average begins: 1000 or a tenth of the run."""
        return min(1000, self.n_steps // 10)

    @property
    def threshold_decay(self) -> float:
        """0.999, or less in short runs, so that the average spans at most the last twentieth."""
        return min(0.999, 1 - 20 / max(self.n_steps, 40))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        decay_start = self.n_steps - self.n_steps // 5
        warm = min((step + 1) / self.warmup, 1.0)
        cool = min((self.n_steps - step) / max(self.n_steps - decay_start, 1), 1.0)
        return self.lr * warm * cool


def make_plan(params: TrainParams, n_tokens: int) -> Plan:
    """The schedule for so many training tokens.

    Raises:
        TrainingError: fewer tokens than make one step.
    """
    batch_size = min(params.batch_size, n_tokens)
    if batch_size < 2:
        raise TrainingError(f"train: {n_tokens} training tokens; at least 2 are needed: give more images, or lower images.eval_share")
    steps_per_epoch = n_tokens // batch_size
    lr = params.lr if params.lr is not None else 2e-4 / math.sqrt(params.d_sae / 16384)
    return Plan(n_tokens, batch_size, steps_per_epoch * params.epochs, lr, min(10_000_000, 8 * n_tokens))


@dataclass
class State:
    """All that a run carries from step to step, and all that a checkpoint holds."""

    weights: Weights
    optimiser: torch.optim.Adam
    """Adam over `weights.all()`."""
    idle: Tensor
    """Tokens since each latent last fired, (d_sae,) int64."""
    threshold: Tensor
    """EMA of the smallest firing activation, () float64; 0 until it begins."""
    floor: Tensor
    """The last step's smallest firing activation, () float64."""
    scale: Tensor
    """x is multiplied by this, () float64, so that mean ‖x‖² is 1."""
    step: Tensor
    """Optimiser steps done, () int64."""
    curves: Tensor
    """(points, columns) float64, as CURVE_COLUMNS names them."""

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        tensors = {name: getattr(self, name) for name in ("idle", "threshold", "floor", "scale", "step", "curves")}
        for i, weight in enumerate(self.weights.all()):
            moments = self.optimiser.state[weight]
            tensors |= {f"weights.{i}": weight, f"first.{i}": moments["exp_avg"], f"second.{i}": moments["exp_avg_sq"]}
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path, device: str) -> "State":
        """Read a checkpoint."""
        tensors = load_file(path, device=device)
        weights, first, second = ([tensors.pop(f"{name}.{i}") for i in range(4)] for name in ("weights", "first", "second"))
        for name in ("threshold", "floor", "scale", "step", "curves"):
            tensors[name] = tensors[name].cpu()
        optimiser = _make_optimiser(Weights(*weights))
        for weight, exp_avg, exp_avg_sq in zip(weights, first, second, strict=True):
            step = tensors["step"].to(weight)
            optimiser.state[weight] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return cls(weights=Weights(*weights), optimiser=optimiser, **tensors)


def _make_optimiser(weights: Weights) -> torch.optim.Adam:
    return torch.optim.Adam(weights.all(), betas=(0.9, 0.999), fused=True)


def make_state(params: TrainParams, sample_nd: Tensor) -> State:
    """Datapoint init (saev): directions are a blend of centred data points and noise, W_enc their clone, b_dec the mean."""
    generator = torch.Generator().manual_seed(params.seed)
    sample = sample_nd.cpu().float()
    scale = 1 / sample.double().square().sum(1).mean().sqrt()
    sample = sample * float(scale)
    b_dec = sample.mean(0)
    chosen = torch.randint(len(sample), (params.d_sae,), generator=generator)
    noise = torch.randn(params.d_sae, sample.shape[1], generator=generator)
    points, noise = (torch.nn.functional.normalize(t, dim=1) for t in (sample[chosen] - b_dec, noise))
    W_dec = torch.nn.functional.normalize(DATAPOINT_BLEND * points + (1 - DATAPOINT_BLEND) * noise, dim=1)
    device = sample_nd.device
    # .clone(): a view of W_dec would tie encoder and decoder together
    weights = Weights(*(t.to(device) for t in (W_dec.clone(), torch.zeros(params.d_sae), W_dec, b_dec)))
    zero = torch.zeros((), dtype=torch.float64)
    idle = torch.zeros(params.d_sae, dtype=torch.int64, device=device)
    curves = torch.zeros(0, len(CURVE_COLUMNS), dtype=torch.float64)
    return State(weights, _make_optimiser(weights), idle, zero.clone(), zero.clone(), scale, torch.zeros((), dtype=torch.int64), curves)


class Trainer:
    """Runs a state through batches up to the end of the plan."""

    def __init__(self, params: TrainParams, plan: Plan, state: State, on_event: Listener):
        self.params = params
        self.plan = plan
        self.state = state
        self._on_event = on_event
        self._window = Fidelity()
        self._window_loss: list[float] = []

    def fit(self, batches: Iterator[Tensor], checkpoint: Callable[[State], None]) -> None:
        """Train on raw activations (batch, d_model), beginning with the batch of `state.step`.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        every = max(1, self.plan.n_steps // CURVE_POINTS)
        while int(self.state.step) < self.plan.n_steps:
            self._step(next(batches))
            step = int(self.state.step)
            if step % every == 0 or step == self.plan.n_steps:
                self._measure(step)
                checkpoint(self.state)

    def _step(self, x_raw: Tensor) -> None:
        state, params = self.state, self.params
        x = x_raw.to(state.idle.device).float() * float(state.scale)
        is_dead = state.idle >= self.plan.dead_after
        step = compute_step(state.weights, x, params.k, FLOOR_FACTOR * float(state.floor), is_dead, params.aux_coefficient)
        if not math.isfinite(step.loss):
            raise TrainingError(
                f"train: the loss is {step.loss} at step {int(state.step)}; the last checkpoint is kept; "
                f"lower train.lr (now {self.plan.lr:.2g})"
            )
        self._optimise()
        self._count(step, len(x))
        self._window.add(x, step.x_hat, len(step.active.acts))
        self._window_loss.append(step.loss)

    @torch.no_grad()
    def _optimise(self) -> None:
        weights = self.state.weights
        W_dec, grad = weights.W_dec, weights.W_dec.grad
        assert grad is not None
        grad.sub_(torch.linalg.vecdot(grad, W_dec)[:, None] * W_dec)
        torch.nn.utils.clip_grad_norm_(weights.all(), 1.0)
        self.state.optimiser.param_groups[0]["lr"] = self.plan.lr_at(int(self.state.step))
        self.state.optimiser.step()
        torch.nn.functional.normalize(W_dec, dim=1, out=W_dec)

    def _count(self, step: Step, n_tokens: int) -> None:
        state, plan = self.state, self.plan
        state.idle += n_tokens
        state.idle[step.active.latents] = 0
        if len(step.active.acts):
            state.floor.fill_(float(step.active.acts.min()))
        if int(state.step) >= plan.threshold_start:
            decay = plan.threshold_decay if float(state.threshold) else 0.0
            state.threshold.mul_(decay).add_((1 - decay) * state.floor)
        state.step += 1

    def _measure(self, step: int) -> None:
        n = len(self._window_loss)
        dead = float((self.state.idle >= self.plan.dead_after).double().mean())
        values = {
            "loss": sum(self._window_loss) / n,
            "fvu": self._window.fvu,
            "l0": self._window.l0,
            "dead": dead,
            "lr": self.plan.lr_at(step - 1),
        }
        row = torch.tensor([[step, *values.values()]], dtype=torch.float64)
        self.state.curves = torch.cat([self.state.curves, row])
        self._window, self._window_loss = Fidelity(), []
        self._on_event(Measured(step, values))
        self._on_event(Progress("train steps", step, self.plan.n_steps))


def finish(state: State, config: SAEConfig) -> SAE:
    """The trained SAE for raw activations: the scale of training folded into biases and threshold.

    With scale c, pre_acts(c x) / c = (x − b_dec/c) W_enc + b_enc/c: the directions stay, the activations are in units of x.
    """
    scale, weights = float(state.scale), state.weights
    threshold = torch.tensor(float(state.threshold) / scale)
    W_enc, b_dec = weights.W_enc.T.contiguous(), weights.b_dec / scale
    return SAE(config, W_enc, weights.b_enc / scale - b_dec @ W_enc, weights.W_dec, b_dec, threshold)
