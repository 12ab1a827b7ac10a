"""A small study for tests of pages: drawn figures go through all stages by the command line, and every text in it is hostile to pages.

Two SAEs are trained side by side. Class names, captions, file names, words and people's labels hold markup, quotes, line breaks, templates,
right-to-left text and 10,000 characters.
"""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import filelock
import yaml
from PIL import Image

from ommatid.config import STAGE_NAMES
from ommatid.images.figure import BACKGROUNDS, COLOURS, SHAPES, TEMPERATURES, draw, make_figure
from support.processes import TESTS
from support.study import make_test_params

MARKUP = """<script>alert("planted")</script><img src=x onerror='alert(1)'>&lt;b&gt;</td></textarea>"""
QUOTES = """'single' "double" `back` \\ -- ; DROP TABLE features; /* {{ 7*7 }} {% raw %} ${7*7} %s %27"""
LINES = "two\nlines,\r\nand a\ttab\u2028or two"
RIGHT_TO_LEFT = "\u202eשלום\u202c עולם مرحبا \u200f!"
LONG = ("longest " * 1250)[:-1] + "!"
HOSTILE = {"markup": MARKUP, "quotes": QUOTES, "lines": LINES, "right to left": RIGHT_TO_LEFT, "long": LONG}
"""Hostile texts by what is hostile about them."""
FILE_NAMES = (MARKUP.replace("/", "\\"), QUOTES.replace("/", "|"), LINES, RIGHT_TO_LEFT, "/".join(["long" * 60] * 5), "etc%2f..%2fpasswd")
"""Names of the first files, without their suffix; Linux allows 255 bytes a part, and 4,096 in all."""

N_IMAGES = 240
SIDE = 64
NAMES = ("batch_topk-48-k2-s0", "batch_topk-32-k2-s1")
"""Names of the two SAEs in their training."""


@dataclass(frozen=True)
class Study:
    """A study whose stages have all run."""

    root: Path
    """Folder with params.yaml and data."""

    @property
    def data(self) -> Path:
        """Root of the artefacts."""
        return self.root / "data"

    @property
    def catalog(self) -> Path:
        """File of the catalogue."""
        return self.data / "catalog" / "catalog.duckdb"

    def copy(self, root: Path) -> "Study":
        """Copy the study, for a test that changes it."""
        shutil.copytree(self.root, root)
        return Study(root)


def make_once(folder: Path) -> Study:
    """Make the study in a folder unless it is there; processes that ask at the same time wait for the one that makes it."""
    done = folder / "done"
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_sources(folder)
            run_stages(folder)
            done.touch()
    return Study(folder)


def run_stages(root: Path, *names: str) -> None:
    """Run stages, or all, by the command line, in one process of their own."""
    verbs = names or ("sources", *STAGE_NAMES)
    script = f"from support.study import run_verb; exit(any(map(run_verb, {verbs})))"  # stops at the first that fails
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, text=True, capture_output=True)
    assert ran.returncode == 0, f"a stage failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"


def write_sources(root: Path) -> None:
    """Write pictures with annotations, a word list, people's labels and params.yaml."""
    _write_pictures(root / "photos")
    words = [*SHAPES, *COLOURS, "stripes", "dots", "horse", "sea"]
    hostile = [f"<b>{word}</b> \"{word}\" '{word}' {{{{ {word} }}}}" for word in words[::3]]
    long = [(f"{word} " * 10_000)[:9_999] for word in words[1::3]]
    (root / "words.txt").write_text("\n".join([*hostile, *long, *(f"\u202e{word}\u202c" for word in words[2::3])]))
    with (root / "labels.csv").open("w", newline="") as file:
        rows = [(sae, latent, label) for sae in NAMES for latent, label in enumerate([*HOSTILE.values(), "circle", "aeroplane"])]
        csv.writer(file).writerows([("sae", "latent", "label"), *rows])
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None, "eval_share": 0.75, "thumbnail": 48},
        extract={"model": {"kind": "lite", "image_size": SIDE}, "judge": {"kind": "lite", "variant": "lite2", "image_size": SIDE}}
        | {"hookpoints": ["blocks.10"]},
        train={"d_sae": 48, "k": 2, "epochs": 8, "batch_size": 64, "lr": 0.005, "max_dead": 1.0, "runs": [{}, {"d_sae": 32, "seed": 1}]},
        evaluate={"n_per_decile": 2, "max_dead": 1.0},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}, {"kind": "human", "path": "labels.csv"}], "min_examples": 2}
        | {"n_examples": 8},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))


def _write_pictures(folder: Path) -> None:
    """Write figures whose class says how bright the ground is and how warm the colour, with annotations; two have no class."""
    classes = dict(zip(product(BACKGROUNDS, TEMPERATURES), ["warm on white", *HOSTILE.values()], strict=True))
    rows = []
    for number in range(N_IMAGES):
        figure = make_figure(3, number)
        name = f"{FILE_NAMES[number] if number < len(FILE_NAMES) else f'{figure.shape}/{number}'}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(figure, SIDE)).save(folder / name)
        label = classes[figure.background, figure.temperature] if number > 1 else ""
        captions = [figure.caption, *HOSTILE.values()][: 1 + number % 7]
        rows += [(name, caption, label, f"{figure.background}/{figure.temperature}") for caption in captions]
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "caption", "label", "taxonomy"), *rows])
