"""The pipeline: every stage as a task, in DVC's order; DVC decides which must run.

With the parameters of params.yaml it works in this checkout, as `dvc repro` does. With others it is an experiment: it works in a git
worktree with DVC's cache shared, and ends as a DVC experiment (`dvc exp show`). Each stage streams its lines into the run's log, shows
its progress, and publishes its quality report; the run ends with the headline numbers and pictures of the best features and all SAEs.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import pages
from flows.checkout import Workplace, open_workplace
from flows.server import leave_out_tracebacks, prefect_server
from ommatid.cli.edge import at_edge
from ommatid.config import Params, load_params

with at_edge() if __name__ == "__main__" else nullcontext():
    PREFILLED = load_params()
"""What the form of the Prefect UI begins with."""
UPDATE_SECONDS = 3.0
"""Between two requests that move one progress bar."""


@flow(name="pipeline")
def pipeline(params: Params = PREFILLED) -> str | None:
    """From images to the catalogue.

    With the parameters of params.yaml the run works in the checkout; with any other it becomes a DVC experiment, whose name it returns.
    """
    with open_workplace(Path.cwd(), params, flow_run.id, get_run_logger().info) as place:
        name_run(place)
        run_stages(place)
    return place.experiment


def run_stages(place: Workplace) -> None:
    """Every stage in order, then the numbers and the pictures."""
    for stage, is_clean in place.plan():
        run_stage.with_options(name=stage, task_run_name=stage)(stage, place, is_clean)
    publish_metrics(place)
    publish_features(place)


@task(cache_policy=NO_CACHE)
def run_stage(stage: str, place: Workplace, is_clean: bool) -> State | None:
    """One stage through `dvc repro --single-item`; what DVC called up to date is left alone."""
    if is_clean:
        publish_quality(stage, place)
        return Completed(name="UpToDate", message="nothing it depends on has changed")
    try:
        place.repro(stage, _follow(stage))
    finally:
        publish_quality(stage, place)
    if stage == "train":
        publish_health(place)
    return None


@task(name="metrics", cache_policy=NO_CACHE)
def publish_metrics(place: Workplace) -> None:
    """The headline numbers of evaluation and labels, as a table."""
    if table := pages.headline(place.root):
        create_markdown_artifact(table, key="metrics", description=f"Headline numbers of {place.name}")


@task(name="features", cache_policy=NO_CACHE)
def publish_features(place: Workplace) -> None:
    """What was found, as a report; pictures of the best features, and of all SAEs."""
    if report := pages.report(place.root):
        create_markdown_artifact(report, key="report", description=f"What was found by {place.name}")
    if picture := pages.features(place.root):
        create_markdown_artifact(picture, key="features", description=f"The best features of {place.name}")
    if picture := pages.comparison(place.root):
        create_markdown_artifact(picture, key="saes", description=f"The SAEs of {place.name}")


def publish_quality(stage: str, place: Workplace) -> None:
    """The report of the stage's gate, passed or failed."""
    if table := pages.quality(place.root, stage):
        create_markdown_artifact(table, key=f"quality-{stage}", description=f"Quality gate of {stage} in {place.name}")


def publish_health(place: Workplace) -> None:
    """Pictures of the dictionaries that were trained."""
    if pictures := pages.health(place.root):
        create_markdown_artifact(pictures, key="health", description=f"The dictionaries of {place.name}")


def name_run(place: Workplace) -> None:
    """Let the run in the Prefect UI carry the experiment's name."""
    if place.experiment and flow_run.id:
        tags = {*flow_run.tags, f"experiment:{place.experiment}"}
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run.id), name=place.experiment, tags=tags)


def _follow(stage: str) -> Callable[[str], None]:
    """Each line into the log, what was noticed as a warning; lines that end in `X of Y` also move the progress bar."""
    log = get_run_logger()
    shown: dict[str, UUID] = {}
    moved: dict[str, float] = {}

    def follow(line: str) -> None:
        log.log(logging.WARNING if line.startswith("notice: ") else logging.INFO, line)
        if (progress := pages.progress_in(line)) is None:
            return
        what, percent = progress
        now = time.monotonic()
        if percent < 100 and now - moved.get(what, -UPDATE_SECONDS) < UPDATE_SECONDS:
            return
        moved[what] = now
        if what in shown:
            update_progress_artifact(shown[what], percent)
        else:
            shown[what] = cast(UUID, create_progress_artifact(percent, key=f"progress-{stage}", description=what))

    return follow


def main() -> None:
    """Run once, here and now, with params.yaml as it is; a temporary Prefect server serves when none is named."""
    leave_out_tracebacks(Exception)  # the edge keeps it in a file
    with at_edge(), prefect_server():
        pipeline()


if __name__ == "__main__":
    main()
