"""Checker of tensor shapes, which pytest wraps around every function of the packages that `addopts` in pyproject.toml names."""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray, config

Checked = TypeVar("Checked", bound=Callable[..., Any])


def check(function: Checked) -> Checked:
    """Check the arguments and results that are annotated with a shape; all other types are left to pyright."""
    if config.jaxtyping_disable:  # functions inside others are checked anew each time that they are made, which takes milliseconds
        return function
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _has_shape(hint)}
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
