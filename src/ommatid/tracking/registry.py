"""The model registry: versions of SAEs, and which of them is the champion."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ommatid.errors import RunError
from ommatid.tracking.client import SAE, ask, shown_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "ommatid-sae"
"""Name of the registered model."""
CHAMPION = "champion"
"""Alias of the version that is in use."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    number: int
    """Version in the registry."""
    sae: str
    """Digest of the SAE's manifest."""
    run_id: str | None
    """MLflow run that trained it."""


def find_version(sae_digest: str) -> Version | None:
    """The newest version in the registry that holds this SAE.

    Raises:
        RunError: the registry does not answer.
    """
    where = f"name = '{MODEL}' AND tags.`{SAE}` = '{sae_digest}'"
    found = ask(lambda client: client.search_model_versions(where, max_results=100))
    return max((_version(version) for version in found), key=lambda version: version.number, default=None)


def set_champion(sae_digest: str) -> Version:
    """Point the alias `champion` at the version that holds this SAE.

    Raises:
        RunError: the registry does not answer, or does not hold it.
    """
    version = find_version(sae_digest)
    if version is None:
        raise RunError(f"{MODEL}: the registry at {shown_uri()} holds no version of the SAE {sae_digest[:12]}; train it while it answers")
    ask(lambda client: client.set_registered_model_alias(MODEL, CHAMPION, str(version.number)))
    return version


def get_champion() -> Version | None:
    """The version with the alias `champion`; None when there is none yet.

    Raises:
        RunError: the registry does not answer.
    """

    def get(client: "MlflowClient") -> "ModelVersion | None":
        from mlflow.exceptions import MlflowException

        try:
            return client.get_model_version_by_alias(MODEL, CHAMPION)
        except MlflowException as error:
            # the alias is missing: INVALID_PARAMETER_VALUE; the model is: RESOURCE_DOES_NOT_EXIST
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    found = ask(get)
    return _version(found) if found else None


def _version(version: "ModelVersion") -> Version:
    # the version is an int on sqlite and a str over http
    return Version(int(version.version), version.tags[SAE], version.run_id)
