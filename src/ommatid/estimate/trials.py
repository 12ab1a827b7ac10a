"""Trials of the whole line: each stage for real, on samples of the images that grow while they are cheap."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ommatid import tracking
from ommatid.config import ExtractParams, Params
from ommatid.estimate.fit import Timed, grow, trial_sizes
from ommatid.estimate.process import RunCost, StageProcess
from ommatid.estimate.sample import draw_images
from ommatid.events import Listener, Progress
from ommatid.pipeline import STAGES, open_stage
from ommatid.store import Artefact

BUDGET = 10.0
"""Seconds of one trial of one stage, at most as far as can be expected."""
FEWEST_EVAL = 16
"""Evaluation images of the smallest trial from `evaluate` on."""
N_TRIALS = 6
"""Kinds of them, for the progress: one a stage."""


@dataclass
class Tried:
    """What the trials of one stage showed."""

    sizes: list[int] = field(default_factory=list)
    """Images of each trial."""
    warm: list[Timed] = field(default_factory=list)
    """Runs in one process that had run the stage before."""
    alone: Timed | None = None
    """A process that ran only the largest trial; None: there was no need to."""
    peak: int = 0
    """Its largest resident set, in bytes."""
    spans: Mapping[str, float] = field(default_factory=dict)
    """Its seconds of each kind of work."""


class Trials:
    """Runs the trials of all stages; afterwards what they showed and what they made can be asked for."""

    def __init__(self, params: Params, whole: Artefact | None, n_items: int, root: Path, on_event: Listener) -> None:
        """Prepare.

        Args:
            params: Of the whole run.
            whole: The images, where they are there already.
            n_items: Images of the whole run that go through stage `images`.
            root: An empty folder that is removed afterwards.
            on_event: Hears of the trials.
        """
        self.tried: dict[str, Tried] = {stage: Tried() for stage in STAGES}
        assert isinstance(params.extract, ExtractParams), params.extract
        self._params = params
        self._executor = params.extract.executor.trial
        self._whole = whole
        self._sizes = trial_sizes(n_items)
        self._root = root
        self._on_event = on_event
        self._largest: dict[str, int] = {}

    def artefact(self, stage: str) -> Artefact:
        """What the largest trial of a stage made; of `extract` all hookpoints."""
        return open_stage(stage, data=str(self._data(self._largest[stage])))

    def activations(self) -> Artefact:
        """What the largest trial extracted for training."""
        return self._activations(self._largest["extract"])

    def run(self, tokens_of: Callable[[Artefact, Artefact], float]) -> None:
        """Run all trials.

        Args:
            tokens_of: Training tokens of the whole run, from images and activations of a trial.

        Raises:
            OmmatidError: what a stage raised on a sample, or a process that died.
        """
        self._prepare_tracking()
        self._try_images_and_extract()
        tokens = int(tokens_of(self.artefact("images"), self.activations()))
        self._try_train(tokens)
        sizes = self._try_evaluate()
        self._try_label(sizes[-1])
        self._try_catalog(sizes)

    def _try_images_and_extract(self) -> None:
        with self._process("images") as images:
            made: set[int] = set()

            def make(n: int) -> None:
                if n not in made:
                    made.add(n)
                    self._make_images(images, n)

            def extract(process: StageProcess, i: int) -> RunCost:
                make(self._sizes[i])
                return process.run(self._values(), self._data(self._sizes[i]))

            make(self._sizes[0])
            self.tried["images"].warm.clear()  # the first paid for imports and first calls
            if self._whole is None:
                self._make_images(images, self._sizes[0])
            self._grow("extract", self._sizes, self._sizes, extract)
        if self._whole is None:
            n = self._largest["images"]
            self._alone("images", n, n, lambda process: self._run_images(process, n))

    def _make_images(self, process: StageProcess, n: int) -> None:
        self._largest["images"] = n
        if self._whole is not None:
            draw_images(self._whole, n, self._data(n) / STAGES["images"].place.name)
            return
        self._tell("images", n)
        self.tried["images"].sizes.append(n)
        self.tried["images"].warm.append(Timed(n, self._run_images(process, n).seconds))

    def _run_images(self, process: StageProcess, n: int) -> RunCost:
        return process.run(self._values(images={"limit": n}), self._data(n))

    def _try_train(self, n_tokens: int) -> None:
        """Grow the tokens: first by more images, then by more epochs, up to those of the whole: how often latents fire depends on them."""
        whole = {"epochs": self._params.train.epochs, "n_tokens": n_tokens}
        runs = self._training_runs(n_tokens)

        def train(process: StageProcess, i: int) -> RunCost:
            n, epochs = runs[i][1:]
            return process.run(self._values(train={"epochs": epochs}), self._data(n), whole)

        self._grow("train", [work for work, _, _ in runs], [n for _, n, _ in runs], train)

    def _training_runs(self, n_tokens: int) -> list[tuple[float, int, int]]:
        """Tokens, images and epochs of each trial there can be, in order of the tokens."""
        batch, sizes = self._params.train.batch_size, sorted(set(self.tried["extract"].sizes))
        rows = {n: self._activations(n).rows("train") for n in sizes}
        most = min(10_000, max(1, n_tokens * self._params.train.epochs // max(1, rows[sizes[-1]])))
        full = [n for n in sizes if rows[n] >= batch] or sizes[-1:]  # a smaller batch would be another step
        epochs = sorted({2**i for i in range(most.bit_length())} | {most})
        found = [(trained_tokens(rows[n], batch, 1), n, 1) for n in full]
        found += [(trained_tokens(rows[sizes[-1]], batch, e), sizes[-1], e) for e in epochs if e > 1]
        return list({work: (work, n, e) for work, n, e in found}.values())

    def _try_evaluate(self) -> list[int]:
        """Gives the sizes that were evaluated, in order."""
        n_eval = {n: self._images(n).summary["n_eval"] for n in sorted(set(self.tried["extract"].sizes))}
        sizes = [n for n, found in n_eval.items() if found >= FEWEST_EVAL] or list(n_eval)[-1:]

        def evaluate(process: StageProcess, i: int) -> RunCost:
            self._lend("train", sizes[i])
            return process.run(self._values(), self._data(sizes[i]))

        self._grow("evaluate", [n_eval[n] for n in sizes], sizes, evaluate)
        return sorted(set(self.tried["evaluate"].sizes))

    def _try_label(self, n: int) -> None:
        """Once: most of its time goes to the words, which a sample has, too; how long the scores take, its events say."""
        # on a sample few latents fire on as many images as params ask for, and what a score costs would not be seen
        # nobody is asked for what will be asked again, and people named latents of the whole run's SAEs
        labellers = [labeller.model_dump(mode="json") for labeller in self._params.label.trial]
        values = self._values(label={"min_examples": 2, "labellers": labellers})
        self._alone("label", n, n, lambda process: process.run(values, self._data(n)))

    def _try_catalog(self, sizes: Sequence[int]) -> None:
        def build(process: StageProcess, i: int) -> RunCost:
            for stage in ("train", "label"):
                self._lend(stage, sizes[i])
            return process.run(self._values(), self._data(sizes[i]))

        self._grow("catalog", sizes, sizes, build)

    def _grow(self, stage: str, works: Sequence[float], sizes: Sequence[int], run: Callable[[StageProcess, int], RunCost]) -> None:
        """Run trials of a stage while they are cheap; then the largest again, in a process that does nothing else.

        Memory is only seen in the latter: what a run leaves behind stays in its process, and a second one comes on top of it.
        """
        last = 0
        with self._process(stage) as process:

            def one(i: int) -> float:
                nonlocal last
                last = i
                self._tell(stage, sizes[i])
                self.tried[stage].sizes.append(sizes[i])
                return run(process, i).seconds

            self.tried[stage].warm = grow(one, works, BUDGET)
        self._alone(stage, sizes[last], works[last], lambda process: run(process, last))

    def _alone(self, stage: str, n: int, work: float, run: Callable[[StageProcess], RunCost]) -> None:
        """Run a trial as the whole will be run: in a process of its own."""
        self._tell(stage, n)
        tried = self.tried[stage]
        with self._process(stage) as process:
            answer = run(process)
            tried.alone = Timed(work, answer.seconds + process.end())
        tried.peak, tried.spans = answer.peak, answer.spans
        tried.sizes.append(n)
        self._largest[stage] = n

    def _tell(self, stage: str, n: int) -> None:
        done = list(STAGES).index(stage)
        self._on_event(Progress(f"trial: {stage} of {n} images, stages tried", done, N_TRIALS))

    def _values(self, **changes: Mapping[str, Any]) -> dict[str, Any]:
        """Params of a trial."""
        values = self._params.model_dump(mode="json")
        values["extract"]["executor"] = self._executor.model_dump(mode="json")
        for section, change in changes.items():
            values[section] |= change
        return values

    def _lend(self, stage: str, n: int) -> None:
        """Give the artefact of a stage's largest trial to the trials of another size."""
        if n != self._largest[stage]:
            name = STAGES[stage].place.name
            shutil.copytree(self._data(self._largest[stage]) / name, self._data(n) / name, dirs_exist_ok=True)

    def _images(self, n: int) -> Artefact:
        return open_stage("images", data=str(self._data(n)))

    def _activations(self, n: int) -> Artefact:
        return open_stage("extract", self._params.hookpoint, str(self._data(n)))

    def _data(self, n: int) -> Path:
        return self._root / str(n)

    @contextmanager
    def _process(self, stage: str) -> Iterator[StageProcess]:
        uri = f"sqlite:///{self._root / 'mlflow.db'}"  # no trial is recorded where runs are
        environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri}
        with StageProcess(stage, environment, self._root / f"{stage}.log") as process:
            yield process

    def _prepare_tracking(self) -> None:
        """Where there is an MLflow database the trials start with a copy of it: to make one takes seconds that the run would not."""
        found = tracking.database()
        if found is not None:
            with closing(sqlite3.connect(found)) as theirs, closing(sqlite3.connect(self._root / "mlflow.db")) as ours:
                theirs.backup(ours)


def trained_tokens(n_tokens: int, batch_size: int, epochs: int) -> int:
    """Tokens that training goes through: whole batches, as `sae.schedule.make_plan` counts them."""
    batch = max(1, min(batch_size, n_tokens))
    return n_tokens // batch * batch * epochs
