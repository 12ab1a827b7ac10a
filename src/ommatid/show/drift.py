"""How checks of drift are put into words and pictures, on pages, in Prefect and on the command line."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ommatid.show.numbers import count, fixed, percent, signed

VERDICTS = {
    "none": "no drift",
    "slight": "slight drift",
    "drift": "drift",
    "too_few": "too few to tell",
    "not_comparable": "not comparable",
}
"""What pages call each verdict."""


@dataclass(frozen=True)
class KindOfTest:
    """A kind of test of a check, in words."""

    title: str
    """What is compared."""
    p: str
    """Column of `drift_checks` with its p value."""
    value: Callable[[Mapping[str, Any]], str]
    """Function from the row of a check to what was found."""
    chance: Callable[[Mapping[str, Any]], str]
    """Function from the row to what is found by chance."""


TESTS = (
    KindOfTest(
        "AUROC of a classifier that tells new images from the champion's",
        "auroc_p",
        lambda row: fixed(row["auroc"]),
        lambda row: f"up to {fixed(row['auroc_chance'])}",
    ),
    KindOfTest(
        "Discrepancy (MMD²) of the judge's embeddings",
        "mmd_p",
        lambda row: f"{row['mmd']:.5f}".replace("-", "−"),
        lambda row: f"up to {row['mmd_chance']:.5f}",
    ),
    KindOfTest(
        "FVU of the champion's SAE, on new images and before",
        "fvu_p",
        lambda row: (
            f"{fixed(row['fvu'])}, before {fixed(row['fvu_before'])} (difference {signed(row['fvu_low'])} to {signed(row['fvu_high'])})"
        ),
        lambda row: f"a difference up to {fixed(row['fvu_chance'])}",
    ),
    KindOfTest(
        "Latents that fire more often, more rarely, more or less strongly",
        "latents_p",
        lambda row: f"{count(row['n_changed'])} of {count(row['n_latents'])}",
        lambda row: f"any in {100 * row['alpha']:g} % of checks",
    ),
)
"""The kinds of test, in the order in which they are shown."""


def describe_change(row: Mapping[str, Any]) -> str:
    """Say how a latent fires on new images and did before, given its row of the relation `drift`."""
    rates = f"fires on {percent(row['rate'])} of the new images, {percent(row['rate_before'])} before"
    if row["act"] is None or row["act_before"] is None:
        return rates
    return f"{rates}; activation {row['act']:.2f}, {row['act_before']:.2f} before"


SIDE = 72
"""Side of a picture of an image, in pixels."""
GAP = 4
"""Pixels between pictures."""
LINE = 20
"""Height of a line of text, in pixels."""


def draw_changed(rows: Sequence[Mapping[str, Any]], pictures: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the images on which changed latents fire most, those of the champion on the left and new ones on the right.

    Args:
        rows: Rows of the relation `drift`, one for each latent.
        pictures: Rows of the relation `drift_images`; latents without any are left out.

    Returns:
        A WebP file.
    """
    from PIL import Image, ImageDraw, ImageFont  # here, as the explorer's server needs only the words

    shown = [row for row in rows if any(picture["latent"] == row["latent"] for picture in pictures)]
    n = max((picture["rank"] for picture in pictures), default=1)
    half = n * (SIDE + GAP) + 4 * GAP
    canvas = Image.new("RGB", (2 * half, LINE + len(shown) * (SIDE + LINE + 3 * GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for left, title in ((0, "the champion's images"), (half, "new images")):
        draw.text((left + GAP, 2), title, "black", font)
    for i, row in enumerate(shown):
        top = LINE + i * (SIDE + LINE + 3 * GAP)
        name = f"{row['latent']} {row['label'] or 'without a name'}: {row['change']}"
        draw.text((GAP, top), name.encode("latin-1", "replace").decode("latin-1")[:90], "black", font)  # the font has no other letters
        for picture in pictures:
            if picture["latent"] == row["latent"]:
                left = (half if picture["side"] == "new" else 0) + GAP + (picture["rank"] - 1) * (SIDE + GAP)
                with Image.open(io.BytesIO(picture["thumbnail"])) as opened:
                    canvas.paste(opened.convert("RGB").resize((SIDE, SIDE)), (left, top + LINE))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
