"""Stage `intervene`: what a latent does to the model's output, which is another question than what it shows.

The package can be called, as the function of the same name in the Python API; see `ommatid.Run.intervene`.

>>> import ommatid
>>> latent = int(ommatid.encode("cat.jpg").acts[0].argmax())
>>> ommatid.intervene("cat.jpg", latent, doses=[1], draws=3)
Intervention(1 image, latent ..., dose 1, ... names)
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ommatid.stage import Stage, load

STAGE = Stage(
    "intervene",
    kind="interventions",
    place=Path("data/interventions"),
    inputs=("images", "extract", "train", "evaluate", "label"),
    is_per_sae=True,
    reads_target=True,
    has_binding_params=False,
    memory_advice="lower intervene.n_images, intervene.draws or, if the model is asked for words, intervene.answers.batch",
)


class _Callable(ModuleType):
    """The module; Python binds it to the name `ommatid.intervene`, which belongs to the API, as soon as a part of it is imported."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return load("ommatid.api:intervene")(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
