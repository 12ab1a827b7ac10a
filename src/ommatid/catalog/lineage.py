"""Lineage of each SAE in a catalogue: the rows of the relation `runs`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ommatid.config import CatalogParams
from ommatid.store import Artefact
from ommatid.store.per_sae import read_config

Lineage = Mapping[str, Mapping[str, str | None]]
"""Origin of each SAE, by its name in the training; see `ommatid.tracking.lineage`."""

_TRACES = ("git_commit", "dvc_experiment", "dvc_lock", "mlflow_run_id", "prefect_flow_run_id")
_TEXTS = ("sae", "name", "variant", "model", "hookpoint", "target", *_TRACES, "images_digest", "activations_digest", "sae_digest", "params")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXTS] + [("k", pa.int32()), ("git_dirty", pa.bool_()), ("created_at", pa.timestamp("us"))]
)


_INSIDE = {"evaluate": "evaluation", "label": "labels", "intervene": "effects"}
"""Kind of the artefact of one SAE, by the stage that makes it."""


@dataclass(frozen=True)
class SAEArtefacts:
    """The artefacts of one SAE."""

    sae: Artefact
    """The SAE."""
    evaluation: Artefact
    """Its evaluation."""
    labels: Artefact
    """The labels of its latents."""
    effects: Artefact
    """What its latents do to the model's output."""

    @property
    def name(self) -> str:
        """Name of the SAE in the catalogue."""
        return self.sae.summary["sae"]


def iter_saes(inputs: Mapping[str, Artefact]) -> Iterator[tuple[str, SAEArtefacts]]:
    """Iterate over the SAEs of a training.

    Args:
        inputs: Artefacts, by stage.

    Yields:
        The name of each SAE in the training, and its artefacts.

    Raises:
        ArtefactError: An artefact is damaged or missing.
    """
    for name, sae in inputs["train"].each().items():
        evaluation, labels, effects = (inputs[stage].child(name, kind) for stage, kind in _INSIDE.items())
        yield name, SAEArtefacts(sae, evaluation, labels, effects)


def make_runs(params: CatalogParams, inputs: Mapping[str, Artefact], saes: Mapping[str, SAEArtefacts], lineage: Lineage) -> pa.Table:
    """Make the table that runs.sql reads, with a row for each SAE."""
    shared = {
        "created_at": datetime.now(UTC).replace(tzinfo=None, microsecond=0),
        "images_digest": inputs["images"].digest,
    }
    sections = {stage: artefact.manifest.params for stage, artefact in inputs.items()} | {"catalog": params.model_dump(mode="json")}
    rows = [{**shared, "name": name, **_row(artefacts.sae, sections, lineage.get(name, {}))} for name, artefacts in saes.items()]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _row(sae: Artefact, sections: Mapping[str, Any], lineage: Mapping[str, str | None]) -> dict[str, Any]:
    config = read_config(sae)
    dirty = lineage.get("git_dirty")
    return {
        "sae": sae.summary["sae"],
        **{key: config.get(key) for key in ("variant", "k", "model", "hookpoint", "target")},
        "git_dirty": None if dirty is None else dirty.lower() in ("true", "1", "yes"),
        "activations_digest": sae.manifest.inputs.get("extract"),
        "sae_digest": sae.digest,
        "params": json.dumps({**sections, "train": sae.manifest.params}, sort_keys=True),
        **{name: lineage.get(name) for name in _TRACES},
    }
