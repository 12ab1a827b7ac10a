"""Loading a single SAE or model, without a study."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ommatid.sae.model import SAE
    from ommatid.vlm import Dtype, VisionModel


def load_sae(
    path: str | Path,
    *,
    format: str | None = None,
    hookpoint: str | None = None,
    model: str | None = None,
    target: str | None = None,
    values: Mapping[str, str] | None = None,
) -> "SAE":
    """Load an SAE from files of Ommatid, SAELens, dictionary_learning, sparsify, saev, sae-for-vlm or overcomplete.

    The arguments after `path` apply only to files of another library, which may lack these values.

    Args:
        path: A folder with sae.safetensors and cfg.json, or the folder or file that another library wrote.
        format: Name of the other library; None recognises it by the files.
        hookpoint: Hookpoint that the SAE encodes.
        model: Model that the SAE explains.
        target: Hookpoint that a transcoder decodes.
        values: Other values that the files lack, such as {"k": "32"}.

    Returns:
        The SAE, with its tensors on the CPU.

    Raises:
        ModelError: No SAE is there, or it cannot be read; the message says what was found.

    >>> import ommatid
    >>> run = ommatid.open_run("data")
    >>> sae = ommatid.load_sae(f"data/sae/{run.saes[0]}")
    >>> sae.W_enc.shape == (sae.d_model, sae.n_latents)
    True
    """
    from ommatid.sae.interop import Overrides, import_sae, is_native, load_native
    from ommatid.store import checked_folder

    path = Path(path).expanduser()
    if is_native(path):
        return load_native(checked_folder(path, "sae"))
    return import_sae(path, Overrides(hookpoint, model, target, values or {}), format)


def load_model(model: str, dtype: "Dtype" = "auto", device: str | None = None) -> "VisionModel":
    """Load a vision-language model to capture activations from.

    Args:
        model: lite0, lite2, a folder, a name on the model hub, or module:PACKAGE.MODULE:FUNCTION.
        dtype: Data type of the forward pass; auto is bfloat16 if the hardware supports it, else float32.
        device: Device, such as cpu or cuda; None: the GPU if there is one, else the CPU.

    Returns:
        The model, with its hookpoints and preprocessing.

    Raises:
        ModelError: The model's files cannot be found or used; the message says which and what to do.

    >>> import ommatid, numpy as np, torch
    >>> model = ommatid.load_model("lite0", dtype="float32")
    >>> pixels = torch.zeros(1, *model.preprocess.crop, 3, dtype=torch.uint8)
    >>> captured = model.capture(pixels, ["blocks.15"])
    >>> captured.tokens["blocks.15"].shape[2] == model.hookpoints["blocks.15"].d_model
    True
    """
    from ommatid.extract.networks import find_device
    from ommatid.vlm import load_model as load
    from ommatid.vlm.identify import identify

    return load(identify(model), dtype, device or find_device())
