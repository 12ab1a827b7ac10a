"""Selection: from a batch to the entries that may fire, through the one dense product of a training step.

The product is computed for some tokens at a time, in memory that gradients will be in later; all of it is never there. In bfloat16,
where the hardware has it, its values are rounded to 8 bits; weights and everything after it are float32.

A floor is a guess below which nothing is wanted, from the last step: only speed depends on it. Where it was too high, the tokens
concerned are looked at again without.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ommatid.compute.nonzero import true_at
from ommatid.sae import distributed
from ommatid.sae.entries import Dense, Entries, Levels, Sparse
from ommatid.sae.weights import Weights, grad_of

TOKENS_PER_CHUNK = 1024
"""Of the product: in float32 with 256 it takes a quarter longer (AVX2), in bfloat16 with 128 to 1,536 the same (AMX; both 768 x 8,192)."""
TOKENS_PER_TILE = 16
"""Chunks are multiples of it, and about equally large: with 511 tokens and a last chunk of 4 a step takes a seventh longer (AVX-512)."""
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
        """The entries above a floor: one for all, (), of each token, (batch, 1), or of each latent, (d_sae,).

        Compared in the product's arithmetic; b_enc is taken from the floor, which is less work than to add it to every entry.
        """
        rows, latents, values = (torch.cat(parts) for parts in zip(*self._iter_above(floor), strict=True))
        return Sparse(self.n_tokens, self.levels, rows, latents, values)

    def _iter_above(self, floor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        room, b_enc = self._room, self.weights.b_enc
        floor, own = floor.to(self.dtype), b_enc.to(self.dtype)
        for part, scores in self._iter_scores(self.inputs_bd):
            mask, flags = room.mask[: len(scores)], room.flags[: len(scores)]
            of_chunk = floor[part] if floor.ndim == 2 else floor
            bound = torch.sub(of_chunk, own, out=mask if floor.ndim == 2 else None)
            torch.gt(scores, bound, out=mask)
            flags.copy_(mask)  # to compare straight into bool takes three times as long
            index = true_at(flags)
            rows, latents = index // len(b_enc), index % len(b_enc)
            yield rows + part.start, latents, scores.flatten().index_select(0, index).to(b_enc.dtype) + b_enc.index_select(0, latents)

    def largest(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of some tokens, also negative ones, and their latents, (tokens, k) each, in no order."""
        scores = self._iter_scores(self.inputs_bd[tokens])
        tops = [of_chunk.add_(self.weights.b_enc).topk(k, dim=1, sorted=False) for _, of_chunk in scores]
        values, latents = zip(*tops, strict=True)
        return torch.cat(values).to(self.weights.b_enc.dtype), torch.cat(latents)

    def some(self) -> Tensor:
        """Pre-activations of the first tokens, of as many as a guess needs and there is room for, in memory that the next overwrite."""
        return next(self._iter_scores(self.inputs_bd[:TOKENS_OF_GUESS]))[1].add_(self.weights.b_enc)

    def _iter_scores(self, inputs: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pre-activations, less b_enc, of some tokens at a time, in memory that those of the next overwrite."""
        room = self._room
        for part in room.parts(len(inputs)):
            x = inputs[part].to(self.dtype)
            yield part, torch.mm(x, room.W_enc.T, out=room.scores[: len(x)])

    @cached_property
    def _room(self) -> "_Room":
        return _Room(self.weights, self.dtype)


class _Room:
    """Scratch memory of a selection: that of the gradients, which hold nothing between a step's end and the next one's gradients."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        d_sae = len(weights.b_enc)
        one, other = _Piece(grad_of(weights.W_enc)), _Piece(grad_of(weights.W_dec))
        self.W_enc = weights.W_enc if dtype == weights.W_enc.dtype else other.take(weights.W_enc.shape, dtype).copy_(weights.W_enc)
        fits = min(one.n_bytes // (d_sae * dtype.itemsize), other.n_bytes // (d_sae * (dtype.itemsize + 1)))
        self._n_tokens = min(fits // TOKENS_PER_TILE * TOKENS_PER_TILE, TOKENS_PER_CHUNK)
        if self._n_tokens < FEWEST_TOKENS:  # small widths only
            self._n_tokens = FEWEST_TOKENS
            one = other = _Piece(torch.empty(0, device=weights.W_enc.device))
        shape = (self._n_tokens, d_sae)
        self.scores, self.mask, self.flags = one.take(shape, dtype), other.take(shape, dtype), other.take(shape, torch.bool)

    def parts(self, n_tokens: int) -> Iterator[slice]:
        """So many tokens in chunks that have room."""
        n_parts = max(1, -(-n_tokens // self._n_tokens))
        n = -(-n_tokens // (n_parts * TOKENS_PER_TILE)) * TOKENS_PER_TILE
        for start in range(0, n_tokens, n):
            yield slice(start, min(start + n, n_tokens))


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
    values, latents = _top_of_rows(found, counts, k)
    few = (counts < k).nonzero()[:, 0]
    if len(few) and floor > 0:
        values[few], latents[few] = scorer.largest(few, k)
    smallest = values.amin(1)
    shares = (smallest / lengths[:, 0])[smallest > 0]
    return _by_token(values, latents, scorer.levels), float(shares.quantile(0.05)) if len(shares) else 0.0


def select_above(scorer: Scorer, floor: Tensor) -> Entries:
    """All entries above a floor, () or (d_sae,), dense where they are many."""
    share = float((scorer.some() > floor).float().mean())
    return Dense(scorer.levels, scorer.dense()) if share > DENSE_SHARE else scorer.above(floor)


def _first_floor(scorer: Scorer, k: int) -> float:
    """A guess where no step came before: what k entries a token of some of the batch are above; all ranks take the first's."""
    some = scorer.some()
    smallest = some.flatten().topk(min(k * len(some), some.numel()), sorted=False).values.min()
    return max(0.0, float(distributed.agree(smallest)))


def _is_dense(k: int, scorer: Scorer) -> bool:
    return k > DENSE_SHARE * len(scorer.weights.b_enc)


def _top_of_rows(found: Sparse, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each token and their latents, (batch, k) each, in no order; 0 where a token has fewer."""
    widest = max(int(counts.max()), k)
    place = found.rows * widest + torch.arange(len(found.rows), device=found.rows.device) - (counts.cumsum(0) - counts)[found.rows]
    values, latents = (own.new_zeros(found.n_tokens * widest).scatter_(0, place, own) for own in (found.values, found.latents))
    top = values.view(-1, widest).topk(k, dim=1, sorted=False)
    return top.values, latents.view(-1, widest).gather(1, top.indices)


def _by_token(values: Tensor, latents: Tensor, levels: Levels) -> Sparse:
    """Entries of equally many latents a token, (batch, k), where they are positive."""
    latents, order = latents.sort(dim=1)
    values = values.gather(1, order)
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    found = Sparse(len(values), levels, rows.flatten(), latents.flatten(), values.flatten())
    fires = found.values > 0
    return found if bool(fires.all()) else _pick(found, fires)


def _pick(found: Sparse, keep: Tensor) -> Sparse:
    return Sparse(found.n_tokens, found.levels, found.rows[keep], found.latents[keep], found.values[keep])
