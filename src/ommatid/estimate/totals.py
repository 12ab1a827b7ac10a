"""Extrapolation from trials to the whole run: how much there will be of everything, and what it takes in bytes, seconds and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ommatid import schemas
from ommatid.catalog.stage import WRITER_MB
from ommatid.config import EvaluateParams, ExtractParams, Params
from ommatid.config.intervene import BestLatents, FiringLatents, ListedLatents
from ommatid.estimate.fit import Cost, Timing, fit
from ommatid.estimate.trials import TrialResults, tested_images, trained_tokens
from ommatid.extract.plan import IMAGES_PER_SHARD
from ommatid.extract.rows import BYTES_PER_ROW_GROUP
from ommatid.extract.shard import BYTES_PER_CHUNK, IMAGES_PER_CHUNK
from ommatid.images.dataset import BYTES_PER_PART, ROWS_PER_PART
from ommatid.store import MANIFEST, Artefact
from ommatid.train.stage import SAMPLE

CHUNK_COPIES = 4
"""Copies in memory of a chunk of activations: its batches, joined, reordered, and the previous chunk while it is being written."""
GROUP_COPIES = 6
"""Copies in memory of a row group of training tokens while extraction reorders it: read, joined, reordered, as a table, in the writer,
and being written."""
QUEUE_COPIES = 2
"""Copies in memory of a row group of training tokens during training. Memory is highest in the gate, when most of the queue is gone."""
PART_COPIES = 2
"""Copies in memory of a part of images: rows and a table. The files' bytes themselves are not copied."""
HEAT_COPIES = 3
"""Copies in memory of the heat maps: collected, reordered, and as a table."""
JOINT_COPIES = 3
"""Copies in memory of the joint embeddings of the evaluation images: read, centred, and normalised."""
CATALOG_COPIES = 2
"""Copies in memory of what goes into the catalogue, up to DuckDB's limit: read and sorted."""
IMAGE_NOTE = 250
"""Bytes that the stage `images` keeps in memory for every image: its id and its path."""
IN_DUCKDB = 0.9
"""Ratio of a row's bytes in the catalogue to those in Parquet, as DuckDB packs numbers more tightly (0.95 and 0.93 were measured)."""
BYTES_PER_LABEL = 45.0
"""Bytes of a label with its scores, assumed if no trial has made more than one for each SAE."""


@dataclass(frozen=True)
class Amounts:
    """Amounts of everything that a run handles, in a trial or in the whole run."""

    images: float
    """Number of images kept."""
    train_images: float
    """Number of images in the training split."""
    eval_images: float
    """Number of images in the evaluation split."""
    train_tokens: float
    """Number of training tokens in one epoch."""
    firings: float
    """Number of image-level firings of all SAEs."""
    examples: float
    """Number of examples, which have heat maps, of all SAEs."""
    most_examples: float
    """Number of examples of the SAE that has most."""
    scored: float
    """Number of scored labels of all SAEs."""
    tested: float
    """Number of latents of all SAEs that interventions test."""


class Extrapolation:
    """Extrapolation from the artefacts of the largest trials to the whole run.

    Tokens and firings grow with the number of images. Examples and labels grow more slowly, because their number for each latent is
    limited; how many there will be follows from how often each latent fired in the trial.
    """

    def __init__(
        self, params: Params, artefacts: Mapping[str, Artefact], activations: Artefact, results: Mapping[str, TrialResults]
    ) -> None:
        """Prepare the extrapolation.

        Args:
            params: Params of the whole run.
            artefacts: Artefact of the largest trial of each stage, by stage.
            activations: Activations for training from the largest trial.
            results: Results of the trials, by stage.
        """
        assert isinstance(params.extract, ExtractParams)
        self._params = params
        self._extract = params.extract
        self._artefacts = artefacts
        self._activations = activations
        self._results = results
        self._evaluations = artefacts["evaluate"].each()
        self._labels = artefacts["label"].each()
        self._effects = artefacts["intervene"].each()
        self._d_sae = {name: one.d_sae for name, one in params.train.each().items()}
        self._fired = {name: _count_firings(of, self._d_sae[name]) for name, of in self._evaluations.items()}

    def amounts(self, images: Mapping[str, Any]) -> tuple[Amounts, Amounts]:
        """Count the amounts in the largest trials, and predict those in the whole run.

        Args:
            images: `n_images`, `n_train` and `n_eval` of the whole run.

        Returns:
            The amounts in the trials, and those expected in the whole run.
        """
        sample = self._artefacts["images"].summary
        n_train = self._activations.rows("train")
        n_eval = next(iter(self._evaluations.values())).summary["n_images"]
        examples = {name: evaluation.rows("examples") for name, evaluation in self._evaluations.items()}
        trial = Amounts(
            images=sample["n_images"],
            train_images=sample["n_train"],
            eval_images=n_eval,
            train_tokens=n_train,
            firings=sum(evaluation.rows("firings") for evaluation in self._evaluations.values()),
            examples=sum(examples.values()),
            most_examples=max(examples.values()),
            scored=sum(labels.summary["n_scored"] for labels in self._labels.values()),
            # not n_tested: a sample may have too few images for a status, but its latents are measured
            tested=sum(len(effects.read("interventions", ["latent"])["latent"].unique()) for effects in self._effects.values()),
        )
        more = images["n_eval"] / max(1, n_eval)
        expected = [n * self._more_examples(name, more) for name, n in examples.items()]
        whole = Amounts(
            images=images["n_images"],
            train_images=images["n_train"],
            eval_images=images["n_eval"],
            train_tokens=n_train * images["n_train"] / max(1, sample["n_train"]),
            firings=trial.firings * more,
            examples=sum(expected),
            most_examples=max(expected),
            scored=float(sum((fired * more / 2 >= self._params.label.min_examples).sum() for fired in self._fired.values())),
            tested=float(sum(self._count_chosen(fired * more) for fired in self._fired.values())),
        )
        return trial, whole

    def _count_chosen(self, fired: np.ndarray) -> int:
        """Return how many latents of an SAE `intervene.latents` chooses, given on how many images each fires."""
        match self._params.intervene.latents:
            case BestLatents(by=by, n=n):
                return min(n * len(by), int((fired > 0).sum()))
            case ListedLatents(latents=listed):
                return len(listed)
            case FiringLatents(min_images=least):
                return int((fired >= least).sum())

    def _more_examples(self, name: str, more: float) -> float:
        """Return the factor by which the examples of an SAE grow if every latent fires on `more` times as many images as in the trial."""
        before, after = (expect_examples(self._fired[name] * times, self._params.evaluate) for times in (1.0, more))
        return after / before if before else 0.0

    def bytes(self, trial: Amounts, whole: Amounts) -> dict[str, int]:
        """Return the size of each stage's artefact in bytes."""
        images = whole.images / trial.images
        factors = {"train": whole.train_tokens / max(1, trial.train_tokens), "embeddings": images}
        factors["eval"] = whole.eval_images / max(1, self._artefacts["images"].summary["n_eval"])
        sizes = {
            "images": _grown(self._artefacts["images"], {"images": images, "rejected": images}),
            "extract": _grown(self._artefacts["extract"], {})
            + sum(self._hookpoint_bytes(name, factors) for name in self._extract.hookpoints),
            "train": _grown_inside(self._artefacts["train"], {}),
            "evaluate": _grown_inside(
                self._artefacts["evaluate"],
                {"firings": whole.firings / max(1, trial.firings), "examples": whole.examples / max(1, trial.examples)},
            ),
            "label": _grown_inside(self._artefacts["label"], {}) + self._per_label(trial) * (whole.scored - trial.scored),
            "intervene": _grown_inside(self._artefacts["intervene"], {"interventions": whole.tested / max(1, trial.tested)}),
        }
        sizes["catalog"] = _grown(self._artefacts["catalog"], {}) + self._catalog_growth(trial, whole)
        return {stage: int(size) for stage, size in sizes.items()}

    def costs(self, trial: Amounts) -> dict[str, Cost]:
        """Return the cost of each stage that has to run."""
        costs = {stage: fit(results.warm, results.alone) for stage, results in self._results.items() if results.alone}
        label = self._results["label"]
        assert label.alone is not None
        # with several SAEs, each has events of its own, which begin with its name
        seconds = sum(span for what, span in label.spans.items() if what.endswith("score labels"))
        per_score = seconds / max(1.0, trial.scored)
        return costs | {"label": Cost(Timing(trial.scored, label.alone.seconds), per_score)}

    def work(self, whole: Amounts, n_items: int) -> dict[str, float]:
        """Return the work of each stage in the whole run, in the units of its cost."""
        train = self._params.train
        return {
            "images": n_items,
            "extract": whole.images,
            "train": trained_tokens(int(whole.train_tokens), train.batch_size, train.epochs),
            "evaluate": whole.eval_images,
            "label": whole.scored,
            "intervene": tested_images(self._params.intervene, whole.eval_images, whole.tested),
            "catalog": whole.images,
        }

    def peaks(self, trial: Amounts, whole: Amounts) -> dict[str, int]:
        """Return the largest resident set of each stage that has to run, in bytes.

        It is that of the largest trial, and what the whole run holds in memory beyond it.
        """
        before, after = (self._held(amounts, self.bytes(trial, amounts)["catalog"]) for amounts in (trial, whole))
        return {
            stage: int(results.peak + max(0.0, after[stage] - before[stage])) for stage, results in self._results.items() if results.alone
        }

    def temporary(self, whole: Amounts, extract: int) -> int:
        """Predict the disk space that only a running stage needs, for the chunks of a shard or for checkpoints.

        Args:
            whole: Amounts in the whole run.
            extract: Size of the artefact of `extract`, in bytes.

        Returns:
            The disk space in bytes.
        """
        weights = 4 * sum(self._d_sae.values()) * self._activations.summary["d_model"]
        return int(max(extract * min(1.0, IMAGES_PER_SHARD / max(1.0, whole.images)), 6 * weights))

    def _held(self, amounts: Amounts, catalog: int) -> dict[str, float]:
        """Return the bytes that each stage holds in memory at once, of everything that grows from the trial to the whole run."""
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
            "intervene": 0.0,  # however many images there are, it holds a batch, and a few numbers of each
            "catalog": min(WRITER_MB * 2**20, CATALOG_COPIES * catalog),
        }

    def _part(self, amounts: Amounts) -> float:
        """Return the size of a part of images in bytes."""
        images = self._artefacts["images"]
        each = sum(file.bytes for file in images.manifest.files) / max(1, images.rows("images"))
        return min(amounts.images * each, ROWS_PER_PART * each, BYTES_PER_PART)

    def _chunk(self, amounts: Amounts) -> float:
        """Return the size of a chunk of activations at all hookpoints, in bytes."""
        each = sum(facts["tokens_per_image"] * facts["d_model"] * 2 for facts in self._facts())
        return min(amounts.images, max(self._extract.batch_size, min(IMAGES_PER_CHUNK, BYTES_PER_CHUNK // each))) * each

    def _group(self, amounts: Amounts) -> float:
        """Return the size of a row group of training tokens in bytes. It consists of whole rounds, each with one token of every image."""
        facts = self._activations.summary
        shard = amounts.images / max(1, -(-amounts.images // IMAGES_PER_SHARD))
        row = facts["d_model"] * 2
        rounds = max(1, BYTES_PER_ROW_GROUP // max(1, int(shard * row)))
        per_image = amounts.train_tokens / max(1.0, amounts.train_images)
        return min(rounds, per_image) * shard * amounts.train_images / max(1.0, amounts.images) * row

    def _facts(self) -> list[Mapping[str, Any]]:
        return [self._artefacts["extract"].child(name, "activations").summary for name in self._extract.hookpoints]

    def _hookpoint_bytes(self, name: str, factors: Mapping[str, float]) -> float:
        child = self._artefacts["extract"].child(name, "activations")
        # all hookpoints link to the same file of embeddings, so it counts for the first one only
        return _grown(child, factors if name == self._extract.hookpoints[0] else {**factors, "embeddings": 0.0})

    def _per_label(self, trial: Amounts) -> float:
        """Return the bytes of one more label: those of the trial beyond tables with a single label, for each further label."""
        n_more = trial.scored - len(self._labels)
        single = sum(_bytes_of_one_label(self._d_sae[name], labels.summary["labellers"]) for name, labels in self._labels.items())
        written = sum(file.bytes for labels in self._labels.values() for file in labels.manifest.files)
        return max(0.0, (written - single) / n_more) if n_more > 0 else BYTES_PER_LABEL

    def _catalog_growth(self, trial: Amounts, whole: Amounts) -> float:
        """Return the bytes by which the catalogue grows, from its tables in Parquet. The encoded images are not in the catalogue."""
        growth = (whole.images - trial.images) * _data_bytes(self._artefacts["images"], "images", "encoded") / max(1, trial.images)
        for table, more in (("firings", whole.firings - trial.firings), ("examples", whole.examples - trial.examples)):
            size, rows = (sum(of(evaluation, table) for evaluation in self._evaluations.values()) for of in (_data_bytes, Artefact.rows))
            growth += more * size / max(1, rows)
        tested = sum(_data_bytes(effects, "interventions") for effects in self._effects.values())
        growth += (whole.tested - trial.tested) * tested / max(1, trial.tested)
        return IN_DUCKDB * growth + self._per_label(trial) * (whole.scored - trial.scored)


def expect_examples(fired: np.ndarray, params: EvaluateParams) -> float:
    """Predict how many examples there will be: each latent's strongest images, and up to `n_per_decile` from each lower tenth.

    Args:
        fired: Number of images on which each latent fires.
        params: The section `evaluate`.

    Returns:
        The expected number of examples of all latents.
    """
    strongest = np.minimum(params.n_top, fired)
    return float((strongest + sum(np.minimum(params.n_per_decile, _rest(fired, tenth, strongest)) for tenth in range(1, 10))).sum())


def _rest(fired: np.ndarray, tenth: int, strongest: np.ndarray) -> np.ndarray:
    """Return the number of images of a tenth (0 is the highest) that are not among the strongest."""
    return np.clip(fired * (tenth + 1) / 10 - np.maximum(strongest, fired * tenth / 10), 0, None)


def _count_firings(evaluation: Artefact, d_sae: int) -> np.ndarray:
    """Return the number of images on which each latent fires, (d_sae,) float."""
    counts = np.zeros(d_sae)
    for batch in evaluation.iter_batches("firings", ["latent"], n_rows=2**18):
        counts += np.bincount(batch["latent"].to_numpy(), minlength=d_sae)
    return counts


def _grown(artefact: Artefact, more: Mapping[str, float]) -> float:
    """Predict the size of an artefact, without its children, after some of its tables have grown.

    Args:
        artefact: Artefact as it is.
        more: Factor by which the rows of a table grow, by table.

    Returns:
        The size in bytes.
    """
    manifest = artefact.folder.size(MANIFEST)
    assert manifest is not None, artefact.url
    children = {f"{child}/{MANIFEST}" for child in artefact.children}
    total = sum(file.bytes for file in artefact.manifest.files if file.name not in children)
    growth = sum((factor - 1) * _data_bytes(artefact, table) for table, factor in more.items())
    return total + growth + manifest


def _grown_inside(artefact: Artefact, more: Mapping[str, float]) -> float:
    """Predict the size in bytes of an artefact with its children, after some of the children's tables have grown."""
    return _grown(artefact, {}) + sum(_grown(one, more) for one in artefact.each().values())


def _data_bytes(artefact: Artefact, table: str, without: str = "") -> int:
    """Return the bytes of a table's values, except those of the column `without`. The files' metadata are not counted: they do not grow."""
    total = 0
    for name in artefact.parts(table):
        with artefact.open_part(name) as file:
            metadata = file.metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        columns = (group.column(i) for group in groups for i in range(metadata.num_columns))
        total += sum(column.total_compressed_size for column in columns if column.path_in_schema != without)
    return total


def _bytes_of_one_label(d_sae: int, labellers: Sequence[str]) -> int:
    """Return the size in bytes of a table in which only one latent has a label, since columns that are all null would be smaller."""
    n = d_sae * len(labellers)
    columns = {
        "latent": np.repeat(np.arange(d_sae), len(labellers)),
        "labeller": [*labellers] * d_sae,
        "place": [*range(1, len(labellers) + 1)] * d_sae,
        **{name: [value] * n for name, value in (("sae", "sae"), ("status", "too_few_examples"), ("n_requests", 0), ("n_tokens", 0))},
    }
    arrays = []
    for field in schemas.LABELS:
        values = columns.get(field.name, [0.5 if pa.types.is_floating(field.type) else "a name", *[None] * (n - 1)])
        arrays.append(pa.array(values, field.type))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, schema=schemas.LABELS), buffer)
    return buffer.getvalue().size
