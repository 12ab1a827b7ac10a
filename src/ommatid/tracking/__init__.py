"""MLflow tracking: runs with their curves, the model registry, and lineage. The only package that imports mlflow.

A failure of tracking never stops a stage: if the server doesn't answer, a single warning says so and the stage continues. MLflow's
own variable MLFLOW_TRACKING_URI names the server; without it, everything is stored in .mlflow/ of the checkout that the run came from.
"""

from ommatid.tracking.client import database, follow_move
from ommatid.tracking.model import register
from ommatid.tracking.registry import CHAMPION, MODEL, Version, find_version, get_champion, set_champion
from ommatid.tracking.runs import Runs, lineage, log_stage, training_runs

__all__ = [
    "CHAMPION",
    "MODEL",
    "Runs",
    "Version",
    "database",
    "find_version",
    "follow_move",
    "get_champion",
    "lineage",
    "log_stage",
    "register",
    "set_champion",
    "training_runs",
]
