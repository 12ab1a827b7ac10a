"""Two passes over the evaluation tokens, shard by shard: what they accumulate, and how they continue after a kill."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ommatid.compute.checkpoint import Checkpoint, State, inside, restore
from ommatid.config import EvaluateParams
from ommatid.evaluate.batches import Images, iter_images
from ommatid.evaluate.classes import Pooled, ProbeImages
from ommatid.evaluate.dictionaries import make_dictionaries
from ommatid.evaluate.firings import Firings, Heat, choose_examples
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
        sae_name = inputs["train"].summary["sae"]
        self._checkpoint = Checkpoint(draft, f"{draft.scratch.name}/evaluate-{sae_name}.safetensors")  # drafts of several SAEs share it
        self.dictionaries = make_dictionaries(sae, inputs["extract"], params)
        """The SAE first."""
        self.firings = Firings(draft, sae_name)
        """Of the SAE."""
        self.pooled = Pooled(probed, sae.config.d_model)
        """Activations for the probes."""
        self.heat: Heat
        """Of the examples."""

    def run(self) -> None:
        """Make both passes, or what is left of them after a run that was killed."""
        state = self._load()
        n_done, shard = state["at"].tolist() if state else (0, 0)
        if n_done == 0:
            self._run_first(state, shard)
        else:
            self.firings.load_state_dict(inside(state, "firings"))
        self.heat = Heat(choose_examples(self._draft, self.firings, self._params), self._inputs["extract"].summary["grid"])
        for dictionary in self.dictionaries:
            dictionary.begin_second_pass()
        self._run_second(*((state, shard) if n_done else ({}, 0)))

    def forget(self) -> None:
        """Delete the checkpoint once everything is written."""
        self._checkpoint.remove()

    def _load(self) -> State:
        """The last checkpoint, unless a part of the firings that it counts on was damaged since."""
        return self._checkpoint.load() if all([self._draft.has(name) for name in self._draft.names()]) else {}

    def _run_first(self, state: State, shard: int) -> None:
        objects = {"dictionaries": self.dictionaries, "firings": self.firings, "pooled": self.pooled}
        for batch in self._iter(0, objects, state, shard, self._inputs.get("target"), "evaluate images, first pass"):
            self.pooled.add(batch)
            for dictionary in self.dictionaries:
                acts = dictionary.add(batch)
                if dictionary.name == "sae":
                    self.firings.add(batch.numbers, acts)
        self.firings.close()

    def _run_second(self, state: State, shard: int) -> None:
        objects = {"dictionaries": self.dictionaries, "firings": self.firings, "pooled": self.pooled, "heat": self.heat}
        for batch in self._iter(1, objects, state, shard, None, "evaluate images, second pass"):
            for dictionary in self.dictionaries:
                acts = dictionary.add_again(batch)
                if dictionary.name == "sae":
                    self.heat.add(batch.numbers, acts)
        for dictionary in self.dictionaries:
            dictionary.end()

    def _iter(
        self, n_done: int, objects: Mapping[str, Any], state: State, shard: int, target: Artefact | None, what: str
    ) -> Iterator[Images]:
        """The rest of a pass, from a shard on; where a shard begins and a checkpoint is due, one of `objects` is written.

        Args:
            n_done: Passes that are complete.
            objects: Everything that accumulates.
            state: Their state where the shard begins; empty at the beginning of the pass.
            shard: The first shard.
            target: Activations to decode, where they are not those that are encoded.
            what: Words for the progress.
        """
        if state:
            restore(objects, state)
        done = shard if state or n_done == 0 else -1  # where a second pass begins a checkpoint is worth the whole first one
        n_images = self._inputs["images"].summary["n_eval"]
        for batch in iter_images(self._inputs["extract"], target, self._sae.n_latents, n_images, what, self._on_event, shard):
            if batch.shard > done and self._checkpoint.is_due:
                self._checkpoint.save({"at": torch.tensor([n_done, batch.shard]), **objects})
            done = batch.shard
            yield batch
