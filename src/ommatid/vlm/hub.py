"""Transformers models on disk: find the folder of a hub name or path, check its files, and load models quietly."""

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

# Files that a folder must have: a description for the user, and patterns, at least one of which must match.
CONFIG = {"config.json": ("config.json",)}
WEIGHTS = {"weights (*.safetensors or pytorch_model*.bin)": ("*.safetensors", "pytorch_model*.bin")}
PREPROCESSOR = {"preprocessor_config.json": ("preprocessor_config.json", "processor_config.json")}
TOKENIZER = {"a tokenizer (tokenizer.json, or vocab.json and merges.txt)": ("tokenizer.json", "vocab.json")}
Needs = Mapping[str, tuple[str, ...]]
MAX_SIZE, MAX_LAYERS = 2**24, 1024
"""The largest number, and the largest number of layers, accepted in a config.json. Larger ones would only exhaust the memory."""
MAX_REASON = 300
"""Characters of another library's message that are passed on to the user."""
NUMBERS_PER_BYTE = 2
"""Largest number of parameters per byte of weights: some are stored in four bits."""
_CODE = (
    "{what} requires Python code from the folder (auto_map), and code from a model's folder is never run; use a model that transformers "
    "supports by itself, or load this one in a function of your own (extract.model: {{kind: module}})"
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and its hub client: our own errors say what matters."""
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
    """Return the local folder of a model, which is downloaded if it is a hub name that is not in the cache.

    Args:
        path: Folder or hub name.
        key: Key of the parameter, such as `extract.model.path`, for messages.
        needs: Files that the folder must have.
        instead: Advice for users who cannot reach the hub; None means advice to use the built-in model.

    Returns:
        The folder.

    Raises:
        ModelError: The model is not found or not reachable, or its files are incomplete.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        built_in = f"use the built-in default, {key.removesuffix('.path')}: {{kind: lite}}"
        folder = _cached(path, needs) or _download(path, key, instead or built_in)
    missing = _missing(folder, needs)
    if missing:
        raise ModelError(f"{key}: {path}: missing in this folder: {'; '.join(missing)}; save the whole model there with save_pretrained")
    if (folder / "config.json").is_file():
        with reading(path, key, "config.json"):
            _check_config(json.loads((folder / "config.json").read_bytes()), path, key)
    return folder


def _check_config(config: object, path: str, key: str) -> None:
    """Refuse configs that ask for code or for absurd sizes: `trust_remote_code=False` does not reach every part of a config."""
    if not isinstance(config, dict):
        raise ModelError(f"{key}: {path}: config.json holds a {type(config).__name__}; expected a JSON object")
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        name, value = pending.pop()
        pending += value.items() if isinstance(value, dict) else ((name, each) for each in value) if isinstance(value, list) else ()
        if isinstance(value, dict) and "auto_map" in value:
            raise ModelError(f"{key}: {path}: {_CODE.format(what='a part of the model in config.json')}")
        most = MAX_LAYERS if "layers" in name or "depth" in name else MAX_SIZE
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > most and "theta" not in name:
            raise ModelError(f"{key}: {path}: config.json says {name} {value}; no model has more than {most}")
    backbone = config.get("backbone")
    if isinstance(backbone, str) and "/" in backbone and not config.get("backbone_config"):
        raise ModelError(
            f"{key}: {path}: config.json says backbone {backbone!r}, whose config transformers would download from the hub; load the "
            "model where there is a network, save it again with save_pretrained, which writes backbone_config, and name that folder"
        )
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(name, "")):
            raise ModelError(
                f"{key}: {path}: config.json says {name} {config[name]!r}, which is code from the hub and is not run; remove it"
            )


def _missing(folder: Path, needs: Needs) -> list[str]:
    return [what for what, patterns in needs.items() if not any(any(folder.glob(pattern)) for pattern in patterns)]


def _cached(path: str, needs: Needs) -> Path | None:
    """Return the folder in the hub's cache if it is complete. It is used without a network, so that every run has the same weights."""
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
            if _missing(folder, WEIGHTS):  # Older models have no safetensors. Fetching both formats at once would double the download.
                folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[*small, "pytorch_model*.bin"]))
    except HFValidationError:
        raise ModelError(f"{key}: {path}: no such folder, and not a hub name (OWNER/NAME)") from None
    except Exception as error:  # The hub client does not wrap the errors of its HTTP library, and all of them mean a failed download.
        raise ModelError(
            f"{key}: {path}: no such folder here, and it could not be fetched from the model hub: no network, or no such model "
            f"({type(error).__name__}). Without a network, {instead}, or copy the model's files (config, weights, tokenizer, preprocessor) "
            f"into a folder and set {key} to it"
        ) from None
    return folder


@contextmanager
def reading(path: str, key: str, what: str) -> Iterator[None]:
    """Turn every error of transformers inside the block into a ModelError.

    The errors that transformers raises for a damaged or unsuitable folder differ by family and version. Inside the block, transformers
    does not ask the user whether to run code either, not even for parts of a model to which it fails to pass on `trust_remote_code`.

    Args:
        path: Folder or hub name.
        key: Key of the parameter, for messages.
        what: Description of what is read, for messages.

    Raises:
        ModelError: Something inside the block raised an error.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{key}: {path}: {_explain(what, error)}") from error


def _explain(what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return _CODE.format(what=what)
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return f"{what} holds objects other than tensors, and unpickling those would run code, so it is not opened; save it as safetensors"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{what} cannot be read: {reason[0][:MAX_REASON]}{'...' if len(reason[0]) > MAX_REASON else ''}"


def load_config(folder: Path, path: str, key: str) -> Any:
    """Read the config of a model.

    Returns:
        The config, an object of transformers.

    Raises:
        ModelError: The config cannot be read.
    """
    with reading(path, key, "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def settings(config: Any) -> str:
    """Return a config as text, without the place that it was read from and the version that wrote it."""
    values = config.to_dict()
    return json.dumps(
        {name: values[name] for name in values.keys() - {"_name_or_path", "transformers_version"}}, sort_keys=True, default=str
    )


def load_weights(
    cls: Any,
    folder: Path,
    path: str,
    key: str,
    optional: str = "",
    dtype: torch.dtype = torch.float32,
    device_map: str | Mapping[str, int | str] | None = None,
) -> tuple[Any, set[str]]:
    """Load a transformers model, ready for inference.

    Transformers fills missing weights with random numbers and only logs a warning, and it names weights of a wrong shape only in its log.
    Here both are errors.

    Args:
        cls: Class of the model.
        folder: Folder from `locate`.
        path: Folder or hub name that the user gave.
        key: Key of the parameter, for messages.
        optional: Prefix of weights that may be missing.
        dtype: Data type of the weights.
        device_map: Devices of the sub-modules, as accelerate takes them; None loads the model on the CPU.

    Returns:
        The model, and the names of its missing weights.

    Raises:
        ModelError: The weights are damaged, incomplete, of another model, or of shapes that config.json does not expect.
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
            dtype=dtype,
            device_map=device_map,
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{key}: {path}: the weights {name} have the shape {list(found)}, but according to config.json {list(expected)}; "
            "do config.json and the weights belong to the same model?"
        )
    missing = set(info["missing_keys"])
    wrong = sorted(str(name) for name in missing if not (optional and name.startswith(optional)))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{key}: {path}: the weights lack {', '.join(wrong[:3])}{more}; is the file complete, and of this model?")
    return model.eval().requires_grad_(False), missing


def refuse_larger(cls: Any, config: Any, n_bytes: int, path: str, key: str) -> None:
    """Refuse a config whose model is much larger than its weights: transformers would allocate and initialise it before complaining.

    Args:
        cls: Class of the model.
        config: Config of the model.
        n_bytes: Size of the weights.
        path: Folder or hub name.
        key: Key of the parameter, for messages.

    Raises:
        ModelError: The model has more parameters than the weights can hold.
    """
    with torch.device("meta"):
        model = cls.from_config(config, trust_remote_code=False) if hasattr(cls, "from_config") else cls(config)
    n = sum(weight.numel() for weight in model.parameters())
    if n > NUMBERS_PER_BYTE * n_bytes + 2**24:
        raise ModelError(
            f"{key}: {path}: the model has {n} parameters according to config.json, but the weights hold at most "
            f"{NUMBERS_PER_BYTE * n_bytes}; do config.json and the weights belong to the same model?"
        )


def load_tokenizer(folder: Path, path: str, key: str) -> Any:
    """Load the tokenizer of a model.

    Returns:
        The tokenizer, an object of transformers.

    Raises:
        ModelError: The tokenizer cannot be read.
    """
    with reading(path, key, "the tokenizer"):
        # The class named in SigLIP's folders needs sentencepiece; their tokenizer.json is equivalent and does not.
        named = get_tokenizer_config(folder, local_files_only=True).get("tokenizer_class")
        cls: Any = PreTrainedTokenizerFast if named == "SiglipTokenizer" else AutoTokenizer
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
