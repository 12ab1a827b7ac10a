"""From trials to the whole: how much there will be of everything, and what that takes in bytes, seconds and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ommatid import schemas
from ommatid.catalog.stage import WRITER_MB
from ommatid.config import EvaluateParams, ExtractParams, Params
from ommatid.estimate.fit import Cost, Timed, fit
from ommatid.estimate.trials import Tried, trained_tokens
from ommatid.extract.plan import IMAGES_PER_SHARD
from ommatid.extract.rows import BYTES_PER_ROW_GROUP
from ommatid.extract.shard import BYTES_PER_CHUNK, IMAGES_PER_CHUNK
from ommatid.images.dataset import BYTES_PER_PART, ROWS_PER_PART
from ommatid.store import MANIFEST, Artefact
from ommatid.train.stage import SAMPLE

CHUNK_COPIES = 4
"""Of a chunk of activations in memory: its batches, joined, in their order, and the chunk before on its way to the disk."""
GROUP_COPIES = 6
"""Of a row group of training tokens while it is put in order: read, joined, taken, as a table, in the writer, on its way out."""
QUEUE_COPIES = 2
"""Of a row group of training tokens in training: most of the queue is gone when its gate needs most."""
PART_COPIES = 2
"""Of a part of images: rows and a table; the files themselves are not copied."""
HEAT_COPIES = 3
"""Of the heat maps: collected, in order, a table."""
JOINT_COPIES = 3
"""Of the joint embeddings of the evaluation images: read, centred, of unit norm."""
CATALOG_COPIES = 2
"""Of what goes into the catalogue, up to DuckDB's limit: read and sorted."""
IMAGE_NOTE = 250
"""Bytes that stage `images` remembers of every image: its id and its path."""
IN_DUCKDB = 0.9
"""Bytes of a row in the catalogue to those in Parquet: numbers are packed closer (0.95 and 0.93 where it was measured)."""
BYTES_PER_LABEL = 45.0
"""Of a label with its scores, where no trial has one."""


@dataclass(frozen=True)
class Amounts:
    """How much there is of everything, in a trial or in the whole."""

    images: float
    """Images kept."""
    train_images: float
    eval_images: float
    train_tokens: float
    """Rows of the training table: an epoch."""
    firings: float
    """Of all SAEs."""
    examples: float
    """Rows of examples with heat maps, of all SAEs."""
    most_examples: float
    """Of the SAE that has most."""
    scored: float
    """Latents with a name, of all SAEs."""


class Whole:
    """What the whole run takes, by what the largest trials made.

    Tokens and firings grow with the images. Examples and names do not: each latent has so many at most. How often each fired in the
    trial says how many there will be.
    """

    def __init__(self, params: Params, artefacts: Mapping[str, Artefact], activations: Artefact, tried: Mapping[str, Tried]) -> None:
        """Take what was tried.

        Args:
            params: Of the whole run.
            artefacts: What the largest trial of each stage made.
            activations: Those that are trained on, from the largest trial.
            tried: What the trials of each stage showed.
        """
        assert isinstance(params.extract, ExtractParams)
        self._params = params
        self._extract = params.extract
        self._artefacts = artefacts
        self._activations = activations
        self._tried = tried
        self._evaluations = artefacts["evaluate"].each()
        self._labels = artefacts["label"].each()
        self._d_sae = {name: one.d_sae for name, one in params.train.each().items()}
        self._fired = {name: _count_firings(of, self._d_sae[name]) for name, of in self._evaluations.items()}

    def amounts(self, images: Mapping[str, Any]) -> tuple[Amounts, Amounts]:
        """What the largest trials had, and what the whole will have.

        Args:
            images: Summary of the images of the whole, or what is known of it: n_images, n_train, n_eval.
        """
        tried = self._artefacts["images"].summary
        n_train = self._activations.rows("train")
        n_eval = next(iter(self._evaluations.values())).summary["n_images"]
        examples = {name: evaluation.rows("examples") for name, evaluation in self._evaluations.items()}
        trial = Amounts(
            images=tried["n_images"],
            train_images=tried["n_train"],
            eval_images=n_eval,
            train_tokens=n_train,
            firings=sum(evaluation.rows("firings") for evaluation in self._evaluations.values()),
            examples=sum(examples.values()),
            most_examples=max(examples.values()),
            scored=sum(labels.summary["n_scored"] for labels in self._labels.values()),
        )
        more = images["n_eval"] / max(1, n_eval)
        expected = [n * self._more_examples(name, more) for name, n in examples.items()]
        whole = Amounts(
            images=images["n_images"],
            train_images=images["n_train"],
            eval_images=images["n_eval"],
            train_tokens=n_train * images["n_train"] / max(1, tried["n_train"]),
            firings=trial.firings * more,
            examples=sum(expected),
            most_examples=max(expected),
            scored=float(sum((fired * more / 2 >= self._params.label.min_examples).sum() for fired in self._fired.values())),
        )
        return trial, whole

    def _more_examples(self, name: str, more: float) -> float:
        """How many times the examples of an SAE's trial there are where every latent fires so many times more often."""
        before, after = (expect_examples(self._fired[name] * times, self._params.evaluate) for times in (1.0, more))
        return after / before if before else 0.0

    def bytes(self, trial: Amounts, whole: Amounts) -> dict[str, int]:
        """On the disk, by stage."""
        images = whole.images / trial.images
        kept = {"train": whole.train_tokens / max(1, trial.train_tokens), "embeddings": images}
        kept["eval"] = whole.eval_images / max(1, self._artefacts["images"].summary["n_eval"])
        found = {
            "images": _grown(self._artefacts["images"], {"images": images, "rejected": images}),
            "extract": _grown(self._artefacts["extract"], {}) + sum(self._hookpoint_bytes(name, kept) for name in self._extract.hookpoints),
            "train": _grown_inside(self._artefacts["train"], {}),
            "evaluate": _grown_inside(
                self._artefacts["evaluate"],
                {"firings": whole.firings / max(1, trial.firings), "examples": whole.examples / max(1, trial.examples)},
            ),
            "label": _grown_inside(self._artefacts["label"], {}) + self._per_label(trial) * (whole.scored - trial.scored),
        }
        found["catalog"] = _grown(self._artefacts["catalog"], {}) + self._catalog_growth(trial, whole)
        return {stage: int(size) for stage, size in found.items()}

    def costs(self, trial: Amounts) -> dict[str, Cost]:
        """Seconds by work, by stage."""
        costs = {stage: fit(tried.warm, tried.alone) for stage, tried in self._tried.items() if tried.alone}
        label = self._tried["label"]
        assert label.alone is not None
        # with several SAEs each has its own: `about` names it first
        seconds = sum(span for what, span in label.spans.items() if what.endswith("score labels"))
        per_score = seconds / max(1.0, trial.scored)
        return costs | {"label": Cost(Timed(trial.scored, label.alone.seconds), per_score)}

    def work(self, whole: Amounts, n_items: int) -> dict[str, float]:
        """What `costs` count, by stage."""
        train = self._params.train
        return {
            "images": n_items,
            "extract": whole.images,
            "train": trained_tokens(int(whole.train_tokens), train.batch_size, train.epochs),
            "evaluate": whole.eval_images,
            "label": whole.scored,
            "catalog": whole.images,
        }

    def peaks(self, trial: Amounts, whole: Amounts) -> dict[str, int]:
        """Largest resident set by stage, in bytes: that of the largest trial, and what the whole holds beyond it."""
        before, after = (self._held(amounts, self.bytes(trial, amounts)["catalog"]) for amounts in (trial, whole))
        return {stage: int(tried.peak + max(0.0, after[stage] - before[stage])) for stage, tried in self._tried.items() if tried.alone}

    def while_running(self, whole: Amounts, extract: int) -> int:
        """Bytes on the disk that only a running stage needs: the chunks of a shard of so large an extraction, or checkpoints."""
        weights = 4 * sum(self._d_sae.values()) * self._activations.summary["d_model"]
        return int(max(extract * min(1.0, IMAGES_PER_SHARD / max(1.0, whole.images)), 6 * weights))

    def _held(self, amounts: Amounts, catalog: int) -> dict[str, float]:
        """Bytes that a stage holds at once, of what may be more in the whole than in a trial."""
        facts = self._activations.summary
        cells = int(np.prod(facts["grid"])) if facts["grid"] else 0
        group = self._group(amounts)
        sample = min(SAMPLE, amounts.train_tokens) * facts["d_model"] * 4
        shard = min(1.0, IMAGES_PER_SHARD / max(1.0, amounts.images)) * amounts.eval_images
        return {
            "images": PART_COPIES * self._part(amounts) + IMAGE_NOTE * amounts.images,
            "extract": CHUNK_COPIES * self._chunk(amounts) + GROUP_COPIES * group,
            "train": sample + QUEUE_COPIES * group,
            "evaluate": HEAT_COPIES * amounts.most_examples * cells * 4
            + 2 * shard * sum(judge["d_judge"] for judge in facts["judges"]) * 4,
            "label": JOINT_COPIES * amounts.eval_images * facts["d_joint"] * 4,
            "catalog": min(WRITER_MB * 2**20, CATALOG_COPIES * catalog),
        }

    def _part(self, amounts: Amounts) -> float:
        """Bytes of a part of images."""
        images = self._artefacts["images"]
        each = sum(file.bytes for file in images.manifest.files) / max(1, images.rows("images"))
        return min(amounts.images * each, ROWS_PER_PART * each, BYTES_PER_PART)

    def _chunk(self, amounts: Amounts) -> float:
        """Bytes of a chunk of activations at all hookpoints."""
        each = sum(facts["tokens_per_image"] * facts["d_model"] * 2 for facts in self._facts())
        return min(amounts.images, IMAGES_PER_CHUNK, max(1, BYTES_PER_CHUNK // each)) * each

    def _group(self, amounts: Amounts) -> float:
        """Bytes of a row group of training tokens: whole rounds, a token of every image each."""
        facts = self._activations.summary
        shard = amounts.images / max(1, -(-amounts.images // IMAGES_PER_SHARD))
        row = facts["d_model"] * 2
        rounds = max(1, BYTES_PER_ROW_GROUP // max(1, int(shard * row)))
        per_image = amounts.train_tokens / max(1.0, amounts.train_images)
        return min(rounds, per_image) * shard * amounts.train_images / max(1.0, amounts.images) * row

    def _facts(self) -> list[Mapping[str, Any]]:
        return [self._artefacts["extract"].child(name, "activations").summary for name in self._extract.hookpoints]

    def _hookpoint_bytes(self, name: str, kept: Mapping[str, float]) -> float:
        child = self._artefacts["extract"].child(name, "activations")
        # all hookpoints share one file of embeddings under several names: of the others it is nothing
        return _grown(child, kept if name == self._extract.hookpoints[0] else {**kept, "embeddings": 0.0})

    def _per_label(self, trial: Amounts) -> float:
        """Bytes of one more label: what the trial wrote, less what a table takes that has a single one."""
        n_more = trial.scored - len(self._labels)
        single = sum(_bytes_of_one_label(self._d_sae[name], labels.summary["labellers"]) for name, labels in self._labels.items())
        written = sum(file.bytes for labels in self._labels.values() for file in labels.manifest.files)
        return max(0.0, (written - single) / n_more) if n_more > 0 else BYTES_PER_LABEL

    def _catalog_growth(self, trial: Amounts, whole: Amounts) -> float:
        """What its tables take in Parquet, about as much as in DuckDB; of the images without their files, which it does not have."""
        growth = (whole.images - trial.images) * _data_bytes(self._artefacts["images"], "images", "encoded") / max(1, trial.images)
        for table, more in (("firings", whole.firings - trial.firings), ("examples", whole.examples - trial.examples)):
            size, rows = (sum(of(evaluation, table) for evaluation in self._evaluations.values()) for of in (_data_bytes, Artefact.rows))
            growth += more * size / max(1, rows)
        return IN_DUCKDB * growth + self._per_label(trial) * (whole.scored - trial.scored)


def expect_examples(fired: np.ndarray, params: EvaluateParams) -> float:
    """Rows of examples of latents that fire on so many images each: the strongest, and of each lower tenth at most so many others."""
    strongest = np.minimum(params.n_top, fired)
    return float((strongest + sum(np.minimum(params.n_per_decile, _left(fired, tenth, strongest)) for tenth in range(1, 10))).sum())


def _left(fired: np.ndarray, tenth: int, strongest: np.ndarray) -> np.ndarray:
    """Images of a tenth (0 the strongest) that are not among the strongest."""
    return np.clip(fired * (tenth + 1) / 10 - np.maximum(strongest, fired * tenth / 10), 0, None)


def _count_firings(evaluation: Artefact, d_sae: int) -> np.ndarray:
    """Images that fire each latent, (d_sae,) float."""
    counts = np.zeros(d_sae)
    for batch in evaluation.iter_batches("firings", ["latent"], n_rows=2**18):
        counts += np.bincount(batch["latent"].to_numpy(), minlength=d_sae)
    return counts


def _grown(artefact: Artefact, more: Mapping[str, float]) -> float:
    """Bytes of an artefact whose tables have so many times the rows; all else stays as it is. Without its children's."""
    manifest = artefact.folder.size(MANIFEST)
    assert manifest is not None, artefact.url
    children = {f"{child}/{MANIFEST}" for child in artefact.children}
    total = sum(file.bytes for file in artefact.manifest.files if file.name not in children)
    growth = sum((factor - 1) * _data_bytes(artefact, table) for table, factor in more.items())
    return total + growth + manifest


def _grown_inside(artefact: Artefact, more: Mapping[str, float]) -> float:
    """The same of an artefact with others inside, whose tables grow."""
    return _grown(artefact, {}) + sum(_grown(one, more) for one in artefact.each().values())


def _data_bytes(artefact: Artefact, table: str, without: str = "") -> int:
    """Bytes of the values of a table, but of one column: without the files' schemas, which do not grow."""
    total = 0
    for name in artefact.parts(table):
        with artefact.open_part(name) as file:
            metadata = file.metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        columns = (group.column(i) for group in groups for i in range(metadata.num_columns))
        total += sum(column.total_compressed_size for column in columns if column.path_in_schema != without)
    return total


def _bytes_of_one_label(d_sae: int, labellers: Sequence[str]) -> int:
    """Of a table of labels in which only the first latent has one, by one labeller: columns that are all null would be smaller."""
    n = d_sae * len(labellers)
    columns = {
        "latent": np.repeat(np.arange(d_sae), len(labellers)),
        "labeller": [*labellers] * d_sae,
        "place": [*range(1, len(labellers) + 1)] * d_sae,
        **{name: [value] * n for name, value in (("sae", "sae"), ("status", "too_few_examples"), ("n_requests", 0), ("n_tokens", 0))},
    }
    arrays = []
    for field in schemas.LABELS:
        found = columns.get(field.name, [0.5 if pa.types.is_floating(field.type) else "a name", *[None] * (n - 1)])
        arrays.append(pa.array(found, field.type))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, schema=schemas.LABELS), buffer)
    return buffer.getvalue().size
