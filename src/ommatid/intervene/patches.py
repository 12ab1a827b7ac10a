"""Outcomes by patch: which patches a linear head takes for another class of the masks after an edit, as in saev's segmentation protocol.

The head reads the patches at the last hookpoint that has some, and is fitted to the masks of training images. A latent's class is that of
the masks on whose patches it is most active. Of an edit of the latent, predictions of its class should change and no others.

Suffixes: b images of a batch, p patches, d width, m classes, l latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ommatid.errors import InputError
from ommatid.extract.drawn import draw_images
from ommatid.images.labels import list_split
from ommatid.intervene.latent_test import ArmsTest
from ommatid.intervene.masks import Masks
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import LogisticProbes, change_rates, fit_probes

N_FITTED = 500
"""Number of training images with masks to which the head is fitted, or on which it is tested."""
HELD_OUT = 5
"""One in so many of these images tests the head."""
N_PATCHES = 2**14
"""Number of patches to which the head is fitted."""
LEAST_PATCHES = 8
"""Number of patches to fit below which a class is left out."""
LEAST_GAIN = 0.1
"""Share of what chance leaves to be gained of balanced accuracy, below which the head is not used."""
BYTES = 2**28
"""Bytes of patches that arms are run for at a time: 256 MiB."""


@dataclass(frozen=True)
class PatchHead:
    """A linear head that reads classes of masks from patches."""

    hookpoint: str
    """Name of the hookpoint that it reads."""
    n_special: int
    """Number of tokens there before the patches."""
    classes: tuple[str, ...]
    """Names of the classes, or their indices if they have none, `(m,)`."""
    probes: LogisticProbes
    """Logistic regression for each class against all others."""
    accuracy: float
    """Balanced accuracy on the patches of held-out images: mean over classes of the share of their patches that are named right."""
    targets: dict[int, int]
    """Place in `classes` of each latent's class; latents that fire on no patch of the images have none."""

    def predict(self, tokens: Float[Tensor, "batch tokens d"]) -> Int[Tensor, "batch patches"]:
        """Return the place of the class of each patch, `(b, p)`, given all tokens at the hookpoint, `(b, t, d)`."""
        patches = tokens[:, self.n_special :].cpu()
        return self.probes.scores(patches.flatten(0, 1)).argmax(1).view(patches.shape[:2])


def fit_patch_head(subject: Subject, masks: Masks, latents: Sequence[int]) -> PatchHead:
    """Fit a head to the masks of training images, and find the class of latents.

    Args:
        subject: The model and the SAE.
        masks: The masks.
        latents: The latents.

    Returns:
        The head.

    Raises:
        InputError: Patches cannot be read or are not what the SAE encodes; too few training images have masks; or the head tells classes
            apart no better than chance.
        ConfigError: As for `Masks.load`.
    """
    last, n_special, grid = _find_last(subject)
    images = subject.inputs["images"]
    held = [number for number in list_split(images, "train") if number in masks]
    drawn = draw_images(images, held, N_FITTED).numbers.tolist()
    truth = masks.load(drawn, subject.model.preprocess, grid)
    assert truth.numbers.tolist() == drawn, "images are read in another order than masks"
    n_patches, some = grid[0] * grid[1], torch.tensor(list(latents), dtype=torch.int64, device=subject.device)
    values = truth.classes.unique()
    values = values[values >= 0]
    y = truth.classes.flatten()
    is_held = (torch.arange(len(drawn)) % HELD_OUT == HELD_OUT - 1).repeat_interleave(n_patches)
    kept = [value for value in values.tolist() if int((y[~is_held] == value).sum()) >= LEAST_PATCHES]
    if len(kept) < 2 or len(set(y[is_held].tolist()) & set(kept)) < 2:
        named = ", ".join(map(masks.name, kept)) or "none"
        need = f"there must be {LEAST_PATCHES} patches or more of at least two classes, in several images"
        raise InputError(f"no outcomes by patch: in the masks of {len(drawn)} training images, {need}; there are of {named}")
    y = y[:, None] == torch.tensor(kept)
    chosen = _choose(y.any(1), is_held)
    sums, counts, x, done = torch.zeros(len(values), len(latents)), torch.zeros(len(values)), [], 0
    for _, pixels in subject.load_pixels(drawn):
        tokens, of_batch = subject.model.capture(pixels, [subject.reads.name, last]).tokens, slice(done, done + len(pixels))
        acts = subject.device_sae.encode_latents(subject.reads.pick(tokens[subject.reads.name])[:, -n_patches:].flatten(0, 1).float(), some)
        is_class = (truth.classes[of_batch].flatten()[:, None] == values).float()
        sums, counts = sums + is_class.T @ acts.cpu(), counts + is_class.sum(0)
        x.append(tokens[last][:, n_special:].cpu()[chosen.unflatten(0, (-1, n_patches))[of_batch]])
        done += len(pixels)
    probes, accuracy = _fit(torch.cat(x), y[chosen], is_held[chosen])
    chance = 1 / len(kept)
    if accuracy < chance + LEAST_GAIN * (1 - chance):
        found = f"a linear head at {last} names {accuracy:.0%} of the patches of each class right in held-out images"
        raise InputError(f"no outcomes by patch: {found}, where {chance:.0%} is chance: the masks may be of other images")
    means = (sums / counts[:, None])[[values.tolist().index(value) for value in kept]]
    targets = {latent: int(of_one.argmax()) for latent, of_one in zip(latents, means.T, strict=True) if of_one.max() > 0}
    return PatchHead(last, n_special, tuple(map(masks.name, kept)), probes, accuracy, targets)


def _find_last(subject: Subject) -> tuple[str, int, tuple[int, int]]:
    """Return name, number of special tokens and grid of the last hookpoint with patches, which comes after that of the edits."""
    hookpoints, edited = subject.model.hookpoints, subject.writes.name
    names = list(hookpoints)
    after = [name for name in names[names.index(edited) + 1 :] if hookpoints[name].grid]
    if not after:
        raise InputError(f"no outcomes by patch: no hookpoint with patches comes after {edited}, at which latents are edited")
    last = hookpoints[after[-1]]
    assert last.grid
    if subject.reads.grid != last.grid:
        sizes = [f"{grid[0]} x {grid[1]} patches" if grid else "no patches" for grid in (subject.reads.grid, last.grid)]
        raise InputError(f"no outcomes by patch: the SAE encodes {sizes[0]} of {subject.reads.name}, but {after[-1]} has {sizes[1]}")
    return after[-1], len(last.special), last.grid


def _choose(is_known_n: Bool[Tensor, " patches"], is_held_n: Bool[Tensor, " patches"]) -> Bool[Tensor, " patches"]:
    """Return whether each patch is used, `(n,)`: some of those to fit to, and all known ones that test the head."""
    fitted = (is_known_n & ~is_held_n).nonzero()[:, 0]
    chosen = is_known_n & is_held_n
    chosen[fitted[torch.from_numpy(np.random.default_rng(0).permutation(len(fitted))[:N_PATCHES])]] = True
    return chosen


def _fit(
    x_nd: Float[Tensor, "patches d"], y_nm: Bool[Tensor, "patches classes"], is_held_n: Bool[Tensor, " patches"]
) -> tuple[LogisticProbes, float]:
    """Fit the head, and return its balanced accuracy on the held-out images."""
    probes, y = fit_probes(x_nd[~is_held_n], y_nm[~is_held_n]), y_nm[is_held_n]
    right = probes.scores(x_nd[is_held_n]).argmax(1) == y.int().argmax(1)
    return probes, float(torch.stack([right[of_one].double().mean() for of_one in y.T if of_one.any()]).mean())


class PatchTest(ArmsTest):
    """The arms of one latent, and what the head says of patches in each.

    Args:
        study: The study.
        chosen: The latent, which has a class.
        head: The head.
    """

    def __init__(self, study: Study, chosen: Described, head: PatchHead) -> None:
        super().__init__(study, chosen, "")
        self.head = head

    def rows(self) -> Iterator[dict[str, Any]]:
        """Run all arms on all images, and iterate over rows of `interventions`."""
        subject = self.study.subject
        last = subject.model.hookpoints[self.head.hookpoint]
        predicted: list[UInt8[Tensor, "arms batch patches"]] = []
        for _, pixels in self.study.iter_pixels():
            read = subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name]
            arms, _ = self._make_arms(read)
            n_arms = max(1, BYTES // (4 * last.n_tokens * last.d_model * len(pixels)))
            found = []
            for start in range(0, len(arms), n_arms):
                some = [arm.replacement for arm in arms[start : start + n_arms]]
                found += map(self.head.predict, subject.model.splice(pixels, subject.writes.name, some, self.head.hookpoint))
            predicted.append(torch.stack(found).to(torch.uint8))
            self.editor.forget()
        yield from self._rates(torch.cat(predicted, 1))

    def _rates(self, predicted_abp: UInt8[Tensor, "arms images patches"]) -> Iterator[dict[str, Any]]:
        target = self.head.targets[self.chosen.latent]
        plain, n = predicted_abp[0].flatten().int(), predicted_abp.shape[1]
        image = torch.arange(n).repeat_interleave(predicted_abp.shape[2])
        for arm, dose, places in self._each():
            n_draws = len(places)
            edited = predicted_abp[[1 + place for place in places]].flatten().int()
            rates = change_rates(plain.repeat(n_draws), edited, target, image.repeat(n_draws))
            of = {"target_rate": rates.target, "other_rate": rates.other, "specificity": rates.specificity}
            for outcome, found in of.items():
                for row in self._known(f"patch_{outcome}", arm, dose, found, n, n_draws):
                    yield {**row, "target": self.head.classes[target]}
