"""The sections about what features do to the model's output, beside what they show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ommatid.compute.intervals import spearman_interval
from ommatid.show.about import About
from ommatid.show.doses import DECIDING, DOSES, STATUSES_IN_WORDS, draw_doses, find_outcome
from ommatid.show.numbers import DASH, fixed, percent, share, signed, wilson
from ommatid.show.pictures.best import MIN_IMAGES
from ommatid.show.pictures.page import short
from ommatid.show.report import plots
from ommatid.show.report.parts import Section, ShownFeature, Table

STATUSES = """
    SELECT
        causal, count(*) AS latents, count(*) FILTER (control_causal = 'causal') AS random_causal, mode(causal_reason) AS reason
    FROM features WHERE sae = $sae GROUP BY causal ORDER BY causal = 'untested', latents DESC, causal
"""
STRONGEST = """
    SELECT * FROM features WHERE sae = $sae AND effect IS NOT NULL ORDER BY effect - best_control DESC, latent LIMIT $n
"""
EFFECTS = """
    WITH tested AS (
        SELECT latent, causal, ms, effect - best_control AS above, effect_low - best_control AS low, effect_high - best_control AS high
        FROM features WHERE sae = $sae AND effect IS NOT NULL AND ms IS NOT NULL
    ), ranked AS (
        SELECT
            rank() OVER (ORDER BY ms) + (count(*) OVER (PARTITION BY ms) - 1) / 2 AS by_ms,
            rank() OVER (ORDER BY above) + (count(*) OVER (PARTITION BY above) - 1) / 2 AS by_effect
        FROM tested
    ), live AS (
        SELECT
            rank() OVER (ORDER BY ms) + (count(*) OVER (PARTITION BY ms) - 1) / 2 AS by_ms,
            rank() OVER (ORDER BY attribution) + (count(*) OVER (PARTITION BY attribution) - 1) / 2 AS by_attribution
        FROM features WHERE sae = $sae AND attribution > 0 AND ms IS NOT NULL AND n_images >= $least
    )
    SELECT
        *, (SELECT corr(by_ms, by_effect) FROM ranked) AS correlation, (SELECT count(*) FROM live) AS n_live,
        (SELECT corr(by_ms, by_attribution) FROM live) AS correlation_of_live
    FROM tested ORDER BY latent
"""
ATTRIBUTIONS = """
    WITH ranked AS (
        SELECT
            output,
            rank() OVER cheap + (count(*) OVER (PARTITION BY output, effect) - 1) / 2 AS by_cheap,
            rank() OVER exact + (count(*) OVER (PARTITION BY output, exact) - 1) / 2 AS by_exact
        FROM attributions WHERE sae = $sae AND exact IS NOT NULL
        WINDOW cheap AS (PARTITION BY output ORDER BY effect), exact AS (PARTITION BY output ORDER BY exact)
    ), agreement AS (
        SELECT output, count(*) AS n, corr(by_cheap, by_exact) AS rho FROM ranked GROUP BY output
    )
    SELECT
        output, any_value(sparsity) AS sparsity, any_value(attributions.n_images) AS n_images, any_value(n) AS n,
        any_value(rho) FILTER (isfinite(rho)) AS correlation, max(attributions.effect) AS for_it, min(attributions.effect) AS against_it,
        arg_max(latent, attributions.effect) AS speaks_for, arg_min(latent, attributions.effect) AS speaks_against,
        arg_max(label, attributions.effect) AS label_for, arg_min(label, attributions.effect) AS label_against
    FROM attributions LEFT JOIN features USING (sae, latent) LEFT JOIN agreement USING (output)
    WHERE sae = $sae GROUP BY output ORDER BY output
"""

N_FEATURES = 10
"""Number of features whose dose curves are shown."""
PLOT = (400, 220)
"""Width and height of a dose curve."""
N_OUTPUTS = 24
"""Largest number of outputs in the table of attributions."""


def make_interventions(about: About) -> list[Section]:
    """Make the sections about interventions; a single one, which says why, if no latent was tested."""
    statuses, is_tested = _make_statuses(about)
    return [statuses, _make_strongest(about), _make_scatter(about), *_make_attributions(about)] if is_tested else [statuses]


def _make_statuses(about: About) -> tuple[Section, bool]:
    """Make the section that counts what latents do; and whether any was tested."""
    title, question = "What the features do", about.question(STATUSES)
    found = question.ask(about.catalog).dicts()
    of = {row["causal"]: row for row in found}
    untested = of.pop("untested", None)
    n_tested = sum(row["latents"] for row in of.values())
    if not n_tested:
        reason = (untested and untested["reason"]) or "the stage intervene gave no result"
        return Section(title, f"Nothing to show, as no latent was tested: {reason}.", question, is_wide=True), False
    n_random = sum(row["random_causal"] for row in of.values())
    causal = of.get("causal", {"latents": 0})["latents"]
    rows = [
        _status_row(STATUSES_IN_WORDS[name], of.get(name, {"latents": 0})["latents"], n_tested)
        for name in ("causal", "reads_only", "breaks_model")
    ]
    rows.append(_status_row("random latents called causal by the same rule", n_random, n_tested))
    outcome = find_outcome(about.ask(DECIDING, sae=about.sae), "label")
    rest = f" {untested['latents']:,} others are untested; the most common reason is: {untested['reason']}." if untested else ""
    reading = (
        f"{causal:,} of the {n_tested:,} latents that were tested {'is' if causal == 1 else 'are'} causal. A causal latent, set to a dose, "
        f"{outcome.does} more than the same change does along other latents, along random directions and the other way"
        f"{outcome.rivals}, at a dose that leaves the model whole. Reads only: at no dose does it. Breaks the model: only where the output "
        "drifts too far. The "
        "last row is the control: the same rule, applied to a random latent in the place of each. If it is as high as the first, no latent "
        f"is known to do anything.{rest}"
    )
    return Section(title, reading, question, is_wide=True, table=Table(STATUS_HEAD, tuple(rows), strong=0)), True


STATUS_HEAD = ("status", "latents", "of those tested", "95 % interval")


def _status_row(name: str, n: int, n_tested: int) -> tuple[str, ...]:
    low, high = wilson(n, n_tested)
    return name, f"{n:,}", share(n, n_tested), f"{100 * low:.0f} to {100 * high:.0f} %"


def _make_strongest(about: About) -> Section:
    question = about.question(STRONGEST, n=N_FEATURES)
    found = question.ask(about.catalog).dicts()
    n_causal = sum(row["causal"] == "causal" for row in found)
    said = "all of them are causal" if n_causal == len(found) else f"{n_causal or 'none'} of them {'is' if n_causal < 2 else 'are'} causal"
    outcome = find_outcome(about.ask(DECIDING, sae=about.sae), "label")
    reading = (
        f"The {len(found)} latents whose effect exceeds that of their best control most; {said}. Effect: {outcome.effect}. A latent acts "
        "as its label says if its line, which is solid, rises with the dose and leaves every dashed line below it. Dose 1 is the 99th "
        "percentile of the latent's own activations, and dose 0 removes it. Lines of random controls are means over draws; the best "
        "control is the upper end over draws, and the interval is that of the difference from it. The difference of means is another way "
        "to the same end, and does not decide. The pictures are those on which the latent fires most."
    )
    shown = tuple(_show(about, row) for row in found)
    return Section("The features that do most, and their controls", reading, question, is_wide=True, features=shown)


def _show(about: About, feature: Mapping[str, Any]) -> ShownFeature:
    numbers = (
        f"{STATUSES_IN_WORDS[feature['causal']]}, at dose {feature['dose']:.3g}",
        f"effect {signed(feature['effect'])} ({signed(feature['effect_low'])} to {signed(feature['effect_high'])})",
        f"best control {signed(feature['best_control'])}",
        f"latent {feature['latent']}, MS {fixed(feature['ms'])}",
        f"label score {percent(feature['label_score'])}",
    )
    doses = draw_doses(about.ask(DOSES, sae=about.sae, latent=feature["latent"]), "label", *PLOT)
    return ShownFeature(feature["label"], numbers, plots.draw_examples(about.catalog, feature), doses)


def _make_scatter(about: About) -> Section:
    title, question = "Does monosemanticity predict what a feature does?", about.question(EFFECTS, least=MIN_IMAGES)
    rows = question.ask(about.catalog).dicts()
    if not rows:
        return Section(title, "Nothing to show: MS is undefined for every latent that was tested.", question)
    reading = (
        f"{_correlation(rows)} Each dot is a latent that was tested; its height is its effect less that of its best control, with a 95 % "
        "interval. Only latents whose interval lies above the dashed line can be causal. The tested latents are chosen by "
        "`intervene.latents`, and the correlation is that among them, not among all."
    )
    live = _describe(rows[0]["correlation_of_live"], rows[0]["n_live"])
    if live:
        reading += (
            f" Of {rows[0]['n_live']:,} latents that fire on at least {MIN_IMAGES} evaluation images, the attribution is known, the mean "
            f"size of what the log-odds of the classes owe to them: the rank correlation of MS with it is {live}."
        )
    return Section(title, reading, question, plots.draw_effects(rows))


def _correlation(rows: Sequence[Mapping[str, Any]]) -> str:
    rho, n = rows[0]["correlation"], len(rows)
    described = _describe(rho, n)
    if not described:
        return f"{n} latent{'s are' if n != 1 else ' is'} too few, or too much alike, for a rank correlation."
    low, high = spearman_interval(rho, n)
    verdict = "MS predicts the effect" if low > 0 else "the higher the MS, the smaller the effect" if high < 0 else "no relation is shown"
    return f"The rank correlation of MS and effect is {described}: {verdict}."


def _describe(rho: float | None, n: int) -> str:
    """Write a rank correlation with its interval; empty if it is not defined."""
    low, high = spearman_interval(math.nan if rho is None else rho, n)
    return "" if math.isnan(low) else f"{signed(rho)} (95 % interval {signed(low)} to {signed(high)})"


def _make_attributions(about: About) -> list[Section]:
    """Make the section about the latents on which the log-odds of classes rest, if there are any."""
    title, question = "Which latents a class rests on", about.question(ATTRIBUTIONS)
    found = question.ask(about.catalog).dicts()
    if not found:
        return []
    known = [row for row in found if row["correlation"] is not None]
    agrees = ""
    if known:
        mean = sum(row["correlation"] for row in known) / len(known)
        agrees = (
            f" Agreement is the rank correlation of these effects with those measured by removing the latent, over the {known[0]['n']} "
            f"latents of each class whose effects are largest; its mean over classes is {signed(mean)}. From so few, each number is rough; "
            "where it is low, do not trust the order."
        )
    reading = (
        "The effect of a latent on the log-odds of a class, in nats, estimated from gradients and averaged over "
        f"{found[0]['n_images']:,} images of all classes. Latents in use is (Σ|effect|)² / Σ effect² over all latents: "
        f"1 if a single latent decides, and the number of latents if all have the same effect.{agrees}"
    )
    if len(found) > N_OUTPUTS:
        reading += f" The relation attributions lists {len(found) - N_OUTPUTS} more outputs."
    rows = tuple(_attribution_row(row) for row in found[:N_OUTPUTS])
    return [Section(title, reading, question, is_wide=True, table=Table(ATTRIBUTION_HEAD, rows))]


ATTRIBUTION_HEAD = ("class", "speaks for it most", "effect", "speaks against it most", "effect", "latents in use", "agreement")


def _attribution_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    for_it, against = (
        (f"{row[f'label_{side}'] or 'latent'} ({row[f'speaks_{side}']})", row[f"{side}_it"])
        if sign * row[f"{side}_it"] > 0
        else (DASH, None)
        for side, sign in (("for", 1), ("against", -1))
    )
    return (
        short(row["output"], 40), for_it[0], signed(for_it[1]), against[0], signed(against[1]), f"{row['sparsity']:.0f}",
        signed(row["correlation"]),
    )  # fmt: skip
