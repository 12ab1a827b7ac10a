"""infra/prefect.yaml: deployments, the folder watch and messages, read and checked before any server is started. Imports no Prefect."""

import ast
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ommatid.config.messages import explain
from ommatid.config.strict_yaml import parse_yaml
from ommatid.errors import ConfigError

PROJECT = "infra/prefect.yaml"


class Pool(BaseModel):
    """Work pool of a deployment."""

    name: str


class Deployment(BaseModel):
    """Deployment in infra/prefect.yaml; Prefect itself reads the keys that are not named here."""

    name: str
    entrypoint: str
    work_pool: Pool


class Watch(BaseModel, extra="forbid"):
    """What happens when the images change (flows/watch.py)."""

    deployment: str
    """Deployment to start."""
    quiet_seconds: Annotated[float, Field(ge=1, le=86_400)] = 30.0
    """Seconds without any further change after which the run is started."""


class Automation(BaseModel, extra="forbid"):
    """Prefect automation that sends a message (flows/messages.py)."""

    name: str
    """Name of the automation, which is the subject of its messages."""
    trigger: dict[str, Any]
    """Trigger as Prefect defines it."""


class Project(BaseModel):
    """Contents of infra/prefect.yaml."""

    deployments: list[Deployment]
    watch: Watch | None = None
    automations: list[Automation] = []


def read_project(checkout: Path) -> Project:
    """Read infra/prefect.yaml.

    Raises:
        ConfigError: The file is missing or is not valid YAML, a deployment lacks its name, entrypoint or work pool, or the watch starts a
            deployment that is not listed.
    """
    try:
        text = (checkout / PROJECT).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{PROJECT}: cannot be read ({error.strerror}); start this command in the checkout") from None
    try:
        project = Project.model_validate(parse_yaml(text, PROJECT))
    except ValidationError as error:
        raise ConfigError(f"{PROJECT}: {explain(error, Project)}") from None
    names = [deployment.name for deployment in project.deployments]
    if project.watch and project.watch.deployment not in names:
        raise ConfigError(f"{PROJECT}: watch.deployment: {project.watch.deployment!r} is not one of the deployments: {', '.join(names)}")
    return project


def takes_params(checkout: Path, deployment: Deployment) -> bool:
    """Return whether the flow of a deployment has an argument `params`, whose form then shows params.yaml.

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
