"""Selection of the entries of a batch that may fire, by the one dense product of a training step: inputs times encoder.

The product is never held as a whole: it is computed for a chunk of tokens at a time, in memory that later holds the gradients. Where the
hardware supports bfloat16, the product is rounded to 8 significant bits; weights and all later steps are float32.

A floor is a guess, based on the previous step, at the smallest pre-activation that will be selected. It affects only speed: where it turns
out to be too high, the selection is repeated with a lower floor or without one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ommatid.compute.nonzero import true_at
from ommatid.sae import distributed
from ommatid.sae.entries import Dense, Entries, Levels, Sparse
from ommatid.sae.weights import Weights, grad_of

TOKENS_PER_CHUNK = 1024
"""Largest number of tokens per chunk. With d_model 768 and d_sae 8,192, chunks of 256 take a quarter longer in float32 (AVX2); in bfloat16
(AMX), chunks of 128 to 1,536 take equally long."""
TOKENS_PER_TILE = 16
"""Chunk sizes are multiples of this number, and about equal: with chunks of 511 tokens followed by one of 4, a step is a seventh slower
(AVX-512)."""
FEWEST_TOKENS = 64
"""Number of tokens per chunk below which new memory is allocated instead of reusing that of the gradients."""
ALIGNMENT = 64
"""Alignment of scratch tensors, in bytes."""
TOKENS_OF_GUESS = 256
"""Number of tokens from which the first floor and the density are estimated."""
FLOOR_SHARE = 0.92
"""Floor as a share of the previous step's threshold: low enough that entries are rarely missed, high enough that few extra ones pass."""
DENSE_SHARE = 0.08
"""Share of entries selected above which dense products are faster, from measured times (d_model 768, d_sae 8,192, 2 cores)."""


@dataclass(frozen=True)
class Scorer:
    """The encoder applied to one batch."""

    weights: Weights
    """Weights of the SAE."""
    inputs_bd: Float[Tensor, "batch d_model"]
    """Centred inputs of the encoder, `(batch, d_model)`."""
    levels: Levels
    """Levels of the dictionary."""
    dtype: torch.dtype
    """Data type of the product."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the batch."""
        return len(self.inputs_bd)

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """Return all pre-activations, `(batch, d_sae)`."""
        return torch.addmm(self.weights.b_enc, self.inputs_bd, self.weights.W_enc.T)

    def above(self, floor: Float[Tensor, ""] | Float[Tensor, "batch 1"] | Float[Tensor, " d_sae"]) -> Sparse:
        """Return the entries above a floor, which is one number, `()`, one per token, `(batch, 1)`, or one per latent, `(d_sae,)`.

        Values are compared in the data type of the product. Subtracting b_enc from the floor is cheaper than adding it to every value.
        """
        rows, latents, values = (torch.cat(parts) for parts in zip(*self._iter_above(floor), strict=True))
        return Sparse(self.n_tokens, self.levels, rows, latents, values)

    def _iter_above(self, floor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        scratch, b_enc = self._scratch, self.weights.b_enc
        floor, bias = floor.to(self.dtype), b_enc.to(self.dtype)
        for part, scores in self._iter_scores(self.inputs_bd):
            mask, flags = scratch.mask[: len(scores)], scratch.flags[: len(scores)]
            of_chunk = floor[part] if floor.ndim == 2 else floor
            bound = torch.sub(of_chunk, bias, out=mask if floor.ndim == 2 else None)
            torch.gt(scores, bound, out=mask)
            flags.copy_(mask)  # Writing the comparison straight into a bool tensor takes three times as long.
            index = true_at(flags)
            rows, latents = index // len(b_enc), index % len(b_enc)
            yield rows + part.start, latents, scores.flatten().index_select(0, index).to(b_enc.dtype) + b_enc.index_select(0, latents)

    def largest(self, tokens: Int[Tensor, " tokens"], k: int) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Return the k largest pre-activations of some tokens, even if negative, and their latents, `(tokens, k)` each, in no order."""
        scores = self._iter_scores(self.inputs_bd[tokens])
        tops = [of_chunk.add_(self.weights.b_enc).topk(k, dim=1, sorted=False) for _, of_chunk in scores]
        values, latents = zip(*tops, strict=True)
        return torch.cat(values).to(self.weights.b_enc.dtype), torch.cat(latents)

    def preview(self) -> Float[Tensor, "tokens d_sae"]:
        """Return the pre-activations of the first few tokens, `(tokens, d_sae)`, in scratch memory that the next product overwrites."""
        return next(self._iter_scores(self.inputs_bd[:TOKENS_OF_GUESS]))[1].add_(self.weights.b_enc)

    def _iter_scores(self, inputs: Float[Tensor, "tokens d_model"]) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of tokens and their pre-activations without b_enc, in scratch memory that the next chunk overwrites."""
        scratch = self._scratch
        for part in scratch.parts(len(inputs)):
            x = inputs[part].to(self.dtype)
            yield part, torch.mm(x, scratch.W_enc.T, out=scratch.scores[: len(x)])

    @cached_property
    def _scratch(self) -> "_Scratch":
        return _Scratch(self.weights, self.dtype)


class _Scratch:
    """Scratch memory for a selection: the memory of the gradients, which is unused until a step computes its gradients."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        d_sae = len(weights.b_enc)
        first, second = _Buffer(grad_of(weights.W_enc)), _Buffer(grad_of(weights.W_dec))
        self.W_enc = weights.W_enc if dtype == weights.W_enc.dtype else second.take(weights.W_enc.shape, dtype).copy_(weights.W_enc)
        fits = min(first.n_bytes // (d_sae * dtype.itemsize), second.n_bytes // (d_sae * (dtype.itemsize + 1)))
        self._n_tokens = min(fits // TOKENS_PER_TILE * TOKENS_PER_TILE, TOKENS_PER_CHUNK)
        if self._n_tokens < FEWEST_TOKENS:  # Happens only if d_model is small.
            self._n_tokens = FEWEST_TOKENS
            first = second = _Buffer(torch.empty(0, device=weights.W_enc.device))
        shape = (self._n_tokens, d_sae)
        self.scores, self.mask, self.flags = first.take(shape, dtype), second.take(shape, dtype), second.take(shape, torch.bool)

    def parts(self, n_tokens: int) -> Iterator[slice]:
        """Split tokens into chunks that fit into the scratch memory."""
        n_parts = max(1, -(-n_tokens // self._n_tokens))
        n = -(-n_tokens // (n_parts * TOKENS_PER_TILE)) * TOKENS_PER_TILE
        for start in range(0, n_tokens, n):
            yield slice(start, min(start + n, n_tokens))


class _Buffer:
    """Memory from which tensors are cut."""

    def __init__(self, memory: Tensor) -> None:
        self._bytes = memory.flatten().view(torch.uint8)

    @property
    def n_bytes(self) -> int:
        """Number of bytes left."""
        return len(self._bytes)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor cut from this memory, or newly allocated if too little is left."""
        n = math.prod(shape) * dtype.itemsize
        if n > len(self._bytes):
            return torch.empty(shape, dtype=dtype, device=self._bytes.device)
        taken, self._bytes = self._bytes[:n], self._bytes[-(-n // ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).view(shape)


def select_batch(scorer: Scorer, k: int, floor: float) -> tuple[Entries, float]:
    """Select the k · batch largest positive entries of the batch of all ranks, or all positive ones if there are fewer.

    Args:
        scorer: The encoder over this rank's batch.
        k: Mean number of entries per token.
        floor: Guess at the smallest selected entry; 0 means none.

    Returns:
        This rank's entries, and the smallest selected entry on any rank, or 0 if there is none.
    """
    n = k * distributed.total(scorer.n_tokens)
    if _is_dense(k, scorer):
        values = scorer.dense().relu_()
        threshold = distributed.nth_largest(values[values > 0], n)
        return Dense(scorer.levels, values.mul_(values >= threshold)), threshold
    first = floor if floor > 0 else FLOOR_SHARE * _first_floor(scorer, k)
    for guess in (first, first / 2, first / 4, 0.0):
        found = scorer.above(torch.tensor(guess, device=scorer.inputs_bd.device))
        if guess == 0 or distributed.total(len(found.values)) >= n:
            break
    keep, threshold = distributed.keep_largest(found.values, n)
    return (found if keep is None else _pick(found, keep)), threshold


def select_token(scorer: Scorer, k: int, floor: float) -> tuple[Entries, float]:
    """Select the k largest positive entries of each token, or all positive ones if there are fewer.

    Args:
        scorer: The encoder over this rank's batch.
        k: Number of entries per token.
        floor: Guess at the smallest selected entry, relative to the norm of the token's input: tokens with a larger norm have larger
            entries. 0 means no guess.

    Returns:
        The entries, and a value from which to derive the next floor: the 5 % quantile, over tokens, of the smallest entry relative to the
        norm.
    """
    if _is_dense(k, scorer):
        values = scorer.dense().relu_()
        top = values.topk(k, dim=1)
        return Dense(scorer.levels, torch.zeros_like(values).scatter_(1, top.indices, top.values)), floor
    lengths = scorer.inputs_bd.norm(dim=1, keepdim=True).clamp_min(1e-12)
    floor = floor if floor > 0 else FLOOR_SHARE * _first_floor(scorer, k) / float(lengths.max())
    found = scorer.above(lengths * floor)
    counts = torch.bincount(found.rows, minlength=scorer.n_tokens)
    values, latents = _top_of_rows(found, counts, k)
    few = (counts < k).nonzero()[:, 0]
    if len(few) and floor > 0:
        values[few], latents[few] = scorer.largest(few, k)
    smallest = values.amin(1)
    shares = (smallest / lengths[:, 0])[smallest > 0]
    return _by_token(values, latents, scorer.levels), float(shares.quantile(0.05)) if len(shares) else 0.0


def select_above(scorer: Scorer, floor: Float[Tensor, ""] | Float[Tensor, " d_sae"]) -> Entries:
    """Return all entries above a floor, `()` or `(d_sae,)`: as `Dense` if there are many, else as `Sparse`."""
    share = float((scorer.preview() > floor).float().mean())
    return Dense(scorer.levels, scorer.dense()) if share > DENSE_SHARE else scorer.above(floor)


def _first_floor(scorer: Scorer, k: int) -> float:
    """Estimate a floor for the first step, on rank 0: the smallest of the k · n largest pre-activations of the first n tokens."""
    some = scorer.preview()
    smallest = some.flatten().topk(min(k * len(some), some.numel()), sorted=False).values.min()
    return max(0.0, float(distributed.broadcast(smallest)))


def _is_dense(k: int, scorer: Scorer) -> bool:
    return k > DENSE_SHARE * len(scorer.weights.b_enc)


def _top_of_rows(found: Sparse, counts: Int[Tensor, " batch"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return each token's k largest values and their latents, `(batch, k)` each, in no order; both are 0 where a token has fewer."""
    widest = max(int(counts.max()), k)
    place = found.rows * widest + torch.arange(len(found.rows), device=found.rows.device) - (counts.cumsum(0) - counts)[found.rows]
    values, latents = (flat.new_zeros(found.n_tokens * widest).scatter_(0, place, flat) for flat in (found.values, found.latents))
    top = values.view(-1, widest).topk(k, dim=1, sorted=False)
    return top.values, latents.view(-1, widest).gather(1, top.indices)


def _by_token(values: Float[Tensor, "batch k"], latents: Int[Tensor, "batch k"], levels: Levels) -> Sparse:
    """Make entries from k values and latents of each token, `(batch, k)` each, leaving out values that are not positive."""
    latents, order = latents.sort(dim=1)
    values = values.gather(1, order)
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    found = Sparse(len(values), levels, rows.flatten(), latents.flatten(), values.flatten())
    fires = found.values > 0
    return found if bool(fires.all()) else _pick(found, fires)


def _pick(found: Sparse, keep: Bool[Tensor, " entries"] | Int[Tensor, " kept"]) -> Sparse:
    return Sparse(found.n_tokens, found.levels, found.rows[keep], found.latents[keep], found.values[keep])
