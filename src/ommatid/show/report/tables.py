"""The sections with numbers: the headline, what was measured, SAEs beside their controls and beside one another."""

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
    """Names, meaning, reconstruction, dead latents; each with what to hold it against."""
    return _of_names(about), _of_meaning(about), *_of_reconstruction(about)


def _of_names(about: About) -> Headline:
    named, name = about.names.get(about.sae), "of names beat their control"
    if not named:
        return Headline(DASH, name, "no latent has a name that could be scored")
    better, scored = named["better"], named["scored"]
    meaning = (
        f"{interval(*wilson(better, scored), write=lambda of: f'{100 * of:.0f}')} % for {scored:,} names that were held against another "
        "latent's name on held-out images; names dealt at random would come to 50 % at most"
    )
    return Headline(share(better, scored), name, meaning)


def _of_meaning(about: About) -> Headline:
    mine, name = about.mine, "mean MS above its floor"
    if mine["above_floor"] is None:
        return Headline(DASH, name, "the MonoSemanticity score is undefined for every latent")
    others = [(label, about.controls[key]["above_floor"]) for key, label in (("untrained", "untrained SAE"), ("neurons", "raw neurons"))]
    beside = "; ".join(f"{label} {fixed(value)}" for label, value in others)
    within = f"{interval(mine['low'], mine['high'])} over images; " if mine["low"] is not None else ""
    return Headline(fixed(mine["above_floor"]), name, f"{within}{beside}; the floor, {fixed(about.floor)}, is what unrelated images score")


def _of_reconstruction(about: About) -> tuple[Headline, Headline]:
    mine = about.mine
    fired = f"with {mine['l0']:.1f} latents firing a token (L0); 0 is perfect, 1 is what predicting the mean gives"
    dead = f"they fire on no evaluation image; the SAE has {mine['n_latents']:,} latents"
    return Headline(fixed(mine["fvu"]), "variance unexplained (FVU)", fired), Headline(percent(mine["dead"]), "of latents are dead", dead)


def list_facts(about: About) -> tuple[tuple[str, str], ...]:
    """Model, hookpoint, judge, data, code and digests, as far as they are known: name and value."""
    run, (images,) = about.run, about.ask(IMAGES)
    classes = f"{images['classes']:,} classes" if images["classes"] else "without classes"
    given = {
        "SAE": f"{about.name}: {run['variant']}, {about.mine['n_latents']:,} latents, k {run['k']}",
        "Model": run["model"],
        "Hookpoint": run["hookpoint"] if not run["target"] else f"{run['hookpoint']}, decoding {run['target']}",
        "Judge": run["judge"],
        "Images": f"{images['training']:,} to train on, {images['evaluation']:,} others for everything measured here; {classes}",
        "Catalogue made": f"{run['created_at']:%Y-%m-%d %H:%M} UTC",
        "Code": run["git_commit"] and f"{run['git_commit']}{', with changes that were not committed' if run['git_dirty'] else ''}",
        "DVC experiment": run["dvc_experiment"],
        "dvc.lock": run["dvc_lock"],
        "MLflow run": run["mlflow_run_id"],
        "Prefect flow run": run["prefect_flow_run_id"],
        "Digest of images": run["images_digest"],
        "of activations": run["activations_digest"],
        "of the SAE": run["sae_digest"],
    }
    return tuple((name, value) for name, value in given.items() if value)


def write_params(about: About) -> str:
    """All params that led here, as YAML."""
    return yaml.safe_dump(json.loads(about.run["params"]), sort_keys=False, allow_unicode=True, width=110)


N_SAES = 24
"""In the table, the best first."""
SAES_HEAD = "SAE, latents, k, L0, FVU, dead, MS − floor, 95 % interval, untrained, raw neurons, labelled, beat control"
CONTROLS_HEAD = "dictionary, latents, L0, FVU, dead, MS − floor, 95 % interval, best MS, purity, without MS"
STABILITY_HEAD = "another SAE, matched one to one, matched mutually, mean best cosine, by chance"


def make_saes(about: About) -> Section:
    """Every SAE of the catalogue beside its controls."""
    question = Question(SAES)
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
        table=Table(tuple(SAES_HEAD.split(", ")), tuple(_sae(about, row) for row in shown), strong),
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
    table = Table(tuple(CONTROLS_HEAD.split(", ")), rows, strong=0)
    return Section("This SAE and its controls", reading, about.question(CONTROLS), is_wide=True, table=table)


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
    question = about.question(STABILITY)
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
    return [Section("Stability", reading, question, is_wide=True, table=Table(tuple(STABILITY_HEAD.split(", ")), rows))]
