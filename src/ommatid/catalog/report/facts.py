"""The numbers that come first, and what was measured."""

import json

import yaml

from ommatid.catalog.report import questions
from ommatid.catalog.report.about import About
from ommatid.catalog.report.numbers import DASH, fixed, interval, percent, share, wilson
from ommatid.catalog.report.parts import Headline


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
    run, (images,) = about.run, about.ask(questions.IMAGES)
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
