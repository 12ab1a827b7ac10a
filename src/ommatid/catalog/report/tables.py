"""The sections with a table: SAEs beside their controls, and beside one another."""

from collections.abc import Mapping
from typing import Any

from ommatid.catalog.report import questions
from ommatid.catalog.report.about import About
from ommatid.catalog.report.figures import NAMES
from ommatid.catalog.report.numbers import DASH, fixed, interval, percent, share
from ommatid.catalog.report.parts import Section, Table
from ommatid.catalog.report.questions import Question

N_SAES = 24
"""In the table, the best first."""
SAES = "SAE, latents, k, L0, FVU, dead, MS − floor, 95 % interval, untrained, raw neurons, labelled, beat control"
CONTROLS = "dictionary, latents, L0, FVU, dead, MS − floor, 95 % interval, best MS, purity, without MS"
STABILITY = "another SAE, matched one to one, matched mutually, mean best cosine, by chance"


def make_saes(about: About) -> Section:
    """Every SAE of the catalogue beside its controls."""
    question = Question(questions.SAES)
    found = question.ask(about.catalog).dicts()
    reading = (
        "Each SAE on images that training never saw, the best first. MS − floor is the mean MonoSemanticity score of its latents above "
        "what unrelated images score; it means something only above the same of the untrained SAE and of the raw neurons, which stand "
        "beside it. The interval is over images. Beat control: share of scored names that pick held-out images better than another"
        " latent's name."
    )
    if len(found) > N_SAES:
        reading += f" {len(found) - N_SAES} more are in the relation runs."
    shown = found[:N_SAES]
    strong = next((i for i, row in enumerate(shown) if row["sae"] == about.sae), None)
    return Section(
        "The SAEs beside their controls" if len(found) > 1 else "The SAE beside its controls",
        reading,
        question,
        is_wide=True,
        table=Table(tuple(SAES.split(", ")), tuple(_sae(about, row) for row in shown), strong),
    )


def _sae(about: About, row: Mapping[str, Any]) -> tuple[str, ...]:
    named = about.names.get(row["sae"])
    return (
        row["name"],
        f"{row['d_sae']:,}",
        str(row["k"]),
        f"{row['l0']:.1f}",
        fixed(row["fvu"]),
        percent(row["dead"]),
        fixed(row["above_floor"]),
        interval(row["low"], row["high"]),
        fixed(row["untrained"]),
        fixed(row["neurons"]),
        f"{row['n_labelled']:,}",
        share(named["better"], named["scored"]) if named else DASH,
    )


def make_controls(about: About) -> Section:
    """The SAE beside all dictionaries that it was measured with."""
    reading = (
        f"{about.name} beside dictionaries that learned less or nothing, on the same images. Best MS is the highest of a single latent, "
        "and grows with their number. Purity: mean share of the commonest class among a latent's 16 strongest images. Without MS: latents "
        "that are constant or fire on fewer than two images; no mean counts them."
    )
    rows = tuple(_control(name, row) for name, row in about.controls.items())
    table = Table(tuple(CONTROLS.split(", ")), rows, strong=0)
    return Section("This SAE and its controls", reading, about.question(questions.CONTROLS), is_wide=True, table=table)


def _control(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        NAMES.get(name, name),
        f"{row['n_latents']:,}",
        f"{row['l0']:.1f}",
        fixed(row["fvu"]),
        percent(row["dead"]),
        fixed(row["above_floor"]),
        interval(row["low"], row["high"]),
        fixed(row["ms_best"]),
        fixed(row["purity"]),
        f"{row['ms_left_out']:,}",
    )


def make_stability(about: About) -> list[Section]:
    """How far other SAEs have the same directions, where there are others."""
    question = about.question(questions.STABILITY)
    found = question.ask(about.catalog).dicts()
    if not found:
        return []
    reading = (
        f"How many directions of {about.name} another SAE of the same activations has, too: the share with a partner above cosine 0.9, one "
        "to one (Hungarian) or as each other's nearest, and the mean cosine of each latent's nearest (MMCS). By chance: that mean, were "
        "the other's directions random. Dead latents keep the direction they began with and match nothing. SAEs of one seed begin "
        "alike, and a short training leaves them so: other seeds tell more."
    )
    rows = tuple((row["other"], percent(row["matched"]), percent(row["mutual"]), fixed(row["mmcs"]), fixed(row["chance"])) for row in found)
    return [Section("Stability", reading, question, is_wide=True, table=Table(tuple(STABILITY.split(", ")), rows))]
