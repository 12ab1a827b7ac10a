"""Benchmark of training: steps against those of the peers and the hardware's limit, quality, the whole stage, and memory.

make bench-train                                   runs all parts, writes benchmarks/results/train.json and docs/pictures/train-cost.png
python benchmarks/train.py [--quick] [--parts ...]  runs only some of the parts steps, width, quality, stage, several and memory; rows of
                                                   the other parts are kept, with the commit at which they were measured;
                                                   --quick checks that everything runs, with few small steps, and writes nothing
The peers run in a separate environment (`make peers`, or PEERS_PYTHON) with the same number of threads, and compute only in turn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does (ommatid.executors.workers.OPENMP_SETTINGS)

import torch
from peer_process import open_peers
from report import Row, middle, publish, read, show
from train_cost import Points, against_floor, against_peers, by_width
from train_picture import PICTURE, draw
from train_quality import N_STEPS, quality
from train_setup import Size, print_rows
from train_stage import DEMO, against_bare_steps, record_runs, several

N_THREADS = 2
SIZE = Size()
QUICK = Size(d_model=256, d_sae=1024, k=32, batch_size=512)
NOTES = [
    "milliseconds are medians of steps made alternately by our process and the peers', with two threads each",
    "peers run unchanged, in float32; so do we, except for the encoder's product, which is in bfloat16 if the hardware supports it",
    "SAELens: SAETrainer.step without logging; the faster of both values of use_sparse_activations (its BatchTopK ignores it)",
    "dictionary_learning: the trainer's update",
    "sparsify: SparseCoder with its Trainer's projection and renormalisation; the faster of signum (its default) and Adam",
    "quality: planted data (benchmarks/synthetic.py) scaled to mean squared norm 1; the same peak learning rate, warm-up and decay for all",
    "quality: thresholds averaged as ours where the trainer allows it, AuxK and inference as each library defines them",
    "quality: sparsify's schedule decays over the whole run; SAELens starts with directions of norm 0.1 and does not normalise them",
    "memory: resident memory (/proc) above that before Learner.begin, less weights and Adam moments; median of five processes",
]


class Bench:
    """The parts of the benchmark; with `quick`, they only check that they run."""

    def __init__(self, root: Path, quick: bool) -> None:
        self._root = root
        self._quick = quick
        self._rounds = 3 if quick else 9
        self.size = QUICK if quick else SIZE
        self.points = Points()
        self.versions: dict[str, str] = {}

    def steps(self) -> Iterator[Row]:
        with open_peers() as peers:
            self.versions = peers.versions()
            yield from against_peers(peers, self.size, 1 if self._quick else 5, self.points)
        yield from against_floor(self.size, self._rounds)

    def width(self) -> Iterator[Row]:
        yield from by_width(self.size, self._rounds, self.points)

    def quality(self) -> Iterator[Row]:
        with open_peers() as peers:
            for n_steps in (40,) if self._quick else N_STEPS:
                yield from quality(peers, n_steps)

    def stage(self) -> Iterator[Row]:
        record_runs(self._root)
        yield from against_bare_steps(self._root / "stage", self.size, 512 if self._quick else 8192, 1 if self._quick else 6)

    def several(self) -> Iterator[Row]:
        """Train several SAEs in one pass, at the large size and at the demo's."""
        record_runs(self._root)
        for size, n_images, epochs in ((self.size, 2048, 2), (DEMO, 4096, 5)):
            n_images, epochs = (256, 1) if self._quick else (n_images, epochs)
            yield from several(self._root / f"several-{size.d_sae}", size, n_images, epochs, 1 if self._quick else 2)

    def memory(self) -> Iterator[Row]:
        command = [sys.executable, str(Path(__file__).parent / "train_memory.py")]
        answers = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) for _ in range(5)]
        found = {name: middle([answer[name] / 1e6 for answer in answers]) for name in answers[0]}
        must = 3 * SIZE.batch_size * SIZE.d_sae * 2 / 1e6
        what = "memory beyond weights and optimiser"
        yield Row(f"{what}, steps 1 to 20", max(found["first"], found["later"]), "MB", must, None, "lower")
        yield Row(f"{what}, steps 4 to 20 (with a known floor for the selection)", found["later"], "MB", must, None, "lower")
        yield Row(f"{what}: of which gradients", found["gradients"], "MB")


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "steps": Bench.steps,
    "width": Bench.width,
    "quality": Bench.quality,
    "stage": Bench.stage,
    "several": Bench.several,
    "memory": Bench.memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(N_THREADS)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        bench = Bench(Path(name), options.quick)
        earlier = {} if options.quick or options.parts == list(PARTS) else read("train")
        bench.points.load(earlier.get("points", {}))
        rows: list[Row] = [row for row in earlier.get("rows", ()) if row.part not in options.parts]
        for part in options.parts:
            rows += [replace(row, part=part) for row in print_rows(PARTS[part](bench))]
            if not options.quick:
                _save(bench, rows, earlier.get("versions", {}))  # after each part, so that a run stopped early keeps its rows
        if bench.points.by_k and bench.points.peers:
            draw(bench.points, bench.size, Path(name) / "cost.png" if options.quick else PICTURE)
    if options.quick:
        show(rows, NOTES)


def _save(bench: Bench, rows: list[Row], earlier: dict[str, str]) -> None:
    rows = sorted(rows, key=lambda row: list(PARTS).index(row.part or ""))
    others = [part for part in PARTS if part not in {row.part for row in rows}]
    missing = [f"not measured: {', '.join(others)}"] if others else []
    versions = {name: version for name, version in earlier.items() if name.startswith("peers: ")}
    versions |= {f"peers: {name}": version for name, version in bench.versions.items()}
    libraries = ["ommatid", "torch", "numpy", "pyarrow", "mlflow"]
    publish("train", rows, libraries, [*missing, *NOTES], versions, {"points": asdict(bench.points)})


if __name__ == "__main__":
    main()
