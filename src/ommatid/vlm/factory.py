"""A user's own code: finds the function behind `my_pkg.my_model:make`, calls it, and says what is wrong with it in a sentence."""

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
    """What the factory makes.

    Args:
        spec: `package.module:function`; the module is installed, or a file in the current directory.
        key: Where it is written, such as `extract.model.factory`.

    Raises:
        ModelError: no such module or function, its code fails, or what it makes is not an nn.Module.
    """
    made = _call(_find(spec, key), spec, key)
    if not isinstance(made, nn.Module):
        raise ModelError(f"{key}: {spec}: returned {_article(made)}, not a torch.nn.Module; return the model")
    return made


def checksum(spec: str) -> str:
    """sha256 of the file that holds the factory, which was imported before: other code is another model."""
    file = sys.modules[spec.partition(":")[0]].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _find(spec: str, key: str) -> Callable[[], object]:
    name, _, attribute = spec.partition(":")
    found: object = _import(name, spec, key)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [known for known in dir(found) if not known.startswith("_")], n=1)
            raise ModelError(f"{key}: {spec}: {name} has no {part}{f'; did you mean {near[0]}?' if near else ''}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"{key}: {spec}: is {_article(found)}, and cannot be called; name a function that returns the model")
    return found


def _import(name: str, spec: str, key: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file here must not hide an installed package
    importlib.invalidate_caches()  # the file may be younger than this process
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ModelError(f"{key}: {spec}: {name} imports {error.name}, which is not installed here") from error
        raise ModelError(f"{key}: {spec}: no module {error.name}: neither installed, nor {error.name.split('.')[0]}.py in {here}") from None
    except (Exception, SystemExit) as error:  # the user's code: whatever it raises, also a script's sys.exit()
        raise ModelError(f"{key}: {spec}: importing {name} failed: {type(error).__name__}: {error}") from error


def _call(factory: Callable[[], object], spec: str, key: str) -> object:
    try:
        return factory()
    except (Exception, SystemExit) as error:  # the user's code: whatever it raises, also a script's sys.exit()
        raise ModelError(f"{key}: {spec}: calling it without arguments failed: {type(error).__name__}: {error}") from error


def _article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
