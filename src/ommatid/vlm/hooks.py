"""Hooks: what leaves a module in a forward pass, other things in its place, and an end to the pass where no more of it is wanted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capturing(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within it, a forward pass puts each module's output, or the first of a tuple, into the dict, by name.

    Not copies: nothing may write into them later in the pass. A module that runs twice leaves its last output. Hooks are removed at the
    end, also on errors.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
            stack.callback(handle.remove)
        yield seen


@contextmanager
def replacing(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, a forward pass goes on from what `replace` makes of the module's output, or of the first of a tuple."""

    def put(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    handle = module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


class _Enough(Exception):
    """Not an error: the way out of a forward pass."""


@contextmanager
def ending_after(module: nn.Module) -> Iterator[None]:
    """A forward pass ends, and the block with it, when the module has run; hooks that it had before have run too."""

    def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise _Enough

    handle = module.register_forward_hook(end)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()
