"""Ommatid: from images and a vision-language model to a SQL catalogue of monosemantic features.

>>> import ommatid
>>> run = ommatid.open_run("data")
>>> found = run.encode(["cat.jpg"])
>>> rows = found.top(10)  # a pandas frame: image, latent, label, act, ...

Names load when they are first used: `import ommatid` itself takes neither torch nor any other library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ommatid.api import Answers, Contributions, Encoding, Intervention, Run, encode, intervene, load_model, load_sae, open_run
    from ommatid.catalog.reader import Catalog
    from ommatid.errors import OmmatidError
    from ommatid.metrics.arrays import fvu, monosemanticity

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "Catalog",
    "Contributions",
    "Encoding",
    "Intervention",
    "OmmatidError",
    "Run",
    "encode",
    "fvu",
    "intervene",
    "load_model",
    "load_sae",
    "monosemanticity",
    "open_run",
]

_ELSEWHERE = {
    "Catalog": "ommatid.catalog.reader",
    "OmmatidError": "ommatid.errors",
    "fvu": "ommatid.metrics.arrays",
    "monosemanticity": "ommatid.metrics.arrays",
}
"""Names of `__all__` that are not in `ommatid.api`, each with its module."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ommatid' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_ELSEWHERE.get(name, "ommatid.api")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
