"""Metrics of plain arrays, as other code has them: numpy, torch, and compressed rows of either or of scipy."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from ommatid.errors import InputError
from ommatid.metrics.fidelity import Fidelity
from ommatid.metrics.monosemanticity import Monosemanticity

VALUES = 2**22
"""Values, zeros included where they are stored, of the images that are looked at together: 32 MiB in float64."""
ENTRIES = 2**19
"""Entries of the images that are looked at together where they are compressed: few enough to be held with their zeros."""
IMAGES = 4096
"""Images that are looked at together, at most."""

TINY, HUGE = 1e-6, 1e100
"""Embeddings whose largest value is outside are scaled first: float64 could not hold their squares, or would take them for zeros."""


@overload
def monosemanticity(acts: Tensor, embeddings: Any) -> Tensor: ...
@overload
def monosemanticity(acts: Any, embeddings: Any) -> np.ndarray: ...
def monosemanticity(acts: Any, embeddings: Any) -> Tensor | np.ndarray:
    """MonoSemanticity score of each latent (Pach et al. 2025, arXiv 2504.02821, eq. 9), exact, in one pass over blocks of images.

    Args:
        acts: Image-level activations (images, latents) of any real type: a numpy array or torch tensor; or compressed rows: a torch
            tensor of layout sparse_csr, or what has `indptr`, `indices`, `data` and `shape` as scipy.sparse.csr_array has.
        embeddings: The judge's embeddings of the same images (images, width), of any length but zero.

    Returns:
        One float64 a latent, (latents,): a tensor where `acts` is one, else a numpy array. NaN where the score is undefined: the
        latent is constant, or fires (is not 0) on fewer than two images.

    Raises:
        InputError: shapes that do not fit, values that are not finite, an embedding of zeros, rows that are not compressed as said.

    >>> import numpy as np
    >>> from ommatid import monosemanticity
    >>> embeddings = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])  # two pairs of like images
    >>> acts = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # latent 0 fires on one pair, latent 1 on one of each
    >>> monosemanticity(acts, embeddings).round(2)
    array([0.99, 0.  ])
    """
    blocks, judge = _open(acts), _Dense(embeddings, "embeddings")
    if len(blocks) != len(judge):
        raise InputError(
            f"acts are of {len(blocks)} images and embeddings of {len(judge)}: give a row of each for every image, in one order"
        )
    scores = Monosemanticity(blocks.width, judge.width)
    for start, stop in blocks.spans():
        scores.add(_finite(blocks.read(start, stop), start), _directions(judge.read(start, stop), start))
    ms = scores.scores().ms
    return ms if isinstance(acts, Tensor) else ms.numpy()


def fvu(x: Any, x_hat: Any) -> float:
    """Fraction of variance unexplained: Σ‖x−x̂‖² / Σ‖x−x̄‖², x̄ the mean of x. 0 is perfect, 1 no better than the mean.

    Args:
        x: Activations (tokens, d_model) of any real type: a numpy array or torch tensor.
        x_hat: Their reconstructions, of the same shape.

    Returns:
        NaN where x does not vary.

    Raises:
        InputError: shapes that do not fit, or values that are not finite.

    >>> import numpy as np
    >>> from ommatid import fvu
    >>> x = np.array([[0.0, 0.0], [2.0, 0.0]])
    >>> fvu(x, x), fvu(x, [[1.0, 0.0], [1.0, 0.0]]), fvu(x, [[0.5, 0.0], [1.5, 0.0]])
    (0.0, 1.0, 0.25)
    """
    ours, theirs = _Dense(x, "x"), _Dense(x_hat, "x_hat")
    if (len(ours), ours.width) != (len(theirs), theirs.width):
        raise InputError(
            f"x has the shape {(len(ours), ours.width)} and x_hat {(len(theirs), theirs.width)}; they must be of the same tokens and width"
        )
    fidelity = Fidelity()
    for start, stop in ours.spans():
        one, other = (rows.read(start, stop).double() for rows in (ours, theirs))
        if not (one.isfinite().all() and other.isfinite().all()):
            raise InputError(f"x or x_hat is not finite, of tokens {start} to {stop - 1}")
        fidelity.add(one, other, 0)
    return fidelity.fvu


class _Rows(Protocol):
    """A matrix, read some rows at a time."""

    width: int
    """Columns."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row of each block, and the one after its last."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """These rows, dense or in CSR form, on the CPU."""
        ...


def _open(acts: Any) -> _Rows:
    if isinstance(acts, Tensor) and acts.layout == torch.sparse_csr:
        return _Compressed(acts.crow_indices(), acts.col_indices(), acts.values(), tuple(acts.shape))
    if isinstance(acts, Tensor) or not hasattr(acts, "indptr"):
        return _Dense(acts, "acts")
    if (form := getattr(acts, "format", "csr")) != "csr":
        raise InputError(f"acts are of format {form}; compressed rows are needed: acts.tocsr()")
    starts, columns, values = (torch.from_numpy(np.asarray(getattr(acts, name))) for name in ("indptr", "indices", "data"))
    return _Compressed(starts, columns, values, acts.shape)


class _Dense:
    """A numpy array or tensor."""

    def __init__(self, values: Any, name: str) -> None:
        if isinstance(values, Tensor) and values.layout != torch.strided:
            raise InputError(f"{name} are a tensor of layout {values.layout}; it must be dense" + _OR_CSR * (name == "acts"))
        self._values = values if isinstance(values, Tensor) else np.asarray(values)
        _check_shape(name, tuple(self._values.shape), self._values.dtype)
        self._n, self.width = self._values.shape

    def __len__(self) -> int:
        return self._n

    def spans(self) -> Iterator[tuple[int, int]]:
        n = min(IMAGES, max(1, VALUES // max(1, self.width)))
        return ((start, min(start + n, self._n)) for start in range(0, self._n, n))

    def read(self, start: int, stop: int) -> Tensor:
        rows = self._values[start:stop]
        return _real(rows) if isinstance(rows, Tensor) else torch.from_numpy(_native(rows))


_OR_CSR = ", or of layout sparse_csr: acts.to_sparse_csr()"


class _Compressed:
    """Compressed rows."""

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> None:
        _check_shape("acts", shape, values.dtype)
        self._n, self.width = shape
        self._starts, self._columns, self._values = starts.cpu().long(), columns, values
        fits = len(starts) == self._n + 1 and int(starts[0]) == 0 and int(starts[-1]) == len(columns) == len(values)
        if not fits or bool((self._starts.diff() < 0).any()):
            raise InputError(
                f"acts are no compressed rows: of {self._n} images, with {len(starts)} row pointers that must rise from 0 to the number "
                f"of entries, which is {len(columns)} indices and {len(values)} values"
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

    def read(self, start: int, stop: int) -> Tensor:
        starts = self._starts[start : stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        columns, values = self._columns[entries].cpu().long(), _real(self._values[entries])
        rows = torch.arange(stop - start).repeat_interleave(starts.diff())
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < self.width:
            raise InputError(f"acts: a column index is outside 0 to {self.width - 1}, of images {start} to {stop - 1}")
        in_order = (columns.diff() > 0) | (rows.diff() > 0)
        if not bool(in_order.all()) and len((rows * self.width + columns).unique()) < len(columns):
            raise InputError(f"acts: an entry is stored twice, of images {start} to {stop - 1}; add them up first: acts.sum_duplicates()")
        return torch.sparse_csr_tensor(starts - starts[0], columns, values, (stop - start, self.width), check_invariants=False)


def _check_shape(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if len(shape) != 2:
        what = "latents" if name == "acts" else "width"
        raise InputError(f"{name} have the shape {tuple(shape)}; they must be (images, {what})")
    is_real = not dtype.is_complex if isinstance(dtype, torch.dtype) else dtype.kind in "biuf"
    if not is_real:
        raise InputError(f"{name} are of type {dtype}; they must be real numbers")


def _native(rows: np.ndarray) -> np.ndarray:
    """As torch takes them: no other byte order, no unsigned or longer types."""
    return np.ascontiguousarray(rows, np.float32 if rows.dtype == np.float32 else np.float64)


def _real(values: Tensor) -> Tensor:
    values = values.detach().cpu()
    return values if values.dtype in (torch.float32, torch.float64) else values.double()


def _finite(acts: Tensor, start: int) -> Tensor:
    """The block that begins with this image, if all is finite."""
    values = acts.values() if acts.layout == torch.sparse_csr else acts
    if not values.numel() or all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):  # both are NaN where one value is
        return acts
    bad = (~acts.to_dense().isfinite()).nonzero()
    image, latent = bad[0].tolist()
    raise InputError(f"acts are not finite: image {start + image} latent {latent}, and {len(bad) - 1} more within {len(acts)} images")


def _directions(embeddings: Tensor, start: int) -> Tensor:
    """The embeddings of a block, if all have a direction."""
    if not embeddings.shape[1]:
        raise InputError(f"embeddings have the shape {tuple(embeddings.shape)}; their width must be 1 or more")
    largest = torch.maximum(embeddings.amax(1, keepdim=True), -embeddings.amin(1, keepdim=True))
    bad = (~((largest > 0) & largest.isfinite())).nonzero()
    if len(bad):
        what = "all zeros" if largest[bad[0, 0]] == 0 else "not finite"
        raise InputError(
            f"embeddings are {what}: image {start + int(bad[0, 0])}, and {len(bad) - 1} more that cannot be used within {len(embeddings)} "
            "images; leave these images out of acts and embeddings"
        )
    is_usual = bool((largest > TINY).all() and (largest < HUGE).all())
    return embeddings if is_usual else embeddings.double() / largest
