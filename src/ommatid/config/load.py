"""From params.yaml to `Params`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ommatid.config.params import Params
from ommatid.config.problems import explain
from ommatid.errors import ConfigError


def load_params(path: Path = Path("params.yaml"), overrides: Iterable[str] = ()) -> Params:
    """Read `path`, apply `overrides` such as "train.k=32", and check everything.

    Raises:
        ConfigError: naming every key that is unknown, missing, of the wrong type or out of bounds.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return make_params(values, f"{path}")


def make_params(values: dict[str, Any], origin: str) -> Params:
    """Check a nested dict of values; `origin` names where they came from in the error."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + explain(error, Params)) from None


def dotted(params: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to dotted keys: {"train.k": 32, ...}, as MLflow, `--set` and `dvc exp run -S` write them."""
    values = params.model_dump(mode="json") if isinstance(params, BaseModel) else params
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(dotted(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run in the checkout, or name one with --params FILE") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections {', '.join(Params.model_fields)}; found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key; the value is read as YAML, so `null`, `0.1` and `{kind: folder, path: x}` work."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, such as train.k=32")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
