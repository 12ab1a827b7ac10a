"""Values that the user gives for an imported SAE because its files lack them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ommatid.errors import ModelError


@dataclass(frozen=True)
class Overrides:
    """Values that the user gives; they take precedence over those in the files."""

    hookpoint: str | None = None
    """Hookpoint whose activations are encoded."""
    model: str | None = None
    """Name of the model that the activations come from."""
    target: str | None = None
    """Hookpoint whose activations a transcoder decodes."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Other values, by name, such as k or scaling_factor. Each format lists those that it takes in `Format.TAKES`."""

    def integer(self, name: str) -> int | None:
        """Return a value as a whole number, or None if it was not given.

        Raises:
            ModelError: The value is not a whole number above 0.
        """
        value = self.values.get(name)
        if value is not None and (not value.isdecimal() or int(value) == 0):
            raise ModelError(f"{name}: {value!r} is not a whole number above 0")
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """Return a value as a number, or None if it was not given.

        Raises:
            ModelError: The value is not a number.
        """
        try:
            return float(self.values[name]) if name in self.values else None
        except ValueError:
            raise ModelError(f"{name}: {self.values[name]!r} is not a number") from None

    def choice(self, name: str, allowed: Mapping[str, object] | tuple[str, ...]) -> str | None:
        """Return a value that must be one of the allowed words, or None if it was not given.

        Raises:
            ModelError: The value is not allowed.
        """
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise ModelError(f"{name}: {value!r} is not known; allowed values are {', '.join(allowed)}")
        return value

    def check(self, takes: Mapping[str, str], format_name: str) -> None:
        """Check that a format takes all the values that the user gives.

        Args:
            takes: Values that the format takes, by name, with their meanings.
            format_name: Name of the format, for the message.

        Raises:
            ModelError: The name of a value is not in `takes`.
        """
        if odd := sorted(self.values.keys() - takes.keys()):
            allowed = "; ".join(f"{name}: {meaning}" for name, meaning in takes.items())
            raise ModelError(f"{', '.join(odd)}: not a value that {format_name} takes; it takes {allowed}")


def need(value: str | None, path: Path, what: str, option: str) -> str:
    """Return a value, or raise an error that says how to give it.

    Args:
        value: The value, if known.
        path: Path of the SAE, for the message.
        what: What the value means, for the message.
        option: Option of the command line that gives it.

    Returns:
        The value.

    Raises:
        ModelError: The value is missing.
    """
    if not value:
        raise ModelError(f"{path}: the files do not record {what}; give it with {option}")
    return value
