"""Checksums of content: the sha256 of a whole file, and the CRC-32 of each of its blocks."""

import hashlib
import zlib
from typing import BinaryIO

BLOCK = 2**18
"""Bytes per block: small enough that reading one column of a table checks little beside that column."""
DIGITS = 8
"""Hex digits per block checksum. A CRC-32 detects every change confined to 32 bits, and misses one in four billion larger changes."""
READ_BLOCKS = 16
"""Blocks read at a time when a file is read only for its checksums."""


def checksums(file: BinaryIO) -> tuple[str, str]:
    """Return a file's sha256 and its block checksums, reading it once; the file must be open at its beginning."""
    digest, sums = hashlib.sha256(), []
    while found := file.read(READ_BLOCKS * BLOCK):
        digest.update(found)
        sums.append(sums_of(found))
    return digest.hexdigest(), "".join(sums)


def block_sums(file: BinaryIO) -> str:
    """Return the concatenated checksums of a file's blocks; the file must be open at its beginning."""
    return "".join(iter(lambda: sums_of(file.read(READ_BLOCKS * BLOCK)), ""))


def sums_of(data: bytes) -> str:
    """Return the concatenated checksums of the blocks in `data`, which begins at the start of a block; the last one may be shorter."""
    view = memoryview(data)
    return "".join(f"{zlib.crc32(view[start : start + BLOCK]):0{DIGITS}x}" for start in range(0, len(view), BLOCK))
