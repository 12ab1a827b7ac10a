"""One SAE of a catalogue: its headline numbers beside their controls, and the facts about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ommatid.catalog.question import Question
from ommatid.catalog.reader import Catalog
from ommatid.show.numbers import DASH, fixed, interval, percent, share, wilson

RUN = """
    SELECT * FROM runs WHERE sae = $sae
"""
IMAGES = """
    SELECT count(*) FILTER (split = 'train') AS training, count(*) FILTER (split = 'eval') AS evaluation, count(DISTINCT label) AS classes
    FROM images
"""
CONTROLS = """
    SELECT
        dictionary, n_latents, l0, fvu, dead, ms - ms_floor AS above_floor, ms_low - ms_floor AS low, ms_high - ms_floor AS high,
        ms_best, purity, ms_left_out
    FROM comparisons WHERE sae = $sae
    ORDER BY dictionary <> 'sae', above_floor DESC NULLS LAST, dictionary
"""
LABEL_SCORES = """
    SELECT
        sae, count(*) AS scored, count(*) FILTER (label_score > control_score) AS better,
        avg(label_score) AS mean_score, avg(control_score) AS mean_control
    FROM features WHERE label_score IS NOT NULL AND control_score IS NOT NULL GROUP BY sae
"""


class About:
    """An SAE, and what several sections of the report need to know about it.

    Args:
        catalog: The open catalogue.
        sae: Name of the SAE in the catalogue.
    """

    def __init__(self, catalog: Catalog, sae: str) -> None:
        self.catalog = catalog
        self.sae = sae
        (self.run,) = self.ask(RUN, sae=sae)
        self.name: str = self.run["name"]
        """Name of the SAE in its training."""
        self.controls = {row["dictionary"]: row for row in self.ask(CONTROLS, sae=sae)}
        """Rows of `comparisons` for the SAE and its controls, by dictionary."""
        self.numbers = self.controls["sae"]
        """The row of the SAE itself."""
        self.floor: float = self.run["ms_floor"]
        """Floor of the monosemanticity score."""
        self.label_scores: Mapping[str, dict[str, Any]] = {row["sae"]: row for row in self.ask(LABEL_SCORES)}
        """Number of scored labels, how many beat their control, and mean scores, by SAE; an SAE without scored labels is missing."""

    def ask(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of an answer, by column."""
        return Question(sql, values).ask(self.catalog).dicts()

    def question(self, sql: str, **values: Any) -> Question:
        """Return a question about this SAE, with `$sae` among its values."""
        return Question(sql, {"sae": self.sae, **values})


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the top of the report."""

    value: str
    """The number as it is written."""
    name: str
    """Name of the number, a few words."""
    meaning: str
    """What to compare it with."""


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
    n_classes = images["classes"]
    classes = f"{n_classes:,} class{'es' if n_classes != 1 else ''}" if n_classes else "without classes"
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
