"""From another library's SAE to Ommatid's, and back: which format, and what it takes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.sae.interop import dictionary_learning, overcomplete, sae_for_vlm, saelens, saev, sparsify
from ommatid.sae.interop.files import read_json
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.model import CONFIG, SAE, WEIGHTS

K = {"k": "mean number of latents that fire a token"}


class Format(Protocol):
    """One library's way to keep an SAE: a module of this package."""

    FILES: str
    """What it looks like on disk, in words."""
    TAKES: Mapping[str, str]
    """Values that the user may have to say, and what each means."""

    def detect(self, path: Path) -> bool:
        """Does this folder or file look like it? Names and headers are looked at, weights only where there is nothing else."""
        ...

    def read(self, path: Path, overrides: Overrides) -> SAE:
        """Read and fold.

        Raises:
            ModelError: a file is missing or damaged, or holds what Ommatid's form cannot say.
        """
        ...

    def write(self, sae: SAE, folder: Path) -> None:
        """Write files that the library's own loader opens.

        Raises:
            ModelError: the library has no such SAE.
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
"""By name, in the order in which they are looked for."""


def import_sae(path: Path, overrides: Overrides | None = None, format_name: str | None = None) -> SAE:
    """Read another library's SAE: acts and reconstruction are those that its own loader gives.

    `config.k` is 0 where neither the files nor `overrides` say how many latents fire: see `with_measured_k`.

    Args:
        path: A folder or file.
        overrides: What the files don't say.
        format_name: One of FORMATS; None finds it.

    Raises:
        ModelError: nothing known is there, or it cannot be read or represented: the message says what it is and what can be done.
    """
    name = format_name or find_format(path)
    overrides = overrides or Overrides()
    overrides.check({**K, **_format(name).TAKES}, name)
    return _format(name).read(path, overrides)


def export_sae(sae: SAE, format_name: str, folder: Path) -> None:
    """Write an SAE into `folder` so that the library's own loader opens it and computes the same.

    Raises:
        ModelError: the library has no such SAE, or the folder holds one of Ommatid's.
    """
    form = _format(format_name)
    if is_native(folder):
        raise ModelError(f"{folder}: holds an SAE of Ommatid, which the files of {format_name} might replace; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    form.write(sae, folder)


def write_native(sae: SAE, folder: Path) -> None:
    """Write sae.safetensors and cfg.json.

    Raises:
        ModelError: the folder holds another library's, whose files have the same names.
    """
    if (folder / CONFIG).exists() and not is_native(folder):
        raise ModelError(f"{folder}: {CONFIG} of another library is there, and would be replaced; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    sae.save(folder / WEIGHTS, folder / CONFIG)


def load_native(folder: Path) -> SAE:
    """Read sae.safetensors and cfg.json.

    Raises:
        ModelError: they are not there.
    """
    if not is_native(folder):
        raise ModelError(f"{folder}: no SAE of Ommatid; it has {WEIGHTS} and {CONFIG}")
    return SAE.load(folder)


def find_format(path: Path) -> str:
    """The name of the format that a folder or file has.

    Raises:
        ModelError: it has none that is known here; the message names those inside, or all that are known.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if is_native(path):
        raise ModelError(f"{path}: an SAE of Ommatid already; use it as it is")
    if name := _detect(path):
        return name
    raise ModelError(f"{path}: {_what_else(path)}")


def with_measured_k(sae: SAE, sample_nd: Tensor) -> SAE:
    """The same SAE, whose k is the mean number of latents that fire on a sample of activations (tokens, d_model).

    A TopK SAE is as it is: its k is part of what it computes.
    """
    if sae.config.activation == "topk":
        return sae
    with torch.inference_mode():
        firing = sum(int((sae.encode(x_bd) > 0).sum()) for x_bd in sample_nd.split(1024))
    config = replace(sae.config, k=max(1, round(firing / len(sample_nd))))
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
    """Sparsify has files of the same names."""
    has_files = (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
    return has_files and {"variant", "d_model", "hookpoint"} <= read_json(path / CONFIG).keys()


def _known() -> str:
    return "known are " + "; ".join(f"{name} ({form.FILES})" for name, form in FORMATS.items())


def _what_else(path: Path) -> str:
    """Folders inside that hold SAEs, or the files that are there."""
    if path.is_file():
        return f"not an SAE of a library that is known; {_known()}"
    inside = sorted(child for child in path.iterdir() if child.is_dir())
    if found := [child.name for child in inside if _looks_like_one(child)]:
        return f"holds SAEs in {', '.join(found[:10])}{' and more' if len(found) > 10 else ''}: name one of these folders"
    names = sorted(child.name for child in path.iterdir())
    return f"no SAE of a library that is known among {', '.join(names[:10])}; {_known()}" if names else "an empty folder"
