"""Retraining, by a schedule: when images, params or code changed, run the pipeline and let the better SAE be the champion.

The challenger is the best SAE of the new training; it and the champion are measured on the same evaluation split. The champion's catalogue
is what data/published holds; the alias `champion` in the MLflow registry points at its SAE.
"""

from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import pages
from flows.checkout import open_workplace
from flows.pipeline import run_stages
from flows.server import leave_out_tracebacks, prefect_server
from ommatid.cli.edge import at_edge
from ommatid.config import Params, load_params
from ommatid.errors import RunError
from ommatid.events import Event, Progress
from ommatid.publish import champion
from ommatid.publish.champion import Decision


@flow(name="retrain")
def retrain() -> State:
    """Run the pipeline if anything changed, and publish the challenger if it is better by the margins of params.yaml."""
    params = load_params()
    with open_workplace(Path.cwd(), params, flow_run.id, get_run_logger().info) as place:
        champion.settle()  # what a run that died left half done
        if not place.stale() and champion.is_decided():
            point_alias()
            return Completed(name="Unchanged", message="images, params and code are as they were: nothing to do")
        run_stages(place)
        decision = decide(params)
        publish(decision)
    point_alias()
    return Completed(name="Promoted" if decision.decision == "champion" else "Kept", message=decision.reason)


@task(cache_policy=NO_CACHE)
def decide(params: Params) -> Decision:
    """Measure champion and challenger on the same split, and hold them against the margins."""
    log = get_run_logger()

    def follow(event: Event) -> None:
        if isinstance(event, Progress):
            log.info(f"champion: {event.what}: {event.done} of {event.total}")

    return champion.decide(params, follow)


@task(cache_policy=NO_CACHE)
def publish(decision: Decision) -> None:
    """Record the decision, put the champion's catalogue in place, and show both."""
    champion.publish(decision)
    get_run_logger().info(decision.reason)
    create_markdown_artifact(pages.decision(decision), key="decision", description="Champion and challenger on the same split")


def point_alias() -> None:
    """Let the registry's alias follow; a registry that does not answer is asked again by the next run."""
    try:
        if moved := champion.point_alias():
            get_run_logger().info(moved)
    except RunError as error:
        get_run_logger().warning(f"the alias champion was not set: {error}; the next run tries again")


def main() -> None:
    """Retrain once, here and now."""
    leave_out_tracebacks(Exception)  # the edge keeps it in a file
    with at_edge(), prefect_server():
        retrain()


if __name__ == "__main__":
    main()
