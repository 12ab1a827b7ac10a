"""Trials of the whole pipeline: every stage really runs, on samples that grow as long as the trials stay cheap."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ommatid import tracking
from ommatid.config import ExtractParams, InterveneParams, Params
from ommatid.config.intervene import BestLatents, ListedLatents
from ommatid.estimate.fit import Timing, grow, trial_sizes
from ommatid.estimate.sample import draw_images
from ommatid.estimate.trial_client import RunCost, StageProcess
from ommatid.events import Listener, Progress
from ommatid.pipeline import STAGES, open_stage
from ommatid.store import Artefact

BUDGET = 10.0
"""Maximum seconds that a trial may be expected to take."""
FEWEST_EVAL = 16
"""Minimum number of evaluation images in a trial of `evaluate` and of later stages."""
N_TRIALS = 7
"""Number of stages to try, for the progress events."""


@dataclass
class TrialResults:
    """Results of the trials of one stage."""

    sizes: list[int] = field(default_factory=list)
    """Number of images of each trial."""
    warm: list[Timing] = field(default_factory=list)
    """Timings of runs in one process that had already run the stage."""
    alone: Timing | None = None
    """Timing of a process that ran only the largest trial; None if the stage's artefact exists, so that it need not run."""
    peak: int = 0
    """Largest resident set of this process, in bytes."""
    spans: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each kind of work took in this process."""


class Trials:
    """The trials of all stages, with their results and their artefacts."""

    def __init__(self, params: Params, whole: Artefact | None, n_items: int, root: Path, on_event: Listener) -> None:
        """Prepare the trials.

        Args:
            params: Params of the whole run.
            whole: Images artefact of the whole run; None if it does not exist yet.
            n_items: Number of items that the stage `images` examines in the whole run.
            root: Empty folder for everything that the trials write.
            on_event: Called with each progress event and warning.
        """
        self.results: dict[str, TrialResults] = {stage: TrialResults() for stage in STAGES}
        """Results by stage."""
        assert isinstance(params.extract, ExtractParams), params.extract
        self._params = params
        self._executor = params.extract.executor.trial
        self._whole = whole
        self._sizes = trial_sizes(n_items)
        self._root = root
        self._on_event = on_event
        self._largest: dict[str, int] = {}

    def artefact(self, stage: str) -> Artefact:
        """Return the artefact of the largest trial of a stage; that of `extract` has all hookpoints inside."""
        return open_stage(stage, data=str(self._data(self._largest[stage])))

    def activations(self) -> Artefact:
        """Return the activations for training from the largest trial of `extract`."""
        return self._activations(self._largest["extract"])

    def run(self, tokens_of: Callable[[Artefact, Artefact], float]) -> None:
        """Run all trials.

        Args:
            tokens_of: Function that returns the expected number of training tokens of the whole run, given the images and the
                activations of a trial.

        Raises:
            OmmatidError: A stage failed on a sample (the error is its own), or a process died.
        """
        self._prepare_tracking()
        self._try_images_and_extract()
        tokens = int(tokens_of(self.artefact("images"), self.activations()))
        self._try_train(tokens)
        sizes = self._try_evaluate()
        self._try_label(sizes[-1])
        self._try_intervene(sizes[-1])
        self._try_catalog(sizes)

    def _try_images_and_extract(self) -> None:
        """Try `extract` on growing samples, and `images` on the way, since every sample has to be made."""
        with self._process("images") as images:
            existing_sizes: set[int] = set()

            def make(n: int) -> None:
                if n not in existing_sizes:
                    existing_sizes.add(n)
                    self._make_images(images, n)

            def extract(process: StageProcess, i: int) -> RunCost:
                make(self._sizes[i])
                return process.run(self._values(), self._data(self._sizes[i]))

            make(self._sizes[0])
            self.results["images"].warm.clear()  # the first run paid for imports and first calls
            if self._whole is None:
                self._make_images(images, self._sizes[0])
            self._grow("extract", self._sizes, self._sizes, extract)
        if self._whole is None:
            n = self._largest["images"]
            self._run_alone("images", n, n, lambda process: self._run_images(process, n))

    def _make_images(self, process: StageProcess, n: int) -> None:
        self._largest["images"] = n
        if self._whole is not None:
            draw_images(self._whole, n, self._data(n) / STAGES["images"].place.name)
            return
        self._report("images", n)
        self.results["images"].sizes.append(n)
        self.results["images"].warm.append(Timing(n, self._run_images(process, n).seconds))

    def _run_images(self, process: StageProcess, n: int) -> RunCost:
        return process.run(self._values(images={"limit": n}), self._data(n))

    def _try_train(self, n_tokens: int) -> None:
        """Try `train` on growing numbers of tokens, with more images first and then with more epochs.

        Training goes on for as many tokens as the whole run has if there is time, because how often latents fire depends on it.
        """
        whole = {"epochs": self._params.train.epochs, "n_tokens": n_tokens}
        runs = self._training_runs(n_tokens)

        def train(process: StageProcess, i: int) -> RunCost:
            n, epochs = runs[i][1:]
            return process.run(self._values(train={"epochs": epochs}), self._data(n), whole)

        self._grow("train", [work for work, _, _ in runs], [n for _, n, _ in runs], train)

    def _training_runs(self, n_tokens: int) -> list[tuple[float, int, int]]:
        """Return tokens, images and epochs of each possible trial of `train`, in ascending order of tokens."""
        batch, sizes = self._params.train.batch_size, sorted(set(self.results["extract"].sizes))
        rows = {n: self._activations(n).rows("train") for n in sizes}
        most = min(10_000, max(1, n_tokens * self._params.train.epochs // max(1, rows[sizes[-1]])))
        full = [n for n in sizes if rows[n] >= batch] or sizes[-1:]  # steps on smaller batches would cost less
        epochs = sorted({2**i for i in range(most.bit_length())} | {most})
        runs = [(trained_tokens(rows[n], batch, 1), n, 1) for n in full]
        runs += [(trained_tokens(rows[sizes[-1]], batch, e), sizes[-1], e) for e in epochs if e > 1]
        return list({work: (work, n, e) for work, n, e in runs}.values())

    def _try_evaluate(self) -> list[int]:
        """Try `evaluate`, and return the numbers of images of its trials, ascending."""
        n_eval = {n: self._images(n).summary["n_eval"] for n in sorted(set(self.results["extract"].sizes))}
        sizes = [n for n, found in n_eval.items() if found >= FEWEST_EVAL] or list(n_eval)[-1:]

        def evaluate(process: StageProcess, i: int) -> RunCost:
            self._copy_artefact("train", sizes[i])
            return process.run(self._values(), self._data(sizes[i]))

        self._grow("evaluate", [n_eval[n] for n in sizes], sizes, evaluate)
        return sorted(set(self.results["evaluate"].sizes))

    def _try_label(self, n: int) -> None:
        """Try `label` once. Most of its time goes to embedding the words, however many the images; its events time the scores."""
        # On a sample few latents fire on `min_examples` images, and without scores their cost would not be seen. Labellers are replaced
        # by those for trials: models would be asked again in the run, and people have labelled latents of other SAEs.
        labellers = [labeller.model_dump(mode="json") for labeller in self._params.label.trial]
        values = self._values(label={"min_examples": 2, "labellers": labellers})
        self._run_alone("label", n, n, lambda process: process.run(values, self._data(n)))

    def _try_intervene(self, n: int) -> None:
        """Try `intervene` on growing numbers of latents, with all the images that the sample has."""
        params = self._params.intervene
        summaries = [evaluation.summary for evaluation in open_stage("evaluate", data=str(self._data(n))).each().values()]
        most = min(summary["n_latents"] for summary in summaries)
        match params.latents:
            case BestLatents(by=by, n=wanted):
                most = min(most, wanted * len(by))
            case ListedLatents(latents=listed):
                most = min(most, len(listed))
        chosen = sorted({2**i for i in range(most.bit_length())} | {most})
        works = [tested_images(params, summaries[0]["n_images"], k * len(summaries)) for k in chosen]

        def intervene(process: StageProcess, i: int) -> RunCost:
            return process.run(self._values(intervene=params.trial(chosen[i]).model_dump(mode="json")), self._data(n))

        self._grow("intervene", works, [n] * len(works), intervene)

    def _try_catalog(self, sizes: Sequence[int]) -> None:
        def build(process: StageProcess, i: int) -> RunCost:
            for stage in ("train", "label", "intervene"):
                self._copy_artefact(stage, sizes[i])
            return process.run(self._values(), self._data(sizes[i]))

        self._grow("catalog", sizes, sizes, build)

    def _grow(self, stage: str, works: Sequence[float], sizes: Sequence[int], run: Callable[[StageProcess, int], RunCost]) -> None:
        """Run trials of a stage as long as they are cheap, then the largest again in a process of its own.

        Only the latter shows how much memory a run takes, because what earlier runs leave behind stays in their process.
        """
        last = 0
        with self._process(stage) as process:

            def run_trial(i: int) -> float:
                nonlocal last
                last = i
                self._report(stage, sizes[i])
                self.results[stage].sizes.append(sizes[i])
                return run(process, i).seconds

            self.results[stage].warm = grow(run_trial, works, BUDGET)
        self._run_alone(stage, sizes[last], works[last], lambda process: run(process, last))

    def _run_alone(self, stage: str, n: int, work: float, run: Callable[[StageProcess], RunCost]) -> None:
        """Run a trial in a process of its own, as the stage will run in the end."""
        self._report(stage, n)
        results = self.results[stage]
        with self._process(stage) as process:
            answer = run(process)
            results.alone = Timing(work, answer.seconds + process.end())
        results.peak, results.spans = answer.peak, answer.spans
        results.sizes.append(n)
        self._largest[stage] = n

    def _report(self, stage: str, n: int) -> None:
        done = list(STAGES).index(stage)
        self._on_event(Progress(f"trial: {stage} on {n} images; stages done", done, N_TRIALS))

    def _values(self, **changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the params of a trial, nested."""
        values = self._params.model_dump(mode="json")
        values["extract"]["executor"] = self._executor.model_dump(mode="json")
        for section, change in changes.items():
            values[section] |= change
        return values

    def _copy_artefact(self, stage: str, n: int) -> None:
        """Copy the artefact of a stage's largest trial to the data root of trials of another size."""
        if n != self._largest[stage]:
            name = STAGES[stage].place.name
            shutil.copytree(self._data(self._largest[stage]) / name, self._data(n) / name, dirs_exist_ok=True)

    def _images(self, n: int) -> Artefact:
        return open_stage("images", data=str(self._data(n)))

    def _activations(self, n: int) -> Artefact:
        # Of several hookpoints, that with most values: its SAEs take the most memory. Trials train the SAEs of all of them.
        extraction = open_stage("extract", data=str(self._data(n)))
        each = [extraction.child(name, "activations") for name in dict.fromkeys(read for read, _ in self._params.read_and_decoded)]
        return max(each, key=lambda activations: activations.rows("train") * activations.summary["d_model"])

    def _data(self, n: int) -> Path:
        return self._root / str(n)

    @contextmanager
    def _process(self, stage: str) -> Iterator[StageProcess]:
        uri = f"sqlite:///{self._root / 'mlflow.db'}"  # not the database of real runs
        environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri, "OMMATID_CACHE_GB": "0"}  # Nothing is found, as in new runs.
        with StageProcess(stage, environment, self._root / f"{stage}.log") as process:
            yield process

    def _prepare_tracking(self) -> None:
        """Copy the MLflow database for the trials if there is one, because creating it takes seconds that the run would not take."""
        database = tracking.database()
        if database is not None:
            with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(self._root / "mlflow.db")) as copy:
                source.backup(copy)


def tested_images(params: InterveneParams, n_eval: float, n_latents: float) -> float:
    """Return the work of `intervene`: pairs of an image and a latent that is tested on it."""
    return min(params.n_images, n_eval) * n_latents


def trained_tokens(n_tokens: int, batch_size: int, epochs: int) -> int:
    """Return the number of tokens that training processes: whole batches, as `sae.schedule.make_plan` counts them."""
    batch = max(1, min(batch_size, n_tokens))
    return n_tokens // batch * batch * epochs
