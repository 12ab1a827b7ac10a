"""Selection, by hookpoint, of the activations that a later stage reads from the artefact of `extract`."""

from ommatid.config import Params
from ommatid.errors import ArtefactError
from ommatid.stage import Stage
from ommatid.store import Artefact


def open_activations(extraction: Artefact, reader: Stage, params: Params) -> dict[str, Artefact]:
    """Open the activations that a stage reads.

    Args:
        extraction: Artefact of the stage `extract`.
        reader: Stage that reads the activations.
        params: All params. `train` names the hookpoint that each SAE encodes and, for a transcoder, the one that it decodes.

    Returns:
        Under the name `extract`, the activations to encode and, under the name `target`, those that a transcoder decodes, if there is one
        and the reader reads them. If SAEs have different hookpoints, both are the extraction, of which `store.per_sae.own_inputs` selects
        what belongs to an SAE.

    Raises:
        ArtefactError: There are no activations of a hookpoint, two hookpoints of a transcoder have different tokens, or the reader needs
            images and the activations were imported from files.
    """
    pairs = params.read_and_decoded
    opened = {name: extraction.child(name, "activations") for name in dict.fromkeys(name for pair in pairs for name in pair if name)}
    activations = opened[pairs[0][0]]
    if "images" in reader.inputs and activations.summary.get("source") == "files":
        raise ArtefactError(
            f"{activations.url}: {reader.name} needs images and a judge's embeddings of them, but these activations were imported from "
            f"files, which have neither; the SAE is finished without {reader.name}; to run it, set extract.source: images, with the images "
            "and the model that they came from, and run the stages from images on"
        )
    decoded = [(opened[read], opened[target]) for read, target in pairs if target] if reader.reads_target else []
    for read, target in decoded:
        check_tokens(read, target)
    if len(pairs) > 1:
        return {"extract": extraction, **({"target": extraction} if decoded else {})}
    return {"extract": activations, **({"target": decoded[0][1]} if decoded else {})}


def check_tokens(activations: Artefact, target: Artefact) -> None:
    """Check that the rows of two hookpoints come from the same tokens in the same order.

    Raises:
        ArtefactError: The rows come from different tokens.
    """
    one, other = activations.summary, target.summary
    differing = [f"{key} {one[key]} and {other[key]}" for key in ("tokens_per_image", "grid") if one[key] != other[key]]
    if activations.manifest.params.get("max_norm") is not None:
        differing.append("extract.max_norm left out different tokens of each")
    if differing:
        raise ArtefactError(
            f"train.target: {other['hookpoint']} cannot be reconstructed from {one['hookpoint']}, as their tokens differ: "
            f"{'; '.join(differing)}; name a hookpoint with the same tokens, and extract with max_norm: null"
        )
