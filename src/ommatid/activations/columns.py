"""Conversion between fixed-width binary columns and tensors."""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor


def from_float16(column: pa.ChunkedArray) -> Float16[Tensor, "rows width"]:
    """Return a column of little-endian float16 vectors as a float16 tensor, `(rows, width)`."""
    return torch.from_numpy(_view(column, np.dtype("<f2")))


def from_float32(column: pa.ChunkedArray) -> Float32[Tensor, "rows width"]:
    """Return a column of little-endian float32 vectors as a float32 tensor, `(rows, width)`."""
    return torch.from_numpy(_view(column, np.dtype("<f4")))


def to_binary(x_nd: Float[Tensor, "rows width"], dtype: torch.dtype) -> pa.Array:
    """Return the rows of a tensor as fixed-width binary values, which are little-endian float16 or float32 vectors."""
    rows = x_nd.to(dtype).contiguous().cpu().numpy()
    values = rows.astype(rows.dtype.newbyteorder("<"), copy=False)
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(values)])


def _view(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    width = array.type.byte_width // dtype.itemsize
    data = array.buffers()[1]
    flat = np.frombuffer(data, dtype, count=len(array) * width, offset=array.offset * array.type.byte_width)
    # Copied because torch warns about read-only memory, and so that the table can be freed.
    return flat.reshape(len(array), width).astype(dtype.newbyteorder("="), copy=True)
