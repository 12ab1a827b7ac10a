"""Writes docs/developers/artefacts.md from the schemas and summaries; `make docs` runs it, and a test fails if the page is out of date."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow as pa

from ommatid import schemas
from ommatid.summaries import SUMMARIES

PAGE = Path(__file__).with_name("artefacts.md")

HEAD = """# Artefacts

An artefact is a directory `data/<artefact>` written by one stage: a `manifest.json` and Parquet tables, never pickle. A table is
a single file, `<table>.parquet`, or several parts, `<table>-00000.parquet ...`. `--data` replaces `data` by another root: a path
or an object store ([Storage](../users/storage.md)).

## Guarantees for every artefact

- **Complete or absent.** A stage writes to the draft `data/.work/<artefact>-<key>`, whose key is a hash of params, inputs and
  code. Files are written under a temporary name, synced and renamed. The manifest is written last; then the draft passes the gate
  and is moved into place. A killed run resumes from what it finds in the draft.
- **Opening** an artefact compares the manifest with its own checksum, and files and sizes with the manifest. The error names all
  damage at once. The manifest of a child (one SAE, one hookpoint) must be the one that its parent lists.
- **Reading** checks every block that is read. The manifest has the CRC-32 of each block (256 KiB) of each file, and a block is
  compared with it when its bytes are first read in a process, and again if the file changes; blocks that are not read are not
  checked. A difference is an error that names the file, and nothing is computed from the block. Checking takes less than 1 % of a
  stage's CPU time ([results](../results/damage.md)). `Artefact.verify()` reads everything and compares sha256.
- **Files of a stopped run are checked as well**: parts, receipts, chunks, checkpoints and answers that have been damaged are made
  again. `catalog.duckdb` has its own checksums, which DuckDB compares with every block that a query reads.
- **Activations are shuffled as they are written.** Blocks of images are assigned to shards at random (`plan`). Within a shard,
  training rows are in rounds with one token of every image, so that any `window` (in the summary) consecutive rows belong to
  different images. Images with fewer rows (`extract.max_norm`, imports) are spread evenly over the rounds; `window` is then
  approximate. The `train` tables can be read sequentially, and `ommatid train` shuffles them again within windows.

The keys of `manifest.json`:

| key | holds |
|---|---|
| kind, schema_version | kind of artefact; version of its tables |
| params | the stage's section of params.yaml |
| inputs | sha256 of each input's manifest |
| versions | versions of code and libraries |
| summary | statistics that the gate and later stages read |
| files | for each file: name, bytes, sha256, rows, and blocks (CRC-32 of each 256 KiB, eight hex digits each) |
| checksum | sha256 of the text that precedes it |

## Directories

| artefact | stage | holds |
|---|---|---|
| `data/images` | images | tables `images`, `rejected` |
| `data/activations` | extract | table `plan`; a folder for each hookpoint, such as `data/activations/blocks.15`, which is an artefact too |
| `data/activations/<hookpoint>` | extract | tables `train` (shuffled), `eval` (by image within a part), `embeddings`; a part per shard |
| `data/sae` | train | a folder for each SAE, such as `data/sae/batch_topk-1280-k16-s0`, which is an artefact too |
| `data/sae/<sae>` | train | `sae.safetensors`, `cfg.json`, table `curves`; its params are those of this SAE alone |
| `data/evaluation`, `data/labels`, `data/interventions` | evaluate, label, intervene | folders with the same names as in `data/sae` |
| all four | | also SAEs that failed the stage's gate while others passed; `rejected` in the summary has the reasons |
| `data/evaluation` | evaluate | tables `matches`, `stability` for every two of its SAEs; without rows if there is only one |
| `data/evaluation/<sae>` | evaluate | about latents: tables `latents`, `examples`, `near_misses`, `firings`, `cofiring` |
| | | about the whole: tables `comparisons`, `judged`, `fidelity`, `densities`, `levels`, `probes`, `zero_shot` |
| `data/labels/<sae>` | label | tables `labels`, `mistakes` |
| `data/interventions/<sae>` | intervene | tables `interventions`, `effects`, `attributions` |
| `data/catalog` | catalog | `catalog.duckdb`, made from the others |
| `data/published/champions/<champion>/drift` | | tables `known`, `embeddings`, `evaluated`, `fired`: what new images are compared with |
| `data/published/drift/<check>` | | tables `drift_checks`, `drift`, `drift_images`, `compared`: a check of new images |

## Weights

`sae.safetensors` (float32) holds `W_enc` (d_model, d_sae), `b_enc` (d_sae,), `W_dec` (d_sae, d_model) with unit rows, `b_dec`
(d_model,) and `threshold` () or (d_sae,); a gated SAE also has `gate_scale` and `gate_shift` (d_sae,). With them,
`pre_acts = x W_enc + b_enc` and `x_hat = acts W_dec + b_dec`, where x is the unscaled output of the model: the scale used in
training and any bias subtracted before the encoder are folded in. `activation` in cfg.json determines acts from pre_acts:

| activation | acts |
|---|---|
| `threshold` | pre_acts if they exceed the threshold, else 0 |
| `topk` | the k largest positive pre_acts of each token, else 0 |
| `gated` | relu(pre_acts gate_scale + gate_shift) if pre_acts > 0, else 0 |

The `x_hat` of a transcoder has width d_out, and its cfg.json names the `target`. The column `sae` of all tables is the folder's
name followed by the first digits of the weights' checksum.
"""

ARTEFACTS = (
    *("images", "activations", "activations/<hookpoint>", "sae/<sae>", "evaluation/<sae>", "evaluation", "labels/<sae>"),
    *("interventions/<sae>", "published/champions/<champion>/drift", "published/drift/<check>"),
)
"""Artefacts in the order of their sections on the page."""


def iter_tables() -> Iterator[tuple[str, str, pa.Schema]]:
    """Iterate over the tables as (name, artefact, schema); schemas that depend on the model have the widths of the demo."""
    yield "train, eval", "activations/<hookpoint>", schemas.activations(320, {})
    yield "embeddings", "activations/<hookpoint>", schemas.embeddings(384, 1280)
    yield "embeddings", "published/champions/<champion>/drift", schemas.drift_embeddings(1280)
    yield from ((name, table.place, table.schema) for name, table in schemas.TABLES.items() if table.place != "catalog")


def make_page() -> str:
    """Make the page."""
    tables = sorted(iter_tables(), key=lambda table: ARTEFACTS.index(table[1]))
    return HEAD + "".join(_section(*table) for table in tables) + SUMMARY_HEAD + "".join(map(_summary, SUMMARIES))


def _section(name: str, artefact: str, schema: pa.Schema) -> str:
    rows = [f"| {f.name} | {_type(f.type)} | {f.metadata[b'meaning'].decode()} |" for f in schema]
    return f"\n## {name} ({artefact})\n\n| column | type | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


SUMMARY_HEAD = """
## Summaries

The keys of the summary in a manifest depend on the kind of the artefact. A null value means that a number is unknown or undefined.
"""


def _summary(kind: str) -> str:
    declared = SUMMARIES[kind]
    rows = []
    for key, hint in get_type_hints(declared, include_extras=True).items():
        is_optional = key in declared.__optional_keys__
        meaning = (get_args(hint)[0] if is_optional else hint).__metadata__[0]
        rows.append(f"| {key}{' (optional)' if is_optional else ''} | {meaning} |")
    text = " ".join(inspect.getdoc(declared).split("\n"))
    return f"\n## Summary of {kind}\n\n{text}\n\n| key | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"


def _type(type_: pa.DataType) -> str:
    fixed = {640: "2 d_model", 1536: "4 d_joint", 5120: "4 d_judge", 2560: "2 d_judge", 32: "32"}
    return f"fixed binary, {fixed[type_.byte_width]} bytes" if pa.types.is_fixed_size_binary(type_) else str(type_)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
