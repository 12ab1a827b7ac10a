"""Validation of a profile's frames with Great Expectations, which no other file imports."""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # read at import; otherwise the library reports every run to its makers

import great_expectations as gx
import pandas as pd
from great_expectations import expectations as gxe

from ommatid.quality.base import SHOWN, Frames, Rule
from ommatid.quality.report import Check


def validate(frames: Frames, rules: list[Rule]) -> list[Check]:
    """Check each frame against its rules.

    Returns:
        One check for each rule whose frame exists and has columns, in the order of the rules.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}  # pyright: ignore[reportAttributeAccessIssue]
    source = context.data_sources.add_pandas("profile")
    checks: dict[int, Check] = {}
    for name, frame in frames.items():
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
        for index, rule in enumerate(rules):
            if rule.frame == name and len(frame.columns):
                checks[index] = _check(rule, frame, batch.validate(_expectation(rule), result_format=_result_format(rule)))
    return [checks[index] for index in sorted(checks)]


def _expectation(rule: Rule) -> Any:
    return getattr(gxe, rule.expectation)(column=rule.column, notes=rule.reason, **rule.arguments)


def _result_format(rule: Rule) -> dict[str, Any]:
    columns = [rule.row] if rule.first is None else [rule.row, rule.first]
    return {"result_format": "COMPLETE", "unexpected_index_column_names": columns}


def _check(rule: Rule, frame: pd.DataFrame, result: Any) -> Check:
    detail = "" if result.success else "; ".join(_failures(rule, result))
    return Check(rule.name, rule.reason, bool(result.success), _observed(rule, frame[rule.column]), detail, rule.sae)


def _failures(rule: Rule, result: Any) -> Iterator[str]:
    """Yield a text for each of the first SHOWN failing rows, and one with the number of any more."""
    rows = (result.result or {}).get("unexpected_index_list") or []
    if not rows:
        yield f"could not be checked: {result.exception_info}"
    for row in rows[:SHOWN]:
        first = f" (first: {row[rule.first]})" if rule.first and row[rule.first] else ""
        yield f"{_label(rule, row[rule.row])}: {rule.column} {_text(row[rule.column])}{first}"
    if len(rows) > SHOWN:
        yield f"and {len(rows) - SHOWN} more"


def _label(rule: Rule, value: Any) -> str:
    return f"{value}" if rule.row == "set" else f"{rule.row} {value}"


def _observed(rule: Rule, values: Any) -> str:
    """Return a text with the column, the range of its values and, if there are several rows, their number."""
    over = f" over {len(values)} {rule.row}s" if len(values) > 1 else ""
    return f"{rule.column}: {_range(values)}{over}"


def _range(values: Any) -> str:
    known = values.dropna()
    if known.empty:
        return "no rows" if values.empty else "only null"
    if pd.api.types.is_bool_dtype(known) or not pd.api.types.is_numeric_dtype(known):
        return ", ".join(value or "none" for value in sorted(known.astype(str).unique())[:5])
    low, high = _text(known.min()), _text(known.max())
    nulls = f", {len(values) - len(known)} null," if len(known) < len(values) else ""
    return (low if low == high else f"{low} to {high}") + nulls


def _text(value: Any) -> str:
    if value is None or value != value:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"
