"""Stage `evaluate`: what every latent does on the evaluation split, with raw neurons and an untrained SAE beside it.

Two passes over the evaluation tokens, shard by shard, both streamed: the first accumulates, the second gives the intervals and
the heat maps of the examples that were chosen in between.
"""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ommatid import schemas
from ommatid.config import EvaluateParams
from ommatid.errors import ArtefactError
from ommatid.evaluate.examples import Heat, choose_examples
from ommatid.evaluate.firings import Firings
from ommatid.evaluate.judged import iter_failures, make_judged
from ommatid.evaluate.stream import iter_images, load_labels
from ommatid.evaluate.subject import Subject, make_latents, make_subjects
from ommatid.events import Listener, Noticed, ignore
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft


def evaluate(params: EvaluateParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Measure one SAE, an untrained SAE and the raw neurons on the evaluation split.

    Args:
        params: The section `evaluate`.
        inputs: `images`, the activations (`extract`), the SAE (`train`) and, of a transcoder, what it is to decode (`target`).
        draft: Of the SAE's evaluation.
        on_event: Hears of both passes.

    Raises:
        ArtefactError: `target` is not what the SAE was trained to decode, or a judge failed on every evaluation image.
        ConfigError: image_activation is cls, and no class token was extracted.
    """
    activations, images, target = inputs["extract"], inputs["images"], inputs.get("target")
    sae = SAE.load(inputs["train"].path)
    _check_target(sae.config, target)
    name = inputs["train"].summary["sae"]
    subjects = make_subjects(sae, activations, params)
    labels = load_labels(images)
    firings = Firings(draft, name)
    n_images = images.summary["n_eval"]
    for batch in iter_images(activations, target, sae.config.d_sae, n_images, "evaluate images, first pass", on_event):
        for subject in subjects:
            acts = subject.add(batch)
            if subject.name == "sae":
                firings.add(batch.numbers, acts)
    firings.close()
    examples = choose_examples(draft, firings, params)
    heat = Heat(examples)
    for subject in subjects:
        subject.begin_second_pass()
    for batch in iter_images(activations, None, sae.config.d_sae, n_images, "evaluate images, second pass", on_event):
        for subject in subjects:
            acts = subject.add_again(batch)
            if subject.name == "sae" and activations.summary["grid"]:
                heat.add(batch.numbers, acts[:, -math.prod(activations.summary["grid"]) :])
    for subject in subjects:
        subject.end()
    draft.write_table("examples.parquet", heat.table(name, activations.summary["grid"]))
    trained = subjects[0]
    draft.write_table("latents.parquet", make_latents(name, trained, labels, inputs["train"].summary["dead_latents"]))
    draft.write_table("judged.parquet", make_judged(name, [(s.name, verdict) for s in subjects for verdict in s.verdicts]))
    for what in iter_failures(trained.verdicts):
        on_event(Noticed(name, None, what))
    comparisons = [subject.compare(name, labels) for subject in subjects]
    draft.write_table("comparisons.parquet", pa.Table.from_pylist(comparisons, schema=schemas.COMPARISONS))
    return draft.seal(_summarise(params, comparisons, trained, activations))


def _check_target(config: SAEConfig, target: Artefact | None) -> None:
    given = target.summary["hookpoint"] if target else None
    if given != config.target:
        raise ArtefactError(
            f"evaluate: the SAE decodes {config.target or config.hookpoint}, and train.target says {given or config.hookpoint}; "
            "evaluate with the params of its training, or train again"
        )


def _summarise(params: EvaluateParams, comparisons: list[dict[str, Any]], subject: Subject, activations: Artefact) -> dict[str, Any]:
    mine, untrained, neurons, *_ = comparisons
    keys = ("sae", "fvu", "cosine", "l0", "dead", "ms", "ms_low", "ms_high", "ms_best", "ms_left_out", "ms_floor", "purity", "judge")
    return {
        **{key: mine[key] for key in keys},
        "ms_untrained": untrained["ms"],
        "ms_neurons": neurons["ms"],
        "fvu_untrained": untrained["fvu"],
        "n_latents": mine["n_latents"],
        "n_images": subject.verdicts[0].n_images + subject.verdicts[0].failed,
        "judges": [{**verdict.headline, "n_images": verdict.n_images, "failed": verdict.failed} for verdict in subject.verdicts],
        "n_tokens": subject.firing.n_tokens,
        "image_activation": params.image_activation,
        "grid": activations.summary["grid"],
    }
