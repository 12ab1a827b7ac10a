"""Compares the estimates of `ommatid estimate` with actual runs, on three models.

python benchmarks/estimate.py [images]     writes benchmarks/results/estimate.json; takes 15 minutes with 1,500 images on 2 cores
Each stage runs as `ommatid <stage>` in a separate process, right after the estimate; its memory is its peak resident set size.
CLIP and DINOv2 have the shapes of openai/clip-vit-base-patch32 and facebook/dinov2-small, with random weights.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from report import Row, publish

from ommatid.config import STAGE_NAMES
from ommatid.pipeline import STAGES as MADE

os.environ["OMMATID_CACHE_GB"] = "0"  # extraction computes everything

CHECKOUT = Path(__file__).parent.parent
MB = 1e6

ESTIMATE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from ommatid.config import load_params
from ommatid.estimate import estimate
found = estimate(load_params(Path("params.yaml"), sys.argv[1:]))
print(json.dumps({"took": found.took, "stages": {s.stage: asdict(s) for s in found.stages}}))
"""
RUN = """
import sys
from ommatid.cli import main
where, sys.argv = sys.argv[1], ["ommatid", *sys.argv[2:]]
try:
    main()
finally:  # VmHWM is the peak of this process alone, while ru_maxrss may be inherited from the parent
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    open(where, "w", encoding="utf-8").write(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
MAKE = """
import sys
from pathlib import Path
import torch
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
sys.path.insert(0, sys.argv[1])
from extract import make_clip
folder = Path(sys.argv[2])
make_clip(folder / "clip")
torch.manual_seed(0)
sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(folder / "dino")
"""


@dataclass(frozen=True)
class Taken:
    """Disk space (bytes), time (seconds) and peak memory (bytes) of a stage."""

    bytes: float
    seconds: float
    peak: float

    def relative_errors(self, actual: "Taken") -> tuple[float, float, float]:
        """Errors of this estimate, each as a share of the actual value."""
        pairs = ((self.bytes, actual.bytes), (self.seconds, actual.seconds), (self.peak, actual.peak))
        return tuple(abs(mine / theirs - 1) for mine, theirs in pairs)  # pyright: ignore[reportReturnType]


def python(folder: Path, code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def run_stage(folder: Path, stage: str, overrides: list[str]) -> Taken:
    settings = [part for override in overrides for part in ("--set", override)]
    start = time.perf_counter()
    python(folder, RUN, "peak", stage, *settings)
    seconds = time.perf_counter() - start
    # hard links count once
    files = {path.stat().st_ino: path.stat().st_size for path in (folder / MADE[stage].place).rglob("*") if path.is_file()}
    return Taken(sum(files.values()), seconds, int((folder / "peak").read_text()) * 1024)


def compare(name: str, overrides: list[str]) -> tuple[list[Row], list[str]]:
    """Estimate a run, run it, and compare the two."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        folder = Path(place)
        shutil.copy(CHECKOUT / "params.yaml", folder)
        (folder / "data").mkdir()
        shutil.copy(CHECKOUT / "data/cifar10.json", folder / "data")
        answer = json.loads(python(folder, ESTIMATE, *overrides).splitlines()[-1])
        estimated = {stage: Taken(values["bytes"], values["seconds"], values["peak"]) for stage, values in answer["stages"].items()}
        actual = {stage: run_stage(folder, stage, overrides) for stage in STAGE_NAMES}
    notes = [f"{name}: {stage}: {describe(estimated[stage], actual[stage])}" for stage in STAGE_NAMES]
    print(*notes, sep="\n", flush=True)
    return [*rows_of(name, estimated, actual), Row(f"{name}: time of the estimate itself", answer["took"] / 60, "minutes")], notes


def describe(estimated: Taken, actual: Taken) -> str:
    pairs = (
        (estimated.bytes, actual.bytes, MB, "MB"),
        (estimated.seconds, actual.seconds, 60, "min"),
        (estimated.peak, actual.peak, MB, "MB of memory"),
    )
    return ", ".join(f"{mine / unit:.2f} for {theirs / unit:.2f} {what}" for mine, theirs, unit, what in pairs)


def rows_of(name: str, estimated: dict[str, Taken], actual: dict[str, Taken]) -> list[Row]:
    """Rows for the sums over all stages, and for the stage with the largest error."""
    sums = [
        Taken(sum(t.bytes for t in of.values()), sum(t.seconds for t in of.values()), max(t.peak for t in of.values()))
        for of in (estimated, actual)
    ]
    of_sum = sums[0].relative_errors(sums[1])
    of_stages = {stage: estimated[stage].relative_errors(actual[stage]) for stage in STAGE_NAMES}
    rows = []
    for i, what in enumerate(("bytes", "minutes", "peak memory")):
        worst = max(STAGE_NAMES, key=lambda stage: of_stages[stage][i])
        rows.append(Row(f"{name}: {what} of the run, error of the estimate", 100 * of_sum[i], "% off", 10, None, "lower"))
        rows.append(Row(f"{name}: {what} of the worst stage ({worst}), error", 100 * of_stages[worst][i], "% off", 10, None, "lower"))
    return rows


def main() -> None:
    n_images = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as models:
        python(CHECKOUT, MAKE, str(CHECKOUT / "benchmarks"), models)
        clip = [f"extract.model={{kind: clip, path: {models}/clip}}", "extract.hookpoints=[vision.blocks.10]"]
        dino = [f"extract.model={{kind: dino, path: {models}/dino}}", "extract.hookpoints=[vision.blocks.10]", "extract.namer={kind: lite}"]
        # random weights may leave many latents dead, which the gate must not reject here
        settings = {
            "lite0": ["train.epochs=20"],
            "CLIP ViT-B/32": [*clip, "train.epochs=8", "train.max_dead=1"],
            "DINOv2-small": [*dino, "train.epochs=1", "train.max_dead=1"],
        }
        rows: list[Row] = []
        notes = [f"{n_images} CIFAR-10 images, judge lite2@128; Lite0 trains 20 epochs, CLIP 8, DINOv2 1; below: estimate for actual"]
        for name, overrides in settings.items():
            found = compare(name, [f"images.limit={n_images}", *overrides])
            rows += found[0]
            notes += found[1]
    publish("estimate", rows, ["ommatid", "torch", "transformers", "pyarrow", "duckdb"], notes)


if __name__ == "__main__":
    main()
