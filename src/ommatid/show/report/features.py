"""The sections that show features: the best, the worst, and those whose label fails."""

from collections.abc import Mapping
from typing import Any

from ommatid.show.about import About
from ommatid.show.numbers import fixed, percent
from ommatid.show.pictures.best import BEST, MIN_IMAGES
from ommatid.show.pictures.page import N_STRONGEST
from ommatid.show.report import plots
from ommatid.show.report.parts import Section, ShownFeature

WORST = """
    SELECT * FROM features
    WHERE sae = $sae AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms, latent LIMIT $n
"""
MISLABELLED = """
    SELECT * FROM features
    WHERE sae = $sae AND label_score <= control_score AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms DESC, latent LIMIT $n
"""

N_FEATURES = 6
"""Number of features in a section."""
KINDS = (
    ("The best features", "Labelled features with the highest MS", BEST),
    (
        "The worst features",
        "Features with the lowest MS: to the judge, their images have hardly more in common than any others. See whether you agree",
        WORST,
    ),
    (
        "Labels not to believe",
        "Features with the highest MS among those whose label scores no better than another latent's: the judge sees that the images are "
        "alike, but the label is wrong, too vague, or fits other images as well",
        MISLABELLED,
    ),
)
"""Title, choice and SQL of each section."""


def make_features(about: About) -> list[Section]:
    """Make the sections that show features."""
    return [_make(about, *kind) for kind in KINDS]


def _make(about: About, title: str, choice: str, sql: str) -> Section:
    question = about.question(sql, least=MIN_IMAGES, n=N_FEATURES)
    found = question.ask(about.catalog).dicts()
    none = "" if found else "Nothing to show. "
    reading = (
        f"{none}{choice}. Only features that fire on at least {MIN_IMAGES} evaluation images are considered. Each is shown with its "
        f"{N_STRONGEST} strongest images and the latent's heat map. Purity is the share of their commonest class. The control is the "
        "score of another latent's label on the same images."
    )
    return Section(title, reading, question, is_wide=True, features=tuple(_show(about, feature) for feature in found))


def _show(about: About, feature: Mapping[str, Any]) -> ShownFeature:
    numbers = (
        f"MS {fixed(feature['ms'])}",
        f"label score {percent(feature['label_score'])}, control {percent(feature['control_score'])}",
        f"latent {feature['latent']}, fires on {feature['n_images']:,} images",
        *([f"purity {fixed(feature['purity'])}"] if feature["purity"] is not None else []),
    )
    return ShownFeature(feature["label"], numbers, plots.draw_examples(about.catalog, feature))
