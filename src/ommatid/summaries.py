"""The summary of every kind of artefact: the numbers in its manifest, which gates, later stages, MLflow and pages read.

One class declares the keys of one kind, each with its meaning; docs/developers/artefacts.md is written from them. A value of None means
that the number is not known or does not exist.
"""

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict


class ImagesSummary(TypedDict):
    """The data set of the stage `images`."""

    n_seen: Annotated[int, "items of the source that were examined"]
    n_images: Annotated[int, "images kept"]
    n_train: Annotated[int, "images of the training split"]
    n_eval: Annotated[int, "images of the evaluation split"]
    n_duplicates: Annotated[int, "items left out because their pixels equal those of an earlier one"]
    n_rejected: Annotated[int, "items that could not be used; the table `rejected` has the reasons"]
    rejected_share: Annotated[float, "`n_rejected` as a share of `n_seen`"]
    labels: Annotated[dict[str, int], "images of each label"]
    n_nearly_black: NotRequired[Annotated[int, "images that are nearly black"]]
    n_nearly_white: NotRequired[Annotated[int, "images that are nearly white"]]
    n_of_several_frames: NotRequired[Annotated[int, "images from files with several frames or pages, of which the first is used"]]


class ExtractionSummary(TypedDict):
    """All activations of the stage `extract`."""

    source: NotRequired[Annotated[str, "`files` if the activations were imported; absent if they were extracted from images"]]
    hookpoints: Annotated[list[str], "hookpoints whose activations are inside"]
    n_shards: Annotated[int, "shards, each of which is one part of every table"]
    n_images: Annotated[int, "images of both splits"]


class JudgeSummary(TypedDict):
    """The embeddings of one judge."""

    judge: Annotated[str, "name of the judge"]
    d_judge: Annotated[int, "width of its embeddings"]
    failed: Annotated[int, "images for which it gave no finite embedding"]


class ActivationsSummary(TypedDict):
    """The activations of one hookpoint."""

    source: NotRequired[Annotated[str, "`files` if the activations were imported; absent if they were extracted from images"]]
    model: Annotated[str, "name of the explained model"]
    hookpoint: Annotated[str, "where in the model the activations were captured"]
    d_model: Annotated[int, "width of an activation vector"]
    tokens_per_image: Annotated[int | None, "tokens extracted from each image; null if imported files do not say"]
    grid: Annotated[list[int] | tuple[int, int] | None, "rows and columns of patches; null if the tokens do not form a grid"]
    n_images: Annotated[int, "images of both splits"]
    n_train_tokens: Annotated[int, "rows of the table `train`"]
    n_eval_tokens: Annotated[int, "rows of the table `eval`"]
    window: Annotated[int, "consecutive training rows that come from different images, in every shard"]
    rounding: Annotated[float | None, "rounding error of the activations relative to float32, measured on a few images"]
    preprocessing: Annotated[dict[str, Any], "how pixels become the model's input: resize, crop, interpolation, channels, mean, std"]
    namer: Annotated[str | None, "model whose joint image-text space is used to label latents"]
    d_joint: Annotated[int | None, "width of the namer's joint embeddings"]
    judge: Annotated[str | None, "name of the main judge"]
    d_judge: Annotated[int | None, "width of the main judge's embeddings"]
    judges: Annotated[list[JudgeSummary] | None, "every judge, the main one first: its name, its width and how many images it failed on"]


class TrainedSAESummary(TypedDict):
    """One SAE in the summary of a training."""

    sae: Annotated[str, "name in the catalogue: the folder's name and the first digits of the weights' checksum"]
    n_steps: Annotated[int, "training steps; 0 if imported"]
    n_tokens: Annotated[int, "tokens trained on, counted again in every epoch"]
    fvu: Annotated[float, "fraction of variance unexplained at the last measurement in training; of an imported SAE, on training tokens"]
    l0: Annotated[float, "mean number of latents that fire per token, at the same measurement"]
    dead: Annotated[float, "share of latents that have not fired for `dead_after` tokens"]


class SAESummary(TrainedSAESummary):
    """One SAE of the stage `train`."""

    dead_latents: Annotated[list[int], "latents that have not fired for `dead_after` tokens"]
    dead_after: Annotated[int, "tokens without firing after which a latent counts as dead"]
    histograms: Annotated[dict[str, Any], "edges and counts over latents: `log10_density`, `encoder_norm` and `encoder_bias`"]
    threshold: Annotated[float, "mean of the firing thresholds; 0 if there are none"]
    scale: Annotated[float, "factor by which activations were multiplied in training; it is folded into the weights"]


class PerSAESummary(TypedDict):
    """The keys that all artefacts share that hold one artefact for each SAE."""

    saes: Annotated[list[str], "folders of the SAEs that passed the gate"]
    rejected: NotRequired[Annotated[dict[str, str], "folders of SAEs that failed the gate while others passed, with the reason"]]


class TrainingSummary(PerSAESummary):
    """All SAEs of the stage `train`."""

    of: Annotated[dict[str, TrainedSAESummary], "for each of them: `sae`, `n_steps`, `n_tokens`, `fvu`, `l0` and `dead`"]


class MonosemanticitySummary(TypedDict):
    """MonoSemanticity of one dictionary by one judge; in the evaluation of an SAE, by the main judge."""

    judge: Annotated[str, "name of the judge"]
    ms: Annotated[float | None, "mean MonoSemanticity score of the latents that have one"]
    ms_low: Annotated[float | None, "lower end of the 95 % interval of `ms`"]
    ms_high: Annotated[float | None, "upper end of the 95 % interval of `ms`"]
    ms_best: Annotated[float | None, "highest MonoSemanticity score of a latent"]
    ms_floor: Annotated[float | None, "mean pairwise cosine of the judge's embeddings of the same images"]
    ms_left_out: Annotated[int, "latents without a MonoSemanticity score"]


class VerdictSummary(MonosemanticitySummary):
    """The verdict of one judge on one dictionary."""

    n_images: Annotated[int, "evaluation images that the judge embedded"]
    failed: Annotated[int, "evaluation images for which it gave no finite embedding"]


class EvaluationSummary(MonosemanticitySummary):
    """The evaluation of one SAE; numbers are of the evaluation split."""

    sae: Annotated[str, "name of the SAE in the catalogue"]
    fvu: Annotated[float | None, "fraction of variance unexplained"]
    cosine: Annotated[float | None, "mean cosine of reconstruction and target"]
    l0: Annotated[float | None, "mean number of latents that fire per token"]
    dead: Annotated[float, "share of latents that never fire"]
    ms_untrained: Annotated[float | None, "`ms` of an untrained SAE of the same size"]
    ms_neurons: Annotated[float | None, "`ms` of the raw neurons"]
    fvu_untrained: Annotated[float | None, "`fvu` of the untrained SAE"]
    purity: Annotated[float | None, "mean purity of the 16 strongest images of a latent"]
    coverage: Annotated[float | None, "share of the classes that are the most common one of some latent with a purity of at least 0.75"]
    uniqueness: Annotated[float | None, "mean uniqueness of the latents"]
    judges: Annotated[list[VerdictSummary], "verdict of every judge, the main one first"]
    n_latents: Annotated[int, "latents of the SAE"]
    n_images: Annotated[int, "images of the evaluation split"]
    n_tokens: Annotated[int, "tokens of the evaluation split"]
    image_activation: Annotated[str, "how the activations of an image's tokens become one: `max`, `mean` or `cls`"]
    grid: Annotated[list[int] | tuple[int, int] | None, "rows and columns of patches; null if the tokens do not form a grid"]
    zero_shot: Annotated[str, "`ok`, or why the model could not classify images with the SAE spliced in"]
    zero_shot_accuracy: Annotated[float | None, "zero-shot accuracy of the plain model"]
    zero_shot_accuracy_sae: Annotated[float | None, "zero-shot accuracy with the SAE's reconstruction in place of the activations"]
    zero_shot_recovered: Annotated[float | None, "share of the cross-entropy lost to mean activations that the SAE recovers"]
    zero_shot_recovered_untrained: Annotated[float | None, "the same for the untrained SAE"]


class EvaluationsSummary(PerSAESummary):
    """All evaluations of the stage `evaluate`."""

    of: Annotated[dict[str, dict[str, float]], "for each of them: the numbers of its summary"]


class LabelsSummary(TypedDict):
    """The labels of one SAE, counting one label of each latent, the one that `features` shows.

    With several labellers, each also has keys of its own: those from `n_labelled` to `beats_random`, followed by `_` and its name.
    """

    labellers: Annotated[list[str], "names of the labellers, in the order of the params"]
    n_latents: Annotated[int, "latents of the SAE"]
    n_words: Annotated[int, "words of all vocabularies"]
    n_naming_images: Annotated[int, "evaluation images that labels are made from"]
    n_held_out_images: Annotated[int, "evaluation images that labels are scored on"]
    n_images_in_both: Annotated[int, "images that were used for both, which must be 0"]
    n_labelled: Annotated[int, "latents with a label"]
    n_scored: Annotated[int, "latents whose label has a score"]
    score: Annotated[float | None, "mean score: balanced accuracy of the label at detecting which held-out images the latent fires on"]
    auroc: Annotated[float | None, "mean area under the ROC curve of the same task"]
    control_score: Annotated[float | None, "mean score of another latent's label"]
    random_score: Annotated[float | None, "mean score of a random word"]
    correlation: Annotated[float | None, "mean rank correlation of activation and cosine to the label"]
    control_correlation: Annotated[float | None, "the same for another latent's label"]
    detector_score: Annotated[float | None, "mean score by labellers that look at the images themselves"]
    precision: Annotated[float | None, "mean share of firing images among the held-out images on which the label predicts firing"]
    precision_chance: Annotated[float | None, "mean precision of a label that knows nothing"]
    recall: Annotated[float | None, "mean share of held-out firing images on which the label predicts firing"]
    recall_chance: Annotated[float | None, "mean recall of a label that predicts as often but knows nothing"]
    beats_control: Annotated[float | None, "share of labels that score higher than another latent's label"]
    beats_random: Annotated[float | None, "share of labels that score higher than a random word"]
    n_requests: Annotated[int, "requests sent to models"]
    n_tokens: Annotated[int, "tokens of these requests and their answers"]


class LabellingsSummary(PerSAESummary):
    """All labels of the stage `label`."""

    of: Annotated[dict[str, dict[str, float]], "for each of them: the numbers of its summary"]


class EffectsSummary(TypedDict):
    """The interventions on one SAE."""

    n_tested: Annotated[int, "latents that were set to chosen activations"]
    n_causal: Annotated[int, "latents with the status causal"]
    n_reads_only: Annotated[int, "latents with the status reads_only"]
    n_breaks_model: Annotated[int, "latents with the status breaks_model"]
    n_untested: Annotated[int, "latents that were not tested; `effects.reason` says why"]
    share_causal: Annotated[float | None, "`n_causal` as a share of `n_tested`; null if none was tested"]
    random_causal: Annotated[float | None, "share of random latents, one matched to each tested latent, that the same rule calls causal"]
    zero_dose: Annotated[float | None, "largest change of an output by an edit that moves nothing, which must be 0; null if none was made"]
    spearman_ms: Annotated[float | None, "rank correlation over tested latents of `ms` and of `effect` less `best_control`"]
    patch_accuracy: Annotated[
        float | None, "balanced accuracy, in held-out images, of the head that reads the classes of masks from patches; null without one"
    ]
    reason: Annotated[str, "`ok`, or why no latent could be tested"]


class InterventionsSummary(PerSAESummary):
    """All interventions of the stage `intervene`."""

    of: Annotated[dict[str, dict[str, float]], "for each of them: the numbers of its summary"]


class CatalogSummary(TypedDict):
    """The catalogue of the stage `catalog`."""

    saes: Annotated[list[str], "folders of the SAEs in it"]
    rows: Annotated[dict[str, int], "rows of each relation"]


class DriftReferenceSummary(TypedDict):
    """What new images are compared with: the reference of a champion."""

    made_with: Annotated[dict[str, Any], "what an extraction must share with the champion's for its numbers to be comparable"]
    image_activation: Annotated[str, "how the activations of an image's tokens become one: `max`, `mean` or `cls`"]
    n_images: Annotated[int, "images of the champion's data set"]
    n_embedded: Annotated[int, "training images whose embeddings are kept"]
    n_encoded: Annotated[int, "evaluation images on which the SAE is measured"]


class DriftSummary(TypedDict):
    """A check of new images for drift; numbers are null unless they are above chance, as the thresholds of params.yaml count only then."""

    verdict: Annotated[str, "`none`, `slight`, `drift`, `too_few` or `not_comparable`"]
    n_new: Annotated[int, "new images"]
    auroc: Annotated[float | None, "AUROC with which a classifier tells new images from the champion's"]
    fvu_rise: Annotated[float | None, "FVU on the new images less that on the champion's evaluation images"]
    changed: Annotated[float | None, "share of the latents that fire on more or fewer images, or more or less strongly"]


SUMMARIES: Mapping[str, type[Any]] = {
    "images": ImagesSummary,
    "extraction": ExtractionSummary,
    "activations": ActivationsSummary,
    "training": TrainingSummary,
    "sae": SAESummary,
    "evaluations": EvaluationsSummary,
    "evaluation": EvaluationSummary,
    "labellings": LabellingsSummary,
    "labels": LabelsSummary,
    "interventions": InterventionsSummary,
    "effects": EffectsSummary,
    "catalog": CatalogSummary,
    "drift_reference": DriftReferenceSummary,
    "drift": DriftSummary,
}
"""The summary of each kind of artefact."""


def check_keys(kind: str, summary: Mapping[str, Any]) -> None:
    """Assert that a summary has the keys that its class declares, and no others."""
    declared = SUMMARIES[kind]
    # the numbers of single labellers have keys such as n_scored_vocabulary
    unknown = [
        key
        for key in summary
        if key not in declared.__required_keys__ | declared.__optional_keys__ and not (kind == "labels" and key.startswith(_OF_LABELLERS))
    ]
    missing = declared.__required_keys__ - summary.keys()
    assert not unknown and not missing, f"summary of {kind}: {unknown} not declared in {declared.__name__}, {sorted(missing)} missing"


_OF_LABELLERS = tuple(f"{key}_" for key in LabelsSummary.__annotations__)
