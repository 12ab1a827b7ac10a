"""Stage `label`: a name from a vocabulary for every latent, and its detection score on images that did not make it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter
from torch import Tensor

from ommatid import schemas
from ommatid.config import LabelParams, Model
from ommatid.events import Listener, Progress, ignore
from ommatid.halves import Fired, Halves, iter_fired, load_halves
from ommatid.label.examples import MAX_FIRING, N_HARD_LATENTS, draw_test
from ommatid.label.vocabulary import Vocabulary, embed_words, load_words
from ommatid.metrics import auroc, balanced_accuracy, best_threshold, nan_mean, unit
from ommatid.sae.model import SAE
from ommatid.store import Artefact, Draft
from ommatid.tensors import from_float32
from ommatid.vlm import load_model

LABELLER = "vocabulary"


@dataclass(frozen=True)
class Material:
    """What names are made of and tried on, whichever SAE they are for."""

    vocabulary: Vocabulary
    """The names there can be."""
    halves: Halves
    """The evaluation images."""
    images: Tensor
    """Their joint embeddings, (images, d_joint) float32."""


def load_material(params: LabelParams, inputs: Mapping[str, Artefact]) -> Material:
    """Embed the words, and read the images' embeddings.

    Raises:
        ConfigError: a vocabulary is missing or empty.
        ModelError: the model's text tower cannot be loaded.
    """
    vocabulary = _embed(load_words(params.vocabularies), inputs["extract"])
    halves = load_halves(inputs["images"])
    return Material(vocabulary, halves, _load_joint(inputs["extract"], halves))


def label(
    params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore, material: Material | None = None
) -> Artefact:
    """Name every latent of one SAE by `params.vocabularies` and score the names.

    Args:
        params: The section `label`.
        inputs: `images`, the activations (`extract`), the SAE (`train`) and its evaluation (`evaluate`).
        draft: Of the SAE's labels.
        on_event: Hears of the latents.
        material: What `load_material` gave, where several SAEs share it; None: it is loaded.

    Raises:
        ConfigError, ModelError: as `load_material` does.
    """
    material = material or load_material(params, inputs)
    vocabulary, halves, images = material.vocabulary, material.halves, material.images
    temp, files = str(draft.scratch), inputs["evaluate"].files("firings")
    d_sae = inputs["train"].manifest.params["d_sae"]
    gathered = _Gathered(d_sae, images, halves, params)
    for fired in iter_fired(files, halves, temp):
        gathered.add(fired)
    indices, similarity = vocabulary.nearest(gathered.directions)
    control = _shuffle(indices, gathered.is_named, params.seed)
    scorer = _Scorer(images, halves, vocabulary, _nearest_latents(inputs["train"]), gathered.samples, params.seed)
    rows = [_row(latent, "too_few_examples") for latent in range(d_sae)]
    for fired in iter_fired(files, halves, temp):
        i = fired.latent
        if gathered.is_named[i]:
            scores = scorer.score(fired, int(indices[i]), int(control[i]))
            rows[i] = _row(i, "ok", label=vocabulary.words[int(indices[i])], similarity=float(similarity[i]), **scores)
        on_event(Progress("score labels", i + 1, d_sae))
    name = inputs["train"].summary["sae"]
    table = pa.Table.from_pylist([{"sae": name, **row} for row in rows], schema=schemas.LABELS)
    draft.write_table("labels.parquet", table)
    return draft.seal(_summarise(rows, len(vocabulary.words), halves))


def _embed(words: tuple[str, ...], activations: Artefact) -> Vocabulary:
    params = activations.manifest.params
    namer = TypeAdapter(Model).validate_python(params["namer"] or params["model"])
    return embed_words(load_model(namer, params["dtype"], "cpu"), words)


def _load_joint(activations: Artefact, halves: Halves) -> Tensor:
    """Joint embeddings of the evaluation images, centred on the naming half, unit norm: (images, d_joint) float32."""
    joint = torch.empty(len(halves.images), activations.summary["d_joint"])
    for batch in activations.iter_batches("embeddings", ["image", "joint"], n_rows=4096):
        numbers = batch["image"].to_numpy()
        place = np.searchsorted(halves.images, numbers).clip(max=len(halves.images) - 1)
        keep = halves.images[place] == numbers
        joint[torch.from_numpy(place[keep])] = from_float32(batch["joint"])[torch.from_numpy(keep)]
    naming = joint[torch.from_numpy(~halves.is_held_out)]
    return torch.nn.functional.normalize(joint - naming.mean(0), dim=1) if len(naming) else joint


class _Gathered:
    """What one pass over the firings leaves of each latent."""

    def __init__(self, d_sae: int, images: Tensor, halves: Halves, params: LabelParams) -> None:
        self._images = images
        self._halves = halves
        self._params = params
        self.directions = torch.zeros(d_sae, images.shape[1], dtype=torch.float64)
        """Activation-weighted mean of the strongest naming images, (d_sae, d_joint)."""
        self.is_named = np.zeros(d_sae, dtype=bool)
        """Whether both halves have enough firing images."""
        self.samples: dict[int, np.ndarray] = {}
        """Some rows that fire each latent, for its neighbours' hard negatives."""

    def add(self, fired: Fired) -> None:
        held_out = self._halves.is_held_out[fired.rows]
        n_held_out = int(held_out.sum())
        fewest = min(n_held_out, len(held_out) - n_held_out)
        self.is_named[fired.latent] = fewest >= self._params.min_examples
        self.samples[fired.latent] = fired.rows[:: max(1, len(fired.rows) // MAX_FIRING)][:MAX_FIRING]
        chosen = np.flatnonzero(~held_out)[: self._params.n_examples]
        if len(chosen):
            weights = torch.from_numpy(fired.acts[chosen])
            self.directions[fired.latent] = weights @ self._images[torch.from_numpy(fired.rows[chosen])].double() / weights.sum()


@dataclass(frozen=True)
class _Scorer:
    """Detection: does the name's embedding tell the latent's firing images from others."""

    images: Tensor
    halves: Halves
    vocabulary: Vocabulary
    neighbours: np.ndarray
    samples: Mapping[int, np.ndarray]
    seed: int

    def score(self, fired: Fired, word: int, control: int) -> dict[str, float]:
        """Scores of a word, and of a word that belongs to another latent, on the same images."""
        rng = np.random.default_rng([self.seed, fired.latent])
        near = [self.samples[i] for i in self.neighbours[fired.latent].tolist() if i in self.samples]
        tests = [draw_test(fired, self.halves, held_out, near, rng) for held_out in (False, True)]
        if any(len(test.negative) == 0 for test in tests):
            return {}  # it fires on every image: there is nothing to tell apart
        mine, area = self._detect(word, *tests)
        other, _ = self._detect(control, *tests)
        return {"score": mine, "auroc": area[0], "auroc_low": area[1], "auroc_high": area[2], "control_score": other}

    def _detect(self, word: int, naming: Any, held_out: Any) -> tuple[float, tuple[float, float, float]]:
        text = self.vocabulary.embeddings[word].float()
        seen = [self.images[torch.from_numpy(rows)] @ text for rows in (naming.positive, naming.negative)]
        new = [self.images[torch.from_numpy(rows)] @ text for rows in (held_out.positive, held_out.negative)]
        return balanced_accuracy(new[0], new[1], best_threshold(seen[0], seen[1])), auroc(new[0], new[1])


def _nearest_latents(sae: Artefact, block: int = 1024) -> np.ndarray:
    """The latents with the nearest directions, (d_sae, N_HARD_LATENTS), without itself."""
    directions = unit(SAE.load(sae.path).W_dec).float()
    n = min(N_HARD_LATENTS + 1, len(directions))
    nearest = torch.cat([(rows @ directions.T).topk(n, dim=1).indices for rows in directions.split(block)])
    return nearest[:, 1:].numpy()


def _shuffle(indices: Tensor, is_named: np.ndarray, seed: int) -> Tensor:
    """For each named latent the word of another one: a rotation of a seeded order."""
    named = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(is_named))
    control = indices.clone()
    control[torch.from_numpy(named)] = indices[torch.from_numpy(np.roll(named, 1))]
    return control


def _row(latent: int, status: str, **values: Any) -> dict[str, Any]:
    return {"latent": latent, "labeller": LABELLER, "status": status, **values}


def _summarise(rows: list[dict[str, Any]], n_words: int, halves: Halves) -> dict[str, Any]:
    scored = [row for row in rows if row.get("score") is not None]
    columns = {name: torch.tensor([row[name] for row in scored], dtype=torch.float64) for name in ("score", "auroc", "control_score")}
    return {
        "n_latents": len(rows),
        "n_labelled": sum(row["status"] == "ok" for row in rows),
        "n_scored": len(scored),
        "n_words": n_words,
        "n_naming_images": int((~halves.is_held_out).sum()),
        "n_held_out_images": int(halves.is_held_out.sum()),
        "score": nan_mean(columns["score"]) if scored else None,
        "auroc": nan_mean(columns["auroc"]) if scored else None,
        "control_score": nan_mean(columns["control_score"]) if scored else None,
        "beats_control": float((columns["score"] > columns["control_score"]).double().mean()) if scored else None,
    }
