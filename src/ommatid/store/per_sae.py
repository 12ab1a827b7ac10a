"""Artefacts of stages that make one inner artefact for each SAE of a training, and the inputs that belong to one SAE."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ommatid.events import Listener, about
from ommatid.store.artefact import Artefact
from ommatid.store.draft import Draft
from ommatid.store.manifest import INSIDE


def for_each_sae(
    make: Callable[[Mapping[str, Artefact], Draft, Listener], Artefact],
    inputs: Mapping[str, Artefact],
    draft: Draft,
    on_event: Listener,
    compare: Callable[[Mapping[str, Artefact]], None] = lambda made: None,
) -> Artefact:
    """Make an inner artefact for each SAE, unless an interrupted run has already sealed it, and seal the stage's artefact.

    Args:
        make: Function that makes the artefact of one SAE from that SAE's inputs, its draft and its listener.
        inputs: Inputs of the stage.
        draft: Draft of the stage.
        on_event: Called with each progress event and warning. If there are several SAEs, progress events name theirs.
        compare: Function that writes tables comparing the SAEs into the stage's draft, given their artefacts by name.

    Returns:
        The sealed artefact of the stage.
    """
    names = inputs["train"].children
    made: dict[str, Artefact] = {}
    for name in names:
        own = own_inputs(name, inputs)
        child = draft.child(name, INSIDE[draft.kind], inputs=own)
        made[name] = child.sealed() or make(own, child, about(name, len(names) == 1, on_event))
    compare(made)
    return draft.seal({"saes": names, "of": {name: numbers(artefact.summary) for name, artefact in made.items()}})


def own_inputs(name: str, inputs: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """Select the inputs that belong to one SAE.

    Args:
        name: Name of the SAE in its training.
        inputs: Inputs of a stage. `extract` and `target` may be activations, or an extraction with activations of several hookpoints.

    Returns:
        What each input has for this SAE, and inputs that all SAEs share as they are. Without `target` if it is an extraction and the SAE
        is no transcoder.

    Raises:
        ArtefactError: There is nothing of this SAE, or there are no activations of its hookpoints.
    """
    whole = {stage: artefact for stage, artefact in inputs.items() if artefact.manifest.kind != "extraction"}
    own = {
        stage: artefact.child(name, INSIDE[artefact.manifest.kind]) if artefact.manifest.kind in INSIDE else artefact
        for stage, artefact in whole.items()
    }
    if len(whole) == len(inputs):
        return own
    config = read_config(own["train"])
    hookpoints = {"extract": config["hookpoint"], "target": config.get("target")}
    found = {
        stage: artefact.child(hookpoints[stage], "activations")
        for stage, artefact in inputs.items()
        if stage not in whole and hookpoints[stage]
    }
    return {stage: {**own, **found}[stage] for stage in inputs if stage in own or stage in found}


def any_activations(inputs: Mapping[str, Artefact]) -> Artefact:
    """Return activations of a stage's inputs, for what all hookpoints share: the model, how it sees images, and embeddings of images."""
    found = inputs["extract"]
    return found.child(found.children[0], "activations") if found.manifest.kind == "extraction" else found


def read_config(sae: Artefact) -> dict[str, Any]:
    """Read the config of an SAE: its hookpoint, target, model, variant, widths and k."""
    return json.loads(sae.file("cfg.json").read_text(encoding="utf-8"))


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a summary that are numbers."""
    return {key: float(value) for key, value in summary.items() if isinstance(value, int | float)}
