"""Proves that a memory-mapped column equals what Parquet reads, and that other layouts are not mapped."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid.activations.mmap import ONE_PAGE, map_column

WIDTH = 24
N = 50_000
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False, "row_group_size": 30_000} | ONE_PAGE


def write(path: Path, nullable: bool = False, **options: Any) -> np.ndarray:
    rows = np.random.default_rng(0).integers(0, 256, (N, WIDTH), dtype=np.uint8)
    values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDTH), N, [None, pa.py_buffer(rows)])
    schema = pa.schema([pa.field("image", pa.int32(), nullable=False), pa.field("x", pa.binary(WIDTH), nullable=nullable)])
    pq.write_table(pa.table([pa.array(np.arange(N), pa.int32()), values], schema=schema), path, **(PLAIN | options))
    return rows


def test_mapped_rows_equal_those_of_the_file(tmp_path: Path) -> None:
    rows = write(tmp_path / "x.parquet")
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        groups = [map_column(tmp_path / "x.parquet", file, i, 1, WIDTH) for i in range(file.num_row_groups)]
    assert [len(group) for group in groups if group is not None] == [30_000, 20_000]
    found = np.concatenate([group.view(np.uint8).reshape(-1, WIDTH) for group in groups if group is not None])
    assert np.array_equal(found, rows)
    assert groups[0] is not None and not groups[0].flags.writeable


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"max_rows_per_page": 1000},
        {"data_page_size": 2**16},
        {"nullable": True},
        {"use_dictionary": False, "use_byte_stream_split": ["x"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_files_of_another_layout_are_not_mapped(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "x.parquet", **options)
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        assert map_column(tmp_path / "x.parquet", file, 0, 1, WIDTH) is None
