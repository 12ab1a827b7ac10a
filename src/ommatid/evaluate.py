"""Stage `evaluate`: what every latent does on the evaluation split, with raw neurons and an untrained SAE beside it.

Two passes over the evaluation tokens, shard by shard, both streamed: the first accumulates, the second gives the intervals and
the heat maps of the examples that were chosen in between.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.config import EvaluateParams
from ommatid.errors import ArtefactError
from ommatid.events import Listener, Progress, ignore
from ommatid.metrics import Fidelity, Firing, Monosemanticity, MonosemanticityInterval, TopImages, nan_mean, purity
from ommatid.reader import load_sample
from ommatid.sae.baselines import Dictionary, Neurons, make_baseline
from ommatid.sae.model import SAE, SAEConfig, make_untrained
from ommatid.store import Artefact, Draft, part_name
from ommatid.tensors import from_float16, from_float32

N_PURITY = 16
"""Images of purity@16."""
ENTRIES = 2**22
"""Token activations (tokens x latents) held at once, about."""
CONTROL_SEED = 12345
"""Not the training seed: the controls share nothing with the SAE."""
CALIBRATION_TOKENS = 4096
"""Training tokens on which the untrained SAE's threshold is set."""
BASELINE_TOKENS = 2**17
"""Training tokens on which baselines are fitted, at most."""
BASELINE_VALUES = 2**26
"""Values of these tokens (tokens x d_model), at most: 256 MiB."""
FIRINGS_PER_PART = 2**20


@dataclass(frozen=True)
class Images:
    """Evaluation images of one step of the stream."""

    numbers: Tensor
    """images.image, (images,)."""
    x: Tensor
    """Activations, (images, tokens, d_model) float32."""
    target: Tensor
    """What is to be decoded from them, (images, tokens, d_out) float32: x itself, or activations of another hookpoint."""
    judge: Tensor
    """The judge's embeddings, (images, d_judge) float32."""


def evaluate(params: EvaluateParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Measure one SAE, an untrained SAE and the raw neurons on the evaluation split.

    Args:
        params: The section `evaluate`.
        inputs: `images`, the activations (`extract`), the SAE (`train`) and, of a transcoder, what it is to decode (`target`).
        draft: Of the SAE's evaluation.
        on_event: Hears of both passes.

    Raises:
        ArtefactError: `target` is not what the SAE was trained to decode.
    """
    activations, images, target = inputs["extract"], inputs["images"], inputs.get("target")
    sae = SAE.load(inputs["train"].path)
    _check_target(sae.config, target)
    name = inputs["train"].summary["sae"]
    subjects = _make_subjects(sae, activations, params)
    labels = _load_labels(images)
    firings = _Firings(draft, name)
    n_images = images.summary["n_eval"]
    for batch in _stream(activations, target, sae.config.d_sae, n_images, "evaluate images, first pass", on_event):
        for subject in subjects:
            acts = subject.add(batch)
            if subject.name == "sae":
                firings.add(batch.numbers, acts)
    firings.close()
    examples = _choose_examples(draft, firings, params)
    heat = _Heat(examples)
    for subject in subjects:
        subject.begin_second_pass()
    for batch in _stream(activations, None, sae.config.d_sae, n_images, "evaluate images, second pass", on_event):
        for subject in subjects:
            acts = subject.add_again(batch)
            if subject.name == "sae" and activations.summary["grid"]:
                heat.add(batch.numbers, acts[:, -math.prod(activations.summary["grid"]) :])
    draft.write_table("examples.parquet", heat.table(name, activations.summary["grid"]))
    trained = subjects[0]
    draft.write_table("latents.parquet", _latents(name, trained, labels, inputs["train"].summary["dead_latents"]))
    comparisons = [subject.compare(name, labels, activations.summary["judge"]) for subject in subjects]
    draft.write_table("comparisons.parquet", pa.Table.from_pylist(comparisons, schema=schemas.COMPARISONS))
    return draft.seal(_summarise(params, comparisons, trained, activations))


def _check_target(config: SAEConfig, target: Artefact | None) -> None:
    given = target.summary["hookpoint"] if target else None
    if given != config.target:
        raise ArtefactError(
            f"evaluate: the SAE decodes {config.target or config.hookpoint}, and train.target says {given or config.hookpoint}; "
            "evaluate with the params of its training, or train again"
        )


class _Subject:
    """A dictionary under evaluation: the SAE, an untrained one, the raw neurons, or another baseline."""

    def __init__(self, name: str, dictionary: Dictionary, decodes: bool, d_judge: int, image_activation: str) -> None:
        self.name = name
        self.fidelity = Fidelity() if decodes else None
        d_latents = dictionary.n_latents
        self.firing = Firing(d_latents)
        self.ms = Monosemanticity(d_latents, d_judge)
        self.top = TopImages(d_latents, N_PURITY)
        self.interval: MonosemanticityInterval
        self._dictionary = dictionary
        self._pool = torch.amax if image_activation == "max" else torch.mean

    def add(self, batch: Images) -> Tensor:
        """First pass; gives the image-level activations (images, latents)."""
        x = batch.x.flatten(0, 1)
        acts = self._dictionary.encode(x)
        pooled = self._pool(acts.unflatten(0, batch.x.shape[:2]), dim=1)
        if self.fidelity:
            self.fidelity.add(batch.target.flatten(0, 1), self._dictionary.decode(acts), int((acts > 0).sum()))
        self.firing.add(acts, pooled)
        self.ms.add(pooled, batch.judge)
        self.top.add(pooled, batch.numbers)
        return pooled

    def begin_second_pass(self) -> None:
        self.interval = MonosemanticityInterval(self.ms)

    def add_again(self, batch: Images) -> Tensor:
        """Second pass; gives the token activations (images, tokens, latents)."""
        acts = self._dictionary.encode(batch.x.flatten(0, 1)).unflatten(0, batch.x.shape[:2])
        self.interval.add(self._pool(acts, dim=1), batch.judge)
        return acts

    def purity(self, labels: Mapping[int, str]) -> list[float]:
        """Purity@16 of each latent; NaN without labels or with fewer than 16 firing images."""
        return purity([[labels[i] for i in images if i in labels] for images in self.top_images()], N_PURITY)

    def top_images(self) -> list[list[int]]:
        """The strongest firing images of each latent, strongest first."""
        fires = (self.top.acts > 0).T.tolist()
        images = self.top.images.T.tolist()
        return [[i for i, fired in zip(*pair, strict=True) if fired] for pair in zip(images, fires, strict=True)]

    def compare(self, sae: str, labels: Mapping[int, str], judge: str) -> dict[str, Any]:
        """The row of `comparisons`."""
        scores = self.ms.scores()
        low, high = self.interval.of_mean()
        undefined = int(scores.ms.isnan().sum())
        values = {
            "fvu": self.fidelity.fvu if self.fidelity else math.nan,
            "cosine": self.fidelity.cosine if self.fidelity else math.nan,
            "ms": nan_mean(scores.ms),
            "ms_low": low,
            "ms_high": high,
            "ms_best": float(scores.ms[~scores.ms.isnan()].max()) if undefined < len(scores.ms) else math.nan,
            "purity": nan_mean(torch.tensor(self.purity(labels), dtype=torch.float64)),
        }
        return {
            "sae": sae,
            "dictionary": self.name,
            "n_latents": len(scores.ms),
            "l0": float(self.firing.count.sum()) / self.firing.n_tokens,
            "dead": float(self.firing.is_dead.double().mean()),
            "ms_left_out": undefined,
            "ms_floor": scores.floor,
            "judge": judge,
            **{key: _none_if_nan(value) for key, value in values.items()},
        }


def _make_subjects(sae: SAE, activations: Artefact, params: EvaluateParams) -> list[_Subject]:
    d_judge, pool = activations.summary["d_judge"], params.image_activation
    dictionaries: dict[str, Dictionary] = {
        "sae": sae,
        "untrained": make_untrained(sae.config, load_sample(activations, CALIBRATION_TOKENS), CONTROL_SEED),
        "neurons": Neurons(sae.config.d_model),
    }
    if params.baselines:
        sample = load_sample(activations, min(BASELINE_TOKENS, BASELINE_VALUES // sae.config.d_model))
        dictionaries |= {kind: make_baseline(kind, sae.config, sample, CONTROL_SEED) for kind in params.baselines}
    is_transcoder = sae.config.target is not None  # the others decode the activations that they encode, and nothing else
    return [
        _Subject(name, dictionary, name == "sae" or (name != "neurons" and not is_transcoder), d_judge, pool)
        for name, dictionary in dictionaries.items()
    ]


def _stream(activations: Artefact, target: Artefact | None, d_sae: int, n_images: int, what: str, on_event: Listener) -> Iterator[Images]:
    """The evaluation images shard by shard, so many at a time that their activations stay bounded."""
    per_image = activations.summary["tokens_per_image"]
    n = max(1, ENTRIES // (per_image * d_sae))
    done = 0
    for tokens, embedded in zip(activations.parts("eval"), activations.parts("embeddings"), strict=True):
        embeddings = _Embeddings(activations.read_part(embedded, ["image", "judge"]))
        ours = _iter_tokens(activations, tokens, n * per_image)
        theirs = _iter_tokens(target, tokens, n * per_image) if target else None
        for image, x in ours:
            numbers = image[::per_image].contiguous()
            shape = (len(numbers), per_image)
            y = x if theirs is None else _same_images(image, *next(theirs))
            yield Images(numbers, x.unflatten(0, shape), y.unflatten(0, shape), embeddings.take(numbers))
            done += len(numbers)
            on_event(Progress(what, done, n_images))


def _iter_tokens(activations: Artefact, part: str, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (rows,) int64 and activations (rows, d_model) float32 of a part, n rows at a time."""
    with activations.open_part(part) as file:
        for rows in file.iter_batches(n, columns=["image", "x"]):
            yield torch.from_numpy(rows["image"].to_numpy().astype(np.int64)), from_float16(rows["x"]).float()


def _same_images(image: Tensor, other: Tensor, y: Tensor) -> Tensor:
    assert torch.equal(image, other), f"rows of two hookpoints are of other images: {image[:3].tolist()}, {other[:3].tolist()}"
    return y


class _Embeddings:
    """The judge's embeddings of one shard's images, which are in order."""

    def __init__(self, rows: pa.Table) -> None:
        self._images = torch.from_numpy(rows["image"].to_numpy().astype(np.int64))
        self._judge = from_float32(rows["judge"])

    def take(self, numbers: Tensor) -> Tensor:
        """Rows of these images, (images, d_judge)."""
        return self._judge[torch.searchsorted(self._images, numbers)]


class _Firings:
    """Writes image-level firings as they come, in parts.

    They wait in arrays made once: small arrays that live on between the large short-lived ones of every step leave holes in the
    heap that nothing fits, and memory grew by 2 GB over 18,000 images.
    """

    def __init__(self, draft: Draft, sae: str) -> None:
        self._draft = draft
        self._sae = sae
        self._waiting = {name: np.empty(FIRINGS_PER_PART, type_) for name, type_ in (("image", "i4"), ("latent", "i4"), ("act", "f4"))}
        self._n_waiting = 0
        self._n_parts = 0

    def add(self, numbers: Tensor, acts: Tensor) -> None:
        """Image numbers (images,) and their image-level activations (images, d_sae)."""
        rows, latents = (acts > 0).nonzero(as_tuple=True)
        new = {"image": numbers[rows].numpy(), "latent": latents.numpy(), "act": acts[rows, latents].numpy()}
        start = 0
        while start < len(rows):
            n = min(len(rows) - start, FIRINGS_PER_PART - self._n_waiting)
            for name, column in self._waiting.items():
                column[self._n_waiting : self._n_waiting + n] = new[name][start : start + n]
            start, self._n_waiting = start + n, self._n_waiting + n
            if self._n_waiting == FIRINGS_PER_PART:
                self._flush()

    def close(self) -> None:
        """Write what still waits."""
        if self._n_waiting or not self._n_parts:
            self._flush()

    def files(self) -> list[str]:
        """Paths of the parts written."""
        return [str(self._draft.local(part_name("firings", i))) for i in range(self._n_parts)]

    def _flush(self) -> None:
        n = self._n_waiting
        names = pa.array(np.full(n, self._sae, dtype=object), pa.string())
        table = pa.table({"sae": names, **{name: column[:n] for name, column in self._waiting.items()}}, schema=schemas.FIRINGS)
        self._draft.write_table(part_name("firings", self._n_parts), table, compression="zstd")
        self._n_waiting, self._n_parts = 0, self._n_parts + 1


_EXAMPLES_SQL = """
WITH placed AS (
  SELECT latent, image, act,
         row_number() OVER (PARTITION BY latent ORDER BY act DESC, image) AS place,
         count(*) OVER (PARTITION BY latent) AS n
  FROM read_parquet($files)
), tenths AS (
  SELECT *, CAST(10 - floor(10 * (place - 1) / n) AS TINYINT) AS decile FROM placed
), drawn AS (
  -- decile 10 keeps its strongest, the others a draw that has nothing to do with the activation
  SELECT *, row_number() OVER (PARTITION BY latent, decile ORDER BY CASE WHEN decile = 10 THEN place ELSE hash(image, latent) END) AS draw
  FROM tenths
)
SELECT latent, decile, CAST(row_number() OVER (PARTITION BY latent, decile ORDER BY place) AS INTEGER) AS rank, image, act
FROM drawn
WHERE draw <= CASE WHEN decile = 10 THEN $n_top ELSE $n_per_decile END
ORDER BY latent, decile DESC, rank
"""


def _choose_examples(draft: Draft, firings: _Firings, params: EvaluateParams) -> pa.Table:
    """Examples of every latent by decile; DuckDB sorts outside memory where it must."""
    settings: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": str(draft.scratch), "preserve_insertion_order": "false"}
    with duckdb.connect(config=settings) as connection:
        values = {"files": firings.files(), "n_top": params.n_top, "n_per_decile": params.n_per_decile}
        return connection.execute(_EXAMPLES_SQL, values).to_arrow_table()


class _Heat:
    """Collects the token activations of the chosen examples."""

    def __init__(self, examples: pa.Table) -> None:
        self._examples = examples
        images = torch.from_numpy(examples["image"].to_numpy().astype(np.int64))
        self._by_image = images.argsort(stable=True)
        self._images = images[self._by_image]
        self._latents = torch.from_numpy(examples["latent"].to_numpy().astype(np.int64))[self._by_image]
        self._heat: list[Tensor] = []
        self._where: list[Tensor] = []

    def add(self, numbers: Tensor, acts: Tensor) -> None:
        """Patch activations (images, patches, latents) of some images, in order."""
        first = int(torch.searchsorted(self._images, numbers[0]))
        last = int(torch.searchsorted(self._images, numbers[-1], right=True))
        place = torch.searchsorted(numbers, self._images[first:last])
        shown = numbers[place] == self._images[first:last]  # images of other shards lie between these
        self._heat.append(acts[place[shown], :, self._latents[first:last][shown]])
        self._where.append(torch.arange(first, last)[shown])

    def table(self, sae: str, grid: list[int] | None) -> pa.Table:
        """The `examples` table."""
        n = len(self._examples)
        rows, cols = grid or (0, 0)
        heat: Any = pa.nulls(n, pa.list_(pa.float32()))
        if grid and n:
            by_image = torch.cat(self._heat)[torch.cat(self._where).argsort()]
            ordered = by_image[self._by_image.argsort()]
            offsets = pa.array(np.arange(n + 1) * rows * cols, pa.int32())
            heat = pa.ListArray.from_arrays(offsets, pa.array(ordered.flatten().numpy(), pa.float32()))
        columns = {name: self._examples[name] for name in ("latent", "decile", "rank", "image", "act")}
        columns |= {"sae": pa.array([sae] * n, pa.string()), "heat": heat}
        columns |= {"rows": pa.array([rows] * n, pa.int16()), "cols": pa.array([cols] * n, pa.int16())}
        return pa.table({name: columns[name] for name in schemas.EXAMPLES.names}).cast(schemas.EXAMPLES)


def _latents(sae: str, subject: _Subject, labels: Mapping[int, str], dead_in_training: list[int]) -> pa.Table:
    firing = subject.firing
    n = len(firing.count)
    low, high = subject.interval.of_latents()
    classes = [[name for name, _ in Counter(labels[i] for i in top if i in labels).most_common(3)] for top in subject.top_images()]
    was_dead = torch.zeros(n, dtype=torch.bool)
    was_dead[dead_in_training] = True
    columns = {
        "sae": [sae] * n,
        "latent": np.arange(n, dtype=np.int32),
        "density": firing.density.numpy(),
        "mean_act": _nullable(firing.mean),
        "max_act": firing.max.numpy(),
        "n_images": firing.n_images.int().numpy(),
        "is_dead": firing.is_dead.numpy(),
        "dead_in_training": was_dead.numpy(),
        "ms": _nullable(subject.ms.scores().ms),
        "ms_low": _nullable(low),
        "ms_high": _nullable(high),
        "purity": _nullable(torch.tensor(subject.purity(labels), dtype=torch.float64)),
        "top_classes": classes,
    }
    return pa.table(columns, schema=schemas.LATENTS)


def _summarise(params: EvaluateParams, comparisons: list[dict[str, Any]], subject: _Subject, activations: Artefact) -> dict[str, Any]:
    mine, untrained, neurons, *_ = comparisons
    keys = ("sae", "fvu", "cosine", "l0", "dead", "ms", "ms_low", "ms_high", "ms_best", "ms_left_out", "ms_floor", "purity", "judge")
    return {
        **{key: mine[key] for key in keys},
        "ms_untrained": untrained["ms"],
        "ms_neurons": neurons["ms"],
        "fvu_untrained": untrained["fvu"],
        "n_latents": mine["n_latents"],
        "n_images": subject.ms.n,
        "n_tokens": subject.firing.n_tokens,
        "image_activation": params.image_activation,
        "grid": activations.summary["grid"],
    }


def _load_labels(images: Artefact) -> dict[int, str]:
    """Class of each evaluation image that has one."""
    labels: dict[int, str] = {}
    for batch in images.iter_batches("images", ["image", "split", "label"], n_rows=4096):
        rows = zip(*(batch[name].to_pylist() for name in ("image", "split", "label")), strict=True)
        labels |= {image: label for image, split, label in rows if split == "eval" and label is not None}
    return labels


def _nullable(x: Tensor) -> pa.Array:
    return pa.array(x.numpy(), pa.float64(), from_pandas=True)


def _none_if_nan(x: float) -> float | None:
    return None if math.isnan(x) else x
