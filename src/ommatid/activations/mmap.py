"""Fixed-width columns of a Parquet file as they lie on the disk: mapped, not copied.

The values of an uncompressed, plain column that is never null lie one after the other in its page. Where a row group has one page,
they are the end of the column chunk: Parquet's own metadata tells where it ends, and rows times width how long they are.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ONE_PAGE: dict[str, Any] = {"data_page_size": 2**30, "max_rows_per_page": 2**31 - 1}
"""What a ParquetWriter must be told for row groups (below 1 GiB) to be one page."""
_MOST_HEADER = 64
"""A page's header is shorter, so a chunk with so little beside its values has but one."""


def map_column(path: Path, file: pq.ParquetFile, row_group: int, column: int, width: int) -> np.ndarray | None:
    """The values of one column of a row group, (rows,) of `width` bytes each, read-only; None: they do not lie in one piece.

    The pages are asked for from the disk now, so a thread that runs ahead reads for the one that follows.
    """
    group = file.metadata.row_group(row_group)
    chunk = group.column(column)
    n_bytes = group.num_rows * width
    header = chunk.total_compressed_size - n_bytes
    is_plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE"} and not chunk.has_dictionary_page
    if not is_plain or file.schema.column(column).max_definition_level or not n_bytes or not 0 < header <= _MOST_HEADER:
        return None
    start = chunk.data_page_offset + header
    before = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as opened:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(opened.fileno(), before + n_bytes, flags=flags, prot=mmap.PROT_READ, offset=start - before)
    return np.frombuffer(mapped, np.dtype(f"V{width}"), count=group.num_rows, offset=before)
