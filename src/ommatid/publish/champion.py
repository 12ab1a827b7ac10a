"""Champion and challenger: which SAE is published, and why.

    data/published/catalog.duckdb          the champion's catalogue; replaced as a whole, so that open readers keep the old file
    data/published/decisions.jsonl         every decision with its numbers, one per line; lines are only ever appended
    data/published/champions/<key>/        a champion's SAE and catalogue as they were when it won, and what new images are compared
                                           with (ommatid/drift); the catalogue also matches its latents with those of the champion
                                           before it, on the same images
    data/published/drift/<check>/          a check of new images for drift (publish/drift.py), which the published catalogue shows

decisions.jsonl is the source of truth. A champion's files are complete before its line is written, and `settle` derives everything else
from the lines, so that a run killed at any point is completed by the next one. All paths are relative to the current directory.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from ommatid import store
from ommatid.config import EvaluateParams, Margins, Params
from ommatid.config.train import CHAMPION
from ommatid.errors import ArtefactError, ConfigError, QueryError, RunError
from ommatid.events import Listener, Warned, ignore
from ommatid.pipeline import open_stage
from ommatid.pipeline.inputs import check_lineage
from ommatid.publish.approval import Waiting, find_end, read_waiting, write_waiting
from ommatid.publish.decisions import (
    DECISIONS,
    PUBLISHED,
    Decision,
    Matched,
    Scores,
    append,
    find_champion,
    log_size,
    make_key,
    read_decisions,
    stand,
)
from ommatid.store import Artefact
from ommatid.store.filesystem import sync, temporary_path
from ommatid.store.per_sae import read_config

if TYPE_CHECKING:
    import pyarrow as pa

    from ommatid.drift import Extraction
    from ommatid.evaluate.latent_pairs import EvaluatedSAE

CATALOG = PUBLISHED / "catalog.duckdb"
CHAMPIONS = PUBLISHED / "champions"
CHECKS = PUBLISHED / "drift"
REFERENCE = "drift"
"""Name of the folder in a champion's with what new images are compared with."""
SETTLED = PUBLISHED / "settled"
"""File with the number of bytes of decisions.jsonl, and the last check of drift if there is any, that the published catalogue reflects;
an incomplete last line does not count."""
WORK = Path("data/.work")
MEASURED = Path("data/champion")
"""Where the evaluation of the champion on the checkout's images would be published; it stays a draft, in `WORK`."""
MATCHED = WORK / "matched"
"""Matches of a challenger's latents with the champion's, kept until the decision, in a folder named by both keys."""
ABANDONED_SECONDS = 86400.0
"""Age of such a folder after which no process is about to decide by it."""

PLACE = ("model", "hookpoint", "target")
"""Keys of an SAE's config, and columns of `runs`, that say which activations it encodes and decodes."""
ROUNDING = 1e-9
"""Tolerance when a difference is compared with a margin, as 0.31 - 0.30 exceeds 0.01 in floating point."""


class SupersededError(RunError):
    """The champion that a challenger was compared with is no longer the champion; nothing was published."""


def compare(champion: Scores | None, challenger: Scores, margins: Margins) -> tuple[bool, str]:
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


def decide(params: Params, on_event: Listener = ignore, who: str | None = None, sae: str | None = None) -> Decision:
    """Compare an SAE of the checkout with the champion, which is evaluated again on the checkout's evaluation split.

    An SAE that repeats one that a rollback set aside, by its weights or by its data and params, does not win again. If SAEs of the
    checkout have the hookpoint of the champion, only these challenge it: numbers of different hookpoints are about different activations.

    Args:
        params: All params; those of the evaluation and of retraining are used.
        on_event: Called with each progress event and warning.
        who: Who decides.
        sae: Name of the SAE in the tables; None for the best that was not set aside.

    Returns:
        The decision, which `publish` records.
    """
    catalog = _open_catalog()
    candidates = _read_scores(catalog)
    rows = {digest: _run_of(catalog, scores.sae) for digest, scores in candidates.items()}
    standing = stand(read_decisions())
    last = standing.champion
    bars = {digest: standing.find_bar(digest, rows[digest]) for digest in candidates}
    rivals = [digest for digest, row in rows.items() if sae or (last and _same_place(row, last.run))] or list(candidates)
    ranked = sorted((candidates[digest] for digest in rivals), key=lambda scores: (bars[scores.digest] is None, scores.gain), reverse=True)
    challenger = ranked[0] if sae is None else next(scores for scores in ranked if scores.sae == sae)
    key = make_key(catalog.digest, challenger.digest)
    _remove_abandoned()
    champion, matched = None, None
    if last is None:
        won, reason = compare(None, challenger, params.retrain)
    elif bar := bars[challenger.digest]:
        won, reason = False, _describe_bar(last, challenger, bar)
    elif champion := candidates.get(last.challenger.digest):
        won, reason = compare(champion, challenger, params.retrain)
        matched = _count_within(champion, challenger)
    elif obstacle := _find_loss(last):
        won, reason = not CATALOG.exists(), _describe_loss(last, obstacle)
    elif obstacle := _find_mismatch(_sae_of(last)):
        won, reason = True, f"the champion {last.challenger.sae} cannot be measured on these activations: {obstacle}"
    else:
        champion, matched = _measure(_sae_of(last), params.evaluate, on_event, challenger, _pair(key, last.key))
        won, reason = compare(champion, challenger, params.retrain)
    return Decision(
        decision="champion" if won else "challenger",
        reason=reason if len(rivals) == 1 or sae else f"{reason}; it is the best of {len(rivals)} SAEs",
        who=who,
        decided_at=datetime.now(UTC),
        challenger=challenger,
        champion=champion,
        against=last.key if last else None,
        matched=matched,
        margins=params.retrain.margins,
        catalog=catalog.digest,
        run=rows[challenger.digest],
        key=key,
    )


def publish(decision: Decision, keep: int, on_event: Listener = ignore) -> None:
    """Record a decision and update the published files accordingly.

    Args:
        decision: What `decide` returned.
        keep: Number of champions whose folders are kept.
        on_event: Called with warnings.

    Raises:
        SupersededError: The champion is no longer the one that the challenger was compared with, or the challenger is no longer in the
            checkout's catalogue; decide again.
        ArtefactError: data/approval.json is damaged.
    """
    with _locked():
        _check_against(decision)
        read_waiting()  # raises an error if it cannot be read, before anything is written
        if decision.decision == "champion":
            _keep_winner(decision, on_event)
        append(decision)
        _settle(keep, on_event)
    shutil.rmtree(MATCHED / _pair(decision.key, decision.against), ignore_errors=True)
    with suppress(filelock.Timeout), filelock.FileLock(WORK / f"{MEASURED.name}.lock", timeout=0):  # or another process works there
        for folder in WORK.glob(f"{MEASURED.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def wait(waiting: Waiting, on_event: Listener = ignore) -> None:
    """Keep a challenger that won until a person answers, in place of the one that waited before.

    Args:
        waiting: The challenger, with the decision to publish it.
        on_event: Called with warnings.

    Raises:
        SupersededError: As of `publish`.
    """
    with _locked():
        _check_against(waiting.decision)
        _keep_winner(waiting.decision, on_event)
        write_waiting(waiting)


def promote(name: str, params: Params, who: str, why: str | None, on_event: Listener = ignore) -> Decision:
    """Make an SAE the champion, whatever a comparison says.

    Args:
        name: An SAE of the checkout's catalogue, or a former champion that is kept: its key, the beginning of it, or its name.
        params: All params; those of the evaluation and of retraining are used.
        who: Who promotes it.
        why: What that person says about it.
        on_event: Called with each progress event and warning.

    Returns:
        The decision that was recorded.

    Raises:
        ConfigError: There is no such SAE, or it is the champion already.
        SupersededError: Somebody else changed the champion or the checkout's catalogue in the meantime.
    """
    last = find_champion()
    if (digest := _find_here(name)) is not None:
        catalog = _open_catalog()
        scores = _read_scores(catalog)[digest]
        key = make_key(catalog.digest, digest)
        former = None
    else:
        former = _find_former_or_name_those_here(name)
        key, scores = former.key, former.challenger
    if last and last.key == key:
        raise ConfigError(f"champion promote {name}: it is the champion already, since {_date(last)}")
    by_hand = {"decision": "champion", "how": "promote", "who": who, "why": why, "decided_at": datetime.now(UTC)}
    if former:
        reason = f"promoted again; it was the champion since {_date(former)}"
        changes = {"reason": reason, "champion": None, "matched": None, "against": last.key if last else None}
        made = former.model_copy(update=by_hand | changes)
    else:
        decided = decide(params, on_event, sae=scores.sae)
        made = decided.model_copy(update=by_hand | {"reason": f"promoted by hand; the comparison says: {decided.reason}"})
    publish(made, params.retrain.keep, on_event)
    return made


def roll_back(to: str | None, keep: int, who: str, why: str | None, on_event: Listener = ignore) -> tuple[Decision, bool]:
    """Return to a former champion: the log, the published catalogue and the alias in the registry, in this order.

    A rollback that was cut short after its line was written is completed in place of a second one.

    Args:
        to: A former champion: its key, the beginning of it, or its name; None for the one before the present.
        keep: Number of champions whose folders are kept.
        who: Who rolls back.
        why: What that person says about it.
        on_event: Called with warnings, as when the registry does not answer; the next run sets the alias then.

    Returns:
        The line of the rollback, and whether it was written by an earlier one that was cut short.

    Raises:
        ConfigError: There is nothing to return to, or it is not kept.
    """
    with _locked():
        decisions = read_decisions()
        if decisions and decisions[-1].how == "rollback" and not _is_settled():
            _settle(keep, on_event, sets_alias=True)
            return decisions[-1], True
        standing = stand(decisions)
        if standing.champion is None:
            raise ConfigError("champion rollback: nothing was promoted yet, so there is nothing to return to")
        target = find_former(to) if to else standing.previous
        if target is None:
            is_alone = len({made.key for made in decisions if made.decision == "champion"}) == 1
            what = "there is no other to return to" if is_alone else "name another by --to, as `ommatid champion list` shows them"
            raise ConfigError(f"champion rollback: {standing.champion.challenger.sae} is the first champion; {what}")
        if target.key == standing.champion.key:
            raise ConfigError(f"champion rollback --to {to}: it is the champion already, since {_date(target)}")
        _check_kept(target)
        read_waiting()  # raises an error if it cannot be read, before anything is written
        made = target.model_copy(
            update={
                "decision": "champion",
                "how": "rollback",
                "reason": f"rolled back from {standing.champion.challenger.sae}",
                "who": who,
                "why": why,
                "decided_at": datetime.now(UTC),
                "champion": None,
                "against": standing.champion.key,
                "matched": None,
            }
        )
        append(made)
        _settle(keep, on_event, sets_alias=True)
        return made, False


def settle(keep: int, on_event: Listener = ignore) -> None:
    """Bring the published files in line with decisions.jsonl, completing or undoing what a killed run left unfinished.

    Args:
        keep: Number of champions whose folders are kept.
        on_event: Called with warnings about what is gone and cannot be derived.
    """
    with _locked():
        _settle(keep, on_event)


def point_alias() -> str | None:
    """Point the alias `champion` of the MLflow registry at the champion's SAE, registering the SAE first if the registry lacks it.

    Returns:
        A sentence that says where the alias points now; None if it did not have to be moved.

    Raises:
        RunError: The registry does not answer.
        ArtefactError: The registry does not hold the SAE, and the champion's folder does not hold it any more.
    """
    from ommatid import tracking

    champion = find_champion()
    pointed = tracking.get_champion() if champion else None
    if champion is None or (pointed and pointed.sae == champion.challenger.digest):
        return None
    if is_new := tracking.find_version(champion.challenger.digest) is None:
        tracking.register(_sae_of(champion), champion.run)
    version = tracking.set_champion(champion.challenger.digest)
    moved = f"{tracking.MODEL}: the alias {tracking.CHAMPION} now points at version {version.number}, {champion.challenger.sae}"
    return f"{moved}, which was registered from {folder_of(champion)}" if is_new else moved


def is_decided() -> bool:
    """Return whether the last decision about an SAE of the checkout was about the catalogue that the checkout holds now.

    Promotions of former champions and rollbacks say nothing of the checkout.
    """
    digest = open_stage("catalog").digest
    about = [made.catalog for made in read_decisions() if made.how == "retrain" or made.catalog == digest]
    return bool(about) and about[-1] == digest


def folder_of(decision: Decision) -> Path:
    """Return the folder of a champion's SAE and catalogue, whether it is kept or not."""
    return CHAMPIONS / decision.key


def resolve_start(params: Params) -> Params:
    """Replace `champion` in `train.init` by the folder of the champion's SAE.

    Args:
        params: All params.

    Returns:
        The params; unchanged if `train.init` is something else, or if there is no champion yet, which the stage `train` says.

    Raises:
        ArtefactError: The champion's SAE is gone or damaged.
    """
    if params.train.init != CHAMPION or (champion := find_champion()) is None:
        return params
    folder = folder_of(champion) / "sae"
    if not folder.is_dir():
        raise ArtefactError(
            f"train.init: the SAE of the champion {champion.challenger.sae} is gone from {folder}; bring it back with `dvc get`, promote "
            "another, or set train.init to null"
        )
    return params.model_copy(update={"train": params.train.model_copy(update={"init": str(folder)})})


def is_kept(decision: Decision) -> bool:
    """Return whether the SAE and the catalogue of a champion are there."""
    return (folder_of(decision) / CATALOG.name).exists() and _find_loss(decision) is None


def find_former(name: str) -> Decision:
    """Find a champion, present or former, by its key, the beginning of its key (four characters or more), or its name.

    Returns:
        The last line about it.

    Raises:
        ConfigError: There is none, or several.
    """
    known = stand(read_decisions()).last_said
    found = [one for key, one in known.items() if key == name or (len(name) >= 4 and key.startswith(name))]
    found = found or [one for one in known.values() if name in (one.challenger.sae, one.run.get("name"))]
    if len(found) == 1:
        return found[0]
    champions = ", ".join(f"{one.key} ({one.challenger.sae}, {_date(one)})" for one in found or known.values())
    problem = "names several champions; give the key of one of" if found else "is no champion, present or former; there are"
    raise ConfigError(f"{name!r} {problem} {champions or 'none'}")


def _keep_winner(decision: Decision, on_event: Listener) -> None:
    """Copy the SAE and the catalogue of a decision's SAE to the folder of champions, atomically, unless they are there."""
    from ommatid.publish.catalog import add_rows

    folder, temporary = folder_of(decision), folder_of(decision).with_suffix(".tmp")
    if folder.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    sae, catalog = _open_challenger(decision)
    shutil.copytree(sae.path, temporary / "sae")
    shutil.copyfile(catalog.file(CATALOG.name), temporary / CATALOG.name)
    add_rows(temporary / CATALOG.name, {path.stem: path for path in (MATCHED / _pair(decision.key, decision.against)).glob("*.parquet")})
    _write_reference(temporary, sae, on_event)
    _open_challenger(decision)  # as a stage may have replaced them meanwhile
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    os.rename(temporary, folder)
    sync(CHAMPIONS)


def _open_challenger(decision: Decision) -> tuple[Artefact, Artefact]:
    """Open the SAE and the catalogue of the checkout that a decision is about.

    Raises:
        SupersededError: The checkout holds others now.
    """
    catalog = open_stage("catalog")
    sae = next((sae for sae in open_stage("train").each().values() if sae.digest == decision.challenger.digest), None)
    if sae is None or catalog.digest != decision.catalog:
        raise SupersededError(
            f"the SAEs or the catalogue of the checkout changed while {decision.challenger.sae} was compared with the champion; "
            "nothing was published"
        )
    return sae, catalog


def _write_reference(folder: Path, sae: Artefact, on_event: Listener) -> None:
    """Write what new images are compared with to a champion's folder; an SAE can be the champion without it."""
    from ommatid.drift import write_reference

    try:
        evaluation = next(one for one in open_stage("evaluate").each().values() if one.summary["sae"] == sae.summary["sae"])
        among = read_images(folder / CATALOG.name)  # as others may have come in since its training
        write_reference(folder / REFERENCE, sae, open_extraction(sae), evaluation.summary["image_activation"], among, on_event)
    except (ArtefactError, QueryError) as error:
        on_event(Warned(f"new images will not be compared with those of {sae.summary['sae']}: {error}"))


def read_images(catalog: Path) -> set[str]:
    """Read the ids of all images of a champion from its catalogue.

    Raises:
        QueryError: The catalogue cannot be read.
    """
    from ommatid.catalog.reader import Catalog

    with Catalog(catalog) as opened:
        return {image_id for (image_id,) in opened.rows("SELECT image_id FROM images")}


def open_extraction(sae: Artefact) -> "Extraction":
    """Open the checkout's images, and their activations that an SAE encodes and decodes.

    Raises:
        ArtefactError: An artefact is missing or damaged, or has no activations of the SAE's hookpoint.
    """
    from ommatid.drift import Extraction

    activations = _activations(sae)
    return Extraction(open_stage("images"), activations["extract"], activations.get("target"))


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of the published files, so that one process changes them at a time.

    Raises:
        ArtefactError: The log has lost lines, so that champions would be taken for what a killed run left, and removed.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(WORK / "published.lock"):
        if (before := _settled_size()) > (now := log_size()):
            raise ArtefactError(
                f"{DECISIONS}: has {now:,} bytes of decisions, and had {before:,} when the catalogue was published; lines are only ever "
                f"appended, so some are lost: bring the file back, such as by `dvc checkout data/published.dvc`; or delete {SETTLED} to "
                "go on without them, and without the champions that only they name"
            )
        yield


def _check_against(decision: Decision) -> None:
    champion = find_champion()
    if (champion.key if champion else None) != decision.against:
        now = f"{champion.challenger.sae} ({champion.key})" if champion else "none"
        raise SupersededError(
            f"{decision.challenger.sae} was compared with the champion {decision.against}, and now it is {now}; nothing was published"
        )


def _check_kept(target: Decision) -> None:
    if is_kept(target):
        return
    raise ConfigError(
        f"champion {target.key} ({target.challenger.sae}): {folder_of(target)} is no longer kept (retrain.keep); bring it back from "
        "DVC, as docs/users/operations.md says, or choose another of `ommatid champion list`"
    )


def _settle(keep: int, on_event: Listener, sets_alias: bool = False) -> None:
    decisions, waiting = read_decisions(), read_waiting()
    standing = stand(decisions)
    there = [key for key in standing.keys if (CHAMPIONS / key).exists()]
    kept = {*there[:keep], *([waiting.decision.key] if waiting and find_end(waiting, decisions) is None else [])}
    for folder in list(CHAMPIONS.glob("*")):
        if folder.name not in kept:
            aside = folder.with_suffix(".tmp")  # first, so that what has its name is whole
            if folder != aside:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    if standing.champion and not (_is_settled() and SETTLED.read_text() == _state()):
        _publish_catalog(standing.champion, on_event)
        if sets_alias:
            _try_alias(on_event)
        SETTLED.write_text(_state())
        sync(PUBLISHED)


def try_alias(on_event: Listener) -> str | None:
    """Point the registry's alias at the champion as `point_alias` does; if that fails, say so, and the next run tries again."""
    with _locked():  # or a rollback might come between the reading of the champion and the setting of the alias
        return _try_alias(on_event)


def _try_alias(on_event: Listener) -> str | None:
    try:
        return point_alias()
    except (RunError, ArtefactError) as error:
        on_event(Warned(f"the alias champion was not set: {error}; the next run tries again"))


def _is_settled() -> bool:
    """Whether the published catalogue reflects the last decision, though perhaps not the last check of drift."""
    return CATALOG.exists() and SETTLED.exists() and SETTLED.read_text().split()[:1] == _state().split()[:1]


def _state() -> str:
    """What the published catalogue should reflect, as `SETTLED` says it."""
    checks = store.list_artefacts(CHECKS)
    return f"{log_size()} {checks[-1].name if checks else ''}".strip()


def _settled_size() -> int:
    """Number of bytes of the log that the published catalogue reflects; 0 if nothing was published."""
    said = SETTLED.read_text().split() if SETTLED.exists() else []
    return int(said[0]) if said and said[0].isdecimal() else 0


def _whole_checks(on_event: Listener) -> list[Path]:
    """Folders of the checks that can be published; one that is damaged holds up no champion."""
    if not store.list_artefacts(CHECKS):
        return []
    from ommatid.drift import list_checks

    return [one.artefact.path for one in list_checks(CHECKS, on_event)]


def _publish_catalog(champion: Decision, on_event: Listener) -> None:
    """Publish the champion's catalogue, with a row in `runs` for every decision; open readers of the old file keep it."""
    from ommatid.publish.catalog import write_drift, write_runs

    source, temporary = folder_of(champion) / CATALOG.name, CATALOG.with_suffix(".new")
    if not source.exists():
        on_event(Warned(f"the catalogue of the champion {champion.challenger.sae} is gone ({source}): {CATALOG} stays as it is"))
        return
    shutil.copyfile(source, temporary)
    write_runs(temporary, [_row(decision) for decision in read_decisions()])
    write_drift(temporary, _whole_checks(on_event))
    sync(temporary)
    os.replace(temporary, CATALOG)
    sync(PUBLISHED)


def _row(decision: Decision) -> dict[str, Any]:
    said = "; ".join(filter(None, [decision.reason, decision.why]))
    reason = said if decision.how == "retrain" else f"{said} ({decision.who})"
    return {**decision.run, "decision": decision.decision, "decided_at": decision.decided_at, "reason": reason}


def _date(decision: Decision) -> str:
    return f"{decision.decided_at:%Y-%m-%d %H:%M} UTC"


def _list_here() -> dict[str, Artefact]:
    """The SAEs of the checkout's catalogue, by their names in the training; none if they cannot be read."""
    try:
        catalog, saes = open_stage("catalog"), open_stage("train").each()
    except ArtefactError:
        return {}
    return {name: saes[name] for name in catalog.summary["saes"] if name in saes}


def _find_here(name: str) -> str | None:
    """Digest of the SAE of this name in the checkout, in the tables or in the training; None if there is none.

    Raises:
        ConfigError: It has not passed every gate.
        ArtefactError: It was trained after the catalogue was made.
    """
    try:
        saes = open_stage("train").each()
    except ArtefactError:
        return None
    folder = next((folder for folder, sae in saes.items() if name in (folder, sae.summary["sae"])), None)
    if folder is None:
        return None
    if folder not in _open_catalog().summary["saes"]:
        raise ConfigError(f"champion promote {name}: the catalogue does not have it, as a gate rejected it; see data/quality")
    return saes[folder].digest


def _find_former_or_name_those_here(name: str) -> Decision:
    try:
        former = find_former(name)
    except ConfigError as error:
        here = ", ".join(sae.summary["sae"] for sae in _list_here().values())
        raise ConfigError(f"champion promote: {error}; the checkout's catalogue has {here or 'no SAE'}") from None
    _check_kept(former)
    return former


def _describe_bar(last: Decision, challenger: Scores, bar: Decision) -> str:
    same = "it" if bar.challenger.digest == challenger.digest else f"{bar.challenger.sae}, trained on the same data with the same params,"
    return (
        f"the champion {last.challenger.sae} stays: {same} was rolled back; "
        f"`ommatid champion promote {challenger.sae}` publishes it all the same"
    )


def _find_loss(champion: Decision) -> str | None:
    """Reason why the champion's SAE cannot be read; None if it can."""
    try:
        _sae_of(champion)
    except ArtefactError as error:
        return str(error)
    return None


def _describe_loss(last: Decision, obstacle: str) -> str:
    if CATALOG.exists():
        return (
            f"the champion {last.challenger.sae} stays, as it cannot be compared: {obstacle}; bring its folder back from DVC, "
            "or promote an SAE by `ommatid champion promote`"
        )
    return f"nothing is left of the champion {last.challenger.sae}: {obstacle}"


def _open_catalog() -> Artefact:
    """Open the checkout's catalogue.

    Raises:
        ArtefactError: It is missing or damaged, or was not made from the checkout's SAEs and their evaluations.
    """
    stages = ("train", "evaluate", "catalog")
    opened = {name: open_stage(name) for name in stages}
    check_lineage("champion", opened)
    return opened["catalog"]


def _read_scores(catalog: Artefact) -> dict[str, Scores]:
    """Scores of every SAE in the checkout's catalogue, by digest; SAEs that a gate rejected are not in it."""
    saes, evaluations = open_stage("train").each(), open_stage("evaluate").each()
    return {saes[name].digest: _scores(saes[name], evaluations[name]) for name in catalog.summary["saes"]}


def _scores(sae: Artefact, evaluation: Artefact) -> Scores:
    return Scores(digest=sae.digest, **{key: evaluation.summary[key] for key in Scores.model_fields if key != "digest"})


def _sae_of(decision: Decision) -> Artefact:
    return store.open_artefact(folder_of(decision) / "sae", "sae")


def _find_mismatch(sae: Artefact) -> str | None:
    """Reason why the SAE cannot be measured on the checkout's activations; None if it can."""
    was = read_config(sae)
    configs = [read_config(other) for other in open_stage("train").each().values()]
    now = next((config for config in configs if _same_place(config, was)), configs[0])
    differing = [key for key in (*PLACE, "d_model") if was.get(key) != now.get(key)]
    return ", ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in differing) or None


def _same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two SAEs, given by their configs or rows of `runs`, encode and decode the same activations."""
    return all(one.get(key) == other.get(key) for key in PLACE)


def _activations(sae: Artefact) -> dict[str, Artefact]:
    """The checkout's activations that an SAE encodes and, if it is a transcoder, those that it decodes, as `target`."""
    config = read_config(sae)
    target = {"target": open_stage("extract", config["target"])} if config.get("target") else {}
    return {"extract": open_stage("extract", config["hookpoint"]), **target}


def _measure(sae: Artefact, params: EvaluateParams, on_event: Listener, challenger: Scores, pair: str) -> tuple[Scores, Matched | None]:
    """Evaluate an SAE on the checkout's images and activations, and match its latents with the challenger's if they are of one space."""
    from ommatid.evaluate.latent_pairs import EvaluatedSAE, match
    from ommatid.evaluate.stage import evaluate

    inputs = {"images": open_stage("images"), "train": sae, **_activations(sae)}
    with store.open_draft(MEASURED, "evaluation", params.model_dump(mode="json"), inputs) as draft:
        evaluation = draft.sealed() or evaluate(params, inputs, draft, on_event)
        champion, other = EvaluatedSAE(sae, evaluation), _evaluated(challenger)
        if not _same_place(read_config(sae), read_config(other.sae)):
            return _scores(sae, evaluation), None
        found = match(other, champion, draft.scratch)
        _write_matched(pair, {"matches": found.matches, "stability": found.stability})
        return _scores(sae, evaluation), _count(found.matches, champion, other)


def _count_within(champion: Scores, challenger: Scores) -> Matched | None:
    """Count the features of two SAEs of one training that its evaluation has matched; None if they are one SAE, or of two hookpoints."""
    one, other = _evaluated(champion), _evaluated(challenger)
    if champion.digest == challenger.digest or not _same_place(read_config(one.sae), read_config(other.sae)):
        return None
    return _count(open_stage("evaluate").read("matches"), one, other)


def _count(matches: "pa.Table", champion: "EvaluatedSAE", challenger: "EvaluatedSAE") -> Matched:
    from ommatid.catalog.identity import count_kinds

    latents = [one.evaluation.read("latents", ["sae", "latent", "is_dead", "ms"]) for one in (champion, challenger)]
    return Matched(**count_kinds(matches, latents, champion.name, challenger.name))


def _evaluated(scores: Scores) -> "EvaluatedSAE":
    """The checkout's SAE that has these scores, with its evaluation."""
    from ommatid.evaluate.latent_pairs import EvaluatedSAE

    name, sae = next((name, sae) for name, sae in open_stage("train").each().items() if sae.digest == scores.digest)
    return EvaluatedSAE(sae, open_stage("evaluate").each()[name])


def _pair(challenger: str, champion: str | None) -> str:
    """Name of the folder of matches, from the keys of both SAEs."""
    return f"{challenger}-{champion}"


def _remove_abandoned() -> None:
    """Remove matches that a killed process left. Those of others who are deciding stay."""
    for folder in MATCHED.glob("*"):
        with suppress(FileNotFoundError):  # another process has just decided
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _write_matched(pair: str, tables: Mapping[str, "pa.Table"]) -> None:
    """Write the rows that are added to the challenger's catalogue if its SAE wins."""
    import pyarrow.parquet as pq

    folder = MATCHED / pair
    folder.mkdir(parents=True, exist_ok=True)
    for relation, table in tables.items():
        temporary = temporary_path(folder / f"{relation}.parquet")  # as another process may be adding the rows of before
        pq.write_table(table, temporary)
        os.replace(temporary, folder / f"{relation}.parquet")


def _run_of(catalog: Artefact, sae: str) -> dict[str, Any]:
    from ommatid.catalog.reader import Catalog

    with Catalog(catalog.file(CATALOG.name)) as opened:
        (row,) = opened.ask("FROM runs WHERE sae = $sae", {"sae": sae}).dicts()
    return row
