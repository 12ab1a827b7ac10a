"""Checker of tensor shapes, which pytest wraps around every function of the packages that `addopts` in pyproject.toml names."""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray, config

Checked = TypeVar("Checked", bound=Callable[..., Any])


_checks: dict[object, Callable[..., Any]] = {}


def check(function: Checked) -> Checked:
    """Check the arguments and results that are annotated with a shape; all other types are left to pyright.

    jaxtyping passes a function that has the signature of the one to check and does nothing else, so one of them serves all functions that
    are made by the same code: those inside others are made anew at each call.
    """
    if config.jaxtyping_disable:  # functions inside others are wrapped anew each time that they are made
        return function
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    code = function.__code__
    parameters = (code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    signature = (function.__module__, function.__qualname__, *parameters, repr(hints))
    if signature not in _checks:
        function.__annotations__ = hints
        _checks[signature] = beartype(function)
    return _checks[signature]  # type: ignore[return-value]


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
