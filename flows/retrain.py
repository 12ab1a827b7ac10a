"""Scheduled retraining: if images, params or code have changed, run the pipeline, and publish the new SAE if it beats the champion.

The challenger is the best SAE of the new training; it and the champion are measured on the same evaluation split. data/published
holds the champion's catalogue, and the alias `champion` in the MLflow registry points at its SAE.
"""

from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import artifacts
from flows.checkout import open_workplace
from flows.pipeline import run_stages
from flows.prefect_server import leave_out_tracebacks, prefect_server
from ommatid.cli.error_boundary import at_edge
from ommatid.config import Params, load_params
from ommatid.errors import RunError
from ommatid.events import Event, Progress
from ommatid.publish import champion
from ommatid.publish.champion import Decision


@flow(name="retrain")
def retrain() -> State:
    """Run the pipeline if anything has changed, and publish the challenger if it wins by the margins in params.yaml."""
    params = load_params()
    with open_workplace(Path.cwd(), params, flow_run.id, get_run_logger().info) as place:
        champion.settle()  # complete what a killed run left unfinished
        if not place.stale() and champion.is_decided():
            point_alias()
            return Completed(name="Unchanged", message="images, params and code have not changed")
        run_stages(place)
        decision = decide(params)
        publish(decision)
    point_alias()
    return Completed(name="Promoted" if decision.decision == "champion" else "Kept", message=decision.reason)


@task(cache_policy=NO_CACHE)
def decide(params: Params) -> Decision:
    """Measure champion and challenger on the same split and compare them by the margins."""
    log = get_run_logger()

    def follow(event: Event) -> None:
        if isinstance(event, Progress):
            log.info(f"champion: {event.what}: {event.done} of {event.total}")

    return champion.decide(params, follow)


@task(cache_policy=NO_CACHE)
def publish(decision: Decision) -> None:
    """Record the decision, publish the champion's catalogue, and show both in the Prefect UI."""
    champion.publish(decision)
    get_run_logger().info(decision.reason)
    create_markdown_artifact(artifacts.decision(decision), key="decision", description="Champion and challenger on the same split")


def point_alias() -> None:
    """Point the registry's alias at the champion; if the registry doesn't answer, the next run tries again."""
    try:
        if moved := champion.point_alias():
            get_run_logger().info(moved)
    except RunError as error:
        get_run_logger().warning(f"the alias champion was not set: {error}; the next run tries again")


def main() -> None:
    """Retrain once, without waiting for the schedule."""
    leave_out_tracebacks(Exception)  # `at_edge` writes tracebacks to a file
    with at_edge(), prefect_server():
        retrain()


if __name__ == "__main__":
    main()
