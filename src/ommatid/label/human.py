"""The labeller `human`: labels that people wrote into a CSV file."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ommatid.errors import ConfigError

COLUMNS = ("latent", "label", "sae")
_SHOWN = 10
"""Problems of a file that its error names; the rest are counted."""


@dataclass(frozen=True)
class Named:
    """An SAE that a file may speak of."""

    table_name: str
    """What the column `sae` of every table says: the name of its folder and the first digits of its checksum."""
    d_sae: int
    """Latents it has."""


def load_labels(path: str, saes: Mapping[str, Named]) -> dict[str, dict[int, str]]:
    """Labels by SAE and latent; a line whose label is empty says nothing yet, and is passed over.

    Args:
        path: A CSV file with a header: latent, label and, where there are several SAEs, sae.
        saes: The SAEs of the training by the names of their folders; the file may use those, or the longer ones of the tables.

    Raises:
        ConfigError: the file is missing, is no CSV of this kind, or has no label; or naming line and column of each thing that is wrong.
    """
    where = f"label.labellers: {path}"
    lines = _lines(path, where)
    columns = _columns(next(lines, (1, []))[1], len(saes), where)
    found: dict[str, dict[int, str]] = {name: {} for name in saes}
    first_lines: dict[tuple[str, int], int] = {}
    problems: list[str] = []
    for line, cells in lines:
        try:
            sae, latent, label = _parse(cells, columns, saes)
            first = first_lines.setdefault((sae, latent), line) if label else line
            if first != line:
                raise ValueError(f"column latent: latent {latent} has a label on line {first} already; keep one")
        except ValueError as error:
            problems.append(f"line {line}, {error}")
        else:
            found[sae] |= {latent: label} if label else {}
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConfigError(f"{where}: {'; '.join(problems[:_SHOWN])}{more}")
    if not any(found.values()):
        raise ConfigError(f"{where}: has no label; write one line a latent, such as 301,horse")
    return found


def _lines(path: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line that is not empty, the header first."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write the mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}; give a CSV file in UTF-8 with columns latent, label and, of several SAEs, sae") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    yield from ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))


def _columns(header: list[str], n_saes: int, where: str) -> list[str]:
    columns = [cell.strip() for cell in header]
    needed = COLUMNS if n_saes > 1 else COLUMNS[:2]
    if set(columns) - set(COLUMNS) or set(needed) - set(columns) or len(set(columns)) < len(columns):
        several = f", for there are {n_saes} SAEs" if n_saes > 1 else ""
        raise ConfigError(f"{where}: line 1 has the columns {', '.join(columns) or 'none'}; it needs {', '.join(needed)}{several}")
    return columns


def _parse(cells: list[str], columns: list[str], saes: Mapping[str, Named]) -> tuple[str, int, str]:
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells and {len(columns)} columns; put a label with a comma between quotation marks")
    row = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
    sae = _find(row["sae"], saes) if "sae" in row else next(iter(saes))
    d_sae = saes[sae].d_sae
    if not row["latent"].isdecimal() or int(row["latent"]) >= d_sae:
        raise ValueError(f"column latent: got {row['latent']!r}; {sae} has latents 0 to {d_sae - 1}")
    return sae, int(row["latent"]), row["label"]


def _find(given: str, saes: Mapping[str, Named]) -> str:
    names = {alias: name for name, sae in saes.items() for alias in (name, sae.table_name)}
    if given not in names:
        raise ValueError(f"column sae: got {given!r}; this training has {', '.join(sae.table_name for sae in saes.values())}")
    return names[given]
