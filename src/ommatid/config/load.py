"""Loading of params.yaml into `Params`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ommatid.config.messages import explain
from ommatid.config.params import Params
from ommatid.config.strict_yaml import parse_yaml
from ommatid.errors import ConfigError, without_credentials

LONGEST = 200
"""Largest number of characters of an override that an error message repeats."""


def load_params(path: Path = Path("params.yaml"), overrides: Iterable[str] = ()) -> Params:
    """Read a params file, apply overrides and validate the result.

    Args:
        path: Path of the file.
        overrides: Overrides such as "train.k=32".

    Returns:
        The params.

    Raises:
        ConfigError: A key is unknown, missing, of the wrong type or out of bounds; the message names every such key.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return make_params(values, f"{path}")


def make_params(values: dict[str, Any], origin: str) -> Params:
    """Validate a nested dict of values.

    Args:
        values: The values, by section and key.
        origin: Where the values came from, for messages.

    Returns:
        The params.

    Raises:
        ConfigError: As for `load_params`.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + explain(error, Params)) from None


def dotted(params: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten params to dotted keys, {"train.k": 32, ...}, as MLflow, `--set` and `dvc exp run -S` write them."""
    values = params.model_dump(mode="json") if isinstance(params, BaseModel) else params
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(dotted(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run in the checkout, or name one with --params FILE") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file with --params FILE") from None
    values = parse_yaml(text, f"{path}")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections {', '.join(Params.model_fields)}; found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Apply one override, whose value is read as YAML, so that `null`, `0.1` and `{kind: folder, path: x}` work."""
    where = f"--set {without_credentials(override)!r}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{where}: expected KEY=VALUE, such as train.k=32")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: {parent} is a value, not a section")
    place[last] = parse_yaml(text, where if len(where) < LONGEST else f"--set {key}")
