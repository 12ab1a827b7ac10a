"""Decoding: from the bytes of any image file to upright RGB, or to the reason why not."""

import io
import re
import threading
import warnings
from types import TracebackType
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Reason = Literal["empty", "truncated", "not_an_image", "too_large", "unreadable"]

MAX_BYTES = 2**28
"""Larger files are refused unread: a video among the images must not fill the memory."""

# Decoders that only look at the bytes they are given (EPS, for one, would start Ghostscript) and that know their
# format by a signature (TGA takes nearly any bytes for its own).
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+|....ftypavi[fs]|\0\0\x01\0|P[1-6f]\s|"
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP",
    re.DOTALL,
)
"""How files of these formats begin: with one of these, bytes that PIL cannot identify are a damaged image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the turn that makes the image upright."""


class Unreadable(Exception):
    """Bytes that give no whole image."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def decode(encoded: bytes) -> Image.Image:
    """The first frame as upright 8-bit RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Whole or not at all: a file that was cut off raises. May be called from several threads.

    Raises:
        Unreadable: with the reason and what the decoder said.
    """
    if not encoded:
        raise Unreadable("empty", "0 bytes")
    if len(encoded) > MAX_BYTES:
        raise Unreadable("too_large", f"more than {MAX_BYTES} bytes")
    with _pil_is_quiet:
        try:
            image = _open(encoded)
            turn = _turn(image)
            upright = _rgb(image)
            return upright if turn is None else upright.transpose(turn)
        except Unreadable:
            raise
        except Image.DecompressionBombError as error:
            raise Unreadable("too_large", _said(error)) from None
        except Exception as error:  # on damaged bytes decoders raise nearly every type there is
            raise Unreadable(_why(encoded, error), _said(error)) from None


class _Quiet:
    """Ignores what PIL warns of while at least one thread decodes.

    `catch_warnings` swaps the filters of the whole process, so threads that nest it freely restore each other's
    filters; here only the first to come and the last to go touch them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._n_inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._filters.__exit__(kind, error, trace)


_pil_is_quiet = _Quiet()


class _Reader(io.BytesIO):
    """Bytes that remember whether more was asked for than there is."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.ran_out |= size is not None and len(data) < size
        return data


def _open(encoded: bytes) -> Image.Image:
    """The decoded image, in the mode of the file."""
    reader = _Reader(encoded)
    try:
        image = Image.open(reader, formats=_FORMATS)
    except UnidentifiedImageError:
        raise _unidentified(encoded, reader.ran_out) from None
    limit = Image.MAX_IMAGE_PIXELS  # PIL itself warns from here, and raises from twice as many
    if limit is not None and image.width * image.height > limit:
        raise Unreadable("too_large", f"{image.width} x {image.height} pixels, more than {limit}")
    image.load()
    return image


def _unidentified(encoded: bytes, ran_out: bool) -> Unreadable:
    if not _SIGNATURE.match(encoded):
        return Unreadable("not_an_image", f"starts with {encoded[:16]!r}")
    if ran_out or _is_short_riff(encoded):
        return Unreadable("truncated", "the file ends inside its header")
    return Unreadable("unreadable", "the header is damaged")


def _is_short_riff(encoded: bytes) -> bool:
    """Whether a WebP file is shorter than it says; its decoder does not tell."""
    return encoded[:4] == b"RIFF" and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


def _why(encoded: bytes, error: Exception) -> Reason:
    return "truncated" if "truncated" in str(error).lower() or _is_short_riff(encoded) else "unreadable"


def _said(error: Exception) -> str:
    """The decoder's message, without addresses in memory, which differ from run to run."""
    return re.sub(r" ?<[^>]* at 0x[0-9a-fA-F]+>", "", str(error)) or type(error).__name__


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, of which PIL raises many types, says nothing against the pixels
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits a pixel as grey of 8, scaled: PIL's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    low, high = _range(values, image.mode)
    grey = ((values - low) * (255 / (high - low)) + 0.5).clip(0, 255).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _range(values: np.ndarray, mode: str) -> tuple[float, float]:
    """The values that become black and white: those of the type, or the smallest usual range that holds them all."""
    usual = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(mode, (65535.0,))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > usual[-1]:
        return low, high if high > low else low + 1
    return 0.0, next(top for top in usual if high <= top)
