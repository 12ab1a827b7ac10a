"""Transformers models on disk: finds the folder of a hub name or path, says what it lacks, loads without noise."""

import json
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, dynamic_module_utils
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from ommatid.errors import ModelError

# What a folder must have: a sentence for the user, and the patterns of which one must match.
CONFIG = {"config.json": ("config.json",)}
WEIGHTS = {"weights (*.safetensors or pytorch_model*.bin)": ("*.safetensors", "pytorch_model*.bin")}
PREPROCESSOR = {"preprocessor_config.json": ("preprocessor_config.json", "processor_config.json")}
TOKENIZER = {"a tokenizer (tokenizer.json, or vocab.json and merges.txt)": ("tokenizer.json", "vocab.json")}
Needs = Mapping[str, tuple[str, ...]]
MAX_SIZE, MAX_LAYERS = 2**24, 1024
"""The largest number in a config.json, and of layers, that is taken for one: what is larger only fills the memory."""
MAX_REASON = 300
"""Characters of another library's message that are passed on."""
NUMBERS_PER_BYTE = 2
"""Of weights, at most: some are stored in four bits."""
_CODE = (
    "{what} asks for Python code that the folder brings (auto_map), and no code of a model's folder is ever run; use a model that "
    "transformers knows by itself, or load this one in a function of your own (extract.model: {{kind: module}})"
)


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
    if (folder / "config.json").is_file():
        with reading(path, key, "config.json"):
            _check_config(json.loads((folder / "config.json").read_bytes()), path, key)
    return folder


def _check_config(config: object, path: str, key: str) -> None:
    """Transformers asks before it runs the code of a whole model, but `trust_remote_code` does not reach all parts of a config."""
    if not isinstance(config, dict):
        raise ModelError(f"{key}: {path}: config.json holds a {type(config).__name__}; expected a JSON object")
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        waiting += value.items() if isinstance(value, dict) else ((name, each) for each in value) if isinstance(value, list) else ()
        if isinstance(value, dict) and "auto_map" in value:
            raise ModelError(f"{key}: {path}: {_CODE.format(what='a part of the model in config.json')}")
        most = MAX_LAYERS if "layers" in name or "depth" in name else MAX_SIZE
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > most and "theta" not in name:
            raise ModelError(f"{key}: {path}: config.json says {name} {value}; no model has more than {most}")
    backbone = config.get("backbone")
    if isinstance(backbone, str) and "/" in backbone and not config.get("backbone_config"):
        raise ModelError(
            f"{key}: {path}: config.json says backbone {backbone!r}, and transformers would ask the hub for the config of that; load the "
            "model where there is a network, save it again with save_pretrained, which writes backbone_config, and name that folder"
        )
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(name, "")):
            raise ModelError(
                f"{key}: {path}: config.json says {name} {config[name]!r}, which is code of the hub, and is not run; remove it"
            )


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
def reading(path: str, key: str, what: str) -> Iterator[None]:
    """Every error of transformers becomes ours: which it raises for a damaged or foreign folder differs by family and version.

    Nobody is asked whether to run code, also where `trust_remote_code` is not passed on to a part of the model.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{key}: {path}: {_why(what, error)}") from error


def _why(what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return _CODE.format(what=what)
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return f"{what} holds objects beside tensors, and unpickling those would run code, so it is not opened; save it as safetensors"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{what} cannot be read: {reason[0][:MAX_REASON]}{'...' if len(reason[0]) > MAX_REASON else ''}"


def load_config(folder: Path, path: str, key: str) -> Any:
    """The model's config.

    Raises:
        ModelError: not readable.
    """
    with reading(path, key, "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


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
    with reading(path, key, "the model"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        n_bytes = sum(file.stat().st_size for pattern in WEIGHTS.values() for glob in pattern for file in folder.glob(glob))
        refuse_larger(cls, config, n_bytes, path, key)
        model, info = cls.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
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


def refuse_larger(cls: Any, config: Any, n_bytes: int, path: str, key: str) -> None:
    """Weights of other shapes than the config says are drawn at random by transformers, however large, before it tells.

    Raises:
        ModelError: the model has more numbers than weights of so many bytes can hold.
    """
    with torch.device("meta"):
        model = cls.from_config(config, trust_remote_code=False) if hasattr(cls, "from_config") else cls(config)
    n = sum(weight.numel() for weight in model.parameters())
    if n > NUMBERS_PER_BYTE * n_bytes + 2**24:
        raise ModelError(
            f"{key}: {path}: the model has {n} numbers by config.json, and the weights hold at most {NUMBERS_PER_BYTE * n_bytes}; are "
            "config.json and the weights of the same model?"
        )


def load_tokenizer(folder: Path, path: str, key: str) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: not readable.
    """
    with reading(path, key, "the tokenizer"):
        # The class that SigLIP's folders name wants sentencepiece; their tokenizer.json says the same without.
        named = get_tokenizer_config(folder, local_files_only=True).get("tokenizer_class")
        cls: Any = PreTrainedTokenizerFast if named == "SiglipTokenizer" else AutoTokenizer
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
