"""Labellers, which suggest labels for latents.

Each labeller has a section of params in `config/label.py` and a module here named for its `kind`, whose function `make` returns its source
of labels: a list of words to choose from, labels that people wrote, or a labeller that looks at the images of one latent at a time.
"""

from collections.abc import Callable, Mapping
from importlib import import_module

from ommatid import config
from ommatid.label.labellers.base import HumanLabels, ImageLabeller, Source, WordList
from ommatid.store import Artefact

__all__ = ["HumanLabels", "ImageLabeller", "Source", "WordList", "make_source"]


def make_source(name: str, params: config.Labeller, saes: Mapping[str, Artefact], warn: Callable[[str], None]) -> Source:
    """Make the source of a labeller's labels, with `make` of the module that is named for the labeller's kind.

    Args:
        name: Name of the labeller, the column `labels.labeller`.
        params: The labeller's section of the params.
        saes: Each SAE of the training, by its name in the tables.
        warn: Called with a sentence for the user when the labeller gives up.

    Returns:
        The source of labels.

    Raises:
        ConfigError: A file that the labeller needs is missing or cannot be used.
        ModelError: A model that the labeller needs is missing or cannot be used.
    """
    return import_module(f"{__name__}.{params.kind}").make(name, params, saes, warn)
