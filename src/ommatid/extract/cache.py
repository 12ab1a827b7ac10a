"""The cache of what networks compute for images: it is found again by content, whichever run, experiment or executor computed it.

Each output of a network has a store of rows by the sha256 of the image file. The folder of the store names everything else that the rows
depend on: the network's weights and settings, its preprocessing, its code, the data type, the shape of the batch, and the arithmetic of
this machine. Rows are reused only if a check on this machine has shown that, in batches of one shape, an image's outputs do not depend on
its place in the batch or on the other images.
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ommatid.compute.hardware import arithmetic
from ommatid.extract.networks import Networks, Output, is_same
from ommatid.images import decode
from ommatid.store.caches import activations_bound, activations_folder, files_below
from ommatid.store.code import PACKAGE, Code, analyse, digest_of
from ommatid.store.filesystem import in_words, replace_text, temporary_path
from ommatid.store.row_store import RowStore, Space
from ommatid.vlm.preprocess import Preprocess

FLUSH_BYTES = 2**25
"""Bytes of new rows of one output that are held before they are written."""
RESERVE = 2**30
"""Bytes of a disk that the cache leaves free."""
FLUSH_SECONDS = 30.0
"""Seconds for which new rows are held at most while others are computed."""
FORMAT = 1
"""Version of the meaning of rows and keys."""
VERDICT, ROUNDING, PROBE = "verdict.json", "rounding", "probe.json"
_AROUND = ("ommatid.extract.networks", "ommatid.extract.tokens")
"""Modules that pick and scale outputs."""


@dataclass(frozen=True)
class Place:
    """Where the cache is, in a form that can be sent to workers."""

    folder: str
    """Folder of all stores, which exists on the driver's machine. A worker that does not have it works without the cache."""
    bound: float
    """Largest number of bytes."""
    started: float
    """Time at which the run began, by the clock of the driver's file system."""


def open_place(scratch: Path, left: float, on_notice: Callable[[str], None]) -> Place | None:
    """Make the folder of the cache.

    Args:
        scratch: Folder on the disk that the extraction writes to.
        left: Bytes that the extraction will leave free on that disk.
        on_notice: Called with a line if the cache cannot be used.

    Returns:
        The place; None if the cache is turned off or cannot be written.

    Raises:
        ConfigError: OMMATID_CACHE_GB is not a size.
    """
    bound, folder = activations_bound(), activations_folder()
    if not bound:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark = temporary_path(folder / "started")
        mark.touch()
        started = mark.stat().st_mtime
        mark.unlink()
        held = sum(entry.bytes for entry in files_below(folder))
        room = left if folder.stat().st_dev == scratch.stat().st_dev else shutil.disk_usage(folder).free
    except OSError as error:
        on_notice(f"{folder}: cannot be used as the cache of activations ({error.strerror}), so every image is run through the networks")
        return None
    return Place(str(folder), min(bound, held + max(0.0, room - RESERVE)), started)


class OutputCache:
    """The stores of a run's networks, as one process uses them. Without a place, it holds nothing and keeps nothing."""

    def __init__(self, place: Place | None, networks: Networks, on_notice: Callable[[str], None]) -> None:
        self._on_notice = on_notice
        self._networks = networks
        self._stores: dict[Output, RowStore] = {}
        self._verdicts: dict[Output, bool] = {}
        self._waiting: dict[Output, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._waiting_since = time.monotonic()
        self._said: set[str] = set()
        self._space = Space(Path(), 0.0, 0.0)
        self._folders: dict[int, Path] = {}
        self._is_writable = True
        if place is not None and os.path.isdir(place.folder):
            self._space = Space(Path(place.folder), place.bound, place.started, RESERVE)
            with suppress(OSError):
                self._open(Path(place.folder))

    def _open(self, folder: Path) -> None:
        for index, key in enumerate(network_keys(self._networks)):
            if key is not None:
                self._folders[index] = folder / key
        for output in self._networks.outputs:
            if output.network in self._folders:
                store = self._folders[output.network] / output_key(self._networks, output)
                self._check_probe(store / PROBE, self._networks.probes[output])
                self._stores[output] = RowStore(store, output.width, self._on_notice)
                if (verdict := _read_json(store / VERDICT)) is not None:
                    self._verdicts[output] = verdict["independent"]

    def _check_probe(self, place: Path, probe: list[float]) -> None:
        """Remove what was kept of a network that computes something else now, as a module may whose code reads what its state lacks."""
        known = _read_json(place)
        if known is not None and not is_same(probe, known):
            self._say_once(f"{place.parent}: the network computes something else with the same weights now, so this is removed")
            shutil.rmtree(place.parent, ignore_errors=True)
            known = None
        if known is None:
            _write_json(place, probe)

    def refresh(self) -> None:
        """Look for rows that other processes have added."""
        for store in self._stores.values():
            store.refresh()

    def keep(self, keys: np.ndarray) -> None:
        """Record the use of the rows of all images of a run, so that none of them makes room for new rows before its turn comes."""
        for store in self._stores.values():
            store.has(keys)

    def is_reused(self, output: Output) -> bool:
        """Return whether rows of an output are reused, because it is known that they do not depend on the batch."""
        return self._verdicts.get(output, False)

    def has(self, output: Output, keys: np.ndarray) -> np.ndarray:
        """Return whether each image has a row, `(images,)` bool."""
        if not self.is_reused(output):
            return np.zeros(len(keys), dtype=bool)
        return self._stores[output].has(keys)

    def read(self, output: Output, keys: np.ndarray, out: Tensor) -> np.ndarray:
        """Read the rows of images into a tensor, `(images, *shape)`, and return whether each was found undamaged, `(images,)` bool."""
        if not self.is_reused(output):
            return np.zeros(len(keys), dtype=bool)
        return self._stores[output].read(keys, _as_bytes(out))

    def add(self, keys: np.ndarray, pixels: Mapping[Preprocess, Tensor], outputs: Mapping[Output, Tensor]) -> None:
        """Keep the outputs of a batch, which are written later.

        Before the first rows of an output are kept, a second pass over the batch checks that they do not depend on it.

        Args:
            keys: Key of each image, `(images,)`; there may be fewer than rows in the batch, which is padded then.
            pixels: The whole batch.
            outputs: Outputs for the whole batch.
        """
        unknown = {output: rows for output, rows in outputs.items() if output in self._stores and output not in self._verdicts}
        if unknown:
            self._judge(pixels, unknown)
        for output, rows in outputs.items():
            if self.is_reused(output):
                self._waiting.setdefault(output, []).append((keys, _as_bytes(rows[: len(keys)])))

    @property
    def is_full(self) -> bool:
        """Whether so many rows are waiting, or for so long, that they should be written."""
        held = max((sum(rows.nbytes for _, rows in blocks) for blocks in self._waiting.values()), default=0)
        return held >= FLUSH_BYTES or (held > 0 and time.monotonic() - self._waiting_since >= FLUSH_SECONDS)

    def take(self) -> Mapping[Output, list[tuple[np.ndarray, np.ndarray]]]:
        """Return the rows that are waiting, for `write` to write in another thread, and hold none any more."""
        taken, self._waiting = self._waiting, {}
        self._waiting_since = time.monotonic()
        return taken

    def write(self, taken: Mapping[Output, list[tuple[np.ndarray, np.ndarray]]]) -> None:
        """Write rows, as long as there is space. A cache that cannot be written is no reason to fail, and is not tried again."""
        for output, blocks in taken.items() if self._is_writable else ():
            try:
                if not self._space.admit(sum(rows.nbytes + keys.nbytes for keys, rows in blocks)):
                    self._say_once(
                        f"the cache of activations is full: it may take {in_words(self._space.bound)} (OMMATID_CACHE_GB, or the space that "
                        "is free), which this extraction exceeds; images that do not fit will be run through the networks again next time"
                    )
                    return
                self._stores[output].write(*zip(*blocks, strict=True))
            except OSError as error:
                self._is_writable = False
                self._say_once(
                    f"{self._space.folder}: the cache of activations cannot be written ({error.strerror}); the run goes on without"
                )
                return

    def merge(self) -> None:
        """Merge small files of rows, if there are many."""
        try:
            for store in self._stores.values() if self._is_writable else ():
                store.merge()
        except OSError:
            self._is_writable = False

    def rounding(self, digests: Sequence[str], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the rounding error of the explained model on some images, which is measured only once for the same images."""
        folder, names = self._folders.get(0), list(self._networks.pickers)
        if folder is None:
            return measure()
        place = folder / f"{ROUNDING}-{_digest([names, self._networks.params.tokens, list(digests)])[:16]}.json"
        if (known := _read_json(place)) is not None:
            return known
        found = measure()
        _write_json(place, found)
        return found

    def _judge(self, pixels: Mapping[Preprocess, Tensor], outputs: Mapping[Output, Tensor]) -> None:
        """Find out whether outputs depend on places and companions: run the batch backwards, with every other image replaced by noise."""
        (size,) = {len(x) for x in pixels.values()}
        order = torch.arange(size).flip(0)
        kept = torch.arange(size) % 2 == 0
        generator = torch.Generator().manual_seed(0)
        other = {}
        for preprocess, x in pixels.items():
            other[preprocess] = x[order].clone()
            noise = torch.randint(0, 256, x[~kept].shape, generator=generator, dtype=torch.uint8)
            other[preprocess][~kept] = noise
        found = self._networks.forward({p: other[p] for p in self._networks.preprocesses_of(outputs)}, list(outputs))
        for output, rows in outputs.items():
            is_independent = bool((_as_bytes(found[output][kept]) == _as_bytes(rows[order][kept])).all())
            self._verdicts[output] = is_independent
            _write_json(self._stores[output].folder / VERDICT, {"independent": is_independent})
            if not is_independent:
                self._say_once(
                    f"{self._networks.members[output.network].name}: on this machine, the last bits of outputs for an image depend on "
                    "the other images of its batch, so they are computed for every image in every extraction"
                )

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._on_notice(line)


def network_keys(networks: Networks) -> list[str | None]:
    """Return the key of each network: a digest of all that its outputs for an image depend on; None if it does not say what that is."""
    judges = {output.network for output in networks.judged}
    return [_network_key(networks, network, "judge" if i in judges else "model") for i, network in enumerate(networks.members)]


def _network_key(networks: Networks, network: Any, role: str) -> str | None:
    if not hasattr(type(network), "state"):
        return None
    return _digest(
        [
            FORMAT,
            role,
            [type(network).__module__, type(network).__qualname__],
            _state_digest(network.state),
            network.preprocess.as_json(),
            [networks.params.dtype, networks.device, networks.params.batch_size],
            _code_digest(type(network).__module__),
            [decode.versions(), arithmetic(networks.device)],
        ]
    )[:32]


def output_key(networks: Networks, output: Output) -> str:
    """Return the name of the folder of an output in its network's folder."""
    if output.hookpoint is None:
        return "embedding"
    places = [[place.token, place.kind] for place in networks.pickers[output.hookpoint].places]
    return f"tokens-{_digest([output.hookpoint, places, list(output.shape)])[:16]}"


def _state_digest(state: Mapping[str, Tensor | str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, str):
            digest.update(f"{name}\0{value}\0".encode())
        else:
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def _code_digest(module: str) -> str:
    """Return a digest of the code that a network computes with, given its module, and that images and outputs go through."""
    if not module.startswith(f"{PACKAGE}."):
        return _digest([analyse(inspect.getsource(sys.modules[module]).encode()).digest, digest_of(*_AROUND)])
    # The package `vlm` itself loads all families, and computes nothing; `memo` keeps what was computed.
    without = (f"{PACKAGE}.vlm", f"{PACKAGE}.store.memo")
    used = Code().used_by(module, "ommatid.images.decode", "ommatid.vlm.preprocess", without=without)
    return _digest([used, digest_of(*_AROUND)])


def _as_bytes(rows: Tensor) -> np.ndarray:
    """Return rows as an array of bytes, `(n, width)`, that shares their memory if they lie side by side."""
    return rows.contiguous().view(torch.uint8).flatten(1).numpy() if len(rows) else np.empty((0, 0), np.uint8)


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    """Read a small file of the cache, and record its use, so that it is kept as long as the rows; None if it is missing or damaged."""
    with suppress(OSError, ValueError):
        text, checksum = path.read_text(encoding="ascii").splitlines()
        if checksum == hashlib.sha256(text.encode()).hexdigest():
            os.utime(path)
            return json.loads(text)
    return None


def _write_json(path: Path, value: object) -> None:
    """Write a small file of the cache, unless the cache cannot be written."""
    text = json.dumps(value)
    with suppress(OSError):
        replace_text(path, f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
