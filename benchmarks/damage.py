"""Flips single bits in the artefacts of a study and reports each one's effect: found, harmless, or (never) other results.

    python benchmarks/damage.py reads DATA [STAGE ...]  100 flips in every file, each read as the stages read it
    python benchmarks/damage.py stages DATA catalog     one flip in every input file, and a run of the whole stage on each
    python benchmarks/damage.py cost DATA catalog       share of a stage's CPU time spent on checking its inputs

DATA is a copy of a study's `data`, whose files are changed one bit at a time and restored. Run it in a checkout with the study's
params.yaml.
"""

import hashlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from ommatid.config import load_params
from ommatid.errors import ArtefactError, OmmatidError
from ommatid.events import ignore
from ommatid.pipeline import STAGES
from ommatid.pipeline.run import run_stage
from ommatid.store import Artefact, damage, open_artefact

FLIPS = 100
SEED = 0


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """Change one bit of a file for the duration of the block, then restore it together with its modification time."""
    before = path.stat()
    _flip(path, at, bit)
    try:
        yield
    finally:
        _flip(path, at, bit)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def iter_flips(path: Path, n: int) -> Iterator[tuple[int, int]]:
    """Draw offsets and bits to flip; the same ones every time."""
    draw = random.Random(f"{SEED} {path.name} {path.stat().st_size}")
    for _ in range(n):
        yield draw.randrange(path.stat().st_size), 1 << draw.randrange(8)


def artefacts(data: Path) -> dict[str, tuple[Path, str]]:
    return {name: (data / one.place.name, one.kind) for name, one in STAGES.items() if (data / one.place.name).exists()}


def files_of(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


def digest_of(artefact: Artefact) -> str:
    """Digest of everything that stages read: tables by row groups, all other files as a whole, and all manifests."""
    digest = hashlib.sha256(repr(artefact.manifest).encode())
    for table in artefact.tables:
        for batch in artefact.iter_batches(table, n_rows=2**16):
            for column in batch.columns:
                for buffer in column.buffers():
                    digest.update(b"" if buffer is None else buffer)
    for file in artefact.manifest.files:
        if file.rows is None and not file.name.endswith("manifest.json"):
            digest.update(artefact.file(file.name).read_bytes())
    for child in artefact.each().values():
        digest.update(digest_of(child).encode())
    return digest.hexdigest()


def reads(data: Path, only: list[str]) -> None:
    total: Counter[str] = Counter()
    for name in only or STAGES:
        place, kind = artefacts(data)[name]
        expected = digest_of(open_artefact(place, kind))
        for path in files_of(place):
            outcomes: Counter[str] = Counter()
            for at, bit in iter_flips(path, FLIPS):
                with flipped(path, at, bit):
                    try:
                        outcomes["harmless" if digest_of(open_artefact(place, kind)) == expected else "OTHER RESULTS"] += 1
                    except ArtefactError as error:
                        outcomes["found" if path.name in str(error) else "found, file not named"] += 1
            total += outcomes
            print(f"{name:9} {path.relative_to(place)!s:60} {dict(outcomes)}", flush=True)
        assert digest_of(open_artefact(place, kind)) == expected, place
    print(dict(total))


def run(stage: str, data: Path, overrides: list[str]) -> str:
    """Digest of the tables and weights that a stage publishes."""
    made = run_stage(stage, load_params(Path("params.yaml"), overrides), ignore, str(data))
    if stage == "catalog":  # its file contains the time at which it was built
        with duckdb.connect(str(made.file("catalog.duckdb")), read_only=True) as connection:
            names = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall() if name != "runs"]
            return repr([connection.execute(f"SELECT bit_xor(hash(t)), count(*) FROM {name} t").fetchall() for name in sorted(names)])
    return repr([file.sha256 for one in [made, *made.each().values()] for file in one.manifest.files if "manifest" not in file.name])


def stage_on_damage(stage: str, data: Path, overrides: list[str]) -> None:
    inputs = [path for name in STAGES[stage].inputs for path in files_of(artefacts(data)[name][0])]
    expected, outcomes = run(stage, data, overrides), Counter()
    for path in inputs:
        ((at, bit),) = iter_flips(path, 1)
        with flipped(path, at, bit):
            try:
                what = "harmless" if run(stage, data, overrides) == expected else "OTHER RESULTS"
            except OmmatidError as error:
                what = "found" if path.name in str(error) else f"found, file not named: {error}"
        outcomes[what] += 1
        print(f"{stage:9} {path.relative_to(data)!s:70} {what}", flush=True)
    print(stage, dict(outcomes))


def cost(stage: str, data: Path, overrides: list[str]) -> None:
    spent, sums_of = [0.0], damage.sums_of

    def timed(found: Any) -> str:
        before = time.thread_time()
        try:
            return sums_of(found)
        finally:
            spent[0] += time.thread_time() - before

    damage.sums_of = timed  # pyright: ignore[reportPrivateImportUsage]
    before = time.process_time()
    run(stage, data, overrides)
    whole = time.process_time() - before
    print(f"{stage}: {spent[0]:.3f} s of {whole:.1f} s of CPU time spent on checking inputs, {spent[0] / whole:.2%}")


if __name__ == "__main__":
    what, data, *rest = sys.argv[1:]
    match what:
        case "reads":
            reads(Path(data), rest)
        case "stages":
            stage_on_damage(rest[0], Path(data), rest[1:])
        case "cost":
            cost(rest[0], Path(data), rest[1:])
        case _:
            sys.exit(__doc__)
