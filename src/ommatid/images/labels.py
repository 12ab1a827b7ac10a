"""Splits, labels and taxonomy of the images."""

from ommatid.store import Artefact


def list_split(images: Artefact, split: str) -> list[int]:
    """List the numbers of the images of a split, `train` or `eval`, in their order."""
    table = images.read("images", ["image", "split"])
    return [image for image, of in zip(table["image"].to_pylist(), table["split"].to_pylist(), strict=True) if of == split]


def load_labels(images: Artefact, of_split: str = "eval") -> dict[int, str]:
    """Load the labels of the images of a split, by image number; images without a label are left out."""
    return _load_column(images, "label", of_split)


def load_classes(images: Artefact) -> dict[int, str]:
    """Load the labels of the evaluation images, by image number; empty if all are equal, since one class says nothing about a latent."""
    labels = load_labels(images)
    return labels if len(set(labels.values())) > 1 else {}


def load_paths(images: Artefact) -> dict[int, tuple[str, ...]]:
    """Load each evaluation image's path from the root of the taxonomy, by image number; images without a path are left out."""
    return {image: tuple(path.split("/")) for image, path in _load_column(images, "taxonomy").items()}


def _load_column(images: Artefact, column: str, of_split: str = "eval") -> dict[int, str]:
    """Load the values of a column for the images of a split, by image number; images without a value are left out."""
    found: dict[int, str] = {}
    for batch in images.iter_batches("images", ["image", "split", column], n_rows=4096):
        if column not in batch.schema.names:
            return {}  # artefacts written before this column was introduced lack it
        rows = zip(*(batch[name].to_pylist() for name in ("image", "split", column)), strict=True)
        found |= {image: value for image, split, value in rows if split == of_split and value is not None}
    return found
