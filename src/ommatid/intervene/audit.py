"""Audit: features on which the model leans for a class for the wrong reason, and what the worst group of images gains without them.

All pairs of a class and a live latent are counted on the evaluation images. A pair is suspicious by the two numbers of
`ommatid.metrics.reliance`, or if the latent follows a competing attribute. The most suspicious pairs are then tested: the model is run with
the latent ablated, with other latents ablated that fire about as often, and after LEACE.

The test asks whether an image is of the class. Its groups are the images of the class and all others, each divided by whether they have the
attribute that the latent follows or, if it follows none, the latent itself.

Suffixes: n images, p pairs, a arms.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from ommatid.activations.columns import from_float16
from ommatid.activations.joint import read_joint
from ommatid.compute.evenly import spread_evenly
from ommatid.compute.undefined import none_for_nan
from ommatid.config import InterveneParams
from ommatid.errors import InputError, ModelError
from ommatid.events import Listener, Progress
from ommatid.images.eval_split import iter_latent_firings, load_eval_split
from ommatid.intervene.arms import match_latents
from ommatid.intervene.attributes import Attributes, load_attributes
from ommatid.intervene.edit import Edit, Editor
from ommatid.intervene.masks import Masks
from ommatid.intervene.subject import Subject
from ommatid.metrics import activation_outside, best_control, fit_leace, group_accuracies
from ommatid.metrics.interventions import LEAST_IN_GROUP
from ommatid.metrics.reliance import Pairs, Reliance, Span, count_pairs, follow_attribute, measure_reliance, share_of, suspicion
from ommatid.schemas import AUDIT_GROUPS, N_AUDIT_IMAGES
from ommatid.vlm import Replacement

N_RUN = 1000
"""Number of evaluation images that are audited if the model must be run on them, as the activations hold no embeddings of its own."""
N_TOKENS = 2**15
"""Number of evaluation tokens to which LEACE is fitted."""
PER_GROUP = 32
"""Number of images of each group on which a pair is tested."""
PER_CLASS = 1024
"""Number of pairs of a class that are listed, the most suspicious."""


@dataclass(frozen=True)
class Audited:
    """What the audit of one SAE found. Rows have the columns of their tables, except `sae`."""

    pairs: list[dict[str, Any]]
    """Rows of the table `audit`."""
    images: list[dict[str, Any]]
    """Rows of the table `audit_images`."""
    counts: dict[str, Any]
    """The row of the table `audits`."""


def leave_unaudited(reason: str) -> Audited:
    """Return an audit of nothing.

    Args:
        reason: Why nothing was audited.
    """
    names = ("n_with_attributes", "n_images", "n_classes", "n_latents", "n_pairs", "n_too_few", "n_examined", "n_unlisted", "n_suspicious")
    return Audited([], [], {"status": reason, "attributes": [], **dict.fromkeys((*names, "n_tested", "n_suspects"), 0)})


def audit(params: InterveneParams, subject: Subject, on_event: Listener) -> Audited:
    """Audit the latents of one SAE.

    Args:
        params: The section `intervene`.
        subject: The model and the SAE.
        on_event: Called with each progress event.

    Returns:
        What was found; with a reason if the images have no several classes, or the model cannot tell them apart.

    Raises:
        ConfigError: The file of attributes cannot be used.
    """
    images = subject.inputs["images"]
    attributes = load_attributes(params.audit.attributes, images) if params.audit.attributes else {}
    if not subject.classes:
        return leave_unaudited("the evaluation images are not of several classes; label them (images.source), and run all stages again")
    try:
        called = _call_images(subject, on_event)
    except (ModelError, InputError) as error:
        return leave_unaudited(str(error))
    return _Audit(params, subject, called, attributes).run(on_event)


@dataclass(frozen=True)
class _Called:
    """Evaluation images with a class, and what the model calls them."""

    numbers: Int64[np.ndarray, " images"]
    """Number of each image, ascending, `(n,)`."""
    names: tuple[str, ...]
    """Names of the classes."""
    truth: Int64[np.ndarray, " images"]
    """Class of each image, `(n,)`."""
    called: Int64[np.ndarray, " images"]
    """Class with the highest score for each image, `(n,)`."""


def _call_images(subject: Subject, on_event: Listener) -> _Called:
    """Classify evaluation images: all by the embeddings that extraction stored, or some by running the model."""
    readout, activations = subject.readout, subject.inputs["extract"]
    numbers = np.array(sorted(image for image, name in subject.classes.items() if name in readout.names), dtype=np.int64)
    if len({subject.classes[image] for image in numbers.tolist()}) < 2:
        raise InputError(f"the classes that are read from the model's output ({', '.join(readout.names[:8])}) are not those of the images")
    if subject.model.d_embed is not None and subject.head is None and activations.manifest.params["namer"] is None:
        scores = readout.scores(read_joint(activations, numbers))
    else:
        numbers = numbers[spread_evenly(len(numbers), N_RUN)]
        batches = []
        for batch, pixels in subject.load_pixels(numbers.tolist()):
            batches.append(readout.scores(subject.model.splice(pixels, subject.writes.name, [lambda tokens: tokens])[0]))
            on_event(Progress("classify images", sum(map(len, batches)), len(numbers)))
            assert len(batch) == len(batches[-1]), (len(batch), len(batches[-1]))
        scores = torch.cat(batches)
    place = {name: index for index, name in enumerate(readout.names)}
    truth = np.array([place[subject.classes[image]] for image in numbers.tolist()], dtype=np.int64)
    return _Called(numbers, tuple(readout.names), truth, scores.argmax(1).cpu().numpy())


@dataclass(frozen=True)
class _Followed:
    """For each pair, the attribute that the latent follows most; -1 and NaN where there is none."""

    attribute: Int64[np.ndarray, " pairs"]
    """Its place among the attributes."""
    lift: Float64[np.ndarray, " pairs"]
    """Share of the images with it that have the latent, divided by that of all images whose attribute is known."""
    follows: Span
    """By how much the latent follows it rather than the class."""


class _Audit:
    """The audit of one SAE.

    Args:
        params: The section `intervene`.
        subject: The model and the SAE.
        images: The images, and what the model calls them.
        attributes: What else is known of images.
    """

    def __init__(self, params: InterveneParams, subject: Subject, images: _Called, attributes: Attributes) -> None:
        self.params, self.subject, self.images = params, subject, images
        self.attributes = {name: np.array([values.get(image, math.nan) for image in images.numbers.tolist()], dtype=np.float64)
                           for name, values in attributes.items()}  # fmt: skip
        """Whether images have each attribute, `(n,)`: 1, 0, or NaN if it is not known."""
        self.masks = Masks(params.masks, subject.inputs["images"]) if params.masks else None

    def run(self, on_event: Listener) -> Audited:
        """Examine all pairs, and test the most suspicious."""
        images, n_classes = self.images, len(self.images.names)
        counted = count_pairs(self.having.items(), images.truth, images.called, n_classes)
        pairs = counted.pairs
        reliance, followed = measure_reliance(pairs), self._follow(pairs)
        scores = suspicion(reliance, followed.follows if self.attributes else None)
        status = np.where(scores > 0, "untested", "unsuspicious").astype(object)
        ranked = [at for at in np.lexsort((pairs.classes, pairs.latents, -scores)).tolist() if scores[at] > 0]
        for at in ranked:
            if self._is_of_another_class(pairs.take(np.array([at]))):
                status[at] = "of_another_class"
        alarming = [at for at in ranked if status[at] == "untested"]
        tested, columns = alarming[: self.params.audit.n], {at: {} for at in range(len(pairs))}
        for done, at in enumerate(tested, start=1):
            has, name = self._divide(int(pairs.latents[at]), at, followed)
            try:
                columns[at] = self._test(int(pairs.latents[at]), int(pairs.classes[at]), has, name, len(tested))
                columns[at] |= self._locate(int(pairs.latents[at]), int(pairs.classes[at]))
                status[at] = columns[at].pop("status")
            except InputError as error:  # about this latent alone, such as too few others to compare it with
                columns[at] = {"reason": str(error)}
            on_event(Progress("test suspicious features", done, len(tested)))
        for at in alarming[self.params.audit.n :]:
            columns[at] = {"reason": f"the audit tests {self.params.audit.n} pairs (intervene.audit.n), and so many are more suspicious"}
        listed = self._list(pairs, scores)
        rows = self._rows(pairs, reliance, followed, scores)
        is_known = np.isfinite([*self.attributes.values(), np.full(len(images.numbers), math.nan)]).any(0)
        ran = [at for at in tested if status[at] != "untested"]
        return Audited(
            [rows[at] | {"status": status[at], **columns[at]} for at in listed],
            [row for at in ran for row in self._show(int(pairs.latents[at]), int(pairs.classes[at]))],
            {
                "status": "ok",
                "attributes": list(self.attributes),
                "n_with_attributes": int(is_known.sum()),
                "n_images": len(images.numbers),
                "n_classes": len(np.unique(images.truth)),
                "accuracy": float((images.truth == images.called).mean()),
                "n_latents": len(self.having),
                "n_pairs": len(pairs) + counted.n_too_few,
                "n_too_few": counted.n_too_few,
                "n_examined": len(pairs),
                "n_unlisted": len(pairs) - len(listed),
                "n_suspicious": len(ranked),
                "n_tested": len(ran),
                "n_suspects": int((status == "suspect").sum()),
            },
        )

    @cached_property
    def having(self) -> dict[int, Int32[np.ndarray, " _having"]]:
        """Places of the images that have each latent, the strongest first: those on which it fires, but no more than half of all."""
        split, numbers = load_eval_split(self.subject.inputs["images"]), self.images.numbers
        place = np.full(len(split.images), -1, dtype=np.int32)  # half the memory, as there is a number for each firing
        place[split.rows_of(numbers)] = np.arange(len(numbers))
        files = [str(path) for path in self.subject.inputs["evaluate"].files("firings")]
        with tempfile.TemporaryDirectory(prefix="ommatid-audit-") as temp:
            found = {fired.latent: place[fired.rows] for fired in iter_latent_firings(files, split, temp)}
        return {latent: images[images >= 0][: len(numbers) // 2] for latent, images in found.items()}

    def _has(self, latent: int) -> Float64[np.ndarray, " images"]:
        """Return whether each image has a latent, `(n,)`: 1 or 0."""
        has = np.zeros(len(self.images.numbers))
        has[self.having[latent]] = 1
        return has

    def _follow(self, pairs: Pairs) -> _Followed:
        """Find the attribute that the latent of each pair follows most."""
        n, unknown = len(pairs), np.full(len(pairs), math.nan)
        best = _Followed(np.full(n, -1), unknown, Span(unknown, np.full(n, -1.0), np.full(n, 1.0)))
        for index, has in enumerate(self.attributes.values()):
            counts = self._count_attribute(pairs, has)
            n_other, n_class = counts["n_other"], counts["n_class"]
            found = follow_attribute(counts["has_other"], n_other, counts["has_class"], n_class, max(1, n * len(self.attributes)))
            with np.errstate(invalid="ignore", divide="ignore"):  # 0/0: the attribute is known of no image with the latent
                lift = share_of(counts["has_with"], counts["n_with"], 1).value / share_of(counts["has_known"], counts["n_known"], 1).value
            is_better = (np.minimum(n_other, n_class) >= LEAST_IN_GROUP) & ~(found.value <= best.follows.value)
            best = _Followed(
                np.where(is_better, index, best.attribute),
                np.where(is_better, lift, best.lift),
                Span(*(np.where(is_better, getattr(found, end), getattr(best.follows, end)) for end in ("value", "low", "high"))),
            )
        return best

    def _count_attribute(self, pairs: Pairs, has: Float64[np.ndarray, " images"]) -> dict[str, Int64[np.ndarray, " pairs"]]:
        """Count the images by an attribute, the latent and the class of each pair."""
        truth, n_classes = self.images.truth, len(self.images.names)
        is_with, is_without = has == 1, has == 0
        with_c, without_c = (np.bincount(truth[chosen], minlength=n_classes) for chosen in (is_with, is_without))
        latents, place = np.unique(pairs.latents, return_inverse=True)
        with_lc, without_lc = np.zeros((2, len(latents), n_classes), dtype=np.int64)
        for row, latent in enumerate(latents.tolist()):
            having = self.having[latent]
            with_lc[row], without_lc[row] = (np.bincount(truth[having[of[having]]], minlength=n_classes) for of in (is_with, is_without))
        has_with, has_known = with_lc.sum(1)[place], (with_lc + without_lc).sum(1)[place]
        return {
            "has_other": has_with - with_lc[place, pairs.classes],
            "n_other": with_c.sum() - with_c[pairs.classes],
            "has_class": without_lc[place, pairs.classes],
            "n_class": without_c[pairs.classes],
            "has_with": has_with,
            "n_with": np.full(len(pairs), with_c.sum()),
            "has_known": has_known,
            "n_known": np.full(len(pairs), (with_c + without_c).sum()),
        }

    def _is_of_another_class(self, pair: Pairs) -> bool:
        """Return whether the classes whose images are mistaken for that of a pair have the latent more often than the class itself.

        The latent is then a feature of theirs, and what it shows is that the model confuses the classes.
        """
        truth, called = self.images.truth, self.images.called
        (latent,), (target,) = pair.latents.tolist(), pair.classes.tolist()
        having, n_classes = self.having[latent], len(self.images.names)
        share_c = np.bincount(truth[having], minlength=n_classes) / np.maximum(np.bincount(truth, minlength=n_classes), 1)
        mistaken = having[(called[having] == target) & (truth[having] != target)]
        own = share_of(pair.n_with, pair.n_with + pair.n_without, 1)
        return bool(share_c[truth[mistaken]].mean() > own.high[0])

    def _divide(self, latent: int, at: int, followed: _Followed) -> tuple[Float64[np.ndarray, " images"], str]:
        """Return what divides the images in the test of a pair, `(n,)`: 1, 0 or NaN; and its name."""
        if followed.attribute[at] >= 0 and followed.follows.low[at] > 0:
            name = list(self.attributes)[followed.attribute[at]]
            return self.attributes[name], name
        return self._has(latent), f"latent {latent}"

    def _test(self, latent: int, target: int, has: Float64[np.ndarray, " images"], name: str, n_tests: int) -> dict[str, Any]:
        """Run the model on images of each group without a latent, and return the columns of the pair."""
        is_class, rng = self.images.truth == target, np.random.default_rng([self.params.seed, latent, target])
        group_of = np.where(np.isnan(has), -1, 2.0 * ~is_class + (has == 0)).astype(np.int64)
        groups = [np.flatnonzero(group_of == group) for group in range(len(AUDIT_GROUPS))]
        chosen = np.sort(np.concatenate([rng.permutation(group)[:PER_GROUP] for group in groups if len(group) >= LEAST_IN_GROUP]))
        right_an = torch.from_numpy(self._run_arms(latent, chosen, has, rng) == target) == torch.from_numpy(is_class[chosen])
        group_n = torch.from_numpy(group_of[chosen])
        found = [group_accuracies(right, group_n // 2, group_n % 2).accuracy for right in right_an]
        worst = [min(of.values(), key=lambda one: one.value).value for of in found]
        balanced = [sum(one.value for one in of.values()) / len(of) for of in found]
        sizes = torch.bincount(group_n, minlength=len(AUDIT_GROUPS))
        weights = len(chosen) / (len(found[0]) * sizes[group_n].double())
        gains = (right_an.double() - right_an[0].double()) * weights  # the mean over images is what the mean over groups gains
        n_draws = self.params.draws
        controls = {f"latent {draw}": gains[None, 2 + draw] for draw in range(n_draws)}  # the ablation must gain more than every one
        control = best_control(gains[1:2], {"none": torch.zeros(1, len(chosen)), **controls}, 0.05 / n_tests)
        gain_low = balanced[1] - balanced[0] - float(control.half_p[0]) - float(control.level_p[0])
        lowest = min(found[0], key=lambda group: found[0][group].value)
        random = worst[2 : 2 + n_draws]
        leace = {"worst_leace": worst[-1], "balanced_leace": balanced[-1]} if len(worst) > 2 + n_draws else {}
        return {
            "status": "suspect" if gain_low > 0 else "unconfirmed",
            "n_tested": len(chosen),
            "grouped_by": name,
            "worst_group": AUDIT_GROUPS[2 * lowest[0] + lowest[1]],
            "worst": worst[0],
            "worst_ablated": worst[1],
            "worst_random": sum(random) / len(random),
            "worst_random_low": min(random),
            "worst_random_high": max(random),
            "balanced": balanced[0],
            "balanced_ablated": balanced[1],
            "balanced_random": max(balanced[2 : 2 + n_draws]),
            "gain_low": gain_low,
            **leace,
        }

    def _run_arms(
        self, latent: int, chosen: Int64[np.ndarray, " chosen"], has: Float64[np.ndarray, " images"], rng: np.random.Generator
    ) -> Int64[np.ndarray, "arms chosen"]:
        """Return what the model calls images, `(a, n)`: as it is, without the latent, without each of some others, and after LEACE."""
        subject, n_latents = self.subject, self.subject.sae.n_latents
        is_live = subject.comparable([latent])
        others = match_latents(subject.densities[0], is_live, subject.sae.W_dec, [latent], self.params.draws, rng)[:, 0].tolist()
        reads = None if subject.reads == subject.writes else subject.reads
        editor = Editor(subject.device_sae, [latent, *others], subject.writes, reads, torch.full((n_latents,), math.nan), subject.device)
        erase = self._fit_leace(has)
        called = []
        for _, pixels in subject.load_pixels(self.images.numbers[chosen].tolist()):
            read = subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name] if reads else None
            codes = None if read is None else editor.read(read)
            edits = [editor.replacement(Edit((one,), "ablate"), codes) for one in (latent, *others)]
            arms: list[Replacement] = [lambda tokens: tokens, *edits, *([erase] if erase else [])]
            outputs = subject.model.splice(pixels, subject.writes.name, arms)
            called.append(torch.stack([subject.readout.scores(one).argmax(1).cpu() for one in outputs]))
        return torch.cat(called, 1).numpy()

    def _fit_leace(self, has: Float64[np.ndarray, " images"]) -> Replacement | None:
        """Fit LEACE to the stored tokens of evaluation images; None if all have the same of what is to be erased."""
        place, x = self.tokens
        concept = torch.from_numpy(has)[place]
        is_known = concept.isfinite()
        if not 0 < concept[is_known].sum() < is_known.sum():
            return None
        leace, writes = fit_leace(x[is_known], concept[is_known, None]), self.subject.writes

        def erase(tokens: Tensor) -> Tensor:
            kept = writes.pick(tokens)
            rows = kept.flatten(0, 1).cpu()
            return writes.put(tokens, leace(rows).to(kept).unflatten(0, kept.shape[:2]))

        return erase

    @cached_property
    def tokens(self) -> tuple[Int64[Tensor, " tokens"], Float32[Tensor, "tokens d"]]:
        """Places of the images, and stored activations, of evaluation tokens from images at equal distances."""
        inputs, numbers = self.subject.inputs, self.images.numbers
        activations = inputs["target"] if self.subject.sae.config.target else inputs["extract"]
        step = max(1, math.ceil(len(numbers) * activations.summary["tokens_per_image"] / N_TOKENS))
        wanted, places, x = numbers[::step], [], []
        for rows in activations.iter_batches("eval", ["image", "x"], n_rows=2**14):
            image = rows["image"].to_numpy()
            is_wanted = torch.from_numpy(np.isin(image, wanted))
            places.append(torch.from_numpy(np.searchsorted(numbers, image))[is_wanted])
            x.append(from_float16(rows["x"])[is_wanted].float())
        return torch.cat(places), torch.cat(x)

    def _locate(self, latent: int, target: int) -> dict[str, Any]:
        """Return how much of a latent's activation is outside the objects of images of a class; nothing if no such image has a mask."""
        subject, grid = self.subject, self.subject.reads.hookpoint.grid
        patches = [at for at, place in enumerate(subject.reads.places) if place.kind == "patch"]
        if self.masks is None or grid is None or len(patches) != math.prod(grid):
            return {}
        having = self.having[latent]
        numbers = self.images.numbers[having[self.images.truth[having] == target]].tolist()
        if not (shown := [number for number in numbers if number in self.masks][:PER_GROUP]):
            return {}
        acts, order = [], []
        for batch, pixels in subject.load_pixels(shown):
            x = subject.reads.pick(subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name]).float()
            indices = torch.tensor([latent], device=x.device)
            acts.append(subject.device_sae.encode_latents(x.flatten(0, 1), indices).unflatten(0, x.shape[:2])[:, patches, 0].cpu())
            order += batch.tolist()
        found = activation_outside(torch.cat(acts), self.masks.load(order, subject.model.preprocess, grid).objects)
        return none_for_nan({"outside": found.share.value, "outside_area": found.area})

    def _list(self, pairs: Pairs, scores: Float64[np.ndarray, " pairs"]) -> list[int]:
        """Return the places of the most suspicious pairs of each class, in the order of latents and classes."""
        order = np.lexsort((pairs.latents, -scores, pairs.classes))
        _, first, counts = np.unique(pairs.classes[order], return_index=True, return_counts=True)
        kept = [order[start : start + min(n, PER_CLASS)] for start, n in zip(first, counts, strict=True)]
        chosen = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        return chosen[np.lexsort((pairs.classes[chosen], pairs.latents[chosen]))].tolist()

    def _rows(self, pairs: Pairs, reliance: Reliance, followed: _Followed, scores: Float64[np.ndarray, " pairs"]) -> list[dict[str, Any]]:
        """Return the columns of all pairs that need no test."""
        share = (pairs.n_with + pairs.n_others_with) / len(self.images.numbers)
        columns = {
            "suspicion": scores,
            "lift": pairs.n_with / (pairs.n_with + pairs.n_without) / share,
            "accuracy_with": reliance.accuracy_with.value,
            "accuracy_without": reliance.accuracy_without.value,
            "mistaken_with": reliance.mistaken_with.value,
            "trust_with": reliance.trust_with.value,
            "trust_without": reliance.trust_without.value,
            "attribute_lift": followed.lift,
        }
        for name in ("accuracy_more", "mistaken_more", "trust_less"):
            span: Span = getattr(reliance, name)
            columns |= {name: span.value, f"{name}_low": span.low, f"{name}_high": span.high}
        is_given, names, classes = followed.attribute >= 0, [*self.attributes, None], self.images.names
        ends = {"follows": followed.follows.value, "follows_low": followed.follows.low, "follows_high": followed.follows.high}
        columns |= {name: np.where(is_given, column, math.nan) for name, column in ends.items()}
        counts = {name: getattr(pairs, name) for name in ("n_with", "n_without", "n_others_with", "n_others_without")}
        return [
            {"latent": int(latent), "class": classes[target], "attribute": names[attribute]}
            | {name: int(column[at]) for name, column in counts.items()}
            | none_for_nan({name: float(column[at]) for name, column in columns.items()})
            for at, (latent, target, attribute) in enumerate(zip(pairs.latents, pairs.classes, followed.attribute, strict=True))
        ]

    def _show(self, latent: int, target: int) -> Iterator[dict[str, Any]]:
        """Iterate over the rows of the images that show what the audit says of a pair."""
        images, having = self.images, self.having[latent]
        is_class, is_called = images.truth == target, images.called == target
        lacking = np.setdiff1d(np.flatnonzero(is_class), having)
        others = having[~is_class[having]]
        parts: Mapping[str, np.ndarray] = {
            "class_with": having[is_class[having]],
            "class_without": lacking[np.argsort(is_called[lacking], kind="stable")],
            "others_with": others[np.argsort(~is_called[others], kind="stable")],
        }
        for part, places in parts.items():
            for rank, place in enumerate(places[:N_AUDIT_IMAGES].tolist(), start=1):
                keys = {"latent": latent, "class": images.names[target], "part": part, "rank": rank}
                yield keys | {"image": int(images.numbers[place]), "called": images.names[images.called[place]]}
