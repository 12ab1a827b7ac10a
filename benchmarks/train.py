"""Training steps against the peers' and the hardware, what they teach, the stage around them, and their memory.

make bench-train                                   all of it, writes benchmarks/results/train.json and docs/pictures/train-cost.png
python benchmarks/train.py [--quick] [--parts ...]  only some parts (of steps, width, quality, stage, several, memory); rows of others stay
                                                   in the results, with the commit at which they were measured;
                                                   --quick makes few and small steps, to see that all of it runs, and writes nothing
Peers run in an environment of their own (`make peers`, or PEERS_PYTHON), with as many threads, and compute only in their turn.
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

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it (ommatid.executors.workers.WAITING)

import torch
from peer_process import open_peers
from report import Row, middle, publish, read, show
from train_cost import Points, against_floor, against_peers, by_width
from train_picture import PICTURE, draw
from train_quality import N_STEPS, quality
from train_setup import Size, told
from train_stage import DEMO, against_bare_steps, record_runs, several

N_THREADS = 2
SIZE = Size()
QUICK = Size(d_model=256, d_sae=1024, k=32, batch_size=512)
NOTES = [
    "rows of milliseconds are medians of steps that are made in turn, ours and theirs, by processes with two threads each",
    "peers as they come, in float32; ours too, but for the encoder's product, which is in bfloat16 where the hardware computes in it",
    "SAELens: SAETrainer.step, without logging; use_sparse_activations both ways, the faster counts (its BatchTopK does not read it)",
    "dictionary_learning: the trainer's update",
    "sparsify: SparseCoder, and what its Trainer does around it: projection, renormalisation; signum (its default) or Adam, the faster",
    "quality: planted data (benchmarks/synthetic.py), mean squared norm scaled to 1 for all; one peak learning rate, warm-up and decay",
    "quality: thresholds averaged as ours where the trainer lets one choose, AuxK as each has it, inference as each library defines it",
    "quality: sparsify's schedule decays over the whole run; SAELens begins with directions of norm 0.1 and does not keep them at a norm",
    "memory: resident (/proc) beyond that before Learner.begin, less weights and moments of Adam, with gradients; median of five processes",
]


class Bench:
    """The parts; `quick` only shows that they run."""

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
        """At the large size and at the demo's."""
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
        yield Row(f"{what}, steps 4 to 20: a floor for the selection is known", found["later"], "MB", must, None, "lower")
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
    asked = parser.parse_args()
    torch.set_num_threads(N_THREADS)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        bench = Bench(Path(name), asked.quick)
        earlier = {} if asked.quick or asked.parts == list(PARTS) else read("train")
        bench.points.take(earlier.get("points", {}))
        rows: list[Row] = [row for row in earlier.get("rows", ()) if row.part not in asked.parts]
        for part in asked.parts:
            rows += [replace(row, part=part) for row in told(PARTS[part](bench))]
            if not asked.quick:
                _keep(bench, rows, earlier.get("versions", {}))  # an hour's run that is stopped keeps what it has measured
        if bench.points.by_k and bench.points.peers:
            draw(bench.points, bench.size, Path(name) / "cost.png" if asked.quick else PICTURE)
    if asked.quick:
        show(rows, NOTES)


def _keep(bench: Bench, rows: list[Row], earlier: dict[str, str]) -> None:
    rows = sorted(rows, key=lambda row: list(PARTS).index(row.part or ""))
    others = [part for part in PARTS if part not in {row.part for row in rows}]
    missing = [f"not measured: {', '.join(others)}"] if others else []
    versions = {name: version for name, version in earlier.items() if name.startswith("peers: ")}
    versions |= {f"peers: {name}": version for name, version in bench.versions.items()}
    libraries = ["ommatid", "torch", "numpy", "pyarrow", "mlflow"]
    publish("train", rows, libraries, [*missing, *NOTES], versions, {"points": asdict(bench.points)})


if __name__ == "__main__":
    main()
