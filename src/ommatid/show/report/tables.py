"""The sections with numbers: headlines, facts, and tables that compare SAEs with their controls and with one another."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from ommatid.show.report.about import CONTROLS, About
from ommatid.show.report.parts import DASH, Headline, Question, Section, Table, fixed, interval, percent, share, wilson
from ommatid.show.report.plots import NAMES

IMAGES = """
    SELECT count(*) FILTER (split = 'train') AS training, count(*) FILTER (split = 'eval') AS evaluation, count(DISTINCT label) AS classes
    FROM images
"""
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


def make_headlines(about: About) -> tuple[Headline, ...]:
    """Make the headlines about labels, monosemanticity, reconstruction and dead latents, each with what to compare it with."""
    return _label_headline(about), _monosemanticity_headline(about), *_reconstruction_headlines(about)


def _label_headline(about: About) -> Headline:
    scores, name = about.label_scores.get(about.sae), "of labels beat their control"
    if not scores:
        return Headline(DASH, name, "no latent has a label that could be scored")
    better, scored = scores["better"], scores["scored"]
    meaning = (
        f"95 % interval {interval(*wilson(better, scored), write=lambda value: f'{100 * value:.0f}')} %, from {scored:,} labels compared "
        "with another latent's label on held-out images; random labels would reach at most 50 %"
    )
    return Headline(share(better, scored), name, meaning)


def _monosemanticity_headline(about: About) -> Headline:
    numbers, name = about.numbers, "mean MS above its floor"
    if numbers["above_floor"] is None:
        return Headline(DASH, name, "the MonoSemanticity score is undefined for every latent")
    others = [(label, about.controls[key]["above_floor"]) for key, label in (("untrained", "untrained SAE"), ("neurons", "raw neurons"))]
    controls = "; ".join(f"{label} {fixed(value)}" for label, value in others)
    within = f"95 % interval over images {interval(numbers['low'], numbers['high'])}; " if numbers["low"] is not None else ""
    meaning = f"{within}{controls}; unrelated images score the floor, {fixed(about.floor)}"
    return Headline(fixed(numbers["above_floor"]), name, meaning)


def _reconstruction_headlines(about: About) -> tuple[Headline, Headline]:
    numbers = about.numbers
    fidelity = f"with {numbers['l0']:.1f} latents firing per token (L0); 0 is perfect, and predicting the mean gives 1"
    dead = f"they fire on no evaluation image; the SAE has {numbers['n_latents']:,} latents"
    return (
        Headline(fixed(numbers["fvu"]), "variance unexplained (FVU)", fidelity),
        Headline(percent(numbers["dead"]), "of latents are dead", dead),
    )


def list_facts(about: About) -> tuple[tuple[str, str], ...]:
    """List model, hookpoint, judge, data, code and digests, as far as they are known.

    Returns:
        Name and value of each fact.
    """
    run, (images,) = about.run, about.ask(IMAGES)
    classes = f"{images['classes']:,} classes" if images["classes"] else "without classes"
    facts = {
        "SAE": f"{about.name}: {run['variant']}, {about.numbers['n_latents']:,} latents, k {run['k']}",
        "Model": run["model"],
        "Hookpoint": run["hookpoint"] if not run["target"] else f"{run['hookpoint']}, decoding {run['target']}",
        "Judge": run["judge"],
        "Images": f"{images['training']:,} for training, {images['evaluation']:,} others for everything measured here; {classes}",
        "Catalogue built": f"{run['created_at']:%Y-%m-%d %H:%M} UTC",
        "Code": run["git_commit"] and f"{run['git_commit']}{', with uncommitted changes' if run['git_dirty'] else ''}",
        "DVC experiment": run["dvc_experiment"],
        "dvc.lock": run["dvc_lock"],
        "MLflow run": run["mlflow_run_id"],
        "Prefect flow run": run["prefect_flow_run_id"],
        "Digest of images": run["images_digest"],
        "Digest of activations": run["activations_digest"],
        "Digest of the SAE": run["sae_digest"],
    }
    return tuple((name, value) for name, value in facts.items() if value)


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
