"""The output of `ommatid champion`: who is the champion, who was, and what a person changes about that."""

import getpass
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ommatid.cli.terminal import align, notice, say
from ommatid.compute.commands import git
from ommatid.config import Params, load_params
from ommatid.errors import ConfigError, RunError
from ommatid.events import Event, Progress, Warned
from ommatid.publish import champion, versions
from ommatid.publish.decisions import DECISIONS, Decision, Scores, Standing, read_decisions, stand

DASH = "–"
SHOWN_REASON = 60
"""Characters of a reason in the list."""


def print_list(as_json: bool) -> None:
    """Print a row for every decision, the newest first."""
    decisions = read_decisions()
    standing = stand(decisions)
    rows = [_summarise(made, standing) for made in reversed(decisions)]
    if as_json:
        say(json.dumps(rows, indent=1))
        return
    if not rows:
        say(f"nothing was decided yet: {DECISIONS} does not exist; the flow `retrain` writes it, or `ommatid champion promote SAE`")
        return
    head = ("key", "status", "SAE", "MS - floor", "FVU", "dead", "decided (UTC)", "by", "who", "kept", "reason")
    lines = align([head, *(_cells(row) for row in rows)])
    for line in lines:
        say(line)
    lost = {row["key"] for row in rows if row["status"] in ("former", "rolled back") and not row["is_kept"]}
    if lost:
        say(f"{len(lost)} former champion{'s are' * (len(lost) > 1) or ' is'} on the log, but no longer kept (retrain.keep)")
    if (present := standing.champion) and not champion.is_kept(present):
        folder = champion.folder_of(present)
        say(f"the folder of the champion {present.challenger.sae} is gone or damaged: {folder}; bring it back from DVC")


def show(name: str | None, as_json: bool) -> None:
    """Print what is known of one champion.

    Args:
        name: Its key, the beginning of its key, or its name; None for the present one.
        as_json: Whether to print JSON.

    Raises:
        ConfigError: There is no such champion.
    """
    decisions = read_decisions()
    standing = stand(decisions)
    if name is None and standing.champion is None:
        raise ConfigError("champion show: nothing was promoted yet")
    key = champion.find_former(name).key if name else standing.champions[-1].key
    lines = [made for made in decisions if made.key == key and made.decision == "champion"]
    origin = next((made for made in lines if made.how != "rollback"), lines[0])
    about = {**_summarise(origin, standing), "run": origin.run, "margins": origin.margins.model_dump()}
    about |= {
        "scores": origin.challenger.model_dump(),
        "previous": origin.champion.model_dump() if origin.champion else None,
        "matched": origin.matched.model_dump() if origin.matched else None,
        "history": [{**_summarise(made, standing)} for made in lines],
    }
    if as_json:
        say(json.dumps(about, indent=1, default=str))
        return
    for line in _describe(origin, lines, standing):
        say(line)


def promote(name: str, why: str | None, params_file: Path) -> None:
    """Make an SAE the champion by hand."""
    params = load_params(params_file)
    made = champion.promote(name, params, find_person(), _as_line(why), _follow)
    if moved := champion.try_alias(_follow):
        say(moved)
    say(f"champion: {made.challenger.sae} ({made.key}) is the champion; {made.reason}")
    _bring_out(params, made)


def roll_back(to: str | None, why: str | None, params_file: Path) -> None:
    """Return to a former champion."""
    params = load_params(params_file)
    made, was_cut_short = champion.roll_back(to, params.retrain.keep, find_person(), _as_line(why), _follow)
    if was_cut_short:
        say("an earlier rollback was cut short; it is complete now, and nothing else was done")
    say(f"champion: {made.challenger.sae} ({made.key}) is the champion again; {made.reason}")
    _bring_out(params, made)


def _bring_out(params: Params, made: Decision) -> None:
    """Commit and push the published files, as `retrain.publish` says."""
    root = Path.cwd()
    branch = versions.find_branch(root)
    if params.retrain.publish != "local":
        versions.commit(root, made, branch, say, _warn, is_half_way=True)  # a run may be
    if params.retrain.publish == "push":
        versions.push(root, branch, say, _warn)


def find_person() -> str:
    """Return who runs this command: the name and the address that git commits with, or else the user of the machine."""
    try:
        name, address = (git(Path.cwd(), "config", key) for key in ("user.name", "user.email"))
    except RunError:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"{name} <{address}>"


def _as_line(why: str | None) -> str | None:
    """What a person said, as one line of text that can be encoded: bytes of an argument that are not UTF-8 are replaced."""
    return why and (" ".join(why.encode("utf-8", "replace").decode().split()) or None)


def _warn(text: str) -> None:
    say(notice(Warned(text)))


def _follow(event: Event) -> None:
    if isinstance(event, Warned):
        say(notice(event))
    elif isinstance(event, Progress) and event.done == event.total:
        say(f"{event.what}: {event.done} of {event.total}")


def _summarise(made: Decision, standing: Standing) -> dict[str, Any]:
    """The decision as a row of the list."""
    is_champion = made.decision == "champion"
    present = standing.champion
    if not is_champion:
        status = "challenger"
    elif present and present.key == made.key:
        status = "champion"
    elif any(one.key == made.key for one in standing.aside):
        status = "rolled back"
    else:
        status = "former"
    return {
        "key": made.key,
        "status": status,
        "sae": made.challenger.sae,
        "over_floor": _gain(made.challenger),
        "fvu": made.challenger.fvu,
        "dead": made.challenger.dead,
        "decided_at": made.decided_at.isoformat(),
        "how": made.how,
        "who": made.who,
        "why": made.why,
        "reason": made.reason,
        "is_champion": is_champion,
        "is_kept": is_champion and champion.is_kept(made),
    }


def _gain(scores: Scores) -> float | None:
    return None if scores.ms is None or scores.ms_floor is None else scores.ms - scores.ms_floor


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    reason = " ".join("; ".join(filter(None, [row["why"], row["reason"]])).split())
    return (
        row["key"],
        row["status"],
        row["sae"],
        _signed(row["over_floor"]),
        f"{row['fvu']:.4f}",
        f"{row['dead']:.4f}",
        row["decided_at"][:16].replace("T", " "),
        row["how"],
        (row["who"] or DASH).partition(" <")[0],
        ("yes" if row["is_kept"] else "no") if row["is_champion"] else "",
        reason if len(reason) <= SHOWN_REASON else f"{reason[: SHOWN_REASON - 1]}…",
    )


def _signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.4f}"


def _describe(origin: Decision, lines: list[Decision], standing: Standing) -> Iterator[str]:
    about = _summarise(origin, standing)
    yield f"{origin.challenger.sae} ({origin.key}): {about['status']}"
    kept = "" if about["is_kept"] else ", which is no longer kept (retrain.keep)"
    yield f"folder     {champion.folder_of(origin)}{kept}"
    yield ""
    sides: list[tuple[str, ...]] = [("", "this SAE", *(["champion before"] if origin.champion else []))]
    both = [origin.challenger, *([origin.champion] if origin.champion else [])]
    sides.append(("SAE", *(scores.sae for scores in both)))
    sides.append(("MS - floor", *(_signed(_gain(scores)) for scores in both)))
    for key in ("ms", "ms_floor", "fvu", "dead", "l0"):
        values = [getattr(scores, key) for scores in both]
        sides.append((key, *(DASH if value is None else f"{value:.4f}" for value in values)))
    yield from align(sides)
    yield ""
    margins = ", ".join(f"{key} {value:g}" for key, value in origin.margins.model_dump().items())
    yield f"margins    {margins}"
    if matched := origin.matched:
        yield (
            f"features   of the champion before {matched.kept:,} kept, {matched.split:,} split, {matched.changed:,} changed, "
            f"{matched.lost:,} lost; {matched.new:,} new"
        )
    else:
        yield "features   not matched with a champion before"
    yield ""
    for key, title in _LINEAGE.items():
        yield f"{title:<18}{origin.run.get(key) if origin.run.get(key) is not None else 'unknown'}"
    yield ""
    for made in lines:
        who = f" by {made.who}" if made.who else ""
        yield f"{made.decided_at:%Y-%m-%d %H:%M} UTC  {made.how}{who}: {made.reason}{f' ({made.why})' if made.why else ''}"


_LINEAGE = {
    "git_commit": "git commit",
    "git_dirty": "git dirty",
    "dvc_lock": "dvc.lock",
    "dvc_experiment": "DVC experiment",
    "mlflow_run_id": "MLflow run",
    "prefect_flow_run_id": "Prefect flow run",
    "images_digest": "images",
    "activations_digest": "activations",
    "sae_digest": "SAE",
}
"""Columns of the relation `runs` that say where an SAE comes from, with their titles."""
