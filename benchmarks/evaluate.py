"""MonoSemanticity: against the published pair by pair loop, at full size, and the memory of stage `evaluate` by the number of images.

python benchmarks/evaluate.py      writes benchmarks/results/evaluate.json; 2 threads, which the loop has as well; some minutes
What is drawn: latents that each fire on one image in a hundred, as of an SAE with k 20 of 2,048 on class tokens, given as compressed
rows and as a dense array; and latents that fire on every image, for which a float64 product is the least that can be done. The
judge is 768 wide. Each memory is the largest resident set of a process of its own, which holds arrays, libraries and all.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from report import Row, middle, publish
from torch import Tensor
from torch.nn.functional import cosine_similarity

THREADS = 2
LOOP_SIZES = (750, 1500, 3000)
"""Images."""
N_LATENTS, WIDTH = 2048, 768
DENSITY = 0.01
"""Share of images on which a latent of an SAE fires."""
FULL = (50_000, 8192)
"""Images and latents of the full size."""
SMALL, LARGE = 3000, 12_000
"""Evaluation images of the two runs of the stage."""
IMAGES_PER_PART = 1500
D_MODEL, D_SAE, K, GRID = 64, 1024, 16, (4, 4)


def draw_acts(n: int, n_latents: int, density: float) -> Tensor:
    """Dense, (n, n_latents) float32, some images at a time: without copies."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.empty(n, n_latents)
    for some in acts.split(512):
        some.uniform_(generator=generator)
        if density < 1:
            some.sub_(1 - density).relu_().mul_(1 / density)
    return acts


def draw_embeddings(n: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1)).add_(0.1)


def published_loop(acts: Tensor, embeddings: Tensor, batch: int = 100) -> Tensor:
    """As sae-for-vlm's metric.py goes about it: for every image the later ones in batches of 100, weighted cosines and weights summed."""
    low, high = acts.amin(0), acts.amax(0)
    a = (acts - low) / (high - low)
    above, below = torch.zeros_like(low), torch.zeros_like(low)
    for i in range(len(a)):
        for start in range(i + 1, len(a), batch):
            later = slice(start, start + batch)
            weights = a[i] * a[later]
            above += (weights * cosine_similarity(embeddings[i][None], embeddings[later])[:, None]).sum(0)
            below += weights.sum(0)
    return above / below


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def against_the_loop() -> tuple[list[Row], float]:
    """Rows, and the largest difference to the loop."""
    from ommatid.metrics import monosemanticity

    rows, difference = [], 0.0
    ratios: dict[tuple[str, int], float] = {}
    for n in LOOP_SIZES:
        embeddings = draw_embeddings(n)
        for what, density in (
            ("SAE latents, compressed rows", DENSITY),
            ("SAE latents, dense array", DENSITY),
            ("latents that always fire", 1.0),
        ):
            acts = draw_acts(n, N_LATENTS, density)
            loop, expected = clock(lambda acts=acts, embeddings=embeddings: published_loop(acts, embeddings))
            given = acts.to_sparse_csr() if "rows" in what else acts
            found = [clock(lambda given=given, embeddings=embeddings: monosemanticity(given, embeddings)) for _ in range(9)]
            ours = middle([seconds for seconds, _ in found])
            both = ~(expected.isnan() | found[0][1].isnan())
            difference = max(difference, float((found[0][1] - expected)[both].abs().max()))
            ratios[what, n] = loop / ours
            must = 200 if n == 1500 else None
            print(f"{what}, {n}: loop {loop:.2f} s, ours {ours * 1e3:.1f} ms", flush=True)
            rows.append(Row(f"{what}, N {n:,}: times as fast as the loop", loop / ours, "x", must=must, goal=must and 300))
    first, _, last = LOOP_SIZES
    for what in dict.fromkeys(what for what, _ in ratios):
        growth = ratios[what, last] / ratios[what, first]
        rows.append(Row(f"{what}: that factor at N {last:,} over that at {first:,}", growth, "x", must=1.2, goal=3))
    return rows, difference


def at_full_size() -> list[Row]:
    rows = []
    for what in ("dense", "rows"):
        told = in_a_process("full", what)
        name = f"{FULL[0]:,} images x {FULL[1]:,} latents x {WIDTH}, {'dense float32' if what == 'dense' else 'compressed rows'}"
        rows.append(Row(f"{name}: seconds", told["seconds"], "s", must=60, goal=20, better="lower"))
        rows.append(Row(f"{name}: peak memory", told["peak"], "MB", must=3000, goal=2500, better="lower"))
    return rows


def run_full(what: str) -> dict[str, float]:
    from ommatid.metrics import monosemanticity

    embeddings = draw_embeddings(FULL[0])
    acts = draw_acts(*FULL, density=1.0) if what == "dense" else draw_rows(*FULL)
    seconds, ms = clock(lambda: monosemanticity(acts, embeddings))
    assert not ms.isnan().any()
    return {"seconds": seconds, "peak": peak()}


class Rows:
    """Compressed rows as scipy has them."""

    def __init__(self, parts: list[Tensor], shape: tuple[int, int]) -> None:
        self.indptr = torch.cat(
            [torch.zeros(1, dtype=torch.int64), torch.cat([part.crow_indices().diff() for part in parts]).cumsum(0)]
        ).numpy()
        self.indices = torch.cat([part.col_indices().int() for part in parts]).numpy()
        self.data = torch.cat([part.values() for part in parts]).numpy()
        self.shape = shape


def draw_rows(n: int, n_latents: int) -> Rows:
    sizes = [min(512, n - start) for start in range(0, n, 512)]
    return Rows([draw_acts(size, n_latents, DENSITY).to_sparse_csr() for size in sizes], (n, n_latents))


def memory_of_the_stage() -> list[Row]:
    peaks = {}
    for n in (SMALL, LARGE):
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), n)
            told = in_a_process("stage", folder)
        peaks[n] = told["peak"]
        print(f"evaluate {n} images: {told['seconds']:.1f} s, {told['peak']:.0f} MB", flush=True)
    cells = f"{GRID[0] * GRID[1]} patches x {D_SAE:,} latents, two judges"
    return [
        Row(f"stage evaluate, {SMALL:,} images x {cells}: peak memory", peaks[SMALL], "MB", better="lower"),
        Row(f"stage evaluate, {LARGE:,} images: peak memory", peaks[LARGE], "MB", better="lower"),
        Row(f"that of {LARGE:,} images over that of {SMALL:,}", peaks[LARGE] / peaks[SMALL], "x", must=1.25, goal=1.1, better="lower"),
    ]


def write_inputs(folder: Path, n: int) -> None:
    """Images without pictures, activations, and an SAE of random directions."""
    from ommatid import schemas, store
    from ommatid.reader import load_sample
    from ommatid.sae.model import SAEConfig, make_untrained
    from ommatid.store import part_name
    from ommatid.tensors import to_binary

    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(10, D_MODEL, generator=generator)

    def draw(n_images: int) -> tuple[Tensor, Tensor]:
        """Tokens (n_images, tokens, d_model), and the images' classes."""
        of = torch.randint(10, (n_images,), generator=generator)
        return directions[of][:, None] + torch.randn(n_images, GRID[0] * GRID[1], D_MODEL, generator=generator), of

    def tokens(numbers: Tensor, x: Tensor) -> pa.Table:
        per_image = x.shape[1]
        place = np.tile(np.arange(per_image), len(x))
        columns = {"image": pa.array(numbers.repeat_interleave(per_image).numpy(), pa.int32()), "token": pa.array(place, pa.int32())}
        columns |= {"kind": pa.array(["patch"] * len(place)), "row": pa.array(place // GRID[1], pa.int16())}
        columns |= {"col": pa.array(place % GRID[1], pa.int16()), "x": to_binary(x.flatten(0, 1), torch.float16)}
        return pa.table(columns, schema=schemas.activations(D_MODEL, {}))

    widths = (384, 768)
    with store.open_draft(folder / "images", "images", {}, {}) as draft:
        labels = pa.array([f"class {i % 10}" for i in range(n)])
        columns = {"image": pa.array(range(n), pa.int32()), "image_id": [sha256(b"%d" % i).hexdigest() for i in range(n)]}
        draft.write_table("images.parquet", pa.table({**columns, "split": ["eval"] * n, "label": labels}))
        draft.seal({"n_eval": n})
        images = draft.publish(folder / "images")
    with store.open_draft(folder / "activations", "activations", {}, {"images": images}) as draft:
        for i, numbers in enumerate(torch.arange(n).split(IMAGES_PER_PART)):
            x, of = draw(len(numbers))
            draft.write_table(part_name("eval", i), tokens(numbers, x))
            vectors = [
                torch.nn.functional.normalize(torch.randn(len(numbers), w, generator=generator) + of[:, None] % 3) for w in (8, *widths)
            ]
            columns = [pa.array(numbers.numpy(), pa.int32()), *(to_binary(vector, torch.float32) for vector in vectors)]
            draft.write_table(part_name("embeddings", i), pa.table(columns, schema=schemas.embeddings(8, *widths)))
        draft.write_table("train.parquet", tokens(torch.arange(500), draw(500)[0]))
        judges = [{"judge": f"drawn {width}", "d_judge": width, "failed": 0} for width in widths]
        per_image = GRID[0] * GRID[1]
        draft.seal(
            {"judges": judges, "grid": list(GRID), "tokens_per_image": per_image, "hookpoint": "drawn", "window": 1, "judge": "drawn"}
        )
        activations = draft.publish(folder / "activations")
    with store.open_draft(folder / "sae", "sae", {}, {"extract": activations}) as draft:
        sae = make_untrained(SAEConfig("random", D_MODEL, D_SAE, K, "drawn", "drawn"), load_sample(activations, 4096), seed=0)
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as config:
            sae.save(weights, config)
        draft.seal({"sae": "random", "dead_latents": []})
        draft.publish(folder / "sae")


def run_stage(folder: Path) -> dict[str, float]:
    from ommatid import store
    from ommatid.config import load_params
    from ommatid.evaluate import evaluate

    params = load_params(Path(__file__).parent.parent / "params.yaml").evaluate
    kinds = {"images": "images", "extract": "activations", "train": "sae"}
    inputs = {
        name: store.open_artefact(folder / {"extract": "activations", "train": "sae"}.get(name, name), kind) for name, kind in kinds.items()
    }
    with store.open_draft(folder / "evaluation", "evaluation", params.identity(), inputs) as draft:
        seconds, _ = clock(lambda: evaluate(params, inputs, draft))
    return {"seconds": seconds, "peak": peak()}


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(arguments[:2]), told, flush=True)
    return told


def peak() -> float:
    """MB of this process alone (ru_maxrss is inherited)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    torch.set_num_threads(THREADS)
    match sys.argv[1:]:
        case ["full", what]:
            print(json.dumps(run_full(what)))
        case ["stage", folder]:
            print(json.dumps(run_stage(Path(folder))))
        case _:
            rows, difference = against_the_loop()
            rows += at_full_size() + memory_of_the_stage()
            notes = [
                f"{THREADS} threads; against the loop {N_LATENTS:,} latents and a judge {WIDTH} wide",
                f"SAE latents fire on {DENSITY:.0%} of images",
                f"largest difference to the loop, which is in float32: {difference:.1g}",
            ]
            publish("evaluate", rows, ["ommatid", "torch", "numpy", "duckdb"], notes)


if __name__ == "__main__":
    main()
