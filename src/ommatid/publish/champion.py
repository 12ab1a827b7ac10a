"""Champion and challenger: which SAE is published, and why.

    data/published/catalog.duckdb          the champion's catalogue, replaced whole: readers of the old file keep it
    data/published/decisions.jsonl         every decision with its numbers, one a line, only ever added to
    data/published/champions/<key>/        the champion's SAE and catalogue as they were when it won; the catalogue also
                                           matches its latents with those of the champion before, on the same images

The line in decisions.jsonl is what decides. The champion's files are there before its line is written, and `settle` makes the rest
follow from the lines: whatever moment a run dies at, the next one ends where it would have ended. Works in the current directory.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ommatid import store
from ommatid.config import EvaluateParams, Params, RetrainParams
from ommatid.config.problems import explain
from ommatid.errors import ArtefactError
from ommatid.events import Listener, ignore
from ommatid.stage import open_stage
from ommatid.store import Artefact
from ommatid.store.filesystem import sync

if TYPE_CHECKING:
    import pyarrow as pa

    from ommatid.evaluate.matches import Evaluated

PUBLISHED = Path("data/published")
CATALOG = PUBLISHED / "catalog.duckdb"
DECISIONS = PUBLISHED / "decisions.jsonl"
CHAMPIONS = PUBLISHED / "champions"
MATCHED = PUBLISHED / "matched"
"""Matches of a challenger with the champion, in a folder by the challenger's catalogue, until it is decided."""
SETTLED = PUBLISHED / "settled"
"""How many bytes of decisions.jsonl the published catalogue holds."""

ROUNDING = 1e-9
"""0.31 - 0.30 is more than 0.01 in floating point; a margin means what it says."""


class Scores(BaseModel):
    """An SAE on an evaluation split."""

    model_config = ConfigDict(frozen=True)

    sae: str
    """Its name."""
    digest: str
    """sha256 of its manifest."""
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean latents that fire a token."""
    dead: float
    """Share of latents that never fire."""
    ms: float | None
    """Mean monosemanticity; None: undefined for every latent."""
    ms_floor: float | None
    """What unrelated images would score."""

    @property
    def gain(self) -> float:
        """Mean MS above its floor; minus infinity where it is undefined."""
        return -math.inf if self.ms is None or self.ms_floor is None else self.ms - self.ms_floor


class Decision(BaseModel):
    """What became of a challenger: one line of decisions.jsonl."""

    model_config = ConfigDict(frozen=True)

    decision: Literal["champion", "challenger"]
    """`champion`: it is published; `challenger`: the champion stays."""
    reason: str
    """The numbers behind it, in a sentence."""
    decided_at: datetime
    """When, UTC."""
    challenger: Scores
    """The challenger's numbers."""
    champion: Scores | None
    """The numbers of the champion of that time on the same split; None: there was none, or it could not be measured there."""
    margins: RetrainParams
    """The margins that it was held against."""
    catalog: str
    """sha256 of the manifest of the challenger's catalogue."""
    run: dict[str, Any]
    """Its row of the relation `runs`."""


def compare(champion: Scores | None, challenger: Scores, margins: RetrainParams) -> tuple[bool, str]:
    """Whether the challenger becomes champion, and the sentence that says why; both were measured on the same split."""
    if champion is None:
        return True, "there was no champion"
    if champion.digest == challenger.digest:
        return True, "the same SAE as the champion, with a new catalogue"
    gain = challenger.gain - champion.gain if challenger.gain > -math.inf else -math.inf
    fvu_loss, dead_rise = challenger.fvu - champion.fvu, challenger.dead - champion.dead
    checks = [
        (gain >= margins.min_ms_gain - ROUNDING, f"MS above floor {gain:+.4f} (at least {margins.min_ms_gain:+g})"),
        (fvu_loss <= margins.max_fvu_loss + ROUNDING, f"FVU {fvu_loss:+.4f} (at most {margins.max_fvu_loss:+g})"),
        (dead_rise <= margins.max_dead_rise + ROUNDING, f"dead {dead_rise:+.4f} (at most {margins.max_dead_rise:+g})"),
    ]
    failed = [text for passed, text in checks if not passed]
    passed = [text for passed, text in checks if passed]
    if failed:
        return False, f"the champion stays: {'; '.join(failed)}" + (f"; though {'; '.join(passed)}" if passed else "")
    return True, f"better than the champion: {'; '.join(passed)}"


def decide(params: Params, on_event: Listener = ignore) -> Decision:
    """Hold the best SAE that the checkout's stages made against the champion, measured anew on the same evaluation split."""
    catalog = open_stage("catalog")
    made = _read_scores(catalog)
    challenger = max(made.values(), key=lambda scores: scores.gain)
    last, champion = find_champion(), None
    if last is None:
        won, reason = compare(None, challenger, params.retrain)
    elif champion := made.get(last.challenger.digest):
        won, reason = compare(champion, challenger, params.retrain)
    elif obstacle := _incomparable(_sae_of(last)):
        won, reason = True, f"the champion {last.challenger.sae} cannot be measured on these activations: {obstacle}"
    else:
        champion = _measure(_sae_of(last), params.evaluate, on_event, challenger, catalog.digest)
        won, reason = compare(champion, challenger, params.retrain)
    return Decision(
        decision="champion" if won else "challenger",
        reason=reason if len(made) == 1 else f"{reason}; it is the best of {len(made)} SAEs",
        decided_at=datetime.now(UTC),
        challenger=challenger,
        champion=champion,
        margins=params.retrain,
        catalog=catalog.digest,
        run=_run_of(catalog, challenger.sae),
    )


def publish(decision: Decision) -> None:
    """Record a decision, and make the published files follow."""
    if decision.decision == "champion":
        _keep(decision)
    _append(decision)
    settle()


def settle() -> None:
    """Make the published catalogue, and nothing else, follow from decisions.jsonl; undoes what a dead run left half done."""
    champion = find_champion()
    keep = _folder(champion) if champion else None
    for folder in CHAMPIONS.glob("*"):
        if folder != keep:
            shutil.rmtree(folder)
    shutil.rmtree(MATCHED, ignore_errors=True)
    shutil.rmtree(PUBLISHED / ".work", ignore_errors=True)
    if champion and not _is_settled():
        _publish_catalog(champion)


def point_alias() -> str | None:
    """Let the alias `champion` of the MLflow registry point at the champion's SAE; says so when it had to be moved.

    Raises:
        RunError: the registry does not answer, or does not hold the SAE.
    """
    from ommatid import tracking

    champion = find_champion()
    pointed = tracking.get_champion() if champion else None
    if champion is None or (pointed and pointed.sae == champion.challenger.digest):
        return None
    version = tracking.set_champion(champion.challenger.digest)
    return f"{tracking.MODEL}: the alias {tracking.CHAMPION} now points at version {version.number}, {champion.challenger.sae}"


def is_decided() -> bool:
    """Whether the last decision was about what the checkout holds now."""
    decisions = read_decisions()
    return bool(decisions) and decisions[-1].catalog == open_stage("catalog").digest


def find_champion() -> Decision | None:
    """The decision that made today's champion."""
    return next((decision for decision in reversed(read_decisions()) if decision.decision == "champion"), None)


def read_decisions() -> list[Decision]:
    """All decisions, oldest first; a last line that a dying run cut short counts as not written.

    Raises:
        ArtefactError: a line before it is no decision.
    """
    if not DECISIONS.exists():
        return []
    whole = DECISIONS.read_bytes().rpartition(b"\n")[0]
    decisions = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            decisions.append(Decision.model_validate_json(line))
        except ValidationError as error:
            raise ArtefactError(f"{DECISIONS}: line {number} is no decision ({explain(error, Decision)}); take the line out") from None
    return decisions


def _read_scores(catalog: Artefact) -> dict[str, Scores]:
    """Of every SAE of the checkout's catalogue, by its digest; the gates may have rejected others of the training."""
    saes, evaluations = open_stage("train").each(), open_stage("evaluate").each()
    return {saes[name].digest: _scores(saes[name], evaluations[name]) for name in catalog.summary["saes"]}


def _scores(sae: Artefact, evaluation: Artefact) -> Scores:
    return Scores(digest=sae.digest, **{key: evaluation.summary[key] for key in Scores.model_fields if key != "digest"})


def _folder(decision: Decision) -> Path:
    return CHAMPIONS / _key(decision.catalog)


def _key(catalog: str) -> str:
    return catalog[:16]


def _sae_of(decision: Decision) -> Artefact:
    return store.open_artefact(_folder(decision) / "sae", "sae")


def _incomparable(sae: Artefact) -> str | None:
    """Why the SAE cannot encode the checkout's activations, or decodes others; None: it can be measured there."""
    was, now = _config(sae), _config(_any_sae())
    differing = [key for key in ("model", "hookpoint", "d_model", "target") if was.get(key) != now.get(key)]
    return ", ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in differing) or None


def _any_sae() -> Artefact:
    """One of the training: all of them encode and decode the same activations."""
    return next(iter(open_stage("train").each().values()))


def _config(sae: Artefact) -> Mapping[str, Any]:
    return json.loads(sae.file("cfg.json").read_text(encoding="utf-8"))


def _activations() -> dict[str, Artefact]:
    """What the challenger was trained on; of a transcoder also what it decodes."""
    config = _config(_any_sae())
    target = {"target": open_stage("extract", config["target"])} if config.get("target") else {}
    return {"extract": open_stage("extract", config["hookpoint"]), **target}


def _measure(sae: Artefact, params: EvaluateParams, on_event: Listener, challenger: Scores, catalog: str) -> Scores:
    """Evaluate an SAE on the checkout's images and activations, and match its latents with the challenger's, which fire on the same."""
    from ommatid.evaluate.matches import Evaluated, match
    from ommatid.evaluate.stage import evaluate

    inputs = {"images": open_stage("images"), "train": sae, **_activations()}
    with store.open_draft(PUBLISHED / "evaluation", "evaluation", params.model_dump(mode="json"), inputs) as draft:
        evaluation = draft.sealed() or evaluate(params, inputs, draft, on_event)
        pair = match(_evaluated(challenger), Evaluated(sae, evaluation), draft.scratch)
        _write_matched(catalog, {"matches": pair.matches, "stability": pair.stability})
        return _scores(sae, evaluation)


def _evaluated(made: Scores) -> "Evaluated":
    """One of the checkout's SAEs, with what it does."""
    from ommatid.evaluate.matches import Evaluated

    name, sae = next((name, sae) for name, sae in open_stage("train").each().items() if sae.digest == made.digest)
    return Evaluated(sae, open_stage("evaluate").each()[name])


def _write_matched(catalog: str, tables: Mapping[str, "pa.Table"]) -> None:
    """Rows that the catalogue gets should its SAE win."""
    import pyarrow.parquet as pq

    folder = MATCHED / _key(catalog)
    folder.mkdir(parents=True, exist_ok=True)
    for relation, table in tables.items():
        pq.write_table(table, folder / f"{relation}.parquet")


def _keep(decision: Decision) -> None:
    """Copy the challenger's SAE and catalogue, whole or not at all."""
    from ommatid.publish.catalog import add_rows

    place, aside = _folder(decision), _folder(decision).with_suffix(".tmp")
    if place.exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    sae = next(sae for sae in open_stage("train").each().values() if sae.digest == decision.challenger.digest)
    shutil.copytree(sae.path, aside / "sae")
    shutil.copyfile(open_stage("catalog").file(CATALOG.name), aside / CATALOG.name)
    add_rows(aside / CATALOG.name, {path.stem: path for path in (MATCHED / _key(decision.catalog)).glob("*.parquet")})
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    os.rename(aside, place)
    sync(CHAMPIONS)


def _append(decision: Decision) -> None:
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    with DECISIONS.open("ab") as file:
        whole = DECISIONS.read_bytes().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
        file.write(decision.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(PUBLISHED)


def _is_settled() -> bool:
    return CATALOG.exists() and SETTLED.exists() and SETTLED.read_text() == str(DECISIONS.stat().st_size)


def _publish_catalog(champion: Decision) -> None:
    """The champion's catalogue, with every SAE that was decided on in `runs`; readers that hold the old one keep it."""
    from ommatid.publish.catalog import write_runs

    aside = CATALOG.with_suffix(".new")
    shutil.copyfile(_folder(champion) / CATALOG.name, aside)
    write_runs(aside, [_row(decision) for decision in read_decisions()])
    sync(aside)
    os.replace(aside, CATALOG)
    SETTLED.write_text(str(DECISIONS.stat().st_size))
    sync(PUBLISHED)


def _row(decision: Decision) -> dict[str, Any]:
    return {**decision.run, "decision": decision.decision, "decided_at": decision.decided_at, "reason": decision.reason}


def _run_of(catalog: Artefact, sae: str) -> dict[str, Any]:
    from ommatid.catalog.reader import Catalog

    with Catalog(catalog.file(CATALOG.name)) as opened:
        (row,) = opened.ask("FROM runs WHERE sae = $sae", {"sae": sae}).dicts()
    return row
