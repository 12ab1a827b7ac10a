"""The old name of `ommatid.images.figure`, which works for one more release."""

import warnings

from ommatid.images.figure import draw

__all__ = ["draw"]

warnings.warn(
    "ommatid.images.drawing is now ommatid.images.figure; the old name goes with the next release", DeprecationWarning, stacklevel=2
)
