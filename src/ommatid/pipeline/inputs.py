"""The inputs of a stage: artefacts of earlier stages, opened, checked to belong together, and without rejected SAEs."""

from collections.abc import Mapping
from typing import Any

from ommatid import store
from ommatid.config import Params, Section, dotted, make_params
from ommatid.errors import ArtefactError
from ommatid.events import Listener, Warned, ignore
from ommatid.pipeline import STAGES, open_stage, place_of
from ommatid.stage import is_checkouts, load
from ommatid.store import Artefact
from ommatid.store.filesystem import open_folder


def open_inputs(name: str, params: Params, data: str) -> dict[str, Artefact]:
    """Open the artefacts that a stage reads.

    Args:
        name: Name of the stage.
        params: All params; they say which activations are read.
        data: Root of the artefacts, a path or URL.

    Returns:
        Artefacts by name of the input, without the SAEs that a gate rejected.

    Raises:
        ArtefactError: an input is missing or damaged, was imported and lacks what this stage needs, or was made from other inputs than
            those there are now.
    """
    section: Section = getattr(params, name)
    inputs: dict[str, Artefact] = {}
    if not section.reads_artefacts:
        return inputs
    # what has an opener comes first: it knows best why the rest may be missing
    for other in sorted(STAGES[name].inputs, key=lambda other: STAGES[other].opener is None):
        artefact, opener = open_stage(other, data=data), STAGES[other].opener
        inputs |= load(opener)(artefact, STAGES[name], params) if opener else {other: artefact}
    check_lineage(name, inputs)
    return _without_rejected(inputs)


def check_lineage(reader: str, artefacts: Mapping[str, Artefact]) -> None:
    """Check that artefacts belong together: that each was made from those of the others that its manifest names.

    Args:
        reader: Name of the stage, or other use, that reads them.
        artefacts: Artefacts by name of the stage.

    Raises:
        ArtefactError: an artefact was made again, and one made from its earlier content was not.
    """
    stale = {
        f"{artefact.url} was made from another {source.url}": stage
        for stage, artefact in artefacts.items()
        for made_from, digest in artefact.manifest.inputs.items()
        # the manifest of a sample of images names the whole set as its input `images`
        if made_from != stage and (source := artefacts.get(made_from)) and source.digest != digest
    }
    if stale:
        again = [stage for stage in STAGES if stage in stale.values() or stage == reader]
        raise ArtefactError(
            f"{reader}: its inputs do not belong together: {'; '.join(stale)} than is there now; "
            f"run `dvc repro {again[-1]}`, or these stages again, in this order: {', '.join(again)}"
        )


def _without_rejected(inputs: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """Leave the SAEs that the gate of any input's stage rejected out of all inputs that have one artefact for each SAE."""
    per_sae = [name for name, stage in STAGES.items() if stage.is_per_sae and name in inputs]
    rejected = {sae for name in per_sae for sae in inputs[name].rejected}
    return {name: artefact.leaving_out(rejected) if name in per_sae else artefact for name, artefact in inputs.items()}


def study_params(name: str, params: Params, data: str, on_event: Listener = ignore) -> Params:
    """Return the params of a stage in a study: its own section as given, earlier sections as the study's artefacts were made with.

    Under the checkout's own root DVC keeps artefacts and params together, and the params are returned as they are.

    Args:
        name: Name of the stage.
        params: Params of params.yaml and the command line.
        data: Root of the study's artefacts, a path or URL.
        on_event: Called with a warning that names the params that differ.
    """
    if is_checkouts(data):
        return params
    sections: dict[str, Any] = {}
    for other in STAGES[name].inputs:
        section: Section = getattr(params, other)
        try:
            made_with = store.open_artefact(place_of(other, data), STAGES[other].kind).manifest.params
        except ArtefactError:
            continue  # the stage itself reports a missing input, if it needs it
        if STAGES[other].has_binding_params and made_with != section.identity():
            runtime = {
                key: value for key, value in section.model_dump(mode="json").items() if key in section.runtime_keys and key not in made_with
            }
            sections[other] = {**runtime, **made_with}
    if not sections:
        return params
    values = params.model_dump(mode="json")
    studied = make_params({**values, **sections}, f"{open_folder(data)}")
    before = dotted(params)
    changed = {key: value for key, value in dotted(studied).items() if key not in before or before[key] != value}
    if changed:
        changes = ", ".join(f"{key}={value}" for key, value in list(changed.items())[:_SHOWN])
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        on_event(Warned(f"{open_folder(data)} was made with {changes}{more}: {name} goes by these, not by what was given"))
    return studied


_SHOWN = 5
"""Number of differing params that a warning names; the rest are counted."""
