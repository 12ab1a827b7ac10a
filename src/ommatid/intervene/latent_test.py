"""The test of one latent: all arms at all doses, their outcomes, and the status that follows.

Suffixes: n images, d width of the output, a arms, p doses, r draws of a random control.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from ommatid.compute.controls import EXCEEDED_ARMS, RANDOM_ARMS
from ommatid.errors import InputError
from ommatid.intervene.arms import Arm, make_arms
from ommatid.intervene.edit import Edit
from ommatid.intervene.study import N_RIVALS, Movement, Study
from ommatid.intervene.subject import Described
from ommatid.metrics import Interval
from ommatid.metrics.interventions import (
    CausalStatus,
    DoseCurve,
    Status,
    StatusRule,
    bootstrap_means,
    change_rates,
    collateral,
    cosine_drift,
    decide_status,
    output_score,
    raised_most,
)  # fmt: skip
from ommatid.vlm import Replacement

LEAST_FIRING = 8
"""Number of images on which a latent must fire for its removal to be a test."""
LEAST_IMAGES = 20
"""Number of images from which a latent's status is decided."""
RAISED = 10
"""One in so many of the classes counts as raised by an edit in the output score. Arad et al. take 20 of a vocabulary of a hundred thousand;
of ten classes that would be all, whose highest probability says nothing of which are raised."""
OUTCOME = "toward_label"
"""Outcome that decides the status."""


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


def raised_count(n_names: int) -> int:
    """Return the number of names that count as raised by an edit, of those that are read from the output."""
    return math.ceil(n_names / RAISED)


class ArmsTest:
    """The arms of one latent, what they did to each image, and the status that follows.

    Args:
        study: The study.
        chosen: The latent.
        outcome: Outcome that decides the status.

    Raises:
        InputError: About this latent alone, such as too few others to compare it with.
    """

    def __init__(self, study: Study, chosen: Described, outcome: str) -> None:
        self.study, self.chosen, self.outcome = study, chosen, outcome
        self.doses = sorted(study.params.doses)
        self.editor = study.subject.editor([chosen])
        self.edits = [Edit((chosen.latent,), "set", dose) if dose else Edit((chosen.latent,), "ablate") for dose in self.doses]
        self.controls = study.subject.controls([chosen], study.params.seed, study.params.draws)
        self.edited: list[tuple[str, float]] = []
        """Name and dose of each arm but `none`, in the order of the results."""
        self.fires: list[Tensor] = []
        """Whether the latent fires on each image, by batch."""
        self.zero_dose = 0.0
        """Largest change of an output by an edit that moves nothing."""

    def _make_arms(self, read: Float[Tensor, "batch tokens d_model"]) -> tuple[list[Arm], Replacement]:
        """Make the arms of a batch of images, given the tokens that the SAE reads, and an edit that moves nothing."""
        codes = self.editor.read(read, reconstruct=True) if self.editor.reads != self.editor.writes else None
        arms = make_arms(self.editor, self.edits, self.controls, codes)
        self.edited = [(arm.name, (arm.edit and arm.edit.dose) or 0.0) for arm in arms[1:]]
        return arms, self.editor.replacement(Edit((self.chosen.latent,), "scale", 1.0), codes)

    def _judge(
        self,
        effects_an: Float64[Tensor, "arms images"],
        drift_p: Float64[Tensor, " doses"],
        random_drift_p: Float64[Tensor, " doses"],
        others_kpn: Float64[Tensor, "both doses images"] | None = None,
    ) -> tuple[dict[str, Any], CausalStatus]:
        """Return the row of `effects`, and the status that the same rule gives the first random latent in the place of this one.

        Args:
            effects_an: Change of the outcome on each image in each arm but `none`; what removal lowers, other doses should raise.
            drift_p: Drift of the edit at each dose.
            random_drift_p: Drift of the first random latent.
            others_kpn: Effects of the edit, and of the first random latent, on the same outcome of another name, as a further control.
        """
        signs = torch.tensor([-1.0 if dose == 0 else 1.0 for dose in self.doses], dtype=torch.float64)[:, None]
        promised = {name: self._by_dose(effects_an, name) for name in (*EXCEEDED_ARMS, "targeted")}
        promised = {name: values * (signs if values.ndim == 2 else signs[:, None]) for name, values in promised.items()}
        if self._n_firing < LEAST_FIRING:  # to remove a latent, or a random one in its place, from too few of the images tests nothing
            for drift in (drift_p, random_drift_p):
                drift[[place for place, dose in enumerate(self.doses) if dose == 0]] = math.nan
        nothing = torch.zeros_like(promised["targeted"])  # or an edit would be above its controls if these do worse than nothing
        controls = {"none": nothing, **{name: promised[name] for name in EXCEEDED_ARMS}}
        first, rest = promised["random_latent"][:, 0], promised["random_latent"][:, 1:]
        others = {"none": nothing, "random_latent": rest, "random_direction": controls["random_direction"]}
        if others_kpn is not None:
            controls["other_label"], others["other_label"] = others_kpn * signs
        random_status = self._decide(first, others, random_drift_p).status
        return self._effect(self._decide(promised["targeted"], controls, drift_p), random_status), random_status

    def _decide(self, targeted_pn: Tensor, controls: Mapping[str, Tensor], drift_p: Tensor) -> Status:
        params = self.study.params
        curve = DoseCurve(torch.tensor(self.doses, dtype=torch.float64), targeted_pn, controls, drift_p)
        # No bound on collateral: to lose the accuracy on other classes is what a latent that is set to its strongest should do.
        return decide_status(curve, StatusRule(params.max_drift, math.inf, LEAST_IMAGES))

    def _effect(self, found: Status, random_status: CausalStatus) -> dict[str, Any]:
        row = {"latent": self.chosen.latent, "status": found.status}
        if found.status == "untested":
            return {**row, "reason": self._why_untested()}
        numbers = {name: getattr(found, name) for name in ("dose", "effect", "effect_low", "effect_high", "best_control")}
        act = found.dose * self.chosen.scale
        return {**row, "outcome": self.outcome, "act": act, **numbers, "control_causal": random_status}

    @property
    def _n_firing(self) -> int:
        """Number of images on which the latent fires."""
        return int(torch.cat(self.fires).sum())

    def _why_untested(self) -> str:
        if (n := sum(map(len, self.fires))) < LEAST_IMAGES:
            return f"only {n} images; {LEAST_IMAGES} are needed"
        if self.doses[0] == 0 and self._n_firing < LEAST_FIRING:
            few = f"it fires on {self._n_firing} of {n} images, and its removal is tested on {LEAST_FIRING} or more"
            return f"{few}; name a dose above 0 and up to 1, or run the model on more images (intervene.n_images)"
        return "no dose from 0 to 1 is named, and only such doses decide"

    def _places(self, name: str, dose: float | None) -> list[int]:
        """Places of the arms of a name and dose among the edited ones, one for each draw."""
        return [place for place, (arm, of) in enumerate(self.edited) if arm == name and (of == dose or name == "untouched")]

    def _by_dose(self, values_an: Float64[Tensor, "arms images"], name: str) -> Tensor:
        """Values of an arm by dose, `(doses, images)`, or `(doses, draws, images)` if it is drawn."""
        found = torch.stack([values_an[self._places(name, dose)] for dose in self.doses])
        return found if name in RANDOM_ARMS else found[:, 0]

    def _each(self) -> Iterator[tuple[str, float, list[int]]]:
        """Iterate over name, dose and places of all arms with an edit, and of `untouched`, whose dose is written as 0."""
        for name in dict.fromkeys(arm for arm, _ in self.edited):
            for dose in self.doses if name != "untouched" else (0.0,):
                yield name, dose, self._places(name, dose)

    def _rows(self, outcome: str, values_an: Float64[Tensor, "arms images"]) -> Iterator[dict[str, Any]]:
        """Iterate over rows of an outcome that is a mean over images, and over the draws of a random control."""
        arms, n = list(self._each()), values_an.shape[1]
        means = bootstrap_means(torch.stack([values_an[places].mean(0) for _, _, places in arms]))
        for (name, dose, places), *found in zip(arms, *(of_rows.tolist() for of_rows in means), strict=True):
            yield self._row(outcome, name, dose, Interval(*found), n, len(places))

    def _known(self, outcome: str, arm: str, dose: float, found: Interval, n: int, n_draws: int) -> Iterator[dict[str, Any]]:
        if not math.isnan(found.value):
            yield self._row(outcome, arm, dose, found, n, n_draws)

    def _row(self, outcome: str, arm: str, dose: float, found: Interval, n: int, n_draws: int) -> dict[str, Any]:
        low, high = (None if math.isnan(end) else end for end in (found.low, found.high))
        keys = {"latent": self.chosen.latent, "outcome": outcome, "arm": arm, "dose": dose}
        return {**keys, "value": found.value, "low": low, "high": high, "n_images": n, "n_draws": n_draws}


class LatentTest(ArmsTest):
    """The arms of one latent, and their results batch by batch.

    Args:
        study: The study.
        chosen: The latent.

    Raises:
        InputError: As for `ArmsTest`.
    """

    BYTES = 14
    """Bytes kept for each image in each arm."""
    RIVAL_BYTES = 8 * N_RIVALS
    """Bytes kept for each image at each dose of the movement toward other labels."""

    def __init__(self, study: Study, chosen: Described) -> None:
        super().__init__(study, chosen, OUTCOME)
        self._movement: Movement | None = None
        self._why = ""
        """Why the outcome that decides the status is not measured."""
        try:
            self._movement = study.movement(chosen)
        except InputError as error:
            self._why = str(error)
        self._n_run = 0

    def run(self, pixels: UInt8[Tensor, "batch height width 3"], read: Float[Tensor, "batch tokens d_model"]) -> Float32[Tensor, "batch d"]:
        """Run all arms on a batch of images, and keep what their outcomes need.

        To remove a latent from images on which it is silent changes nothing, so the model is not run for it.

        Args:
            pixels: The images, which come in the order of the study, and those of a batch from one half of it.
            read: Tokens of these images at the hookpoint that the SAE reads.

        Returns:
            The outputs of the model as it is, `(batch, d)`.
        """
        fires = (self.editor.read(read).acts[..., 0] > 0).any(1)
        self.fires.append(fires.cpu())
        (none, *arms), zero = self._make_arms(read)
        if not self._n_run:
            self._make_room(len(arms))
        images = torch.arange(self._n_run, self._n_run + len(pixels))
        self._n_run += len(pixels)
        removals = [place for place, arm in enumerate(arms) if arm.edit and arm.edit.kind == "ablate"]
        others = [place for place, arm in enumerate(arms) if not arm.edit or arm.edit.kind != "ablate"]
        plain, *edited, unmoved = self._splice(pixels, [none.replacement, *(arms[place].replacement for place in others), zero])
        self.zero_dose = max(self.zero_dose, float((unmoved - plain).abs().max()))
        if self.study.readout:
            self._predicted[:, images] = self.study.readout.log_probabilities(plain).argmax(1).int()
        self._keep(others, images, plain, edited)
        if removals and fires.any():
            (none, *arms), _ = self._make_arms(read[fires])
            plain_there, *edited = self._splice(pixels[fires], [none.replacement, *(arms[place].replacement for place in removals)])
            self._keep(removals, images[fires.cpu()], plain_there, edited)
        self.editor.forget()
        return plain

    def _make_room(self, n_arms: int) -> None:
        n, n_common, readout = len(self.study.images), len(self.study.common), self.study.readout
        self._toward, self._drift = (torch.zeros(n_arms, n) for _ in range(2))
        self._toward_rivals = torch.zeros(2, len(self.doses), N_RIVALS, n)
        self._n_rivals = 0
        both = [[self._places(name, dose)[0] for dose in self.doses] for name in ("targeted", "random_latent")]
        self._measured = {place: (kind, dose) for kind, places in enumerate(both) for dose, place in enumerate(places)}
        """Place in `_toward_rivals` of the arms whose movement toward other labels is kept."""
        self._predicted = torch.zeros(1 + n_arms, n if readout else 0, dtype=torch.int32)
        self._rises = torch.zeros(n_arms, n_common if readout else 0, dtype=torch.float64)
        self._scores = torch.zeros(n_arms, n - self.study.n_first if readout else 0)
        self._raised: Int64[Tensor, "arms raised"] | None = None

    def _splice(self, pixels: Tensor, replacements: Sequence[Replacement]) -> list[Float32[Tensor, "batch d"]]:
        subject = self.study.subject
        return [output.float().cpu() for output in subject.model.splice(pixels, subject.writes.name, replacements)]

    def _keep(
        self, places: Sequence[int], images: Int64[Tensor, " batch"], plain: Float32[Tensor, "batch d"], edited: Sequence[Tensor]
    ) -> None:
        """Keep what the outputs of some arms on some images say."""
        readout, n_first = self.study.readout, self.study.n_first
        before = self.study.among_common(readout.log_probabilities(plain)) if readout else plain
        for place, outputs in zip(places, edited, strict=True):
            if self._movement:
                moved = self._movement(plain, outputs).float()
                self._toward[place, images], self._n_rivals = moved[:, 0], moved.shape[1] - 1
                if place in self._measured:
                    kind, dose = self._measured[place]
                    self._toward_rivals[kind, dose][: self._n_rivals, images] = moved[:, 1:].T
            self._drift[place, images] = cosine_drift(plain, outputs).float()
            if readout:
                log_p = readout.log_probabilities(outputs)
                self._predicted[1 + place, images] = log_p.argmax(1).int()
                after = self.study.among_common(log_p)
                if images[0] < n_first:
                    self._rises[place] += (after - before).sum(0)
                else:
                    self._scores[place, images - n_first] = output_score(before, after, self._raised_texts[place]).float()

    @property
    def _raised_texts(self) -> Int64[Tensor, "arms raised"]:
        """The classes that each arm raises most on the first half of the images."""
        if self._raised is None:
            self._raised = torch.stack([raised_most(of_arm, raised_count(len(of_arm))) for of_arm in self._rises])
        return self._raised

    def finish(self, spread: float) -> Found:
        """Compute the outcomes and the status.

        Args:
            spread: Mean of 1 − cosine of the outputs of different images, in which drift is measured.
        """
        drift = self._drift.double() / spread
        erasure = self.study.erasure.rows(self.chosen, self.controls) if self.study.erasure else ()
        rows = [*self._rows("drift", drift), *self._class_rows(), *erasure]
        if not self._movement:
            effect = {"latent": self.chosen.latent, "status": "untested", "reason": self._why}
            return Found(effect, rows, "untested", self.zero_dose)
        toward = self._toward.double()
        of_drift, of_random = self._by_dose(drift, "targeted").mean(1), self._by_dose(drift, "random_latent")[:, 0].mean(1)
        others = self._best_rivals() if self._n_rivals else None
        effect, random_status = self._judge(toward, of_drift, of_random, others)
        rows = [*self._rows(OUTCOME, toward), *(self._rival_rows(others[0]) if others is not None else ()), *rows]
        return Found(effect, rows, random_status, self.zero_dose)

    def _best_rivals(self) -> Float64[Tensor, "both doses images"]:
        """Effects of the edit, and of the first random latent, on the label to which each dose moves images most; if 0, from which."""
        found = self._toward_rivals[:, :, : self._n_rivals].double()
        signs = torch.tensor([-1.0 if dose == 0 else 1.0 for dose in self.doses], dtype=torch.float64)
        best = (found.mean(3) * signs[:, None]).argmax(2)
        return found.take_along_dim(best[..., None, None], 2)[:, :, 0]

    def _rival_rows(self, others_pn: Float64[Tensor, "doses images"]) -> Iterator[dict[str, Any]]:
        means = bootstrap_means(others_pn)
        for dose, *found in zip(self.doses, *(of_doses.tolist() for of_doses in means), strict=True):
            yield self._row(OUTCOME, "other_label", dose, Interval(*found), others_pn.shape[1], self._n_rivals)

    def _class_rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over rows of the outcomes about classes, if the output says classes and the latent has a most common one."""
        study, readout, top = self.study, self.study.readout, self.chosen.top_class
        if not readout or top not in readout.names:
            return
        plain, target, n = self._predicted[0], readout.index(top), len(study.images)
        place_of = {name: place for place, name in enumerate(readout.names)}
        truth = torch.tensor([place_of.get(study.subject.classes.get(image, ""), -1) for image in study.images])
        is_silent = ~torch.cat(self.fires) & (truth >= 0)
        for name, dose, places in self._each():
            edited, n_draws = self._predicted[[place + 1 for place in places]], len(places)
            images = torch.arange(n).repeat(n_draws)
            rates = change_rates(plain.repeat(n_draws), edited.flatten(), target, images if n_draws > 1 else None)
            loss = collateral((plain == truth).repeat(n_draws), (edited == truth).flatten(), is_silent.repeat(n_draws))
            shares = (
                ("target_rate", rates.target, rates.n_target // n_draws),
                ("other_rate", rates.other, rates.n_other // n_draws),
                ("specificity", rates.specificity, n),
            )
            for outcome, share, of in shares:
                yield from ({**row, "target": top} for row in self._known(outcome, name, dose, share, of, n_draws))
            lost = Interval(-loss.change.value, -loss.change.high, -loss.change.low)
            if n_draws > 1:
                lost = Interval(lost.value, math.nan, math.nan)  # draws of the same images are no further images
            yield from self._known("collateral", name, dose, lost, loss.n // n_draws, n_draws)
        yield from self._rows("output_score", self._scores.double())
