"""The sections with features as pictures: the best, the worst, and those whose name fails."""

from collections.abc import Mapping
from typing import Any

from ommatid.show.pictures.best import BEST, MIN_IMAGES
from ommatid.show.pictures.page import N_STRONGEST
from ommatid.show.report import plots
from ommatid.show.report.about import About
from ommatid.show.report.parts import Section, Shown, fixed, percent

WORST = """
    SELECT * FROM features
    WHERE sae = $sae AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms, latent LIMIT $n
"""
MISNAMED = """
    SELECT * FROM features
    WHERE sae = $sae AND label_score <= control_score AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms DESC, latent LIMIT $n
"""

N_FEATURES = 6
"""Of each kind."""
KINDS = (
    ("The best features", "Highest MS of those with a name", BEST),
    (
        "The worst features",
        "Lowest MS: to the judge their images have hardly more in common than any. Look whether they have for you",
        WORST,
    ),
    (
        "Names not to believe",
        "Highest MS of those whose name does no better than another latent's: clear to the judge, but the name is wrong, too vague, or "
        "fits others as well",
        MISNAMED,
    ),
)


def make_features(about: About) -> list[Section]:
    """A section of each kind."""
    return [_make(about, *kind) for kind in KINDS]


def _make(about: About, title: str, choice: str, sql: str) -> Section:
    question = about.question(sql, least=MIN_IMAGES, n=N_FEATURES)
    found = question.ask(about.catalog).dicts()
    none = "" if found else "None to show. "
    reading = (
        f"{none}{choice}. Only features that fire on {MIN_IMAGES} evaluation images or more; their {N_STRONGEST} strongest images, under "
        "the latent's heat map; purity is the share of their commonest class. The control is the score of another latent's name on the "
        "same images."
    )
    return Section(title, reading, question, is_wide=True, features=tuple(_show(about, feature) for feature in found))


def _show(about: About, feature: Mapping[str, Any]) -> Shown:
    numbers = (
        f"MS {fixed(feature['ms'])}",
        f"name {percent(feature['label_score'])}, control {percent(feature['control_score'])}",
        f"latent {feature['latent']}, on {feature['n_images']:,} images",
        *([f"purity {fixed(feature['purity'])}"] if feature["purity"] is not None else []),
    )
    return Shown(feature["label"], numbers, plots.draw_examples(about.catalog, feature))
