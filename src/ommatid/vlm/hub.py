"""Transformers models on disk: finds the folder of a hub name or path, says what it lacks, loads without noise."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.image_processing_backends import PilBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ommatid.errors import ModelError
from ommatid.vlm.preprocess import Preprocess

# What a folder must have: a sentence for the user, and the patterns of which one must match.
CONFIG = {"config.json": ("config.json",)}
WEIGHTS = {"weights (*.safetensors or pytorch_model*.bin)": ("*.safetensors", "pytorch_model*.bin")}
PREPROCESSOR = {"preprocessor_config.json": ("preprocessor_config.json", "processor_config.json")}
TOKENIZER = {"a tokenizer (tokenizer.json, or vocab.json and merges.txt)": ("tokenizer.json", "vocab.json")}
Needs = Mapping[str, tuple[str, ...]]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers and its hub client: our errors say what matters."""
    hub_logger = logging.getLogger("huggingface_hub")
    level, bars, verbosity = hub_logger.level, transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_logger.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def locate(path: str, key: str, needs: Needs, instead: str | None = None) -> Path:
    """The local folder of a model: a folder as it is, or a hub name from the cache, or downloaded once.

    Args:
        path: What the user wrote.
        key: Where it is written, such as `extract.model.path`.
        needs: What the folder must have.
        instead: What to do without this model; None: use the embedded one.

    Raises:
        ModelError: not found, not reachable, or files are missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        embedded = f"use the embedded default, {key.removesuffix('.path')}: {{kind: lite}}"
        folder = _cached(path, needs) or _download(path, key, instead or embedded)
    missing = _missing(folder, needs)
    if missing:
        raise ModelError(f"{key}: {path}: missing in this folder: {'; '.join(missing)}; save the whole model there with save_pretrained")
    return folder


def _missing(folder: Path, needs: Needs) -> list[str]:
    return [what for what, patterns in needs.items() if not any(any(folder.glob(pattern)) for pattern in patterns)]


def _cached(path: str, needs: Needs) -> Path | None:
    """A whole model in the hub's cache is taken as it is: the same weights in every run, and no network."""
    try:
        folder = Path(huggingface_hub.snapshot_download(path, local_files_only=True))
    except (OSError, HFValidationError):
        return None
    return None if _missing(folder, needs) else folder


def _download(path: str, key: str, instead: str) -> Path:
    small = ["*.json", "*.txt", "*.model"]
    try:
        with quiet():
            folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[*small, "*.safetensors"]))
            if _missing(folder, WEIGHTS):  # older models have no safetensors; fetching both would double the download
                folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[*small, "pytorch_model*.bin"]))
    except HFValidationError:
        raise ModelError(f"{key}: {path}: no such folder, and not a hub name (OWNER/NAME)") from None
    except Exception as error:  # the hub client lets its HTTP library's errors through; all mean: not fetched
        raise ModelError(
            f"{key}: {path}: no such folder here, and not fetched from the model hub: no network, or no such model "
            f"({type(error).__name__}). Without a network: {instead}; or copy the model's files (config, weights, tokenizer, preprocessor) "
            f"into a folder, and set {key} to it"
        ) from None
    return folder


@contextmanager
def _reading(path: str, key: str, what: str) -> Iterator[None]:
    """Every error of transformers becomes ours: which it raises for a damaged or foreign folder differs by family and version."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{key}: {path}: {what} cannot be read: {reason[0]}") from error


def load_config(folder: Path, path: str, key: str) -> Any:
    """The model's config.

    Raises:
        ModelError: not readable.
    """
    with _reading(path, key, "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def load_weights(cls: Any, folder: Path, path: str, key: str, optional: str = "") -> tuple[Any, set[str]]:
    """A transformers model in float32, ready for inference, and those of its weights that were missing in the folder.

    Transformers fills missing weights with random numbers and only warns; activations of those would explain nothing. At wrong shapes
    it raises, but puts which they are into its log.

    Args:
        cls: The transformers class.
        folder: From `locate`.
        path: What the user wrote.
        key: Where it is written.
        optional: Weights of this prefix may be missing.

    Raises:
        ModelError: damaged, of another model, of other shapes than config.json says, or incomplete.
    """
    with _reading(path, key, "the model"):
        model, info = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    for name, came, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{key}: {path}: the weights {name} have the shape {list(came)}, and by config.json they have {list(wanted)}; "
            "are config.json and the weights of the same model?"
        )
    missing = set(info["missing_keys"])
    wrong = sorted(str(name) for name in missing if not (optional and name.startswith(optional)))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{key}: {path}: the weights lack {', '.join(wrong[:3])}{more}; is the file whole, and of this model?")
    return model.eval().requires_grad_(False), missing


def load_tokenizer(folder: Path, path: str, key: str) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: not readable.
    """
    with _reading(path, key, "the tokenizer"):
        # The class that SigLIP's folders name wants sentencepiece; their tokenizer.json says the same without.
        named = get_tokenizer_config(folder, local_files_only=True).get("tokenizer_class")
        cls: Any = PreTrainedTokenizerFast if named == "SiglipTokenizer" else AutoTokenizer
        return cls.from_pretrained(folder, local_files_only=True)


def load_preprocess(folder: Path, path: str, key: str, changes: Mapping[str, Any] | None = None) -> Preprocess:
    """The model's own resize, crop and normalisation; `changes` are settings of its processor that the caller knows better.

    Raises:
        ModelError: not readable, or not one fixed size for every image.
    """
    with _reading(path, key, "preprocessor_config.json"):
        settings = _load_processor(folder).to_dict() | dict(changes or {})
    preprocess = _as_preprocess(settings)
    if preprocess is None:
        shown = {name: settings.get(name) for name in ("do_resize", "size", "do_center_crop", "crop_size", "do_pad")}
        raise ModelError(f"{key}: {path}: preprocessing must end in one fixed size (resize, then centre crop); preprocessor has {shown}")
    return preprocess


class Dinov3Processor(PilBackend):
    """The defaults of DINOv3's image processor, whose own class wants torchvision.

    That one resizes numbers with fractions, where Pillow rounds to bytes: the same to half a level of 255 in each direction.
    """

    resample = Image.Resampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True


def _load_processor(folder: Path) -> Any:
    settings, _ = PilBackend.get_image_processor_dict(folder, local_files_only=True)
    if settings.get("image_processor_type", "").startswith("DINOv3ViTImageProcessor"):
        return Dinov3Processor.from_pretrained(folder, local_files_only=True)
    # torchvision, the other backend, does not install beside this torch
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")


def _as_preprocess(settings: Mapping[str, Any]) -> Preprocess | None:
    """None where the processor does something else than resize to, or crop to, one fixed size."""
    resize = _sides(settings.get("size") if settings.get("do_resize", True) else None)
    crop = _sides(settings.get("crop_size")) if settings.get("do_center_crop") else resize
    if resize is None or crop is None or "crop_pct" in settings or settings.get("do_pad"):
        return None
    crop = crop * 2 if len(crop) == 1 and settings.get("do_center_crop") else crop
    if len(crop) != 2 or crop[0] > resize[0] or crop[1] > resize[-1]:
        return None
    scale = 1 / settings["rescale_factor"] if settings.get("do_rescale", True) else 1.0
    mean, std = (settings["image_mean"], settings["image_std"]) if settings.get("do_normalize", True) else ((0.0,) * 3, (1.0,) * 3)
    names = {filter_.value: filter_.name.lower() for filter_ in Image.Resampling}
    return Preprocess(
        resize=resize,
        crop=(crop[0], crop[1]),
        interpolation=names[settings["resample"]],  # pyright: ignore[reportArgumentType]
        mean=tuple(value * scale for value in mean),
        std=tuple(value * scale for value in std),
    )


def _sides(size: Mapping[str, int] | None) -> tuple[int, ...] | None:
    match size:
        case {"shortest_edge": int(side), **rest} if not rest:
            return (side,)
        case {"height": int(height), "width": int(width), **rest} if not rest:
            return (height, width)
        case _:
            return None
