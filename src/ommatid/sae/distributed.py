"""Collective operations for processes that train one SAE together. A single process can call them without a process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started into a group. Each uses the GPU of its local rank, if there are GPUs.

    Rank 0 does everything that a single process does. The other ranks wait until it calls `agree_to_train`.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _agreements.clear()
    try:
        yield
    finally:
        if rank() == 0 and not _agreements:
            agree_to_train(None)  # Rank 0 ended without training, and the other ranks are still waiting for its decision.
        dist.destroy_process_group()


def agree_to_train(group: int | None = 0) -> int | None:
    """Broadcast which SAEs rank 0 wants to train next.

    Args:
        group: Index of the group of SAEs that this rank wants to train; None for nothing more. Only rank 0's value counts.

    Returns:
        Rank 0's decision, on every rank.
    """
    _agreements.append(group)
    agreed = int(broadcast(torch.tensor(-1 if group is None else group)))
    return None if agreed < 0 else agreed


_agreements: list[int | None] = []
"""One entry for each call of `agree_to_train` by this process."""


def n_ranks() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(count: int) -> int:
    """Return the sum of a count over all ranks."""
    if n_ranks() == 1:
        return count
    return int(all_reduce(torch.tensor(count, dtype=torch.int64)))


def all_reduce(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum a tensor over all ranks, in place, and return it."""
    if n_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Overwrite a tensor with rank 0's, in place, and return it."""
    if n_ranks() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def nth_largest(values: Float[Tensor, " values"], n_wanted: int) -> float:
    """Return the `n_wanted`-th largest of all ranks' values: the smallest if there are fewer, 0 if there are none."""
    everyone = _all_gather(values)
    if len(everyone) == 0:
        return 0.0
    wanted = min(n_wanted, len(everyone))
    return float(everyone.topk(wanted, sorted=False).values.min())


def keep_largest(values: Float[Tensor, " values"], n_wanted: int) -> tuple[Int[Tensor, " kept"] | None, float]:
    """Find which of this rank's values are among the `n_wanted` largest over all ranks. Ties go to the lower ranks.

    Args:
        values: This rank's values, `(n,)`.
        n_wanted: Number of values to keep over all ranks.

    Returns:
        The indices of the values that this rank keeps, ascending, `(n_kept,)`, or None if it keeps all; and the smallest value kept on
        any rank, or 0 if there is none.
    """
    if n_ranks() == 1:
        if len(values) <= n_wanted:
            return None, float(values.min()) if len(values) else 0.0
        top = values.topk(n_wanted, sorted=False)
        return top.indices.sort().values, float(top.values.min())
    border = nth_largest(values, n_wanted)
    above, equal = values > border, (values == border).nonzero()[:, 0]
    counts = _all_gather(torch.tensor([int(above.sum()), len(equal)]))
    room = n_wanted - int(counts[::2].sum()) - int(counts[1::2][: rank()].sum())
    keep = above.clone()
    keep[equal[: max(0, room)]] = True
    return keep.nonzero()[:, 0], border


def _all_gather(values: Num[Tensor, " values"]) -> Num[Tensor, " gathered"]:
    """Concatenate the values of all ranks, in the order of ranks."""
    if n_ranks() == 1:
        return values
    sizes = torch.zeros(n_ranks(), dtype=torch.int64)
    sizes[rank()] = len(values)
    all_reduce(sizes)
    padded = values.new_zeros(int(sizes.max()))
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in range(n_ranks())]
    dist.all_gather(found, padded)
    return torch.cat([values_[:size] for values_, size in zip(found, sizes.tolist(), strict=True)])


def broadcast_tensors(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank. The tensors of other ranks are ignored."""
    if n_ranks() == 1:
        return tensors
    found = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}]
    dist.broadcast_object_list(found, 0, device=device)
    tensors = tensors or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in found[0].items()}
    return {name: broadcast(tensor.contiguous()) for name, tensor in tensors.items()}
