"""Measures what it costs that the line runs by itself: an increment of 1 %, a retrain with nothing new, a drift check, the stage `images`.

python benchmarks/operations.py                          all parts; takes 17 minutes on 2 cores
python benchmarks/operations.py increment retrain drift  these parts; the other rows of the table stay as they were
Parts: increment, retrain and drift work in a clone of this repository's last commit, on CIFAR-10 pictures in a folder, with the demo's
params, an empty cache and `dvc repro` for each stage, as the flows do. `slow-model` repeats the increment with EfficientNet-Lite2 at 256
pixels as the model and Lite0 as the judge. `images` compares the stage with a bare loop on full-size photographs (benchmarks/images.py).
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import yaml
from report import Row, publish, read

import images
from ommatid.compute.commands import DVC, environment
from ommatid.config import STAGE_NAMES, Cifar10Source
from ommatid.images.cifar10 import CLASSES, open_source
from ommatid.images.source import spread

CHECKOUT = Path(__file__).parent.parent
N_IMAGES = 10_000
N_DRIFT = 1_000
SLOW = {
    "extract.model": "{kind: lite, variant: lite2, image_size: 256}",
    "extract.hookpoints": "[blocks.20]",
    "extract.judge": "{kind: lite, variant: lite0, image_size: 256}",
    "train.epochs": "2",
}
"""Values of params.yaml for a model that takes as long for an image as a small vision transformer."""
NOT_TIMED = "train"
"""Stage that the comparison leaves out: a new set of images is a new training."""
_COMPUTED = re.compile(r"([\d,]+) of ([\d,]+) images found in the cache, ([\d,]+) computed")


class Clone:
    """A clone of the repository's last commit, with a folder of photographs as its source and a cache of its own."""

    def __init__(self, root: Path, n_images: int, overrides: Mapping[str, str] = {}) -> None:
        self.root = root / "clone"
        self.cache = root / "cache"
        self.photos = root / "photos"
        self.photos.mkdir()
        _run(["git", "clone", "--quiet", str(CHECKOUT), str(self.root)], root, dict(os.environ))
        source = open_source(Cifar10Source(kind="cifar10", path=str(CHECKOUT / "data/cifar10.json")))
        self._items = source.iter_items(spread(source.total, n_images + N_IMAGES))
        self.add(n_images)
        self.env = {**environment(self.root, self.root), "OMMATID_CACHE": str(self.cache), "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.set_params({"images.source": f"{{kind: folder, path: {self.photos}}}", "images.limit": "null", **overrides})
        self.commit("Read photographs")

    def add(self, n: int, kinds: Container[str] = CLASSES, change: Callable[[bytes], bytes] = bytes) -> list[Path]:
        """Put `n` more photographs of some kinds into the folder, each changed by a function of its bytes; return their paths."""
        found = []
        for item in itertools.islice((item for item in self._items if item.label in kinds), n):
            path = self.photos / (item.label or "") / f"{item.path.replace('/', '-')}.png"
            found.append((path, change(item.read())))
        for path, data in found:  # at once, as somebody who watches the folder takes a pause for the end
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return [path for path, _ in found]

    def set_params(self, overrides: Mapping[str, str]) -> None:
        """Write values, in YAML, into params.yaml, by their keys."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in overrides.items():
            *sections, last = key.split(".")
            section = params
            for name in sections:
                section = section[name]
            section[last] = yaml.safe_load(value)
        path.write_text(yaml.safe_dump(params), encoding="utf-8")

    def commit(self, message: str) -> None:
        """Commit all changes of tracked files."""
        self.run(["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "--quiet", "-am", message])

    def repro(self, stages: tuple[str, ...]) -> tuple[dict[str, float], int]:
        """Run stages by `dvc repro`; return the seconds of each, and the number of images that `extract` ran networks on."""
        seconds, computed = {}, 0
        for stage in stages:
            start = time.perf_counter()
            printed = self.run([*DVC, "repro", "--single-item", stage])
            seconds[stage] = time.perf_counter() - start
            if found := _COMPUTED.search(printed):
                computed += int(found[3].replace(",", ""))
            elif stage == "extract":
                computed += int(re.findall(r"holds (\d+) embeddings", printed)[-1])
            print(f"{stage}: {seconds[stage]:.1f} s", flush=True)
        return seconds, computed

    def run(self, command: list[str]) -> str:
        """Run a command in the clone and return what it prints."""
        return _run(command, self.root, self.env)


def _run(command: list[str], folder: Path, env: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


LINE = ("sources", *STAGE_NAMES)


def measure_increment(clone: Clone, n_images: int, name: str) -> list[Row]:
    """Run the whole line, add 1 % of images, and run it again."""
    first, _ = clone.repro(LINE)
    clone.add(n_images // 100)
    again, computed = clone.repro(LINE)
    timed = [stage for stage in LINE if stage != NOT_TIMED]
    share = computed / (n_images + n_images // 100)
    ratio = sum(again[stage] for stage in timed) / sum(first[stage] for stage in timed)
    rows = [
        Row(f"{name}: line but training after 1 % more images, against from scratch", ratio, "", 0.25, 0.1, "lower"),
        Row(f"{name}: the same of images and extract alone", _ratio(again, first, ("images", "extract")), "", better="lower"),
        Row(f"{name}: share of images that `extract` ran networks on then", 100 * share, "%", 3.0, 1.5, "lower"),
    ]
    return rows + [Row(f"{name}: {stage}, from scratch and then", first[stage], f"s, {again[stage]:.1f} s") for stage in LINE]


def _ratio(one: Mapping[str, float], other: Mapping[str, float], stages: tuple[str, ...]) -> float:
    return sum(one[stage] for stage in stages) / sum(other[stage] for stage in stages)


def measure_retrain(clone: Clone) -> list[Row]:
    """Retrain until there is a champion, and then with nothing new."""
    clone.run([sys.executable, "-m", "flows.retrain"])
    start = time.perf_counter()
    printed = clone.run([sys.executable, "-m", "flows.retrain"])
    whole = time.perf_counter() - start
    if "Unchanged" not in printed:
        raise SystemExit(f"the second retrain was not a no-op:\n{printed[-3000:]}")
    times = [_seconds(line) for line in printed.splitlines() if "Beginning flow run" in line or "Finished in state" in line]
    return [
        Row("retrain with nothing new, without the start of a temporary server", times[-1] - times[0], "s", 15, 5, "lower"),
        Row("the same with it", whole, "s", better="lower"),
    ]


def _seconds(line: str) -> float:
    hours, minutes, seconds = line.split(" ", 1)[0].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def measure_drift(clone: Clone) -> list[Row]:
    """Check new images for drift against the champion that `measure_retrain` made."""
    clone.add(N_DRIFT)
    clone.repro(("sources", "images", "extract"))
    start = time.perf_counter()
    printed = clone.run([sys.executable, "-m", "ommatid", "drift"])
    seconds = time.perf_counter() - start
    print(printed[-1000:])
    return [Row(f"drift check of {N_DRIFT:,} new images against {N_IMAGES:,}", seconds, "s", 60, 15, "lower")]


def main() -> None:
    parts = sys.argv[1:] or ["increment", "retrain", "drift", "slow-model", "images"]
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"), prefix="operations-") as name:
        root = Path(name)
        if {"increment", "retrain", "drift"} & {*parts}:
            (root / "demo").mkdir()
            clone = Clone(root / "demo", N_IMAGES)
            if "increment" in parts:
                rows["increment"] = measure_increment(clone, N_IMAGES, "demo's model")
            if {"retrain", "drift"} & {*parts}:
                rows["retrain"] = measure_retrain(clone)
            if "drift" in parts:
                rows["drift"] = measure_drift(clone)
        if "slow-model" in parts:
            (root / "slow").mkdir()
            clone = Clone(root / "slow", N_IMAGES, SLOW)
            rows["slow-model"] = measure_increment(clone, N_IMAGES, "Lite2 at 256 pixels")
        if "images" in parts:
            rows["images"] = images.measure(1_000)
    stored: Callable[[Row], bool] = lambda row: row.part not in rows  # noqa: E731
    kept = [row for row in read("operations").get("rows", []) if stored(row)]
    made = [Row(**{**vars(row), "part": part}) for part, found in rows.items() for row in found]
    publish("operations", kept + made, ["torch", "transformers", "pyarrow", "dvc", "prefect"])


if __name__ == "__main__":
    main()
