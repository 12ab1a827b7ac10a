"""Forward hooks that capture or replace the outputs of modules, or end a forward pass early."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capturing(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of modules during forward passes inside the block.

    Args:
        modules: Modules by name.

    Yields:
        A dict that receives each module's output by name, or the output's first element if it is a tuple. Outputs are not copied, so
        nothing may write into them later in the pass. If a module runs twice, its last output is kept.
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
    """Replace a module's output, or the first element of a tuple or list, with `replace(output)` in forward passes inside the block.

    Hooks that were registered before see the replacement, too. Transformers collects hidden states, such as the one that LLaVA's
    projector reads, by hooks that stay on the blocks from the first pass on.
    """

    def put(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return replace(output)
        elements = replace(output[0]), *output[1:]
        return type(output)(*elements) if hasattr(output, "_fields") else type(output)(elements)  # A named tuple takes them one by one.

    handle = module.register_forward_hook(put, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skipping(modules: Sequence[nn.Module], output: Tensor) -> Iterator[None]:
    """Skip modules in forward passes inside the block: each returns `output` at once. Hooks on them run as usual."""
    with ExitStack() as stack:
        for module in modules:
            own = module.__dict__.get("forward")  # that of accelerate, if it spreads the model over devices
            module.forward = lambda *_inputs, **_options: output  # Hides the method of the class.
            if own is None:
                stack.callback(delattr, module, "forward")
            else:
                stack.callback(setattr, module, "forward", own)
        yield


class _PassEnded(Exception):
    """Raised to leave a forward pass; it is not an error."""


@contextmanager
def ending_after(module: nn.Module) -> Iterator[None]:
    """End the forward pass, and the block, as soon as the module has run, with the hooks registered on it before this one."""

    def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise _PassEnded

    handle = module.register_forward_hook(end)
    try:
        yield
    except _PassEnded:
        pass
    finally:
        handle.remove()
