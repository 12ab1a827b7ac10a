"""The pages of runs: where each SAE comes from, its numbers, the decisions about it, and how its params differ from another's."""

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import quote

import yaml
from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.catalog.question import Question
from ommatid.config import STAGE_NAMES
from ommatid.explorer.web import Json, NotFound, Query, TheExplorer, View, link

router = APIRouter()

_RUNS = """
    SELECT runs.* EXCLUDE (params), runs.ms - runs.ms_floor AS over_floor, comparisons.sae IS NOT NULL AS is_here
    FROM runs LEFT JOIN comparisons ON comparisons.sae = runs.sae AND dictionary = 'sae'
    ORDER BY is_here DESC, over_floor DESC NULLS LAST, runs.sae
"""
_DECISIONS = """
    SELECT decided_at, sae, name, decision, reason FROM runs WHERE decision IS NOT NULL ORDER BY decided_at DESC, sae
"""
_RUN = "SELECT *, ms - ms_floor AS over_floor FROM runs WHERE sae = $sae"
TRACES = {
    "git_commit": "Git commit",
    "dvc_experiment": "DVC experiment",
    "dvc_lock": "dvc.lock",
    "mlflow_run_id": "MLflow run",
    "prefect_flow_run_id": "Prefect flow run",
    "images_digest": "Digest of images",
    "activations_digest": "Digest of activations",
    "sae_digest": "Digest of the SAE",
}
"""What pages call the columns that tell where an SAE comes from."""


class RunQuery(Query):
    """Parameters of a run's page."""

    against: Annotated[str | None, Field(max_length=500)] = None
    """Another SAE, whose params are compared."""


def run_url(sae: str, **parameters: Any) -> str:
    """Address of a run's page."""
    return link(f"/runs/{quote(sae, safe='')}", **parameters)


def find_run(view: View, name: str) -> dict[str, Any]:
    """Find a run by the SAE's name in the catalogue or in its training; an SAE of an earlier decision counts too.

    Raises:
        NotFound: There is no such run.
    """
    runs = view.opened.kept(_RUNS)
    if found := next((run for key in ("sae", "name") for run in runs if run[key] == name), None):
        return view.rows(_RUN, sae=found["sae"])[0]
    saes = [run["sae"] for run in runs]
    near = difflib.get_close_matches(name[:500], saes, n=3, cutoff=0.2) or saes[:3]
    raise NotFound(f"There is no run of an SAE {name[:200]!r} in this catalogue.", {sae: run_url(sae) for sae in near})


def trace_urls(run: Mapping[str, Any]) -> dict[str, str]:
    """Return addresses of a run on the servers of MLflow and Prefect, by column; those of servers that the environment names."""
    from ommatid.tracking.client import shown_uri  # here, as its package imports pyarrow, which the server's memory need not hold

    prefect = os.environ.get("PREFECT_UI_URL") or os.environ.get("PREFECT_API_URL", "").rstrip("/").removesuffix("/api")
    pages = {"mlflow_run_id": (shown_uri(), "#/runs"), "prefect_flow_run_id": (prefect, "runs/flow-run")}
    return {
        column: f"{server.rstrip('/')}/{page}/{quote(run[column], safe='')}"
        for column, (server, page) in pages.items()
        if run[column] and server.startswith(("http://", "https://"))
    }


def compare_params(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the params that differ.

    Args:
        one: Params of all stages.
        other: Those of another run.

    Returns:
        `key`, such as train.k, `one` and `other` of each; a run that lacks the key lacks the value, too.
    """
    ours, theirs = dict(_flatten(one)), dict(_flatten(other))
    rows = []
    for key in dict.fromkeys([*ours, *theirs]):
        found = {side: params[key] for side, params in (("one", ours), ("other", theirs)) if key in params}
        if len({json.dumps(value) for value in found.values()}) > 1 or len(found) == 1:
            rows.append({"key": key, **found})
    return rows


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_run(view: View, name: str, query: RunQuery) -> dict[str, Any]:
    """Collect what the catalogue says of a run, and what differs from another."""
    run = find_run(view, name)
    params = json.loads(run.pop("params") or "{}")
    params = {stage: params[stage] for stage in STAGE_NAMES if stage in params} | params
    other = find_run(view, query.against) if query.against else None
    found = {"run": run, "params": params, "against": None, "differences": None, "traces": None}
    if other:
        differences = compare_params(params, json.loads(other["params"] or "{}"))
        traces = [{"key": key, "one": run[key], "other": other[key]} for key in TRACES if run[key] != other[key]]
        found |= {"against": other["sae"], "differences": differences, "traces": traces}
    return found


@router.get("/runs", include_in_schema=False)
def runs_page(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show every run of the catalogue, and the decisions about them."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        runs, decisions = view.opened.kept(_RUNS), view.opened.kept(_DECISIONS)
        return view.render(
            "runs.html",
            sae,
            sae_page="/runs",
            runs=[run | {"url": run_url(run["sae"]), "urls": trace_urls(run)} for run in runs],
            decisions=[row | {"url": run_url(row["sae"])} for row in decisions],
            sql=Question(_RUNS).text,
        )


@router.get("/api/runs", tags=["runs"])
def runs_json(request: Request, explorer: TheExplorer) -> Response:
    """Every run of the catalogue, without its params; a published catalogue has those of earlier decisions too."""
    with explorer.open(request) as view:
        return Json(view.opened.kept(_RUNS))


@router.get("/runs/{sae}", include_in_schema=False)
def run_page(request: Request, explorer: TheExplorer, sae: str, query: Annotated[RunQuery, Parameters()]) -> Response:
    """Show where an SAE comes from, and how its params differ from another's."""
    with explorer.open(request) as view:
        found = describe_run(view, sae, query)
        one = found["run"]
        return view.render(
            "run.html",
            one["sae"] if one["sae"] in view.opened.saes else view.choose_sae(query.sae),
            sae_page="/runs",
            one=one,
            found=found,
            traces=[(title, one[column], trace_urls(one).get(column)) for column, title in TRACES.items() if one[column]],
            titles=TRACES,
            others=[run for run in view.opened.kept(_RUNS) if run["sae"] != one["sae"]],
            yaml=yaml.safe_dump(found["params"], sort_keys=False, allow_unicode=True, width=100),
            url=run_url(one["sae"]),
            sql=Question(_RUN, {"sae": one["sae"]}).text,
        )


@router.get("/api/runs/{sae}", tags=["runs"])
def run_json(request: Request, explorer: TheExplorer, sae: str, query: Annotated[RunQuery, Parameters()]) -> Response:
    """A run with its params, and which of them differ from those of the run `against`."""
    with explorer.open(request) as view:
        return Json(describe_run(view, sae, query))
