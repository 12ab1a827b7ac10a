"""Encoded images to pixels, ahead of the model, so that it never waits."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ommatid.compute.prefetch import prefetch
from ommatid.errors import ArtefactError, ExecutorError
from ommatid.images import Unreadable, decode
from ommatid.vlm.preprocess import Preprocess

BYTES_AHEAD = 2**28
"""Of pixels that wait for the model, about."""


@dataclass(frozen=True)
class Pixels:
    """A batch of images as each preprocessing makes them."""

    numbers: np.ndarray
    """images.image, (batch,)."""
    is_train: np.ndarray
    """Whether the image is in the training split, (batch,) bool."""
    of: tuple[Tensor, ...]
    """Uint8 (batch, H, W, 3), one for each preprocessing."""


@dataclass(frozen=True)
class Encoded:
    """A batch of image files."""

    numbers: np.ndarray
    """images.image, (batch,)."""
    is_train: np.ndarray
    """Whether the image is in the training split, (batch,) bool."""
    files: list[bytes]
    """Their bytes."""


def make_pool(device: str) -> Executor:
    """Who decodes: threads beside a model on the CPU, which leaves no core to more; processes beside a GPU, which waits for them.

    Pillow gives up the interpreter's lock while it decodes and resizes, but not between: threads feed a model of some hundred
    images a second, processes one of thousands. Tensors come back through shared memory. As many as torch may use threads, which is
    this process's share of the machine.
    """
    n = torch.get_num_threads()
    if device == "cpu":
        return ThreadPoolExecutor(n)
    context = torch.multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(max(1, n - 1), mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def iter_pixels(batches: Iterable[Encoded], preprocesses: tuple[Preprocess, ...], pool: Executor, device: str) -> Iterator[Pixels]:
    """Batches in order; some are ready before they are asked for, in pinned memory where the model is on a GPU.

    Raises:
        ArtefactError: an image cannot be decoded; names it.
        ExecutorError: a process that decodes died.
    """
    first = next(iterator := iter(batches), None)
    if first is None:
        return
    per_batch = len(first.files) * sum(3 * height * width for height, width in (p.crop for p in preprocesses))
    n_ahead = min(torch.get_num_threads() + 2, max(2, BYTES_AHEAD // per_batch))
    futures = prefetch((pool.submit(_prepare, batch, preprocesses) for batch in chain([first], iterator)), n_ahead)
    results = (future.result() for future in futures)
    try:
        yield from results if device == "cpu" else prefetch(map(_pin, results), 2)
    except BrokenProcessPool as error:
        raise ExecutorError(
            f"a process that decodes images died ({error}): too little memory, or too little shared memory (/dev/shm, in a container: "
            "--shm-size); the run goes on where it was when it is started again"
        ) from error


def _prepare(batch: Encoded, preprocesses: tuple[Preprocess, ...]) -> Pixels:
    made: list[list[np.ndarray]] = [[] for _ in preprocesses]
    for number, file in zip(batch.numbers, batch.files, strict=True):
        try:
            image = decode(file)
        except Unreadable as error:
            raise ArtefactError(f"images: image {number} cannot be decoded any more ({error}); run stage images again") from None
        for pixels, preprocess in zip(made, preprocesses, strict=True):
            pixels.append(preprocess(image))
    return Pixels(batch.numbers, batch.is_train, tuple(torch.from_numpy(np.stack(pixels)) for pixels in made))


def _pin(pixels: Pixels) -> Pixels:
    return Pixels(pixels.numbers, pixels.is_train, tuple(x.pin_memory() for x in pixels.of))
