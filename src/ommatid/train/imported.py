"""Import of an SAE that another library trained, in place of training one: it is loaded, checked against the activations, and measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
from jaxtyping import Float

from ommatid import schemas
from ommatid.activations.batches import load_sample
from ommatid.config import Imported, TrainParams
from ommatid.errors import ModelError
from ommatid.metrics import Fidelity
from ommatid.sae.interop import Overrides, import_sae, is_native, load_native, with_measured_k
from ommatid.sae.learner import histograms
from ommatid.sae.model import CONFIG, SAE, WEIGHTS
from ommatid.sae.weights import Weights
from ommatid.store import Artefact, Draft, checked_folder
from ommatid.summaries import SAESummary

SAMPLE = 16384
"""Number of training tokens on which an imported SAE is measured."""


def write_imported(name: str, params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Write an imported SAE into a child artefact of the training.

    The parameters in its manifest have the `d_sae` and `k` of the SAE itself, and its curves are a single measurement.

    Args:
        name: Folder name of the SAE.
        params: Training parameters of the SAE.
        inputs: The activations that it encodes (`extract`) and, for a transcoder, those that it decodes (`target`).
        draft: Draft of the training.

    Returns:
        The sealed child artefact; one that an earlier, killed run sealed is returned as it is.

    Raises:
        ModelError: The SAE cannot be read, or its widths are not those of the activations.
    """
    assert isinstance(params.variant, Imported), params.variant
    sae = _load(params.variant, inputs)
    x = load_sample(inputs["extract"], SAMPLE)
    target = load_sample(inputs["target"], SAMPLE) if "target" in inputs else x
    _check_widths(sae, params.variant.path, x, target)
    if not sae.config.k:
        sae = with_measured_k(sae, x)
    actual = params.model_copy(update={"d_sae": sae.config.d_sae, "k": sae.config.k})
    child = draft.child(name, "sae", actual.identity(), inputs)
    return child.sealed() or _write(name, sae, x, target, child)


def _load(variant: Imported, inputs: Mapping[str, Artefact]) -> SAE:
    """Load the SAE, with the hookpoint and the model of the activations in place of those that its files may name or lack."""
    activations, path = inputs["extract"].summary, Path(variant.path).expanduser()
    target = inputs["target"].summary["hookpoint"] if "target" in inputs else None
    if is_native(path):
        sae = load_native(checked_folder(path, "sae"))
    else:
        sae = import_sae(path, Overrides(activations["hookpoint"], activations["model"], target, variant.values), variant.format)
    return SAE(replace(sae.config, hookpoint=activations["hookpoint"], model=activations["model"], target=target), **sae.tensors())


def _check_widths(sae: SAE, path: str, x: Float[torch.Tensor, "tokens d_model"], target: Float[torch.Tensor, "tokens d_out"]) -> None:
    found, required = (sae.W_enc.shape[0], sae.d_out), (x.shape[1], target.shape[1])
    if found != required:
        raise ModelError(
            f"train.variant.path: {path}: the SAE encodes activations of width {found[0]} and decodes to width {found[1]}, but the "
            f"activations have width {required[0]}, to be decoded to width {required[1]}; extract with the model and at the hookpoint "
            "that it was trained on"
        )


def _write(
    name: str, sae: SAE, x: Float[torch.Tensor, "tokens d_model"], target: Float[torch.Tensor, "tokens d_out"], draft: Draft
) -> Artefact:
    with draft.write_file(WEIGHTS) as weights, draft.write_file(CONFIG) as cfg:
        sae.save(weights, cfg)
    fidelity, firings = Fidelity(), torch.zeros(sae.config.d_sae, dtype=torch.int64)
    for x_bd, target_bd in zip(x.split(1024), target.split(1024), strict=True):
        acts = sae.encode(x_bd)
        fidelity.add(target_bd, sae.decode(acts), int((acts > 0).sum()))
        firings += (acts > 0).sum(0)
    dead = (firings == 0).nonzero()[:, 0].tolist()
    raw_weights = Weights(sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)
    row = {"step": 0, "tokens": 0, "loss": None, "fvu": fidelity.fvu, "l0": fidelity.l0, "dead": len(dead) / sae.config.d_sae, "lr": None}
    draft.write_table("curves.parquet", pa.table({key: [row[key]] for key in schemas.CURVES.names}, schema=schemas.CURVES))
    summary = SAESummary(
        sae=f"{name}-{draft.describe(WEIGHTS).sha256[:8]}",
        n_steps=0,
        n_tokens=0,
        fvu=fidelity.fvu,
        l0=fidelity.l0,
        dead=row["dead"],
        dead_latents=dead,
        dead_after=len(x),
        threshold=float(sae.threshold.mean()),
        scale=1.0,
        histograms=histograms(raw_weights, firings.double() / len(x)),
    )
    return draft.seal(summary)
