"""Ranks: what several processes that train one SAE together agree on; with one process, nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined() -> Iterator[None]:
    """In this block the processes that `torchrun` started know one another; each takes the GPU of its number, where there are some.

    The first leads: it does everything that a single process does. The others wait to be called (see `call`), or let go.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _called.clear()
    try:
        yield
    finally:
        if mine() == 0 and not _called:
            call(False)  # it ended without training: the others must not wait
        dist.destroy_process_group()


def call(is_wanted: bool = True) -> bool:
    """Have all ranks train now, or say that there is nothing to do; the others hear what the first says."""
    _called.append(is_wanted)
    return bool(agree(torch.tensor(int(is_wanted))))


_called: list[bool] = []
"""What this process has called for, or heard."""


def n() -> int:
    """How many processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(count: int) -> int:
    """The sum of a count over all ranks."""
    if n() == 1:
        return count
    return int(sum_(torch.tensor(count, dtype=torch.int64)))


def sum_(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if n() > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(tensor: Tensor) -> Tensor:
    """The first rank's, in place."""
    if n() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def nth_largest(values: Tensor, n_wanted: int) -> float:
    """The n-th largest of the values of all ranks; the smallest where they are fewer, 0 where there are none."""
    everyone = _of_all(values)
    if len(everyone) == 0:
        return 0.0
    wanted = min(n_wanted, len(everyone))
    return float(everyone.topk(wanted, sorted=False).values.min())


def keep_largest(values: Tensor, n_wanted: int) -> tuple[Tensor | None, float]:
    """Indices, ascending, of which values are among the n largest of all ranks (None: all are), and the smallest of those n.

    Of equal values at the border the first ranks' are kept.
    """
    if n() == 1:
        if len(values) <= n_wanted:
            return None, float(values.min()) if len(values) else 0.0
        top = values.topk(n_wanted, sorted=False)
        return top.indices.sort().values, float(top.values.min())
    border = nth_largest(values, n_wanted)
    above, equal = values > border, (values == border).nonzero()[:, 0]
    counts = _of_all(torch.tensor([int(above.sum()), len(equal)]))
    room = n_wanted - int(counts[::2].sum()) - int(counts[1::2][: mine()].sum())
    keep = above.clone()
    keep[equal[: max(0, room)]] = True
    return keep.nonzero()[:, 0], border


def _of_all(values: Tensor) -> Tensor:
    """The values of all ranks, one rank's after the other's."""
    if n() == 1:
        return values
    sizes = torch.zeros(n(), dtype=torch.int64)
    sizes[mine()] = len(values)
    sum_(sizes)
    padded = values.new_zeros(int(sizes.max()))
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in range(n())]
    dist.all_gather(found, padded)
    return torch.cat([one[:size] for one, size in zip(found, sizes.tolist(), strict=True)])


def share(tensors: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    """The first rank's tensors, or None where it has none."""
    if n() == 1:
        return tensors
    found = [None if tensors is None else {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}]
    dist.broadcast_object_list(found, 0, device=device)
    if found[0] is None:
        return None
    mine_ = tensors or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in found[0].items()}
    return {name: agree(tensor.contiguous()) for name, tensor in mine_.items()}
