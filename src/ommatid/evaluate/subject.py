"""A dictionary under evaluation: the SAE, an untrained one, the raw neurons, or another baseline."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.config import EvaluateParams
from ommatid.evaluate.judged import Judge, Judged, Verdict
from ommatid.evaluate.pool import Pool, make_pool
from ommatid.evaluate.stream import Images
from ommatid.metrics import Fidelity, Firing, TopImages, nan_mean, purity
from ommatid.reader import load_sample
from ommatid.sae.baselines import Dictionary, Neurons, make_baseline
from ommatid.sae.model import SAE, make_untrained
from ommatid.store import Artefact

N_PURITY = 16
"""Images of purity@16."""
CONTROL_SEED = 12345
"""Not the training seed: the controls share nothing with the SAE."""
CALIBRATION_TOKENS = 4096
"""Training tokens on which the untrained SAE's threshold is set."""
BASELINE_TOKENS = 2**17
"""Training tokens on which baselines are fitted, at most."""
BASELINE_VALUES = 2**26
"""Values of these tokens (tokens x d_model), at most: 256 MiB."""


class Subject:
    """A dictionary under evaluation: the SAE, an untrained one, the raw neurons, or another baseline."""

    def __init__(self, name: str, dictionary: Dictionary, decodes: bool, judges: Sequence[Judge], pool: Pool) -> None:
        self.name = name
        self.fidelity = Fidelity() if decodes else None
        d_latents = dictionary.n_latents
        self.firing = Firing(d_latents)
        self.judged = Judged(d_latents, judges)
        self.verdicts: list[Verdict] = []
        self.top = TopImages(d_latents, N_PURITY)
        self._dictionary = dictionary
        self._pool = pool

    def add(self, batch: Images) -> Tensor:
        """First pass; gives the image-level activations (images, latents)."""
        x = batch.x.flatten(0, 1)
        acts = self._dictionary.encode(x)
        pooled = self._pool(acts.unflatten(0, batch.x.shape[:2]))
        if self.fidelity:
            self.fidelity.add(batch.target.flatten(0, 1), self._dictionary.decode(acts), int((acts > 0).sum()))
        self.firing.add(acts, pooled)
        self.judged.add(pooled, batch.judges)
        self.top.add(pooled, batch.numbers)
        return pooled

    def begin_second_pass(self) -> None:
        """After the first."""
        self.judged.begin_second_pass()

    def add_again(self, batch: Images) -> Tensor:
        """Second pass; gives the token activations (images, tokens, latents)."""
        acts = self._dictionary.encode(batch.x.flatten(0, 1)).unflatten(0, batch.x.shape[:2])
        self.judged.add(self._pool(acts), batch.judges)
        return acts

    def end(self) -> None:
        """After the second pass."""
        self.verdicts = self.judged.verdicts()

    def purity(self, labels: Mapping[int, str]) -> list[float]:
        """Purity@16 of each latent; NaN without labels or with fewer than 16 firing images."""
        return purity([[labels[i] for i in images if i in labels] for images in self.top_images()], N_PURITY)

    def top_images(self) -> list[list[int]]:
        """The strongest firing images of each latent, strongest first."""
        fires = (self.top.acts > 0).T.tolist()
        images = self.top.images.T.tolist()
        return [[i for i, fired in zip(*pair, strict=True) if fired] for pair in zip(images, fires, strict=True)]

    def compare(self, sae: str, labels: Mapping[int, str]) -> dict[str, Any]:
        """The row of `comparisons`: MS by the main judge."""
        values = {
            "fvu": self.fidelity.fvu if self.fidelity else math.nan,
            "cosine": self.fidelity.cosine if self.fidelity else math.nan,
            "purity": nan_mean(torch.tensor(self.purity(labels), dtype=torch.float64)),
        }
        return {
            "sae": sae,
            "dictionary": self.name,
            "n_latents": len(self.firing.count),
            "l0": float(self.firing.count.sum()) / self.firing.n_tokens,
            "dead": float(self.firing.is_dead.double().mean()),
            **self.verdicts[0].headline,
            **{key: _none_if_nan(value) for key, value in values.items()},
        }


def make_subjects(sae: SAE, activations: Artefact, params: EvaluateParams) -> list[Subject]:
    """The SAE, its two controls, and the baselines that are asked for, in this order."""
    judges, pool = Judge.all_of(activations), make_pool(params, activations)
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
        Subject(name, dictionary, name == "sae" or (name != "neurons" and not is_transcoder), judges, pool)
        for name, dictionary in dictionaries.items()
    ]


def make_latents(sae: str, subject: Subject, labels: Mapping[int, str], dead_in_training: list[int]) -> pa.Table:
    """The `latents` table."""
    firing = subject.firing
    n = len(firing.count)
    judged = subject.verdicts[0]
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
        "ms": _nullable(judged.ms),
        "ms_low": _nullable(judged.low),
        "ms_high": _nullable(judged.high),
        "purity": _nullable(torch.tensor(subject.purity(labels), dtype=torch.float64)),
        "top_classes": classes,
    }
    return pa.table(columns, schema=schemas.LATENTS)


def _nullable(x: Tensor) -> pa.Array:
    return pa.array(x.numpy(), pa.float64(), from_pandas=True)


def _none_if_nan(x: float) -> float | None:
    """NULL in tables and JSON."""
    return None if math.isnan(x) else x
