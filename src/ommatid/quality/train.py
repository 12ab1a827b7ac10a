"""Profile and rules of the stage `train`: the SAE's tensors are complete, it learned something, and it is as sparse as requested."""

from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from ommatid.config import Params, TrainParams
from ommatid.quality.base import Frames, Rule, filled, one_of, within, zero
from ommatid.store import Artefact

_TENSORS = {"W_enc": ("ms",), "b_enc": ("s",), "W_dec": ("so",), "b_dec": ("o",), "threshold": ("", "s")}
"""Shapes that each tensor may have, with one letter for each dimension.

m is d_model, s is d_sae, and o is the width of the reconstruction, which differs from d_model only in a transcoder.
"""
_GATED = {"gate_scale": ("s",), "gate_shift": ("s",)}
"""Additional tensors of a gated SAE."""


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames of an SAE.

    They are `tensors` (one row for each tensor), `directions` (one for each latent), `final` (the last row of the curves) and `counts`
    (one row).
    """
    path = artefact.file("sae.safetensors")
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        is_gated = params.train.variant.kind == "gated" or _GATED.keys() & names
        shapes = _TENSORS | (_GATED if is_gated else {})
        sizes = _sizes(file, names, params.train)
        tensors = pd.DataFrame(
            [_tensor(file, names, name, [[sizes[letter] for letter in shape] for shape in shapes[name]]) for name in shapes]
        )
        norms = np.linalg.norm(file.get_tensor("W_dec"), axis=1) if "W_dec" in names else np.empty(0)
    curves = artefact.read("curves").to_pandas() if "curves" in artefact.tables else pd.DataFrame(columns=["step", "fvu", "l0", "dead"])
    directions = pd.DataFrame({"latent": np.arange(len(norms)), "norm": norms.astype(np.float64)})
    counts = pd.DataFrame([{"table": "curves", "rows": len(curves)}])
    return {"tensors": tensors, "directions": directions, "final": curves.tail(1).reset_index(drop=True), "counts": counts}


def _sizes(file: Any, names: set[str], params: TrainParams) -> dict[str, int | None]:
    """Return the size that each letter of a shape stands for; None if the tensor that determines it is missing."""
    d_out = file.get_slice("b_dec").get_shape()[0] if "b_dec" in names else None
    d_in = file.get_slice("W_enc").get_shape()[0] if "W_enc" in names else None
    return {"m": d_out if params.target is None else d_in, "s": params.d_sae, "o": d_out}


def _tensor(file: Any, names: set[str], name: str, shapes: list[list[int | None]]) -> dict[str, Any]:
    if name not in names:
        return {"tensor": name, "problem": "missing", "values not finite": 0}
    value = file.get_tensor(name)
    fits = list(value.shape) in shapes and value.dtype == np.float32
    problem = "" if fits else f"{value.dtype} {list(value.shape)}, expected float32 {' or '.join(map(str, shapes))}"
    return {"tensor": name, "problem": problem, "values not finite": int(value.size - np.isfinite(value).sum())}


def rules(params: Params) -> list[Rule]:
    """Make the rules under which an SAE is complete, has learned something, and is as sparse as requested."""
    last = {"row": "step"}
    return [
        one_of(
            "tensors",
            "problem",
            [""],
            "every tensor is present in its expected shape",
            "later stages and other tools rebuild the SAE from these tensors alone",
            row="tensor",
        ),
        zero("tensors", "values not finite", "weights are finite", "one NaN makes every latent NaN for every token", row="tensor"),
        *([_unit_directions()] if params.train.variant.has_unit_directions else []),
        within(
            "counts", "rows", "there is a training curve", "without a curve nobody can tell how training went", row="table", min_value=1
        ),
        filled("final", "fvu", "the final FVU is a number", "NaN means that training diverged", **last),
        within(
            "final",
            "fvu",
            "the final FVU is below 1",
            "predicting the mean has an FVU of 1: an SAE that is no better explains nothing",
            max_value=1,
            strict_max=True,
            **last,
        ),
        *([_near_k(params.train.k)] if params.train.aims_at_k else []),
        within(
            "final",
            "dead",
            "few latents are dead",
            f"a share of dead latents above train.max_dead ({params.train.max_dead:g}) is capacity that is paid for but not used",
            max_value=params.train.max_dead,
            **last,
        ),
    ]


def _unit_directions() -> Rule:
    return within(
        "directions",
        "norm",
        "directions have unit norm",
        "activations of different latents can be compared only if their directions are equally long",
        row="latent",
        min_value=1 - 1e-3,
        max_value=1 + 1e-3,
    )


def _near_k(k: int) -> Rule:
    return within(
        "final",
        "l0",
        "L0 is near k",
        f"train.k requests {k} active latents a token; with less than half or more than twice as many it is a different SAE",
        row="step",
        min_value=k / 2,
        max_value=k * 2,
    )
