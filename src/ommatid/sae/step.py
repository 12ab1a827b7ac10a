"""Parts of a training step that variants share: the batch, the reconstruction, the gradients of the weights, and auxiliary losses."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ommatid.sae import distributed
from ommatid.sae.entries import Entries
from ommatid.sae.weights import Weights, grad_of


@dataclass(frozen=True)
class Batch:
    """Tokens of one training step; with several ranks, this rank's share of them."""

    x: Float[Tensor, "batch d_model"]
    """Activations to encode, `(batch, d_model)`."""
    target: Float[Tensor, "batch d_out"]
    """Activations to reconstruct, `(batch, d_out)`: x itself unless the SAE is a transcoder."""
    joint: Float[Tensor, "batch d_joint"] | None = None
    """Joint image-text embedding of each token's image, `(batch, d_joint)`, unit norm; None if the loss does not use it."""

    @property
    def n_total(self) -> int:
        """Number of tokens over all ranks. Every rank has the same number."""
        return len(self.x) * distributed.n_ranks()


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction loss of a batch, and its gradient."""

    loss: Float[Tensor, ""]
    """This rank's share of the squared error, averaged over tokens and levels, `()`."""
    table: Float[Tensor, "batch levels d_out"]
    """Gradient of the loss with respect to what each level adds to x̂, `(batch, levels, d_out)`. A level's contribution is
    part of its own reconstruction and of every later one, so their gradients are summed."""
    share: float
    """Factor that turns an error x̂ − target into the gradient with respect to x̂."""

    def take_x_hat(self, target: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Return x̂ of the whole dictionary, `(batch, d_out)`. It may reuse the memory of `table`, which must not be used afterwards."""
        error = self.table[:, -1]
        return (error if self.table.shape[1] == 1 else error.clone()).div_(self.share).add_(target)


@dataclass(frozen=True)
class Step:
    """Results of one training step on this rank. Gradients are in the `.grad` of the weights."""

    loss: Float[Tensor, ""]
    """This rank's share of the loss, `()`."""
    x_hat: Float[Tensor, "batch d_out"]
    """Reconstruction, `(batch, d_out)`."""
    n_firings: int
    """Number of firings on this rank."""
    firing_latents: Int[Tensor, " firings"]
    """Latent of each firing on this rank, `(n_firings,)`: a latent appears once for each token it fires on."""
    threshold: float
    """Smallest firing activation on any rank; 0 if nothing fires, or if the variant has no common threshold."""


def centre(weights: Weights, batch: Batch) -> Float[Tensor, "batch d_model"]:
    """Return the input of the encoder, `(batch, d_model)`: x − b_dec, or for a transcoder x minus its mean."""
    return batch.x - weights.fixed.get("b_pre", weights.b_dec)


def reconstruct(entries: Entries, acts: Float[Tensor, "*entries"], weights: Weights, batch: Batch) -> Reconstruction:
    """Compute the mean over levels l of ‖x̂_l − target‖², where x̂_l is the reconstruction by the latents of levels up to l."""
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
    weights: Weights,
    entries: Entries,
    reconstruction: Reconstruction,
    acts: Float[Tensor, "*entries"],
    grad_pre: Float[Tensor, "*entries"],
    inputs: Float[Tensor, "batch d_model"],
    grad_b: Float[Tensor, "*entries"] | None = None,
) -> None:
    """Set the gradients of W_dec, W_enc, b_enc and b_dec.

    Args:
        weights: Weights whose `.grad` is set.
        entries: Entries that `acts`, `grad_pre` and `grad_b` refer to.
        reconstruction: Reconstruction from `acts`.
        acts: Activations, one for each entry.
        grad_pre: Gradient with respect to W_enc · inputs, for each entry.
        inputs: Inputs of the encoder, `(batch, d_model)`.
        grad_b: Gradient with respect to b_enc, for each entry; None means `grad_pre`.
    """
    entries.weighted_sums(acts, reconstruction.table, grad_of(weights.W_dec))
    entries.weighted_sums(grad_pre, inputs[:, None], grad_of(weights.W_enc))
    of_latents = entries.sum_by_latent(grad_pre)
    grad_of(weights.b_enc).copy_(of_latents if grad_b is None else entries.sum_by_latent(grad_b))
    grad_b_dec = grad_of(weights.b_dec).copy_(reconstruction.table[:, 0].sum(0))
    if "b_pre" not in weights.fixed:
        grad_b_dec.sub_(of_latents @ weights.W_enc)


def add_aux(
    weights: Weights,
    batch: Batch,
    inputs: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_out"],
    dead: Int[Tensor, " n_dead"],
    coefficient: float,
    dtype: torch.dtype,
) -> Float[Tensor, ""]:
    """Add the gradients of AuxK, by which dead latents learn to reconstruct the residual (arXiv 2406.04093, appendix A.2).

    The residual is treated as a constant, and its reconstruction does not include b_dec. The loss is divided by the variance of the
    residual and multiplied by min(n_dead / k_aux, 1).

    Args:
        weights: Weights whose `.grad` is added to.
        batch: Batch of the step.
        inputs: Inputs of the encoder, `(batch, d_model)`.
        x_hat: Reconstruction by the other latents, `(batch, d_out)`.
        dead: Indices of the dead latents, `(n_dead,)`.
        coefficient: Weight of the loss.
        dtype: Data type of the five matrix products, each of which costs batch · n_dead · d_model.

    Returns:
        This rank's share of the weighted loss, `()`.
    """
    residual = batch.target - x_hat
    k_aux = weights.W_dec.shape[1] // 2
    x, W_enc, W_dec, b_enc = (tensor.to(dtype) for tensor in (inputs, weights.W_enc[dead], weights.W_dec[dead], weights.b_enc[dead]))
    acts = _keep_largest(torch.addmm(b_enc, x, W_enc.T), k_aux).relu_()
    error = acts @ W_dec - residual
    mean = distributed.all_reduce(residual.sum(0)) / batch.n_total
    variance = distributed.all_reduce((residual - mean).square().sum()) / batch.n_total
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


def _keep_largest(pre_acts: Float[Tensor, "batch n"], k: int) -> Float[Tensor, "batch n"]:
    """Return pre_acts `(batch, n)` with all but the k largest values of each token set to 0."""
    if pre_acts.shape[1] <= k:
        return pre_acts
    top = pre_acts.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(1, top.indices, top.values)


def add_monosemanticity(
    entries: Entries, acts: Float[Tensor, "*entries"], batch: Batch, weight: float, grad_acts: Float[Tensor, "*entries"]
) -> Float[Tensor, ""]:
    """Add the gradient of the monosemanticity loss, weight · (1 − mean MS of the batch's latents), with respect to activations.

    MS is a closed form of equation 1 of Pach et al. 2025: MS = (‖w‖² − v) / (u² − v), where u = Σã, v = Σã² and w = Σãp. Here p are unit
    embeddings, and ã are a latent's activations divided by the largest of them in the batch, which counts as a constant. Latents that fire
    on fewer than two tokens have no MS. Each rank computes MS on its own share of the batch.

    Args:
        entries: Entries that `acts` and `grad_acts` refer to.
        acts: Activations, one for each entry.
        batch: Batch of the step, with joint embeddings.
        weight: Weight of the loss.
        grad_acts: Gradient with respect to activations, for each entry; updated in place.

    Returns:
        This rank's share of the weighted loss, `()`.
    """
    assert batch.joint is not None
    largest = entries.max_by_latent(acts)
    relative = acts / entries.at(largest.clamp_min(1e-12))
    w = torch.zeros(len(largest), batch.joint.shape[1], dtype=acts.dtype, device=acts.device)
    entries.weighted_sums(relative, batch.joint[:, None], w)
    u, v, squares = entries.sum_by_latent(relative), entries.sum_by_latent(relative.square()), w.square().sum(1)
    pairs = u.square() - v
    is_defined = pairs > 1e-6
    n_defined = int(is_defined.sum())
    if not n_defined:
        return torch.zeros((), dtype=acts.dtype, device=acts.device)
    pairs = torch.where(is_defined, pairs, 1.0)
    ms = torch.where(is_defined, (squares - v) / pairs, 0.0)
    toward = entries.product(batch.joint[:, None], w) - relative - entries.at(ms) * (entries.at(u) - relative)
    share = weight / (n_defined * distributed.n_ranks())
    grad_acts.sub_(toward * entries.at(2 * share * is_defined.to(acts.dtype) / (pairs * largest.clamp_min(1e-12))))
    return share * (n_defined - ms.sum())
