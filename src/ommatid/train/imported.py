"""An SAE that another library trained, in place of one that stage `train` trains: read, held against the activations, measured once."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch

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
"""Training tokens on which it is measured."""


def write_imported(name: str, params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Put it into the child artefact `name`, with the d_sae and k that it has and one measurement in place of curves.

    Raises:
        ModelError: it cannot be read, or is not of the width of the activations.
    """
    assert isinstance(params.variant, Imported), params.variant
    sae = _load(params.variant, inputs)
    x = load_sample(inputs["extract"], SAMPLE)
    target = load_sample(inputs["target"], SAMPLE) if "target" in inputs else x
    _check_widths(sae, params.variant.path, x, target)
    if not sae.config.k:
        sae = with_measured_k(sae, x)
    own = params.model_copy(update={"d_sae": sae.config.d_sae, "k": sae.config.k})
    child = draft.child(name, "sae", own.identity())
    return child.sealed() or _write(name, sae, x, target, child)


def _load(variant: Imported, inputs: Mapping[str, Artefact]) -> SAE:
    """What the files don't say of hookpoint and model, the activations do."""
    seen, path = inputs["extract"].summary, Path(variant.path).expanduser()
    target = inputs["target"].summary["hookpoint"] if "target" in inputs else None
    if is_native(path):
        sae = load_native(checked_folder(path, "sae"))
    else:
        sae = import_sae(path, Overrides(seen["hookpoint"], seen["model"], target, variant.values), variant.format)
    return SAE(replace(sae.config, hookpoint=seen["hookpoint"], model=seen["model"], target=target), **sae.tensors())


def _check_widths(sae: SAE, path: str, x: torch.Tensor, target: torch.Tensor) -> None:
    found, wanted = (sae.W_enc.shape[0], sae.d_out), (x.shape[1], target.shape[1])
    if found != wanted:
        raise ModelError(
            f"train.variant.path: {path}: encodes activations of width {found[0]} and decodes {found[1]}; those at hand are of width "
            f"{wanted[0]}, to be decoded to {wanted[1]}; extract at the hookpoint that it was trained on, with the same model"
        )


def _write(name: str, sae: SAE, x: torch.Tensor, target: torch.Tensor, draft: Draft) -> Artefact:
    with draft.write_file(WEIGHTS) as weights, draft.write_file(CONFIG) as cfg:
        sae.save(weights, cfg)
    fidelity, firings = Fidelity(), torch.zeros(sae.config.d_sae, dtype=torch.int64)
    for x_bd, target_bd in zip(x.split(1024), target.split(1024), strict=True):
        acts = sae.encode(x_bd)
        fidelity.add(target_bd, sae.decode(acts), int((acts > 0).sum()))
        firings += (acts > 0).sum(0)
    dead = (firings == 0).nonzero()[:, 0].tolist()
    weights_of = Weights(sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)
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
        histograms=histograms(weights_of, firings.double() / len(x)),
    )
    return draft.seal(summary)
