"""Dictionaries under evaluation, and the two passes over the evaluation tokens in which they are measured.

A dictionary is the SAE, an untrained SAE, the raw neurons, or another baseline. The passes go shard by shard, and a killed run continues
from a checkpoint.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from ommatid import schemas
from ommatid.activations.batches import load_sample
from ommatid.compute.checkpoint import Accumulator, Checkpoint, State, inside, restore
from ommatid.compute.undefined import none_for_nan, nullable
from ommatid.config import EvaluateParams
from ommatid.config.evaluate import ImageActivation
from ommatid.errors import ConfigError
from ommatid.evaluate.batches import Images, iter_images, load_kinds
from ommatid.evaluate.classes import Meaning, PooledActivations, ProbeImages
from ommatid.evaluate.firings import Firings, HeatMaps, NearMisses, choose_examples
from ommatid.evaluate.latent_pairs import LevelFidelity, Structure
from ommatid.evaluate.monosemanticity import JudgeScores, JudgeSummary, Verdict
from ommatid.events import Listener
from ommatid.metrics import FidelityByKind, Firing, TopImages, coverage, nan_mean, purity, uniqueness
from ommatid.sae.baselines import Dictionary, Neurons, make_baseline
from ommatid.sae.model import SAE, make_untrained
from ommatid.store import Artefact, Draft

Pool = Callable[[Tensor], Tensor]
"""Function from token activations (images, tokens, latents) to image-level activations (images, latents)."""


def make_pool(image_activation: ImageActivation, kinds: Sequence[str], hookpoint: str) -> Pool:
    """Make the function that pools token activations into image-level ones as `evaluate.image_activation` says.

    Args:
        image_activation: The value of `evaluate.image_activation`.
        kinds: Kind of each token of an image.
        hookpoint: Name of the hookpoint, for messages.

    Returns:
        The function.

    Raises:
        ConfigError: `image_activation` is `cls`, but no class token was extracted.
    """
    match image_activation:
        case "max":
            return lambda acts: acts.amax(1)
        case "mean":
            return lambda acts: acts.mean(1)
        case "cls":
            if "cls" not in kinds:
                raise ConfigError(
                    f"evaluate.image_activation: cls needs a class token, but only {', '.join(sorted(set(kinds)))} tokens were extracted "
                    f"at {hookpoint}; set it to max or mean or, if the model has a class token, set extract.tokens to all or cls"
                )
            place = kinds.index("cls")
            return lambda acts: acts[:, place]
        case _:
            assert_never(image_activation)


N_PURITY = 16
"""Number of strongest images of a latent over which purity is taken (purity@16)."""
CONTROL_SEED = 12345
"""Seed of the controls. It differs from the usual training seeds, so that the controls share nothing with the SAE."""
CALIBRATION_TOKENS = 4096
"""Number of training tokens on which the untrained SAE's threshold is set."""
BASELINE_TOKENS = 2**17
"""Maximum number of training tokens on which baselines are fitted."""
BASELINE_VALUES = 2**26
"""Maximum number of values of these tokens (tokens x d_model), which take 256 MiB."""


class EvaluatedDictionary(Accumulator):
    """A dictionary under evaluation, and what the passes have accumulated about it."""

    STATE = ("fidelity", "levels", "near_misses", "firing", "judged", "top")

    def __init__(
        self,
        name: str,
        dictionary: Dictionary,
        kinds: Sequence[str] | None,
        judges: Sequence[JudgeSummary],
        pool: Pool,
        near_misses: NearMisses | None = None,
    ) -> None:
        """Begin an evaluation.

        Args:
            name: Name of the dictionary, such as `sae` or `neurons`.
            dictionary: The dictionary.
            kinds: Kind of each token of an image, by which fidelity is measured; None if the dictionary does not decode the target.
            judges: The judges, the main one first.
            pool: Function that makes image-level activations.
            near_misses: Collector of near misses; None unless the dictionary is the SAE.
        """
        self.name = name
        self._dictionary = dictionary
        self.fidelity = None if kinds is None else FidelityByKind(kinds)
        self.levels = LevelFidelity(dictionary) if name == "sae" and isinstance(dictionary, SAE) else None
        d_latents = dictionary.n_latents
        self.near_misses = near_misses
        self.firing = Firing(d_latents)
        self.judged = JudgeScores(d_latents, judges)
        self.verdicts: list[Verdict] = []
        self.top = TopImages(d_latents, N_PURITY)
        self._pool = pool

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary itself."""
        return self._dictionary

    def add(self, batch: Images) -> Float32[Tensor, "images latents"]:
        """Add a batch in the first pass, and return its image-level activations, (images, latents)."""
        x = batch.x.flatten(0, 1)
        shape = batch.x.shape[:2]
        if self.near_misses and isinstance(self._dictionary, SAE):
            acts, margins = self._dictionary.encode_with_margins(x)
            pooled = self._pool(acts.unflatten(0, shape))
            self.near_misses.add(batch.numbers, margins.unflatten(0, shape), pooled)
        else:
            acts = self._dictionary.encode(x)
            pooled = self._pool(acts.unflatten(0, shape))
        if self.fidelity:
            self.fidelity.add(batch.target, self._dictionary.decode(acts).unflatten(0, shape), acts.unflatten(0, shape))
        if self.levels:
            self.levels.add(batch.target.flatten(0, 1), acts)
        self.firing.add(acts, pooled)
        self.judged.add(pooled, batch.judges)
        self.top.add(pooled, batch.numbers)
        return pooled

    def begin_second_pass(self) -> None:
        """End the first pass and begin the second."""
        self.judged.begin_second_pass()

    def add_again(self, batch: Images) -> Float32[Tensor, "images tokens latents"]:
        """Add a batch in the second pass, and return its token activations, (images, tokens, latents)."""
        acts = self._dictionary.encode(batch.x.flatten(0, 1)).unflatten(0, batch.x.shape[:2])
        self.judged.add(self._pool(acts), batch.judges)
        return acts

    def end(self) -> None:
        """End the second pass, which determines the verdicts."""
        self.verdicts = self.judged.verdicts()

    def purity(self, labels: Mapping[int, str]) -> list[float]:
        """Return purity@16 of each latent; NaN unless all of its 16 strongest images activate it and have a label."""
        return purity(self.top_labels(labels), N_PURITY)

    def top_labels(self, labels: Mapping[int, str]) -> list[list[str]]:
        """Return the labels of each latent's strongest images, the strongest first; images without a label are left out."""
        return [[labels[i] for i in images if i in labels] for images in self.top_images()]

    def top_images(self) -> list[list[int]]:
        """Return the numbers of the up to 16 images that activate each latent most, the strongest first."""
        fires = (self.top.acts > 0).T.tolist()
        images = self.top.images.T.tolist()
        return [[i for i, fired in zip(*pair, strict=True) if fired] for pair in zip(images, fires, strict=True)]

    def uniqueness(self) -> Float64[Tensor, " latents"]:
        """Return the uniqueness of each latent, (latents,); NaN if fewer than 16 images activate it."""
        return uniqueness(torch.where(self.top.acts > 0, self.top.images, -1).T.contiguous())

    def compare(self, sae: str, labels: Mapping[int, str]) -> dict[str, Any]:
        """Return this dictionary's row of the table `comparisons`, in which MS is by the main judge."""
        fidelity = self.fidelity.whole if self.fidelity else None
        values = {
            "fvu": fidelity.fvu if fidelity else math.nan,
            "cosine": fidelity.cosine if fidelity else math.nan,
            "purity": nan_mean(torch.tensor(self.purity(labels), dtype=torch.float64)),
            "coverage": coverage(self.top_labels(labels), N_PURITY, len(set(labels.values()))),
            "uniqueness": nan_mean(self.uniqueness()),
        }
        return {
            "sae": sae,
            "dictionary": self.name,
            "n_latents": len(self.firing.count),
            "l0": float(self.firing.count.sum()) / self.firing.n_tokens,
            "dead": float(self.firing.is_dead.double().mean()),
            **self.verdicts[0].headline,
            **none_for_nan(values),
        }

    def fidelity_rows(self, sae: str) -> list[dict[str, Any]]:
        """Return this dictionary's rows of the table `fidelity`: one for each kind of token, and one for all tokens."""
        by_kind = {**self.fidelity.of, "all": self.fidelity.whole} if self.fidelity else {}
        return [
            {"sae": sae, "dictionary": self.name, "kind": kind, "n_tokens": fidelity.n}
            | none_for_nan({"fvu": fidelity.fvu, "cosine": fidelity.cosine, "l0": fidelity.l0})
            for kind, fidelity in by_kind.items()
        ]


def make_dictionaries(sae: SAE, activations: Artefact, params: EvaluateParams) -> list[EvaluatedDictionary]:
    """Make the dictionaries to evaluate: the SAE, its two controls, and the baselines of `evaluate.baselines`, in this order."""
    judges, kinds = JudgeSummary.all_of(activations), load_kinds(activations)
    pool = make_pool(params.image_activation, kinds, activations.summary["hookpoint"])
    # A mean activation is positive if any token's is, so the largest margin counts.
    reach = make_pool("max" if params.image_activation == "mean" else params.image_activation, kinds, activations.summary["hookpoint"])
    controls: dict[str, Dictionary] = {
        "untrained": make_untrained(sae.config, load_sample(activations, CALIBRATION_TOKENS), CONTROL_SEED),
        "neurons": Neurons(sae.config.d_model),
    }
    if params.baselines:
        sample = load_sample(activations, min(BASELINE_TOKENS, BASELINE_VALUES // sae.config.d_model))
        controls |= {kind: make_baseline(kind, sae.config, sample, CONTROL_SEED) for kind in params.baselines}
    is_transcoder = sae.config.target is not None  # beside a transcoder, fidelity is its own only: the rest decode what they encode
    evaluated = [EvaluatedDictionary("sae", sae, kinds, judges, pool, NearMisses(sae, reach))]
    for name, control in controls.items():
        evaluated.append(EvaluatedDictionary(name, control, None if name == "neurons" or is_transcoder else kinds, judges, pool))
    return evaluated


def make_latents(
    sae: str,
    dictionary: EvaluatedDictionary,
    labels: Mapping[int, str],
    dead_in_training: list[int],
    meaning: Meaning,
    structure: Structure,
) -> pa.Table:
    """Make the table `latents`.

    Args:
        sae: Name of the SAE.
        dictionary: The SAE after both passes.
        labels: Label of each evaluation image that has one, by image number.
        dead_in_training: Latents that were dead at the end of training.
        meaning: Measures by labels and taxonomy.
        structure: Relations between the latents.

    Returns:
        The table, one row for each latent.
    """
    firing = dictionary.firing
    n = len(firing.count)
    judged = dictionary.verdicts[0]
    classes = [[name for name, _ in Counter(top).most_common(3)] for top in dictionary.top_labels(labels)]
    duplicate_of = structure.duplicate_of.numpy()
    was_dead = torch.zeros(n, dtype=torch.bool)
    was_dead[dead_in_training] = True
    columns = {
        "sae": [sae] * n,
        "latent": np.arange(n, dtype=np.int32),
        "density": firing.density.numpy(),
        "mean_act": nullable(firing.mean),
        "max_act": firing.max.numpy(),
        "n_images": firing.n_images.int().numpy(),
        "is_dead": firing.is_dead.numpy(),
        "dead_in_training": was_dead.numpy(),
        "ms": nullable(judged.ms),
        "ms_low": nullable(judged.low),
        "ms_high": nullable(judged.high),
        "purity": nullable(torch.tensor(dictionary.purity(labels), dtype=torch.float64)),
        "purity_64": nullable(meaning.purity_64),
        "top_classes": classes,
        "label_entropy": nullable(meaning.label_entropy),
        "lca_depth": nullable(meaning.lca_depth).cast(pa.int32()),
        "uniqueness": nullable(dictionary.uniqueness()),
        "is_dense": firing.is_dense.numpy(),
        "is_rare": firing.is_rare.numpy(),
        "duplicate_of": pa.array(duplicate_of, pa.int32(), mask=duplicate_of < 0),
    }
    return pa.table(columns, schema=schemas.LATENTS)


class Passes:
    """The two passes over the evaluation images.

    The first pass measures the dictionaries and writes the firings of the SAE. Then examples are chosen, and the second pass collects
    their heat maps and the confidence intervals of the scores.
    """

    def __init__(
        self, params: EvaluateParams, inputs: Mapping[str, Artefact], sae: SAE, probed: ProbeImages, draft: Draft, on_event: Listener
    ) -> None:
        self._params = params
        self._inputs = inputs
        self._sae = sae
        self._draft = draft
        self._on_event = on_event
        sae_name = inputs["train"].summary["sae"]
        # The name tells SAEs apart, because their drafts share a scratch folder.
        self._checkpoint = Checkpoint(draft, f"{draft.scratch.name}/evaluate-{sae_name}.safetensors")
        self.dictionaries = make_dictionaries(sae, inputs["extract"], params)
        """Dictionaries under evaluation, the SAE first."""
        self.firings = Firings(draft, sae_name)
        """Writer of the SAE's firings."""
        self.pooled = PooledActivations(probed, sae.config.d_model)
        """Mean activations of the images that probes use."""
        self.heat: HeatMaps
        """Heat maps of the examples, from the end of the first pass on."""

    def run(self) -> None:
        """Run both passes, or the rest of them if a killed run left a checkpoint."""
        state = self._load()
        n_done, shard = state["at"].tolist() if state else (0, 0)
        if n_done == 0:
            self._run_first(state, shard)
        else:
            self.firings.load_state_dict(inside(state, "firings"))
        self.heat = HeatMaps(choose_examples(self._draft, self.firings, self._params), self._inputs["extract"].summary["grid"])
        for dictionary in self.dictionaries:
            dictionary.begin_second_pass()
        self._run_second(*((state, shard) if n_done else ({}, 0)))

    def remove_checkpoint(self) -> None:
        """Delete the checkpoint, which is not needed once the artefact is sealed."""
        self._checkpoint.remove()

    def _load(self) -> State:
        """Return the last checkpoint, or nothing if a part of the firings that it relies on has been damaged since."""
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
        """Iterate over the batches of a pass, or of the rest of it, saving a checkpoint at the start of a shard whenever one is due.

        Args:
            n_done: Number of complete passes.
            objects: Everything that accumulates, by name; the checkpoint's content.
            state: State of the objects at the start of the first shard; empty at the start of a pass.
            shard: Index of the first shard.
            target: Activations to decode; None if they are those that are encoded.
            what: Name of the pass in the progress events.

        Yields:
            Batches, each of which must have been added to the objects before the next is requested.
        """
        if state:
            restore(objects, state)
        # Nothing is saved at the first shard, except at the start of the second pass, where a checkpoint preserves the whole first pass.
        done = shard if state or n_done == 0 else -1
        n_images = self._inputs["images"].summary["n_eval"]
        for batch in iter_images(self._inputs["extract"], target, self._sae.n_latents, n_images, what, self._on_event, shard):
            if batch.shard > done and self._checkpoint.is_due:
                self._checkpoint.save({"at": torch.tensor([n_done, batch.shard]), **objects})
            done = batch.shard
            yield batch
