"""A tiny catalogue in which every free text is hostile to pages, made within a second; the stages' own is `small_study`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from support import catalog as artefacts
from support.small_study import HOSTILE, MARKUP

SAES = (f"{MARKUP.replace('/', '|')} & 'co", "second\u202esae")
"""Names of the two SAEs; those of stages are names of folders, which cannot hold a slash."""
TEXTS = tuple(HOSTILE.values())
LATER = {
    "mistakes": "sae VARCHAR, latent INTEGER, labeller VARCHAR, kind VARCHAR, rank INTEGER, image INTEGER, cosine FLOAT, threshold FLOAT, "
    "is_hard BOOLEAN, act FLOAT",
}
"""Relations that pages need and the small catalogue may lack."""


def make(root: Path) -> Path:
    """Make the catalogue in a folder, and return its file."""
    artefacts.build(root, artefacts.make_inputs(root))
    file = artefacts.path_in(root)
    with duckdb.connect(str(file)) as connection:
        for name, columns in LATER.items():
            connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns})")
        connection.execute("INSERT INTO mistakes SELECT sae, 0, 'words', 'missed', 1, 0, 0.1, 0.2, false, 1.0 FROM runs")
        _plant(connection)
    return file


def _plant(connection: duckdb.DuckDBPyConnection) -> None:
    """Put hostile texts into every column that holds free text, and make a second SAE of the first."""
    columns: dict[str, list[str]] = {}
    for relation, column in connection.execute("SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal").fetchall():
        columns.setdefault(relation, []).append(column)
    for image in range(len(artefacts.IMAGES)):
        label, path = TEXTS[image % len(TEXTS)], f"{TEXTS[(image + 1) % len(TEXTS)]}/{image}.png"
        digest = hashlib.sha256(bytes([image])).hexdigest()
        values = {"image_id": digest, "label": label, "path": path, "captions": list(TEXTS), "taxonomy": label}
        _update(connection, "images", {name: value for name, value in values.items() if name in columns["images"]}, "image = ?", image)
    for latent, text in enumerate(TEXTS[:4]):
        for relation in ("features", "latents"):
            _update(connection, relation, {"top_classes": list(TEXTS)}, "latent = ? AND len(top_classes) > 0", latent)
        _update(connection, "features", {"label": text}, "latent = ? AND label IS NOT NULL", latent)
        _update(connection, "labels", {"label": text, "detail": text}, "latent = ?", latent)
    for relation, names in columns.items():
        for name in names:
            if name in ("labeller", "judge"):
                connection.execute(f"UPDATE {relation} SET {name} = {name} || ?", [MARKUP])
    _update(connection, "labels", {"correlation": float("nan"), "control_correlation": float("-inf")}, "true")  # which JSON cannot hold
    _update(connection, "probes", {"class": MARKUP}, "true")
    _update(connection, "audit", {"class": MARKUP, "attribute": MARKUP, "grouped_by": MARKUP, "follows": 0.5, "follows_low": 0.25}, "true")
    _update(connection, "audits", {"attributes": list(TEXTS)}, "true")
    _update(connection, "audit_images", {"class": MARKUP, "called": MARKUP}, "true")
    texts = ("name", "model", "hookpoint", "variant", "git_commit", "dvc_experiment", "dvc_lock", "mlflow_run_id", "reason")
    _update(connection, "runs", dict.fromkeys(texts, MARKUP) | {"prefect_flow_run_id": "javascript:alert(1)"}, "true")
    for relation, names in columns.items():
        if "sae" in names:
            connection.execute(f"UPDATE {relation} SET sae = ?", [SAES[0]])
            connection.execute(f"INSERT INTO {relation} SELECT * REPLACE (? AS sae) FROM {relation}", [SAES[1]])
    connection.execute("INSERT INTO matches SELECT sae, latent, ?, latent, 0.95, 0.5 FROM features WHERE sae = ?", [SAES[1], SAES[0]])


def _update(connection: duckdb.DuckDBPyConnection, relation: str, values: dict[str, Any], where: str, *keys: Any) -> None:
    changes = ", ".join(f'"{name}" = ?' for name in values)
    parameters: Sequence[Any] = [*values.values(), *keys]
    connection.execute(f"UPDATE {relation} SET {changes} WHERE {where}", parameters)
