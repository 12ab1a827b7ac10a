"""Compares the stage `images` on full-size photographs with decoding them in a bare loop on all cores, interleaved in one run.

python benchmarks/images.py [images]     prints a table; takes 5 minutes on 2 cores, and 8 GB of disk, with 1,000 photographs
The photographs are pictures of CIFAR-10 enlarged to 12 megapixels, with grain, as JPEG files of about 3.5 MB. The bare loop reads each file
and decodes it whole with Pillow in as many threads as there are cores. The stage reads, hashes and decodes each file, makes its thumbnail,
and writes the artefact with the files' bytes.
"""

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from report import Row, middle, show

from ommatid import store
from ommatid.config import Cifar10Source, ImagesParams
from ommatid.images.cifar10 import open_source
from ommatid.images.source import spread
from ommatid.images.stage import run as make_images

CHECKOUT = Path(__file__).parent.parent
N_DIFFERENT = 40
"""Number of different pictures. The other files have the same pixels and another comment, so they differ for the stage."""
SIZE = (4000, 3000)
ROUNDS = 3


def make_photographs(folder: Path, n: int) -> None:
    """Write `n` photographs of 12 megapixels into a folder."""
    source = open_source(Cifar10Source(kind="cifar10", path=str(CHECKOUT / "data/cifar10.json")))
    pictures = [photograph(item.read(), seed) for seed, item in enumerate(source.iter_items(spread(source.total, min(n, N_DIFFERENT))))]
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:05d}.jpg").write_bytes(with_comment(pictures[i % len(pictures)], f"photograph {i}"))


def photograph(small: bytes, seed: int) -> bytes:
    """Enlarge a picture, add grain, and return it as JPEG of the quality that cameras use."""
    with Image.open(io.BytesIO(small)) as image:
        levels = np.asarray(image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    levels += np.random.default_rng(seed).normal(0, 6, (SIZE[1], SIZE[0], 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Insert a comment after the marker with which a JPEG file begins."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text.encode() + jpeg[2:]


def decode(path: Path) -> None:
    Image.open(io.BytesIO(path.read_bytes()), formats=("JPEG",)).load()


def bare(folder: Path) -> None:
    """Read and decode all files of a folder on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, sorted(folder.iterdir())))


def stage(folder: Path, place: Path, cache: Path) -> None:
    """Run the stage on a folder, with its own cache folder."""
    os.environ["OMMATID_CACHE"] = str(cache)
    source = {"kind": "folder", "path": str(folder)}
    params = ImagesParams.model_validate({"source": source, "limit": None, "eval_share": 0.3, "max_rejected": 0.1, "thumbnail": 96})
    with store.open_draft(place, "images", params.identity(), {}) as draft:
        make_images(params, {}, draft)
        draft.publish(place)


def rate(n: int, work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return n / (time.perf_counter() - start)


def measure(n: int, rounds: int = ROUNDS) -> list[Row]:
    """Return the rows of the benchmark for `n` photographs."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"), prefix="images-") as name:
        root = Path(name)
        make_photographs(root / "photos", n)
        bare(root / "photos")  # so that the files are in the page cache of both
        loops, stages = [], []
        for _ in range(rounds):
            for made in ("artefact", "cache"):
                shutil.rmtree(root / made, ignore_errors=True)
            loops.append(rate(n, lambda: bare(root / "photos")))
            stages.append(rate(n, lambda: stage(root / "photos", root / "artefact", root / "cache")))
        more = root / "photos" / "more"
        more.mkdir()
        for i, path in enumerate(sorted((root / "photos").glob("*.jpg"))[: max(1, n // 100)]):
            (more / path.name).write_bytes(with_comment(path.read_bytes(), f"one more {i}"))
        time.sleep(2.1)  # until the files are old enough to be remembered
        again = rate(n, lambda: stage(root / "photos", root / "artefact", root / "cache"))
    return [
        Row(f"{n:,} photographs of 12 megapixels: decoded in a bare loop", middle(loops), "images/s"),
        Row(f"{n:,} photographs: stage images from scratch", middle(stages), "images/s"),
        Row("stage images / bare loop", middle(stages) / middle(loops), "ratio", 0.8, 0.95),
        Row("stage images after 1 % more photographs", again, "images/s"),
    ]


def main() -> None:
    show(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))


if __name__ == "__main__":
    main()
