"""New images and the activations of an SAE's latents on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ommatid.errors import InputError, gist
from ommatid.images.decode import Unreadable, decode, upright

if TYPE_CHECKING:
    import pandas
    import torch

    from ommatid.evaluate.passes import Pool
    from ommatid.extract.tokens import TokenPicker
    from ommatid.sae.model import SAE
    from ommatid.vlm import VisionModel

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""Path or bytes of an image file, a Pillow image, or a uint8 array (height, width), (height, width, 3) or (height, width, 4)."""
MEASURES = ("label_score", "max_act", "ms", "density")
"""Columns of the relation `features` that `Encoding.top` adds to each label and activation."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """The activations of an SAE's latents on some images.

    >>> import ommatid
    >>> found = ommatid.open_run("data").encode(["cat.jpg", "dog.jpg"])
    >>> found
    Encoding(2 images, ... latents of ...)
    >>> list(found.top(3).columns)
    ['image', 'latent', 'label', 'act', 'label_score', 'max_act', 'ms', 'density']
    """

    images: tuple[str, ...]
    """Name of each image: its path as passed to `encode`, or its index as text if it had no path."""
    acts: "torch.Tensor"
    """Image-level activations, (images, latents) float32, pooled over each image's tokens as set by `evaluate.image_activation`."""
    x: "torch.Tensor"
    """Activations at the hookpoint, (images, tokens, d_model) float32, rounded to float16 as the study's are."""
    sae: str
    """Name of the SAE in the column `sae` of the catalogue."""
    features: "Callable[[str], pandas.DataFrame]"
    """Function that returns what the catalogue says of the latents of an SAE, given its name (`Run.features`)."""
    encoder: "Encoder"
    """The pipeline that encoded the images."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Part of each image that the model sees and heat maps cover: (left, top, right, bottom) in pixels of the upright image."""

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Encoding({len(self)} image{'s' * (len(self) != 1)}, {self.acts.shape[1]} latents of {self.sae})"

    def top(self, n: int | None = 10) -> "pandas.DataFrame":
        """List the strongest features of each image, strongest first.

        Args:
            n: Maximum number of features per image; None lists every latent that fires.

        Returns:
            A row for each image and latent that fires: `image`, `latent`, `label` (None if no labeller found one) and `act`, followed by
            columns of the catalogue: `label_score`, `max_act` (largest activation on any token of the evaluation split), `ms` and
            `density`.

        Raises:
            ArtefactError: The catalogue is missing or was built before this SAE was trained.

        >>> import ommatid
        >>> rows = ommatid.open_run("data").encode("cat.jpg").top(3)
        >>> rows.image.tolist()
        ['cat.jpg', 'cat.jpg', 'cat.jpg']
        >>> rows.act.is_monotonic_decreasing
        True
        """
        import pandas as pd

        if n is not None and n < 1:
            raise InputError(f"n is {n}; it must be 1 or more, or None for every latent that fires")
        acts, latents = self.acts.sort(dim=1, descending=True, stable=True)
        shown = acts[:, :n] > 0
        rows = shown.nonzero()[:, 0].tolist()
        columns = {"image": [self.images[row] for row in rows], "latent": latents[:, :n][shown].numpy(), "act": acts[:, :n][shown].numpy()}
        found = pd.DataFrame(columns).join(self.features(self.sae), on="latent")
        return found.loc[:, ["image", "latent", "label", "act", *MEASURES]]

    def heat(self, image: int = 0, latents: Sequence[int] | None = None) -> "torch.Tensor":
        """Map where in an image latents fire: their activations on each patch of the model's grid.

        Args:
            image: Index of the image.
            latents: The latents; None: all of them.

        Returns:
            The activations, (latents, rows, cols) float32, row by row from the top left of the image's box in `boxes`.

        Raises:
            InputError: The study's tokens are not patches, so that they have no place in an image.

        >>> import ommatid
        >>> found = ommatid.open_run("data").encode("cat.jpg")
        >>> strongest = int(found.acts[0].argmax())
        >>> heat = found.heat(0, [strongest])[0]
        >>> heat.max() == found.acts[0, strongest]
        tensor(True)
        """
        patches = self.encoder.patches(self.encoder.sae.encode(self.x[image]))
        if patches is None:
            kinds = ", ".join(dict.fromkeys(place.kind for place in self.encoder.picker.places))
            raise InputError(f"{self.sae} encodes {kinds} tokens, which have no place in an image; a heat map needs extract.tokens: patch")
        return (patches if latents is None else patches[..., list(latents)]).permute(2, 0, 1)


@dataclass(frozen=True)
class Encoder:
    """The pipeline from images to the activations of one SAE's latents."""

    model: "VisionModel"
    picker: "TokenPicker"
    sae: "SAE"
    pool: "Pool"

    @classmethod
    def make(cls, model: "VisionModel", sae: "SAE", extract: Mapping[str, Any], evaluate: Mapping[str, Any]) -> "Encoder":
        """Make the pipeline with which a study encoded its own images.

        Args:
            model: The model that the study explains.
            sae: One of its SAEs.
            extract: The section `extract` of the study's params.
            evaluate: The section `evaluate` of its params.

        Returns:
            The pipeline.

        Raises:
            ModelError: The model has no such hookpoint or tokens.
        """
        from ommatid.evaluate.passes import make_pool
        from ommatid.extract.tokens import TokenPicker
        from ommatid.vlm import check_hookpoint

        hookpoint = sae.config.hookpoint
        picker = TokenPicker(hookpoint, check_hookpoint(model, hookpoint), extract["tokens"])
        pool = make_pool(evaluate["image_activation"], [place.kind for place in picker.places], hookpoint)
        return cls(model, picker, sae, pool)

    def run(self, images: Sequence[Image.Image]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return image-level activations (images, latents) and activations at the hookpoint (images, tokens, d_model), both float32."""
        import torch

        x = self.capture(images)
        # one image at a time, since the token activations of a wide SAE are large
        acts = [self.pool(self.sae.encode(x_td)[None]) for x_td in x]
        return torch.cat(acts), x

    def capture(self, images: Sequence[Image.Image]) -> "torch.Tensor":
        """Return activations at the hookpoint, (images, tokens, d_model) float32, rounded to float16 as the study's are."""
        import torch

        from ommatid.extract.networks import find_device

        pixels = torch.from_numpy(np.stack([self.model.preprocess(image) for image in images])).to(find_device())
        tokens = self.picker.pick(self.model.capture(pixels, [self.picker.name]).tokens[self.picker.name])
        return tokens.to("cpu", torch.float16).float()

    def patches(self, acts: "torch.Tensor") -> "torch.Tensor | None":
        """Return the activations on patches, (rows, cols, latents), given those on the tokens of an image, (tokens, latents).

        They are None if the tokens are not patches.
        """
        grid = self.picker.grid
        return None if grid is None else acts[-grid[0] * grid[1] :].unflatten(0, grid)


def as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """List the images; a single image becomes a list of one, and an array (images, height, width, 3) one of its images."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, ImageLike) else list(images)


def name_image(image: ImageLike, number: int) -> str:
    """Name of an image: its path, or its index as text if it has no path."""
    return str(image) if isinstance(image, str | Path) else str(number)


def open_image(image: ImageLike, number: int) -> Image.Image:
    """Decode an image to upright 8-bit RGB, as the stage `images` does.

    Args:
        image: The image.
        number: Its index, for error messages.

    Returns:
        The decoded image.

    Raises:
        InputError: The image cannot be read, or is not an image.
    """
    try:
        match image:
            case str() | Path():
                return decode(Path(image).expanduser().read_bytes())
            case bytes():
                return decode(image)
            case Image.Image():
                return upright(image)
            case np.ndarray() if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
                return upright(Image.fromarray(image))
    except (OSError, Unreadable) as error:
        raise InputError(f"image {name_image(image, number)}: {error if isinstance(error, Unreadable) else gist(error)}") from None
    what = f"an array of {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"of type {type(image).__name__}"
    raise InputError(
        f"image {number} is {what}; it must be a path, the bytes of an image file, a Pillow image, or a uint8 array of shape "
        "(height, width), (height, width, 3) or (height, width, 4)"
    )
