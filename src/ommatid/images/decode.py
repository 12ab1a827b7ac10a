"""Decoding: from the bytes of any image file to upright RGB, or to the reason why not."""

import io
import re
import threading
import warnings
from types import TracebackType
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ommatid.errors import gist

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

_OTHERS = {
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
    rb".{257}ustar": "an archive",
    rb"\x89HDF": "HDF5",
    rb"version https://git-lfs": "a pointer of Git LFS to a file that was not fetched",
    rb"\s*<svg|\s*<\?xml": "SVG or XML",
    rb"\s*<!doctype|\s*<!DOCTYPE|\s*<html": "a web page",
}
"""How other files begin that are met among images, and what they are."""

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
            return upright(_open(encoded))
        except Unreadable:
            raise
        except Image.DecompressionBombError as error:
            raise Unreadable("too_large", gist(error)) from None
        except Exception as error:  # on damaged bytes decoders raise nearly every type there is
            raise Unreadable(_why(encoded, error), gist(error)) from None


def upright(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened, as `decode` gives it: upright 8-bit RGB."""
    turn = _turn(image)
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


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
    if _tag(image, _PLANAR) == 2 and _tag(image, _COMPRESSION) == 1 and int(_tag(image, _BITS) or 1) > 8:
        raise Unreadable(
            "unreadable", "a TIFF with a plane of more than 8 bits for each channel, which Pillow misreads; save it interleaved"
        )
    image.load()
    return image


def _unidentified(encoded: bytes, ran_out: bool) -> Unreadable:
    """Never with anything of the file's content: a link among the images may lead to a file that is nobody's business."""
    if not _SIGNATURE.match(encoded):
        known = next((what for signature, what in _OTHERS.items() if re.match(signature, encoded, re.DOTALL)), None)
        return Unreadable("not_an_image", f"{known}, which is not decoded" if known else "does not begin like any image file")
    if ran_out or _is_short_riff(encoded):
        return Unreadable("truncated", "the file ends inside its header")
    return Unreadable("unreadable", "the header is damaged, or of a variant that Pillow does not decode")


def _is_short_riff(encoded: bytes) -> bool:
    """Whether a WebP file is shorter than it says; its decoder does not tell."""
    return encoded[:4] == b"RIFF" and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


def _why(encoded: bytes, error: Exception) -> Reason:
    return "truncated" if "truncated" in str(error).lower() or _is_short_riff(encoded) else "unreadable"


def has_several_frames(encoded: bytes) -> bool:
    """Whether an image that can be decoded has more pages or frames than the first."""
    if not _MAY_HAVE_SEVERAL.match(encoded):
        return False
    with _pil_is_quiet:
        try:
            return bool(getattr(Image.open(io.BytesIO(encoded), formats=_FORMATS), "is_animated", False))
        except Exception:  # damage behind the first frame
            return False


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, of which PIL raises many types, says nothing against the pixels
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F" or _sample_format(image) == _SIGNED:
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits a pixel, or of signed ones, as grey of 8, scaled: PIL's own conversion clips at 255."""
    values = _numbers(image)
    none = _nothing(image, values)
    finite = values if none is None else values[~none]
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


def _nothing(image: Image.Image, values: np.ndarray) -> np.ndarray | None:
    """Where there is no value: not finite, the largest float of either sign, or what GDAL's tag says stands for none; None: nowhere."""
    mask = ~(np.abs(values) < np.finfo(np.float32).max) if values.dtype.kind == "f" else None
    try:
        marker = float(getattr(image, "tag_v2", {}).get(_GDAL_NODATA, "").strip("\0 "))
    except (ValueError, AttributeError):
        return mask
    return (values == marker) | (False if mask is None else mask)


def _numbers(image: Image.Image) -> np.ndarray:
    """The pixels in the type that the file says: PIL has none for some."""
    values = np.asarray(image)
    if image.mode == "L":
        return values.view(np.int8)
    return values.view(np.uint32) if image.mode == "I" and _sample_format(image) == _UNSIGNED else values


def _range(image: Image.Image, smallest: float, largest: float) -> tuple[float, float]:
    """The values that become black and white, from the most to the least certain source.

    What the file declares; the range of a type whose range is used as a whole; the smallest usual range that holds all values, those of
    floats with room for what filters overshoot by; from the smallest value to the largest.
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
    if image.format == "PPM" and image.mode == "I":  # which PIL scales to 16 bits
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
"""Share of a range by which values of floats may lie outside, and are clipped: sharpening and bicubic filters leave some."""
_WIDE = 1e30
"""Ranges too wide for float32."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _S_MIN, _S_MAX = 258, 259, 262, 284, 339, 340, 341
"""Tags of TIFF."""
_GDAL_NODATA = 42113
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2
_MAY_HAVE_SEVERAL = re.compile(rb"GIF8|RIFF|II|MM|....ftyp|\x89PNG.{0,4096}acTL", re.DOTALL)


def _tag(image: Image.Image, number: int) -> float | None:
    """A tag of a TIFF file, of several numbers the first; None: the file has none."""
    value = getattr(image, "tag_v2", {}).get(number)
    value = value[0] if isinstance(value, tuple) and value else value
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _sample_format(image: Image.Image) -> float | None:
    """Of a TIFF with one channel."""
    return _tag(image, _SAMPLE_FORMAT) if image.mode in ("L", "I", "F") else None
