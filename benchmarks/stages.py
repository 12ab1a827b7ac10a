"""Measures time and peak memory of every stage, each run as `ommatid <stage>` in a separate process.

python benchmarks/stages.py 10000 60000      two data set sizes, in temporary folders; all other values are those of params.yaml
Peak memory is the peak resident set size of the stage's process (ru_maxrss), including imports.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ommatid.config import STAGE_NAMES

os.environ["OMMATID_CACHE_GB"] = "0"  # extraction computes everything

CHECKOUT = Path(__file__).parent.parent


def measure(stage: str, folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Run a stage and return its wall-clock seconds and its peak memory in MB."""
    command = [sys.executable, "-m", "ommatid.cli", stage, *(part for o in overrides for part in ("--set", o))]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{stage} failed in {folder}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def run(n_images: int, overrides: list[str]) -> dict[str, tuple[float, float]]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        shutil.copy(CHECKOUT / "params.yaml", folder)
        (folder / "data").mkdir()
        shutil.copy(CHECKOUT / "data/cifar10.json", folder / "data")
        return {stage: measure(stage, folder, [f"images.limit={n_images}", *overrides]) for stage in STAGE_NAMES}


def main() -> None:
    sizes = [int(argument) for argument in sys.argv[1:] if "=" not in argument] or [10_000]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    table = {n: run(n, overrides) for n in sizes}
    print("| stage |" + "".join(f" {n:,} images: s | MB |" for n in sizes))
    print("|---|" + "--:|--:|" * len(sizes))
    for stage in STAGE_NAMES:
        print(f"| {stage} |" + "".join(f" {table[n][stage][0]:.1f} | {table[n][stage][1]:.0f} |" for n in sizes))


if __name__ == "__main__":
    main()
