"""The test of one latent: all arms at all doses, their outcomes, and the status that follows.

Suffixes: n images, d width of the output, a arms, p doses, r draws of a random control.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from ommatid.intervene.arms import Arm, make_arms
from ommatid.intervene.edit import Edit
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described
from ommatid.metrics import Interval
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
from ommatid.vlm import Replacement

LEAST_FIRING = 8
"""Number of images on which a latent must fire for its removal to be a test."""
LEAST_IMAGES = 20
"""Number of images from which a latent's status is decided."""
CONTROLS = ("sign_flipped", "random_latent", "random_direction")
"""Arms that the edit must exceed. Two are shown beside them: `diff_means` is another way to the same end and not a control of it, and
`untouched` changes what the edit, which keeps the SAE's error, does not."""
RANDOM = ("random_latent", "random_direction")
"""Arms that are drawn several times."""
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
        self, effects_an: Float64[Tensor, "arms images"], drift_p: Float64[Tensor, " doses"], random_drift_p: Float64[Tensor, " doses"]
    ) -> tuple[dict[str, Any], CausalStatus]:
        """Return the row of `effects`, and the status that the same rule gives the first random latent in the place of this one.

        Args:
            effects_an: Change of the outcome on each image in each arm but `none`; what removal lowers, other doses should raise.
            drift_p: Drift of the edit at each dose.
            random_drift_p: Drift of the first random latent.
        """
        signs = torch.tensor([-1.0 if dose == 0 else 1.0 for dose in self.doses], dtype=torch.float64)[:, None]
        promised = {name: self._by_dose(effects_an, name) for name in (*CONTROLS, "targeted", "diff_means") if self._has(name)}
        promised = {name: values * (signs if values.ndim == 2 else signs[:, None]) for name, values in promised.items()}
        if int(torch.cat(self.fires).sum()) < LEAST_FIRING:  # to remove a latent from too few of the images tests nothing
            drift_p[[place for place, dose in enumerate(self.doses) if dose == 0]] = math.nan
        nothing = torch.zeros_like(promised["targeted"])  # or an edit would be above its controls if these do worse than nothing
        controls = {"none": nothing, **{name: promised[name] for name in CONTROLS}}
        first, rest = promised["random_latent"][:, 0], promised["random_latent"][:, 1:]
        others = {"none": nothing, "random_latent": rest, "random_direction": controls["random_direction"]}
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
            return {**row, "reason": f"only {sum(map(len, self.fires))} images; {LEAST_IMAGES} are needed, and a dose of 1 at most"}
        numbers = {name: getattr(found, name) for name in ("dose", "effect", "effect_low", "effect_high", "best_control")}
        act = found.dose * self.chosen.scale
        return {**row, "outcome": self.outcome, "act": act, **numbers, "control_causal": random_status}

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
    """

    def __init__(self, study: Study, chosen: Described) -> None:
        super().__init__(study, chosen, OUTCOME)
        assert chosen.label is not None, f"latent {chosen.latent} has no label"
        self.label = study.texts[chosen.label]
        self.others = torch.stack([text for label, text in study.texts.items() if label != chosen.label])
        self.toward: list[Tensor] = []
        self.drift: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self.log_p: list[Tensor] = []

    def run(self, pixels: UInt8[Tensor, "batch height width 3"], read: Float[Tensor, "batch tokens d_model"]) -> Float32[Tensor, "batch d"]:
        """Run all arms on a batch of images, and keep what their outcomes need.

        Args:
            pixels: The images.
            read: Tokens of these images at the hookpoint that the SAE reads.

        Returns:
            The outputs of the model as it is, `(batch, d)`.
        """
        study = self.study
        arms, zero = self._make_arms(read)
        outputs = study.subject.model.splice(pixels, study.subject.writes.name, [*(arm.replacement for arm in arms), zero])
        plain, *edited, unmoved = (output.float().cpu() for output in outputs)
        self.zero_dose = max(self.zero_dose, float((unmoved - plain).abs().max()))
        self.fires.append((self.editor.read(read).acts[..., 0] > 0).any(1).cpu())
        self.toward.append(torch.stack([toward_label(plain, one, self.label, self.others) for one in edited]))
        self.drift.append(torch.stack([cosine_drift(plain, one) for one in edited]))
        if study.readout:
            log_p = torch.stack([study.readout.log_probabilities(one) for one in (plain, *edited)])
            self.predicted.append(log_p.argmax(2))
            if len(study.common) < log_p.shape[2]:  # a thousand classes would not fit into memory for all arms
                log_p = log_p[..., [study.readout.index(name) for name in study.common]].log_softmax(2)
            self.log_p.append(log_p)
        return plain

    def finish(self, spread: float) -> Found:
        """Compute the outcomes and the status.

        Args:
            spread: Mean of 1 − cosine of the outputs of different images, in which drift is measured.
        """
        toward, drift = torch.cat(self.toward, 1), torch.cat(self.drift, 1) / spread
        of_drift, of_random = self._by_dose(drift, "targeted").mean(1), self._by_dose(drift, "random_latent")[:, 0].mean(1)
        effect, random_status = self._judge(toward, of_drift, of_random)
        rows = [*self._rows(OUTCOME, toward), *self._rows("drift", drift), *self._class_rows()]
        return Found(effect, rows, random_status, self.zero_dose)

    def _class_rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over rows of the outcomes about classes, if the images have classes and the latent has a most common one."""
        readout, top = self.study.readout, self.chosen.top_class
        if not readout or top not in readout.names:
            return
        log_p, predicted = torch.cat(self.log_p, 1), torch.cat(self.predicted, 1)
        plain, target = log_p[0], readout.index(top)
        place_of = {name: place for place, name in enumerate(readout.names)}
        truth = torch.tensor([place_of.get(self.study.subject.classes.get(image, ""), -1) for image in self.study.images])
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
