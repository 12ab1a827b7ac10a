"""The check of new images for drift as a task, which the flow `retrain` runs after `extract` and before `train`."""

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import artifacts
from flows.checkout import Workplace
from flows.pipeline import publish_quality
from ommatid.config import Params
from ommatid.events import Event, Progress, Warned
from ommatid.publish import drift


@task(name="drift", cache_policy=NO_CACHE)
def check_drift(params: Params, place: Workplace) -> None:
    """Compare new images with the champion's, and show in the Prefect UI what was found.

    Raises:
        DriftError: There is drift, and `drift.action` is `stop`.
    """
    log = get_run_logger()

    def follow(event: Event) -> None:
        if isinstance(event, Progress):
            log.info(f"drift: {event.what}: {event.done} of {event.total}")
        elif isinstance(event, Warned):
            log.warning(event.what)

    outcome = drift.check_drift(params, follow)
    if outcome.is_drift:
        log.warning(f"drift: {outcome.reason}")
    else:
        log.info(f"drift: {outcome.reason}")
    if outcome.check:
        publish_quality("drift", place)
        create_markdown_artifact(artifacts.drift(outcome), key="drift", description="New images against the champion's")
    drift.stop_if_drifted(params, outcome)
