"""Checksums of content: the sha256 of a whole file, and the CRC-32 of each of its blocks."""

import hashlib
import zlib
from typing import BinaryIO

BLOCK = 2**18
"""Bytes per block, so few that reading one column of a table checks little besides that column."""
DIGITS = 8
"""Hex digits per block checksum. A CRC-32 detects every change within 32 consecutive bits, and misses one in four billion other changes."""
READ_BLOCKS = 16
"""Number of blocks read at a time when a file is read only for its checksums."""


def checksums(file: BinaryIO) -> tuple[str, str]:
    """Read a file once, from its current position, which must be the beginning; return its sha256 and its block checksums."""
    digest, sums = hashlib.sha256(), []
    while found := file.read(READ_BLOCKS * BLOCK):
        digest.update(found)
        sums.append(sums_of(found))
    return digest.hexdigest(), "".join(sums)


def block_sums(file: BinaryIO) -> str:
    """Return the concatenated checksums of a file's blocks. The file's position must be its beginning."""
    return "".join(iter(lambda: sums_of(file.read(READ_BLOCKS * BLOCK)), ""))


def sums_of(data: bytes) -> str:
    """Return the concatenated checksums of the blocks in `data`, which begins with a whole block. The last block may be shorter."""
    view = memoryview(data)
    return "".join(f"{zlib.crc32(view[start : start + BLOCK]):0{DIGITS}x}" for start in range(0, len(view), BLOCK))
