"""The model registry: versions of SAEs, one of which is the champion."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ommatid.errors import RunError
from ommatid.tracking.client import SAE, call, shown_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "ommatid-sae"
"""Name of the registered model."""
CHAMPION = "champion"
"""Alias of the version in use."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    number: int
    """Number of the version in the registry."""
    sae: str
    """Digest of the SAE's manifest."""
    run_id: str | None
    """Id of the MLflow run that trained the SAE."""


def find_version(sae_digest: str) -> Version | None:
    """Find the newest version in the registry that holds an SAE.

    Args:
        sae_digest: Digest of the SAE's manifest.

    Returns:
        The version; None if the registry doesn't hold the SAE.

    Raises:
        RunError: The registry does not answer.
    """
    where = f"name = '{MODEL}' AND tags.`{SAE}` = '{sae_digest}'"
    found = call(lambda client: client.search_model_versions(where, max_results=100))
    return max((_version(version) for version in found), key=lambda version: version.number, default=None)


def set_champion(sae_digest: str) -> Version:
    """Point the alias `champion` at the newest version that holds an SAE.

    Args:
        sae_digest: Digest of the SAE's manifest.

    Returns:
        The version that the alias now points at.

    Raises:
        RunError: The registry does not answer, or does not hold the SAE.
    """
    version = find_version(sae_digest)
    if version is None:
        raise RunError(
            f"{MODEL}: the registry at {shown_uri()} holds no version of the SAE {sae_digest[:12]}; train it while the registry answers"
        )
    call(lambda client: client.set_registered_model_alias(MODEL, CHAMPION, str(version.number)))
    return version


def get_champion() -> Version | None:
    """Get the version with the alias `champion`.

    Returns:
        The version; None if there is no champion yet.

    Raises:
        RunError: The registry does not answer.
    """

    def get(client: "MlflowClient") -> "ModelVersion | None":
        from mlflow.exceptions import MlflowException

        try:
            return client.get_model_version_by_alias(MODEL, CHAMPION)
        except MlflowException as error:
            # MLflow reports a missing alias as INVALID_PARAMETER_VALUE and a missing model as RESOURCE_DOES_NOT_EXIST
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    found = call(get)
    return _version(found) if found else None


def _version(version: "ModelVersion") -> Version:
    # the version is an int from SQLite and a str over HTTP
    return Version(int(version.version), version.tags.get(SAE, ""), version.run_id)  # a version that somebody made by hand has no such tag
