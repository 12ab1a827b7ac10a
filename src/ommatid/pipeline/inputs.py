"""The inputs of a stage: artefacts of earlier stages, which are checked to belong together and stripped of rejected SAEs."""

from collections.abc import Iterable, Mapping
from typing import Any

from ommatid import store
from ommatid.config import Params, Section, dotted, make_params
from ommatid.errors import ArtefactError
from ommatid.events import Listener, Warned, ignore
from ommatid.pipeline import STAGES, open_stage, place_of
from ommatid.stage import is_checkouts, load
from ommatid.store import Artefact
from ommatid.store.filesystem import open_folder
from ommatid.store.per_sae import own_inputs


def open_inputs(name: str, params: Params, data: str) -> dict[str, Artefact]:
    """Open the artefacts that a stage reads.

    Args:
        name: Name of the stage.
        params: All params, which determine the activations to read.
        data: Root of the artefacts, a path or URL.

    Returns:
        Artefacts by name of the input, without the SAEs that a gate rejected.

    Raises:
        ArtefactError: An input is missing or damaged, was imported without something that this stage needs, or was made from an
            earlier version of another input.
    """
    section: Section = getattr(params, name)
    inputs: dict[str, Artefact] = {}
    if not section.reads_artefacts:
        return inputs
    # Openers come first, because their errors explain best why other inputs may be missing.
    for source in sorted(STAGES[name].inputs, key=lambda source: STAGES[source].opener is None):
        artefact, opener = open_stage(source, data=data), STAGES[source].opener
        inputs |= load(opener)(artefact, STAGES[name], params) if opener else {source: artefact}
    check_lineage(name, inputs)
    return _without_rejected(inputs)


def open_of_sae(reader: str, name: str, training: Artefact, stages: Iterable[str], data: str) -> dict[str, Artefact]:
    """Open what a study has of one SAE, with the activations of its own hookpoint.

    Args:
        reader: Name of the stage, or of another use, that reads the artefacts.
        name: Name of the SAE in its training.
        training: The training.
        stages: Names of the stages after training whose artefacts are read, and `images` if the images are.
        data: Root of the study's artefacts, a path or URL.

    Returns:
        Artefacts by name of the stage: `train` is the SAE, `extract` the activations that it encodes and, for a transcoder, `target` those
        that it decodes.

    Raises:
        ArtefactError: An artefact is missing or damaged, or was not made from the others.
    """
    whole = {"train": training, **{stage: open_stage(stage, data=data) for stage in stages}}
    check_lineage(reader, whole)
    extraction = open_stage("extract", data=data)
    own = own_inputs(name, {**whole, "extract": extraction, "target": extraction})
    check_lineage(reader, own)
    return own


def check_lineage(reader: str, artefacts: Mapping[str, Artefact]) -> None:
    """Check that artefacts belong together: none was made from an earlier version of another.

    Args:
        reader: Name of the stage, or of another use, that reads the artefacts.
        artefacts: Artefacts by name of the stage.

    Raises:
        ArtefactError: An artefact was replaced, but one that had been made from it was not.
    """
    stale = {
        f"{artefact.url} was made from another version of {source.url}": stage
        for stage, artefact in artefacts.items()
        for made_from, digest in artefact.manifest.inputs.items()
        # the manifest of a sample of images names the whole set as its input `images`
        if made_from != stage and (source := artefacts.get(made_from)) and source.digest != digest
    }
    if stale:
        again = [stage for stage in STAGES if stage in stale.values() or stage == reader]
        raise ArtefactError(
            f"{reader}: its inputs do not belong together: {'; '.join(stale)}; "
            f"run `dvc repro {again[-1]}`, or run these stages again, in this order: {', '.join(again)}"
        )


def _without_rejected(inputs: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """Leave out the SAEs that any gate rejected from all inputs that have an artefact for each SAE."""
    per_sae = [name for name, stage in STAGES.items() if stage.is_per_sae and name in inputs]
    rejected = {sae for name in per_sae for sae in inputs[name].rejected}
    return {name: artefact.leaving_out(rejected) if name in per_sae else artefact for name, artefact in inputs.items()}


def study_params(name: str, params: Params, data: str, on_event: Listener = ignore) -> Params:
    """Return the params with which a stage of a study should run.

    Its own section is the given one, but the sections of earlier stages are those with which the study's artefacts were made. Under the
    checkout's own data root, DVC keeps artefacts and params consistent, so the params are returned unchanged.

    Args:
        name: Name of the stage.
        params: Params of params.yaml and the command line.
        data: Root of the study's artefacts, a path or URL.
        on_event: Called with a warning that names the params that differ.

    Returns:
        The params.
    """
    if is_checkouts(data):
        return params
    sections: dict[str, Any] = {}
    for source in STAGES[name].inputs:
        section: Section = getattr(params, source)
        try:
            made_with = store.open_artefact(place_of(source, data), STAGES[source].kind).manifest.params
        except ArtefactError:
            continue  # the stage itself reports a missing input, if it needs it
        if STAGES[source].has_binding_params and made_with != section.identity():
            runtime = {
                key: value for key, value in section.model_dump(mode="json").items() if key in section.runtime_keys and key not in made_with
            }
            sections[source] = {**runtime, **made_with}
    if not sections:
        return params
    values = params.model_dump(mode="json")
    adapted = make_params({**values, **sections}, f"{open_folder(data)}")
    given = dotted(params)
    changed = {key: value for key, value in dotted(adapted).items() if key not in given or given[key] != value}
    if changed:
        changes = ", ".join(f"{key}={value}" for key, value in list(changed.items())[:_SHOWN])
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        on_event(Warned(f"{open_folder(data)} was made with {changes}{more}: {name} uses these values instead of those given"))
    return adapted


_SHOWN = 5
"""Number of differing params that a warning names; it counts the rest."""
