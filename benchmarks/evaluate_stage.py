"""Benchmark of the whole stage `evaluate` on random activations: its memory for two numbers of images, or a single run of any size.

python benchmarks/evaluate_stage.py N           prints time and peak memory of a run on N images x 50 patches x 8,192 latents
python benchmarks/evaluate_stage.py FOLDER      runs on the inputs in FOLDER; the measured process, started by the other modes
"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from own_process import clock, in_a_process, peak
from report import Row
from torch import Tensor
from torch.nn.functional import normalize

from ommatid import schemas, store
from ommatid.activations.batches import load_sample
from ommatid.activations.columns import to_binary
from ommatid.config import load_params
from ommatid.evaluate.stage import evaluate
from ommatid.sae.model import SAEConfig, make_untrained
from ommatid.store import part_name

THREADS = 2
D_MODEL, K = 64, 16
JUDGES = (384, 768)
"""Widths of the judges' embeddings."""
IMAGES_PER_PART = 1500
N_CLASSES = 10


@dataclass(frozen=True)
class Drawn:
    """Size of the random inputs: images without pixels, activations, and an SAE of random directions."""

    n_images: int
    grid: tuple[int, int] = (4, 4)
    """Rows and columns of patches in an image."""
    d_sae: int = 1024

    @property
    def what(self) -> str:
        return f"{self.n_images:,} images x {self.grid[0] * self.grid[1]} patches x {self.d_sae:,} latents"


SMALL = Drawn(3000)
LARGE = replace(SMALL, n_images=12_000)


def memory_of_the_stage() -> list[Row]:
    """Rows with the peak memory of two sizes, and its growth between them."""
    results = {drawn: _run(drawn) for drawn in (SMALL, LARGE)}
    rows = [
        Row(f"stage evaluate, {drawn.what}, two judges: peak memory", result["peak"], "MB", better="lower")
        for drawn, result in results.items()
    ]
    growth = results[LARGE]["peak"] / results[SMALL]["peak"]
    return [*rows, Row(f"peak memory with {LARGE.n_images:,} images / with {SMALL.n_images:,}", growth, "x", 1.25, 1.1, "lower")]


def _run(drawn: Drawn) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), drawn)
        return in_a_process(__file__, folder)


def write_inputs(folder: Path, drawn: Drawn) -> None:
    """Write the artefacts that the stage reads."""
    images = _write_images(folder, drawn.n_images)
    activations = _write_activations(folder, drawn, images)
    with store.open_draft(folder / "sae", "sae", {}, {"extract": activations}) as draft:
        sae = make_untrained(SAEConfig("random", D_MODEL, drawn.d_sae, K, "drawn", "drawn"), load_sample(activations, 4096), seed=0)
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as config:
            sae.save(weights, config)
        draft.seal({"sae": "random", "dead_latents": []})
        draft.publish(folder / "sae")


def _write_images(folder: Path, n: int) -> store.Artefact:
    with store.open_draft(folder / "images", "images", {}, {}) as draft:
        labels = pa.array([f"class {i % N_CLASSES}" for i in range(n)])
        columns = {"image": pa.array(range(n), pa.int32()), "image_id": [sha256(b"%d" % i).hexdigest() for i in range(n)]}
        draft.write_table("images.parquet", pa.table({**columns, "split": ["eval"] * n, "label": labels}))
        draft.seal({"n_eval": n})
        return draft.publish(folder / "images")


def _write_activations(folder: Path, drawn: Drawn, images: store.Artefact) -> store.Artefact:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N_CLASSES, D_MODEL, generator=generator)
    n_patches = drawn.grid[0] * drawn.grid[1]

    def draw(n_images: int) -> tuple[Tensor, Tensor]:
        """Draw tokens (n_images, tokens, d_model) and the classes of the images."""
        of = torch.randint(N_CLASSES, (n_images,), generator=generator)
        return directions[of][:, None] + torch.randn(n_images, n_patches, D_MODEL, generator=generator), of

    with store.open_draft(folder / "activations", "activations", {}, {"images": images}) as draft:
        for i, numbers in enumerate(torch.arange(drawn.n_images).split(IMAGES_PER_PART)):
            x, of = draw(len(numbers))
            draft.write_table(part_name("eval", i), _tokens(numbers, x, drawn.grid))
            vectors = [normalize(torch.randn(len(numbers), w, generator=generator) + of[:, None] % 3) for w in (8, *JUDGES)]
            columns = [pa.array(numbers.numpy(), pa.int32()), *(to_binary(vector, torch.float32) for vector in vectors)]
            draft.write_table(part_name("embeddings", i), pa.table(columns, schema=schemas.embeddings(8, *JUDGES)))
        draft.write_table("train.parquet", _tokens(torch.arange(500), draw(500)[0], drawn.grid))
        judges = [{"judge": f"drawn {width}", "d_judge": width, "failed": 0} for width in JUDGES]
        summary = {"judges": judges, "grid": list(drawn.grid), "tokens_per_image": n_patches}
        draft.seal({**summary, "hookpoint": "drawn", "window": 1, "judge": "drawn"})
        return draft.publish(folder / "activations")


def _tokens(numbers: Tensor, x: Tensor, grid: tuple[int, int]) -> pa.Table:
    per_image = x.shape[1]
    place = np.tile(np.arange(per_image), len(x))
    columns = {"image": pa.array(numbers.repeat_interleave(per_image).numpy(), pa.int32()), "token": pa.array(place, pa.int32())}
    columns |= {"kind": pa.array(["patch"] * len(place)), "row": pa.array(place // grid[1], pa.int16())}
    columns |= {"col": pa.array(place % grid[1], pa.int16()), "x": to_binary(x.flatten(0, 1), torch.float16)}
    return pa.table(columns, schema=schemas.activations(D_MODEL, {}))


def main() -> None:
    if sys.argv[1].isdecimal():
        _run(Drawn(int(sys.argv[1]), (5, 10), 8192))
    else:
        _evaluate(Path(sys.argv[1]))


def _evaluate(folder: Path) -> None:
    torch.set_num_threads(THREADS)
    params = load_params(Path(__file__).parent.parent / "params.yaml").evaluate
    kinds = {"images": ("images", "images"), "extract": ("activations", "activations"), "train": ("sae", "sae")}
    inputs = {name: store.open_artefact(folder / path, kind) for name, (path, kind) in kinds.items()}
    with store.open_draft(folder / "evaluation", "evaluation", params.identity(), inputs) as draft:
        seconds, _ = clock(lambda: evaluate(params, inputs, draft))
    print(json.dumps({"seconds": seconds, "peak": peak()}))


if __name__ == "__main__":
    main()
