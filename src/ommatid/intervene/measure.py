"""What the model's output does while latents of one SAE are set to chosen activations, beside controls.

For each latent an image passes once through the part of the model before the hookpoint, and through the rest once for each dose and arm.

Suffixes: n images, d width of the output, a arms of a latent, p doses, r draws of a random control, s latents, m texts.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, UInt8
from torch import Tensor

from ommatid.activations.batches import load_sample
from ommatid.config import InterveneParams
from ommatid.config.intervene import BestLatents, FiringLatents, ListedLatents
from ommatid.errors import InputError, ModelError
from ommatid.evaluate.batches import load_classes
from ommatid.evaluate.zero_shot import Classifier, draw_images, iter_drawn_pixels, make_classifier
from ommatid.events import Listener, Progress
from ommatid.extract.networks import find_device, load_explained
from ommatid.extract.tokens import TokenPicker
from ommatid.intervene.arms import draw_controls, make_arms
from ommatid.intervene.attribution import Attributor, class_log_odds
from ommatid.intervene.edit import Edit, Editor
from ommatid.metrics import Interval, unit
from ommatid.metrics.interventions import (
    CausalStatus,
    DoseCurve,
    Status,
    StatusRule,
    bootstrap_mean,
    change_rates,
    collateral,
    cosine_drift,
    decide_status,
    output_score,
    raised_most,
    toward_label,
)  # fmt: skip
from ommatid.sae.model import SAE
from ommatid.schemas import N_ATTRIBUTED
from ommatid.store import Artefact
from ommatid.vlm import VisionModel, check_hookpoint

N_SAMPLE = 2**17
"""Number of training tokens from which the scale of each latent, and the mean of the tokens on which it fires, are computed."""
QUANTILE = 0.99
"""Quantile of a latent's positive activations that is dose 1."""
LEAST_FIRING = 8
"""Number of sampled tokens on which a latent must fire for its scale to be known, and of images for its removal to be a test."""
N_LABELS = 64
"""Number of labels, beside those of the chosen latents, toward which an edit should not move images."""
AT_ONCE = 64
"""Number of latents that are described together."""
ENTRIES = 2**24
"""Number of activations (tokens x latents) that are computed at a time; they take 64 MB."""
LEAST_IMAGES = 20
"""Number of images from which a latent's status is decided."""
CONTROLS = ("sign_flipped", "random_latent", "random_direction")
"""Arms that the edit must exceed. Two are shown beside them: `diff_means` is another way to the same end and not a control of it, and
`untouched` changes what the edit, which keeps the SAE's error, does not."""
N_OUTPUTS = 32
"""Number of classes, the most common first, that are attributed to latents, and among which the output score is computed."""
N_EXACT = 4
"""Number of latents to which a class is attributed exactly as well."""
RANDOM = ("random_latent", "random_direction")
"""Arms that are drawn several times."""
OUTCOME = "toward_label"
"""Outcome that decides the status."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one SAE. Rows have the columns of their tables, except `sae`."""

    interventions: list[dict[str, Any]]
    """Rows of the table `interventions`."""
    effects: list[dict[str, Any]]
    """Rows of the table `effects`, of the latents that were chosen."""
    attributions: list[dict[str, Any]]
    """Rows of the table `attributions`."""
    zero_dose: float | None
    """Largest change of an output by an edit that moves nothing; anything but 0 is a fault of the edit. None if no edit was made."""
    random_causal: float | None
    """Share of random latents, one matched to each tested latent, that the same rule calls causal; None if there are none."""


def measure(params: InterveneParams, inputs: Mapping[str, Artefact], on_event: Listener) -> Measured | str:
    """Run the model again with latents of one SAE set to chosen activations.

    Args:
        params: The section `intervene`.
        inputs: `images`, the activations (`extract`), the SAE (`train`), its evaluation (`evaluate`), its labels (`label`) and, for a
            transcoder, the activations that it decodes (`target`).
        on_event: Called with each progress event.

    Returns:
        What was measured; or, if nothing can be measured, the reason.
    """
    if "model" not in inputs["extract"].manifest.params:
        return "the activations were imported from files, and the model that they come from is not available"
    try:
        study = Study(params, inputs)
        return study.run(on_event)
    except (ModelError, InputError) as error:
        return str(error)


@dataclass(frozen=True)
class Chosen:
    """A latent that is tested."""

    latent: int
    """Index of the latent."""
    label: str
    """Its label."""
    scale: float
    """Activation that dose 1 is: the 99th percentile of its positive ones."""
    diff_means: Float32[Tensor, " d_out"] | None
    """Mean of the sampled tokens on which it fires, minus that of the others, `(d,)`; None if the edited tokens are not those it reads."""
    top_class: str | None
    """Most common class of its strongest images; None if they have none."""


class Study:
    """The model, the images and the latents of one SAE.

    Args:
        params: The section `intervene`.
        inputs: Artefacts, as for `measure`.

    Raises:
        ModelError: The model cannot be loaded, has no text tower, or its tokens cannot be put back.
    """

    def __init__(self, params: InterveneParams, inputs: Mapping[str, Artefact]) -> None:
        self.params, self.inputs = params, inputs
        activations = inputs["extract"]
        self.model: VisionModel = load_explained(activations.manifest.params)
        if self.model.d_embed is None:
            raise ModelError(f"{self.model.name} has no text tower with which to embed the labels that an edit should move images toward")
        self.device = find_device()
        self.sae = SAE.load(inputs["train"].path)
        self.reads = _make_picker(self.model, activations)
        self.writes = _make_picker(self.model, inputs["target"]) if self.sae.config.target else self.reads
        self.classes = load_classes(inputs["images"])
        numbers = self._choose_images()
        self.drawn = draw_images(inputs["images"], numbers, len(numbers))
        self.chosen: list[int] = []
        """The latents that are tested."""

    def run(self, on_event: Listener) -> Measured:
        """Measure all chosen latents."""
        chosen = self._choose_latents()
        self.chosen = [one.latent for one in chosen]
        if not chosen:
            raise InputError("no chosen latent has a label and fires often enough to be edited; choose others with intervene.latents")
        tests: list[LatentTest] = []
        untested: list[dict[str, Any]] = []
        for one in chosen:
            try:
                tests.append(LatentTest(self, one))
            except InputError as error:  # about this latent alone, such as too few others to compare it with
                untested.append({"latent": one.latent, "status": "untested", "reason": str(error)})
        if not tests:
            raise InputError(untested[0]["reason"])
        plain: list[Tensor] = []
        n = len(self.drawn.numbers)
        for done, pixels in self._pixels():
            read = self.model.capture(pixels, [self.reads.name]).tokens[self.reads.name]
            for place, test in enumerate(tests, start=1):
                outputs = test.run(pixels, read)
                on_event(Progress("edit images", done - len(pixels) * (len(tests) - place) // len(tests), n))
            plain.append(outputs)
        spread = _spread_of(torch.cat(plain))
        found = [test.finish(spread) for test in tests]
        statuses = [one.random_status for one in found]
        return Measured(
            interventions=[row for one in found for row in one.interventions],
            effects=[*(one.effect for one in found), *untested],
            attributions=self._attribute(on_event) if self.classifier else [],
            zero_dose=max(one.zero_dose for one in found),
            random_causal=sum(status == "causal" for status in statuses) / len(statuses),
        )

    def _attribute(self, on_event: Listener) -> list[dict[str, Any]]:
        """Attribute the log-odds of the most common classes to all latents by gradients, and exactly to the first few of each class."""
        assert self.classifier
        texts, classes, names = self.classifier.texts.float(), self.classifier.classes, self.common
        scores = {name: class_log_odds(texts, classes.index(name), self.classifier.scale) for name in names}
        sae = SAE(self.sae.config, **{name: tensor.to(self.device) for name, tensor in self.sae.tensors().items()})
        attributor, n = Attributor(self.model, sae, self.reads, self.writes), len(self.drawn.numbers)
        cheap = {name: torch.zeros(sae.n_latents, dtype=torch.float64) for name in names}
        for done, pixels in self._pixels():
            code = attributor.encode(pixels)
            for name, score in scores.items():
                cheap[name] += attributor.cheap(pixels, score, code).by_image.sum(0).double().cpu() / n
            on_event(Progress("attribute classes", done, n))
        ranked = {name: effects.abs().topk(min(N_ATTRIBUTED, len(effects))).indices.tolist() for name, effects in cheap.items()}
        exact = {name: torch.zeros(min(N_EXACT, sae.n_latents), dtype=torch.float64) for name in names}
        for _, pixels in self._pixels():
            code = attributor.encode(pixels)
            for name, score in scores.items():
                exact[name] += attributor.exact(pixels, score, ranked[name][:N_EXACT], code).sum(0).double().cpu() / n
        return [
            {
                "output": name, "rank": rank, "latent": latent, "effect": float(cheap[name][latent]),
                "exact": float(exact[name][rank - 1]) if rank <= N_EXACT else None, "n_images": n,
            }
            for name in names
            for rank, latent in enumerate(ranked[name], start=1)
            if cheap[name][latent]
        ]  # fmt: skip

    def _pixels(self) -> Iterator[tuple[int, UInt8[Tensor, "batch height width 3"]]]:
        """Iterate over batches of the drawn images: the number of images so far, and the pixels."""
        done = 0
        for batch in iter_drawn_pixels(self.inputs["images"], self.drawn, self.model.preprocess, self.device):
            done += len(batch.numbers)
            yield done, batch.of[0].to(self.device)

    def _choose_images(self) -> list[int]:
        """Draw evaluation images, as many of each class as possible if they have classes."""
        table = self.inputs["images"].read("images", ["image", "split"])
        of_eval = [image for image, split in zip(table["image"].to_pylist(), table["split"].to_pylist(), strict=True) if split == "eval"]
        rng = np.random.default_rng(self.params.seed)
        shuffled = [of_eval[place] for place in rng.permutation(len(of_eval))]
        if self.classes:
            seen: dict[str, int] = {}
            rank = {}
            for image in shuffled:
                label = self.classes.get(image, "")
                rank[image] = seen[label] = seen.get(label, -1) + 1
            shuffled.sort(key=rank.__getitem__)  # stable: the first of every class, then the second, ...
        return shuffled[: self.params.n_images]

    def _choose_latents(self) -> list[Chosen]:
        """Choose the latents that are tested, the best first; those that cannot be edited are left out."""
        columns = ["latent", "ms", "n_images", "top_classes"]
        latents = {row["latent"]: row for row in self.inputs["evaluate"].read("latents", columns).to_pylist()}
        able = [latent for latent, row in latents.items() if row["n_images"] and latent in self.labels]
        most = len(able)
        match self.params.latents:
            case ListedLatents(latents=listed):
                ranked = [latent for latent in listed if latent in set(able)]
            case FiringLatents(min_images=least):
                ranked = [latent for latent in able if latents[latent]["n_images"] >= least]
            case BestLatents(by=by, n=most):
                value = {latent: latents[latent]["ms"] if by == "ms" else self.labels[latent]["score"] for latent in able}
                ranked = sorted((latent for latent in able if value[latent] is not None), key=lambda latent: (-value[latent], latent))
        chosen: list[Chosen] = []
        for start in range(0, len(ranked), AT_ONCE):
            for latent, scale, diff_means in self._describe(ranked[start : start + AT_ONCE]):
                top = next(iter(latents[latent]["top_classes"] or ()), None)
                chosen.append(Chosen(latent, self.labels[latent]["label"], scale, diff_means, top))
            if len(chosen) >= most:
                break
        return chosen[:most]

    def _describe(self, latents: Sequence[int]) -> Iterator[tuple[int, float, Float32[Tensor, " d_out"] | None]]:
        """Describe latents by the sampled tokens: scale and difference of means; those that fire on too few are left out."""
        indices = torch.tensor(latents)
        rows = max(1, ENTRIES // self.sae.n_latents)
        acts = torch.cat([self.sae.encode_latents(part, indices) for part in self.sample.split(rows)])
        fires = acts > 0
        n_firing, n = fires.sum(0), len(acts)
        sums, total = fires.T.float() @ self.sample, self.sample.sum(0)
        for place, latent in enumerate(latents):
            if (firing := int(n_firing[place])) >= LEAST_FIRING:
                has_others = self.reads == self.writes and firing < n
                means = sums[place] / firing - (total - sums[place]) / (n - firing) if has_others else None
                yield latent, float(acts[fires[:, place], place].quantile(QUANTILE)), means

    @cached_property
    def sample(self) -> Float32[Tensor, "tokens d_model"]:
        """Training tokens, `(tokens, d_model)` float32."""
        return load_sample(self.inputs["extract"], N_SAMPLE)

    @cached_property
    def labels(self) -> dict[int, dict[str, Any]]:
        """Label and score of each latent that has a label, by latent: the same that the relation `features` shows."""
        rows = self.inputs["label"].read("labels", ["latent", "labeller", "place", "status", "label", "score"]).to_pylist()
        found: dict[int, dict[str, Any]] = {}
        for row in sorted(rows, key=_label_order):
            if row["status"] == "ok":
                found.setdefault(row["latent"], row)
        return found

    @cached_property
    def densities(self) -> tuple[Float64[Tensor, " d_sae"], Bool[Tensor, " d_sae"]]:
        """Share of tokens on which each latent fires, and whether it is live, `(s,)` each."""
        table = self.inputs["evaluate"].read("latents", ["latent", "density", "is_dead"])
        latents, density = table["latent"].to_pylist(), torch.zeros(self.sae.n_latents, dtype=torch.float64)
        is_live = torch.zeros(self.sae.n_latents, dtype=torch.bool)
        density[latents] = torch.tensor(table["density"].to_pylist(), dtype=torch.float64)
        is_live[latents] = torch.tensor([not dead for dead in table["is_dead"].to_pylist()])
        return density, is_live

    @cached_property
    def common(self) -> list[str]:
        """The most common classes, at most `N_OUTPUTS`, the most common first."""
        counts = Counter(self.classes.values())
        return sorted(counts, key=lambda name: (-counts[name], name))[:N_OUTPUTS]

    @cached_property
    def classifier(self) -> Classifier | None:
        """Zero-shot classifier of the images' classes; None if they have fewer than two."""
        names = sorted(set(self.classes.values()))
        return make_classifier(self.model, self.inputs["images"], names) if len(names) > 1 else None

    @cached_property
    def texts(self) -> dict[str, Float64[Tensor, " d"]]:
        """Embeddings of labels, each the mean over the model's templates, `(d,)`: those of the chosen latents and some of the others."""
        names = sorted({row["label"] for row in self.labels.values()})
        rng = np.random.default_rng(self.params.seed)
        some = [names[place] for place in rng.permutation(len(names))[:N_LABELS]]
        wanted = list(dict.fromkeys([*(self.labels[latent]["label"] for latent in self.chosen), *some]))
        if len(wanted) < 2:
            raise InputError(f"all labels are {wanted[0]!r}, so an edit cannot be told from one toward another label")
        by_template = [unit(self.model.embed_text([form.format(one) for one in wanted]).cpu()) for form in self.model.text_templates]
        return dict(zip(wanted, torch.stack(by_template).mean(0), strict=True))


@dataclass(frozen=True)
class Found:
    """What was found of one latent."""

    effect: dict[str, Any]
    """Its row of the table `effects`."""
    interventions: list[dict[str, Any]]
    """Its rows of the table `interventions`."""
    random_status: CausalStatus
    """Status that the same rule gives a random latent in its place."""
    zero_dose: float
    """Largest change of an output by an edit that moves nothing."""


class LatentTest:
    """The arms of one latent, and their results batch by batch.

    Args:
        study: The study.
        chosen: The latent.
    """

    def __init__(self, study: Study, chosen: Chosen) -> None:
        self.study, self.chosen = study, chosen
        self.doses = sorted(study.params.doses)
        scales = torch.full((study.sae.n_latents,), math.nan)
        scales[chosen.latent] = chosen.scale
        reads = None if study.reads == study.writes else study.reads
        self.editor = Editor(study.sae, [chosen.latent], study.writes, reads, scales, study.device)
        self.edits = [Edit((chosen.latent,), "set", dose) if dose else Edit((chosen.latent,), "ablate") for dose in self.doses]
        density, is_live = study.densities
        same = [n for n, row in study.labels.items() if row["label"] == chosen.label and n != chosen.latent]
        is_live = is_live.clone()
        is_live[same] = False  # a latent of the same label would be no control
        self.controls = draw_controls(
            self.editor, [chosen.latent], density, is_live, chosen.diff_means, study.params.seed, study.params.draws
        )
        self.label = study.texts[chosen.label]
        self.others = torch.stack([text for label, text in study.texts.items() if label != chosen.label])
        self.edited: list[tuple[str, float]] = []
        """Name and dose of each arm but `none`, in the order of the results."""
        self.toward: list[Tensor] = []
        self.drift: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self.log_p: list[Tensor] = []
        self.fires: list[Tensor] = []
        self.zero_dose = 0.0

    def run(self, pixels: UInt8[Tensor, "batch height width 3"], read: Float[Tensor, "batch tokens d_model"]) -> Float32[Tensor, "batch d"]:
        """Run all arms on a batch of images, and keep what their outcomes need.

        Args:
            pixels: The images.
            read: Tokens of these images at the hookpoint that the SAE reads.

        Returns:
            The outputs of the model as it is, `(batch, d)`.
        """
        study = self.study
        codes = self.editor.read(read, reconstruct=True) if self.editor.reads != self.editor.writes else None
        zero = self.editor.replacement(Edit((self.chosen.latent,), "scale", 1.0), codes)
        arms = make_arms(self.editor, self.edits, self.controls, codes)
        self.edited = [(arm.name, (arm.edit and arm.edit.dose) or 0.0) for arm in arms[1:]]
        outputs = study.model.splice(pixels, study.writes.name, [*(arm.replacement for arm in arms), zero])
        plain, *edited, unmoved = (output.float().cpu() for output in outputs)
        self.zero_dose = max(self.zero_dose, float((unmoved - plain).abs().max()))
        self.fires.append((self.editor.read(read).acts[..., 0] > 0).any(1).cpu())
        self.toward.append(torch.stack([toward_label(plain, one, self.label, self.others) for one in edited]))
        self.drift.append(torch.stack([cosine_drift(plain, one) for one in edited]))
        if study.classifier:
            log_p = torch.stack([study.classifier.log_probabilities(one) for one in (plain, *edited)])
            self.predicted.append(log_p.argmax(2))
            if len(study.common) < log_p.shape[2]:  # a thousand classes would not fit into memory for all arms
                log_p = log_p[..., study.classifier.indices(study.common)].log_softmax(2)
            self.log_p.append(log_p)
        return plain

    def finish(self, spread: float) -> Found:
        """Compute the outcomes and the status.

        Args:
            spread: Mean of 1 − cosine of the outputs of different images, in which drift is measured.
        """
        toward, drift = torch.cat(self.toward, 1), torch.cat(self.drift, 1) / spread
        signs = torch.tensor([-1.0 if dose == 0 else 1.0 for dose in self.doses], dtype=torch.float64)[:, None]
        promised = {name: self._by_dose(toward, name) for name in (*CONTROLS, "targeted", "diff_means") if self._has(name)}
        promised = {name: values * (signs if values.ndim == 2 else signs[:, None]) for name, values in promised.items()}
        of_drift = self._by_dose(drift, "targeted").mean(1)
        if int(torch.cat(self.fires).sum()) < LEAST_FIRING:  # to remove a latent from too few of the images tests nothing
            of_drift[[place for place, dose in enumerate(self.doses) if dose == 0]] = math.nan
        nothing = torch.zeros_like(promised["targeted"])  # or an edit would be above its controls if these do worse than nothing
        controls = {"none": nothing, **{name: promised[name] for name in CONTROLS}}
        status = self._decide(promised["targeted"], controls, of_drift)
        first, rest = promised["random_latent"][:, 0], promised["random_latent"][:, 1:]
        others = {"none": nothing, "random_latent": rest, "random_direction": controls["random_direction"]}
        random_drift = self._by_dose(drift, "random_latent")[:, 0].mean(1)
        rows = [*self._rows(OUTCOME, toward), *self._rows("drift", drift), *self._class_rows()]
        return Found(self._effect(status), rows, self._decide(first, others, random_drift).status, self.zero_dose)

    def _decide(self, targeted_pn: Tensor, controls: Mapping[str, Tensor], drift_p: Tensor) -> Status:
        params = self.study.params
        curve = DoseCurve(torch.tensor(self.doses, dtype=torch.float64), targeted_pn, controls, drift_p)
        # No bound on collateral: to lose the accuracy on other classes is what a latent that is set to its strongest should do.
        return decide_status(curve, StatusRule(params.max_drift, math.inf, LEAST_IMAGES))

    def _effect(self, found: Status) -> dict[str, Any]:
        row = {"latent": self.chosen.latent, "status": found.status}
        if found.status == "untested":
            return {**row, "reason": f"only {sum(map(len, self.fires))} images; {LEAST_IMAGES} are needed, and a dose of 1 at most"}
        numbers = {name: getattr(found, name) for name in ("dose", "effect", "effect_low", "effect_high", "best_control")}
        return {**row, "outcome": OUTCOME, "act": found.dose * self.chosen.scale, **numbers}

    def _has(self, name: str) -> bool:
        return any(arm == name for arm, _ in self.edited)

    def _places(self, name: str, dose: float | None) -> list[int]:
        """Places of the arms of a name and dose among the edited ones, one for each draw."""
        return [place for place, (arm, of) in enumerate(self.edited) if arm == name and (of == dose or name == "untouched")]

    def _by_dose(self, values_an: Float64[Tensor, "arms images"], name: str) -> Tensor:
        """Values of an arm by dose, `(doses, images)`, or `(doses, draws, images)` if it is drawn."""
        found = torch.stack([values_an[self._places(name, dose)] for dose in self.doses])
        return found if name in RANDOM else found[:, 0]

    def _each(self) -> Iterator[tuple[str, float, list[int]]]:
        """Iterate over name, dose and places of all arms with an edit, and of `untouched`, whose dose is written as 0."""
        for name in dict.fromkeys(arm for arm, _ in self.edited):
            for dose in self.doses if name != "untouched" else (0.0,):
                yield name, dose, self._places(name, dose)

    def _rows(self, outcome: str, values_an: Float64[Tensor, "arms images"]) -> Iterator[dict[str, Any]]:
        """Iterate over rows of an outcome that is a mean over images, and over the draws of a random control."""
        for name, dose, places in self._each():
            yield self._row(outcome, name, dose, bootstrap_mean(values_an[places].mean(0)), values_an.shape[1], len(places))

    def _class_rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over rows of the outcomes about classes, if the images have classes and the latent has a most common one."""
        classifier, top = self.study.classifier, self.chosen.top_class
        if not classifier or top not in classifier.classes:
            return
        log_p, predicted = torch.cat(self.log_p, 1), torch.cat(self.predicted, 1)
        plain, target = log_p[0], classifier.classes.index(top)
        place_of = {name: place for place, name in enumerate(classifier.classes)}
        truth = torch.tensor([place_of.get(self.study.classes.get(image, ""), -1) for image in self.study.drawn.numbers.tolist()])
        is_silent, n = ~torch.cat(self.fires) & (truth >= 0), len(truth)
        halves = torch.arange(n) % 2 == 0
        for name, dose, places in self._each():
            edited = predicted[[place + 1 for place in places]]
            images = torch.arange(n).repeat(len(places))
            rates = change_rates(predicted[0].repeat(len(places)), edited.flatten(), target, images if len(places) > 1 else None)
            loss = collateral((predicted[0] == truth).repeat(len(places)), (edited == truth).flatten(), is_silent.repeat(len(places)))
            of_draws = log_p[[place + 1 for place in places]]
            scores = [output_score(plain[~halves], one[~halves], raised_most(plain[halves], one[halves])) for one in of_draws]
            n_draws = len(places)
            yield from self._known("target_rate", name, dose, rates.target, rates.n_target // n_draws, n_draws)
            yield from self._known("other_rate", name, dose, rates.other, rates.n_other // n_draws, n_draws)
            yield from self._known("specificity", name, dose, rates.specificity, n, n_draws)
            lost = Interval(-loss.change.value, -loss.change.high, -loss.change.low)
            if n_draws > 1:
                lost = Interval(lost.value, math.nan, math.nan)  # draws of the same images are no further images
            yield from self._known("collateral", name, dose, lost, loss.n // n_draws, n_draws)
            yield from self._known("output_score", name, dose, bootstrap_mean(torch.stack(scores).mean(0)), int((~halves).sum()), n_draws)

    def _known(self, outcome: str, arm: str, dose: float, found: Interval, n: int, n_draws: int) -> Iterator[dict[str, Any]]:
        if not math.isnan(found.value):
            yield self._row(outcome, arm, dose, found, n, n_draws)

    def _row(self, outcome: str, arm: str, dose: float, found: Interval, n: int, n_draws: int) -> dict[str, Any]:
        low, high = (None if math.isnan(end) else end for end in (found.low, found.high))
        keys = {"latent": self.chosen.latent, "outcome": outcome, "arm": arm, "dose": dose}
        return {**keys, "value": found.value, "low": low, "high": high, "n_images": n, "n_draws": n_draws}


def _spread_of(outputs_nd: Float32[Tensor, "images d"]) -> float:
    """Mean of 1 − cosine of the outputs of two different images."""
    n, mean = len(outputs_nd), unit(outputs_nd).mean(0)
    return float((1 - mean @ mean) * n / (n - 1))


def _label_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Order of labels in which the first one of a latent is its best, as in the relation `features`."""
    score = -math.inf if row["score"] is None else row["score"]
    return (row["latent"], not row["labeller"].startswith("human"), -score, row["place"], row["labeller"])


def _make_picker(model: VisionModel, activations: Artefact) -> TokenPicker:
    name = activations.summary["hookpoint"]
    return TokenPicker(name, check_hookpoint(model, name), activations.manifest.params["tokens"])
