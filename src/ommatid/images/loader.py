"""Decoding of images to pixels, ahead of the model, so that the model does not wait."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ommatid.compute.prefetch import prefetch
from ommatid.errors import ArtefactError, ExecutorError
from ommatid.images.decode import Unreadable, decode
from ommatid.images.reference import load_file, parse_reference
from ommatid.vlm.preprocess import Preprocess

BYTES_AHEAD = 2**28
"""Approximate bytes of pixels that wait for the model."""
_N_READERS = 16
"""Number of files that are read at a time if the data set refers to them; an object store takes tens of milliseconds to answer."""


@dataclass(frozen=True)
class Pixels:
    """A batch of images, preprocessed for each network."""

    numbers: Int[np.ndarray, " batch"]
    """Number of each image, (batch,)."""
    is_train: Bool[np.ndarray, " batch"]
    """Whether each image is in the training split, (batch,) bool."""
    of: tuple[UInt8[Tensor, "batch _height _width 3"], ...]
    """Pixels as each preprocessing makes them, (batch, height, width, 3) uint8."""


@dataclass(frozen=True)
class Encoded:
    """A batch of image files."""

    numbers: Int[np.ndarray, " batch"]
    """Number of each image, (batch,)."""
    is_train: Bool[np.ndarray, " batch"]
    """Whether each image is in the training split, (batch,) bool."""
    files: list[bytes]
    """Content of each image file, or a reference to it."""
    preprocesses: tuple[Preprocess, ...] = ()
    """Preprocessings to apply to this batch; () means those of all batches."""


def make_pool(device: str) -> Executor:
    """Return a pool that decodes images: threads if the model runs on the CPU, processes if it runs on a GPU.

    Pillow releases the interpreter's lock while it decodes and resizes, but not in between, so threads can feed a model of some hundred
    images per second, and processes one of thousands. A model on the CPU leaves no core for more. Processes return tensors through shared
    memory. The size of the pool follows the number of threads that torch may use, which is this process's share of the machine.
    """
    n = torch.get_num_threads()
    if device == "cpu":
        return ThreadPoolExecutor(n)
    context = torch.multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(max(1, n - 1), mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def iter_pixels(batches: Iterable[Encoded], preprocesses: tuple[Preprocess, ...], pool: Executor, device: str) -> Iterator[Pixels]:
    """Decode and preprocess batches of images, some of them ahead of the consumer.

    Args:
        batches: The image files.
        preprocesses: The preprocessings to apply to each image.
        pool: Pool that decodes, from `make_pool`.
        device: Device of the model; unless it is the CPU, the pixels are put into pinned memory.

    Yields:
        The batches, in order.

    Raises:
        ArtefactError: An image cannot be decoded; the message names it.
        ExecutorError: A process that decodes died.
    """
    first = next(iterator := _load_ahead(batches), None)
    if first is None:
        return
    per_batch = len(first.files) * sum(3 * height * width for height, width in (p.crop for p in first.preprocesses or preprocesses))
    n_ahead = min(torch.get_num_threads() + 2, max(2, BYTES_AHEAD // per_batch))
    futures = prefetch((pool.submit(_prepare, batch, preprocesses) for batch in chain([first], iterator)), n_ahead)
    results = (future.result() for future in futures)
    try:
        yield from results if device == "cpu" else prefetch(map(_pin, results), 2)
    except BrokenProcessPool as error:
        raise ExecutorError(
            f"a process that decodes images died ({error}): too little memory, or too little shared memory (/dev/shm, in a container: "
            "--shm-size); a new run continues where this one stopped"
        ) from error


def _load_ahead(batches: Iterable[Encoded]) -> Iterator[Encoded]:
    """Read the files to which batches refer, those of the next batch while one is decoded, and many at a time."""
    with ThreadPoolExecutor(_N_READERS) as readers:
        ahead: deque[tuple[Encoded, list[Future[bytes]] | None]] = deque()
        try:
            for batch in batches:
                refers = any(parse_reference(file) for file in batch.files)
                ahead.append((batch, [readers.submit(load_file, file) for file in batch.files] if refers else None))
                if len(ahead) > 1:
                    yield _loaded(*ahead.popleft())
            while ahead:
                yield _loaded(*ahead.popleft())
        finally:
            readers.shutdown(cancel_futures=True)


def _loaded(batch: Encoded, files: list[Future[bytes]] | None) -> Encoded:
    return batch if files is None else replace(batch, files=[file.result() for file in files])


def _prepare(batch: Encoded, preprocesses: tuple[Preprocess, ...]) -> Pixels:
    preprocesses = batch.preprocesses or preprocesses
    by_preprocess: list[list[np.ndarray]] = [[] for _ in preprocesses]
    for number, file in zip(batch.numbers, batch.files, strict=True):
        try:
            image = decode(file)
        except Unreadable as error:
            raise ArtefactError(f"images: image {number} cannot be decoded any more ({error}); run the stage images again") from None
        for pixels, preprocess in zip(by_preprocess, preprocesses, strict=True):
            pixels.append(preprocess(image))
    return Pixels(batch.numbers, batch.is_train, tuple(torch.from_numpy(np.stack(pixels)) for pixels in by_preprocess))


def _pin(pixels: Pixels) -> Pixels:
    return Pixels(pixels.numbers, pixels.is_train, tuple(x.pin_memory() for x in pixels.of))
