"""Outcomes of interventions, their intervals, and the rule that gives a latent its causal status.

An intervention edits one latent inside a model, at a dose, and compares the model's outputs before (plain) and after (edited) with those
of control arms. Effects are signed so that more is what the edit is meant to do. All intervals have a level of 95 %.

Suffixes of names: n images, d width, c classes or concepts, v texts or tokens that a model chooses among, p doses, r random draws.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ommatid.compute.intervals import Z
from ommatid.metrics.detection import balanced_accuracy
from ommatid.metrics.probe import LogisticProbes, fit_probes
from ommatid.metrics.vectors import unit
from ommatid.metrics.zero_shot import Interval, wilson

NONE = Interval(math.nan, math.nan, math.nan)
"""An undefined number."""
REPLICATES = 1000
"""Number of resamples of a bootstrap."""
BLOCK = 2**22
"""Largest number of weights that a bootstrap holds at once: 32 MiB."""
STRONGEST = 1 + 1e-6
"""Strongest dose that decides, in units of the 99th percentile; not 1, because an absolute dose is rounded when it is divided by that."""
LEAST_IN_GROUP = 10
"""Number of images below which the accuracy of a group is left out."""


# Means over images


def bootstrap_means(
    values_mn: Float[Tensor, "rows images"], seed: int = 0
) -> tuple[Float64[Tensor, " rows"], Float64[Tensor, " rows"], Float64[Tensor, " rows"]]:
    """Compute means over images with percentile bootstrap intervals (Efron 1979), from `REPLICATES` resamples of the images.

    All rows share the resamples, so their differences may be formed before or after.

    Args:
        values_mn: A number per image in each row, `(rows, images)`.
        seed: Seed of the resamples.

    Returns:
        The means, and the lower and upper ends of their intervals, `(rows,)` float64 each; NaN if there are no images.
    """
    values, n = values_mn.double(), values_mn.shape[1]
    if not n:
        empty = values.new_full((len(values),), math.nan)
        return empty, empty, empty
    generator = torch.Generator().manual_seed(seed)
    means, block = [], max(1, BLOCK // n)
    for start in range(0, REPLICATES, block):
        rows = torch.randint(n, (min(block, REPLICATES - start), n), generator=generator)
        times = torch.zeros(rows.shape, dtype=torch.float64).scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))
        means.append(values @ times.T / n)
    low, high = torch.cat(means, 1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return values.mean(1), low, high


def bootstrap_mean(values_n: Float[Tensor, " images"], seed: int = 0) -> Interval:
    """Compute one mean over images, `(images,)`, with the interval of `bootstrap_means`."""
    value, low, high = (float(of_rows[0]) for of_rows in bootstrap_means(values_n[None], seed))
    return Interval(value, low, high)


# Predictions that change


@dataclass(frozen=True)
class ChangeRates:
    """How often predictions change, among those of a class and among the others."""

    target: Interval
    """Share of the images (or patches) predicted as the class whose prediction changes (Wilson 1927); NaN if there are none."""
    other: Interval
    """The same share of those predicted otherwise."""
    specificity: Interval
    """target − other, with the interval of Newcombe (1998, method 10) for independent shares; NaN where one of them is."""
    n_target: int
    """Number of images (or patches) predicted as the class."""
    n_other: int
    """Number of those predicted otherwise."""


def change_rates(
    plain_n: Int[Tensor, " cases"], edited_n: Int[Tensor, " cases"], target: int, images_n: Int[Tensor, " cases"] | None = None
) -> ChangeRates:
    """Compute the share of predictions that an edit changes, for those of one class and for all others.

    Args:
        plain_n: Class predicted for each image or patch by the unchanged model, `(cases,)`.
        edited_n: Class predicted after the edit, `(cases,)`.
        target: The class that the edit aims at.
        images_n: For patches, the image of each, `(cases,)`. Patches of an image tend to change together, so the intervals then use an
            effective number of cases: their number divided by the design effect of clusters (Kish 1965), or the number of images where
            all cases agree.

    Returns:
        The rates.
    """
    changed, is_target = plain_n != edited_n, plain_n == target
    target_rate, other_rate = (
        _share(changed[chosen], None if images_n is None else images_n[chosen]) for chosen in (is_target, ~is_target)
    )
    n_target = int(is_target.sum())
    return ChangeRates(target_rate, other_rate, _difference(target_rate, other_rate), n_target, len(plain_n) - n_target)


def _share(is_true_n: Bool[Tensor, " cases"], images_n: Int[Tensor, " cases"] | None) -> Interval:
    n = len(is_true_n)
    if not n:
        return NONE
    share = float(is_true_n.double().mean())
    return wilson(share, n if images_n is None else _effective_number(is_true_n.double() - share, share * (1 - share), images_n))


def _effective_number(residuals_n: Float64[Tensor, " cases"], variance: float, images_n: Int[Tensor, " cases"]) -> float:
    n = len(residuals_n)
    _, place = torch.unique(images_n, return_inverse=True)
    sums = torch.bincount(place, residuals_n)
    of_mean = float(sums.square().sum()) / n**2 * len(sums) / max(len(sums) - 1, 1)
    if len(sums) < 2 or variance == 0:
        return len(sums)
    return n if of_mean <= variance / n else max(variance / of_mean, 1.0)


def _difference(one: Interval, other: Interval) -> Interval:
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    value = one.value - other.value
    return Interval(value, value - below, value + above)


@dataclass(frozen=True)
class Outside:
    """Where a latent is active, in images whose objects are known."""

    share: Interval
    """Mean over images of the share of the latent's activation that is outside the object, with a bootstrap interval; NaN if the latent is
    silent on all images."""
    area: float
    """Mean over the same images of the share of their area that is outside, which is the `share` of a latent that is active everywhere
    alike."""
    n: int
    """Number of images on which the latent fires."""


def activation_outside(acts_np: Float[Tensor, "images patches"], objects_np: Float[Tensor, "images patches"]) -> Outside:
    """Compute the share of a latent's activation that is outside the objects of images, where it cannot be about them.

    Args:
        acts_np: The latent's activation on each patch, `(images, patches)`, not negative.
        objects_np: Share of each patch that the image's object covers, `(images, patches)`.

    Returns:
        The share, over the images on which the latent fires. Each counts the same, however active the latent is on it.
    """
    acts, outside = acts_np.double(), 1 - objects_np.double()
    fires = acts.sum(1) > 0
    acts, outside = acts[fires], outside[fires]
    return Outside(bootstrap_mean((acts * outside).sum(1) / acts.sum(1)), float(outside.mean()), len(acts))


@dataclass(frozen=True)
class Collateral:
    """Accuracy on images that an edit should leave alone."""

    plain: Interval
    """Accuracy of the unchanged model on them."""
    edited: Interval
    """Accuracy after the edit."""
    change: Interval
    """edited − plain, with an interval for paired shares (Agresti and Min 2005: Wald, with half an image added to each of the four
    outcomes, so that it has a width even if no image changes). NaN if there are no such images."""
    n: int
    """Number of these images."""


def collateral(
    plain_right_n: Bool[Tensor, " images"], edited_right_n: Bool[Tensor, " images"], is_silent_n: Bool[Tensor, " images"]
) -> Collateral:
    """Compute what an edit does to accuracy on the images on which its latent is silent.

    Args:
        plain_right_n: Whether the unchanged model classifies each image correctly, `(images,)`.
        edited_right_n: The same after the edit, `(images,)`.
        is_silent_n: Whether the latent does not fire on each image, `(images,)`.

    Returns:
        The accuracies and their paired difference.
    """
    before, after = plain_right_n[is_silent_n], edited_right_n[is_silent_n]
    n, gained, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    if not n:
        return Collateral(NONE, NONE, NONE, 0)
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    change = Interval((gained - lost) / n, max(middle - half, -1.0), min(middle + half, 1.0))
    return Collateral(_share(before, None), _share(after, None), change, n)


# Outputs that move


def beyond_the_rest(changes_nm: Float[Tensor, "images names"]) -> Float64[Tensor, "images names"]:
    """Compute how much further an edit moves each image toward each of several names than toward the others.

    Names are texts, such as labels of latents, whose cosine with the image's embedding changes, or classes, whose logit does. Texts lie in
    superposition: an edit that moves images toward one also moves them toward some that have nothing to do with it. If it moves them
    further toward another label than toward the latent's own, the latter does not say what the latent does.

    Args:
        changes_nm: Change of the cosine or logit of each image and name by the edit, `(images, names)`, of two names or more.

    Returns:
        The change of each name, minus the mean change of the other names, `(images, names)` float64.
    """
    changes, m = changes_nm.double(), changes_nm.shape[1]
    assert m >= 2, f"{m} names"
    return (changes - changes.mean(1, keepdim=True)) * (m / (m - 1))


def raised_most(rises_v: Float[Tensor, " texts"], k: int = 20) -> Int[Tensor, " raised"]:
    """Return the k texts (or all, if there are fewer) that an edit raises most.

    Arad et al. take the tokens whose unembeddings fit the latent's direction best; the log-probabilities measure the same through all
    layers after the hookpoint. Texts that are chosen on the images on which `output_score` is computed favour the edit, so choose them on
    others, or choose them for every arm alike.

    Args:
        rises_v: Mean over images, or sum, of the log-probability of each text after the edit less that of the unchanged model, `(texts,)`.
        k: Number of texts.

    Returns:
        The texts, `(k,)` int64, most raised first.
    """
    return rises_v.topk(min(k, len(rises_v))).indices


def output_score(
    plain_nv: Float[Tensor, "images texts"], edited_nv: Float[Tensor, "images texts"], raised: Int[Tensor, " raised"]
) -> Float64[Tensor, " images"]:
    """Compute the output score of an edit, (1 − min rank / V) · max p, minus that of the unchanged model.

    As in the code of Arad et al. (2025, arXiv 2505.20063), V is the number of all texts, p and rank are a text's probability and its rank
    after the edit, and the minimum and maximum are over the raised texts. The most probable text has rank 0; a rank is the number of texts
    that are strictly more probable, so equally probable ones share the best. The published score has no baseline, so it is high for texts
    that the model favours anyway; here the score of the same texts without the edit is subtracted.

    Args:
        plain_nv: Log-probabilities by the unchanged model, `(images, texts)`.
        edited_nv: The same after the edit, `(images, texts)`.
        raised: The texts that the edit raises, from `raised_most`.

    Returns:
        The score of each image, from −1 to 1, `(images,)` float64.
    """
    return _published_score(edited_nv, raised) - _published_score(plain_nv, raised)


def _published_score(log_p_nv: Float[Tensor, "images texts"], raised: Int[Tensor, " raised"]) -> Float64[Tensor, " images"]:
    best = log_p_nv[:, raised].amax(1)
    rank = (log_p_nv > best[:, None]).double().mean(1)  # Divided by V. The most probable of the raised texts also has their lowest rank.
    return (1 - rank) * best.double().exp()


def steering_score(top_nd: Float[Tensor, "images width"], texts_md: Float[Tensor, "texts width"]) -> Float64[Tensor, " texts"]:
    """Compute the steering score of Pach et al. (2025, arXiv 2504.02821) for each answer of a steered model.

    Args:
        top_nd: Embeddings of the latent's strongest images (16 in the paper), `(images, width)`. As in the published script, they are
            averaged with the norms that they have.
        texts_md: Embeddings of the words answered, `(texts, width)`, of any norm.

    Returns:
        The cosine of the mean image embedding with each text, `(texts,)` float64.
    """
    return unit(texts_md) @ unit(top_nd.double().mean(0, keepdim=True))[0]


def answer_shift(plain_nv: Float[Tensor, "images tokens"], edited_nv: Float[Tensor, "images tokens"]) -> Float64[Tensor, " images"]:
    """Return the Kullback-Leibler divergence KL(plain ‖ edited) in nats, `(images,)` float64, from log-probabilities `(images, tokens)`.

    On images where nothing should change, this is the drift of a model that answers in words. It is infinite if the edit makes a possible
    token impossible.
    """
    plain, edited = plain_nv.double(), edited_nv.double()
    p = plain.exp()
    return torch.where(p > 0, p * (plain - edited), 0.0).sum(1).clamp(min=0)


def log_odds(log_p_nv: Float[Tensor, "images tokens"], tokens: Int[Tensor, " chosen"]) -> Float64[Tensor, " images"]:
    """Return log(p / (1 − p)) of the event that one of the given tokens comes next, `(images,)` float64.

    Args:
        log_p_nv: Log-probabilities, `(images, tokens)`.
        tokens: The tokens, each once, and not all of them.
    """
    is_chosen = torch.zeros(log_p_nv.shape[1], dtype=torch.bool)
    is_chosen[tokens] = True
    return log_p_nv[:, is_chosen].double().logsumexp(1) - log_p_nv[:, ~is_chosen].double().logsumexp(1)


def cosine_drift(plain_nd: Float[Tensor, "images width"], edited_nd: Float[Tensor, "images width"]) -> Float64[Tensor, " images"]:
    """Return 1 − cos(plain, edited), `(images,)` float64, of outputs `(images, width)` on images where nothing should change."""
    return (unit(plain_nd) - unit(edited_nd)).square().sum(1) / 2  # Equal to 1 − cosine, but exact if nothing changes.


# Groups of images


@dataclass(frozen=True)
class GroupAccuracies:
    """Accuracy in each group of images that share a class and an attribute."""

    accuracy: dict[tuple[int, int], Interval]
    """Accuracy of each group (class, attribute) and its interval (Wilson 1927)."""
    n_groups_left_out: int
    """Number of groups left out because they have too few images."""
    n_images_left_out: int
    """Number of images in those groups."""

    @property
    def worst(self) -> tuple[int, int] | None:
        """The group with the lowest accuracy, the first of them if several have it; None if all groups are left out."""
        return min(self.accuracy, key=lambda group: self.accuracy[group].value, default=None)


def group_accuracies(
    is_right_n: Bool[Tensor, " images"],
    classes_n: Int[Tensor, " images"],
    attributes_n: Int[Tensor, " images"],
    least: int = LEAST_IN_GROUP,
) -> GroupAccuracies:
    """Compute the accuracy of each group of images that share a class and an attribute (Sagawa et al. 2020: Waterbirds).

    Computed before and after a spurious latent is ablated, the worst groups' accuracies show whether the ablation helps. The group that is
    worst before need not be the one that is worst after.

    Args:
        is_right_n: Whether each image is classified correctly, `(images,)`.
        classes_n: True class of each image, `(images,)`.
        attributes_n: Attribute of each image, such as its background, `(images,)`.
        least: Smallest number of images in a group that is not left out.

    Returns:
        The accuracies, in the order of classes and then attributes.
    """
    groups, place, sizes = torch.unique(torch.stack([classes_n, attributes_n], 1), dim=0, return_inverse=True, return_counts=True)
    right = torch.bincount(place, is_right_n.double(), minlength=len(groups))
    kept = sizes >= least
    rows = zip(groups[kept].tolist(), (right / sizes)[kept].tolist(), sizes[kept].tolist(), strict=True)
    accuracy = {(class_, attribute): wilson(share, n) for (class_, attribute), share, n in rows}
    return GroupAccuracies(accuracy, int((~kept).sum()), int(sizes[~kept].sum()))


# Erasure


@dataclass(frozen=True)
class Leace:
    """The affine map that erases a concept with the smallest change: LEACE (Belrose et al. 2023, arXiv 2306.03819, theorem 4.2).

    r(x) = x − W⁺ P W (x − mean), where W = Σxx^(−1/2) whitens and P projects onto the columns of W Σxz. After it, no linear classifier can
    predict the concept z better than a constant, and no other affine map that achieves this has a smaller E‖r(x) − x‖².
    """

    mean: Float64[Tensor, " width"]
    """Mean of the activations in the data of the fit, `(width,)`."""
    left: Float64[Tensor, "width rank"]
    """W⁺ U, `(width, rank)`, where the columns of U are an orthonormal basis of the columns of W Σxz."""
    right: Float64[Tensor, "rank width"]
    """Uᵀ W, `(rank, width)`."""

    def __call__(self, x: Float[Tensor, "rows width"]) -> Float64[Tensor, "rows width"]:
        """Return activations `(rows, width)` without the concept, in float64."""
        x = x.double()
        return x - (x - self.mean) @ self.right.T @ self.left.T


def fit_leace(x_nd: Float[Tensor, "rows width"], z_nc: Bool[Tensor, "rows concepts"] | Float[Tensor, "rows concepts"]) -> Leace:
    """Fit LEACE to the covariances of activations and concepts.

    Args:
        x_nd: Activations, `(rows, width)`.
        z_nc: Concepts to erase together, `(rows, concepts)`: whether each row has each concept, or numbers.

    Returns:
        The map.
    """
    x, z = x_nd.double(), z_nc.double()
    mean = x.mean(0)
    x, z = x - mean, z - z.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    varies = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots, vectors = values[varies].sqrt(), vectors[:, varies]
    u, sizes, _ = torch.linalg.svd((vectors / roots) @ vectors.T @ (x.T @ z / len(x)), full_matrices=False)
    u = u[:, sizes > 1e-9 * z.square().mean(0).sum().sqrt().clamp_min(1e-300)]
    return Leace(mean, (vectors * roots) @ (vectors.T @ u), (u.T @ vectors) / roots @ vectors.T)


@dataclass(frozen=True)
class Erasure:
    """What linear probes still find after an edit."""

    concept: float
    """Held-out balanced accuracy of a probe for the concept: 0.5 if it is gone."""
    others: float
    """Mean held-out balanced accuracy of probes for the other concepts: as before, if they are spared. NaN if there are none."""


def erasures(
    train: Mapping[str, Float[Tensor, "train width"]],
    test: Mapping[str, Float[Tensor, "test width"]],
    y_train: Bool[Tensor, "train concepts"],
    y_test: Bool[Tensor, "test concepts"],
    concept: int,
) -> dict[str, Erasure]:
    """Measure what linear probes find of a concept, and of others, in the activations of each arm and after LEACE.

    A new probe is fitted for each arm, because what an edit moves elsewhere can still be read.

    Args:
        train: Activations to fit probes to, `(train, width)`, by arm. The arm `none` is the unchanged model; LEACE is fitted to it.
        test: Activations of other images, `(test, width)`, for the same arms.
        y_train: Whether each training image has each concept, `(train, concepts)`.
        y_test: The same for the other images, `(test, concepts)`. Concepts that all or no images of a set have are left out.
        concept: The concept that the edit is meant to erase.

    Returns:
        The accuracies of each arm, and of `leace`; NaN where the concept itself is left out.
    """
    leace = fit_leace(train["none"], y_train[:, concept : concept + 1])
    arms = {name: (train[name], test[name]) for name in ("none", *train)} | {"leace": (leace(train["none"]), leace(test["none"]))}
    found: dict[str, Erasure] = {}
    start: LogisticProbes | None = None
    for name, (x_train, x_test) in arms.items():
        accuracies, probes = _try_probes(x_train, x_test, y_train, y_test, None if name == "leace" else start)
        start = start or probes
        found[name] = _erasure(accuracies, concept)
    return found


def _erasure(accuracies_c: Float64[Tensor, " concepts"], concept: int) -> Erasure:
    is_other = torch.arange(len(accuracies_c)) != concept
    return Erasure(float(accuracies_c[concept]), float(accuracies_c[is_other].nanmean()))


def probe_accuracies(
    x_train: Float[Tensor, "train width"],
    x_test: Float[Tensor, "test width"],
    y_train: Bool[Tensor, "train concepts"],
    y_test: Bool[Tensor, "test concepts"],
) -> Float64[Tensor, " concepts"]:
    """Return the held-out balanced accuracy of a linear probe for each concept, `(concepts,)`; NaN where a set has only one answer."""
    return _try_probes(x_train, x_test, y_train, y_test, None)[0]


def _try_probes(
    x_train: Float[Tensor, "train width"],
    x_test: Float[Tensor, "test width"],
    y_train: Bool[Tensor, "train concepts"],
    y_test: Bool[Tensor, "test concepts"],
    start: LogisticProbes | None,
) -> tuple[Float64[Tensor, " concepts"], LogisticProbes | None]:
    """Return the accuracies, and the probes for the concepts that have one; None if there are none."""
    both = torch.stack([y.any(0) & ~y.all(0) for y in (y_train, y_test)]).all(0)
    accuracies = torch.full((y_train.shape[1],), math.nan, dtype=torch.float64)
    if not both.any():
        return accuracies, None
    probes = fit_probes(x_train, y_train[:, both], start)
    scores = probes.scores(x_test)
    found = (balanced_accuracy(of_one[y], of_one[~y], 0.0) for of_one, y in zip(scores.T, y_test[:, both].T, strict=True))
    accuracies[both] = torch.tensor(list(found), dtype=torch.float64)
    return accuracies, probes


def ablation_sparsity(effects: Float[Tensor, " latents"]) -> float:
    """Return (Σ|effect|)² / Σ effect² of ablating each latent (Gao et al. 2024), the effective number of latents that carry an output.

    It is 1 if one latent has all of the effect, the number of latents if all have the same, and NaN if none has any.
    """
    effects = effects.double()
    return float(effects.abs().sum().square() / effects.square().sum())


# The status of a latent


@dataclass(frozen=True)
class DoseCurve:
    """Effects of a latent's edit and of its controls on the same images, by dose."""

    doses_p: Float[Tensor, " doses"]
    """Doses in units of the latent's own 99th percentile of positive activations, `(doses,)`. Leave out a dose that edits nothing."""
    targeted_pn: Float[Tensor, "doses images"]
    """Effect of the edit on each image, `(doses, images)`; more is better. Not finite where it was not measured."""
    controls: Mapping[str, Tensor]
    """Effects of each control arm on the same images: `(doses, images)` for an arm that has one form, and `(doses, draws, images)` for one
    that is drawn at random, at least twice."""
    drift_p: Float[Tensor, " doses"]
    """Mean drift of the output where nothing should change, `(doses,)`."""
    collateral_p: Float[Tensor, " doses"] | None = None
    """Change of accuracy on images on which the latent is silent, `(doses,)`. None without labels; NaN without such images."""


@dataclass(frozen=True)
class StatusRule:
    """Limits of `decide_status`."""

    drift: float
    """Largest drift with which a dose leaves the model whole."""
    collateral: float
    """Largest loss of accuracy, as a share, with which it does."""
    images: int = 20
    """Smallest number of images from which a latent is judged."""
    level: float = 0.05
    """1 − the confidence of the intervals, over all doses together."""


@dataclass(frozen=True)
class BestControl:
    """The control that an edit is furthest from exceeding, at each dose."""

    arms: tuple[str, ...]
    """Name of the arm at each dose."""
    level_p: Float64[Tensor, " doses"]
    """Its effect, `(doses,)`: for a random arm, the upper end of the interval over draws."""
    half_p: Float64[Tensor, " doses"]
    """Half the width of the interval of targeted − control, paired over images, `(doses,)`."""


CausalStatus = Literal["causal", "reads_only", "breaks_model", "untested"]
"""What a latent's edit does, in one word."""


@dataclass(frozen=True)
class Status:
    """The causal status of a latent, at the dose that speaks most for it. Numbers are NaN if it is untested."""

    status: CausalStatus
    """Its status."""
    dose: float = math.nan
    """The dose, in units of the latent's 99th percentile."""
    effect: float = math.nan
    """Mean effect of the targeted edit."""
    effect_low: float = math.nan
    """The effect, less half the width of the paired interval of targeted − control. It is above `best_control` where the edit counts."""
    effect_high: float = math.nan
    """The effect, plus the same."""
    best_control: float = math.nan
    """Effect of the best control."""
    control: str = ""
    """Name of the best control's arm."""


def best_control(targeted_pn: Float[Tensor, "doses images"], controls: Mapping[str, Tensor], level: float = 0.05) -> BestControl:
    """Find, at each dose, the control arm that leaves the least room below the targeted edit.

    The effect of an arm that is drawn at random is the upper end of an interval over draws, which one more draw exceeds with a probability
    of about level/2, however many draws there are:

    - With enough draws, 39 for a level of 5 %, it is the draw of rank ⌈(r + 1)(1 − level/2)⌉ from below. In any population, one more draw
      exceeds it with a probability of at most level/2.
    - With fewer, it is the largest draw or m + t · s · √(1 + 1/r), whichever is larger. m and s are the mean and the standard deviation of
      the r draws' mean effects, and t is the 1 − level/2 quantile of Student's distribution with r − 1 degrees of freedom. One more draw
      exceeds it with a probability of at most level/2 if the population is normal, and of at most 1/(r + 1) in any: 5 % from 19 draws.

    The largest of many draws would make a control ever stronger, and half of all random latents exceed the mean.

    The interval of targeted − control is Student's over images, for the difference in each image from the mean of the draws. The edit must
    exceed every arm, so the arms need no correction for their number (Berger 1982: intersection-union test).

    Args:
        targeted_pn: Effect of the edit on each image, `(doses, images)`, on at least two images.
        controls: Effects of each control arm, as in `DoseCurve`; at least one.
        level: 1 − the confidence of each interval.

    Returns:
        The best control at each dose.
    """
    assert controls and targeted_pn.shape[1] >= 2, f"{len(controls)} controls, {targeted_pn.shape[1]} images"
    targeted, n = targeted_pn.double(), targeted_pn.shape[1]
    levels, halves = [], []
    for name, effects in controls.items():
        effects = effects.double()
        if effects.ndim == 3:
            assert effects.shape[1] >= 2, f"{name} has {effects.shape[1]} draws"
            levels.append(_upper_end(effects.mean(2), level))
            effects = effects.mean(1)
        else:
            levels.append(effects.mean(1))
        halves.append(_quantile(level, n - 1) / math.sqrt(n) * (targeted - effects).std(1))
    level_ap, half_ap = torch.stack(levels), torch.stack(halves)
    best, names = (level_ap + half_ap).argmax(0), list(controls)
    of_best = (of_all.gather(0, best[None])[0] for of_all in (level_ap, half_ap))
    return BestControl(tuple(names[at] for at in best.tolist()), *of_best)


def _upper_end(draws_pr: Float64[Tensor, "doses draws"], level: float) -> Float64[Tensor, " doses"]:
    r, ascending = draws_pr.shape[1], draws_pr.sort(1).values
    rank = math.ceil((r + 1) * (1 - level / 2))
    if rank <= r:
        return ascending[:, rank - 1]
    normal = draws_pr.mean(1) + _quantile(level, r - 1) * math.sqrt(1 + 1 / r) * draws_pr.std(1)
    return torch.maximum(normal, ascending[:, -1])


def _quantile(level: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - level / 2))


def decide_status(curve: DoseCurve, rule: StatusRule) -> Status:
    """Decide whether a latent's edit does more than its controls, within the strength at which the latent was observed.

    Only doses from 0 to 1 decide, which are no stronger than the latent gets; stronger ones may be drawn beside them. An edit is above its
    controls at a dose if the lower end of the interval of targeted − best control (`best_control`), paired over images, is above 0. As an
    edit at any dose suffices, the level of the intervals is divided by the number of doses that decide (Bonferroni). A latent is

    - `causal` if the edit is above its controls at a dose at which neither drift nor loss of accuracy exceeds its bound;
    - `breaks_model` if it is above them only at doses at which one does;
    - `reads_only` if it is above them at no dose;
    - `untested` if there are too few images, or no dose that decides was measured with a drift and all controls.

    The bounds apply to the measured values, not to an end of their intervals. A latent whose expected effect over images is that of a
    control is causal with a probability of at most level/2, and so is one that is like any random latent, if there are enough of these
    (`best_control`). That is the probability for one latent: among a thousand without an effect, some will be causal.

    Args:
        curve: Effects by dose.
        rule: The limits.

    Returns:
        The status, at the dose with the largest lower end among those that decide for it.
    """
    decides = _is_measured(curve) & (curve.doses_p >= 0) & (curve.doses_p <= STRONGEST)
    if not decides.any() or not curve.controls or curve.targeted_pn.shape[1] < max(rule.images, 2):
        return Status("untested")
    effect = curve.targeted_pn[decides].double().mean(1)
    control = best_control(
        curve.targeted_pn[decides], {name: of_arm[decides] for name, of_arm in curve.controls.items()}, rule.level / int(decides.sum())
    )
    low = effect - control.half_p - control.level_p
    breaks = curve.drift_p > rule.drift
    if curve.collateral_p is not None:
        breaks = breaks | (curve.collateral_p < -rule.collateral)
    status, chosen = _choose(low > 0, breaks[decides])
    at = int(torch.where(chosen, low, -math.inf).argmax())
    value, half, level = (float(of_doses[at]) for of_doses in (effect, control.half_p, control.level_p))
    return Status(status, float(curve.doses_p[decides][at]), value, value - half, value + half, level, control.arms[at])


def _choose(is_above_p: Bool[Tensor, " doses"], breaks_p: Bool[Tensor, " doses"]) -> tuple[CausalStatus, Bool[Tensor, " doses"]]:
    """Return the status, and the doses that decide for it."""
    if (is_above_p & ~breaks_p).any():
        return "causal", is_above_p & ~breaks_p
    return ("breaks_model", is_above_p) if is_above_p.any() else ("reads_only", torch.ones_like(is_above_p))


def _is_measured(curve: DoseCurve) -> Bool[Tensor, " doses"]:
    arms = (curve.targeted_pn, *curve.controls.values())
    return torch.stack([curve.drift_p.isfinite(), *(of_arm.isfinite().flatten(1).all(1) for of_arm in arms)]).all(0)
