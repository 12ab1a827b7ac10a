"""Compares extraction and its store with a bare forward loop, memmaps and the writers of other projects, interleaved in one run.

python benchmarks/extract.py [images]     writes benchmarks/results/extract.json; takes 15 minutes with 10,000 images
The bare loop runs the networks of the stage (model and judge) on tensors already in memory, in the same batches and arithmetic. Of
the peers, `pt` writes each batch to its own .pt file, as the scripts of sae-for-vlm do, and `saev` writes a float32 memmap (images,
layers, tokens, d_model), as the ShardWriter of saev 0.1.0 does (its package needs torchvision, which cannot be imported here).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does (ommatid.executors.workers.OPENMP_SETTINGS)
os.environ["OMMATID_CACHE_GB"] = "0"  # every round computes everything

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from report import Row, middle, publish
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ommatid import store
from ommatid.activations.batches import iter_batches
from ommatid.activations.columns import from_float16
from ommatid.config import ExtractParams, Params, load_params
from ommatid.extract.networks import Networks
from ommatid.extract.stage import extract
from ommatid.images.loader import Encoded, Pixels, iter_pixels, make_pool
from ommatid.images.stage import run as make_images
from ommatid.store import Artefact

CHECKOUT = Path(__file__).parent.parent
ROUNDS = 3
TOKENS = 2048
"""Number of tokens in a training batch."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """A folder to work in, with an artefact of images."""

    def __init__(self, root: Path, n_images: int) -> None:
        self.root = root
        self.params: Params = load_params(CHECKOUT / "params.yaml", [f"images.limit={n_images}"])
        with store.open_draft(root / "images", "images", self.params.images.identity(), {}) as draft:
            make_images(self.params.images, {}, draft)
            self.images = draft.publish(root / "images")
        self.n_images = n_images

    def section(self, **changes: object) -> ExtractParams:
        return ExtractParams.model_validate(self.params.extract.model_dump(mode="json") | changes)

    def stage(self, section: ExtractParams, place: str = "activations") -> Artefact:
        """Run the stage, loading the models again, and return the activations of the first hookpoint."""
        with store.open_draft(self.root / place, "extraction", section.identity(), {"images": self.images}) as draft:
            extract(section, {"images": self.images}, draft)
            return draft.publish(self.root / place).child(section.hookpoints[0], "activations")

    def iter_pixels(self, towers: Networks, batch_size: int) -> Iterator[Pixels]:
        """Iterate over the images in order, preprocessed by the stage's own loader."""
        batches = self.images.iter_batches("images", ["image", "encoded"], n_rows=batch_size)
        with make_pool(towers.device) as pool:
            encoded = (Encoded(rows["image"].to_numpy(), np.ones(len(rows), dtype=bool), rows["encoded"].to_pylist()) for rows in batches)
            yield from iter_pixels(encoded, towers.preprocesses, pool, towers.device)


def make_clip(folder: Path) -> Path:
    """Save a model shaped as openai/clip-vit-base-patch32, with random weights and a tokenizer of 54 tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    text = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text)).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def throughput(bench: Bench, name: str, section: ExtractParams, rounds: int) -> list[Row]:
    """Measure the stage, the bare loop and the peers' writers in turn."""
    towers = Networks(section)
    held = list(islice(bench.iter_pixels(towers, section.batch_size), 32))
    n_held = sum(len(batch.numbers) for batch in held)

    def bare() -> None:
        for batch in held:
            towers.run(batch.of)

    def peer(write: Callable[[int, np.ndarray, int], None]) -> Callable[[], None]:
        """Decode in threads, run the networks and write; don't shuffle, compute checksums or keep the judge's embeddings."""

        def work() -> None:
            done = 0
            for index, batch in enumerate(islice(bench.iter_pixels(towers, section.batch_size), len(held))):
                (tokens,) = towers.run(batch.of).tokens.values()
                write(index, tokens.numpy(), done)
                done += len(tokens)

        return work

    rates: dict[str, list[float]] = {"bare": [], "stage": [], "pt": [], "saev": []}
    bare()
    for _ in range(rounds):
        rates["bare"].append(n_held / seconds(bare))
        rates["stage"].append(bench.n_images / seconds(lambda: bench.stage(section)))
        rates["bare"].append(n_held / seconds(bare))
        rates["pt"].append(n_held / seconds(peer(pt_writer(bench.root / "pt"))))
        rates["saev"].append(n_held / seconds(peer(saev_writer(bench.root / "saev", n_held))))
    bare_rate, stage_rate = middle(rates["bare"]), middle(rates["stage"])
    rows = [
        Row(f"{name}: bare forward loop of model and judge", bare_rate, "images/s"),
        Row(f"{name}: whole stage, encoded images to Parquet", stage_rate, "images/s"),
        Row(f"{name}: stage / bare loop", stage_rate / bare_rate, "ratio", 0.85, 0.95),
    ]
    for key, what in (("pt", "a .pt file a batch"), ("saev", "float32 memmap as saev's ShardWriter")):
        rows.append(Row(f"{name}: stage / loop that writes {what}", stage_rate / middle(rates[key]), "ratio"))
    return rows


def pt_writer(folder: Path) -> Callable[[int, np.ndarray, int], None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return lambda index, tokens, done: torch.save(torch.from_numpy(tokens), folder / f"part_{index}.pt")


def saev_writer(folder: Path, n_images: int) -> Callable[[int, np.ndarray, int], None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    opened: list[np.memmap] = []

    def write(index: int, tokens: np.ndarray, done: int) -> None:
        if not opened:
            shape = (n_images, 1, *tokens.shape[1:])
            opened.append(np.memmap(folder / "acts000000.bin", mode="w+", dtype=np.float32, shape=shape))
        opened[0][done : done + len(tokens), 0] = tokens
        if done + len(tokens) == n_images:
            opened[0].flush()

    return write


def precision(bench: Bench, name: str, section: ExtractParams, rounding: float) -> list[Row]:
    """Measure the speedup of dtype `auto` over float32, and the difference in the activations."""
    found = Networks(section)
    exact = Networks(section.model_copy(update={"dtype": "float32"}))
    held = list(islice(bench.iter_pixels(found, section.batch_size), 4))
    times: dict[str, list[float]] = {"auto": [], "float32": []}
    for _ in range(ROUNDS):
        for key, towers in (("auto", found), ("float32", exact)):
            times[key].append(seconds(lambda towers=towers: [towers.run(batch.of) for batch in held]))
    gain = middle(times["float32"]) / middle(times["auto"])
    return [
        Row(f"{name}: dtype auto / float32, forward passes", gain, "ratio"),
        Row(f"{name}: difference of the activations from float32", rounding, "of their norm"),
    ]


def reading(bench: Bench, name: str, activations: Artefact) -> list[Row]:
    """Measure reading shuffled batches from the store, from memmaps of the same data, and from list<float> Parquet."""
    x = np.concatenate([from_float16(part["x"]).numpy() for part in activations.iter_parts("train", ["x"])])
    np.save(bench.root / "x.npy", x)
    lists = pa.table(
        {"x": pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), x.shape[1]).cast(pa.list_(pa.float32()))}
    )
    pq.write_table(lists, bench.root / "lists.parquet", compression="none", row_group_size=16384)
    n_batches, gigabytes = len(x) // TOKENS, x.nbytes / 1e9
    del lists, x

    def store_() -> None:
        for batch in islice(iter_batches(activations, TOKENS, seed=0), n_batches):
            assert len(batch.x) == TOKENS

    def memmap() -> None:
        rows = np.load(bench.root / "x.npy", mmap_mode="r")
        order = np.random.default_rng(0).permutation(len(rows))
        for i in range(n_batches):
            torch.from_numpy(rows[order[i * TOKENS : (i + 1) * TOKENS]])

    def sequential() -> None:
        rows = np.load(bench.root / "x.npy", mmap_mode="r")
        for i in range(n_batches):
            torch.from_numpy(np.array(rows[i * TOKENS : (i + 1) * TOKENS]))

    def lists_() -> None:
        with pq.ParquetFile(bench.root / "lists.parquet") as file:
            for batch in file.iter_batches(TOKENS):
                values = batch["x"].flatten().to_numpy().reshape(batch.num_rows, -1)
                torch.from_numpy(values[np.random.default_rng(0).permutation(len(values))])

    ways = {"store": store_, "memmap": memmap, "sequential": sequential, "lists": lists_}
    times: dict[str, list[float]] = {key: [] for key in ways}
    for _ in range(2 * ROUNDS + 1):
        for key, work in ways.items():
            times[key].append(seconds(work))
    rates = {key: gigabytes / middle(values) for key, values in times.items()}
    return [
        Row(f"{name}: reading shuffled batches of {TOKENS} tokens from the store", rates["store"], "GB/s of fp16"),
        Row(f"{name}: reading / numpy memmap, rows in random order", rates["store"] / rates["memmap"], "ratio", 0.6, 0.85),
        Row(f"{name}: reading / numpy memmap, in the order of the file (not shuffled)", rates["store"] / rates["sequential"], "ratio"),
        Row(f"{name}: reading / list<float> Parquet", rates["store"] / rates["lists"], "ratio", 5, 8),
    ]


MEASURE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from extract import Bench
from ommatid.config import ExtractParams
from ommatid.extract.networks import Networks
bench = Bench.__new__(Bench)
bench.root = Path(sys.argv[2])
section = ExtractParams.model_validate_json(sys.argv[4])
from ommatid import store
bench.images = store.open_artefact(Path(sys.argv[3]), "images")
before = Networks(section)
del before
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bench.stage(section)
print(loaded / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(bench: Bench, name: str, section: ExtractParams, n_images: int) -> list[Row]:
    """Measure the peak memory of processes that extract a fifth of the images and all of them."""
    found = {}
    for n in (n_images // 5, n_images):
        with tempfile.TemporaryDirectory(dir=bench.root) as folder:
            smaller = Bench(Path(folder), n)
            arguments = [str(CHECKOUT / "benchmarks"), folder, str(smaller.images.path), section.model_dump_json()]
            answer = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
            found[n] = [float(value) for value in answer.stdout.split()]
    (small, large) = found.values()
    return [
        Row(f"{name}: peak memory beyond libraries and models", large[1] - large[0], "MB", 2000, None, "lower"),
        Row(f"{name}: peak memory with {n_images} images / with a fifth of them", large[1] / small[1], "ratio", 1.15, 1.05, "lower"),
    ]


def print_rows(rows: list[Row]) -> list[Row]:
    """Print rows as soon as they are measured, as the whole benchmark takes a while."""
    for row in rows:
        print(f"{row.what}: {row.value:.3g} {row.unit}", flush=True)
    return rows


def main() -> None:
    n_images = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        bench = Bench(Path(name), n_images)
        clip = str(make_clip(Path(name) / "clip"))
        sections = {
            "lite0": (bench.section(), ROUNDS),
            "CLIP ViT-B/32": (bench.section(model={"kind": "clip", "path": clip}, hookpoints=["vision.blocks.10"], tokens="all"), 1),
        }
        rows: list[Row] = []
        for what, (section, rounds) in sections.items():
            rows += print_rows(throughput(bench, what, section, rounds))
            activations = store.open_artefact(bench.root / "activations" / section.hookpoints[0], "activations")
            rows += print_rows(precision(bench, what, section, activations.summary["rounding"]))
            rows += print_rows(reading(bench, what, activations))
            rows += print_rows(memory(bench, what, section, n_images if rounds > 1 else n_images // 3))
    notes = [
        f"{n_images} CIFAR-10 images (PNG, 32 pixels a side), judge lite2@128; CLIP has random weights",
        "peers' loops decode in the same threads and run the same networks; they write only activations, unshuffled, without checksums",
    ]
    publish("extract", rows, ["ommatid", "torch", "transformers", "numpy", "pyarrow", "pillow"], notes)


if __name__ == "__main__":
    main()
