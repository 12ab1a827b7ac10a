"""What is checked of a trained SAE: its tensors are whole, it learned something, and it is as sparse as asked."""

from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from ommatid.config import Params, TrainParams
from ommatid.quality.base import Frames, Rule, filled, one_of, within, zero
from ommatid.store import Artefact

_TENSORS = {"W_enc": ("ms",), "b_enc": ("s",), "W_dec": ("so",), "b_dec": ("o",), "threshold": ("", "s")}
"""Shapes that each tensor may have, one letter a dimension.

m is d_model, s is d_sae, and o is the width of what is decoded, which only in a transcoder may differ from d_model.
"""
_GATED = {"gate_scale": ("s",), "gate_shift": ("s",)}
"""Tensors that a gated SAE has besides."""


def profile(artefact: Artefact, params: Params) -> Frames:
    """Frames `tensors` (one row a tensor), `directions` (one a latent), `final` (the last row of the curves) and `counts` (one row)."""
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
    """Size of each letter of a shape; None where the tensor that has it is missing."""
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
    """Rules under which the SAE is whole, learned something, and is as sparse as asked."""
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
        zero("tensors", "values not finite", "weights are finite", "one NaN makes every latent of every token NaN", row="tensor"),
        *([_unit_directions()] if params.train.variant.has_unit_directions else []),
        within("counts", "rows", "there is a training curve", "without a curve nobody can say how training went", row="table", min_value=1),
        filled("final", "fvu", "the final FVU is a number", "NaN means that training diverged", **last),
        within(
            "final",
            "fvu",
            "the final FVU is below 1",
            "1 is what predicting the mean gives: above it the SAE explains nothing",
            max_value=1,
            strict_max=True,
            **last,
        ),
        *([_near_k(params.train.k)] if params.train.aims_at_k else []),
        within(
            "final",
            "dead",
            "few latents are dead",
            f"more than train.max_dead ({params.train.max_dead:g}) dead is capacity paid for and not used",
            max_value=params.train.max_dead,
            **last,
        ),
    ]


def _unit_directions() -> Rule:
    return within(
        "directions",
        "norm",
        "directions have unit norm",
        "activations of different latents compare only when their directions are equally long",
        row="latent",
        min_value=1 - 1e-3,
        max_value=1 + 1e-3,
    )


def _near_k(k: int) -> Rule:
    return within(
        "final",
        "l0",
        "L0 is near k",
        f"train.k asked for {k} latents a token; half or twice as many is another SAE than asked for",
        row="step",
        min_value=k / 2,
        max_value=k * 2,
    )
