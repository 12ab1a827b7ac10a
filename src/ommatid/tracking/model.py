"""An SAE as an MLflow model, which `mlflow.pyfunc.load_model` loads from safetensors and JSON, without pickle."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.store import Artefact
from ommatid.tracking.client import SAE as SAE_TAG
from ommatid.tracking.client import call, experiment_of, patience
from ommatid.tracking.provenance import TAGS
from ommatid.tracking.registry import MODEL

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient


class _Encoder:
    """The model that `mlflow.pyfunc.load_model` returns; encodes activations at the hookpoint to activations of latents."""

    def __init__(self, folder: Path):
        from ommatid.sae.model import SAE

        self._sae = SAE.load(folder)

    def predict(self, model_input: "np.ndarray", params: dict[str, Any] | None = None) -> "np.ndarray":
        """Encode float32 activations (n, d_model) to activations of latents (n, d_sae)."""
        import torch

        with torch.inference_mode():
            return self._sae.encode(torch.as_tensor(model_input)).numpy()


def _load_pyfunc(data_path: str) -> _Encoder:
    """Load the model; MLflow looks for a function of this name in the loader module."""
    return _Encoder(Path(data_path))


def log_model(client: "MlflowClient", run_id: str, artefact: Artefact) -> None:
    """Log an SAE as an MLflow model, without pickle, and register it as a new version."""
    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment, name="sae", source_run_id=run_id, model_type="sae", tags={SAE_TAG: artefact.digest})
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder), artefact, run_id, model.model_id)
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
    if not client.search_registered_models(f"name = '{MODEL}'"):
        client.create_registered_model(MODEL)
    client.create_model_version(
        MODEL, model.artifact_location, run_id, tags={SAE_TAG: artefact.digest}, model_id=model.model_id, await_creation_for=0
    )


def register(artefact: Artefact, row: Mapping[str, Any]) -> None:
    """Register an SAE that was trained while the registry did not answer, with a run that says where it comes from.

    Args:
        artefact: The SAE.
        row: Its row of the relation `runs`, whose lineage becomes the run's tags.

    Raises:
        RunError: The registry does not answer.
    """
    known = {tag: row.get(column) for column, tag in TAGS.items()}
    tags = {tag: str(value).lower() if isinstance(value, bool) else str(value) for tag, value in known.items() if value is not None}

    def send(client: "MlflowClient") -> None:
        experiment = experiment_of(client)
        where = f"tags.`{SAE_TAG}` = '{artefact.digest}'"
        found = client.search_runs([experiment], where, max_results=1, order_by=["attributes.start_time DESC"])
        if found:  # of a training, or of an earlier attempt that was cut short
            run_id = found[0].info.run_id
        else:
            run = client.create_run(experiment, run_name=artefact.summary["sae"], tags={SAE_TAG: artefact.digest, **tags})
            run_id = run.info.run_id
        with patience():
            log_model(client, run_id, artefact)
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "FINISHED")

    call(send)


def _save_model(folder: Path, artefact: Artefact, run_id: str, model_id: str) -> None:
    # mlflow.pyfunc.save_model does the same, but first spends 1 to 2 s reading the metadata of every installed package
    import mlflow.pyfunc
    from mlflow.models import Model

    (folder / "data" / "sae").mkdir(parents=True)
    for name in ("sae.safetensors", "cfg.json"):
        shutil.copyfile(artefact.file(name), folder / "data" / "sae" / name)
    requirements = [f"{name}=={metadata.version(name)}\n" for name in ("ommatid", "torch", "safetensors", "numpy")]
    (folder / "requirements.txt").write_text("".join(requirements), encoding="utf-8")
    signature = _signature(json.loads(artefact.file("cfg.json").read_text(encoding="utf-8")))
    model = Model(run_id=run_id, model_id=model_id, signature=signature)
    mlflow.pyfunc.add_to_model(model, loader_module=__name__, data="data/sae")
    model.save(f"{folder}/MLmodel")


def _signature(config: dict[str, Any]) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    widths = (config["d_model"], config["d_sae"])
    inputs, outputs = (Schema([TensorSpec(np.dtype(np.float32), (-1, width))]) for width in widths)
    return ModelSignature(inputs=inputs, outputs=outputs)
