"""Selection: from a batch to the entries that may fire, through the one dense product of a training step.

The product is computed for some tokens at a time, in memory that gradients will be in later; all of it is never there. In bfloat16,
where the hardware has it, its values are rounded to 8 bits; weights and everything after it are float32.

A floor is a guess below which nothing is wanted, from the last step: only speed depends on it. Where it was too high, the tokens
concerned are looked at again without.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ommatid.masks import true_at
from ommatid.sae import ranks
from ommatid.sae.entries import Dense, Entries, Levels, Sparse
from ommatid.sae.weights import Weights, grad_of

TOKENS_PER_CHUNK = 1024
"""Of the product: in float32 with 256 it takes a quarter longer (AVX2), in bfloat16 with 128 to 1,536 the same (AMX; both 768 x 8,192)."""
FEWEST_TOKENS = 64
"""Below it the gradients' memory is not worth a loop."""
ALIGNMENT = 64
"""Bytes, of pieces of memory."""
TOKENS_OF_GUESS = 256
"""On which a first floor, and the density, are guessed."""
FLOOR_SHARE = 0.92
"""Of the last step's threshold: below it few candidates, rarely too few."""
DENSE_SHARE = 0.08
"""Of all entries: above it products over the whole matrix are faster, reckoned from times of the kernels (768 x 8,192, 2 cores)."""


@dataclass(frozen=True)
class Scorer:
    """The encoder over one batch."""

    weights: Weights
    """Of the SAE."""
    inputs_bd: Tensor
    """What is encoded, centred, (batch, d_model)."""
    levels: Levels
    """Of the dictionary."""
    dtype: torch.dtype
    """Arithmetic of the product."""

    @property
    def n_tokens(self) -> int:
        """Of the batch."""
        return len(self.inputs_bd)

    def dense(self) -> Tensor:
        """All pre-activations, (batch, d_sae)."""
        return torch.addmm(self.weights.b_enc, self.inputs_bd, self.weights.W_enc.T)

    def above(self, floor: Tensor) -> Sparse:
        """The entries above a floor: one for all, (), of each token, (batch, 1), or of each latent, (d_sae,)."""
        indices, values = zip(*self._iter_above(floor), strict=True)
        index = torch.cat(indices)
        rows = index // len(self.weights.b_enc)
        latents = index.remainder_(len(self.weights.b_enc))
        return Sparse(self.n_tokens, self.levels, rows, latents, torch.cat(values).to(self.weights.b_enc.dtype))

    def _iter_above(self, floor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        room = _Room(self.weights, self.dtype)
        d_sae, b_enc = len(self.weights.b_enc), self.weights.b_enc.to(self.dtype)
        n = min(TOKENS_PER_CHUNK, self.n_tokens, room.n_tokens)
        for start in range(0, self.n_tokens, n):
            x = self.inputs_bd[start : start + n].to(self.dtype)
            scores, mask, flags = (own[: len(x)] for own in (room.scores, room.mask, room.flags))
            torch.addmm(b_enc, x, room.W_enc.T, out=scores)
            of_chunk = floor[start : start + n] if floor.ndim == 2 else floor
            torch.gt(scores, of_chunk.to(self.dtype), out=mask)
            flags.copy_(mask)  # to compare straight into bool takes three times as long
            index = true_at(flags)
            yield index + start * d_sae, scores.flatten()[index]


class _Room:
    """Scratch memory of a selection: that of the gradients, which hold nothing between a step's end and the next one's gradients."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        n_bytes = len(weights.b_enc) * dtype.itemsize
        one, other = _Piece(grad_of(weights.W_enc)), _Piece(grad_of(weights.W_dec))
        self.W_enc = weights.W_enc if dtype == weights.W_enc.dtype else other.take(weights.W_enc.shape, dtype).copy_(weights.W_enc)
        self.n_tokens = min(one.n_bytes // n_bytes, (other.n_bytes - ALIGNMENT) // (n_bytes + len(weights.b_enc)))
        if self.n_tokens < FEWEST_TOKENS:  # small widths only
            self.n_tokens = FEWEST_TOKENS
            one = other = _Piece(torch.empty(0, device=weights.W_enc.device))
        shape = (min(self.n_tokens, TOKENS_PER_CHUNK), len(weights.b_enc))
        self.scores, self.mask, self.flags = one.take(shape, dtype), other.take(shape, dtype), other.take(shape, torch.bool)


class _Piece:
    """Memory to be cut."""

    def __init__(self, memory: Tensor) -> None:
        self._bytes = memory.flatten().view(torch.uint8)

    @property
    def n_bytes(self) -> int:
        """What is left."""
        return len(self._bytes)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Some of it, or of new memory where that is not enough."""
        n = math.prod(shape) * dtype.itemsize
        if n > len(self._bytes):
            return torch.empty(shape, dtype=dtype, device=self._bytes.device)
        taken, self._bytes = self._bytes[:n], self._bytes[-(-n // ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).view(shape)


def select_batch(scorer: Scorer, k: int, floor: float) -> tuple[Entries, float]:
    """The k · batch largest positive entries (fewer if there are fewer), and the smallest of them (0 where there is none).

    With several ranks the batch is that of all.
    """
    n = k * ranks.total(scorer.n_tokens)
    if _is_dense(k, scorer):
        values = scorer.dense().relu_()
        threshold = ranks.nth_largest(values[values > 0], n)
        return Dense(scorer.levels, values.mul_(values >= threshold)), threshold
    first = floor if floor > 0 else FLOOR_SHARE * _first_floor(scorer, k)
    for guess in (first, first / 2, first / 4, 0.0):
        found = scorer.above(torch.tensor(guess, device=scorer.inputs_bd.device))
        if guess == 0 or ranks.total(len(found.values)) >= n:
            break
    keep, threshold = ranks.keep_largest(found.values, n)
    return (found if keep is None else _pick(found, keep)), threshold


def select_token(scorer: Scorer, k: int, floor: float) -> tuple[Entries, float]:
    """Of each token the k largest positive entries (fewer if there are fewer), and the floor of the next step.

    Args:
        scorer: Of the batch.
        k: Entries a token.
        floor: As a share of the length of what is encoded: tokens differ in length, and their largest entries with it.
    """
    if _is_dense(k, scorer):
        values = scorer.dense().relu_()
        top = values.topk(k, dim=1)
        return Dense(scorer.levels, torch.zeros_like(values).scatter_(1, top.indices, top.values)), floor
    lengths = scorer.inputs_bd.norm(dim=1, keepdim=True).clamp_min(1e-12)
    floor = floor if floor > 0 else FLOOR_SHARE * _first_floor(scorer, k) / float(lengths.max())
    found = scorer.above(lengths * floor)
    counts = torch.bincount(found.rows, minlength=scorer.n_tokens)
    few = (counts < k).nonzero()[:, 0]
    if len(few) and floor > 0:
        found = _with_all_of(found, few, scorer)
        counts = torch.bincount(found.rows, minlength=scorer.n_tokens)
    keep, smallest = _top_of_rows(found, counts, k)
    shares = smallest[counts >= k] / lengths[:, 0][counts >= k]
    return _pick(found, keep), float(shares.quantile(0.05)) if len(shares) else 0.0


def select_above(scorer: Scorer, floor: Tensor) -> Entries:
    """All entries above a floor, () or (d_sae,), dense where they are many."""
    first = Scorer(scorer.weights, scorer.inputs_bd[:TOKENS_OF_GUESS], scorer.levels, scorer.dtype).dense()
    share = float((first > floor).float().mean())
    return Dense(scorer.levels, scorer.dense()) if share > DENSE_SHARE else scorer.above(floor)


def _first_floor(scorer: Scorer, k: int) -> float:
    """A guess where no step came before: what k entries a token of some of the batch are above; all ranks take the first's."""
    some = Scorer(scorer.weights, scorer.inputs_bd[:TOKENS_OF_GUESS], scorer.levels, scorer.dtype).dense()
    smallest = some.flatten().topk(min(k * len(some), some.numel()), sorted=False).values.min()
    return max(0.0, float(ranks.agree(smallest)))


def _is_dense(k: int, scorer: Scorer) -> bool:
    return k > DENSE_SHARE * len(scorer.weights.b_enc)


def _with_all_of(found: Sparse, few: Tensor, scorer: Scorer) -> Sparse:
    """The entries, those of some tokens without a floor."""
    again = Scorer(scorer.weights, scorer.inputs_bd[few], scorer.levels, scorer.dtype).above(torch.zeros((), device=few.device))
    stays = torch.ones(scorer.n_tokens, dtype=torch.bool, device=few.device)
    stays[few] = False
    kept = stays[found.rows]
    rows = torch.cat([found.rows[kept], few[again.rows]])
    order = rows.argsort(stable=True)
    latents, values = torch.cat([found.latents[kept], again.latents]), torch.cat([found.values[kept], again.values])
    return Sparse(found.n_tokens, found.levels, rows[order], latents[order], values[order])


def _top_of_rows(found: Sparse, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which entries are among the k largest of their token, ascending, and the smallest of these for each token."""
    widest = max(int(counts.max()), k)
    place = torch.arange(len(found.rows), device=found.rows.device) - (counts.cumsum(0) - counts)[found.rows]
    table = torch.zeros(found.n_tokens, widest, dtype=found.values.dtype, device=found.values.device)
    table[found.rows, place] = found.values
    top = table.topk(k, dim=1)
    chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)
    return chosen[found.rows, place].nonzero()[:, 0], top.values[:, -1]


def _pick(found: Sparse, keep: Tensor) -> Sparse:
    return Sparse(found.n_tokens, found.levels, found.rows[keep], found.latents[keep], found.values[keep])
