"""`make up`, end to end: servers start, runs are started by a schedule and by "Run", Ctrl-C ends everything, and no log has an error.

The checkout has one additional deployment, made by the recipe docs/developers/add-a-deployment.md.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.serve import read_deployments, takes_params
from ommatid.errors import ConfigError
from support.checkout import bytes_of, run
from support.processes import HANG_SECONDS, wait_for, wait_for_end
from support.recipes import Tree, assert_only_named, blocks_of, copy_tree

PAGE = "add-a-deployment.md"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=HANG_SECONDS) as answer:
        return json.load(answer)


def add_deployment(tree: Tree) -> None:
    """Add a deployment by following the recipe."""
    project = "infra/prefect.yaml"
    tree.write("flows/count.py", blocks_of(PAGE)[0])
    tree.write(project, (tree.root / project).read_text(encoding="utf-8") + "\n" + blocks_of(PAGE, "text")[0])


def run_deployment(api: str, overrides: dict[str, Any]) -> str:
    """Start a run as the UI does, with all of the prefilled parameters, some of them changed."""
    deployment = call(f"{api}/deployments/name/pipeline/pipeline")
    parameters = deployment["parameters"]
    parameters["params"]["train"].update(overrides)
    return call(f"{api}/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]


def finished(api: str, flow_run: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        found = call(f"{api}/flow_runs/{flow_run}")
        return found if found["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

    return wait_for(ended, "the end of the run")


def schedule_pipeline(checkout: Path) -> None:
    """Schedule the pipeline, and nothing else, at short intervals."""
    path = checkout / "infra/prefect.yaml"
    project = yaml.safe_load(path.read_text())
    deployments = {one["name"]: one for one in project["deployments"]}
    assert deployments["retrain"].pop("schedules")
    deployments["pipeline"]["schedules"] = [{"interval": 15, "active": True}]
    path.write_text(yaml.safe_dump(project))


def scheduled(api: str) -> dict[str, Any]:
    """Wait for a scheduled run to end, stop the schedule, and return the run."""
    deployment = call(f"{api}/deployments/name/pipeline/pipeline")

    def runs(*states: str) -> list[dict[str, Any]]:
        wanted = {"deployment_id": {"any_": [deployment["id"]]}, "state": {"type": {"any_": states}}}
        return call(f"{api}/flow_runs/filter", {"flow_runs": wanted})

    (run, *_) = wait_for(lambda: runs("COMPLETED", "FAILED", "CRASHED"), "a run that a schedule starts")
    call(f"{api}/deployments/{deployment['id']}/pause_deployment", {})
    wait_for(lambda: not runs("SCHEDULED", "PENDING", "RUNNING"), "the end of those that had begun")
    return run


def errors_in(logs: Path) -> list[str]:
    """Return the lines of all logs that report an error."""
    said = [f"{path.name}: {line}" for path in sorted(logs.glob("*.log")) for line in path.read_text(errors="replace").splitlines()]
    return [line for line in said if re.search(r"ERROR|CRITICAL|Traceback|Error\b|[Ee]xception", line)]


def test_forms_of_flows_are_filled_with_the_params(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    add_deployment(tree)
    found = {one.name: (one.work_pool.name, takes_params(tree.root, one)) for one in read_deployments(tree.root)}
    assert found == {"pipeline": ("ommatid", True), "retrain": ("ommatid", False), "count": ("ommatid", False)}


def test_an_asynchronous_flow_is_deployed_too(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    add_deployment(tree)
    tree.replace("flows/count.py", "def count(", "async def count(")
    (deployment,) = [one for one in read_deployments(tmp_path) if one.name == "count"]
    assert not takes_params(tmp_path, deployment)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("entrypoint: flows/count.py:count", "schedules: []", "infra/prefect.yaml: deployments.2.entrypoint: missing"),
        ("    work_pool: *pool\n", "", "infra/prefect.yaml: deployments.2.work_pool: missing"),
        ("flows/count.py:count", "flows/count.py:cuont", "deployment count: entrypoint 'flows/count.py:cuont' is not a function"),
        ("flows/count.py:count", "flows/cuont.py:count", "deployment count: entrypoint 'flows/cuont.py:count' is not a function"),
        ("*pool", "*lake", "infra/prefect.yaml: not valid YAML"),
    ],
)
def test_an_invalid_deployment_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    tree = copy_tree(tmp_path)
    add_deployment(tree)
    path = tmp_path / "infra/prefect.yaml"
    before, _, added = path.read_text().rpartition("  - name: count")
    path.write_text(f"{before}  - name: count{added.replace(old, new)}")
    with pytest.raises(ConfigError) as error:
        for deployment in read_deployments(tmp_path):
            takes_params(tmp_path, deployment)
    assert says in str(error.value)


def test_a_run_with_an_override_can_be_started_in_the_ui(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = copy_tree(tmp_path / "tree")
    add_deployment(tree)
    assert_only_named(tree, PAGE)
    for folder in ("flows", "infra"):
        shutil.copytree(tree.root / folder, checkout / folder)
    schedule_pipeline(checkout)
    run(checkout, "git", "add", "-A")
    run(checkout, "git", "commit", "-qm", "Flows")
    for key in [key for key in os.environ if key.startswith("PREFECT_")]:
        monkeypatch.delenv(key)
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    explorer = free_port()
    env = {**os.environ, "PREFECT_SERVER_API_PORT": str(port), "MLFLOW_PORT": str(free_port()), "OMMATID_PORT": str(explorer)}
    up = subprocess.Popen([sys.executable, "-m", "flows.serve"], cwd=checkout, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert up.stdout
        said = [up.stdout.readline() for _ in range(4)]
        assert said[:2] == [f"Explorer http://127.0.0.1:{explorer}\n", f"Prefect  http://127.0.0.1:{port}/deployments\n"], said
        assert said[2].startswith("MLflow   http://127.0.0.1:"), said
        with pytest.raises(urllib.error.HTTPError, match="503") as empty:
            urllib.request.urlopen(f"http://127.0.0.1:{explorer}/")
        assert "data/catalog/catalog.duckdb: does not exist" in empty.value.read().decode()
        empty.value.close()

        started = scheduled(api)
        assert started["auto_scheduled"] and started["state_type"] == "COMPLETED", started["state"]

        before, status = bytes_of(checkout), run(checkout, "git", "status", "--porcelain")
        with pytest.raises(urllib.error.HTTPError, match="409") as refused:
            run_deployment(api, {"k": "many"})
        assert "is not of type 'integer'" in refused.value.read().decode()
        refused.value.close()

        ended = finished(api, run_deployment(api, {"k": 12}))
        assert ended["state_type"] == "COMPLETED", ended["state"]
        name = ended["name"]
        assert name.startswith("train-k-12-") and f"experiment:{name}" in ended["tags"]
        assert name in run(checkout, "dvc", "exp", "list", "--name-only").split()
        ran = [line.split() for line in (checkout / "ran.log").read_text().splitlines()]
        assert ran == [["train", name, ended["id"]], ["evaluate", name, ended["id"]]]
        assert bytes_of(checkout) == before and run(checkout, "git", "status", "--porcelain") == status
        shown = call(f"{api}/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [ended["id"]]}}})
        assert {"quality-images", "quality-train", "progress-train", "health", "metrics"} <= {artifact["key"] for artifact in shown}

        count = call(f"{api}/deployments/name/count/count")
        counted = finished(api, call(f"{api}/deployments/{count['id']}/create_flow_run", {})["id"])
        assert counted["state"]["message"] == f"{len(list((checkout / 'data/images').iterdir()))} files"
    finally:
        family = psutil.Process(up.pid).children(recursive=True)
        up.send_signal(signal.SIGINT)
        up.wait(HANG_SECONDS)
        up.stdout.close() if up.stdout else None
    assert len(family) >= 5
    wait_for_end(family, "servers and worker")
    logs = checkout / ".prefect/logs"
    assert {path.stem for path in logs.glob("*.log")} == {
        *("prefect", "mlflow", "explorer", "pool-ommatid", "worker-ommatid"),
        *("deploy-pipeline", "deploy-retrain", "deploy-count"),
    }
    assert errors_in(logs) == []
