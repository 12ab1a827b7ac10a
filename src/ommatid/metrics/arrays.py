"""Metrics of plain arrays from other code: numpy arrays, torch tensors, and compressed rows of numpy, torch or scipy."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, overload

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ommatid.errors import InputError
from ommatid.metrics.fidelity import Fidelity
from ommatid.metrics.monosemanticity import Monosemanticity

VALUES = 2**22
"""Number of values per block of dense rows: 32 MiB in float64."""
ENTRIES = 2**19
"""Number of stored entries per block of compressed rows. A block with many non-zero values is made dense, so it must be small."""
IMAGES = 4096
"""Largest number of images per block."""

TINY, HUGE = 1e-6, 1e100
"""Bounds on an embedding's largest absolute value. An embedding outside them is rescaled, because its squares could vanish or overflow."""


@overload
def monosemanticity(acts: Tensor, embeddings: Any) -> Tensor: ...
@overload
def monosemanticity(acts: Any, embeddings: Any) -> np.ndarray: ...
def monosemanticity(acts: Any, embeddings: Any) -> Tensor | np.ndarray:
    """Compute the exact MonoSemanticity score of each latent (Pach et al. 2025, arXiv 2504.02821, eq. 9) in one pass over the images.

    Args:
        acts: Image-level activations `(images, latents)` of any real type: a numpy array, a torch tensor, or compressed rows. Compressed
            rows are a torch tensor of layout sparse_csr, or an object with the attributes `indptr`, `indices`, `data` and `shape` of
            scipy.sparse.csr_array.
        embeddings: The judge's embeddings of the same images, `(images, width)`. Their norms do not matter, but must not be zero.

    Returns:
        The scores, `(latents,)` float64, as a tensor if `acts` is one, and as a numpy array otherwise. A score is NaN where it is
        undefined, because the latent is constant or fires (is not 0) on fewer than two images.

    Raises:
        InputError: Shapes do not fit, values are not finite, an embedding is zero, or compressed rows are malformed.

    >>> import numpy as np
    >>> from ommatid import monosemanticity
    >>> embeddings = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])  # two pairs of similar images
    >>> acts = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # latent 0 fires on one pair, latent 1 on one image of each
    >>> monosemanticity(acts, embeddings).round(2)
    array([0.99, 0.  ])
    """
    blocks, judge = _open(acts), _Dense(embeddings, "embeddings")
    if len(blocks) != len(judge):
        raise InputError(f"acts have {len(blocks)} images and embeddings {len(judge)}: give both one row per image, in the same order")
    scores = Monosemanticity(blocks.width, judge.width)
    for start, stop in blocks.spans():
        scores.add(_finite(blocks.read(start, stop), start), _directions(judge.read(start, stop), start))
    ms = scores.scores().ms
    return ms if isinstance(acts, Tensor) else ms.numpy()


def fvu(x: Any, x_hat: Any) -> float:
    """Compute the fraction of variance unexplained, Σ‖x−x̂‖² / Σ‖x−x̄‖², where x̄ is the mean of x.

    Args:
        x: Activations `(tokens, d_model)` of any real type, as a numpy array or torch tensor.
        x_hat: Reconstructions of the same shape.

    Returns:
        The fraction: 0 is perfect, and 1 is no better than the mean. NaN if x does not vary.

    Raises:
        InputError: Shapes do not fit, or values are not finite.

    >>> import numpy as np
    >>> from ommatid import fvu
    >>> x = np.array([[0.0, 0.0], [2.0, 0.0]])
    >>> fvu(x, x), fvu(x, [[1.0, 0.0], [1.0, 0.0]]), fvu(x, [[0.5, 0.0], [1.5, 0.0]])
    (0.0, 1.0, 0.25)
    """
    ours, theirs = _Dense(x, "x"), _Dense(x_hat, "x_hat")
    if (len(ours), ours.width) != (len(theirs), theirs.width):
        raise InputError(
            f"x has the shape {(len(ours), ours.width)} and x_hat {(len(theirs), theirs.width)}; both must have the same tokens and width"
        )
    fidelity = Fidelity()
    for start, stop in ours.spans():
        part, part_hat = (rows.read(start, stop).double() for rows in (ours, theirs))
        if not (part.isfinite().all() and part_hat.isfinite().all()):
            raise InputError(f"x or x_hat is not finite, in tokens {start} to {stop - 1}")
        fidelity.add(part, part_hat, 0)
    return fidelity.fvu


class _Rows(Protocol):
    """A matrix that is read in blocks of rows."""

    width: int
    """Number of columns."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each block, and the row after its last."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` on the CPU, dense or in CSR form."""
        ...


def _open(acts: Any) -> _Rows:
    if isinstance(acts, Tensor) and acts.layout == torch.sparse_csr:
        return _Compressed(acts.crow_indices(), acts.col_indices(), acts.values(), tuple(acts.shape))
    if isinstance(acts, Tensor) or not hasattr(acts, "indptr"):
        return _Dense(acts, "acts")
    if (form := getattr(acts, "format", "csr")) != "csr":
        raise InputError(f"acts have the format {form}; convert them to compressed rows: acts.tocsr()")
    starts, columns, values = (torch.from_numpy(np.asarray(getattr(acts, name))) for name in ("indptr", "indices", "data"))
    return _Compressed(starts, columns, values, acts.shape)


class _Dense:
    """A numpy array or tensor."""

    def __init__(self, values: Any, name: str) -> None:
        if isinstance(values, Tensor) and values.layout != torch.strided:
            raise InputError(f"{name} are a tensor of layout {values.layout}; they must be dense" + _OR_CSR * (name == "acts"))
        self._values = values if isinstance(values, Tensor) else np.asarray(values)
        _check_shape(name, tuple(self._values.shape), self._values.dtype)
        self._n, self.width = self._values.shape

    def __len__(self) -> int:
        return self._n

    def spans(self) -> Iterator[tuple[int, int]]:
        n = min(IMAGES, max(1, VALUES // max(1, self.width)))
        return ((start, min(start + n, self._n)) for start in range(0, self._n, n))

    def read(self, start: int, stop: int) -> Float[Tensor, "rows width={self.width}"]:
        rows = self._values[start:stop]
        return _real(rows) if isinstance(rows, Tensor) else torch.from_numpy(_native(rows))


_OR_CSR = ", or of layout sparse_csr: acts.to_sparse_csr()"


class _Compressed:
    """A matrix of compressed rows."""

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> None:
        _check_shape("acts", shape, values.dtype)
        self._n, self.width = shape
        self._starts, self._columns, self._values = starts.cpu().long(), columns, values
        fits = len(starts) == self._n + 1 and int(starts[0]) == 0 and int(starts[-1]) == len(columns) == len(values)
        if not fits or bool((self._starts.diff() < 0).any()):
            raise InputError(
                f"acts are not valid compressed rows: {self._n} images have {len(starts)} row pointers, {len(columns)} column indices and "
                f"{len(values)} values; there must be one pointer more than images, rising from 0 to the number of entries, and one index "
                "and one value for each entry"
            )

    def __len__(self) -> int:
        return self._n

    def spans(self) -> Iterator[tuple[int, int]]:
        start = 0
        while start < self._n:
            last = int(torch.searchsorted(self._starts, self._starts[start] + ENTRIES, right=True)) - 1
            stop = max(start + 1, min(last, start + IMAGES, self._n))
            yield start, stop
            start = stop

    def read(self, start: int, stop: int) -> Float[Tensor, "rows width={self.width}"]:
        starts = self._starts[start : stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        columns, values = self._columns[entries].cpu().long(), _real(self._values[entries])
        rows = torch.arange(stop - start).repeat_interleave(starts.diff())
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < self.width:
            raise InputError(f"acts: a column index is outside 0 to {self.width - 1}, in images {start} to {stop - 1}")
        in_order = (columns.diff() > 0) | (rows.diff() > 0)
        if not bool(in_order.all()) and len((rows * self.width + columns).unique()) < len(columns):
            raise InputError(f"acts: an entry is stored twice, in images {start} to {stop - 1}; add duplicates up: acts.sum_duplicates()")
        return torch.sparse_csr_tensor(starts - starts[0], columns, values, (stop - start, self.width), check_invariants=False)


def _check_shape(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if len(shape) != 2:
        what = "latents" if name == "acts" else "width"
        raise InputError(f"{name} have the shape {tuple(shape)}; they must be (images, {what})")
    is_real = not dtype.is_complex if isinstance(dtype, torch.dtype) else dtype.kind in "biuf"
    if not is_real:
        raise InputError(f"{name} are of type {dtype}; they must be real numbers")


def _native(rows: Shaped[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
    """Convert rows to float32 or float64 in native byte order, because torch does not support every type of numpy."""
    return np.ascontiguousarray(rows, np.float32 if rows.dtype == np.float32 else np.float64)


def _real(values: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    values = values.detach().cpu()
    return values if values.dtype in (torch.float32, torch.float64) else values.double()


def _finite(acts: Float[Tensor, "images latents"], start: int) -> Float[Tensor, "images latents"]:
    """Check that a block of activations is finite, and return it. The block begins with image `start`."""
    values = acts.values() if acts.layout == torch.sparse_csr else acts
    if not values.numel() or all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):  # A single NaN makes both extremes NaN.
        return acts
    bad = (~acts.to_dense().isfinite()).nonzero()
    image, latent = bad[0].tolist()
    raise InputError(f"acts are not finite: image {start + image} latent {latent}, and {len(bad) - 1} more within {len(acts)} images")


def _directions(embeddings: Float[Tensor, "images width"], start: int) -> Float[Tensor, "images width"]:
    """Check that a block of embeddings is finite and not zero, and return it, rescaled if its values are extreme."""
    if not embeddings.shape[1]:
        raise InputError(f"embeddings have the shape {tuple(embeddings.shape)}; their width must be 1 or more")
    largest = torch.maximum(embeddings.amax(1, keepdim=True), -embeddings.amin(1, keepdim=True))
    bad = (~((largest > 0) & largest.isfinite())).nonzero()
    if len(bad):
        what = "all zeros" if largest[bad[0, 0]] == 0 else "not finite"
        raise InputError(
            f"embeddings are {what}: image {start + int(bad[0, 0])}, and {len(bad) - 1} more unusable ones within {len(embeddings)} "
            "images; leave these images out of acts and embeddings"
        )
    is_usual = bool((largest > TINY).all() and (largest < HUGE).all())
    return embeddings if is_usual else embeddings.double() / largest
