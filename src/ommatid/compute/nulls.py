"""What is undefined is NaN in computing, and NULL in tables and JSON."""

import math
from collections.abc import Mapping

import pyarrow as pa
from torch import Tensor


def none_for_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same values, None where they are NaN."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def nullable(x: Tensor) -> pa.Array:
    """A column of float64, null where x is NaN."""
    return pa.array(x.double().numpy(), pa.float64(), from_pandas=True)
