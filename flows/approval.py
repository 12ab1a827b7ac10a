"""The question to a person whether a challenger is published: asked in the Prefect UI, where the run is suspended until it is answered.

A suspended run is no process: it holds neither the worker nor the lock of the checkout, and outlives `make up`. An answer resumes it, and
it begins anew. Another run, the alarm, is scheduled for the end of the time to answer, so that the question ends even if nobody does.
"""

from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from prefect import get_client
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput, keyset_from_base_key
from prefect.input.actions import read_flow_run_input
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Completed, Scheduled
from pydantic import Field

from ommatid.events import Listener
from ommatid.pipeline import open_stage
from ommatid.publish import champion
from ommatid.publish.approval import Waiting, read_waiting
from ommatid.publish.decisions import Decision, find_champion, read_decisions


class Approval(RunInput):
    """The answer; its fields are the form in the Prefect UI."""

    approve: Literal["yes", "no"] = Field(
        title="Approve the challenger?", description="yes: it becomes the champion and is published. no: the champion stays."
    )
    who: str = Field(min_length=1, max_length=200, title="Who are you?", description="Your name, for the log of decisions.")
    why: str = Field(default="", max_length=2000, title="Why?", description="Your reason, for the log of decisions.")


def can_ask() -> bool:
    """Return whether this run can be suspended, for which it must belong to a deployment."""
    return deployment.id is not None


def ask(made: Decision, hours: float, artifact: str, on_event: Listener) -> Waiting:
    """Keep a challenger until a person answers; the caller then releases the checkout and calls `suspend`.

    Args:
        made: The decision to publish it.
        hours: Hours that a person has to answer.
        artifact: Id of the artifact that shows champion and challenger.
        on_event: Called with warnings.

    Raises:
        SupersededError: The champion is no longer the one that the challenger was compared with; decide again.
    """
    if before := read_waiting():  # by a run that was killed before it was suspended
        close(before, None)
    n_decisions = len(read_decisions())
    values = {"decision": made, "asked_at": datetime.now(UTC), "hours": hours, "n_decisions": n_decisions}
    waiting = Waiting(**values, artifact=artifact, flow_run=str(flow_run.id))
    with get_client(sync_client=True) as client:
        alarm = client.create_flow_run_from_deployment(
            UUID(deployment.id), state=Scheduled(scheduled_time=waiting.until), name=f"end-of-wait-{made.key[:8]}", tags=["approval"]
        )  # fmt: skip
    waiting = waiting.model_copy(update={"alarm": str(alarm.id)})
    champion.wait(waiting, on_event)
    return waiting


def suspend(waiting: Waiting) -> None:
    """Suspend this run until somebody answers; nothing after it runs."""
    form = Approval.with_initial_data(
        description=f"{describe(waiting)} [Numbers and pictures of both](/artifacts/artifact/{waiting.artifact})."
    )
    suspend_flow_run(wait_for_input=form, key=waiting.pause_key)


def describe(waiting: Waiting) -> str:
    """Describe the question in a few sentences."""
    made = waiting.decision
    features = ""
    if matched := made.matched:
        kinds = f"{matched.kept:,} kept, {matched.split:,} split, {matched.changed:,} changed and {matched.lost:,} lost"
        features = f" Of the champion's features {kinds}; {matched.new:,} of the challenger are new."
    until = f"{waiting.until:%Y-%m-%d %H:%M} UTC"
    return f"{made.challenger.sae} waits for approval: {made.reason}.{features} Without an answer until {until} the champion stays."


def describe_way(waiting: Waiting) -> str:
    """Describe where the question is answered."""
    return f"To answer, press Resume at {PREFECT_UI_URL.value()}/runs/flow-run/{waiting.flow_run}"


def is_current(waiting: Waiting) -> bool:
    """Return whether the challenger is the checkout's, and was compared with the present champion."""
    present = find_champion()
    return waiting.decision.catalog == open_stage("catalog").digest and waiting.decision.against == (present.key if present else None)


def is_asked(waiting: Waiting) -> bool:
    """Return whether the run that asked is suspended, so that somebody can answer it; it is not if it was killed before."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(waiting.flow_run)).state
        except ObjectNotFound:
            return False
    return state is not None and state.is_paused()


def find_decision(waiting: Waiting) -> Decision | None:
    """Find out how the question ended; None if it is still open."""
    made, now = waiting.decision, datetime.now(UTC)
    answer = read_flow_run_input(keyset_from_base_key(f"suspended-{waiting.pause_key}")["response"], UUID(waiting.flow_run))
    if answer is not None:
        said = Approval.model_validate(answer)
        who = {"who": f"{said.who} in the Prefect UI", "why": said.why or None, "decided_at": now}
        if said.approve == "yes":
            return made.model_copy(update={**who, "reason": f"approved by {said.who}: {made.reason}"})
        return made.model_copy(
            update={**who, "decision": "challenger", "reason": f"the champion stays: {said.who} did not approve; {made.reason}"}
        )
    if waiting.is_over:
        reason = f"the champion stays: nobody answered within {waiting.hours:g} hours (retrain.approval_timeout); {made.reason}"
        return made.model_copy(update={"decision": "challenger", "reason": reason, "decided_at": now})
    return None


def close(waiting: Waiting, made: Decision | None) -> None:
    """End the run that asked, if it is still suspended, and its alarm.

    Args:
        waiting: The question.
        made: The decision; None if there is none, as the question has become void.
    """
    name = "Promoted" if made and made.decision == "champion" else "Kept"
    reason = made.reason if made else "the champion that it was compared with is no longer the champion"
    with get_client(sync_client=True) as client:
        if waiting.flow_run != flow_run.id and is_asked(waiting):
            client.set_flow_run_state(UUID(waiting.flow_run), Completed(name=name, message=reason), force=True)
        if waiting.alarm and waiting.alarm != flow_run.id:
            try:
                state = client.read_flow_run(UUID(waiting.alarm)).state
                if state and state.is_scheduled():
                    client.delete_flow_run(UUID(waiting.alarm))
            except ObjectNotFound:
                pass
