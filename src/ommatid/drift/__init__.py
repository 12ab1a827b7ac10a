"""Drift: new images are compared with those that the champion was trained and measured on, before a training begins.

    reference   what a champion keeps for it, so that its own data may go
    measure     what an SAE does on some images
    check       the comparison, its verdict and its tables

Prefect, MLflow and the gate are not known here; who runs a check from end to end is a matter of `publish`.
"""

from ommatid.drift.check import Champion, Check, check, list_checks
from ommatid.drift.reference import Extraction, Reference, open_reference, write_reference

__all__ = ["Champion", "Check", "Extraction", "Reference", "check", "list_checks", "open_reference", "write_reference"]
