"""Decoding of any image file to upright 8-bit RGB, or to a reason why it cannot be decoded."""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError, features

from ommatid.errors import gist

Reason = Literal["empty", "truncated", "not_an_image", "too_large", "unreadable"]

MAX_BYTES = 2**28
"""Largest file that is read, so that a video among the images does not fill the memory."""

# Only decoders that run no other program (that of EPS would start Ghostscript) and recognise their format by a signature (that of TGA
# accepts nearly any bytes).
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+|....ftypavi[fs]|\0\0\x01\0|P[1-6f]\s|"
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP",
    re.DOTALL,
)
"""First bytes of files in these formats; if PIL cannot identify bytes that begin so, they are a damaged image."""

_OTHER_KINDS = {
    rb"....ftyp(hei[cfmsx]|hev|mif1|msf1)": "HEIC or HEIF",
    rb"....ftyp|\x1aE\xdf\xa3|\0\0\x01\xba|RIFF....AVI ": "a video",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"8BPS": "a Photoshop file",
    rb"%PDF": "a PDF",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript",
    rb".{128}DICM": "DICOM",
    rb"SIMPLE  =": "FITS",
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!": "an archive",
    rb"\x93NUMPY": "an array of NumPy",
    rb"PAR1": "Parquet (images.source.kind: parquet reads it)",
    rb".{257}ustar": "a tar archive (images.source.kind: webdataset reads it)",
    rb"\x89HDF": "HDF5",
    rb"version https://git-lfs": "a pointer of Git LFS to a file that was not fetched",
    rb"\s*<svg|\s*<\?xml": "SVG or XML",
    rb"\s*<!doctype|\s*<!DOCTYPE|\s*<html": "a web page",
}
"""Names of other kinds of files that are found among images, by their first bytes."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes an image upright, by EXIF orientation."""
_SIDEWAYS = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
"""Transpositions that exchange width and height."""


class Unreadable(Exception):
    """The bytes cannot be decoded to a whole image."""

    def __init__(self, reason: Reason, detail: str, is_lasting: bool = True):
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail
        self.is_lasting = is_lasting
        """Whether the same bytes fail at every attempt, as they do unless memory ran out."""


def versions() -> list[str]:
    """Return the versions of Pillow and of the libraries that decode for it, which may come from the system."""
    codecs = ("libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif", "zlib")
    return [PIL.__version__, *(f"{name} {features.version(name)}" for name in codecs)]


def decode(encoded: bytes) -> Image.Image:
    """Decode the first frame to upright 8-bit RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    May be called from several threads.

    Raises:
        Unreadable: The bytes are not a whole image; holds the reason and the decoder's message.
    """
    with _explaining(encoded):
        image = _open(encoded)
        image.load()
        return upright(image)


def decode_thumbnail(encoded: bytes, longest: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image to a thumbnail, as `decode` does, and accept exactly the bytes that `decode` accepts.

    JPEG keeps blocks of 8 x 8 pixels as frequencies. All of its data are read, but high frequencies are not computed if the thumbnail is
    smaller than half the image, which takes less than half the time.

    Args:
        encoded: Bytes of an image file.
        longest: Longest side of the thumbnail in pixels; smaller images are not enlarged.

    Returns:
        The thumbnail, upright 8-bit RGB, and the width and height of the whole upright image.

    Raises:
        Unreadable: The bytes are not a whole image.
    """
    with _explaining(encoded):
        image = _open(encoded)
        if image.format not in ("JPEG", "MPO"):
            image.load()
            image = upright(image)
            size = image.size
            image.thumbnail((longest, longest))
            return image, size
        size = (image.height, image.width) if _turn(image) in _SIDEWAYS else image.size
        image.thumbnail((longest, longest))  # before it is loaded, so that Pillow can leave out the frequencies
        image.load()
        return upright(image), size


@contextmanager
def _explaining(encoded: bytes) -> Iterator[None]:
    """Raise `Unreadable` with the reason if the bytes cannot be decoded in the block."""
    if not encoded:
        raise Unreadable("empty", "0 bytes")
    if len(encoded) > MAX_BYTES:
        raise Unreadable("too_large", f"more than {MAX_BYTES} bytes")
    with _pil_is_quiet:
        try:
            yield
        except Unreadable:
            raise
        except Image.DecompressionBombError as error:
            raise Unreadable("too_large", gist(error)) from None
        except Exception as error:  # damaged bytes make decoders raise exceptions of nearly every type
            raise Unreadable(_reason_of(encoded, error), gist(error), is_lasting=not isinstance(error, MemoryError)) from None


def upright(image: Image.Image) -> Image.Image:
    """Convert an image opened by Pillow to upright 8-bit RGB, as `decode` does."""
    turn = _turn(image)
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


class _Quiet:
    """Context manager that silences PIL's warnings while at least one thread decodes.

    `catch_warnings` replaces the filters of the whole process, so threads that overlap in it would restore one another's filters. Here only
    the first thread to enter and the last to leave touch them.
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
    """Bytes that record whether a read went beyond their end."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.ran_out |= size is not None and len(data) < size
        return data


def _open(encoded: bytes) -> Image.Image:
    """Open an image in the mode of its file; its pixels are decoded when they are loaded."""
    reader = _Reader(encoded)
    try:
        image = Image.open(reader, formats=FORMATS)
    except UnidentifiedImageError:
        raise _unidentified(encoded, reader.ran_out) from None
    limit = Image.MAX_IMAGE_PIXELS  # PIL itself only warns at this limit, and raises at twice as many pixels
    if limit is not None and image.width * image.height > limit:
        raise Unreadable("too_large", f"{image.width} x {image.height} pixels, more than {limit}")
    if _tag(image, _PLANAR) == 2 and _tag(image, _COMPRESSION) == 1 and int(_tag(image, _BITS) or 1) > 8:
        raise Unreadable(
            "unreadable", "a TIFF with more than 8 bits and a plane for each channel, which Pillow misreads; save it interleaved"
        )
    return image


def _unidentified(encoded: bytes, ran_out: bool) -> Unreadable:
    """Explain why PIL cannot identify the bytes, without quoting any: a link among the images may lead to a private file."""
    if not _SIGNATURE.match(encoded):
        known = next((what for signature, what in _OTHER_KINDS.items() if re.match(signature, encoded, re.DOTALL)), None)
        return Unreadable("not_an_image", f"{known}, which is not decoded" if known else "does not begin like any image file")
    if ran_out or _is_short_riff(encoded):
        return Unreadable("truncated", "the file ends inside its header")
    return Unreadable("unreadable", "the header is damaged, or of a variant that Pillow does not decode")


def _is_short_riff(encoded: bytes) -> bool:
    """Whether a WebP file is shorter than its header says, which its decoder does not report."""
    return encoded[:4] == b"RIFF" and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


def _reason_of(encoded: bytes, error: Exception) -> Reason:
    return "truncated" if "truncated" in str(error).lower() or _is_short_riff(encoded) else "unreadable"


def has_several_frames(encoded: bytes) -> bool:
    """Whether an image that can be decoded has more than one page or frame."""
    if not _MAY_HAVE_SEVERAL.match(encoded):
        return False
    with _pil_is_quiet:
        try:
            return bool(getattr(Image.open(io.BytesIO(encoded), formats=FORMATS), "is_animated", False))
        except Exception:  # damage after the first frame
            return False


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF makes PIL raise many types, and the pixels may still be sound
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F" or _sample_format(image) == _SIGNED:
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits, or of signed values, to 8 bits; PIL's own conversion would clip at 255."""
    values = _values_of(image)
    is_missing = _find_missing(image, values)
    finite = values if is_missing is None else values[~is_missing]
    smallest, largest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    low, high = _range(image, smallest, largest)
    wide = np.float64 if high - low > _WIDE else np.float32
    scaled = np.nan_to_num(values.astype(wide)).clip(low, high)
    scaled -= low
    scaled *= 255 / (high - low)
    scaled += 0.5
    grey = scaled.astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _find_missing(image: Image.Image, values: np.ndarray) -> np.ndarray | None:
    """Find pixels without a value: those that are not finite, the largest float of either sign, or the marker in GDAL's nodata tag.

    Returns:
        Whether each pixel has no value, in the shape of `values`; None if all have one.
    """
    mask = ~(np.abs(values) < np.finfo(np.float32).max) if values.dtype.kind == "f" else None
    try:
        marker = float(getattr(image, "tag_v2", {}).get(_GDAL_NODATA, "").strip("\0 "))
    except (ValueError, AttributeError):
        return mask
    return (values == marker) | (False if mask is None else mask)


def _values_of(image: Image.Image) -> np.ndarray:
    """Return the pixels in the type that the file declares, as PIL has no mode for some types."""
    values = np.asarray(image)
    if image.mode == "L":
        return values.view(np.int8)
    return values.view(np.uint32) if image.mode == "I" and _sample_format(image) == _UNSIGNED else values


def _range(image: Image.Image, smallest: float, largest: float) -> tuple[float, float]:
    """Return the values that become black and white, from the most certain source that is available.

    In this order: the range that the file declares; the full range of types that are used in full; the smallest usual range that contains
    all values, with a margin for overshooting filters if they are floats; the smallest and largest values.

    Args:
        image: The image.
        smallest: Smallest of its values.
        largest: Largest of its values.

    Returns:
        The values of black and white.
    """
    n_bits = int(_tag(image, _BITS) or 16)
    if (top := _tag(image, _S_MAX)) is not None:
        bottom = _tag(image, _S_MIN) or 0.0
        if bottom < top and _holds(bottom, top, smallest, largest, _OVERSHOOT):
            return bottom, top
    if image.mode == "L":
        return -128.0, 127.0
    if image.mode.startswith("I;16"):
        return 0.0, 2.0**n_bits - 1
    if image.format == "PPM" and image.mode == "I":  # PIL scales these to 16 bits
        return 0.0, 65535.0
    if image.mode == "I" and n_bits == 16 and smallest >= 0:
        return 0.0, 32767.0
    room = _OVERSHOOT if image.mode == "F" else 0.0
    if smallest >= -room * largest:
        for top in (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0):
            if _holds(0.0, top, smallest, largest, room):
                return 0.0, top
    elif image.mode == "F" and _holds(-1.0, 1.0, smallest, largest, room):
        return -1.0, 1.0
    return smallest, largest if largest > smallest else smallest + 1


def _holds(low: float, high: float, smallest: float, largest: float, room: float) -> bool:
    beyond = room * (high - low)
    return smallest >= low - beyond and largest <= high + beyond


_OVERSHOOT = 0.25
"""Share of a range by which floats may lie outside it and are clipped, since sharpening and bicubic filters overshoot."""
_WIDE = 1e30
"""Width from which a range is scaled in float64, because it might overflow float32."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _S_MIN, _S_MAX = 258, 259, 262, 284, 339, 340, 341
"""Numbers of TIFF tags."""
_GDAL_NODATA = 42113
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2
_MAY_HAVE_SEVERAL = re.compile(rb"GIF8|RIFF|II|MM|....ftyp|\x89PNG.{0,4096}acTL", re.DOTALL)


def _tag(image: Image.Image, number: int) -> float | None:
    """Return a numeric tag of a TIFF file, the first if it has several numbers; None if the file does not have it."""
    value = getattr(image, "tag_v2", {}).get(number)
    value = value[0] if isinstance(value, tuple) and value else value
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _sample_format(image: Image.Image) -> float | None:
    """Return the sample format of a TIFF with one channel."""
    return _tag(image, _SAMPLE_FORMAT) if image.mode in ("L", "I", "F") else None
