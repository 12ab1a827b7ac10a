"""Conversion between another library's SAEs and Ommatid's: detection of formats, import and export."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop import dictionary_learning, overcomplete, sae_for_vlm, saelens, saev, sparsify
from ommatid.sae.interop.files import read_json
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.model import CONFIG, SAE, WEIGHTS

K = {"k": "mean number of latents that fire per token"}
"""The value that every format accepts, like those in `Format.TAKES`."""


class Format(Protocol):
    """A library's file format for SAEs. Each is a module of this package."""

    FILES: str
    """Description of the files, for messages."""
    TAKES: Mapping[str, str]
    """Values that the user can give because files may lack them: their names, and what they mean."""

    def detect(self, path: Path) -> bool:
        """Return whether a folder or file has this format, judged by names and headers, and by weights only if those are ambiguous."""
        ...

    def read(self, path: Path, overrides: Overrides) -> SAE:
        """Read an SAE, and fold its biases and scales so that it has the form of `ommatid.sae.model.SAE`.

        Args:
            path: Folder or file.
            overrides: Values that the user gives.

        Returns:
            The SAE.

        Raises:
            ModelError: A file is missing or damaged, or holds an SAE that this form cannot represent.
        """
        ...

    def write(self, sae: SAE, folder: Path) -> None:
        """Write files that the library's own loader opens.

        Raises:
            ModelError: The library cannot represent the SAE.
        """
        ...


FORMATS: dict[str, Format] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "saev": saev,
    "sae_for_vlm": sae_for_vlm,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
}
"""Formats by name, in the order in which they are tried."""


def import_sae(path: Path, overrides: Overrides | None = None, format_name: str | None = None) -> SAE:
    """Read another library's SAE. Its activations and reconstructions equal those of the library's own loader.

    Args:
        path: Folder or file.
        overrides: Values that the files lack, or that replace those in the files.
        format_name: A key of `FORMATS`; None means that the format is detected.

    Returns:
        The SAE. Its `config.k` is 0 if neither the files nor `overrides` give it: see `with_measured_k`.

    Raises:
        ModelError: The path holds no SAE in a known format, or one that cannot be read or represented.
    """
    name = format_name or find_format(path)
    overrides = overrides or Overrides()
    overrides.check({**K, **_format(name).TAKES}, name)
    return _format(name).read(path, overrides)


def export_sae(sae: SAE, format_name: str, folder: Path) -> None:
    """Write an SAE as files for another library. Its own loader opens them, and the loaded SAE computes the same values.

    Args:
        sae: The SAE.
        format_name: A key of `FORMATS`.
        folder: Folder to write, created if it does not exist.

    Raises:
        ModelError: The library cannot represent the SAE, or the folder holds an SAE in Ommatid's format.
    """
    form = _format(format_name)
    if is_native(folder):
        raise ModelError(f"{folder}: holds an SAE in Ommatid's format, which files of {format_name} could overwrite; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    form.write(sae, folder)


def write_native(sae: SAE, folder: Path) -> None:
    """Write an SAE in Ommatid's own format: sae.safetensors and cfg.json.

    Raises:
        ModelError: The folder holds another library's SAE, which could be overwritten because its files may have the same names.
    """
    if (folder / CONFIG).exists() and not is_native(folder):
        raise ModelError(f"{folder}: holds another library's {CONFIG}, which would be overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    sae.save(folder / WEIGHTS, folder / CONFIG)


def load_native(folder: Path) -> SAE:
    """Read an SAE in Ommatid's own format.

    Returns:
        The SAE.

    Raises:
        ModelError: The folder holds no such SAE.
    """
    if not is_native(folder):
        raise ModelError(f"{folder}: holds no SAE in Ommatid's format, which consists of {WEIGHTS} and {CONFIG}")
    return SAE.load(folder)


def find_format(path: Path) -> str:
    """Detect the format of a folder or file.

    Returns:
        A key of `FORMATS`.

    Raises:
        ModelError: The path has no known format, or already has Ommatid's. The message names sub-folders that hold SAEs, or else all
            known formats.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if is_native(path):
        raise ModelError(f"{path}: is already in Ommatid's format; use it as it is")
    if name := _detect(path):
        return name
    raise ModelError(f"{path}: {_explain_undetected(path)}")


def with_measured_k(sae: SAE, sample_nd: Float[Tensor, "tokens d_model"]) -> SAE:
    """Return the same SAE with k set to the mean number of latents that fire on a sample of activations, `(tokens, d_model)`.

    A TopK SAE is returned unchanged, because it selects latents by its k.
    """
    if sae.config.activation == "topk":
        return sae
    with torch.inference_mode():
        n_firings = sum(int((sae.encode(x_bd) > 0).sum()) for x_bd in sample_nd.split(1024))
    config = replace(sae.config, k=max(1, round(n_firings / len(sample_nd))))
    return SAE(config, **sae.tensors())


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ModelError(f"format {name!r} is not known; {_known()}")
    return FORMATS[name]


def _detect(path: Path) -> str | None:
    return next((name for name, form in FORMATS.items() if form.detect(path)), None)


def _looks_like_one(path: Path) -> bool:
    try:
        return _detect(path) is not None
    except ModelError:
        return False


def is_native(path: Path) -> bool:
    """Return whether a folder holds an SAE in Ommatid's own format. Sparsify's files have the same names, so keys decide."""
    has_files = (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
    return has_files and {"variant", "d_model", "hookpoint"} <= read_json(path / CONFIG).keys()


def _known() -> str:
    return "known formats are " + "; ".join(f"{name} ({form.FILES})" for name, form in FORMATS.items())


def _explain_undetected(path: Path) -> str:
    """Explain why no format was detected: name the sub-folders that hold SAEs, or else the files found."""
    if path.is_file():
        return f"not an SAE of a known library; {_known()}"
    inside = sorted(child for child in path.iterdir() if child.is_dir())
    if found := [child.name for child in inside if _looks_like_one(child)]:
        return f"holds SAEs in {', '.join(found[:10])}{' and more' if len(found) > 10 else ''}: name one of these folders"
    names = sorted(child.name for child in path.iterdir())
    return f"no SAE of a known library among {', '.join(names[:10])}; {_known()}" if names else "an empty folder"
