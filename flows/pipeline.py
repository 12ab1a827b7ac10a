"""The pipeline: every stage as a task, in DVC's order; DVC decides which stages must run.

With the parameters of params.yaml, a run works in this checkout, as `dvc repro` does. With any others it is an experiment: it works in a
git worktree that shares the DVC cache, and ends as a DVC experiment (`dvc exp show`). Each stage streams its output to the run's log,
shows its progress, and publishes its quality report; the run ends by publishing the headline numbers, a report, and pictures of the best
features and of all SAEs.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import artifacts
from flows.checkout import Workplace, open_workplace
from flows.prefect_server import run_once
from ommatid.config import Params, load_params
from ommatid.errors import OmmatidError

PREFILLED: Any = None
"""Initial values of the form in the Prefect UI; None if params.yaml is not valid."""
INVALID: OmmatidError | None = None
"""Why params.yaml is not valid. A run raises it, and ends as Failed; raised by the import, it would end the run as Crashed."""
try:
    PREFILLED = load_params()
except OmmatidError as error:
    INVALID = error
UPDATE_SECONDS = 3.0
"""Minimum number of seconds between two updates of a progress bar."""


@flow(name="pipeline", validate_parameters=INVALID is None)
def pipeline(params: Params = PREFILLED) -> str | None:
    """Run every stage from the images to the catalogue.

    With the parameters of params.yaml the run works in the checkout; with any others it becomes a DVC experiment, whose name it returns.

    Raises:
        ConfigError: params.yaml is not valid.
    """
    if INVALID:
        raise INVALID
    with open_workplace(Path.cwd(), params, flow_run.id, get_run_logger().info) as place:
        name_run(place)
        run_stages(place)
    return place.experiment


def run_stages(place: Workplace, before: Mapping[str, Callable[[], None]] | None = None) -> None:
    """Run every stage in order, then publish the numbers and the pictures.

    Args:
        place: The folder in which the run works.
        before: What is called before a stage, by the stage's name.
    """
    for stage, is_clean in place.plan():
        if before and stage in before:
            before[stage]()
        run_stage.with_options(name=stage, task_run_name=stage)(stage, place, is_clean)
    publish_metrics(place)
    publish_features(place)


@task(cache_policy=NO_CACHE)
def run_stage(stage: str, place: Workplace, is_clean: bool) -> State | None:
    """Run a stage with `dvc repro --single-item`, unless DVC has found it up to date."""
    if is_clean:
        publish_quality(stage, place)
        return Completed(name="UpToDate", message="none of its dependencies have changed")
    try:
        place.repro(stage, _follow(stage))
    finally:
        publish_quality(stage, place)
    if stage == "train":
        publish_health(place)
    return None


@task(name="metrics", cache_policy=NO_CACHE)
def publish_metrics(place: Workplace) -> None:
    """Publish the headline numbers of evaluation, labels and interventions as a table."""
    if table := artifacts.headline(place.root):
        create_markdown_artifact(table, key="metrics", description=f"Headline numbers of {place.name}")


@task(name="features", cache_policy=NO_CACHE)
def publish_features(place: Workplace) -> None:
    """Publish the address of the explorer, the report, and pictures of the best features and of all SAEs."""
    # an experiment's catalogue is not the one that the explorer shows
    if place.experiment is None and (page := artifacts.explorer(place.root)):
        create_markdown_artifact(page, key="explorer", description="Pages about every feature")
    if report := artifacts.report(place.root):
        create_markdown_artifact(report, key="report", description=f"Results of {place.name}")
    if picture := artifacts.features(place.root):
        create_markdown_artifact(picture, key="features", description=f"The best features of {place.name}")
    if picture := artifacts.comparison(place.root):
        create_markdown_artifact(picture, key="saes", description=f"The SAEs of {place.name}")


def publish_quality(stage: str, place: Workplace) -> None:
    """Publish the report of a stage's quality gate, whether it passed or failed."""
    if table := artifacts.quality(place.root, stage):
        create_markdown_artifact(table, key=f"quality-{stage}", description=f"Quality gate of {stage} in {place.name}")


def publish_health(place: Workplace) -> None:
    """Publish pictures of the trained dictionaries."""
    if pictures := artifacts.health(place.root):
        create_markdown_artifact(pictures, key="health", description=f"The dictionaries of {place.name}")


def name_run(place: Workplace) -> None:
    """Name and tag the run in the Prefect UI by its experiment."""
    if place.experiment and flow_run.id:
        tags = {*flow_run.tags, f"experiment:{place.experiment}"}
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run.id), name=place.experiment, tags=tags)


def _follow(stage: str) -> Callable[[str], None]:
    """Return a function that logs the lines of a stage, notices as warnings, and moves a progress bar on lines ending in `X of Y`."""
    log = get_run_logger()
    bars: dict[str, UUID] = {}
    updated: dict[str, float] = {}

    def follow(line: str) -> None:
        log.log(logging.WARNING if line.startswith("notice: ") else logging.INFO, line)
        if (progress := artifacts.progress_in(line)) is None:
            return
        what, percent = progress
        now = time.monotonic()
        if percent < 100 and now - updated.get(what, -UPDATE_SECONDS) < UPDATE_SECONDS:
            return
        updated[what] = now
        if what in bars:
            update_progress_artifact(bars[what], percent)
        else:
            bars[what] = cast(UUID, create_progress_artifact(percent, key=f"progress-{stage}", description=what))

    return follow


def main() -> None:
    """Run the pipeline once with params.yaml."""
    run_once(pipeline, __doc__, INVALID)


if __name__ == "__main__":
    main()
