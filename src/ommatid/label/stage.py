"""Stage `label`: names for every latent by each labeller, and their scores on images that did not make them."""

import functools
from collections.abc import Mapping

from ommatid.config import LabelParams
from ommatid.events import Listener, ignore
from ommatid.label.context import Material, load_material, make_context
from ommatid.label.naming import find_names, make_table, summarise
from ommatid.store import Artefact, Draft
from ommatid.store.per_sae import for_each_sae


def run(params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Label the latents of every SAE of a training; see `label`."""
    material = functools.cache(lambda: load_material(params, inputs, on_event))  # loaded only if an SAE is not labelled yet
    return for_each_sae(lambda own, child, listener: label(params, own, child, listener, material()), inputs, draft, on_event)


def label(
    params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore, material: Material | None = None
) -> Artefact:
    """Name the latents of one SAE by `params.labellers` and score the names.

    Args:
        params: The section `label`.
        inputs: `images`, the activations (`extract`), the SAE (`train`) and its evaluation (`evaluate`).
        draft: Of the SAE's labels.
        on_event: Hears of the latents, and of labellers that failed.
        material: What `load_material` gave, where several SAEs share it; None: it is loaded.

    Raises:
        ConfigError, ModelError: as `load_material` does.
    """
    context = make_context(params, inputs, draft, material or load_material(params, inputs, on_event), on_event)
    table = make_table(context, find_names(context))
    draft.write_table("labels.parquet", table)
    return draft.seal(summarise(context, table))
