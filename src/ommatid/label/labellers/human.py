"""The labeller `human`: reads labels that people wrote into a CSV file."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ommatid.config.label import HumanLabeller
from ommatid.errors import ConfigError
from ommatid.label.labellers.base import HumanLabels
from ommatid.store.filesystem.csv_file import CsvFile, Row

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
            sae, latent = _parse(row, saes)
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


def _parse(row: Row, saes: Mapping[str, int]) -> tuple[str, int]:
    sae = _find(row.cells["sae"], saes) if "sae" in row.cells else next(iter(saes))
    latent = row.cells["latent"]
    if not latent.isdecimal() or int(latent) >= saes[sae]:
        raise ValueError(f"column latent: got {latent!r}; {sae} has latents 0 to {saes[sae] - 1}")
    return sae, int(latent)


def _find(given: str, saes: Mapping[str, int]) -> str:
    """Return the SAE's name in the tables, given that name or the part before its checksum."""
    names = {alias: name for name in saes for alias in (name.rpartition("-")[0], name)}
    if not given or given not in names:
        raise ValueError(f"column sae: got {given!r}; this training has {', '.join(saes)}")
    return names[given]


def make(name: str, params: HumanLabeller, saes: Mapping[str, int], warn: Callable[[str], None]) -> HumanLabels:
    """Make the source; see `make_source`."""
    return HumanLabels(load_labels(params.path, saes))
