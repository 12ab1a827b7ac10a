"""One training step's common parts: batch, reconstruction, gradients of encoder and decoder, AuxK."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ommatid.sae import distributed
from ommatid.sae.entries import Entries
from ommatid.sae.weights import Weights, grad_of


@dataclass(frozen=True)
class Batch:
    """Scaled tokens of one step; with several ranks this one's share."""

    x: Tensor
    """What is encoded, (batch, d_model)."""
    target: Tensor
    """What is to be reconstructed, (batch, d_out): x itself, but for a transcoder."""
    joint: Tensor | None = None
    """The joint image-text embedding of each token's image, (batch, d_joint) of unit norm, where the objective asks for it."""

    @property
    def n_total(self) -> int:
        """Tokens of all ranks: they have equally many."""
        return len(self.x) * distributed.n()


@dataclass(frozen=True)
class Reconstruction:
    """What the error of x̂ asks of it."""

    loss: Tensor
    """This rank's share of the mean squared error a token, the mean over levels, ()."""
    table: Tensor
    """Gradient of the loss in what each level adds, (batch, levels, d_out): of its own error and those of the levels above."""
    share: float
    """Of an error in `table`."""

    def take_x_hat(self, target: Tensor) -> Tensor:
        """x̂ of the whole dictionary, (batch, d_out), in the memory of `table`, which is of no use afterwards."""
        error = self.table[:, -1]
        return (error if self.table.shape[1] == 1 else error.clone()).div_(self.share).add_(target)


@dataclass(frozen=True)
class Step:
    """What one step computed; the gradients are in `.grad` of the weights."""

    loss: Tensor
    """This rank's share, ()."""
    x_hat: Tensor
    """Reconstruction, (batch, d_out)."""
    n_firings: int
    """On this rank."""
    fired: Tensor
    """Latents that fire on this rank, with repetitions."""
    threshold: float
    """Smallest activation that fires, of all ranks; 0 where nothing does."""


def centre(weights: Weights, batch: Batch) -> Tensor:
    """What the encoder multiplies: x − b_dec; for a transcoder x less its mean."""
    return batch.x - weights.fixed.get("b_pre", weights.b_dec)


def reconstruct(entries: Entries, acts: Tensor, weights: Weights, batch: Batch) -> Reconstruction:
    """Mean over levels of ‖x̂_l − target‖², with x̂_l of the latents up to level l; divided by the number of levels once."""
    table = entries.decode(acts, weights.W_dec)
    n_levels = table.shape[1]
    for level in range(1, n_levels):
        table[:, level].add_(table[:, level - 1])
    table.add_(weights.b_dec)
    table.sub_(batch.target[:, None])
    rows = table.flatten(0, 1)
    loss = torch.linalg.vector_norm(rows, dim=1).square().sum() / (batch.n_total * n_levels)
    share = 2 / (batch.n_total * n_levels)
    table.mul_(share)
    for level in reversed(range(n_levels - 1)):
        table[:, level].add_(table[:, level + 1])
    return Reconstruction(loss, table, share)


def set_gradients(
    weights: Weights, entries: Entries, found: Reconstruction, acts: Tensor, grad_pre: Tensor, inputs: Tensor, grad_b: Tensor | None = None
) -> None:
    """Gradients of W_dec, W_enc, b_enc and b_dec.

    Args:
        weights: Their `.grad` is set.
        entries: Where `acts` and `grad_pre` are.
        found: What the decoder made of `acts`.
        acts: Activations.
        grad_pre: Gradient in W_enc · inputs at the entries.
        inputs: What was encoded, (batch, d_model).
        grad_b: Gradient in b_enc at the entries, where it is another than `grad_pre`.
    """
    entries.gather(acts, found.table, grad_of(weights.W_dec))
    entries.gather(grad_pre, inputs[:, None], grad_of(weights.W_enc))
    of_latents = entries.sum_by_latent(grad_pre)
    grad_of(weights.b_enc).copy_(of_latents if grad_b is None else entries.sum_by_latent(grad_b))
    grad_b_dec = grad_of(weights.b_dec).copy_(found.table[:, 0].sum(0))
    if "b_pre" not in weights.fixed:
        grad_b_dec.sub_(of_latents @ weights.W_enc)


def add_aux(weights: Weights, batch: Batch, inputs: Tensor, x_hat: Tensor, dead: Tensor, coefficient: float, dtype: torch.dtype) -> Tensor:
    """Add AuxK's gradients: dead latents reconstruct what the living leave over (arXiv 2406.04093, appendix A.2).

    The residual is a constant here, b_dec takes no part in the reconstruction, the loss is divided by the residual's variance and
    scaled by min(n_dead / k_aux, 1).

    Args:
        weights: Their gradients are added to.
        batch: Of the step.
        inputs: What was encoded.
        x_hat: Reconstruction by the living.
        dead: Which latents are dead, (n_dead,).
        coefficient: Weight of the loss.
        dtype: Arithmetic of the five products of batch · n_dead · d_model.

    Returns:
        This rank's share of the weighted loss, ().
    """
    residual = batch.target - x_hat
    k_aux = weights.W_dec.shape[1] // 2
    x, W_enc, W_dec, b_enc = (tensor.to(dtype) for tensor in (inputs, weights.W_enc[dead], weights.W_dec[dead], weights.b_enc[dead]))
    acts = _keep_largest(torch.addmm(b_enc, x, W_enc.T), k_aux).relu_()
    error = acts @ W_dec - residual
    mean = distributed.sum_(residual.sum(0)) / batch.n_total
    variance = distributed.sum_((residual - mean).square().sum()) / batch.n_total
    scale = coefficient * min(len(dead) / k_aux, 1.0) / variance.clamp_min(1e-12)
    grad_x_hat = (error * (2 * scale / batch.n_total)).to(dtype)
    grad_acts = (grad_x_hat @ W_dec.T).mul_(acts > 0)
    grad_of(weights.W_dec).index_add_(0, dead, (acts.T @ grad_x_hat).to(residual.dtype))
    grad_of(weights.W_enc).index_add_(0, dead, (grad_acts.T @ x).to(residual.dtype))
    of_latents = grad_acts.sum(0, dtype=residual.dtype)
    grad_of(weights.b_enc).index_add_(0, dead, of_latents)
    if "b_pre" not in weights.fixed:
        grad_of(weights.b_dec).sub_(of_latents @ weights.W_enc[dead])
    return scale * error.square().sum() / batch.n_total


def _keep_largest(pre_acts: Tensor, k: int) -> Tensor:
    """All but the k largest of each token become 0."""
    if pre_acts.shape[1] <= k:
        return pre_acts
    top = pre_acts.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(1, top.indices, top.values)


def add_monosemanticity(entries: Entries, acts: Tensor, batch: Batch, weight: float, grad_acts: Tensor) -> Tensor:
    """Add the gradient of weight · (1 − mean MS of the batch's latents) in the activations (closed form of Pach et al. 2025, equation 1).

    With ã = act / its largest in the batch (a constant here; the smallest is 0), p the unit embeddings, u = Σã, v = Σã², w = Σãp:
    MS = (‖w‖² − v) / (u² − v). Latents that fire on fewer than two tokens have none. Each rank takes its own share of the batch.

    Returns:
        This rank's share of the weighted loss, ().
    """
    assert batch.joint is not None
    largest = entries.max_by_latent(acts)
    relative = acts / entries.at(largest.clamp_min(1e-12))
    w = torch.zeros(len(largest), batch.joint.shape[1], dtype=acts.dtype, device=acts.device)
    entries.gather(relative, batch.joint[:, None], w)
    u, v, squares = entries.sum_by_latent(relative), entries.sum_by_latent(relative.square()), w.square().sum(1)
    pairs = u.square() - v
    is_defined = pairs > 1e-6
    n_defined = int(is_defined.sum())
    if not n_defined:
        return torch.zeros((), dtype=acts.dtype, device=acts.device)
    pairs = torch.where(is_defined, pairs, 1.0)
    ms = torch.where(is_defined, (squares - v) / pairs, 0.0)
    toward = entries.product(batch.joint[:, None], w) - relative - entries.at(ms) * (entries.at(u) - relative)
    share = weight / (n_defined * distributed.n())
    grad_acts.sub_(toward * entries.at(2 * share * is_defined.to(acts.dtype) / (pairs * largest.clamp_min(1e-12))))
    return share * (n_defined - ms.sum())
