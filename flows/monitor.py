"""Faults of the running servers of `make up`, which would otherwise be seen only in a log, or when a schedule has not fired for weeks.

A Prefect server answers and says that it is healthy while its scheduler fails on every pass. So several signs are looked at: errors in
the server's log, schedules without a next run, and workers that are no longer heard of. Messages that were lost are told.
Imports no Prefect.
"""

import re
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flows.prefect_api import BEGUN, Api
from flows.processes import Tail
from ommatid.errors import RunError

LOOK_SECONDS = 5.0
"""Seconds between two looks."""
N_LOOKS = 3
"""Number of looks in a row that must find a fault before it is reported, as a busy server may be late once."""
N_ERRORS = 3
"""Number of errors of one service within `ERROR_SECONDS` that make it a failing one; a single error may be a lock of the database."""
ERROR_SECONDS = 600.0
SILENT_SECONDS = 120.0
"""Seconds without a sign of life after which a worker counts as lost; it sends one every 30 seconds."""
_ENTRY = re.compile(r"^(?=\d\d:\d\d:\d\d\.\d{3} \| )", re.MULTILINE)
_ERROR = re.compile(r"\S+ \| (?:ERROR|CRITICAL) +\| (?P<logger>[\w.]+) - (?P<text>.*)")
_SERVICE = re.compile(r"↩ \[[^]]*\] (\w+)\(")
"""How the server's log names a periodic service that raised an error."""
_SERVER = "the Prefect server"
_SENT = ("call-webhook", "send-notification")
"""Types of automation actions that send messages."""


class Monitor:
    """The state of the servers between two looks."""

    def __init__(self, api: Api, logs: Path, pools: Sequence[str]):
        self._api = api
        self._log = logs / "prefect.log"
        self._tail = Tail(self._log)
        self._logs = logs
        self._pools = pools
        self._errors: dict[str, deque[float]] = defaultdict(deque)
        self._n_looks: dict[str, int] = {}
        self._reported: set[str] = set()
        self._made = datetime.now(UTC)
        self._looked_first: datetime | None = None
        self._sent: set[str] = set()
        self._has_lost_message = False

    def look(self) -> list[str]:
        """Look for faults.

        Returns:
            A sentence for each fault that is new, for each that was reported and is over, and for each message that was lost.
        """
        self._looked_first = self._looked_first or datetime.now(UTC)
        found = dict(self._find())
        self._n_looks = {fault: self._n_looks.get(fault, 0) + 1 for fault in found}
        new = [fault for fault, n in self._n_looks.items() if n >= N_LOOKS and fault not in self._reported]
        # a server that does not answer says of no fault that it is over
        over = [] if _SERVER in found else sorted(self._reported - found.keys())
        self._reported = self._reported.difference(over).union(new)
        said = [f"warning: {found[fault]}" for fault in new] + [f"{fault}: works again" for fault in over]
        with suppress(RunError):  # a fault of the server, which is among those found
            said += self._lost_messages()
        return said

    def _find(self) -> Iterator[tuple[str, str]]:
        """Yield the faults of now, each by the name of what is at fault and as a sentence."""
        for service in self._failing_services():
            yield f"the Prefect server's {service}", f"the Prefect server's {service} fails again and again; the error is in {self._log}"
        try:
            self._api.get("/ready")
            found = [*self._idle_schedules(), *self._lost_workers()]
        except RunError as error:
            yield _SERVER, f"{error}; its output is in {self._log}; if it stays so, end this command and start it again"
            return
        yield from found

    def _failing_services(self) -> list[str]:
        now = time.monotonic()
        for logger, text in errors_in(self._tail.read()):
            service = _SERVICE.search(text)
            self._errors[service[1] if service else logger.removeprefix("prefect.server.")].append(now)
        for times in self._errors.values():
            while times and now - times[0] > ERROR_SECONDS:
                times.popleft()
        return [service for service, times in self._errors.items() if len(times) >= N_ERRORS]

    def _idle_schedules(self) -> Iterator[tuple[str, str]]:
        for deployment in self._api.deployments():
            if deployment["paused"] or not any(schedule["active"] for schedule in deployment["schedules"]):
                continue
            if not self._api.runs(deployment_id={"any_": [deployment["id"]]}, state={"type": {"any_": ["SCHEDULED"]}}):
                yield (
                    f"the schedule of {deployment['name']}",
                    f"the schedule of {deployment['name']} is active but has no next run, so nothing will start by itself; "
                    f"if {self._log} does not say why, end this command and start it again",
                )

    def _lost_workers(self) -> Iterator[tuple[str, str]]:
        for pool in self._pools:
            workers = self._api.post(f"/work_pools/{pool}/workers/filter", {})
            # a worker of the same name may have been there before these servers
            signs = [self._looked_first or self._made, *(worker["last_heartbeat_time"] for worker in workers)]
            silent = min(map(_seconds_since, signs))
            if silent > SILENT_SECONDS:
                yield (
                    f"the worker of {pool}",
                    f"the worker of {pool} has not been heard of for {silent:.0f} s, so runs wait; its output is in "
                    f"{self._logs / f'worker-{pool}.log'}; if it stays so, end this command and start it again",
                )

    def _lost_messages(self) -> Iterator[str]:
        """Yield a sentence for each message since the last look that did not reach its receiver, and when one does again."""
        names = ["prefect.automation.action.failed", "prefect.automation.action.executed"]
        wanted = {"event": {"name": names}, "occurred": {"since": self._made.isoformat()}, "order": "DESC"}
        events = self._api.post("/events/filter", {"filter": wanted, "limit": 50})["events"]
        sent = [event for event in reversed(events) if event["payload"].get("action_type") in _SENT]
        for event in sent:
            if event["id"] in self._sent:
                continue
            reason = _failure(event)
            if reason:
                message = event["resource"].get("prefect.resource.name", "a message")
                yield (
                    f"warning: the message {message!r} did not reach its receiver ({reason}) and is not sent again; check "
                    "OMMATID_MESSAGES, and see Event Feed in the Prefect UI"
                )
            elif self._has_lost_message:
                yield "the receiver of messages: works again"
            self._has_lost_message = bool(reason)
        self._sent = {event["id"] for event in sent}


def errors_in(log: str) -> list[tuple[str, str]]:
    """Return the errors in the text of a Prefect server's log, as (logger, first line), without locks of the database.

    SQLite refuses one of two writers that began at the same time; the server's clients then ask again.
    """
    found = [(_ERROR.match(entry), entry) for entry in _ENTRY.split(log)]
    return [(error["logger"], error["text"]) for error, entry in found if error and "database is locked" not in entry]


def _failure(event: dict[str, Any]) -> str | None:
    payload = event["payload"]
    if event["event"].endswith("failed"):
        return payload.get("reason", "no reason given")
    status = payload.get("status_code", 0)
    if 300 <= status < 400:
        return f"it answered {status}, a redirection, which is not followed"
    return f"it answered {status}" if status >= 400 else None


def _seconds_since(when: datetime | str) -> float:
    return (datetime.now(UTC) - (datetime.fromisoformat(when) if isinstance(when, str) else when)).total_seconds()


_WHY_MISSED = "the machine slept, the clock jumped, or an earlier run took long"


def skip_missed_runs(api: Api) -> list[str]:
    """Cancel scheduled runs that are overdue, except the last of each deployment.

    After the clock has jumped or the machine has slept, all runs that were due meanwhile would start one after another, although each
    does what the last one does. None is kept if a run of the deployment has begun after all of them were due.

    Returns:
        A sentence for each deployment with missed runs.
    """
    now = datetime.now(UTC)
    overdue: dict[str, list[dict[str, Any]]] = defaultdict(list)
    due = {"before_": (now - timedelta(seconds=1)).isoformat()}
    for run in api.runs(state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time=due, deployment_id={"is_null_": False}):
        if run["auto_scheduled"] and not run["run_count"]:
            overdue[run["deployment_id"]].append(run)
    said = []
    for deployment, runs in overdue.items():
        of = {"any_": [deployment]}
        # a pending run has not read anything yet
        begun = api.runs(deployment_id=of, state={"type": {"any_": ["PENDING"]}}, expected_start_time=due)
        begun += api.runs(deployment_id=of, state={"type": {"any_": BEGUN}}, start_time={"after_": runs[-1]["expected_start_time"]})
        begun_ids = {run["id"] for run in begun}  # a worker may have taken one of the overdue runs meanwhile, which is then the one to keep
        missed = [run for run in runs if run["id"] not in begun_ids] if begun else runs[:-1]
        for run in missed:
            api.set_state(run["id"], "CANCELLED", f"missed: {_WHY_MISSED}; a later run does the same")
        if missed:
            name = api.get(f"/deployments/{deployment}")["name"]
            n = "a scheduled run was" if len(missed) == 1 else f"{len(missed)} scheduled runs were"
            said.append(f"{name}: {n} missed ({_WHY_MISSED}); one run does for all")
    return said
