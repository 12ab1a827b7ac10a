"""The sections with a plot, each with a sentence that says how to read it."""

from ommatid.catalog.pictures.best import MIN_IMAGES
from ommatid.catalog.report import figures, questions
from ommatid.catalog.report.about import About
from ommatid.catalog.report.numbers import fixed
from ommatid.catalog.report.parts import Section
from ommatid.catalog.report.questions import Question


def make_fidelity(about: About) -> Section:
    """FVU against L0, and MS above its floor against width, of every SAE."""
    reading = (
        "Left: the lower, the more is reconstructed; the further left, the fewer latents a token needs. An SAE is better than another "
        "where it lies below it at the same L0. Right: the higher, the more a latent means one thing, on average. At or below the dashed "
        "line of the untrained SAEs, training did nothing for meaning."
    )
    picture = figures.draw_saes(about.catalog)
    return Section("Reconstruction and monosemanticity", reading, Question(questions.FIDELITY), picture, is_wide=True)


def make_monosemanticity(about: About) -> Section:
    """Histogram of MS, with floor and controls."""
    title, question = "Monosemanticity of the latents", about.question(questions.JUDGED, judge=about.run["judge"])
    found: dict[str, list[float]] = {"sae": []}
    for name, ms in question.ask(about.catalog).rows:
        found.setdefault(name, []).append(ms)
    if not found["sae"]:
        return Section(title, "Nothing to show: MS is undefined for every latent.", question)
    reading = (
        f"How alike, to the judge {about.run['judge']}, the images are that fire a latent: 1 is one picture over and over, the floor, "
        f"{fixed(about.floor)}, is what unrelated images score. Latents to the right of the controls are clearer than without training."
    )
    return Section(title, reading, question, figures.draw_monosemanticity(found, about.floor))


def make_densities(about: About) -> Section:
    """Histogram of how often latents fire."""
    title, question = "How often latents fire", about.question(questions.DENSITIES)
    densities = [density for density, _, _ in question.ask(about.catalog).rows]
    if not any(densities):
        return Section(title, "Nothing to show: no latent fires.", question)
    reading = (
        "Latents far to the right fire on much of everything and rarely mean one thing; latents far to the left rest on few tokens. "
        f"{densities.count(0):,} dead latents, of density 0, have no place on a logarithmic scale."
    )
    return Section(title, reading, question, figures.draw_densities(densities))


def make_scatter(about: About) -> Section:
    """MS against density."""
    title, question = "Monosemanticity against density", about.question(questions.DENSITIES)
    rows = question.ask(about.catalog).rows
    if not any(ms is not None for _, ms, _ in rows):
        return Section(title, "Nothing to show: MS is undefined for every latent.", question)
    reading = (
        f"A dot a latent. High scores of pale dots rest on fewer than {MIN_IMAGES} images and may be luck: believe what stays high further "
        "to the right. A cloud that only rises to the left says that rarity alone makes latents look monosemantic."
    )
    return Section(title, reading, question, figures.draw_scatter(rows, about.floor, MIN_IMAGES))


def make_scores(about: About) -> Section:
    """Histogram of label scores and of their controls."""
    title, question = "Do names hold on held-out images?", about.question(questions.SCORES)
    rows = question.ask(about.catalog).rows
    if not rows:
        return Section(title, "Nothing to show: no latent has a name that could be scored.", question)
    reading = (
        "How well a name picks the images that fire its latent out of mixed ones that did not make the name; 50 % is chance. Names are "
        "worth what the filled histogram lies to the right of the outlined one, which is the same test with another latent's name."
    )
    own, control = zip(*rows, strict=True)
    return Section(title, reading, question, figures.draw_scores(own, control))
