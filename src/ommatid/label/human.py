"""The labeller `human`: labels that people wrote into a CSV file."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from ommatid.errors import ConfigError

COLUMNS = ("latent", "label", "sae")
_SHOWN = 10
"""Problems of a file that its error names; the rest are counted."""


def load_labels(path: str, saes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Labels by SAE and latent; a line whose label is empty says nothing yet, and is passed over.

    Args:
        path: A CSV file with a header: latent, label and, where there are several SAEs, sae.
        saes: Number of latents of each SAE of the training, by the column `sae` of the tables; the file may also leave out the digits
            of the checksum at its end.

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


def _parse(cells: list[str], columns: list[str], saes: Mapping[str, int]) -> tuple[str, int, str]:
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells and {len(columns)} columns; put a label with a comma between quotation marks")
    row = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
    sae = _find(row["sae"], saes) if "sae" in row else next(iter(saes))
    if not row["latent"].isdecimal() or int(row["latent"]) >= saes[sae]:
        raise ValueError(f"column latent: got {row['latent']!r}; {sae} has latents 0 to {saes[sae] - 1}")
    return sae, int(row["latent"]), row["label"]


def _find(given: str, saes: Mapping[str, int]) -> str:
    names = {alias: name for name in saes for alias in (name.rpartition("-")[0], name)}
    if not given or given not in names:
        raise ValueError(f"column sae: got {given!r}; this training has {', '.join(saes)}")
    return names[given]
