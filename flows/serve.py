"""The servers of `make up`: Prefect with the deployments of infra/prefect.yaml and their workers, MLflow and the explorer, until Ctrl-C.

Everything that they write stays in the checkout, in .prefect and .mlflow, and people's reviews in data. PREFECT_SERVER_API_PORT,
MLFLOW_PORT and OMMATID_PORT set the ports (default: 4200, 5000 and 8321, or the next free ones). Imports no Prefect: each server is a
separate process that logs to .prefect/logs.
"""

import ast
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flows.processes import Services, free_port
from ommatid.cli.error_boundary import at_edge
from ommatid.compute.commands import environment
from ommatid.config import load_params
from ommatid.config.messages import explain
from ommatid.config.strict_yaml import parse_yaml
from ommatid.errors import ConfigError
from ommatid.tracking import follow_move

PROJECT = "infra/prefect.yaml"


class Pool(BaseModel):
    """Work pool of a deployment."""

    name: str


class Deployment(BaseModel):
    """Deployment in infra/prefect.yaml; Prefect itself reads the keys that are not named here."""

    name: str
    entrypoint: str
    work_pool: Pool


class Project(BaseModel):
    """Contents of infra/prefect.yaml."""

    deployments: list[Deployment]


def serve(checkout: Path) -> None:
    """Start the servers, deployments and workers, print the addresses, and run until a signal comes or one of the processes ends."""
    parameters = json.dumps({"params": load_params(checkout / "params.yaml").model_dump(mode="json")})
    deployments = read_deployments(checkout)
    pools = list(dict.fromkeys(deployment.work_pool.name for deployment in deployments))
    prefilled = {deployment.name: ("--params", parameters) if takes_params(checkout, deployment) else () for deployment in deployments}
    prefect = free_port(int(os.environ.get("PREFECT_SERVER_API_PORT", "4200")))
    mlflow = free_port(int(os.environ.get("MLFLOW_PORT", "5000")), taken=[prefect])
    explorer = free_port(int(os.environ.get("OMMATID_PORT", "8321")), taken=[prefect, mlflow])
    services = Services(_environment(checkout, prefect, explorer), checkout / ".prefect/logs")
    deploy = ("prefect", "--no-prompt", "deploy", "--prefect-file", PROJECT, "--name")
    try:
        services.start("prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect))
        services.start("mlflow", *_mlflow(checkout, mlflow))
        services.start("explorer", "ommatid", "serve", "--port", str(explorer))
        services.wait_for("prefect", f"http://127.0.0.1:{prefect}/api/health")
        _end_orphans(f"http://127.0.0.1:{prefect}/api")
        for pool in pools:
            services.start(f"pool-{pool}", "prefect", "work-pool", "create", pool, "--type", "process", "--overwrite")
        services.finish(*(f"pool-{pool}" for pool in pools))
        for name, arguments in prefilled.items():
            services.start(f"deploy-{name}", *deploy, name, *arguments)
        services.finish(*(f"deploy-{name}" for name in prefilled))
        services.wait_for("mlflow", f"http://127.0.0.1:{mlflow}/health")
        services.wait_for("explorer", f"http://127.0.0.1:{explorer}/robots.txt")  # /health says whether there is a catalogue
        for pool in pools:
            services.start(f"worker-{pool}", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", pool)
        print(f"Explorer http://127.0.0.1:{explorer}\nPrefect  http://127.0.0.1:{prefect}/deployments\nMLflow   http://127.0.0.1:{mlflow}")
        print("Ctrl-C ends all of them.", flush=True)
        while True:
            services.check()
            time.sleep(1)
    finally:
        services.end()


def read_deployments(checkout: Path) -> list[Deployment]:
    """Read the deployments in infra/prefect.yaml.

    Raises:
        ConfigError: The file is missing or is not valid YAML, or a deployment lacks its name, entrypoint or work pool.
    """
    try:
        text = (checkout / PROJECT).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{PROJECT}: cannot be read ({error.strerror}); start this command in the checkout") from None
    try:
        return Project.model_validate(parse_yaml(text, PROJECT)).deployments
    except ValidationError as error:
        raise ConfigError(f"{PROJECT}: {explain(error, Project)}") from None


def takes_params(checkout: Path, deployment: Deployment) -> bool:
    """Return whether the flow of a deployment has an argument `params`, which is then prefilled with params.yaml.

    Raises:
        ConfigError: The entrypoint is not a function in a Python file.
    """
    file, _, flow = deployment.entrypoint.rpartition(":")
    try:
        body = ast.parse((checkout / file).read_text(encoding="utf-8")).body
        functions = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        (arguments,) = [node.args for node in functions if node.name == flow]
    except (OSError, SyntaxError, ValueError):
        raise ConfigError(
            f"{PROJECT}: deployment {deployment.name}: entrypoint {deployment.entrypoint!r} is not a function in a Python file; "
            "write FILE.py:FUNCTION, such as flows/pipeline.py:pipeline"
        ) from None
    return any(argument.arg == "params" for argument in (*arguments.args, *arguments.kwonlyargs))


def _environment(checkout: Path, port: int, explorer: int) -> dict[str, str]:
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")])),  # for `import flows`
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_UI_API_URL": "/api",  # or the pages in the browser send their requests to port 4200
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "OMMATID_EXPLORER_URL": f"http://127.0.0.1:{explorer}",  # for links to it from Prefect's artifacts and MLflow's tags
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {**environment(checkout, checkout), **ours}


def _mlflow(checkout: Path, port: int) -> tuple[str, ...]:
    """Command that starts MLflow on the store of this checkout's runs."""
    folder = checkout / ".mlflow"
    folder.mkdir(exist_ok=True)
    follow_move(folder)
    store = ("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--default-artifact-root", (folder / "artifacts").as_uri())
    return ("mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port), *store)


def _end_orphans(api: str) -> None:
    """Mark runs orphaned by a killed worker as Crashed; they still report Running, and would count towards the concurrency limit."""
    orphans = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}, "deployment_id": {"is_null_": False}}
    for run in _post(f"{api}/flow_runs/filter", {"flow_runs": orphans}):
        state = {"type": "CRASHED", "message": "its worker was killed; start the same run again to continue where it stopped"}
        _post(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _post(url: str, body: object) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the servers until Ctrl-C, SIGTERM, or SIGHUP when the terminal is closed."""
    with at_edge():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _stop)
        try:
            serve(Path.cwd())
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
