"""Scheduled retraining: if images, params or code have changed, run the pipeline, and publish the new SAE if it beats the champion.

The challenger is the best SAE of the new training; it and the champion are measured on the same evaluation split. data/published
holds the champion's catalogue, and the alias `champion` in the MLflow registry points at its SAE. If a person has to approve
(flows/approval.py), the run is suspended in between, holds neither a worker nor the checkout, and begins anew when it is resumed.

Before `train`, new images are compared with the champion's (flows/drift.py).

Final states: Promoted, Kept and Unchanged are completed; Rejected is a failure, of a quality gate, and so is Drifted, of new images.
"""

from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import approval, artifacts
from flows.checkout import Workplace, open_workplace
from flows.drift import check_drift
from flows.pipeline import run_stages
from flows.prefect_server import run_once
from ommatid.config import Params, RetrainParams, load_params
from ommatid.errors import GateError, RunError
from ommatid.events import Event, Progress, Warned
from ommatid.publish import champion, versions
from ommatid.publish.approval import Waiting, find_end, forget_waiting, read_waiting
from ommatid.publish.champion import SupersededError
from ommatid.publish.decisions import Decision, read_decisions
from ommatid.publish.drift import DriftError

MOST_DECISIONS = 3
"""Number of times that a run decides while somebody else changes the champion meanwhile."""


@flow(name="retrain")
def retrain() -> State:
    """Run the pipeline if anything has changed, and publish the challenger if it wins by the margins in params.yaml."""
    log, params, root = get_run_logger(), load_params(), Path.cwd()
    branch = versions.find_branch(root)

    def commit(is_half_way: bool) -> None:
        if params.retrain.publish != "local" and (decisions := read_decisions()):
            versions.commit(root, decisions[-1], branch, log.info, log.warning, is_half_way)

    with open_workplace(root, params, flow_run.id, log.info) as place:
        champion.settle(params.retrain.keep, _log_event)  # complete what a killed run left unfinished
        concluded = _conclude(params)
        try:
            outcome = _find_new(place, params)
        except Exception:
            if concluded:
                commit(is_half_way=True)
            raise
        if isinstance(outcome, State) and outcome.name == "Unchanged":
            outcome = concluded or _find_untold() or outcome
        is_half_way = isinstance(outcome, Waiting) or (isinstance(outcome, State) and outcome.is_failed())
        if concluded or not is_half_way:
            commit(is_half_way)
    if isinstance(outcome, Waiting) and outcome.flow_run == flow_run.id:
        log.info(f"{approval.describe(outcome)} {approval.describe_way(outcome)}")
        approval.suspend(outcome)
    if moved := champion.try_alias(_log_event):
        log.info(moved)
    if params.retrain.publish == "push":
        versions.push(root, branch, log.info, log.warning)
    return outcome if isinstance(outcome, State) else _describe(outcome)


def _describe(outcome: Decision | Waiting) -> State:
    if isinstance(outcome, Waiting):
        return Completed(name="Unchanged", message=f"{approval.describe(outcome)} {approval.describe_way(outcome)}")
    return Completed(name="Promoted" if outcome.decision == "champion" else "Kept", message=outcome.reason)


def _find_untold() -> Decision | None:
    """Return what this run decided before it was cut short and started again, of which it told nobody; None if there is nothing."""
    return next((made for made in read_decisions()[-1:] if made.flow_run == flow_run.id), None)


def _conclude(params: Params) -> Decision | None:
    """Conclude an earlier run's question to a person, if it was answered or the time to answer has passed; None if not."""
    if (waiting := read_waiting()) is None:
        return None
    if ended := find_end(waiting, read_decisions()):  # somebody promoted the challenger, or a run was killed after it had published
        approval.close(waiting, ended)
        forget_waiting()
        return None
    if (made := approval.find_decision(waiting)) is None:
        return None
    try:
        publish(made, params.retrain)
    except SupersededError as error:
        get_run_logger().warning(f"{error}; it is compared with the present champion")
        made = None
    approval.close(waiting, made)
    forget_waiting()
    return made


def _find_new(place: Workplace, params: Params) -> Decision | Waiting | State:
    """Run the pipeline and decide, unless nothing has changed."""
    if not place.stale() and (outcome := _find_settled(params)):
        return outcome
    try:
        run_stages(place, {"train": lambda: check_drift(params, place)})
    except DriftError as error:
        return Failed(name="Drifted", message=str(error), data=error)
    except RunError as error:
        if GateError.WORDS not in str(error):
            raise
        return Failed(name="Rejected", message=str(error), data=error)
    if outcome := _find_settled(params):  # images that came in were removed again, for example
        return outcome
    for attempt in range(MOST_DECISIONS):
        made = decide(params)
        try:
            return _ask(made, params.retrain) if made.decision == "champion" and params.retrain.approval else _publish(made, params.retrain)
        except SupersededError as error:
            if attempt == MOST_DECISIONS - 1:
                raise
            get_run_logger().warning(f"{error}; deciding again")
    raise AssertionError("unreachable")


def _find_settled(params: Params) -> Waiting | State | None:
    """Return what became of the checkout's catalogue if it was decided about or waits for a person; None if it is new."""
    if (waiting := read_waiting()) and approval.is_current(waiting):
        return waiting if approval.is_asked(waiting) else _ask_again(waiting, params.retrain)
    if champion.is_decided():
        return Completed(name="Unchanged", message="images, params and code have not changed")
    return None


def _publish(made: Decision, params: RetrainParams) -> Decision:
    publish(made, params)
    return made


def _ask(made: Decision, params: RetrainParams) -> Waiting | State:
    """Ask a person to approve a challenger that won, in place of an earlier one that still waits."""
    if not approval.can_ask():
        message = (
            f"{made.challenger.sae} won and waits for approval, but this run belongs to no deployment and cannot ask: start `retrain` in "
            f"the Prefect UI of `make up`, or run `ommatid champion promote {made.challenger.sae}`"
        )
        get_run_logger().warning(message)
        return Completed(name="Kept", message=message)
    if before := read_waiting():
        reason = f"the champion stays: nobody had answered when {made.challenger.sae} came in its place; {before.decision.reason}"
        changes = {"decision": "challenger", "reason": reason, "decided_at": made.decided_at, "against": made.against}
        kept = before.decision.model_copy(update=changes)
        publish(kept, params)
        approval.close(before, kept)
        forget_waiting()
    page = artifacts.decision(made, is_asked=True)
    artifact = create_markdown_artifact(page, key="decision", description="Champion and challenger, to be approved")
    return approval.ask(made, params.approval_timeout, str(artifact), _log_event)


def _ask_again(waiting: Waiting, params: RetrainParams) -> Waiting | State:
    """Ask what an earlier run asked, which was killed before it was suspended."""
    return (
        approval.ask(waiting.decision, params.approval_timeout, waiting.artifact, _log_event) if approval.can_ask() else _describe(waiting)
    )


@task(cache_policy=NO_CACHE)
def decide(params: Params) -> Decision:
    """Measure champion and challenger on the same split and compare them by the margins."""
    log = get_run_logger()

    def follow(event: Event) -> None:
        if isinstance(event, Progress):
            log.info(f"champion: {event.what}: {event.done} of {event.total}")
        else:
            _log_event(event)

    return champion.decide(params, follow, who=f"Prefect run {flow_run.name} ({flow_run.id})")


@task(cache_policy=NO_CACHE)
def publish(decision: Decision, params: RetrainParams) -> None:
    """Record the decision, publish the champion's catalogue, and show both in the Prefect UI."""
    page = artifacts.decision(decision)
    champion.publish(decision.model_copy(update={"flow_run": flow_run.id}), params.keep, _log_event)
    get_run_logger().info(decision.reason)
    create_markdown_artifact(page, key="decision", description="Champion and challenger on the same split")


def _log_event(event: Event) -> None:
    """Log a warning of the library."""
    if isinstance(event, Warned):
        get_run_logger().warning(event.what)


def main() -> None:
    """Retrain once, without waiting for the schedule."""
    run_once(retrain, __doc__)


if __name__ == "__main__":
    main()
