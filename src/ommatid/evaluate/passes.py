"""Two passes over the evaluation tokens, shard by shard: what they leave, and how they go on after a kill."""

from collections.abc import Iterator, Mapping
from typing import Any

from ommatid.config import EvaluateParams
from ommatid.evaluate.checkpoint import Checkpoint
from ommatid.evaluate.examples import Heat, choose_examples
from ommatid.evaluate.firings import Firings
from ommatid.evaluate.probes import Pooled, ProbeImages
from ommatid.evaluate.stream import Images, iter_images
from ommatid.evaluate.subject import make_subjects
from ommatid.events import Listener
from ommatid.sae.model import SAE
from ommatid.store import Artefact, Draft


class Passes:
    """The first pass accumulates, the second gives the intervals and the heat maps of the examples that were chosen in between."""

    def __init__(
        self, params: EvaluateParams, inputs: Mapping[str, Artefact], sae: SAE, probed: ProbeImages, draft: Draft, on_event: Listener
    ) -> None:
        self._params = params
        self._inputs = inputs
        self._sae = sae
        self._draft = draft
        self._on_event = on_event
        self._checkpoint = Checkpoint(draft, inputs["train"].summary["sae"])
        self.subjects = make_subjects(sae, inputs["extract"], params)
        """The SAE first."""
        self.firings = Firings(draft, inputs["train"].summary["sae"])
        """Of the SAE."""
        self.pooled = Pooled(probed, sae.config.d_model)
        """Activations for the probes."""
        self.heat: Heat
        """Of the examples."""

    def run(self) -> None:
        """Make both, or what a run that was killed left of them."""
        if self._checkpoint.n_passes == 0:
            self._checkpoint.restore(self._state())
            self._run_first()
        else:
            self._checkpoint.restore({"firings": self.firings})
        examples = choose_examples(self._draft, self.firings, self._params)
        self.heat = Heat(examples, self._inputs["extract"].summary["grid"])
        for subject in self.subjects:
            subject.begin_second_pass()
        self._checkpoint.restore(self._state())  # after the second pass has begun: of nothing, where the first is not made again
        self._run_second()

    def forget(self) -> None:
        """Drop the checkpoint: all is written."""
        self._checkpoint.remove()

    def _run_first(self) -> None:
        for batch in self._iter(0, self._inputs.get("target"), "evaluate images, first pass"):
            self.pooled.add(batch)
            for subject in self.subjects:
                acts = subject.add(batch)
                if subject.name == "sae":
                    self.firings.add(batch.numbers, acts)
        self.firings.close()

    def _run_second(self) -> None:
        for batch in self._iter(1, None, "evaluate images, second pass"):
            for subject in self.subjects:
                acts = subject.add_again(batch)
                if subject.name == "sae":
                    self.heat.add(batch.numbers, acts)
        for subject in self.subjects:
            subject.end()

    def _iter(self, n: int, target: Artefact | None, what: str) -> Iterator[Images]:
        """What is left of a pass."""
        first = self._checkpoint.shard if self._checkpoint.n_passes == n else 0
        n_images = self._inputs["images"].summary["n_eval"]
        for batch in iter_images(self._inputs["extract"], target, self._sae.n_latents, n_images, what, self._on_event, first):
            self._checkpoint.reach(n, batch.shard, self._state())
            yield batch

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}
