"""The report of a benchmark: rows printed as a table with a verdict, and saved as JSON with commit, machine and versions."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
_ALWAYS = ("must", "goal")
"""Keys that every row has in JSON, even if null."""


@dataclass(frozen=True)
class Row:
    what: str
    value: float
    unit: str
    must: float | None = None
    goal: float | None = None
    better: Literal["higher", "lower"] = "higher"
    part: str | None = None
    """Part of the benchmark, if it can be run in parts."""
    commit: str | None = None
    """Commit at which the row was measured; None: the current one."""

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
        if not self._reaches(self.must):
            return "FALLS SHORT"
        return "goal" if self.goal is None or self._reaches(self.goal) else "must"

    def _reaches(self, bound: float) -> bool:
        return self.value >= bound if self.better == "higher" else self.value <= bound


def show(rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Print rows as a table, followed by notes."""
    print("\n| what | value | unit | must | goal | reaches |\n|---|--:|---|--:|--:|---|")
    for row in rows:
        bounds = ["" if bound is None else _number(bound) for bound in (row.must, row.goal)]
        print(f"| {row.what} | {_number(row.value)} | {row.unit} | {bounds[0]} | {bounds[1]} | {row.verdict} |")
    for note in notes:
        print(f"- {note}")


def publish(
    name: str,
    rows: Sequence[Row],
    libraries: Sequence[str],
    notes: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    besides: Mapping[str, Any] | None = None,
) -> None:
    """Print the table and write benchmarks/results/<name>.json.

    Args:
        name: Name of the file.
        rows: Measurements.
        libraries: Libraries of this environment whose versions are recorded.
        notes: Remarks for the reader.
        versions: Versions of libraries in other environments, by name.
        besides: Further keys of the file.
    """
    show(rows, notes)
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)docs")
    commit = _git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    values = {
        "commit": commit,
        "machine": {
            "cpu": _cpu(),
            "instructions": _instructions(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "gpu": _gpu(),
        },
        "versions": {library: metadata.version(library) for library in libraries} | dict(versions or {}),
        "notes": list(notes),
        "rows": [{key: value for key, value in asdict(row).items() if value is not None or key in _ALWAYS} for row in rows],
    } | dict(besides or {})
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"\n{path.relative_to(RESULTS.parent.parent)}")


def read(name: str) -> dict[str, Any]:
    """Read the file that `publish` wrote, with the commit of each row; {} if there is none yet."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return values | {"rows": [Row(**{"commit": values["commit"], **row}) for row in values["rows"]]}


def middle(values: Sequence[float]) -> float:
    """The median, as machines are noisy."""
    return median(values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _instructions() -> str:
    """Instruction sets that determine the speed of matrix products, such as "AVX512, bfloat16"."""
    import torch

    from ommatid.compute.hardware import computes_in_bfloat16

    return torch.backends.cpu.get_cpu_capability() + (", bfloat16" if computes_in_bfloat16(torch.device("cpu")) else "")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
