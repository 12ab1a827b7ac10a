"""What must hold of every artefact, and why: one suite a stage, each a list of rules on the frames of its profile."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ommatid.config import Params


@dataclass(frozen=True)
class Rule:
    """An expectation on a column of one frame of a profile."""

    frame: str
    """Frame of the profile."""
    column: str
    """Column of the frame."""
    name: str
    """What must hold."""
    reason: str
    """Why."""
    expectation: str
    """Class in great_expectations.expectations."""
    arguments: dict[str, Any]
    """Its arguments beside the column."""
    row: str
    """Column whose value names a failing row."""
    first: str | None
    """Column that names the first failing things inside that row, such as tokens of a part."""
    sae: str | None = None
    """Name of the SAE that it is about, where the artefact holds several."""


def _within(frame: str, column: str, name: str, reason: str, *, row: str, first: str | None = None, **bounds: Any) -> Rule:
    """Values lie within min_value and max_value (strict_min, strict_max: exclusive); nulls are not looked at."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToBeBetween", bounds, row, first)


def _none(frame: str, column: str, name: str, reason: str, *, row: str = "part", first: str | None = None) -> Rule:
    """The column, a count of bad things, is 0 in every row."""
    return _within(frame, column, name, reason, row=row, first=first, min_value=0, max_value=0)


def _one_of(frame: str, column: str, values: list[Any], name: str, reason: str, *, row: str) -> Rule:
    return Rule(frame, column, name, reason, "ExpectColumnValuesToBeInSet", {"value_set": values}, row, None)


def _filled(frame: str, column: str, name: str, reason: str, *, row: str) -> Rule:
    return Rule(frame, column, name, reason, "ExpectColumnValuesToNotBeNull", {}, row, None)


def images(params: Params) -> list[Rule]:
    """The data set can be trained and evaluated on, and shows what its source shows."""
    return [
        _within(
            "splits",
            "images",
            "both splits have images",
            "training needs images of split train, evaluation and labelling need others that training never saw",
            row="split",
            min_value=1,
        ),
        _none(
            "whole",
            "repeated ids",
            "image ids are unique",
            "a repeated picture counts twice in every score and can be in both splits",
            row="set",
            first="first repeated ids",
        ),
        _none(
            "whole",
            "repeated keys",
            "image keys are unique",
            "every other table refers to an image by this key",
            row="set",
            first="first repeated keys",
        ),
        _none(
            "parts",
            "images of unknown split",
            "split is train or eval",
            "an image of any other split would be used nowhere, silently",
            first="first of unknown split",
        ),
        _none(
            "parts",
            "images without size",
            "width and height are positive",
            "heat maps are placed by width and height",
            first="first without size",
        ),
        _none(
            "parts",
            "images without bytes",
            "every image has its bytes",
            "extraction decodes the bytes; the data set is whole by itself",
            first="first without bytes",
        ),
        _within(
            "whole",
            "rejected share",
            "few images are rejected",
            f"more than images.max_rejected ({params.images.max_rejected:g}) unreadable means a wrong or broken source",
            row="set",
            first="first rejected",
            max_value=params.images.max_rejected,
        ),
    ]


def extract(params: Params) -> list[Rule]:
    """Activations are numbers that an SAE can learn from, and every image has both embeddings."""
    return [
        _within(
            "splits", "tokens", "both splits have tokens", "nothing can be trained or evaluated without tokens", row="split", min_value=1
        ),
        _none(
            "parts",
            "tokens with NaN",
            "no activation is NaN",
            "one NaN spreads to every weight of the SAE in one step",
            first="first with NaN",
        ),
        _none(
            "parts",
            "tokens with infinity",
            "no activation is infinite",
            "float16 ends at 65504: a larger activation was cut, and its loss is infinite",
            first="first with infinity",
        ),
        _none(
            "parts",
            "tokens with only zeros",
            "no activation is all zeros",
            "a hookpoint that gives zeros is dead or wrong, and a cosine with zero is undefined",
            first="first with only zeros",
        ),
        _filled("whole", "unmatched images", "both kinds of table are there", "scores join activations with embeddings", row="set"),
        _none(
            "whole",
            "unmatched images",
            "activations and embeddings are of the same images",
            "a score over images that lack one of the two would be a score over other images than it says",
            row="set",
            first="first unmatched",
        ),
        _none(
            "whole",
            "repeated embeddings",
            "one embedding an image",
            "a repeated image would weigh twice in monosemanticity",
            row="set",
            first="first repeated",
        ),
        _none(
            "embeddings",
            "embeddings not finite",
            "embeddings are finite",
            "one NaN makes every monosemanticity score NaN; only all NaN says that a judge failed on an image, which is then left out",
            first="first not finite",
        ),
        _within(
            "judges",
            "images embedded",
            "every judge embedded some image",
            "a judge that failed on all images has no score of anything",
            row="judge",
            min_value=1,
        ),
        _none(
            "embeddings",
            "embeddings not of unit norm",
            "embeddings have unit norm",
            "scores take dot products of embeddings for cosines",
            first="first not of unit norm",
        ),
    ]


def train(params: Params) -> list[Rule]:
    """The SAE is whole, learned something, and is as sparse as asked."""
    last = {"row": "step"}
    return [
        _one_of(
            "tensors",
            "problem",
            [""],
            "every tensor is there in its shape",
            "later stages and other tools rebuild the SAE from these tensors alone",
            row="tensor",
        ),
        _none("tensors", "values not finite", "weights are finite", "one NaN makes every latent of every token NaN", row="tensor"),
        *([] if params.train.variant.kind == "imported" else [_unit_directions()]),
        _within("counts", "rows", "training left a curve", "without a curve nobody can say how training went", row="table", min_value=1),
        _filled("final", "fvu", "the final FVU is a number", "NaN means that training diverged", **last),
        _within(
            "final",
            "fvu",
            "the final FVU is below 1",
            "1 is what predicting the mean gives: above it the SAE explains nothing",
            max_value=1,
            strict_max=True,
            **last,
        ),
        *(_near_k(params.train.k) if params.train.aims_at_k else []),
        _within(
            "final",
            "dead",
            "few latents are dead",
            f"more than train.max_dead ({params.train.max_dead:g}) dead is capacity paid for and not used",
            max_value=params.train.max_dead,
            **last,
        ),
    ]


def _unit_directions() -> Rule:
    return _within(
        "directions",
        "norm",
        "directions have unit norm",
        "activations of different latents compare only when their directions are equally long",
        row="latent",
        min_value=1 - 1e-3,
        max_value=1 + 1e-3,
    )


def _near_k(k: int) -> list[Rule]:
    return [
        _within(
            "final",
            "l0",
            "L0 is near k",
            f"train.k asked for {k} latents a token; half or twice as many is another SAE than asked for",
            row="step",
            min_value=k / 2,
            max_value=k * 2,
        )
    ]


def evaluate(params: Params) -> list[Rule]:
    """Every latent is described within the bounds of each metric, and the SAE beats an untrained one."""
    return [
        _none(
            "counts",
            "latents missing or repeated",
            f"each of {params.train.d_sae} latents has one row",
            "the catalogue has one feature a latent",
            row="set",
            first="first missing",
        ),
        _filled("latents", "density", "density is known", "density decides what is dead", row="latent"),
        _within("latents", "density", "density is a share", "it is a share of tokens", row="latent", min_value=0, max_value=1),
        _one_of(
            "latents",
            "dead disagrees",
            [False],
            "dead means density 0",
            "users filter by is_dead: it must say the same as density",
            row="latent",
        ),
        _within(
            "latents",
            "ms",
            "monosemanticity is a mean cosine",
            "it is a weighted mean of cosines, so it lies between -1 and 1, or is null",
            row="latent",
            min_value=-1,
            max_value=1,
        ),
        _within(
            "counts",
            "latents with ms",
            "some latent has a monosemanticity",
            "with none, too few images or too few firings were evaluated to say anything",
            row="set",
            min_value=1,
        ),
        _within("sizes", "rows", "there are examples and firings", "the pages and the labels are made of them", row="table", min_value=1),
        _none(
            "examples",
            "examples of no decile",
            "examples have a decile from 1 to 10",
            "pages and label scores take examples by decile",
            first="first of no decile",
        ),
        _none(
            "examples", "examples of no rank", "examples have a rank from 1", "rank orders them within a decile", first="first of no rank"
        ),
        _none(
            "firings",
            "rows that are no firing",
            "firings are positive and of a known latent",
            "a row of firings says that the latent fires",
            first="first no firing",
        ),
        _none(
            "counts",
            "dictionaries missing",
            "baselines are there",
            "an SAE's numbers mean nothing without the raw neurons' and an untrained SAE's on the same data",
            row="set",
            first="first dictionaries",
        ),
        *_below_untrained(is_transcoder=params.train.target is not None),
        _within(
            "counts",
            "fvu of the sae",
            "the SAE's FVU is below 1",
            "1 is what predicting the mean gives; this is on images it never saw",
            row="set",
            max_value=1,
            strict_max=True,
        ),
        _within(
            "counts",
            "zero-shot changed by splicing",
            "splicing changes nothing by itself",
            "with what the SAE leaves out put back in, the model is the plain one: a larger cross-entropy would be no fault of the SAE",
            row="set",
            max_value=0.01,
        ),
        _within(
            "counts",
            "fvu of the sae",
            "the SAE's FVU is above 0",
            "0 is a perfect copy of activations that it never saw: then what was decoded was compared with itself",
            row="set",
            min_value=0,
            strict_min=True,
        ),
        _within(
            "counts",
            "dead share",
            "few latents are dead",
            f"more than evaluate.max_dead ({params.evaluate.max_dead:g}) dead: these images are few, or others than those of training",
            row="set",
            max_value=params.evaluate.max_dead,
        ),
        _within(
            "counts",
            "ms above floor",
            "monosemanticity is above its floor on average",
            "the floor is the score of weights that know nothing: below it, activations and judge are of different images",
            row="set",
            min_value=0,
            strict_min=True,
        ),
        _none(
            "undefined",
            "values that are NaN",
            "nothing is NaN",
            "what is undefined is null, which means and rankings leave out; one NaN makes a mean NaN and is the highest of a ranking",
            row="table",
            first="first columns",
        ),
        _none(
            "sums",
            "difference",
            "counts add up",
            "what one table counts another one lists: a difference is rows that were lost or counted twice",
            row="of",
        ),
    ]


def _below_untrained(is_transcoder: bool) -> list[Rule]:
    """Nothing untrained decodes what a transcoder does: of one only its own FVU must be there."""
    if is_transcoder:
        return [_filled("counts", "fvu of the sae", "the FVU is a number", "NaN would pass for small in the next check", row="set")]
    return [
        _filled("counts", "fvu below untrained", "both FVUs are numbers", "NaN would pass for small in the next two checks", row="set"),
        _within(
            "counts",
            "fvu below untrained",
            "FVU is below the untrained SAE's",
            "else training did nothing for reconstruction",
            row="set",
            min_value=0,
            strict_min=True,
        ),
    ]


def label(params: Params) -> list[Rule]:
    """Labels are text or a status, never text about a failure, and their scores can be believed."""
    statuses = ["ok", "unparsed", "refused", "failed", "over_budget", "too_few_examples"]
    return [
        _one_of("labels", "status", statuses, "status is a known one", "pages and queries tell labels from failures by it", row="latent"),
        _one_of(
            "labels",
            "label disagrees with status",
            [False],
            "a label where the status is ok, else null",
            "a failed label must not be read, searched or scored as one",
            row="latent",
        ),
        _one_of("labels", "label is empty", [False], "no label is empty", "an empty name would be shown and searched as one", row="latent"),
        _one_of(
            "labels",
            "score without status ok",
            [False],
            "a score only where the status is ok",
            "a mean over scores must not count what has no label",
            row="latent",
        ),
        _one_of(
            "labels",
            "score outside 0 to 1",
            [""],
            "scores are shares",
            "balanced accuracy and the area under a ROC curve lie between 0 and 1",
            row="latent",
        ),
        _one_of(
            "labels",
            "correlation outside -1 to 1",
            [""],
            "correlations are between -1 and 1",
            "they are cosines of ranks",
            row="latent",
        ),
        _none(
            "labellers",
            "latents missing or repeated",
            "every latent has one row of each labeller",
            "a latent without a label has a status that says why; only people label some and not others",
            row="labeller",
            first="first missing",
        ),
        _none(
            "counts",
            "labels of unknown labellers",
            "all rows are by a labeller of label.labellers",
            "else nobody asked for them",
            row="set",
        ),
        _filled("counts", "images in both halves", "the uses of images were counted", "see the next check", row="set"),
        _none(
            "counts",
            "images in both halves",
            "no image both made and scored a name",
            "a name scored on the images that made it says nothing of others",
            row="set",
        ),
        *(
            _near_chance(control, whose)
            for control, whose in (("control_score", "another latent's name"), ("random_score", "a random word"))
        ),
        _within(
            "counts",
            "ok labels",
            "some latent has a label",
            "with none, every labeller failed, or vocabulary or examples are wrong",
            row="set",
            first="first statuses",
            min_value=1,
        ),
    ]


CHANCE = 0.1
"""How far from one half the mean of a control may be, besides two standard errors: names of other latents of the same class hold, too."""


def _near_chance(control: str, whose: str) -> Rule:
    return _within(
        "labellers",
        f"{control} off chance",
        f"{whose} scores near chance",
        f"a name that is not the latent's can tell its images only by luck or kinship: a mean more than {CHANCE:g} (and two standard "
        "errors) from 0.5 means that the test itself gives the answer away",
        row="labeller",
        max_value=CHANCE,
    )


def catalog(params: Params) -> list[Rule]:
    """Every relation that users query is there and has rows."""
    return [
        _one_of(
            "relations",
            "problem",
            [""],
            "every relation is there and has rows",
            "queries, pages and docs count on each of them",
            row="relation",
        ),
        _filled("features", "latents not in features once", "features can be compared with latents", "see the next check", row="relation"),
        _none(
            "features",
            "latents not in features once",
            "features has one row a latent",
            "a join that drops or repeats a latent makes every count and mean over features wrong",
            row="relation",
            first="first such",
        ),
    ]


SUITES: Mapping[str, Callable[[Params], list[Rule]]] = {
    "images": images,
    "extract": extract,
    "train": train,
    "evaluate": evaluate,
    "label": label,
    "catalog": catalog,
}
