"""Backfill: measures every past SAE that is kept under the params of now, after a judge, a labeller or a metric was added.

Only what is new is computed (src/ommatid/backfill). A run that is killed or cancelled continues where it was when it is run again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import artifacts
from flows.checkout import open_workplace
from flows.prefect_server import run_once
from ommatid.config import Params, load_params
from ommatid.events import Event, Listener, Progress, Warned

if TYPE_CHECKING:
    from ommatid.backfill.measure import Backfill


@flow(name="backfill")
def backfill() -> State:
    """Measure every past SAE under params.yaml, and publish a table that compares them."""
    log, params = get_run_logger(), load_params()

    def follow(event: Event) -> None:
        if isinstance(event, Warned):
            log.warning(event.what)
        elif isinstance(event, Progress) and event.done == event.total:
            log.info(f"{event.what}: {event.total}")

    with open_workplace(Path.cwd(), params, flow_run.id, log.info):
        made = measure(params, follow)
    create_markdown_artifact(artifacts.past_saes(made), key="past-saes", description="All SAEs that are kept, under the params of now")
    return Completed(name="Backfilled", message=made.summary)


def measure(params: Params, on_event: Listener) -> "Backfill":
    """Run the backfill; torch is imported only then."""
    from ommatid.backfill.measure import backfill

    return backfill(params, on_event)


def main() -> None:
    """Backfill once."""
    run_once(backfill, __doc__)


if __name__ == "__main__":
    main()
