"""What the user says of an SAE that its files don't."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ommatid.errors import ModelError


@dataclass(frozen=True)
class Overrides:
    """It goes before what the files say."""

    hookpoint: str | None = None
    """Where the activations were captured."""
    model: str | None = None
    """The model that is explained."""
    target: str | None = None
    """Hookpoint that a transcoder decodes."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Values by name, such as k or scaling_factor: each format says which it takes."""

    def integer(self, name: str) -> int | None:
        """A whole number above 0, or None where it was not said.

        Raises:
            ModelError: it is something else.
        """
        value = self.values.get(name)
        if value is not None and (not value.isdecimal() or int(value) == 0):
            raise ModelError(f"{name}: {value!r} is not a whole number above 0")
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """A number, or None where it was not said.

        Raises:
            ModelError: it is something else.
        """
        try:
            return float(self.values[name]) if name in self.values else None
        except ValueError:
            raise ModelError(f"{name}: {self.values[name]!r} is not a number") from None

    def choice(self, name: str, allowed: Mapping[str, object] | tuple[str, ...]) -> str | None:
        """One of the allowed words, or None where it was not said.

        Raises:
            ModelError: it is something else.
        """
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise ModelError(f"{name}: {value!r} is not known; allowed are {', '.join(allowed)}")
        return value

    def check(self, takes: Mapping[str, str], format_name: str) -> None:
        """Refuse what a format does not take.

        Raises:
            ModelError: a value has a name that is not in `takes`.
        """
        if odd := sorted(self.values.keys() - takes.keys()):
            allowed = "; ".join(f"{name}: {meaning}" for name, meaning in takes.items())
            raise ModelError(f"{', '.join(odd)}: not a value that {format_name} takes; it takes {allowed}")


def need(value: str | None, path: Path, what: str, option: str) -> str:
    """The value, or an error that says how to give it.

    Raises:
        ModelError: there is none.
    """
    if not value:
        raise ModelError(f"{path}: the files don't say {what}; say it with {option}")
    return value
