"""Past SAEs: the champions that are kept, and the SAEs of the checkout; and whether an SAE fits the present activations."""

from dataclasses import dataclass, replace
from datetime import datetime

from ommatid import store
from ommatid.errors import ArtefactError
from ommatid.extract.selection import check_tokens
from ommatid.pipeline import open_stage, place_of
from ommatid.publish import champion
from ommatid.store import Artefact
from ommatid.store.manifest import MANIFEST
from ommatid.store.per_sae import read_config


@dataclass(frozen=True)
class PastSAE:
    """An SAE that was trained at some time, and is still here."""

    artefact: Artefact
    """The SAE."""
    decided_at: datetime | None = None
    """When it first became the champion, UTC; None if it never did."""
    is_here: bool = False
    """Whether it is an SAE of the checkout."""

    @property
    def name(self) -> str:
        """Name of the SAE in the tables."""
        return self.artefact.summary["sae"]


@dataclass(frozen=True)
class LeftOut:
    """An SAE that cannot be measured."""

    sae: str
    """Name of the SAE in the tables."""
    decided_at: datetime | None
    """When it became the champion, UTC; None if it never did."""
    reason: str
    """Why it cannot be measured."""


def find_past() -> tuple[list[PastSAE], list[LeftOut]]:
    """Find the past SAEs in the current directory, oldest first, each once; those of the checkout that no decision is about come last.

    Returns:
        The SAEs, and the champions whose files are gone or damaged.
    """
    found: dict[str, PastSAE] = {}
    left_out: dict[str, LeftOut] = {}
    for decision in champion.read_decisions():
        digest, name = decision.challenger.digest, decision.challenger.sae
        if decision.decision != "champion" or digest in found:
            continue
        place = champion.folder_of(decision) / "sae"
        if not (place / MANIFEST).exists():
            left_out[digest] = LeftOut(name, decision.decided_at, f"{place} is gone: former champions are kept as retrain.keep says")
            continue
        try:
            found[digest] = PastSAE(store.open_artefact(place, "sae"), decision.decided_at)
        except ArtefactError as error:
            left_out[digest] = LeftOut(name, decision.decided_at, str(error))
    for sae in _open_own().values():
        before = left_out.pop(sae.digest, None)
        own = PastSAE(sae, before.decided_at if before else None, is_here=True)
        found[sae.digest] = replace(found[sae.digest], is_here=True) if sae.digest in found else own
    return list(found.values()), [one for digest, one in left_out.items() if digest not in found]


def _open_own() -> dict[str, Artefact]:
    return open_stage("train").each() if place_of("train").size(MANIFEST) is not None else {}


def select_inputs(past: PastSAE, images: Artefact, extraction: Artefact) -> dict[str, Artefact]:
    """Select what an SAE is evaluated with.

    Args:
        past: The SAE.
        images: The present images.
        extraction: The present extraction.

    Returns:
        `images`, the SAE (`train`), the activations that it encodes (`extract`) and, for a transcoder, those that it decodes (`target`).

    Raises:
        ArtefactError: The SAE does not fit the present activations; the message says why.
    """
    config = read_config(past.artefact)
    missing = [name for name in (config["hookpoint"], config.get("target")) if name and name not in extraction.children]
    if missing:
        raise ArtefactError(f"extract.hookpoints no longer names {missing[0]}; it has {', '.join(extraction.children)}")
    activations = extraction.child(config["hookpoint"], "activations")
    for key in ("model", "d_model"):
        if config[key] != activations.summary.get(key):
            raise ArtefactError(f"{key} was {config[key]}, is {activations.summary.get(key)}")
    inputs = {"images": images, "extract": activations, "train": past.artefact}
    if config.get("target"):
        inputs["target"] = extraction.child(config["target"], "activations")
        check_tokens(activations, inputs["target"])
    return inputs
