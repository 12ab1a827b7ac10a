"""What labels and a taxonomy say of each latent, and the table `probes`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.compute.checkpoint import Accumulator
from ommatid.evaluate.batches import Images
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.metrics import auroc, balanced_accuracy, fit_probes, label_entropy, lca_depth, purity
from ommatid.store import read_part

N_TOP = 64
"""Images of purity@64; among them those of the taxonomy are looked for."""
N_LCA = 16
"""Images whose lowest common ancestor is taken."""


@dataclass(frozen=True)
class Meaning:
    """Of each latent, (d_sae,) float64; NaN where it is undefined."""

    purity_64: Tensor
    """Purity@64."""
    label_entropy: Tensor
    """Activation-weighted entropy of the labels of all images on which it fires."""
    lca_depth: Tensor
    """Depth of the lowest common ancestor of the strongest images that have a path."""


def measure_meaning(
    fired: Iterable[LatentFirings], halves: EvalSplit, labels: Mapping[int, str], paths: Mapping[int, Sequence[str]], d_sae: int
) -> Meaning:
    """Measure all latents.

    A taxonomy may have holes: of a latent's 64 strongest images the 16 strongest with a path count, and a latent with fewer has no
    depth. Fewer images have a deeper ancestor by chance, so depths are compared over equally many.

    Args:
        fired: The latents that fire.
        halves: The evaluation images.
        labels: Class of each that has one.
        paths: Path from the root of the taxonomy of each that has one.
        d_sae: Latents.
    """
    images = halves.images.tolist()
    classes = {name: code for code, name in enumerate(sorted(set(labels.values())))}
    codes = np.array([classes[labels[image]] if image in labels else -1 for image in images], dtype=np.int64)
    path_of = [paths.get(image) for image in images]
    found = Meaning(*(torch.full((d_sae,), torch.nan, dtype=torch.float64) for _ in range(3)))
    for one in fired:
        top, code = one.rows[:N_TOP], codes[one.rows]
        known = code >= 0
        found.purity_64[one.latent] = purity([code[:N_TOP][known[:N_TOP]].tolist()], N_TOP)[0]
        found.label_entropy[one.latent] = label_entropy(np.bincount(code[known], weights=one.acts[known]))
        placed = [path for row in top.tolist() if (path := path_of[row])][:N_LCA]
        if len(placed) == N_LCA:
            found.lca_depth[one.latent] = lca_depth(placed)
    return found


KS = (1, 2, 5, 10)
"""Latents of a probe."""
MAX_CLASSES = 64
"""The commonest classes are probed: enough for a mean, and time and memory stay those of 64 probes however many there are."""
MAX_IMAGES = 8192
"""Drawn from the images of these classes: 4,096 fit and as many test, so an accuracy of one class is known to a few hundredths."""
MIN_POSITIVE = 8
"""Images that a class needs in either half."""
SEED = 0
"""Of the draw of images."""


@dataclass(frozen=True)
class ProbeImages:
    """Images on which classes are probed."""

    numbers: np.ndarray
    """images.image, (images,), ascending."""
    classes: Tensor
    """Index of each one's class, (images,)."""
    is_held_out: Tensor
    """Whether it tests; the others fit, (images,) bool."""
    names: tuple[str, ...]
    """Of the classes; none where there are not two."""


def choose_images(halves: EvalSplit, labels: Mapping[int, str]) -> ProbeImages:
    """Images of the commonest classes, cut in halves as they are for names (see images/eval_split.py)."""
    commonest = sorted(Counter(labels.values()).items(), key=lambda item: (-item[1], item[0]))[:MAX_CLASSES]
    wanted = {name for name, _ in commonest}
    rows = np.array([row for row, image in enumerate(halves.images.tolist()) if labels.get(image) in wanted], dtype=np.int64)
    rows = np.sort(np.random.default_rng(SEED).permutation(rows)[:MAX_IMAGES])
    found = np.array([labels[image] for image in halves.images[rows].tolist()], dtype=object)
    held_out = halves.is_held_out[rows]
    fewest = {name: min((found[held_out] == name).sum(), (found[~held_out] == name).sum()) for name in wanted}
    names = tuple(sorted(name for name in wanted if fewest[name] >= MIN_POSITIVE))
    names = names if len(names) > 1 else ()
    keep = np.isin(found, names)
    classes = torch.tensor([names.index(name) for name in found[keep]], dtype=torch.int64)
    return ProbeImages(halves.images[rows][keep], classes, torch.from_numpy(held_out[keep]), names)


class Pooled(Accumulator):
    """Activations of the probe's images, averaged over tokens as they come."""

    STATE = ("x",)

    def __init__(self, images: ProbeImages, d_model: int) -> None:
        self.x = torch.zeros(len(images.numbers), d_model)
        """(images, d_model)"""
        self._numbers = torch.from_numpy(images.numbers)

    def add(self, batch: Images) -> None:
        """Some evaluation images, each once."""
        if not len(self._numbers):
            return
        place = torch.searchsorted(self._numbers, batch.numbers).clamp_max(len(self._numbers) - 1)
        mine = self._numbers[place] == batch.numbers
        self.x[place[mine]] = batch.x[mine].mean(1)


def measure_probes(name: str, images: ProbeImages, pooled: Pooled, files: Sequence[str], d_sae: int) -> pa.Table:
    """The `probes` table; without rows where there are not two classes with enough images.

    A probe's latents are those whose mean activation over images differs most between the class and the rest, in the half that fits.

    Args:
        name: Of the SAE.
        images: To probe on.
        pooled: Their activations.
        files: Parts of the SAE's table `firings`.
        d_sae: Its latents.
    """
    if not images.names:
        return schemas.PROBES.empty_table()
    fired = _read_firings(files, images.numbers)
    chosen = _differing(fired, images, d_sae)
    acts = fired.of(chosen, len(images.numbers), d_sae)
    rows = [*_test("x", images, pooled.x, None)]
    for k in KS:
        if k <= chosen.shape[1]:
            rows += _test("latents", images, acts[:, :, :k], chosen[:, :k])
    order = sorted(rows, key=lambda row: (row["class"], row["probe"], row["k"]))
    return pa.Table.from_pylist([{"sae": name, **row} for row in order], schema=schemas.PROBES)


@dataclass(frozen=True)
class _Firings:
    """Where latents fire on the probe's images."""

    rows: np.ndarray
    """Place of the image, (firings,)."""
    latents: np.ndarray
    acts: np.ndarray

    def of(self, chosen: np.ndarray, n_images: int, d_sae: int) -> Tensor:
        """Activations of each class's chosen latents, (images, classes, latents) float32."""
        used = np.unique(chosen)
        place = np.full(d_sae, -1)
        place[used] = np.arange(len(used))
        mine = place[self.latents] >= 0
        acts = torch.zeros(n_images, len(used))
        acts[torch.from_numpy(self.rows[mine]), torch.from_numpy(place[self.latents[mine]])] = torch.from_numpy(self.acts[mine])
        return acts[:, torch.from_numpy(place[chosen])]


def _read_firings(files: Sequence[str], numbers: np.ndarray) -> _Firings:
    pieces = []
    for file in files:
        part = read_part(Path(file), ["image", "latent", "act"])
        image, latent, act = (part[column].to_numpy() for column in ("image", "latent", "act"))
        place = np.searchsorted(numbers, image).clip(max=len(numbers) - 1)
        mine = numbers[place] == image
        pieces.append((place[mine], latent[mine], act[mine]))
    return _Firings(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _differing(fired: _Firings, images: ProbeImages, d_sae: int) -> np.ndarray:
    """Latents whose means differ most between each class and the rest, the most first, (classes, at most max(KS))."""
    n_classes, fits = len(images.names), ~images.is_held_out.numpy()
    classes, mine = images.classes.numpy(), fits[fired.rows]
    cells = classes[fired.rows[mine]] * d_sae + fired.latents[mine]
    sums = np.bincount(cells, weights=fired.acts[mine], minlength=n_classes * d_sae).reshape(n_classes, d_sae)
    counts = np.bincount(classes[fits], minlength=n_classes)[:, None]
    difference = np.abs(sums / counts - (sums.sum(0) - sums) / (counts.sum() - counts))
    return np.argsort(-difference, axis=1, kind="stable")[:, : max(KS)]


def _test(probe: str, images: ProbeImages, features: Tensor, latents: np.ndarray | None) -> Iterator[dict[str, Any]]:
    """Fit on one half and test on the other: a row a class."""
    is_class = torch.nn.functional.one_hot(images.classes, len(images.names)).bool()
    tests = images.is_held_out
    scores, truth = fit_probes(features[~tests], is_class[~tests]).scores(features[tests]), is_class[tests]
    for i, name in enumerate(images.names):
        positive, negative = scores[truth[:, i], i], scores[~truth[:, i], i]
        area, low, high = auroc(positive, negative)
        yield {
            "class": name,
            "probe": probe,
            "k": features.shape[-1],
            "accuracy": balanced_accuracy(positive, negative, 0.0),
            "auroc": area,
            "auroc_low": low,
            "auroc_high": high,
            "n_positive": len(positive),
            "latents": None if latents is None else latents[i].tolist(),
        }
