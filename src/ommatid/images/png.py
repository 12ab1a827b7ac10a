"""PNG without compression: bytes that do not depend on the version of any compressor."""

import struct
import zlib


def encode_png(pixels: bytes, width: int, height: int) -> bytes:
    """PNG of RGB pixels, row after row, 3 bytes each.

    Stored without compression, the bytes, and with them the image's id and split, are the same on every machine.
    """
    stride = 3 * width
    assert len(pixels) == stride * height, f"{len(pixels)} bytes are not {width} x {height} RGB pixels"
    lines = b"".join(b"\0" + pixels[start : start + stride] for start in range(0, len(pixels), stride))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
