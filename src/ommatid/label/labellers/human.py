"""The labeller `human`: reads labels that people wrote into a CSV file, or names that they gave in the log of reviews."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from ommatid.compute.nearest import ALIKE, TILE
from ommatid.config.label import HumanLabeller
from ommatid.errors import ConfigError
from ommatid.label.labellers.base import HumanLabels
from ommatid.reviews import ReviewLog, follow
from ommatid.reviews.table import parse_key
from ommatid.sae.model import WEIGHTS
from ommatid.store import Artefact
from ommatid.store.filesystem.csv_file import CsvFile

COLUMNS = ("latent", "label", "sae")
"""Columns of the file; `sae` may be left out if there is one SAE."""


def load_labels(path: str, saes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Load a file of labels. Lines with an empty label are skipped, so that a file may be filled in bit by bit.

    Args:
        path: A CSV file with a header and the columns latent, label and, if there are several SAEs, sae.
        saes: Number of latents of each SAE of the training, by the SAE's name in the tables. The file may leave out the checksum at the
            end of a name.

    Returns:
        Labels by SAE and latent.

    Raises:
        ConfigError: The file is missing, is not such a CSV file, or has no label; otherwise the error names line and column of every
            problem.
    """
    where = f"label.labellers: {path}"
    try:
        found = _load(Path(path).read_bytes(), saes)
    except OSError as error:
        raise ConfigError(
            f"{where}: {error.strerror}; give a CSV file in UTF-8 with columns latent, label and, if there are several SAEs, sae"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not any(found.values()):
        raise ConfigError(f"{where}: has no label; write one line per latent, such as 301,horse")
    return found


def _load(data: bytes, saes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    needed = COLUMNS if len(saes) > 1 else COLUMNS[:2]
    file = CsvFile(data, COLUMNS, needed)
    if file.unknown_columns:
        raise ValueError(f"line 1 has the columns {', '.join(file.columns)}; it needs {', '.join(needed)}, and takes no other than sae")
    found: dict[str, dict[int, str]] = {name: {} for name in saes}
    first_lines: dict[tuple[str, int], int] = {}
    for row in file:
        try:
            sae, latent = parse_key(row, saes)
        except ValueError as error:
            file.problems.append(f"line {row.line}, {error}")
            continue
        if not (label := row.cells["label"]):
            continue
        if (first := first_lines.setdefault((sae, latent), row.line)) != row.line:
            file.problems.append(f"line {row.line}, column latent: latent {latent} has a label on line {first} already; keep one")
        found[sae].setdefault(latent, label)
    if file.problems:
        raise ValueError(file.problems_text())
    return found


def load_names(path: str, saes: Mapping[str, Artefact], warn: Callable[[str], None]) -> dict[str, dict[int, str]]:
    """Load the names in a log of reviews. Those given to other SAEs are found again by the directions of their features.

    Only names matter here: what else people say of features changes no label, and none of it decides where a name is found.

    Args:
        path: The log. If there is none yet, there are no labels.
        saes: Each SAE of the training, by its name in the tables.
        warn: Called if there is no name, if names belong to features that these SAEs do not have, and if lines of the log are left out.

    Returns:
        Labels by SAE and latent.

    Raises:
        ReviewError: The log cannot be read.
    """
    state = ReviewLog(path).state()
    if state.problems:
        warn(f"{path}: {len(state.problems)} lines of the log of reviews are left out; the first: {state.problems[0]}")
    renamed = [key for key, feature in state.features().items() if any(event.kind == "rename" for event in feature.history)]
    named = {key for key in renamed if state.feature(key).name is not None}
    if not named:
        warn(f"{path}: nobody has named a feature yet, so there are no labels by people")
    found: dict[str, dict[int, str]] = {}
    lost = set(named)
    for sae, artefact in saes.items():
        followed = follow(state, sae, iter_directions(artefact), renamed)
        names = {latent: feature.name for latent, feature in followed.features(state).items()}
        found[sae] = {latent: name for latent, name in names.items() if name is not None}
        lost -= {key for key in named if key[0] == sae or key in followed.latents}
    if lost:
        warn(
            f"{path}: {len(lost)} of {len(named)} named features are not in this training: no direction has a cosine of {ALIKE:g} with "
            "theirs; their names stay in the log"
        )
    return found


def iter_directions(sae: Artefact) -> Iterator[Float[np.ndarray, "latents d_model"]]:
    """Iterate over the directions of an SAE, `TILE` latents at a time."""
    with safe_open(sae.file(WEIGHTS), framework="numpy") as file:
        weights = file.get_slice("W_dec")
        d_sae = weights.get_shape()[0]
        for start in range(0, d_sae, TILE):
            yield weights[start : min(start + TILE, d_sae)]  # a slice that ends beyond the tensor is refused


def make(name: str, params: HumanLabeller, saes: Mapping[str, Artefact], warn: Callable[[str], None]) -> HumanLabels:
    """Make the source; see `make_source`."""
    if params.is_log:
        return HumanLabels(load_names(params.path, saes, warn))
    return HumanLabels(load_labels(params.path, {name: sae.manifest.params["d_sae"] for name, sae in saes.items()}))
