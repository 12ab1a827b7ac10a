"""SAEs of the package saev 0.1: one file with a line of JSON, followed by a state dict."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ommatid.errors import ModelError
from ommatid.sae.interop.files import MAX_JSON, parse_json, read_pt
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.interop.weights import PLAIN, Folded, Kind, before_subtracting, float_tensors, make_sae, refuse_transcoder, take
from ommatid.sae.model import SAE

FILES: str = "sae.pt: a line of JSON, then a state dict"
TAKES: Mapping[str, str] = {}

NAME = "sae.pt"


def detect(path: Path) -> bool:
    """Return whether the path is a .pt file that begins with a JSON object, or a folder that holds such a file as sae.pt."""
    file = _locate(path)
    if file.suffix != ".pt" or not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(1) == b"{"


def read(path: Path, overrides: Overrides) -> SAE:
    """Read an SAE; fold b_dec, which saev subtracts from x.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `Format.read`, or the file was written by a later version of saev.
    """
    file = _locate(path)
    if not file.is_file():
        raise ModelError(f"{file}: missing; saev keeps an SAE in one file")
    with file.open("rb") as opened:
        header = parse_json(opened.readline(MAX_JSON), file)
        tensors = read_pt(io.BytesIO(opened.read()), file)
    _check_header(header, file)
    weights = take(tensors, PLAIN, file)
    folded = Folded(weights["W_enc"], weights["b_enc"], weights["W_dec"], weights["b_dec"]).after_subtracting(weights["b_dec"])
    return make_sae(folded, Kind("relu"), overrides, file)


def _locate(path: Path) -> Path:
    return path / NAME if path.is_dir() else path


def _check_header(header: dict[str, Any], file: Path) -> None:
    if "schema" in header:
        # Schemas 1 and 2 were each written both by code that subtracts b_dec from x and by code that does not.
        raise ModelError(
            f"{file}: has schema {header['schema']}, from a later saev, which does not record whether b_dec is subtracted from x; "
            "Ommatid reads saev 0.1. Write W_enc, b_enc, W_dec and b_dec in the format of SAELens, and set apply_b_dec_to_input there "
            "to what your version of saev does"
        )
    if "d_vit" not in header:
        raise ModelError(f"{file}: the first line lacks d_vit; the header of saev 0.1 has d_vit and exp_factor")


def write(sae: SAE, folder: Path) -> None:
    """Write a ReLU SAE, the only kind that saev 0.1 has.

    Raises:
        ModelError: The SAE has another activation or a threshold, is a transcoder, or its d_sae is not a multiple of d_model.
    """
    config = sae.config
    refuse_transcoder(sae, "saev")
    if config.activation != "threshold" or bool((sae.threshold > 0).any()):
        kind = "a threshold" if config.activation == "threshold" else config.activation
        raise ModelError(f"saev 0.1 has ReLU only, and this SAE has {kind}; write it as saelens or dictionary_learning")
    if config.d_sae % config.d_model:
        raise ModelError(f"saev needs d_sae to be a multiple of d_model, and here they are {config.d_sae} and {config.d_model}")
    weights = float_tensors(sae)
    state = {"W_enc": weights["W_enc"], "b_enc": before_subtracting(sae), "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    header = f'{{"d_vit": {config.d_model}, "exp_factor": {config.d_sae // config.d_model}}}\n'
    (folder / NAME).write_bytes(header.encode() + buffer.getvalue())
