"""What is computed about one past SAE: its evaluation, scores by each judge, and labels by each labeller; each only if it is new."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ommatid import store
from ommatid.backfill.keys import Keys, make_key, one_labeller
from ommatid.backfill.past import PastSAE
from ommatid.config import LabelParams, Params, Section
from ommatid.config.label import HumanLabeller, names_checksum
from ommatid.errors import ArtefactError, ConfigError
from ommatid.evaluate.monosemanticity import judge_firings, make_judged
from ommatid.evaluate.stage import evaluate
from ommatid.events import Listener, Warned, about
from ommatid.label.context import Material, load_material
from ommatid.label.stage import label
from ommatid.pipeline import open_stage
from ommatid.store import Artefact, Draft
from ommatid.store.filesystem import temporary_path
from ommatid.store.manifest import MANIFEST

PLACE = Path("data/backfill")
"""Folder of all results, relative to the checkout. It may be deleted: what is missing is computed again."""
HEADLINE = b"headline"
"""Key of a table's metadata under which the numbers of the whole SAE are kept."""
CHECKSUM = b"checksum"
"""Key of a table's metadata under which the checksum of these numbers is kept; the pages of the table have their own."""


@dataclass
class Counts:
    """How many results were computed, and how many were found."""

    computed: Counter[str] = field(default_factory=Counter)
    """By kind of result: evaluation, judge or labeller."""
    reused: Counter[str] = field(default_factory=Counter)
    """By kind of result."""


@dataclass(frozen=True)
class Measured:
    """Everything that is known of a past SAE under the present params."""

    past: PastSAE
    """The SAE."""
    evaluation: Artefact
    """Its evaluation. The scores in it are by the judges of its time."""
    judged: Mapping[str, Path]
    """Table `judged` of the SAE by each present judge, with its headline, by the judge's name."""
    labels: Mapping[str, Artefact]
    """Labels by each labeller, by its name."""


class Work:
    """What is computed with the present params, images and activations.

    Args:
        params: All params.
        saes: All past SAEs that fit, to which labels by people may belong.
        counts: Counts what is computed and what is found.
        on_event: Called with each progress event and warning.
    """

    def __init__(self, params: Params, saes: Sequence[Artefact], counts: Counts, on_event: Listener) -> None:
        self._params, self._saes = params, saes
        self._counts, self._on_event = counts, on_event
        self._keys = Keys(params)
        self._own = _open_own_evaluations() if self._keys.is_current("evaluate") else {}
        self._material: dict[str, Material] = {}

    def measure(self, past: PastSAE, inputs: Mapping[str, Artefact]) -> Measured:
        """Compute what is missing about an SAE, and return everything.

        Args:
            past: The SAE.
            inputs: What it is evaluated with; see `past.select_inputs`.
        """
        listen = about(past.name, len(self._saes) == 1, self._on_event)
        key = self._keys.evaluation(inputs)
        evaluation = self._evaluate(past, inputs, key, listen)
        judged = self._judge(past, inputs, evaluation, key, listen)
        return Measured(past, evaluation, judged, dict(self._label(past, {**inputs, "evaluate": evaluation}, listen)))

    def _evaluate(self, past: PastSAE, inputs: Mapping[str, Artefact], key: str, on_event: Listener) -> Artefact:
        own = self._own.get(past.artefact.digest)
        made_from = {name: artefact.digest for name, artefact in inputs.items()}
        if own and own.manifest.inputs == made_from and own.manifest.params == self._params.evaluate.identity():
            self._counts.reused["evaluation"] += 1
            return own

        def compute(draft: Draft) -> Artefact:
            return evaluate(self._params.evaluate, inputs, draft, on_event)

        return self._make("evaluation", f"{past.name}-{key}", self._params.evaluate, inputs, compute, "evaluation")

    def _judge(self, past: PastSAE, inputs: Mapping[str, Artefact], evaluation: Artefact, key: str, on_event: Listener) -> dict[str, Path]:
        """Return the scores by each judge: those of the evaluation, if it was made with these judges, or else from its firings."""
        activations = inputs["extract"]
        digests = self._keys.judges(activations)
        paths = {judge: PLACE / "judged" / f"{past.name}-{make_key(key, digest)}.parquet" for judge, digest in digests.items()}
        missing = [judge for judge, path in paths.items() if not _is_whole(path)]
        if evaluation.manifest.inputs["extract"] == activations.digest:
            for verdict in evaluation.summary["judges"]:
                if verdict["judge"] in missing:
                    _write(paths[verdict["judge"]], _scores_of(evaluation, verdict["judge"]), verdict)
            missing = []
        self._counts.reused["judge"] += len(paths) - len(missing)
        for verdict in judge_firings(evaluation, activations, missing, on_event) if missing else ():
            headline = {**verdict.headline, "n_images": verdict.n_images, "failed": verdict.failed}
            _write(paths[verdict.judge], make_judged(past.name, [("sae", verdict)]), headline)
            self._counts.computed["judge"] += 1
        for path in paths.values():
            os.utime(path)
        return paths

    def _label(self, past: PastSAE, inputs: Mapping[str, Artefact], on_event: Listener) -> Iterator[tuple[str, Artefact]]:
        """Yield the labels by each labeller, which is run and scored alone, so that its numbers do not depend on other labellers."""
        for name, labeller in self._params.label.each().items():
            if isinstance(labeller, HumanLabeller) and labeller.is_log and names_checksum(Path(labeller.path)) is None:
                continue  # nobody has named a feature yet, as `label` takes it
            alone = one_labeller(self._params.label, labeller)
            key = self._keys.labels(inputs, labeller)

            def compute(draft: Draft, alone: LabelParams = alone, name: str = name) -> Artefact:
                return label(alone, inputs, draft, on_event, self._load_material(name, alone, inputs))

            try:
                yield name, self._make("labels", f"{past.name}-{key}", alone, inputs, compute, "labeller")
            except ConfigError as error:
                on_event(Warned(f"{past.name}: no labels by {name}: {error}"))

    def _load_material(self, name: str, alone: LabelParams, inputs: Mapping[str, Artefact]) -> Material:
        """Load what all SAEs share, once for each labeller."""
        if name not in self._material:
            self._material[name] = load_material(alone, inputs, self._on_event, self._saes)
        return self._material[name]

    def _make(
        self,
        kind: str,
        name: str,
        section: Section,
        inputs: Mapping[str, Artefact],
        compute: Callable[[Draft], Artefact],
        counted: str,
    ) -> Artefact:
        """Return an artefact of one SAE, computing it unless it is there."""
        place = PLACE / kind / name
        if (place / MANIFEST).exists():
            try:
                found = store.open_artefact(place, kind)
                found.verify()
            except ArtefactError:  # it is made again
                shutil.rmtree(place)
            else:
                os.utime(place / MANIFEST)  # so that `ommatid gc` sees that it is used
                self._counts.reused[counted] += 1
                return found
        with store.open_draft(place, kind, section.identity(), inputs) as draft:
            if draft.published:
                self._counts.reused[counted] += 1
                return draft.published
            if not draft.sealed():
                compute(draft)
            self._counts.computed[counted] += 1
            return draft.publish(place)


def _open_own_evaluations() -> dict[str, Artefact]:
    """Open the checkout's evaluations, by the digest of the SAE; none if it has not been evaluated."""
    with suppress(ArtefactError):
        return {evaluation.manifest.inputs["train"]: evaluation for evaluation in open_stage("evaluate").each().values()}
    return {}


def _scores_of(evaluation: Artefact, judge: str) -> pa.Table:
    """Return the rows of the table `judged` about the SAE by one judge."""
    rows = evaluation.read("judged")
    return rows.filter((pc.field("dictionary") == "sae") & (pc.field("judge") == judge))


def _write(path: Path, table: pa.Table, headline: Mapping[str, Any]) -> None:
    """Write a table with the numbers of the whole SAE in its metadata, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, numbers = temporary_path(path), json.dumps(dict(headline)).encode()
    metadata = {HEADLINE: numbers, CHECKSUM: _checksum(numbers)}
    pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)
    os.replace(temporary, path)


def _is_whole(path: Path) -> bool:
    """Return whether a table that `_write` wrote is there and undamaged."""
    try:
        metadata = pq.read_table(path, page_checksum_verification=True).schema.metadata or {}
    except (OSError, ValueError):  # errors of Arrow are among them
        return False
    return _checksum(metadata.get(HEADLINE, b"")) == metadata.get(CHECKSUM)


def _checksum(numbers: bytes) -> bytes:
    return hashlib.sha256(numbers).hexdigest().encode()


def read_headline(path: Path) -> dict[str, Any]:
    """Read the numbers of the whole SAE by one judge."""
    return json.loads(pq.read_schema(path).metadata[HEADLINE])
