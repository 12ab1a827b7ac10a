"""Images: from a source (CIFAR-10, a folder, Parquet) to the data set that every later stage reads."""

from ommatid.images.decode import Unreadable, decode
from ommatid.images.stage import make_images

__all__ = ["Unreadable", "decode", "make_images"]
