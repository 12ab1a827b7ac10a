"""Loading of a model from the user's code: find the function named by `my_pkg.my_model:make`, call it, and explain what goes wrong."""

import difflib
import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn

from ommatid.errors import ModelError


def call_factory(spec: str, key: str) -> nn.Module:
    """Call a factory and return the module that it makes.

    Args:
        spec: `package.module:function`. The module must be installed, or be a file in the current directory.
        key: Key of the parameter, such as `extract.model.factory`, for messages.

    Returns:
        The module.

    Raises:
        ModelError: There is no such module or function, its code fails, or it does not return an nn.Module.
    """
    model = _call(_find(spec, key), spec, key)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{key}: {spec}: returned {_with_article(model)}, not a torch.nn.Module; return the model")
    return model


def checksum(spec: str) -> str:
    """Return the sha256 of the file that defines an imported factory, or "" if there is none, to distinguish models of different code."""
    file = sys.modules[spec.partition(":")[0]].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def checksum_of_parts(module: nn.Module) -> str:
    """Return the sha256 of the files that define the classes of a module and of its sub-modules."""
    names = {part.__class__.__module__ for part in module.modules()}
    files = {file for name in names if (file := getattr(sys.modules.get(name), "__file__", None))}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _find(spec: str, key: str) -> Callable[[], object]:
    name, _, attribute = spec.partition(":")
    found: object = _import(name, spec, key)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [known for known in dir(found) if not known.startswith("_")], n=1)
            raise ModelError(f"{key}: {spec}: {name} has no {part}{f'; did you mean {near[0]}?' if near else ''}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"{key}: {spec}: is {_with_article(found)}, which cannot be called; name a function that returns the model")
    return found


def _import(name: str, spec: str, key: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # Appended, so that a file here cannot hide an installed package.
    importlib.invalidate_caches()  # The file may be newer than this process.
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ModelError(f"{key}: {spec}: {name} imports {error.name}, which is not installed here") from error
        raise ModelError(f"{key}: {spec}: no module {error.name}: neither installed, nor {error.name.split('.')[0]}.py in {here}") from None
    except (Exception, SystemExit) as error:  # The user's code may raise anything, and a script may call sys.exit().
        raise ModelError(f"{key}: {spec}: importing {name} failed: {type(error).__name__}: {error}") from error


def _call(factory: Callable[[], object], spec: str, key: str) -> object:
    try:
        return factory()
    except (Exception, SystemExit) as error:  # The user's code may raise anything, and a script may call sys.exit().
        raise ModelError(f"{key}: {spec}: calling it without arguments failed: {type(error).__name__}: {error}") from error


def _with_article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
