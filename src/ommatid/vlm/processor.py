"""Conversion of a folder's image processor to a `Preprocess`: its settings are checked, and its pixels are compared with ours."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ommatid.config.messages import explain
from ommatid.errors import ModelError
from ommatid.vlm import hub
from ommatid.vlm.network_checks import SHAPES, structured_picture
from ommatid.vlm.precision import normalise
from ommatid.vlm.preprocess import Interpolation, Preprocess

FILE = "preprocessor_config.json"
MAX_SIDE = 4096
FILTERS: dict[int, Interpolation] = {Image.Resampling[name.upper()].value: name for name in get_args(Interpolation)}
LEVEL = 1.001
"""Largest difference between our pixels and the processor's, in levels of 255: one level, plus rounding."""
ProcessPicture = Callable[[Any, Image.Image], np.ndarray]
"""Function from a processor and a picture to the processor's output for it, `(3, H, W)`."""


def process_picture(processor: Any, picture: Image.Image) -> np.ndarray:
    """Run a processor with the usual interface on a picture."""
    return np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])


def load_preprocess(
    folder: Path, path: str, key: str, changes: Mapping[str, Any] | None = None, process: ProcessPicture = process_picture
) -> Preprocess:
    """Read a model's preprocessing, and check that it agrees with its processor on two pictures, to one level of 255.

    Args:
        folder: Folder from `hub.locate`.
        path: Folder or hub name that the user gave.
        key: Key of the parameter, for messages.
        changes: Settings that replace those of the processor.
        process: Function that runs the processor.

    Returns:
        The preprocessing.

    Raises:
        ModelError: The settings cannot be read, are not valid, or do not lead to one fixed size for every image; or the processor's pixels
            differ.
    """
    with hub.reading(path, key, FILE):
        processor = load_image_processor(folder)
        values = processor.to_dict() | dict(changes or {})
    preprocess = _as_preprocess(_check(values, path, key), values, path, key)
    for shape in SHAPES:
        _compare(preprocess, processor, structured_picture(*shape), process, path, key)
    return preprocess


def _compare(preprocess: Preprocess, processor: Any, picture: Image.Image, process: ProcessPicture, path: str, key: str) -> None:
    with hub.reading(path, key, "the output of its image processor"):
        theirs = torch.from_numpy(np.asarray(process(processor, picture), np.float32))
    ours = normalise(torch.from_numpy(preprocess(picture))[None], preprocess, "cpu")[0]
    name = type(processor).__name__.removesuffix("Pil")
    if theirs.shape != ours.shape:
        what = f"its output has shape {list(theirs.shape)}, not {list(ours.shape)}"
    else:
        levels = float(((ours - theirs).abs() * torch.tensor(preprocess.std)[:, None, None]).max())
        if levels <= LEVEL:
            return
        what = f"its pixels differ by up to {levels:.3g} levels of 255"
    raise ModelError(
        f"{key}: {path}: its image processor ({name}) does more than a resize, a centre crop and a normalisation: for a picture of "
        f"{picture.width} x {picture.height}, {what}; Ommatid cannot reproduce it: name another model, or write a {FILE} of another "
        "processor that suits the model"
    )


class Dinov3Processor(PilBackend):
    """The defaults of DINOv3's image processor, whose own class needs torchvision.

    That class resizes floating-point numbers, while Pillow rounds to bytes, once for each direction of the resize. The results agree to
    half a level of 255 for each.
    """

    resample = Image.Resampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a folder, with the backend that needs no torchvision."""
    settings, _ = PilBackend.get_image_processor_dict(folder, local_files_only=True)
    if str(settings.get("image_processor_type", "")).startswith("DINOv3ViTImageProcessor"):
        return Dinov3Processor.from_pretrained(folder, local_files_only=True)
    # The other backend, torchvision, cannot be installed with this version of torch.
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil")


def _plain(value: object) -> object:
    """Convert a filter of Pillow to its number."""
    return int(value) if isinstance(value, Image.Resampling) else value


def _each(value: object) -> object:
    """Repeat a single number for each channel."""
    return [value] * 3 if isinstance(value, int | float) else value


Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Channels = Annotated[tuple[Number, Number, Number], BeforeValidator(_each)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Scales = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_each)]
Switch = Annotated[bool | None, Field(strict=True)]


class _Size(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    shortest_edge: Side | None = None
    height: Side | None = None
    width: Side | None = None

    @property
    def sides(self) -> tuple[int, ...] | None:
        """(shorter side,) or (height, width); None for any other specification, such as a longest side."""
        match self.model_dump(exclude_none=True):
            case {"shortest_edge": side, **rest} if not rest:
                return (side,)
            case {"height": height, "width": width, **rest} if not rest:
                return height, width
            case _:
                return None


class _Settings(BaseModel):
    """Settings that determine what a processor computes. The comparison of its pixels with ours shows whether others matter too."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_processor_type: str = ""
    do_resize: Switch = None
    size: _Size = _Size()
    crop_pct: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    resample: Annotated[int, Field(strict=True, ge=0, le=5), BeforeValidator(_plain)] = Image.Resampling.BILINEAR.value
    do_center_crop: Switch = None
    crop_size: _Size = _Size()
    do_pad: Switch = None
    do_rescale: Switch = None
    rescale_factor: Positive = 1 / 255
    rescale_offset: Switch = None
    do_normalize: Switch = None
    image_mean: Channels = (0.0, 0.0, 0.0)
    image_std: Scales = (1.0, 1.0, 1.0)
    include_top: Switch = None
    do_flip_channel_order: Switch = None


def _check(values: Mapping[str, Any], path: str, key: str) -> _Settings:
    try:
        return _Settings.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise ModelError(f"{key}: {path}: {FILE}: {explain(error, _Settings)}") from None


def _as_preprocess(settings: _Settings, values: Mapping[str, Any], path: str, key: str) -> Preprocess:
    resize, crop = _sides(settings)
    if settings.do_pad or resize is None or crop is None or len(crop) != 2 or crop[0] > resize[0] or crop[1] > resize[-1]:
        shown = {name: values.get(name) for name in ("do_resize", "size", "do_center_crop", "crop_size", "do_pad")}
        name = settings.image_processor_type or "image processor"
        raise ModelError(
            f"{key}: {path}: preprocessing must end in one fixed size (resize, then centre crop); the folder's {name} has {shown}; "
            f"change these in {FILE}, or name another model"
        )
    is_flipped = settings.image_processor_type == "MobileViTImageProcessor" and settings.do_flip_channel_order
    shift, scale = _shift_and_scale(settings)
    return Preprocess(
        resize=resize,
        crop=(crop[0], crop[1]),
        interpolation=FILTERS[settings.resample],
        mean=shift,
        std=scale,
        channels="BGR" if is_flipped else "RGB",
    )


def _sides(settings: _Settings) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the sizes of the resize and of the crop. The meaning of `size` depends on the kind of processor."""
    resize = settings.size.sides if settings.do_resize else None
    crop = settings.crop_size.sides if settings.do_center_crop else None
    if crop is not None and len(crop) == 1:
        crop *= 2
    pct = settings.crop_pct
    match settings.image_processor_type, resize:
        case "LevitImageProcessor", (side,):
            return (int(256 / 224 * side),), crop
        case "ConvNextImageProcessor", (side,) if not settings.do_center_crop:
            return ((int(side / (pct or 224 / 256)),), (side, side)) if side < 384 else ((side, side), (side, side))
        case "PoolFormerImageProcessor", (side,) if pct:
            return (int(side / pct),), crop
        case "PoolFormerImageProcessor", (height, width) if pct:
            return ((int(height / pct),) if height == width else (int(height / pct), int(width / pct))), crop
        case _:
            return resize, crop if settings.do_center_crop else resize


def _shift_and_scale(settings: _Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel, for pixels from 0 to 255."""
    unit = 1 / settings.rescale_factor if settings.do_rescale else 1.0
    kind = settings.image_processor_type
    normalizes = settings.do_normalize and kind != "MobileViTImageProcessor"
    mean, std = (settings.image_mean, settings.image_std) if normalizes else ((0.0,) * 3, (1.0,) * 3)
    if kind == "EfficientNetImageProcessor":
        if settings.do_rescale and settings.rescale_offset:
            mean = tuple(value + 1 for value in mean)
        if settings.include_top:
            std = tuple(value * factor for value, factor in zip(std, settings.image_std, strict=True))
    return tuple(value * unit for value in mean), tuple(value * unit for value in std)
