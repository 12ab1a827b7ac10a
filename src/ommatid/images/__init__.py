"""Stage `images`: a source (CIFAR-10, a folder, Parquet, tar archives) becomes the data set that every later stage reads."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage("images", kind="images", place=Path("data/images"))
