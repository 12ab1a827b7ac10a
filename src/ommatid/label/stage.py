"""Stage `label`: labels every latent with each labeller, and scores the labels on images that they were not made from."""

import functools
from collections.abc import Mapping

from ommatid.config import LabelParams
from ommatid.events import Listener, ignore
from ommatid.label.context import Material, load_material, make_context
from ommatid.label.table import find_answers, make_tables, summarise
from ommatid.store import Artefact, Draft
from ommatid.store.per_sae import for_each_sae


def run(params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Label the latents of every SAE of a training; see `label`."""
    material = functools.cache(lambda: load_material(params, inputs, on_event))  # Not loaded if every SAE is labelled already.
    return for_each_sae(lambda own, child, listener: label(params, own, child, listener, material()), inputs, draft, on_event)


def label(
    params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore, material: Material | None = None
) -> Artefact:
    """Label the latents of one SAE with each of `params.labellers`, and score the labels.

    Args:
        params: The `label` section of the params.
        inputs: The images (`images`), the activations (`extract`), the SAE (`train`) and its evaluation (`evaluate`).
        draft: Draft of the SAE's labels.
        on_event: Called with each progress event and warning.
        material: What `load_material` returned, if several SAEs share it; None loads it.

    Returns:
        The sealed labels of the SAE.

    Raises:
        ConfigError: A file of words or labels is missing or cannot be used.
        ModelError: The model's text tower cannot be loaded.
    """
    context = make_context(params, inputs, draft, material or load_material(params, inputs, on_event), on_event)
    tables = make_tables(context, find_answers(context))
    for name, table in tables.items():
        draft.write_table(f"{name}.parquet", table)
    return draft.seal(summarise(context, tables["labels"]))
