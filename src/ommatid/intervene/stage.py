"""Stage `intervene`: sets latents to chosen activations and measures what the model's output does then, beside controls."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa
import torch

from ommatid import schemas
from ommatid.config import InterveneParams
from ommatid.config.intervene import ListedLatents
from ommatid.errors import ConfigError, InputError, ModelError
from ommatid.events import Listener, Warned, ignore
from ommatid.intervene.attributes import load_attributes
from ommatid.intervene.audit import Audited, audit, leave_unaudited
from ommatid.intervene.measure import Measured, measure
from ommatid.intervene.subject import Subject
from ommatid.metrics import rank_correlation
from ommatid.store import Artefact, Draft
from ommatid.store.per_sae import for_each_sae
from ommatid.summaries import EffectsSummary

NOT_CHOSEN = "not chosen"
"""Why a latent is untested that `intervene.latents` leaves out."""
FEWEST_RANKED = 3
"""Fewest latents over which a rank correlation is given."""


def run(params: InterveneParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Intervene on the latents of every SAE of a training; see `intervene`.

    Raises:
        ConfigError: `latents` lists a latent that an SAE does not have; the question about images is empty or cannot be read; or the file
            of `audit.attributes` cannot be used.
        ModelError: The model that is to answer cannot be loaded, or does not fit into memory.
    """
    if params.answers:
        from ommatid.intervene.answers import read_question

        read_question(params.answers.question)
    if params.audit.attributes:
        load_attributes(params.audit.attributes, inputs["images"], on_event)  # before any work
    evaluations = inputs["evaluate"].each()
    for name, evaluation in evaluations.items():
        _check_listed(params, name, evaluation.summary["n_latents"])
    _check_live(params, evaluations)
    return for_each_sae(functools.partial(intervene, params), inputs, draft, on_event)


def _check_listed(params: InterveneParams, name: str, n_latents: int) -> None:
    listed = params.latents.latents if isinstance(params.latents, ListedLatents) else ()
    if unknown := [latent for latent in listed if latent >= n_latents]:
        raise ConfigError(f"intervene.latents.latents: got {unknown[0]}, but the latents of {name} are 0 to {n_latents - 1}; remove it")


def _check_live(params: InterveneParams, evaluations: Mapping[str, Artefact]) -> None:
    listed = params.latents.latents if isinstance(params.latents, ListedLatents) else ()
    dead = {name: _dead(evaluation) for name, evaluation in evaluations.items()} if listed else {}
    if listed and all(latent in of_sae for of_sae in dead.values() for latent in listed):
        raise ConfigError(
            f"intervene.latents.latents: got {', '.join(map(str, listed))}, but all are dead in {', '.join(dead)}: they never "
            "fire, so nothing can be tested; list others"
        )


def _dead(evaluation: Artefact) -> set[int]:
    table = evaluation.read("latents", ["latent", "is_dead"])
    return {latent for latent, dead in zip(table["latent"].to_pylist(), table["is_dead"].to_pylist(), strict=True) if dead}


def intervene(params: InterveneParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Set latents of one SAE to chosen activations, and measure what the model's output does then.

    Args:
        params: The section `intervene`.
        inputs: `images`, the activations (`extract`), the SAE (`train`), its evaluation (`evaluate`), its labels (`label`) and, for a
            transcoder, the activations that it decodes (`target`).
        draft: Draft of the interventions on this SAE.
        on_event: Called with each progress event and warning.

    Returns:
        The sealed artefact. If the model cannot be run again, every latent is untested with the reason, and a warning gives it; unless it
        is to answer in words, which is an error then, as another machine may be able to load it.
    """
    name, latents = inputs["train"].summary["sae"], inputs["evaluate"].read("latents", ["latent", "ms"])
    ms = dict(zip(latents["latent"].to_pylist(), latents["ms"].to_pylist(), strict=True))
    found, audited = _measure(params, inputs, on_event)
    if isinstance(found, str):
        on_event(Warned(f"{name}: no interventions: {found}"))
        reason, why, measured = found, found, Measured([], [], [], None, None)
    else:
        reason, why, measured = "ok", NOT_CHOSEN, found
    chosen = {row["latent"] for row in measured.effects}
    untested = [{"latent": latent, "status": "untested", "reason": why} for latent in ms if latent not in chosen]
    known = measured.latents
    effects = sorted(({**known.get(row["latent"], {}), **row} for row in (*measured.effects, *untested)), key=itemgetter("latent"))
    tables = {
        "interventions": (schemas.INTERVENTIONS, measured.interventions),
        "effects": (schemas.EFFECTS, effects),
        "attributions": (schemas.ATTRIBUTIONS, measured.attributions),
        "audit": (schemas.AUDIT, audited.pairs),
        "audit_images": (schemas.AUDIT_IMAGES, audited.images),
        "audits": (schemas.AUDITS, [audited.counts]),
    }
    for table, (schema, rows) in tables.items():
        draft.write_table(f"{table}.parquet", pa.Table.from_pylist([{"sae": name, **row} for row in rows], schema=schema))
    return draft.seal(_summarise(measured, effects, ms, reason))


def _measure(params: InterveneParams, inputs: Mapping[str, Artefact], on_event: Listener) -> tuple[Measured | str, Audited]:
    """Measure what latents do, or return the reason if none can be tested; and audit what the model calls images."""
    if params.answers:
        if params.masks:
            on_event(Warned("intervene.masks is not used: there are no outcomes by patch of a model that is asked for words"))
        return _ask(params, inputs, on_event), leave_unaudited("with intervene.answers the model is asked for words, and not for classes")
    try:
        subject = Subject(inputs, head=params.head)
    except (ModelError, InputError) as error:
        return str(error), leave_unaudited(str(error))
    return measure(params, subject, on_event), audit(params, subject, on_event)


def _ask(params: InterveneParams, inputs: Mapping[str, Artefact], on_event: Listener) -> Measured | str:
    """Ask a model that answers in words; return the reason if no latent can be tested."""
    from ommatid.intervene.answers import measure_answers  # it loads transformers, which takes seconds

    try:
        return measure_answers(params, inputs, on_event)
    except InputError as error:
        return str(error)


def _summarise(measured: Measured, effects: Sequence[dict[str, Any]], ms: Mapping[int, float | None], reason: str) -> EffectsSummary:
    of = Counter(row["status"] for row in effects)
    n_tested = len(effects) - of["untested"]
    return EffectsSummary(
        n_tested=n_tested,
        n_causal=of["causal"],
        n_reads_only=of["reads_only"],
        n_breaks_model=of["breaks_model"],
        n_untested=of["untested"],
        share_causal=of["causal"] / n_tested if n_tested else None,
        random_causal=measured.random_causal,
        zero_dose=measured.zero_dose,
        spearman_ms=_correlate(effects, ms),
        patch_accuracy=measured.patch_accuracy,
        reason=reason,
    )


def _correlate(effects: Iterable[dict[str, Any]], ms: Mapping[int, float | None]) -> float | None:
    """Return the rank correlation of the latents' MS and of their effect beyond the best control; None if it is not defined."""
    pairs = [
        (score, row["effect"] - row["best_control"])
        for row in effects
        if (score := ms.get(row["latent"])) is not None and row.get("effect") is not None and row.get("best_control") is not None
    ]
    if len(pairs) < FEWEST_RANKED:
        return None
    correlation = rank_correlation(*torch.tensor(pairs, dtype=torch.float64).T)
    return None if math.isnan(correlation) else correlation
