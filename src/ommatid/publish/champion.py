"""Champion and challenger: which SAE is published, and why.

    data/published/catalog.duckdb          the champion's catalogue; replaced as a whole, so that open readers keep the old file
    data/published/decisions.jsonl         every decision with its numbers, one per line; lines are only ever appended
    data/published/champions/<key>/        the champion's SAE and catalogue as they were when it won; the catalogue also
                                           matches its latents with those of the previous champion, on the same images

decisions.jsonl is the source of truth. The champion's files are complete before its line is written, and `settle` derives
everything else from the lines, so that a run killed at any point is completed by the next one. All paths are relative to the current
directory.
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
from ommatid.config.messages import explain
from ommatid.errors import ArtefactError
from ommatid.events import Listener, ignore
from ommatid.pipeline import open_stage
from ommatid.store import Artefact
from ommatid.store.filesystem import sync

if TYPE_CHECKING:
    import pyarrow as pa

    from ommatid.evaluate.latent_pairs import EvaluatedSAE

PUBLISHED = Path("data/published")
CATALOG = PUBLISHED / "catalog.duckdb"
DECISIONS = PUBLISHED / "decisions.jsonl"
CHAMPIONS = PUBLISHED / "champions"
MATCHED = PUBLISHED / "matched"
"""Matches of a challenger's latents with the champion's, kept until the decision, in a folder named by the challenger's catalogue."""
SETTLED = PUBLISHED / "settled"
"""File with the number of bytes of decisions.jsonl that the published catalogue reflects."""

ROUNDING = 1e-9
"""Tolerance when a difference is compared with a margin, as 0.31 - 0.30 exceeds 0.01 in floating point."""


class Scores(BaseModel):
    """Scores of an SAE on an evaluation split."""

    model_config = ConfigDict(frozen=True)

    sae: str
    """Name of the SAE."""
    digest: str
    """sha256 of the SAE's manifest."""
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of latents that fire per token."""
    dead: float
    """Share of latents that never fire."""
    ms: float | None
    """Mean monosemanticity score (MS); None if it is undefined for every latent."""
    ms_floor: float | None
    """MS of unrelated images."""

    @property
    def gain(self) -> float:
        """Mean MS above its floor; minus infinity if undefined."""
        return -math.inf if self.ms is None or self.ms_floor is None else self.ms - self.ms_floor


class Decision(BaseModel):
    """The decision on a challenger; one line of decisions.jsonl."""

    model_config = ConfigDict(frozen=True)

    decision: Literal["champion", "challenger"]
    """`champion` if the challenger won and is published; `challenger` if the previous champion stays."""
    reason: str
    """Sentence with the numbers behind the decision."""
    decided_at: datetime
    """Time of the decision, UTC."""
    challenger: Scores
    """Scores of the challenger."""
    champion: Scores | None
    """Scores of the champion of that time on the same split; None if there was none or it could not be measured there."""
    margins: RetrainParams
    """Margins by which the challenger had to win."""
    catalog: str
    """sha256 of the manifest of the challenger's catalogue."""
    run: dict[str, Any]
    """The challenger's row of the relation `runs`."""


def compare(champion: Scores | None, challenger: Scores, margins: RetrainParams) -> tuple[bool, str]:
    """Compare a challenger with the champion.

    Args:
        champion: Scores of the champion; None if there is none.
        challenger: Scores of the challenger on the same evaluation split.
        margins: Margins by which the challenger has to win.

    Returns:
        Whether the challenger becomes the champion, and a sentence that says why.
    """
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
        return False, f"the champion stays: {'; '.join(failed)}" + (f"; but {'; '.join(passed)}" if passed else "")
    return True, f"better than the champion: {'; '.join(passed)}"


def decide(params: Params, on_event: Listener = ignore) -> Decision:
    """Compare the checkout's best SAE with the champion, which is evaluated again on the checkout's evaluation split.

    Args:
        params: All params; those of the evaluation and of retraining are used.
        on_event: Called with each progress event and warning.

    Returns:
        The decision, which `publish` records.
    """
    catalog = open_stage("catalog")
    candidates = _read_scores(catalog)
    challenger = max(candidates.values(), key=lambda scores: scores.gain)
    last, champion = find_champion(), None
    if last is None:
        won, reason = compare(None, challenger, params.retrain)
    elif champion := candidates.get(last.challenger.digest):
        won, reason = compare(champion, challenger, params.retrain)
    elif obstacle := _find_mismatch(_sae_of(last)):
        won, reason = True, f"the champion {last.challenger.sae} cannot be measured on these activations: {obstacle}"
    else:
        champion = _measure(_sae_of(last), params.evaluate, on_event, challenger, catalog.digest)
        won, reason = compare(champion, challenger, params.retrain)
    return Decision(
        decision="champion" if won else "challenger",
        reason=reason if len(candidates) == 1 else f"{reason}; it is the best of {len(candidates)} SAEs",
        decided_at=datetime.now(UTC),
        challenger=challenger,
        champion=champion,
        margins=params.retrain,
        catalog=catalog.digest,
        run=_run_of(catalog, challenger.sae),
    )


def publish(decision: Decision) -> None:
    """Record a decision and update the published files accordingly."""
    if decision.decision == "champion":
        _copy_winner(decision)
    _append(decision)
    settle()


def settle() -> None:
    """Bring the published files in line with decisions.jsonl, completing or undoing what a killed run left unfinished."""
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
    """Point the alias `champion` of the MLflow registry at the champion's SAE.

    Returns:
        A sentence that says where the alias points now; None if it did not have to be moved.

    Raises:
        RunError: The registry does not answer, or does not hold the SAE.
    """
    from ommatid import tracking

    champion = find_champion()
    pointed = tracking.get_champion() if champion else None
    if champion is None or (pointed and pointed.sae == champion.challenger.digest):
        return None
    version = tracking.set_champion(champion.challenger.digest)
    return f"{tracking.MODEL}: the alias {tracking.CHAMPION} now points at version {version.number}, {champion.challenger.sae}"


def is_decided() -> bool:
    """Return whether the last decision was about the catalogue that the checkout holds now."""
    decisions = read_decisions()
    return bool(decisions) and decisions[-1].catalog == open_stage("catalog").digest


def find_champion() -> Decision | None:
    """Find the decision that made the current champion; None if there is no champion."""
    return next((decision for decision in reversed(read_decisions()) if decision.decision == "champion"), None)


def read_decisions() -> list[Decision]:
    """Read all decisions, oldest first; an incomplete last line, left by a killed run, is ignored.

    Raises:
        ArtefactError: A complete line is not a valid decision.
    """
    if not DECISIONS.exists():
        return []
    whole = DECISIONS.read_bytes().rpartition(b"\n")[0]
    decisions = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            decisions.append(Decision.model_validate_json(line))
        except ValidationError as error:
            raise ArtefactError(f"{DECISIONS}: line {number} is not a decision ({explain(error, Decision)}); delete that line") from None
    return decisions


def _read_scores(catalog: Artefact) -> dict[str, Scores]:
    """Scores of every SAE in the checkout's catalogue, by digest; SAEs that a gate rejected are not in it."""
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


def _find_mismatch(sae: Artefact) -> str | None:
    """Reason why the SAE cannot be measured on the checkout's activations; None if it can."""
    was, now = _config(sae), _config(_any_sae())
    differing = [key for key in ("model", "hookpoint", "d_model", "target") if was.get(key) != now.get(key)]
    return ", ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in differing) or None


def _any_sae() -> Artefact:
    """Any SAE of the training; all of them encode and decode the same activations."""
    return next(iter(open_stage("train").each().values()))


def _config(sae: Artefact) -> Mapping[str, Any]:
    return json.loads(sae.file("cfg.json").read_text(encoding="utf-8"))


def _activations() -> dict[str, Artefact]:
    """Activations that the challenger was trained on and, if it is a transcoder, those that it decodes, as `target`."""
    config = _config(_any_sae())
    target = {"target": open_stage("extract", config["target"])} if config.get("target") else {}
    return {"extract": open_stage("extract", config["hookpoint"]), **target}


def _measure(sae: Artefact, params: EvaluateParams, on_event: Listener, challenger: Scores, catalog: str) -> Scores:
    """Evaluate an SAE on the checkout's images and activations, and match its latents with the challenger's."""
    from ommatid.evaluate.latent_pairs import EvaluatedSAE, match
    from ommatid.evaluate.stage import evaluate

    inputs = {"images": open_stage("images"), "train": sae, **_activations()}
    with store.open_draft(PUBLISHED / "evaluation", "evaluation", params.model_dump(mode="json"), inputs) as draft:
        evaluation = draft.sealed() or evaluate(params, inputs, draft, on_event)
        pair = match(_evaluated(challenger), EvaluatedSAE(sae, evaluation), draft.scratch)
        _write_matched(catalog, {"matches": pair.matches, "stability": pair.stability})
        return _scores(sae, evaluation)


def _evaluated(scores: Scores) -> "EvaluatedSAE":
    """The checkout's SAE that has these scores, with its evaluation."""
    from ommatid.evaluate.latent_pairs import EvaluatedSAE

    name, sae = next((name, sae) for name, sae in open_stage("train").each().items() if sae.digest == scores.digest)
    return EvaluatedSAE(sae, open_stage("evaluate").each()[name])


def _write_matched(catalog: str, tables: Mapping[str, "pa.Table"]) -> None:
    """Write the rows that are added to the challenger's catalogue if its SAE wins."""
    import pyarrow.parquet as pq

    folder = MATCHED / _key(catalog)
    folder.mkdir(parents=True, exist_ok=True)
    for relation, table in tables.items():
        pq.write_table(table, folder / f"{relation}.parquet")


def _copy_winner(decision: Decision) -> None:
    """Copy the challenger's SAE and catalogue to the folder of champions, atomically."""
    from ommatid.publish.catalog import add_rows

    folder, temporary = _folder(decision), _folder(decision).with_suffix(".tmp")
    if folder.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    sae = next(sae for sae in open_stage("train").each().values() if sae.digest == decision.challenger.digest)
    shutil.copytree(sae.path, temporary / "sae")
    shutil.copyfile(open_stage("catalog").file(CATALOG.name), temporary / CATALOG.name)
    add_rows(temporary / CATALOG.name, {path.stem: path for path in (MATCHED / _key(decision.catalog)).glob("*.parquet")})
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    os.rename(temporary, folder)
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
    """Publish the champion's catalogue, with a row in `runs` for every decision; open readers of the old file keep it."""
    from ommatid.publish.catalog import write_runs

    temporary = CATALOG.with_suffix(".new")
    shutil.copyfile(_folder(champion) / CATALOG.name, temporary)
    write_runs(temporary, [_row(decision) for decision in read_decisions()])
    sync(temporary)
    os.replace(temporary, CATALOG)
    SETTLED.write_text(str(DECISIONS.stat().st_size))
    sync(PUBLISHED)


def _row(decision: Decision) -> dict[str, Any]:
    return {**decision.run, "decision": decision.decision, "decided_at": decision.decided_at, "reason": decision.reason}


def _run_of(catalog: Artefact, sae: str) -> dict[str, Any]:
    from ommatid.catalog.reader import Catalog

    with Catalog(catalog.file(CATALOG.name)) as opened:
        (row,) = opened.ask("FROM runs WHERE sae = $sae", {"sae": sae}).dicts()
    return row
