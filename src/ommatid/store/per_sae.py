"""Artefacts of stages that make one inner artefact for each SAE of a training."""

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
        own = {
            stage: artefact.child(name, INSIDE[artefact.manifest.kind]) if artefact.manifest.kind in INSIDE else artefact
            for stage, artefact in inputs.items()
        }
        child = draft.child(name, INSIDE[draft.kind], inputs=own)
        made[name] = child.sealed() or make(own, child, about(name, len(names) == 1, on_event))
    compare(made)
    return draft.seal({"saes": names, "of": {name: numbers(artefact.summary) for name, artefact in made.items()}})


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a summary that are numbers."""
    return {key: float(value) for key, value in summary.items() if isinstance(value, int | float)}
