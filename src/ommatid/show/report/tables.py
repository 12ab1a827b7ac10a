"""The sections with numbers: tables that compare SAEs with their controls and with one another."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from ommatid.catalog.question import Question
from ommatid.show.about import CONTROLS, About
from ommatid.show.numbers import DASH, fixed, interval, percent, share
from ommatid.show.report.parts import Section, Table
from ommatid.show.report.plots import NAMES

SAES = """
    SELECT
        r.name, r.variant, c.n_latents AS d_sae, r.k, c.l0, c.fvu, c.dead, c.ms - c.ms_floor AS above_floor,
        c.ms_low - c.ms_floor AS low, c.ms_high - c.ms_floor AS high, u.ms - u.ms_floor AS untrained, n.ms - n.ms_floor AS neurons,
        r.n_labelled, r.sae
    FROM comparisons AS c JOIN runs AS r USING (sae)
    LEFT JOIN comparisons AS u ON u.sae = c.sae AND u.dictionary = 'untrained'
    LEFT JOIN comparisons AS n ON n.sae = c.sae AND n.dictionary = 'neurons'
    WHERE c.dictionary = 'sae' ORDER BY above_floor DESC NULLS LAST, r.sae
"""
STABILITY = """
    SELECT coalesce(r.name, s.other_sae) AS other, s.matched, s.mutual, s.mmcs, s.chance
    FROM stability AS s LEFT JOIN runs AS r ON r.sae = s.other_sae
    WHERE s.sae = $sae ORDER BY s.mmcs DESC, other
"""


def write_params(about: About) -> str:
    """Return the params of all stages as YAML."""
    return yaml.safe_dump(json.loads(about.run["params"]), sort_keys=False, allow_unicode=True, width=110)


N_SAES = 24
"""Largest number of SAEs in the table, best first."""
SAES_HEAD = "SAE, latents, k, L0, FVU, dead, MS − floor, 95 % interval, untrained, raw neurons, labelled, beat control"
CONTROLS_HEAD = "dictionary, latents, L0, FVU, dead, MS − floor, 95 % interval, best MS, purity, without MS"
STABILITY_HEAD = "other SAE, matched one to one, matched mutually, mean best cosine, by chance"


def make_saes(about: About) -> Section:
    """Make the section that compares every SAE of the catalogue with its controls."""
    question = Question(SAES)
    found = question.ask(about.catalog).dicts()
    reading = (
        "All SAEs on images not used in training, best first. MS − floor is the mean MonoSemanticity score of the latents above the score "
        "of unrelated images; compare it with the same number for the untrained SAE and for the raw neurons in the next columns. The "
        "interval is over images. Beat control: share of scored labels that identify held-out images better than another latent's label."
    )
    if len(found) > N_SAES:
        reading += f" The relation runs lists {len(found) - N_SAES} more."
    shown = found[:N_SAES]
    strong = next((i for i, row in enumerate(shown) if row["sae"] == about.sae), None)
    return Section(
        "The SAEs and their controls" if len(found) > 1 else "The SAE and its controls",
        reading,
        question,
        is_wide=True,
        table=Table(tuple(SAES_HEAD.split(", ")), tuple(_sae(about, row) for row in shown), strong),
    )


def _sae(about: About, row: Mapping[str, Any]) -> tuple[str, ...]:
    scores = about.label_scores.get(row["sae"])
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
        share(scores["better"], scores["scored"]) if scores else DASH,
    )


def make_controls(about: About) -> Section:
    """Make the section that compares the SAE with all dictionaries that were evaluated beside it."""
    reading = (
        f"{about.name} compared with dictionaries that learned less or nothing, on the same images. Best MS is the highest score of a "
        "single latent, which grows with the number of latents. Purity: mean share of the commonest class among a latent's 16 strongest "
        "images. Without MS: latents that are constant or fire on fewer than two images, which are left out of the means."
    )
    rows = tuple(_control(name, row) for name, row in about.controls.items())
    table = Table(tuple(CONTROLS_HEAD.split(", ")), rows, strong=0)
    return Section("This SAE and all its controls", reading, about.question(CONTROLS), is_wide=True, table=table)


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
    """Make the section about how many directions other SAEs share, if there are other SAEs."""
    question = about.question(STABILITY)
    found = question.ask(about.catalog).dicts()
    if not found:
        return []
    reading = (
        f"How many directions of {about.name} another SAE of the same activations also has: the share of latents matched above cosine 0.9, "
        "one to one (Hungarian) or as each other's nearest, and the mean cosine of each latent with its nearest (MMCS). By chance: that "
        "mean if the other SAE's directions were random. Dead latents keep their initial direction and match nothing. SAEs with the same "
        "seed start alike and stay so in a short training; SAEs with other seeds tell more about stability."
    )
    rows = tuple((row["other"], percent(row["matched"]), percent(row["mutual"]), fixed(row["mmcs"]), fixed(row["chance"])) for row in found)
    return [Section("Stability", reading, question, is_wide=True, table=Table(tuple(STABILITY_HEAD.split(", ")), rows))]
