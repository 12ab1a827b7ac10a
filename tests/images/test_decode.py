"""Every kind of image becomes upright 8-bit RGB, damaged files are refused with the reason, and PIL's warnings are not shown.

Oracles: the picture before it was encoded, turned by numpy as the EXIF standard describes, or blended by hand.
"""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from ommatid.images.decode import MAX_BYTES, Unreadable, decode, decode_thumbnail

STORED = {  # how a camera stores an upright picture under each EXIF orientation
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {},
    "GIF": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "JPEG2000": {},
    "PPM": {},
    "AVIF": {},
    "ICO": {},
}


def rgb(encoded: bytes) -> np.ndarray:
    image = decode(encoded)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(encoded: bytes) -> str:
    with pytest.raises(Unreadable) as caught:
        decode(encoded)
    assert caught.value.detail and " at 0x" not in caught.value.detail
    return caught.value.reason


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 10)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, data, b"IEND")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_every_exif_orientation_is_turned_upright(orientation, kind, pixels, encode):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {
        "PNG": {},
        "WEBP": {"lossless": True},
        "TIFF": {},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }[kind]
    stored = np.ascontiguousarray(STORED[orientation](pixels()))
    found = rgb(encode(stored, kind, exif=exif, **options)).astype(int)
    assert found.shape == pixels().shape
    assert abs(found - pixels()).max() <= (3 if kind in ("JPEG", "AVIF") else 0)


def test_an_image_with_damaged_exif_is_kept(pixels, encode):
    encoded = encode(pixels(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xfe" * 40)
    assert rgb(encoded).shape == pixels().shape


def test_grey_and_bilevel_images_become_rgb(pixels, encode):
    grey = pixels()[..., 0]
    assert (rgb(encode(grey)) == grey[..., None]).all()
    bits = grey > 127
    assert (rgb(encode(Image.fromarray(bits))) == bits[..., None] * 255).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_blended_onto_white(kind, pixels, encode):
    colour, alpha = pixels().astype(float), pixels(1)[..., :1].astype(float)
    alpha[:8] = 0
    layer = np.concatenate([colour, alpha], axis=2).astype(np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = rgb(encode(layer, kind, **options)).astype(float)
    assert abs(found - (colour * alpha + 255 * (255 - alpha)) / 255).max() <= 1
    assert (found[:8] == 255).all()


def test_grey_with_alpha_is_blended_onto_white(pixels, encode):
    layer = pixels()[..., :2].astype(float)
    channels = [Image.fromarray(layer[..., i].astype(np.uint8)) for i in (0, 1)]
    found = rgb(encode(Image.merge("LA", channels)))
    grey, alpha = layer[..., :1], layer[..., 1:]
    assert abs(found - (grey * alpha + 255 * (255 - alpha)) / 255).max() <= 1


def palette_image() -> Image.Image:
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("L")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120], "RGB")
    assert image.mode == "P"
    return image


@pytest.mark.parametrize(
    ("options", "clear"),
    [({}, []), ({"transparency": 2}, [2]), ({"transparency": b"\x00\xff\x00\xff"}, [0, 2])],
    ids=["opaque", "one", "several"],
)
def test_a_palette_with_transparency_is_blended_onto_white(options, clear, encode):
    expected = np.arange(10, 130, 10).reshape(4, 3)
    expected[clear] = 255
    assert (rgb(encode(palette_image(), **options)).reshape(4, 3) == expected).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_single_transparent_colour_becomes_white(mode, pixels, encode):
    image = Image.fromarray(pixels()).convert(mode)
    expected = np.asarray(image.convert("RGB")).copy()
    corner = image.getpixel((0, 0))
    expected[(expected == expected[0, 0]).all(axis=2)] = 255
    assert (rgb(encode(image, transparency=corner)) == expected).all()


def test_cmyk_becomes_rgb(encode):
    inks = np.zeros((8, 8, 4), dtype=np.uint8)
    inks[:4, :, 0] = 255  # cyan above, paper below
    image = Image.frombytes("CMYK", (8, 8), inks.tobytes())
    for encoded in (encode(image, "TIFF"), encode(image, "JPEG", quality=100)):
        found = rgb(encoded).astype(int)
        assert abs(found[:4] - [0, 255, 255]).max() <= 3
        assert abs(found[4:] - 255).max() <= 3


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")], ids=["png", "tiff", "tiff-big-endian", "pgm"]
)
def test_sixteen_bits_are_scaled_and_not_clipped(kind, dtype, encode):
    values = np.linspace(0, 65535, 256 * 4).round().astype(dtype).reshape(32, 32)
    found = rgb(encode(values, kind))
    assert (found == (values / 257 + 0.5).astype(np.uint8)[..., None]).all()
    assert len(np.unique(found)) == 256


def test_a_transparent_grey_of_sixteen_bits_becomes_white(encode):
    values = np.array([[0, 30000], [30001, 65535]], dtype=np.uint16)
    assert rgb(encode(values, transparency=30000))[..., 0].tolist() == [[0, 255], [117, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 100, 255], np.int32), [0, 100, 255]),
        (np.array([0, 25700, 65535], np.int32), [0, 100, 255]),
        (np.array([-1000, 0, 1000], np.int32), [0, 128, 255]),
        (np.array([7, 7, 7], np.int32), [7, 7, 7]),
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 100, 255], np.float32), [0, 100, 255]),
        (np.array([-1, np.nan, 1], np.float32), [0, 128, 255]),
        (np.array([-2, -2, -2], np.float32), [0, 0, 0]),
        (np.array([1e5, 1e5, 1e5], np.float32), [0, 0, 0]),
    ],
)
def test_wide_pixels_are_scaled_by_the_smallest_usual_range_that_holds_them(values, expected, encode):
    assert rgb(encode(values[None], "TIFF"))[0, :, 0].tolist() == expected


def tiff(values: np.ndarray, order: Literal["<", ">"] = "<", **tags: Any) -> bytes:
    """Write a plain TIFF of one channel tag by tag, because PIL reads more variants than it writes."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits, kind = 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    nodata = tags.pop("nodata", None)
    known = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data), 339: kind}
    names = {"width": 256, "bits": 258, "photometric": 262, "samples": 277, "planes": 284, "s_min": 340, "s_max": 341}
    known |= {names[name]: value for name, value in tags.items()}
    entries = [
        struct.pack(f"{order}HHI{'f' if isinstance(value, float) else 'I'}", number, 11 if isinstance(value, float) else 4, 1, value)
        for number, value in sorted(known.items())
    ]
    entries += [struct.pack(f"{order}HHI4s", 42113, 2, 4, nodata)] if nodata else []
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("values", "tags", "expected"),
    [
        (np.array([0, 0.5, 1.0001], np.float32), {}, [0, 128, 255]),
        (np.array([-0.04, 0.5, 1.2], np.float32), {}, [0, 128, 255]),  # a bicubic filter overshoots
        (np.array([-3, 100, 250], np.float32), {}, [0, 100, 250]),
        (np.array([-1.0001, 0, 1], np.float32), {}, [0, 128, 255]),
        (np.array([0, 1, np.inf, -np.inf, np.nan], np.float32), {}, [0, 255, 255, 0, 0]),
        (np.array([np.nan, np.nan], np.float32), {}, [0, 0]),
        (np.array([-3e38, 0, 3e38], np.float32), {}, [0, 128, 255]),
        (np.array([np.finfo(np.float32).min, 0.5, 1], np.float32), {}, [0, 128, 255]),  # no value, as programs of maps write it
        (np.array([-999, 0.5, 1], np.float32), {"nodata": b"-999"}, [0, 128, 255]),
        (np.array([-999, 100, 16384], np.int16), {"nodata": b"-999"}, [0, 1, 128]),
        (np.array([0, 2, 4], np.float32), {"s_min": 0.0, "s_max": 4.0}, [0, 128, 255]),
        (np.array([0, 0.5, 1], np.float32), {"s_max": float("nan")}, [0, 128, 255]),
        (np.array([0, 0.5, 1], np.float32), {"photometric": 0}, [255, 127, 0]),
        (np.array([0, 30000, 65535], np.uint16), {"photometric": 0}, [255, 138, 0]),
        (np.array([0, 100, 255], np.uint8), {"photometric": 0}, [255, 155, 0]),
        (np.array([0, 2048, 4095], np.uint16), {"s_min": 0, "s_max": 4095}, [0, 128, 255]),
        (np.array([0, 2048, 65535], np.uint16), {"s_min": 0, "s_max": 4095}, [0, 8, 255]),  # a tag that is wrong
        (np.array([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00], np.uint8), {"bits": 12, "width": 4}, [0, 128, 255, 0]),
        (np.array([0, 2**31, 2**32 - 1], np.uint32), {}, [0, 128, 255]),
        (np.array([0, 100, 255], np.uint32), {}, [0, 100, 255]),
        (np.array([-128, 0, 127], np.int8), {}, [0, 128, 255]),
        (np.array([0, 100, 127], np.int8), {}, [128, 228, 255]),
        (np.array([0, 200, 16384], np.int16), {}, [0, 2, 128]),
        (np.array([0, 100, 200], np.int16), {}, [0, 1, 2]),  # as its siblings with larger values
        (np.array([-1000, 0, 1000], np.int16), {}, [0, 128, 255]),
    ],
    ids=str,
)
def test_tiff_tags_determine_the_range_of_values(values, tags, expected):
    with warnings.catch_warnings(action="error"):
        assert rgb(tiff(values[None], **tags))[0, :, 0].tolist() == expected


def test_planes_of_16_bits_which_pillow_would_mix_are_refused():
    values = np.linspace(0, 65535, 24).astype(np.uint16)[None]
    tags: dict[str, Any] = {"width": 8, "photometric": 2, "samples": 3}
    assert rgb(tiff(values, **tags, planes=1)).ravel().tolist() == [round(v // 256) for v in values[0].tolist()]
    with pytest.raises(Unreadable, match="more than 8 bits and a plane for each channel, which Pillow misreads"):
        decode(tiff(values, **tags, planes=2))


@pytest.mark.parametrize("top", [200, 65535])
def test_a_dark_picture_of_16_bits_stays_dark(top):
    assert rgb(b"P5 2 1 65535\n" + np.array([0, top], ">u2").tobytes())[0, 1, 0] == round(top / 257)


def test_an_unsupported_variant_is_not_reported_as_damage():
    with pytest.raises(Unreadable, match="or of a variant that Pillow does not decode"):
        decode(tiff(np.zeros((2, 2), np.float64)))


@pytest.mark.parametrize(
    ("encoded", "said"),
    [
        (b"root:x:0:0:root:/root:/bin/bash\nhunter2", "does not begin like any image file"),
        (b"P6 hunter2 hunter2 255\n", None),
        (b"P3\n2 2\n255\nhunter2 1 1", None),
        (b"\0\0\0\x18ftypheic" + b"hunter2" * 9, "HEIC or HEIF, which is not decoded"),
        (b"\0\0\0\x18ftypisom" + b"hunter2" * 9, "a video, which is not decoded"),
        (b"%PDF-1.7 hunter2", "a PDF, which"),
        (b"version https://git-lfs.github.com/spec/v1\noid hunter2", "a pointer of Git LFS"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x07hunter2hunter2", None),
        (b"BMhunt\0\0\0\0hunter2hunter2hunter2hunter2", None),
        (b"GIF89a" + b"hunter2" * 9, None),
        (b"II*\0" + b"hunter2" * 99, None),
    ],
    ids=str,
)
def test_messages_about_files_that_are_not_images_do_not_quote_them(encoded, said):
    with pytest.raises(Unreadable) as caught:
        decode(encoded)
    assert "hunter" not in str(caught.value) and "hunt" not in str(caught.value)
    assert caught.value.detail
    assert said is None or caught.value.detail.startswith(said)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(kind, pixels, encode):
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (200, 10))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (rgb(encode(first, kind, save_all=True, append_images=[second], **options)) == 200).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_off_anywhere_is_refused_or_whole(kind, pixels, encode):
    encoded = encode(pixels(0, 64, 64), kind, **FORMATS[kind])
    whole = rgb(encoded)
    n_refused = 0
    for n_bytes in sorted({*range(1, len(encoded), max(1, len(encoded) // 50)), len(encoded) - 40}):
        try:
            found = rgb(encoded[:n_bytes])
        except Unreadable:
            n_refused += 1
        else:
            assert np.array_equal(found, whole), f"{kind} cut at {n_bytes} of {len(encoded)} gave another picture"
    assert n_refused > 40


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_half_a_file_is_truncated(kind, pixels, encode):
    encoded = encode(pixels(0, 64, 64), kind, **FORMATS[kind])
    assert reason(encoded[: len(encoded) // 2]) == "truncated"


def test_half_a_progressive_jpeg_is_truncated(pixels, encode):
    encoded = encode(pixels(0, 64, 64), "JPEG", progressive=True)
    assert reason(encoded[: len(encoded) // 2]) == "truncated"
    assert reason(encoded[:3]) == "truncated"


def test_every_other_reason_of_rejection_is_named(pixels, encode):
    assert reason(b"") == "empty"
    for text in (
        b"hello",
        b"Python is a language",
        b"BMW makes cars",
        b"<html>",
        b"\0" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):
        assert reason(text) == "not_an_image"
    assert reason(encode(pixels())[:8] + b"\xff" * 100) == "unreadable"
    damaged = bytearray(encode(pixels(0, 64, 64)))
    damaged[60:80] = b"\xff" * 20
    assert reason(bytes(damaged)) == "unreadable"


def test_a_decompression_bomb_is_too_large_whether_pil_warns_or_raises():
    assert reason(png_header(10_000, 9_500)) == "too_large"
    assert reason(png_header(60_000, 60_000)) == "too_large"
    assert reason(bytes(MAX_BYTES + 1)) == "too_large"


def test_threads_leave_the_warning_filters_alone():
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reason, [png_header(10_000, 9_500)] * 200))
    assert list(warnings.filters) == before


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8), st.sampled_from(sorted(FORMATS)))
def test_damage_at_any_byte_gives_rgb_or_a_reason(place, damage, kind):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(buffer, kind)
    encoded = bytearray(buffer.getvalue())
    encoded[place : place + len(damage)] = damage
    try:
        assert decode(bytes(encoded)).mode == "RGB"
    except Unreadable as error:
        assert error.reason in {"empty", "truncated", "not_an_image", "too_large", "unreadable"}


@given(st.binary(max_size=64))
def test_any_bytes_give_rgb_or_a_reason(encoded):
    try:
        assert decode(encoded).mode == "RGB"
    except Unreadable as error:
        assert error.detail


JPEGS = st.fixed_dictionaries({
    "mode": st.sampled_from(["RGB", "L", "CMYK"]),
    "progressive": st.booleans(),
    "subsampling": st.sampled_from([0, 1, 2]),
    "restart_marker_blocks": st.sampled_from([0, 3]),
    "size": st.tuples(st.integers(40, 300), st.integers(40, 300)),
})  # fmt: skip
"""Options of JPEG files."""
DAMAGE = st.tuples(st.sampled_from(["cut", "write", "header", "drop"]), st.floats(0, 1), st.binary(min_size=1, max_size=9))


@settings(max_examples=200, deadline=None)
@given(options=JPEGS, damage=st.lists(DAMAGE, max_size=4), longest=st.sampled_from([8, 16, 48, 96]))
def test_a_thumbnail_is_made_of_exactly_the_files_that_can_be_decoded_and_shows_the_same(options, damage, longest):
    encoded = bytearray(jpeg(**options))
    for kind, place, values in damage:
        at = int(place * min(len(encoded), 700 if kind == "header" else len(encoded)))
        if kind == "cut":
            del encoded[at:]
        elif kind == "drop":
            del encoded[at : at + 20 * len(values)]
        else:
            encoded[at : at + len(values)] = values
    try:
        whole = decode(bytes(encoded))
    except Unreadable as error:
        with pytest.raises(Unreadable) as raised:
            decode_thumbnail(bytes(encoded), longest)
        assert (raised.value.reason, raised.value.detail) == (error.reason, error.detail)
    else:
        found, size = decode_thumbnail(bytes(encoded), longest)
        assert size == whole.size and found.mode == "RGB"
        if not damage:
            whole.thumbnail((longest, longest))
            assert found.size == whole.size
            assert np.abs(np.asarray(found).astype(int) - np.asarray(whole)).mean() < 8


def jpeg(mode: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    blocks = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(blocks).resize(size).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_thumbnail_is_upright_and_comes_with_the_size_of_the_whole_image(turn, kind):
    upright = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6, 1) * 10, np.ones((80, 80, 3), np.uint8))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = turn
    Image.fromarray(STORED[turn](upright)).save(buffer, kind, exif=exif)
    found, size = decode_thumbnail(buffer.getvalue(), 48)
    assert size == (480, 320) and found.size == (48, 32)
    assert np.abs(np.asarray(found).astype(int)[4::8, 4::8] - upright[40::80, 40::80]).max() < 6
