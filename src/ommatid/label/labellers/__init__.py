"""What each of label.labellers becomes: words of a list, labels of people, or a labeller that is asked latent by latent.

A labeller is a section of `config/label.py` and the module here that its `kind` names, with a function `make`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module

from ommatid import config
from ommatid.label.labellers.base import Asked, People, Source, Words

__all__ = ["Asked", "People", "Source", "Words", "make_source"]


def make_source(name: str, params: config.Labeller, saes: Mapping[str, int], say: Callable[[str], None]) -> Source:
    """Make a labeller by `make`, with these arguments, of the module that is named for its kind.

    Args:
        name: `labels.labeller`.
        params: Its values.
        saes: Number of latents of each SAE of the training, as the tables call it.
        say: Hears a sentence when a labeller gives up for good.

    Raises:
        ConfigError: a file that it needs is missing, or cannot be used.
        ModelError: the same of a model.
    """
    return import_module(f"{__name__}.{params.kind}").make(name, params, saes, say)
