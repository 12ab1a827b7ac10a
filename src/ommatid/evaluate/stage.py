"""Stage `evaluate`: measure every latent on the evaluation split, and compare the SAE with raw neurons and an untrained SAE.

Two passes stream over the evaluation tokens (passes.py) and write the firings. From these, latents are related to one another, to
labels and to a taxonomy (latent_pairs.py, classes.py). Finally the model itself runs over some of the images (zero_shot.py).
"""

import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ommatid import schemas
from ommatid.config import EvaluateParams
from ommatid.errors import ArtefactError
from ommatid.evaluate.classes import choose_images, measure_meaning, measure_probes
from ommatid.evaluate.latent_pairs import make_densities, measure_structure, write_matches
from ommatid.evaluate.monosemanticity import iter_failures, make_judged
from ommatid.evaluate.passes import EvaluatedDictionary, Passes, make_latents
from ommatid.evaluate.zero_shot import ZeroShot, measure_zero_shot
from ommatid.events import Listener, Warned, ignore
from ommatid.images.eval_split import iter_latent_firings, load_eval_split
from ommatid.images.labels import load_classes, load_paths
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.store.per_sae import for_each_sae
from ommatid.summaries import EvaluationSummary, VerdictSummary


def run(params: EvaluateParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Evaluate every SAE of a training, and match each with every other; see `evaluate` and `write_matches`.

    Returns:
        The artefact, with one evaluation for each SAE inside.
    """
    return for_each_sae(
        functools.partial(evaluate, params),
        inputs,
        draft,
        on_event,
        lambda made: write_matches(inputs["train"].each(), made, draft, on_event),
    )


def evaluate(params: EvaluateParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Measure one SAE, an untrained SAE and the raw neurons on the evaluation split.

    Args:
        params: The section `evaluate`.
        inputs: `images`, the activations (`extract`), the SAE (`train`) and, for a transcoder, the activations to decode (`target`).
        draft: Draft of this SAE's evaluation.
        on_event: Called with each progress event and warning.

    Returns:
        The sealed artefact.

    Raises:
        ArtefactError: `target` is not what the SAE was trained to decode, or a judge failed on every evaluation image.
        ConfigError: `image_activation` is `cls`, but no class token was extracted.
    """
    activations, images = inputs["extract"], inputs["images"]
    sae = SAE.load(inputs["train"].path)
    _check_target(sae.config, inputs.get("target"))
    name, labels, split = inputs["train"].summary["sae"], load_classes(images), load_eval_split(images)
    probed = choose_images(split, labels)
    passes = Passes(params, inputs, sae, probed, draft, on_event)
    passes.run()
    trained, dictionaries, files = passes.dictionaries[0], passes.dictionaries, passes.firings.files()
    for failure in iter_failures(trained.verdicts):
        on_event(Warned(f"{name}: {failure}"))
    firings = iter_latent_firings(files, split, str(draft.scratch))
    meaning = measure_meaning(firings, split, labels, load_paths(images), sae.n_latents)
    structure = measure_structure(name, files, sae.W_dec, trained.verdicts[0].n_shown)
    assert trained.fidelity and trained.levels and trained.near_misses, trained.name
    comparisons = [dictionary.compare(name, labels) for dictionary in dictionaries]
    fidelity = [row for dictionary in dictionaries for row in dictionary.fidelity_rows(name)]
    decoders = {dictionary.name: dictionary.dictionary for dictionary in dictionaries if dictionary.fidelity}
    zero_shot = measure_zero_shot(name, decoders, inputs, on_event)
    tables = {
        "examples": passes.heat.table(name),
        "near_misses": trained.near_misses.table(name, trained.firing.is_dead),
        "latents": make_latents(name, trained, labels, inputs["train"].summary["dead_latents"], meaning, structure),
        "judged": make_judged(name, [(dictionary.name, verdict) for dictionary in dictionaries for verdict in dictionary.verdicts]),
        "comparisons": pa.Table.from_pylist(comparisons, schema=schemas.COMPARISONS),
        "fidelity": pa.Table.from_pylist(fidelity, schema=schemas.FIDELITY),
        "densities": make_densities(name, {dictionary.name: dictionary.firing for dictionary in dictionaries}),
        "cofiring": structure.cofiring,
        "levels": trained.levels.table(name, trained.fidelity.whole, trained.verdicts[0].ms, meaning.lca_depth),
        "probes": measure_probes(name, probed, passes.pooled, files, sae.n_latents),
        "zero_shot": zero_shot.table(),
    }
    for table, rows in tables.items():
        draft.write_table(f"{table}.parquet", rows)
    sealed = draft.seal(_summarise(params, comparisons, trained, activations, zero_shot))
    passes.remove_checkpoint()
    return sealed


def _check_target(config: SAEConfig, target: Artefact | None) -> None:
    found = target.summary["hookpoint"] if target else None
    if found != config.target:
        raise ArtefactError(
            f"evaluate: the SAE was trained to decode {config.target or config.hookpoint}, but train.target says "
            f"{found or config.hookpoint}; evaluate with the params of its training, or train again"
        )


def _summarise(
    params: EvaluateParams,
    comparisons: list[dict[str, Any]],
    dictionary: EvaluatedDictionary,
    activations: Artefact,
    zero_shot: ZeroShot,
) -> EvaluationSummary:
    trained, untrained, neurons, *_ = comparisons
    keys = ("sae", "fvu", "cosine", "l0", "dead", "ms", "ms_low", "ms_high", "ms_best", "ms_left_out", "ms_floor", "purity")
    keys += ("coverage", "uniqueness", "judge")
    verdicts = [VerdictSummary(**verdict.headline, n_images=verdict.n_images, failed=verdict.failed) for verdict in dictionary.verdicts]
    return EvaluationSummary(
        **{key: trained[key] for key in keys},
        ms_untrained=untrained["ms"],
        ms_neurons=neurons["ms"],
        fvu_untrained=untrained["fvu"],
        n_latents=trained["n_latents"],
        n_images=dictionary.verdicts[0].n_shown,
        judges=verdicts,
        n_tokens=dictionary.firing.n_tokens,
        image_activation=params.image_activation,
        grid=activations.summary["grid"],
        **zero_shot.summary(),
    )
