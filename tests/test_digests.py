"""Proves that moving code changes no number: everything the stages write still has the digests recorded in digests.json.

The test runs the whole line on drawn pictures through the command line, in the order of dvc.yaml. Three shorter lines train on
activations from files, train and evaluate a transcoder, and draw the images of a plan. The digests cover the columns of every Parquet
table and of every relation in the catalogue, the tensors and cfg.json of every SAE, and the params and numbers in manifests, quality
reports and data/sources. They leave out prose (the meanings of columns, details, notices, pages), versions, lineage, digests of code, and
checksums that follow from any of these. A failing test names the file or table, and pytest shows which of its columns differ.

This file imports nothing from Ommatid or from the other tests, so it does not have to change when they move.

The last bits of a float depend on the processor's instruction sets and on the number of threads. The stages therefore run on a single
processor, with every library restricted to instructions that all x86-64 processors share (see `pin_environment` and `RUN_VERBS`). On
any other kind of machine the recorded digests cannot hold, so the test compares two runs of the lines with each other instead.

`python tests/test_digests.py` records the digests anew. That is legitimate only when numbers, columns or params are meant to change, or
when a new version of a dependency computes differently, and the commit message should say which. It is never the way to make a change
pass that was only meant to move code.
"""

import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import yaml
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

RECORDED = Path(__file__).with_name("digests.json")
IS_RECORDED_HERE = sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether this is the kind of machine on which the recorded digests hold."""

Digests = dict[str, dict[str, Any]]
"""For each file or table, the digests of its columns, tensors or values by name."""

COLOURS = {"lifeboat": (230, 60, 60), "lampshade": (60, 200, 60), "padlock": (60, 60, 230)}
"""The colour of each class. The built-in network tends to see these objects in such tiles, so zero-shot accuracy is above chance."""
N_PHOTOS = 152
LITE0, LITE2 = ({"kind": "lite", "variant": variant, "image_size": 64} for variant in ("lite0", "lite2"))
PARAMS = {
    "images": {
        "source": {"kind": "folder", "path": "photos"},
        "limit": N_PHOTOS + 1,
        "eval_share": 0.5,
        "max_rejected": 0.2,
        "thumbnail": 32,
    },
    "extract": {
        "source": "images",
        "model": LITE0,
        "hookpoints": ["blocks.9", "blocks.10"],
        "tokens": "patch",
        "sample": 14,
        "max_norm": 1.5,
        "judge": [LITE2, LITE2 | {"image_size": 96}],
        "namer": None,
        "batch_size": 16,
        "dtype": "float32",
        "executor": {"kind": "local"},
    },
    "train": {
        "hookpoint": "blocks.10",
        "target": None,
        "variant": {"kind": "batch_topk", "aligned": True},
        "d_sae": 24,
        "k": 3,
        "epochs": 15,
        "batch_size": 64,
        "lr": 0.005,
        "aux_coefficient": 0.03125,
        "ms_weight": 0.0,
        "patience": None,
        "seed": 0,
        "max_dead": 1.0,
        "runs": [
            {"ms_weight": 0.0004},
            {"variant": {"kind": "matryoshka", "aligned": True, "prefixes": [0.25, 0.5, 1.0], "random": True}, "d_sae": 32, "k": 4},
            {"variant": {"kind": "archetypal", "points": 16, "relaxation": 0.1}, "seed": 1},
        ],
        "grid": {},
    },
    "evaluate": {
        "image_activation": "max",
        "n_top": 16,
        "n_per_decile": 2,
        "baselines": ["sparse_neurons", "pca", "kmeans", "nmf"],
        "max_dead": 1.0,
    },
    "label": {
        "labellers": [
            {"kind": "vocabulary", "words": ["words.txt"], "by": "mean"},
            {"kind": "vocabulary", "words": ["words.txt"], "by": "soft_wpmi"},
            {"kind": "human", "path": "labels.csv"},
        ],
        "n_examples": 8,
        "min_examples": 2,
        "seed": 0,
    },
    "intervene": {
        "latents": {"kind": "best", "by": "ms", "n": 4},
        "doses": [0.0, 1.0],
        "n_images": 24,
        "draws": 3,
        "max_drift": 0.2,
        "seed": 0,
    },
    "catalog": {"n_neighbours": 3},
    "retrain": {"min_ms_gain": 0.005, "max_fvu_loss": 0.01, "max_dead_rise": 0.02},
}
FROM_FILES = PARAMS | {
    "extract": {"source": "files", "path": "vectors", "name": "given", "model": "somebody's", "eval_share": 0.2},
    "train": PARAMS["train"]
    | {"hookpoint": None, "epochs": 8, "lr": None, "patience": 20, "runs": []}
    | {"grid": {"variant": ["topk", "relu", "jumprelu", "gated"], "k": [3]}},
}
TRANSCODER = PARAMS | {
    "images": PARAMS["images"] | {"limit": 60},
    "extract": PARAMS["extract"] | {"sample": None, "max_norm": None},
    "train": PARAMS["train"] | {"target": "blocks.9", "variant": {"kind": "topk"}, "runs": []},
}
SHAPES = PARAMS | {"images": PARAMS["images"] | {"source": {"kind": "shapes", "path": "plan.json"}, "limit": 20}}
LINES: Mapping[str, tuple[Mapping[str, Any], Sequence[str]]] = {
    "photos": (PARAMS, ("sources", "images", "extract", "train", "evaluate", "label", "intervene", "catalog")),
    "files": (FROM_FILES, ("sources", "extract", "train")),
    "transcoder": (TRANSCODER, ("images", "extract", "train", "evaluate")),
    "shapes": (SHAPES, ("sources", "images")),
}
"""For each line, its params.yaml and the verbs that run in its folder."""
REJECTING = ("train", "evaluate", "label", "intervene")
"""Verbs to which dvc.yaml passes --allow-rejected."""

# All verbs share one interpreter, because imports take longer than the work itself; runpy runs each verb as `python -m ommatid` does.
# DuckDB starts a thread for each processor it may use, and the order in which threads finish could change the order of a sum.
# torch asks the processor whether it computes in bfloat16, and no environment variable changes the answer, so the question is replaced.
# torch takes square roots with MKL, whose kernel refines the estimate of the instruction rsqrtps; AMD and Intel estimate differently, and
# some roots keep a last bit that is wrong. numpy's are exact everywhere.
RUN_VERBS = """
import os, runpy, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
import torch

torch.cpu.get_capabilities = dict
assert not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT" or sys.argv[1] != "pinned", torch.backends.cpu.get_cpu_capability()

def write_sqrt(x, *, out):
    np.sqrt(x.detach().numpy(), out=out.detach().numpy())
    return out

kernels = torch.library.Library("aten", "IMPL")
kernels.impl("sqrt.out", write_sqrt, "CPU", allow_override=True)
kernels.impl("sqrt_", lambda x: write_sqrt(x, out=x), "CPU", allow_override=True)
kernels.impl("sqrt", lambda x: write_sqrt(x, out=torch.empty_like(x)), "CPU", allow_override=True)
roots = np.random.default_rng(0).random(1000)
assert (torch.from_numpy(roots).sqrt().numpy() == np.sqrt(roots)).all()

for line in sys.argv[2:]:
    folder, _, command = line.partition(": ")
    os.chdir(folder)
    sys.argv = ["ommatid", *command.split()]
    try:
        runpy.run_module("ommatid", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    os.chdir("..")
"""
LEAKING = re.compile("ATEN|CUDA|DNNL|DVC|FBGEMM|HF|KMP|MKL|MLFLOW|NPY|OMMATID|OMP|ONEDNN|OPENBLAS|PREFECT|TORCH|TRANSFORMERS")
"""Prefixes of environment variables that could change what the stages compute, or where they report it."""


def pin_environment(root: Path) -> dict[str, str]:
    """The environment of the stages: no settings of the person who runs the tests, one thread, and only instructions every x86-64 has."""
    pinned = {
        "OMMATID_CACHE": str(root / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels
        "MKL_CBWR": "COMPATIBLE",  # matrix products and decompositions in torch
        "ONEDNN_MAX_CPU_ISA": "SSE41",  # convolutions
        "FBGEMM_NO_ASMJIT": "1",  # embedding_bag
        "FBGEMM_NO_AUTOVEC": "1",
        "OPENBLAS_CORETYPE": "Nehalem",  # matrix products and decompositions in numpy and scipy
        "NPY_DISABLE_CPU_FEATURES": " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name]),
        "ARROW_USER_SIMD_LEVEL": "NONE",
        # exp, log, sin and pow in the C library; glibc before 2.33 spells the names with _Usable
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps="
        + ",".join(f"-{name},-{name}_Usable" for name in ("AVX", "AVX2", "FMA", "FMA4", "AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ")),
    }
    return {name: value for name, value in os.environ.items() if not LEAKING.match(name)} | pinned


def run_lines(root: Path) -> Digests:
    """Write the sources, run every verb of every line, and digest the artefacts."""
    for line, (params, _) in LINES.items():
        (root / line).mkdir()
        (root / line / "params.yaml").write_text(yaml.safe_dump(params))
    for line in ("photos", "transcoder"):
        write_photos(root / line)
    write_vectors(root / "files" / "vectors")
    (root / "shapes" / "plan.json").write_text(json.dumps({"n_images": 24, "size": 32, "seed": 0}))
    commands = [f"{line}: {verb}{' --allow-rejected' * (verb in REJECTING)}" for line, (_, verbs) in LINES.items() for verb in verbs]
    which = "pinned" if IS_RECORDED_HERE else "unpinned"
    ran = subprocess.run(
        [sys.executable, "-c", RUN_VERBS, which, *commands], cwd=root, env=pin_environment(root), text=True, capture_output=True
    )
    assert ran.returncode == 0, f"a stage ended with {ran.returncode}:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return {f"{line}/{name}": found for line in LINES for name, found in digest_data(root / line / "data")}


# the sources


def write_photos(folder: Path) -> None:
    """Write pictures of coloured tiles, with captions and a taxonomy, a duplicate, a file that is not a picture, a word list and labels."""
    rng = np.random.default_rng(0)
    rows = ["path,caption,taxonomy"]
    for i in range(N_PHOTOS):
        name = list(COLOURS)[i % 3]
        tiles = np.full((16, 3), 128)
        tiles[rng.permutation(16)[: rng.integers(2, 9)]] = COLOURS[name]
        pixels = tiles.reshape(4, 4, 3).repeat(16, axis=0).repeat(16, axis=1)
        if i % 2:
            pixels[::4] //= 2
        pixels += rng.integers(-9, 10, pixels.shape)
        path = folder / "photos" / name / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels.clip(0, 255).astype(np.uint8)))
        pattern = ("plain", "striped")[i % 2]
        captions = ("", f"a {name}", f"{pattern} tiles")[: 1 + i % 3]
        rows += [f"{name}/{path.name},{caption},pattern/{pattern}/{name}" for caption in captions[-2:]]
    (folder / "photos" / name / "copy.png").write_bytes(path.read_bytes())
    (folder / "photos" / name / "notes.txt").write_text("not a picture")
    (folder / "photos" / "captions.csv").write_text("\n".join(rows))
    (folder / "words.txt").write_text("lifeboat\nlampshade\npadlock\nred\ngreen\nblue\nstripes\n")
    (folder / "labels.csv").write_text(
        "sae,latent,label\nbatch_topk-24-k3-s0,1,red\nbatch_topk-24-k3-s0,5,blue tiles\nmatryoshka-32-k4-s0,2,grey\n"
    )


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a PNG without compression: compressed bytes depend on the version of zlib, and an image's id and split depend on the bytes."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF) + lines + struct.pack(">I", zlib.adler32(lines))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", stored), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def write_vectors(folder: Path) -> None:
    """Write sparse sums of 20 directions as activations of 600 images with 4 tokens each, in two files."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    directions = rng.integers(-50, 51, (20, 12))
    for name in ("a", "b"):
        weights = rng.integers(0, 9, (300, 4, 20)) * (rng.integers(0, 8, (300, 4, 20)) == 0)
        np.save(folder / f"{name}.npy", ((weights @ directions + rng.integers(-9, 10, (300, 4, 12))) / 64).astype(np.float16))


# the digests


def digest_data(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every table and every other file below `data` that holds numbers, with its digests."""
    files = sorted(path for path in data.rglob("*") if path.is_file() and not path.is_relative_to(data / ".work"))
    tables: dict[str, list[Path]] = {}
    for path in files:
        name = path.relative_to(data).as_posix()
        match path.suffix:
            case ".parquet":
                tables.setdefault(re.sub(r"(-\d{5})?\.parquet$", "", name), []).append(path)
            case ".safetensors":
                yield name, digest_tensors(path)
            case ".duckdb":
                yield from ((f"{name.removesuffix('.duckdb')}.{relation}", found) for relation, found in digest_relations(path))
            case ".json" if name.startswith("quality/"):
                yield name, digest_report(json.loads(path.read_text()))
            case ".json" if path.name == "manifest.json":
                yield name, digest_manifest(json.loads(path.read_text()))
            case ".json":
                yield name, {key: digest(value) for key, value in json.loads(path.read_text()).items() if key != "code"}
            case _:
                assert path.suffix in (".html", ".png"), f"{path}: no digest is defined for this kind of file"
    for name, parts in tables.items():
        yield name, digest_table(parts)


LEFT_OUT = {"detail", "created_at", "git_commit", "git_dirty", "dvc_experiment", "dvc_lock", "mlflow_run_id", "prefect_flow_run_id"}
LEFT_OUT |= {"images_digest", "activations_digest", "sae_digest"}
"""Columns whose values are left out: they hold prose, or lineage that differs between runs or follows from versions."""


def digest_table(parts: Sequence[Path]) -> dict[str, Any]:
    """The digests of a Parquet table's columns, with its rows in stored order."""
    read = [pq.read_table(part, partitioning=None) for part in parts]  # pyright: ignore[reportArgumentType] None is allowed
    table = pa.concat_tables(part.replace_schema_metadata() for part in read)
    types = {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in table.schema}
    return describe_columns(types, table.to_pydict(), table.num_rows)


def digest_relations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every relation of the catalogue with the digests of its columns, its rows ordered by all columns."""
    with duckdb.connect(path, read_only=True) as connection:
        columns: dict[str, dict[str, str]] = {}
        for relation, column, type_, nullable in connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
        ).fetchall():
            columns.setdefault(relation, {})[column] = f"{type_}{'' if nullable else ' not null'}"
        for relation in columns:
            rows = connection.sql(f"SELECT * FROM {relation} ORDER BY ALL").to_arrow_table()
            types = {name: columns[relation][name] for name in rows.column_names}
            yield relation, describe_columns(types, rows.to_pydict(), rows.num_rows)


def describe_columns(types: Mapping[str, str], values: Mapping[str, Sequence[Any]], n_rows: int) -> dict[str, Any]:
    """The number of rows, the order of the columns, and the type of each column with the digest of its values."""
    columns = {name: type_ if name in LEFT_OUT else f"{type_} {digest(values[name])}" for name, type_ in types.items()}
    return {"(rows)": n_rows, "(columns)": " ".join(types), **columns}


def digest_tensors(path: Path) -> dict[str, Any]:
    """The type, the shape and the digest of the bytes of every tensor in a safetensors file."""
    tensors = safetensors.deserialize(path.read_bytes())
    return {name: f"{tensor['dtype']} {tensor['shape']} {digest(bytes(tensor['data']))}" for name, tensor in tensors}


def digest_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The digests of a manifest without versions and checksums: a file's checksum changes when prose in its metadata does."""
    inputs, files = sorted(manifest["inputs"]), [(file["name"], file["rows"]) for file in manifest["files"]]
    summary = {f"summary.{name}": digest(value) for name, value in manifest["summary"].items()}
    params = {f"params.{name}": digest(value) for name, value in manifest["params"].items()}
    return (
        {"kind": manifest["kind"], "schema_version": manifest["schema_version"], "inputs": inputs, "files": digest(files)}
        | params
        | summary
    )


def digest_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a quality report, without the sentences about each check."""
    return {name: digest(value) if name == "summary" else value for name, value in report.items() if name != "checks"}


def digest(value: Any) -> str:
    """A short checksum of Python values, with floats exact to the last bit."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=in_json).encode()).hexdigest()[:16]


def in_json(value: Any) -> str:
    """A string for a value that JSON cannot hold."""
    return value.hex() if isinstance(value, bytes) else str(value)


# the tests

EXPECTED: Digests = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Digests:
    """The digests of one run of all lines."""
    return run_lines(tmp_path_factory.mktemp("lines"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Digests:
    """The recorded digests, or, on a machine where they cannot hold, those of a second run."""
    return EXPECTED if IS_RECORDED_HERE else run_lines(tmp_path_factory.mktemp("again"))


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_stage_writes_has_not_changed(name: str, found: Digests, expected: Digests) -> None:
    assert name in found, f"{name} is recorded but was not written"
    assert found[name] == expected[name]


def test_everything_written_has_a_recorded_digest(found: Digests) -> None:
    assert sorted(found) == sorted(EXPECTED)


def record() -> None:
    """Write digests.json. The docstring at the top of this file says when to."""
    if not IS_RECORDED_HERE:
        sys.exit("digests hold on Linux on x86-64 only; record them there")
    with tempfile.TemporaryDirectory() as root:
        RECORDED.write_text(json.dumps(run_lines(Path(root)), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
