"""Checksums of content: the sha256 of a whole file, and the CRC-32 of each of its blocks."""

import hashlib
import zlib
from typing import BinaryIO

BLOCK = 2**18
"""Bytes of a block: few enough that reading one column of a table checks little else."""
DIGITS = 8
"""Hex digits of a block's checksum. A CRC-32 finds every change within 32 bits, and misses one in four billion of the others."""
READ_BLOCKS = 16
"""Blocks that are read at a time where only their checksums are of interest."""


def checksums(file: BinaryIO) -> tuple[str, str]:
    """The sha256 of a file that is open at its beginning, and what `block_sums` gives."""
    digest, sums = hashlib.sha256(), []
    while found := file.read(READ_BLOCKS * BLOCK):
        digest.update(found)
        sums.append(sums_of(found))
    return digest.hexdigest(), "".join(sums)


def block_sums(file: BinaryIO) -> str:
    """The checksums of a file's blocks, one after the other, of a file that is open at its beginning."""
    return "".join(iter(lambda: sums_of(file.read(READ_BLOCKS * BLOCK)), ""))


def sums_of(data: bytes) -> str:
    """The checksums of some whole blocks, of which the last may be shorter."""
    view = memoryview(data)
    return "".join(f"{zlib.crc32(view[start : start + BLOCK]):0{DIGITS}x}" for start in range(0, len(view), BLOCK))
