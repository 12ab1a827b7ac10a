"""Conversion of undefined values, which are NaN in computations and NULL in tables and JSON."""

import math
from collections.abc import Mapping

import pyarrow as pa
from torch import Tensor


def none_for_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return the values with NaN replaced by None."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def nullable(x: Tensor) -> pa.Array:
    """Return x as a column of float64, with null where x is NaN."""
    return pa.array(x.double().numpy(), pa.float64(), from_pandas=True)
