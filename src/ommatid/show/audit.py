"""The audit in words: what makes a feature suspicious, and what its removal did, as sentences for people who know the images."""

from collections.abc import Mapping, Sequence
from typing import Any

from ommatid.show.numbers import count
from ommatid.show.svg import Plot, draw_bars

AUDITS = "SELECT * FROM audits WHERE sae = $sae"
SUSPICIOUS = """
    SELECT audit.*, features.label
    FROM audit JOIN features ON features.sae = audit.sae AND features.latent = audit.latent
    WHERE audit.sae = $sae AND suspicion > 0
    ORDER BY list_position(['suspect', 'unconfirmed', 'untested', 'of_another_class'], status), suspicion DESC, audit.latent, class
"""
CLASSES = "SELECT DISTINCT label FROM images WHERE split = 'eval' AND label IS NOT NULL ORDER BY label"
STATUSES = {
    "suspect": ("Suspect", "The model leans on them, and does better without them."),
    "unconfirmed": ("Not confirmed", "They look suspicious by counting, but the model is no better without them."),
    "untested": ("Not tested", "They look suspicious by counting; the model was not run without them."),
    "of_another_class": (
        "Of another class",
        "They look suspicious by counting, but are features of the classes whose images are mistaken: the model confuses the two.",
    ),
}
"""Title and meaning of each status of a pair that is suspicious."""
GROUPS = {
    "class_with": "images of {0} with {1}",
    "class_without": "images of {0} without {1}",
    "others_with": "images of other classes with {1}",
    "others_without": "images of other classes without {1}",
}
"""What the groups of a test are called, given the class and what makes them."""
HEADINGS = {
    "class_with": ("{0}, with the feature", "The strongest first; below each, what the model calls it."),
    "class_without": ("{0}, without the feature", "Those first that the model does not call {0}."),
    "others_with": (
        "Other classes, with the feature",
        "Those first that the model calls {0}; below each, what it is and what it is called.",
    ),
}
"""Title and meaning of the pictures of each part, given the class."""

NO_PROOF = "That is no proof: what is rare in these images cannot be found in them."
"""What to say where there is no suspect."""


def say_counts(row: Mapping[str, Any]) -> list[str]:
    """Say what was audited, in sentences.

    Args:
        row: The SAE's row of the relation `audits`.
    """
    if row["status"] != "ok":
        return [f"Nothing was audited: {row['status']}."]
    examined, too_few = row["n_examined"], row["n_too_few"]
    found = [
        f"{_n(examined, 'pair')} of a class and a feature {_were(examined)} examined on {_n(row['n_images'], 'evaluation image')} of "
        f"{_n(row['n_classes'], 'class', 'classes')}, which the model calls what they are in {_percent(row['accuracy'])}; "
        f"{_n(too_few, 'more pair')} {_were(too_few)} left out, as fewer than 10 images have, or lack, the class or the feature.",
        f"{count(row['n_suspicious'])} looked suspicious by counting, {count(row['n_tested'])} of them {_were(row['n_tested'])} tested "
        f"by removing the feature, and {_n(row['n_suspects'], 'suspect')} remain{'s' * (row['n_suspects'] == 1)}."
        if row["n_suspicious"]
        else "None looked suspicious.",
    ]
    if row["attributes"]:
        found.append(f"Known beside the class: {', '.join(row['attributes'])}, of {_n(row['n_with_attributes'], 'image')}.")
    return found


def say_reasons(row: Mapping[str, Any]) -> list[str]:
    """Say what makes a pair suspicious, in sentences.

    Args:
        row: Its row of the relation `audit`.
    """
    name, n, expected = row["class"], row["n_others_with"], row["mistaken_with"] - row["mistaken_more"]
    found = [
        f"The model calls {round(row['mistaken_with'] * n)} of the {_n(n, 'image')} of other classes that have this feature “{name}”, "
        f"{_percent(row['mistaken_with'])}; of all images of those classes, {_percent(expected)}."
    ]
    if row["trust_with"] is not None and row["trust_without"] is not None:
        found.append(
            f"If it answers “{name}”, it is right in {_percent(row['trust_with'])} of the images with the feature, and in "
            f"{_percent(row['trust_without'])} of those without it."
        )
    if row["attribute"] is not None and row["follows_low"] > 0:
        other = row["attribute"]
        found.append(
            f"The feature follows “{other}” and not the class: it is more common on images of other classes that have {other} than on "
            f"images of {name} that have not, by {_points(row['follows'])} (at least {_points(row['follows_low'])})."
        )
    if row["outside"] is not None:
        area = _percent(row["outside_area"])
        found.append(
            f"On images of {name}, {_percent(row['outside'])} of its activation lies outside the object, as does {area} of the area."
        )
    return found


def say_test(row: Mapping[str, Any]) -> list[str]:
    """Say what the removal of the latent of a pair did, or why it was not tried, in sentences.

    Args:
        row: Its row of the relation `audit`.
    """
    if row["status"] == "of_another_class":
        return [
            "It is a feature of the classes whose images are mistaken: the model confuses them, and the feature is not the wrong reason."
        ]
    if row["n_tested"] is None:
        return [f"It was not tested: {row['reason']}."] if row["reason"] else []
    made_by = "the feature" if row["grouped_by"] == f"latent {row['latent']}" else row["grouped_by"]
    group = GROUPS[row["worst_group"]].format(row["class"], made_by)
    leace = "" if row["worst_leace"] is None else f"; {_percent(row['worst_leace'])} with all traces of {made_by} erased (LEACE)"
    worst, after = _percent(row["worst"]), _percent(row["worst_ablated"])
    random, low, high = (_percent(row[f"worst_random{end}"]) for end in ("", "_low", "_high"))
    return [
        f"Asked whether an image is “{row['class']}”, the model is right least often on {group}: {worst}. In its worst group it is right "
        f"in {after} once the feature is removed; {random} ({low} to {high}) with other features removed that are as common{leace}. "
        "A coin is right in 50 %.",
        f"Over all groups it is right in {_percent(row['balanced'])}, in {_percent(row['balanced_ablated'])} without the feature, and in "
        f"{_percent(row['balanced_random'])} at most without another one ({_n(row['n_tested'], 'image')}).",
    ]


def draw_worst(row: Mapping[str, Any]) -> Plot | None:
    """Draw the accuracy of the worst group of a pair before and after; None if it was not tested."""
    if row["n_tested"] is None:
        return None
    bars: Sequence[tuple[str, float | None, tuple[float, float] | None]] = [
        ("as it is", row["worst"], None),
        ("without this feature", row["worst_ablated"], None),
        ("without other features", row["worst_random"], (row["worst_random_low"], row["worst_random_high"])),
        ("all traces erased (LEACE)", row["worst_leace"], None),
    ]
    title = f"Accuracy in the worst group, of {row['class']} and latent {row['latent']}"
    shown = [(name, value, ends) for name, value, ends in bars if value is not None]
    return draw_bars(title, shown, "without this feature", (0.5, "a coin"))


def _n(n: int, one: str, several: str | None = None) -> str:
    return f"{count(n)} {one if n == 1 else several or one + 's'}"


def _were(n: int) -> str:
    return "was" if n == 1 else "were"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(share: float) -> str:
    return f"{100 * share:.0f} points"
