"""Measures of each latent by labels and a taxonomy, and linear probes of the classes: the table `probes`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

from ommatid import schemas
from ommatid.compute.checkpoint import Accumulator
from ommatid.evaluate.batches import Images
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.metrics import auroc, balanced_accuracy, fit_probes, label_entropy, lca_depth, purity
from ommatid.store import read_part

N_TOP = 64
"""Number of a latent's strongest images over which purity@64 is computed. The images for its depth in the taxonomy are among them."""
N_LCA = 16
"""Number of images whose lowest common ancestor gives the depth of a latent."""


@dataclass(frozen=True)
class Meaning:
    """Measures of each latent by labels and taxonomy, (d_sae,) float64; NaN where undefined."""

    purity_64: Float64[Tensor, " d_sae"]
    """Purity@64."""
    label_entropy: Float64[Tensor, " d_sae"]
    """Activation-weighted entropy of the labels of all images on which the latent fires."""
    lca_depth: Float64[Tensor, " d_sae"]
    """Depth in the taxonomy of the lowest common ancestor of the strongest images that have a path."""


def measure_meaning(
    firings: Iterable[LatentFirings], split: EvalSplit, labels: Mapping[int, str], paths: Mapping[int, Sequence[str]], d_sae: int
) -> Meaning:
    """Measure all latents by labels and taxonomy.

    The depth of a latent is that of the 16 strongest images with a path among its 64 strongest images; with fewer than 16 it is
    undefined. The number is fixed because fewer images have a deeper common ancestor by chance, which would make depths incomparable.

    Args:
        firings: Firings of each latent that fires at all.
        split: The evaluation images.
        labels: Label of each image that has one, by image number.
        paths: Path from the root of the taxonomy of each image that has one, by image number.
        d_sae: Number of latents.

    Returns:
        The measures; NaN for latents that never fire.
    """
    images = split.images.tolist()
    classes = {name: code for code, name in enumerate(sorted(set(labels.values())))}
    codes = np.array([classes[labels[image]] if image in labels else -1 for image in images], dtype=np.int64)
    path_of = [paths.get(image) for image in images]
    found = Meaning(*(torch.full((d_sae,), torch.nan, dtype=torch.float64) for _ in range(3)))
    for fired in firings:
        top, code = fired.rows[:N_TOP], codes[fired.rows]
        known = code >= 0
        found.purity_64[fired.latent] = purity([code[:N_TOP][known[:N_TOP]].tolist()], N_TOP)[0]
        found.label_entropy[fired.latent] = label_entropy(np.bincount(code[known], weights=fired.acts[known]))
        top_paths = [path for row in top.tolist() if (path := path_of[row])][:N_LCA]
        if len(top_paths) == N_LCA:
            found.lca_depth[fired.latent] = lca_depth(top_paths)
    return found


KS = (1, 2, 5, 10)
"""Numbers of latents that a probe may read."""
MAX_CLASSES = 64
"""Number of classes that are probed, the most common first. It is enough for a mean, and it bounds time and memory."""
MAX_IMAGES = 8192
"""Number of images drawn from these classes. About 4,096 fit and as many test, so a class's accuracy is known to a few hundredths."""
MIN_POSITIVE = 8
"""Number of images that a class needs in each half to be probed."""
SEED = 0
"""Seed of the draw of images."""


@dataclass(frozen=True)
class ProbeImages:
    """Images on which probes are fitted and tested."""

    numbers: Int64[np.ndarray, " images"]
    """Number of each image (`images.image`), ascending, (images,)."""
    classes: Int64[Tensor, " images"]
    """Index in `names` of each image's class, (images,) int64."""
    is_held_out: Bool[Tensor, " images"]
    """Whether the image is for testing; the rest are for fitting, (images,) bool."""
    names: tuple[str, ...]
    """Names of the classes; empty unless there are at least two."""


def choose_images(split: EvalSplit, labels: Mapping[int, str]) -> ProbeImages:
    """Draw images of the most common classes. The half that makes labels fits the probes, and the held-out half tests them."""
    commonest = sorted(Counter(labels.values()).items(), key=lambda item: (-item[1], item[0]))[:MAX_CLASSES]
    wanted = {name for name, _ in commonest}
    rows = np.array([row for row, image in enumerate(split.images.tolist()) if labels.get(image) in wanted], dtype=np.int64)
    rows = np.sort(np.random.default_rng(SEED).permutation(rows)[:MAX_IMAGES])
    found = np.array([labels[image] for image in split.images[rows].tolist()], dtype=object)
    held_out = split.is_held_out[rows]
    fewest = {name: min((found[held_out] == name).sum(), (found[~held_out] == name).sum()) for name in wanted}
    names = tuple(sorted(name for name in wanted if fewest[name] >= MIN_POSITIVE))
    names = names if len(names) > 1 else ()
    keep = np.isin(found, names)
    classes = torch.tensor([names.index(name) for name in found[keep]], dtype=torch.int64)
    return ProbeImages(split.images[rows][keep], classes, torch.from_numpy(held_out[keep]), names)


class PooledActivations(Accumulator):
    """Mean activation over the tokens of each image that the probes use, collected batch by batch."""

    STATE = ("x",)

    def __init__(self, images: ProbeImages, d_model: int) -> None:
        self.x = torch.zeros(len(images.numbers), d_model)
        """Mean activation over the tokens of each image, (images, d_model) float32."""
        self._numbers = torch.from_numpy(images.numbers)

    def add(self, batch: Images) -> None:
        """Add a batch of evaluation images; every image must be added exactly once."""
        if not len(self._numbers):
            return
        place = torch.searchsorted(self._numbers, batch.numbers).clamp_max(len(self._numbers) - 1)
        mine = self._numbers[place] == batch.numbers
        self.x[place[mine]] = batch.x[mine].mean(1)


def measure_probes(name: str, images: ProbeImages, pooled: PooledActivations, files: Sequence[str], d_sae: int) -> pa.Table:
    """Fit and test probes of every class, on the activations and on a few latents.

    A probe reads the latents whose mean activation over the fitting images differs most between the class and the rest.

    Args:
        name: Name of the SAE.
        images: Images to fit and test on.
        pooled: Mean activations of these images.
        files: Parts of the SAE's table `firings`.
        d_sae: Number of latents.

    Returns:
        The table `probes`; empty unless at least two classes have enough images.
    """
    if not images.names:
        return schemas.PROBES.empty_table()
    firings = _read_firings(files, images.numbers)
    chosen = _most_different(firings, images, d_sae)
    acts = firings.acts_of(chosen, len(images.numbers), d_sae)
    rows = [*_test("x", images, pooled.x, None)]
    for k in KS:
        if k <= chosen.shape[1]:
            rows += _test("latents", images, acts[:, :, :k], chosen[:, :k])
    order = sorted(rows, key=lambda row: (row["class"], row["probe"], row["k"]))
    return pa.Table.from_pylist([{"sae": name, **row} for row in order], schema=schemas.PROBES)


@dataclass(frozen=True)
class _Firings:
    """Firings on the probes' images."""

    rows: Int[np.ndarray, " firings"]
    """Position of the firing's image in `ProbeImages`, (firings,)."""
    latents: Int[np.ndarray, " firings"]
    """Latent that fires, (firings,)."""
    acts: Float[np.ndarray, " firings"]
    """Its activation, (firings,)."""

    def acts_of(self, chosen: Int[np.ndarray, "classes k"], n_images: int, d_sae: int) -> Float32[Tensor, "images classes k"]:
        """Return the activations of each class's chosen latents, (images, classes, latents) float32."""
        used = np.unique(chosen)
        place = np.full(d_sae, -1)
        place[used] = np.arange(len(used))
        mine = place[self.latents] >= 0
        acts = torch.zeros(n_images, len(used))
        acts[torch.from_numpy(self.rows[mine]), torch.from_numpy(place[self.latents[mine]])] = torch.from_numpy(self.acts[mine])
        return acts[:, torch.from_numpy(place[chosen])]


def _read_firings(files: Sequence[str], numbers: Int64[np.ndarray, " images"]) -> _Firings:
    pieces = []
    for file in files:
        part = read_part(Path(file), ["image", "latent", "act"])
        image, latent, act = (part[column].to_numpy() for column in ("image", "latent", "act"))
        place = np.searchsorted(numbers, image).clip(max=len(numbers) - 1)
        mine = numbers[place] == image
        pieces.append((place[mine], latent[mine], act[mine]))
    return _Firings(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _most_different(firings: _Firings, images: ProbeImages, d_sae: int) -> Int[np.ndarray, "classes k"]:
    """Return the latents whose means differ most between each class and the rest, in descending order, (classes, at most max(KS))."""
    n_classes, fits = len(images.names), ~images.is_held_out.numpy()
    classes, mine = images.classes.numpy(), fits[firings.rows]
    cells = classes[firings.rows[mine]] * d_sae + firings.latents[mine]
    sums = np.bincount(cells, weights=firings.acts[mine], minlength=n_classes * d_sae).reshape(n_classes, d_sae)
    counts = np.bincount(classes[fits], minlength=n_classes)[:, None]
    difference = np.abs(sums / counts - (sums.sum(0) - sums) / (counts.sum() - counts))
    return np.argsort(-difference, axis=1, kind="stable")[:, : max(KS)]


def _test(
    probe: str,
    images: ProbeImages,
    features: Float[Tensor, "images features"] | Float[Tensor, "images classes k"],
    latents: Int[np.ndarray, "classes k"] | None,
) -> Iterator[dict[str, Any]]:
    """Fit probes on one half of the images, test them on the other, and yield one row for each class."""
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
