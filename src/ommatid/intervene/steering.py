"""Steering: what an edit of one latent, or of several, does to the model's output on given images, beside all of its controls.

For each batch the images pass once through the part of the model before the hookpoint, and through the rest once for each dose and arm.

Suffixes: a arms, p doses, b images, k kept tokens, l edited latents, n names.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.compute.controls import EXCEEDED_ARMS, N_DRAWS
from ommatid.errors import InputError, ModelError
from ommatid.extract.classifier import embed_texts
from ommatid.intervene.arms import ArmName, Controls, make_arms
from ommatid.intervene.edit import Edit, Editor, ErrorTerm, Unit, Where
from ommatid.intervene.readout import Readout

if TYPE_CHECKING:
    from ommatid.intervene.subject import Described, Subject

Dosed = Literal["set", "add", "scale"]
"""Kinds of edit that take a dose; to set 0 is to ablate."""
BATCH = 16
"""Number of images in a forward pass; the outputs of all arms are held together."""
MOST_ARMS = 2000
"""Largest number of arms over all doses, each of which takes a pass through the rest of the model."""
HIGH_FVU = 0.5
"""Fraction of variance unexplained at the edited tokens above which latents say less of an image than they leave unsaid."""
UNDOSED = ("none", "untouched", "prompt")
"""Arms that have no dose."""
N_NEAR = 15
"""Number of labels, beside those of the edited latents, with which the output is compared if images have no classes."""
N_LABELS = 1000
"""Largest number of labels among which the nearest are sought; a large text tower takes minutes for more."""


@dataclass(frozen=True)
class ArmKey:
    """One way in which the model was run."""

    name: ArmName
    """Name of the arm."""
    dose: float | None
    """The dose; None for the arms of `UNDOSED`."""
    draw: int
    """Number of the draw of a random control, from 0; 0 for all other arms."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edited:
    """An edit of latents on some images, at several doses, and what the SAE says of the images."""

    latents: tuple[int, ...]
    """The edited latents."""
    labels: tuple[str | None, ...]
    """Their labels; None for a latent without one."""
    top_classes: tuple[str | None, ...]
    """Most common class of the strongest images of each; None if they have none."""
    doses: tuple[float, ...]
    """Doses as they were asked for, ascending."""
    acts_pl: Float64[Tensor, "doses edited"]
    """Activation that each dose sets or adds, `(p, l)`; a factor if activations are scaled."""
    scales_l: Float64[Tensor, " edited"]
    """Activation of each latent that is dose 1, `(l,)`: the 99th percentile of its positive ones."""
    most_l: Float64[Tensor, " edited"]
    """Largest activation that was observed of each latent, on training tokens or evaluation images, `(l,)`."""
    kind: Dosed
    """What a dose sets: see `Edit`."""
    arms: tuple[ArmKey, ...]
    """The arms, in the order of their results: `none` and `untouched` first."""
    acts_bkl: Float32[Tensor, "images kept edited"]
    """Activations of the edited latents on the kept tokens, before any edit, `(b, k, l)`."""
    fvu_b: Float64[Tensor, " images"]
    """Fraction of variance unexplained of the SAE at the tokens that are edited, `(b,)`; NaN where none is."""
    grid: tuple[int, int] | None
    """Rows and columns of the kept patches, which come after all other kept tokens; None if tokens have no place in an image."""
    warnings: tuple[str, ...] = ()
    """What makes the results less sure than they look, a sentence each."""

    @property
    def relative_pl(self) -> Float64[Tensor, "doses edited"]:
        """Each dose in units of the latents' own scales, `(p, l)`; a factor if activations are scaled."""
        return self.acts_pl if self.kind == "scale" else self.acts_pl / self.scales_l

    def places(self, arm: str, dose: float | None = None) -> list[int]:
        """Return the places of an arm at a dose among all arms, one for each draw; none if it was not run."""
        wanted = None if arm in UNDOSED else dose
        return [place for place, key in enumerate(self.arms) if (key.name, key.dose) == (arm, wanted)]

    def of(self, values_ab: Tensor, arm: str, dose: float | None = None) -> Tensor:
        """Select the values of an arm at a dose from those of all arms, `(draws, b, ...)`; there are no draws if the arm was not run."""
        return values_ab[self.places(arm, dose)]

    def heat(self, image: int) -> Float32[Tensor, "edited rows cols"] | None:
        """Return where in an image the edited latents fire, `(l, rows, cols)`; None if tokens have no place in an image."""
        if self.grid is None:
            return None
        rows, cols = self.grid
        return self.acts_bkl[image, self.acts_bkl.shape[1] - rows * cols :].unflatten(0, self.grid).permute(2, 0, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Steered(Edited):
    """The outputs of the model on some images, under every arm and dose."""

    names: tuple[str, ...]
    """Names that the output is compared with: classes, or texts."""
    scores_abn: Float64[Tensor, "arms images names"]
    """Score of each name: a cosine, or a logit of a linear head, `(a, b, n)`."""
    log_p_abn: Float64[Tensor, "arms images names"]
    """Log-probability of each name among all, `(a, b, n)`."""

    @cached_property
    def ranks_abn(self) -> Int64[Tensor, "arms images names"]:
        """Rank of each name by its score, `(a, b, n)`; 1 is the highest."""
        return self.scores_abn.argsort(dim=2, descending=True, stable=True).argsort(dim=2) + 1

    @property
    def log_odds_abn(self) -> Float64[Tensor, "arms images names"]:
        """Log-odds of each name's probability among all, `(a, b, n)`; with a single name, its score, as its probability is always 1."""
        return self.scores_abn if len(self.names) == 1 else self.log_p_abn - torch.log1p(-self.log_p_abn.exp().clamp_max(1 - 1e-15))

    def top(self, image: int, n: int = 5) -> list[str]:
        """List the names that are among the n highest on an image, as it is or with the edit at any dose, the highest as it is first."""
        ranks_an = torch.cat([self.of(self.ranks_abn, "none"), *(self.of(self.ranks_abn, "targeted", dose) for dose in self.doses)])[
            :, image
        ]
        chosen = (ranks_an <= n).any(0).nonzero()[:, 0].tolist()
        return [self.names[place] for place in sorted(chosen, key=lambda place: int(ranks_an[0, place]))]

    def follow(self, image: int) -> tuple[str, str]:
        """Choose the name to follow over doses on an image, and say why.

        It is the label or the most common class of an edited latent, or else the name that the strongest dose raises most.
        """
        for reason, words in (("its label", self.labels), ("the most common class of its strongest images", self.top_classes)):
            if name := next((word for word in words if word in self.names), None):
                return name, reason
        return self.raised(image, self.doses[-1])["targeted"][0][0], "what the strongest dose raises most, chosen after the fact"

    def beyond(self, image: int, dose: float) -> Bool[Tensor, " names"]:
        """Return whether the edit moves each name's log-odds on an image beyond all draws of all of `EXCEEDED_ARMS`, either way, `(n,)`."""
        edited_n = self.of(self.log_odds_abn, "targeted", dose)[0, image]
        controls_rn = torch.cat([self.of(self.log_odds_abn, arm, dose)[:, image] for arm in EXCEEDED_ARMS])
        return (edited_n > controls_rn.amax(0)) | (edited_n < controls_rn.amin(0))

    @property
    def chance(self) -> float:
        """Probability that an edit which is like its controls is beyond all of them."""
        n = sum(key.name in EXCEEDED_ARMS and key.dose == self.doses[0] for key in self.arms)
        return 2 / (n + 1)

    def raised(self, image: int, dose: float) -> dict[str, list[tuple[str, float]]]:
        """Return, for each arm, the name whose log-odds it raises most on an image at a dose, and by how much, for each of its draws.

        The name that an edit raises most is chosen after the fact, and so is that of each control here: no edit should be judged by it that
        does not exceed the controls.
        """
        plain_n, found = self.of(self.log_odds_abn, "none")[0, image], {}
        for arm in dict.fromkeys(key.name for key in self.arms[1:]):
            rises_rn = self.of(self.log_odds_abn, arm, dose)[:, image] - plain_n
            places = rises_rn.argmax(1).tolist()
            found[arm] = [(self.names[place], float(rises[place])) for place, rises in zip(places, rises_rn, strict=True)]
        return found

    def table(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return plain rows for each image, dose, arm and name: scores, probabilities and ranks, before and after.

        Args:
            names: Names to list; None for all.

        Returns:
            Rows with the columns `image` (its number), `arm`, `dose` (None for `none` and `untouched`), `n_draws`, `name`, `score`,
            `score_low`, `score_high`, `probability`, `probability_low`, `probability_high`, `log_odds`, `log_odds_low`, `log_odds_high`,
            `rank`, `rank_low` and `rank_high`, and `score_before`, `probability_before`, `log_odds_before` and `rank_before` of the plain
            model. Values of a random arm are means over its draws (of ranks, the median); low and high are the ends of the range of draws.
        """
        places = range(len(self.names)) if names is None else [self.names.index(name) for name in names]
        values = {"score": self.scores_abn, "probability": self.log_p_abn.exp(), "log_odds": self.log_odds_abn, "rank": self.ranks_abn}
        rows: list[dict[str, Any]] = []
        for image in range(self.scores_abn.shape[1]):
            for arm, dose in dict.fromkeys((key.name, key.dose) for key in self.arms):
                of_arm = {what: self.of(tensor, arm, dose)[:, image] for what, tensor in values.items()}
                for place in places:
                    row = {"image": image, "arm": arm, "dose": dose, "n_draws": len(of_arm["score"]), "name": self.names[place]}
                    for what, tensor in of_arm.items():
                        row |= _spread(what, tensor[:, place])
                        row[f"{what}_before"] = values[what][0, image, place].item()
                    rows.append(row)
        return rows


def _spread(what: str, of_draws_r: Tensor) -> dict[str, float]:
    """Return the middle of the values of an arm's draws, and the ends of their range."""
    middle = of_draws_r.median() if what == "rank" else of_draws_r.mean()
    return {what: middle.item(), f"{what}_low": of_draws_r.min().item(), f"{what}_high": of_draws_r.max().item()}


def check_doses(doses: Sequence[float]) -> tuple[float, ...]:
    """Return doses in ascending order.

    Raises:
        InputError: There are none, one is not a finite number, or one is given twice.
    """
    if odd := [dose for dose in doses if isinstance(dose, bool) or not isinstance(dose, Real) or not math.isfinite(dose)]:
        raise InputError(f"doses: got {odd[0]!r}; expected finite numbers, such as 0, 0.5, 1 and 2")
    if not doses:
        raise InputError("doses: there are none; give one or more, such as 0, 0.5, 1 and 2")
    if twice := [dose for dose in doses if list(doses).count(dose) > 1]:
        raise InputError(f"doses: got {twice[0]:g} twice; give each dose once")
    return tuple(sorted(float(dose) for dose in doses))


def check_seed(seed: int) -> None:
    """Check that a seed is a whole number, 0 or above.

    Raises:
        InputError: It is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed is {seed!r}; it must be a whole number, 0 or above")


@dataclass(frozen=True, eq=False)
class Plan:
    """How latents are edited together: at which doses and where, and beside how many controls.

    Raises:
        InputError: There are no doses, one is not a finite number or is given twice, the kind is not one of `Dosed`, the mask of an image
            is False everywhere, the draws are too few or too many, or the seed is not a whole number.
    """

    doses: Sequence[float]
    """The doses, ascending in whatever order they are given."""
    kind: Dosed = "set"
    """What a dose sets: see `Edit`. To set 0 is to ablate."""
    unit: Unit = "relative"
    """Whether doses are relative to each latent's own scale, or activations."""
    tokens: Where | Bool[Tensor, "*images kept"] = "all"
    """Kept tokens that are edited: see `Edit`. A mask `(b, k)` has a row for each image."""
    error: ErrorTerm = "keep"
    """Whether the SAE's error is kept."""
    draws: int = N_DRAWS
    """Number of draws of each random control."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "doses", check_doses(self.doses))
        check_seed(self.seed)
        if self.kind not in get_args(Dosed):
            raise InputError(f"kind is {self.kind!r}; allowed values are {', '.join(get_args(Dosed))}; to ablate is to set 0")
        if self.masks is not None and len(blank := (~self.masks.any(1)).nonzero()):
            raise InputError(
                f"tokens: the mask of image {int(blank[0])} is False everywhere, so an edit would change nothing; leave it out"
            )
        if self.draws < 1:
            raise InputError(f"draws is {self.draws}; a random control needs at least one draw")
        if len(self.doses) * self.draws > MOST_ARMS // 2:
            raise InputError(f"{len(self.doses)} doses with {self.draws} draws are more than {MOST_ARMS:,} arms; give fewer doses or draws")

    @property
    def masks(self) -> Bool[Tensor, "images kept"] | None:
        """Mask of each image; None if they have none of their own."""
        return self.tokens if isinstance(self.tokens, Tensor) and self.tokens.ndim == 2 else None

    def batches(self, n_images: int) -> list[tuple[slice, Where | Tensor]]:
        """Return batches of images, with the tokens that are edited on each.

        Raises:
            InputError: There are no images.
        """
        if not n_images:
            raise InputError("there are no images; give one or more")
        batches = [slice(start, start + BATCH) for start in range(0, n_images, BATCH)]
        return [(batch, self.tokens if self.masks is None else self.masks[batch]) for batch in batches]

    def edits(self, described: "Sequence[Described]", tokens: Where | Tensor) -> list[Edit]:
        """Return the edit of latents at each dose, on these tokens of a batch."""
        latents = tuple(one.latent for one in described)
        return [Edit(latents, self.kind, dose, self.unit, tokens, self.error) for dose in self.doses]


def steer(
    subject: "Subject",
    pixels: UInt8[Tensor, "images height width 3"],
    described: "Sequence[Described]",
    plan: Plan,
    readout: Readout,
) -> Steered:
    """Run the model on images with latents edited at several doses, beside every control.

    Args:
        subject: The model and the SAE.
        pixels: uint8 pixels from the model's preprocessing, `(b, H, W, 3)`.
        described: The latents that are edited together, from `Subject.describe`.
        plan: The doses, and how they are given.
        readout: Names that the output is compared with.

    Raises:
        InputError: There are no images or latents, the plan does not fit the SAE or its tokens, or too few live latents can stand in for
            the edited ones.
        ModelError: The SAE is of another model, or the output does not depend on the tokens.
    """
    batches, editor = plan.batches(len(pixels)), subject.editor(described)
    controls = subject.controls(described, plan.seed, plan.draws)
    parts = [
        _steer_batch(subject, editor, controls, plan.edits(described, tokens), pixels[batch].to(subject.device), readout)
        for batch, tokens in batches
    ]
    steered = Steered(
        **describe_edit(subject, described, plan),
        names=readout.names,
        arms=parts[0].arms,
        scores_abn=torch.cat([part.scores_abn for part in parts], 1),
        log_p_abn=torch.cat([part.log_p_abn for part in parts], 1),
        acts_bkl=torch.cat([part.acts_bkl for part in parts]),
        fvu_b=torch.cat([part.fvu_b for part in parts]),
    )
    return dataclasses.replace(steered, warnings=(*list_warnings(subject, steered), *_alike(steered)))


@dataclass(frozen=True, eq=False)
class _Part:
    """Results of one batch, as in `Steered`."""

    arms: tuple[ArmKey, ...]
    scores_abn: Float64[Tensor, "arms batch names"]
    log_p_abn: Float64[Tensor, "arms batch names"]
    acts_bkl: Float32[Tensor, "batch kept edited"]
    fvu_b: Float64[Tensor, " batch"]


def _steer_batch(
    subject: "Subject",
    editor: Editor,
    controls: Controls,
    edits: Sequence[Edit],
    pixels: UInt8[Tensor, "batch height width 3"],
    readout: Readout,
) -> _Part:
    """Run all arms of edits on a batch."""
    codes = None
    if subject.reads != subject.writes:
        codes = editor.read(subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name], reconstruct=True)
    seen: list[Tensor] = []

    def as_it_is(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens

    plain, *others = make_arms(editor, edits, controls, codes)
    outputs = subject.model.splice(pixels, subject.writes.name, [as_it_is, *(arm.replacement for arm in others)])
    codes = codes or editor.read(seen[0], reconstruct=True)
    if all(torch.equal(outputs[0], one) for one in outputs[1:]) and not torch.equal(
        subject.writes.pick(seen[0]).float(), codes.reconstruction
    ):
        raise ModelError(independent(subject, "the output"))
    chosen = editor.chosen(edits[0].tokens, codes.acts)
    return _Part(
        tuple(ArmKey(arm.name, arm.edit and arm.edit.dose, arm.draw) for arm in (plain, *others)),
        torch.stack([readout.scores(one.float()).double().cpu() for one in outputs]),
        torch.stack([readout.log_probabilities(one.float()).double().cpu() for one in outputs]),
        codes.acts.cpu(),
        unexplained(subject.writes.pick(seen[0]).float(), codes.reconstruction, chosen, subject.mean.to(subject.device)).cpu(),
    )


def unexplained(
    x_bkd: Float32[Tensor, "batch kept d_out"],
    x_hat_bkd: Float32[Tensor, "batch kept d_out"],
    chosen_bk: Bool[Tensor, "batch kept"],
    mean_d: Float32[Tensor, " d_out"],
) -> Float64[Tensor, " batch"]:
    """Return the fraction of variance around the mean that x̂ leaves unexplained at the chosen tokens of each image, `(b,)`."""
    errors, variances = ((x_bkd - of).double().square().sum(2) * chosen_bk for of in (x_hat_bkd, mean_d))
    return errors.sum(1) / variances.sum(1)


def describe_edit(subject: "Subject", described: "Sequence[Described]", plan: Plan) -> dict[str, Any]:
    """Return the fields of `Edited` that do not depend on the images."""
    scales_l = torch.tensor([one.scale for one in described], dtype=torch.float64)
    units_l = scales_l if plan.unit == "relative" and plan.kind != "scale" else torch.ones_like(scales_l)
    return {
        "latents": tuple(one.latent for one in described),
        "labels": tuple(one.label for one in described),
        "top_classes": tuple(one.top_class for one in described),
        "doses": plan.doses,
        "acts_pl": torch.tensor(plan.doses, dtype=torch.float64)[:, None] * units_l,
        "scales_l": scales_l,
        "most_l": torch.tensor([one.most for one in described], dtype=torch.float64),
        "kind": plan.kind,
        "grid": subject.writes.grid,
    }


def list_warnings(subject: "Subject", steered: Edited) -> Iterator[str]:
    """Iterate over what makes the results less sure than they look."""
    if len(steered.latents) > 1:
        yield (
            f"{len(steered.latents)} latents are edited at once, which do not compose: what they do together need not be the sum of what "
            "each does alone"
        )
    n_images = len(steered.acts_bkl)
    for place, latent in enumerate(steered.latents):
        if n_silent := int((steered.acts_bkl[..., place] <= 0).all(1).sum()):
            which = "the image" if n_images == 1 else f"{n_silent} of {n_images} images"
            yield f"latent {latent} is silent on {which}: to remove it there, or to edit only the tokens on which it fires, changes nothing"
        yield from _beyond(steered, place)
        label = steered.labels[place]
        same = [other for other, row in subject.labels.items() if row["label"] == label and other not in steered.latents]
        if same:
            one = f"latent {same[0]} has" if len(same) == 1 else f"{len(same)} other latents have"
            yield f"{one} the label {label!r} as well as latent {latent}: what this latent does is not all that the model knows of it"
    if n_high := int((steered.fvu_b > HIGH_FVU).sum()):
        worst, where = float(steered.fvu_b.nan_to_num(0).max()), "" if n_images == 1 else f" on {n_high} of {n_images} images"
        lost = "is worse than the mean token" if worst >= 1 else f"leaves {100 * worst:.0f} % of their variance unexplained"
        yield (
            f"the SAE's reconstruction of the edited tokens {lost}{where}: much of what the model reads there is in the SAE's error, which "
            "the edit does not reach"
        )


def _beyond(steered: Edited, place: int) -> Iterator[str]:
    """Iterate over warnings of doses that were never observed of a latent."""
    latent, acts_p, most = steered.latents[place], steered.acts_pl[:, place], float(steered.most_l[place])
    strongest = float(steered.acts_bkl[..., place].max())
    if steered.kind == "add":
        acts_p = acts_p + strongest
    elif steered.kind == "scale":
        acts_p = acts_p * strongest
    acts = list(zip(steered.doses, acts_p.tolist(), strict=True))
    if above := [dose for dose, act in acts if act > most * (1 + 1e-6)]:
        times = most / float(steered.scales_l[place])
        yield (
            f"{_doses(above)} above what was observed of latent {latent}, which is {most:.3g} at most, {times:.2f} times its 99th "
            "percentile: no image says what it means there"
        )
    if below := [dose for dose, act in acts if act < 0]:
        yield f"{_doses(below)} below 0, which latent {latent} never is: no image says what it means there"


def _doses(doses: Sequence[float]) -> str:
    words = [f"{dose:g}" for dose in doses]
    return f"dose {words[0]} is" if len(words) == 1 else f"doses {', '.join(words[:-1])} and {words[-1]} are"


def _alike(steered: Steered) -> Iterator[str]:
    """Iterate over warnings of names that have the same score under every arm."""
    rounded = steered.scores_abn.flatten(0, 1).mul(1e6).round()
    _, group_n = torch.unique(rounded, dim=1, return_inverse=True)
    groups: dict[int, list[str]] = {}
    for name, group in zip(steered.names, group_n.tolist(), strict=True):
        groups.setdefault(group, []).append(name)
    for names in groups.values():
        if len(names) > 1:
            yield f"{' and '.join(map(repr, names))} are the same to the model: their ranks follow from their order alone"


def independent(subject: "Subject", output: str) -> str:
    """Say that an output does not depend on the edited tokens, and what to do."""
    kinds = " and ".join(dict.fromkeys(place.kind for place in subject.writes.places))
    return (
        f"{subject.model.name}: {output} does not depend on the {kinds} tokens at {subject.writes.name}, so no latent there has an effect; "
        "use an SAE of an earlier hookpoint, or of the tokens from which the output is computed"
    )


def choose_readout(subject: "Subject", described: "Sequence[Described]", texts: Sequence[str] | None = None) -> Readout:
    """Choose what the output is compared with: given texts, or else the classes, or else the latents' labels and those nearest to them.

    Classes are read by a linear head if the model has no text tower, or if the study has a head.

    Args:
        subject: The model and the SAE.
        described: The latents that are edited.
        texts: The texts; None for the choice above.

    Raises:
        InputError: A text is empty or given twice; or there are neither texts nor classes nor labels.
        ModelError: The model has no text tower, which texts need.
    """
    if texts is not None:
        if empty := [text for text in texts if not text.strip()]:
            raise InputError(f"texts: got {empty[0]!r}, which is empty; give words, such as 'a truck'")
        return subject.text_readout(list(texts))
    has_head = subject.head is not None or subject.model.d_embed is None
    return subject.readout if subject.classes or has_head else subject.text_readout(_labels_near(subject, described))


def _labels_near(subject: "Subject", described: "Sequence[Described]") -> list[str]:
    """Return the labels of latents, and of all other labels the `N_NEAR` whose texts are nearest to them."""
    own = list(dict.fromkeys(one.label for one in described if one.label is not None))
    if not own:
        raise InputError("the images have no classes and the latents no label by which the model's output could be read; name texts")
    others = sorted({row["label"] for row in subject.labels.values()} - {*own})[:N_LABELS]
    embedded = normalize(embed_texts(subject.model, [*own, *others]), dim=1)
    nearness = (embedded[len(own) :] @ embedded[: len(own)].T).amax(1)
    return own + [others[place] for place in nearness.topk(min(N_NEAR, len(others))).indices.tolist()]
