"""Memory maps of fixed-width columns of a Parquet file.

In an uncompressed column with plain encoding and no nulls, the values of a page are contiguous. If the column chunk of a row group is a
single page, its values are the last bytes of the chunk, whose position is in the Parquet metadata: as many bytes as rows times the width.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ONE_PAGE: dict[str, Any] = {"data_page_size": 2**30, "max_rows_per_page": 2**31 - 1}
"""Options with which a ParquetWriter writes each row group (below 1 GiB) as one page."""
_MAX_HEADER = 64
"""Upper bound on the size of a page header, in bytes. A column chunk with at most this many bytes besides its values has only one page."""


def map_column(path: Path, file: pq.ParquetFile, row_group: int, column: int, width: int) -> np.ndarray | None:
    """Map the values of one column of a row group.

    The file is read when it is mapped, so that a prefetching thread does the reading for its consumer.

    Args:
        path: Path of the file.
        file: The opened file.
        row_group: Index of the row group.
        column: Index of the column.
        width: Bytes per value.

    Returns:
        The values, `(rows,)`, read-only; None if they are not contiguous in the file.
    """
    group = file.metadata.row_group(row_group)
    chunk = group.column(column)
    n_bytes = group.num_rows * width
    header = chunk.total_compressed_size - n_bytes
    is_plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE"} and not chunk.has_dictionary_page
    if not is_plain or file.schema.column(column).max_definition_level or not n_bytes or not 0 < header <= _MAX_HEADER:
        return None
    start = chunk.data_page_offset + header
    before = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as opened:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(opened.fileno(), before + n_bytes, flags=flags, prot=mmap.PROT_READ, offset=start - before)
    return np.frombuffer(mapped, np.dtype(f"V{width}"), count=group.num_rows, offset=before)
