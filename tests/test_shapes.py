"""Proves that tests check the shapes of annotated tensors and name argument and axes, and that nothing is checked at run time."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from ommatid.extract.tokens import draw_kept
from ommatid.images.eval_split import EvalSplit
from ommatid.metrics import Fidelity, uniqueness
from ommatid.sae.model import SAE, SAEConfig
from ommatid.sae.step import Batch
from ommatid.vlm.precision import normalise
from ommatid.vlm.preprocess import Preprocess
from support.shapes import check

D_MODEL, D_SAE = 3, 5


def _sae() -> SAE:
    config = SAEConfig("topk", D_MODEL, D_SAE, 1, "head", "tiny")
    return SAE(config, torch.ones(D_MODEL, D_SAE), torch.zeros(D_SAE), torch.ones(D_SAE, D_MODEL), torch.zeros(D_MODEL), torch.tensor(0.0))


def test_an_activation_of_another_width_is_named() -> None:
    with pytest.raises(TypeCheckError, match=r"(?s)SAE\.encode.*'x_bd'.*f32\[2,4\].*d_model"):
        _sae().encode(torch.ones(2, D_MODEL + 1))


def test_weights_that_disagree_are_named() -> None:
    with pytest.raises(TypeCheckError, match=r"(?s)'W_dec'.*d_sae d_out.*d_sae=5"):
        SAE(_sae().config, torch.ones(3, 5), torch.zeros(5), torch.ones(6, 3), torch.zeros(3), torch.tensor(0.0))


def test_two_arguments_of_different_batches_are_named() -> None:
    with pytest.raises(TypeCheckError, match=r"(?s)'x_hat_bd'.*batch=2"):
        Fidelity().add(torch.ones(2, 3), torch.ones(4, 3), 1)


def test_a_field_of_another_shape_is_named() -> None:
    with pytest.raises(TypeCheckError, match=r"(?s)batch d_out"):
        Batch(torch.ones(2, 3), torch.ones(4, 3))


def test_another_dtype_is_named() -> None:
    with pytest.raises(TypeCheckError, match=r"(?s)'images_sn'.*Int"):
        uniqueness(torch.ones(2, 3))
    square = Preprocess((8,), (8, 8), "bicubic", (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(TypeCheckError, match=r"(?s)'pixels'.*UInt8.*batch height width 3"):
        normalise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), square, "cpu")


def test_arrays_outside_of_models_and_metrics_are_named() -> None:
    with pytest.raises(TypeCheckError, match=r"(?s)draw_kept.*'tokens_btd'.*f32\[2,3\].*images tokens d_model"):
        draw_kept(torch.ones(2, 3), None, None, np.random.default_rng(0))
    with pytest.raises(TypeCheckError, match=r"(?s)'is_held_out'.*bool\[2\].*rows=3"):
        EvalSplit(np.arange(3), np.zeros(2, dtype=bool))


def test_functions_inside_others_are_checked_each_time_that_they_are_made() -> None:
    for n in (2, 3):

        @jaxtyped(typechecker=check)
        def shifted(x: Float[Tensor, f"rows {n}"], by: float = 1.0) -> Float[Tensor, f"rows {n}"]:
            return x + by if by < n else x.T  # noqa: B023

        assert torch.equal(shifted(torch.zeros(5, n)), torch.ones(5, n))
        with pytest.raises(TypeCheckError, match=r"(?s)shifted.*'x'.*f32\[5,7\]"):
            shifted(torch.zeros(5, 7))
        with pytest.raises(TypeCheckError, match=rf"(?s)the return value of .*shifted.*f32\[{n},5\]"):
            shifted(torch.zeros(5, n), 4.0)


def test_nothing_is_checked_at_run_time() -> None:
    code = (
        "import sys, torch; from ommatid.metrics import unit; unit(torch.ones(2, 3, 4)); assert not {'beartype', 'jax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
