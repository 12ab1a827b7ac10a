"""SAEs of EleutherAI's sparsify (PyPI eai-sparsify): cfg.json and sae.safetensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from ommatid.errors import ModelError
from ommatid.sae.interop.files import number, parse_json, read_json, read_safetensors, write_json
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.interop.weights import Folded, Kind, Shape, before_subtracting, float_tensors, make_sae, take
from ommatid.sae.model import SAE

FILES: str = "cfg.json with d_in, and sae.safetensors"
TAKES: Mapping[str, str] = {}

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
SHAPES: dict[str, Shape] = {"encoder.weight": ("d_sae", "d_in"), "encoder.bias": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}


def detect(path: Path) -> bool:
    """Return whether the path is a folder with sae.safetensors and a cfg.json that has d_in."""
    if not (path / WEIGHTS).is_file() or not (path / CONFIG).is_file():
        return False
    return "d_in" in parse_json((path / CONFIG).read_bytes(), path / CONFIG)


def read(path: Path, overrides: Overrides) -> SAE:
    """Read an SAE; fold b_dec, which an autoencoder subtracts from x.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `Format.read`; or the SAE is a GroupMax SAE, or has a skip connection.
    """
    cfg = read_json(path / CONFIG)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise ModelError(
            f"{path / CONFIG}: activation is {activation}, with which the largest latent of each group fires; Ommatid reads topk"
        )
    tensors = read_safetensors(path / WEIGHTS)
    if cfg.get("skip_connection") or "W_skip" in tensors:
        raise ModelError(f"{path}: a transcoder with a skip connection adds x W_skip to its reconstruction, which no latent explains")
    weights = take(tensors, SHAPES, path / WEIGHTS)
    folded = Folded(weights["encoder.weight"].T, weights["encoder.bias"], weights["W_dec"], weights["b_dec"])
    is_transcoder = bool(cfg.get("transcode", False))
    if not is_transcoder:
        folded = folded.after_subtracting(folded.b_dec)
    kind = Kind(
        "topk",
        "topk",
        number(cfg, "k", path / CONFIG),
        hookpoint=path.resolve().name if _is_hookpoint(path) else None,
        is_transcoder=is_transcoder,
    )
    return make_sae(folded, kind, overrides, path)


def _is_hookpoint(path: Path) -> bool:
    """Return whether the folder is named after a hookpoint: sparsify names it after the module, such as layers.11 or layers.11.mlp."""
    return "." in path.resolve().name


def write(sae: SAE, folder: Path) -> None:
    """Write a TopK autoencoder, or a TopK transcoder whose two hookpoints have the same width.

    Raises:
        ModelError: The SAE has another activation, or is a transcoder between different widths.
    """
    config = sae.config
    if config.activation != "topk":
        raise ModelError(f"sparsify has TopK only, and this SAE is {config.activation}; write it as saelens or dictionary_learning")
    if sae.d_out != config.d_model:
        raise ModelError(
            f"a transcoder of sparsify has one width for both hookpoints, and this one goes from {config.d_model} to {sae.d_out}"
        )
    is_transcoder = config.target is not None
    weights = float_tensors(sae)
    b_enc = weights["b_enc"] if is_transcoder else before_subtracting(sae)
    encoder = {"encoder.weight": weights["W_enc"].T.contiguous(), "encoder.bias": b_enc}
    save_file({**encoder, "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}, folder / WEIGHTS)
    cfg = {"activation": "topk", "num_latents": config.d_sae, "k": config.k, "d_in": config.d_model}
    write_json(folder / CONFIG, cfg | {"normalize_decoder": True, "skip_connection": False, "transcode": is_transcoder})
