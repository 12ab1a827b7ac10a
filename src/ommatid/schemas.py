"""The Arrow schema of every Parquet table in every artefact. `docs/developers/artefacts.md` is generated from these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 4
"""Version of the tables and the manifest, incremented when older code would misread a change."""


Place = Literal[
    "images",
    "activations",
    "sae/<sae>",
    "evaluation",
    "evaluation/<sae>",
    "labels/<sae>",
    "interventions/<sae>",
    "catalog",
    "published/champions/<champion>/drift",
    "published/drift/<check>",
]
"""Artefact that holds a table, by its folder in data; `<sae>` is the folder of each SAE. Tables of `catalog` are only in the catalogue, and
those of a check of drift are relations of the published catalogue alone."""


@dataclass(frozen=True)
class Table:
    """A Parquet table of an artefact, which is also a relation of the catalogue if catalog/sql has a file of its name."""

    place: Place
    """Artefact that holds the table."""
    schema: pa.Schema
    """Columns of the table, each with its meaning."""
    may_be_empty: bool
    """Whether the table may have no rows; the catalogue's gate requires rows in every other relation."""


TABLES: dict[str, Table] = {}
"""Every table whose schema does not depend on the model, by name. The catalogue builds its relations in this order."""

DERIVED: Mapping[str, tuple[str, ...]] = {"features": ("latents", "comparisons", "labels", "effects"), "runs": ("comparisons", "zero_shot")}
"""Relations that are computed from tables, some of which are no relations themselves, in the order in which they are built once all tables
are there. A column that their SQL does not comment on has the meaning that the first of these tables with such a column gives it."""


@dataclass(frozen=True)
class _Nullable:
    type: pa.DataType


def nullable(type_: pa.DataType) -> _Nullable:
    """Return the type of a column that may hold nulls; the meaning of the column says when."""
    return _Nullable(type_)


def _schema(**columns: tuple[pa.DataType | _Nullable, str]) -> pa.Schema:
    """Return the schema of columns given as name=(type, meaning)."""
    return pa.schema([_field(name, type_, meaning) for name, (type_, meaning) in columns.items()])


def _field(name: str, type_: pa.DataType | _Nullable, meaning: str) -> pa.Field:
    is_nullable = isinstance(type_, _Nullable)
    return pa.field(name, type_.type if is_nullable else type_, nullable=is_nullable, metadata={"meaning": meaning})


def _table(name: str, place: Place, /, *, may_be_empty: bool = False, **columns: tuple[pa.DataType | _Nullable, str]) -> pa.Schema:
    """Declare a table in `TABLES`, its columns given as name=(type, meaning).

    Returns:
        The schema of the table.
    """
    schema = _schema(**columns)
    TABLES[name] = Table(place, schema, may_be_empty)
    return schema


IMAGES = _table(
    "images",
    "images",
    image=(pa.int32(), "number of the image: its row in the data set, and its key in other tables"),
    image_id=(pa.string(), "sha256 of the image file"),
    path=(pa.string(), "path relative to the source"),
    split=(pa.string(), "train or eval, decided by a hash of image_id"),
    width=(pa.int32(), "width of the upright image in pixels"),
    height=(pa.int32(), "height of the upright image in pixels"),
    label=(nullable(pa.string()), "class of the image in the source; null if it has none"),
    captions=(pa.list_(pa.field("element", pa.string())), "captions in the source, of which there may be several or none"),
    taxonomy=(nullable(pa.string()), "path of classes in the source, from the root and separated by /; null if it has none"),
    thumbnail=(pa.binary(), "thumbnail of the upright image, WebP"),
    encoded=(
        pa.binary(),
        "content of the image file, unchanged; with images.by_reference, a record in JSON instead: place (folder or URL), name, size, "
        "offset in the file (null for a whole file) and sha256",
    ),
)

REJECTED = _table(
    "rejected",
    "images",
    path=(pa.string(), "path relative to the source"),
    reason=(pa.string(), "empty, truncated, not_an_image, too_large, unreadable or duplicate"),
    detail=(pa.string(), "message of the decoder, or path of the image that it duplicates"),
)


PLAN = _table(
    "plan",
    "activations",
    shard=(pa.int32(), "shard of the activations that holds these images"),
    file=(pa.int32(), "index of the file in the images artefact"),
    row_group=(pa.int32(), "index of the row group in that file"),
    n_images=(pa.int32(), "number of images in the row group"),
)


def activations(d_model: int, metadata: dict[str, str]) -> pa.Schema:
    """Return the schema of tables of activations, with one row per token.

    Args:
        d_model: Width of an activation; `x` holds as many little-endian float16 values.
        metadata: Model and hookpoint, which the schema's metadata names beside width and dtype.

    Returns:
        The schema.
    """
    schema = _schema(
        image=(pa.int32(), "images.image"),
        token=(pa.int32(), "position of the token in the model's sequence; 0 for pooled"),
        kind=(pa.string(), "kind of token: cls, distillation, register, patch, pooled or imported"),
        row=(pa.int16(), "row of a patch in the grid; -1 for other tokens"),
        col=(pa.int16(), "column of a patch in the grid; -1 for other tokens"),
        x=(pa.binary(2 * d_model), "activation, little-endian float16"),
    )
    return schema.with_metadata({**metadata, "d_model": str(d_model), "dtype": "float16"})


def judge_columns(n: int) -> list[str]:
    """Return the columns of `embeddings` that hold the judges' vectors, in the order of extract.judge: judge, judge_1, judge_2 ..."""
    return ["judge", *(f"judge_{i}" for i in range(1, n))]


def embeddings(d_joint: int, *d_judges: int) -> pa.Schema:
    """Return the schema of tables of embeddings, with one row per image, in the order of the images.

    Vectors are little-endian float32 of unit norm.

    Args:
        d_joint: Width of the joint image-text space.
        d_judges: Width of each judge's embeddings, the main judge first.

    Returns:
        The schema.
    """
    widths = dict(zip(judge_columns(len(d_judges)), d_judges, strict=True))
    meaning = "embedding, little-endian float32; all NaN if it failed on this image"
    schema = _schema(
        image=(pa.int32(), "images.image"),
        joint=(pa.binary(4 * d_joint), "embedding in the joint image-text space, little-endian float32"),
        **{
            name: (pa.binary(4 * width), f"the judge's {meaning}" if name == "judge" else f"another judge's {meaning}")
            for name, width in widths.items()
        },
    )
    return schema.with_metadata({"d_joint": str(d_joint), **{f"d_{name}": str(width) for name, width in widths.items()}})


CURVES = _table(
    "curves",
    "sae/<sae>",
    step=(pa.int64(), "number of optimiser steps done"),
    tokens=(pa.int64(), "number of tokens seen"),
    loss=(nullable(pa.float64()), "reconstruction loss plus penalties, on scaled activations; null if the SAE was imported"),
    fvu=(pa.float64(), "fraction of variance unexplained, over the batches since the last row"),
    l0=(pa.float64(), "mean number of latents that fire per token"),
    dead=(pa.float64(), "share of latents that have not fired in the last dead_after tokens"),
    lr=(nullable(pa.float64()), "learning rate; null if the SAE was imported"),
)

LATENTS = _table(
    "latents",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    density=(pa.float64(), "share of evaluation tokens on which it fires"),
    mean_act=(nullable(pa.float64()), "mean activation over the tokens on which it fires; null if it never fires"),
    max_act=(pa.float64(), "largest activation; 0 if it never fires"),
    n_images=(pa.int32(), "number of evaluation images on which it fires"),
    is_dead=(pa.bool_(), "whether it never fires on the evaluation split"),
    dead_in_training=(pa.bool_(), "whether it had not fired in the last dead_after tokens when training ended"),
    ms=(
        nullable(pa.float64()),
        "MonoSemanticity score (Pach et al. 2025) by the judge; null if its activation is constant or it fires on fewer than two images",
    ),
    ms_low=(nullable(pa.float64()), "lower end of the 95 % interval of ms over images; null if ms is"),
    ms_high=(nullable(pa.float64()), "upper end of the 95 % interval of ms over images; null if ms is"),
    purity=(
        nullable(pa.float64()),
        "share of the most common class among its 16 strongest images; null if one of them has no label, it fires on fewer, or the data "
        "set has fewer than two classes",
    ),
    purity_64=(nullable(pa.float64()), "the same for its 64 strongest images; null in the same cases"),
    top_classes=(pa.list_(pa.string()), "up to three classes of its 16 strongest images, the most common first"),
    label_entropy=(
        nullable(pa.float64()),
        "entropy in bits of the classes of the images on which it fires, weighted by activation; 0 for a single class; null if it fires "
        "on no labelled image, or the data set has fewer than two classes",
    ),
    lca_depth=(
        nullable(pa.int32()),
        "depth in the taxonomy of the lowest common ancestor of its 16 strongest images that have a path, 0 for the root; null if fewer "
        "than 16 of its 64 strongest have one",
    ),
    uniqueness=(
        nullable(pa.float64()),
        "1 - largest Jaccard index of its 16 strongest images with those of another latent, so 1 if it shares none; null if it fires on "
        "fewer than 16",
    ),
    is_dense=(pa.bool_(), "whether it fires on more than a tenth of the tokens"),
    is_rare=(pa.bool_(), "whether it fires, but on fewer than 16 images"),
    duplicate_of=(
        nullable(pa.int32()),
        "latent with the nearest direction among those with a cosine of at least 0.9 and a Jaccard index of the images on which they fire "
        "of at least 0.5; null if there is none",
    ),
)

EXAMPLES = _table(
    "examples",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    decile=(pa.int8(), "decile of the image's activation among the images on which the latent fires; 10 is the strongest"),
    rank=(
        pa.int32(),
        "rank among the decile's examples; 1 is the strongest. ORDER BY decile DESC, rank begins with the 16 strongest images",
    ),
    image=(pa.int32(), "images.image"),
    act=(pa.float32(), "image-level activation"),
    heat=(nullable(pa.list_(pa.float32())), "activation of each patch, row by row; null if tokens have no place in the image"),
    rows=(pa.int16(), "number of rows of heat; 0 if it is null"),
    cols=(pa.int16(), "number of columns of heat; 0 if it is null"),
)

N_NEAR_MISSES = 8
"""Maximum number of near misses of a latent."""

NEAR_MISSES = _table(
    "near_misses",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent, which is not dead"),
    rank=(pa.int32(), f"rank among the evaluation images on which it does not fire, 1 to {N_NEAR_MISSES}; 1 comes nearest to firing"),
    image=(pa.int32(), "images.image"),
    margin=(
        pa.float32(),
        "how far it is from firing, at most 0: the largest, over the tokens that count for image-level activations, of its pre-activation "
        "minus what that must exceed, which is its threshold, or in a TopK SAE the smallest activation that fires on the token",
    ),
    closeness=(
        nullable(pa.float64()),
        "the same largest pre-activation as a share of its threshold, such as 0.93; null if its threshold is 0 (ReLU, TopK)",
    ),
)

FIRINGS = _table(
    "firings",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    image=(pa.int32(), "images.image"),
    latent=(pa.int32(), "index of the latent"),
    act=(pa.float32(), "image-level activation, > 0"),
)

COMPARISONS = _table(
    "comparisons",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(
        pa.string(),
        "dictionary compared: sae, untrained (same shape, random directions), neurons (the raw activations), sparse_neurons (neurons made "
        "to fire rarely), pca, kmeans or nmf",
    ),
    n_latents=(pa.int32(), "number of latents of the dictionary"),
    fvu=(nullable(pa.float64()), "fraction of variance unexplained; null if the dictionary does not reconstruct"),
    cosine=(nullable(pa.float64()), "mean cosine of activation and reconstruction; null if the dictionary does not reconstruct"),
    l0=(pa.float64(), "mean number of latents that fire per token"),
    dead=(pa.float64(), "share of latents that never fire on the evaluation split"),
    ms=(nullable(pa.float64()), "mean MonoSemanticity score of the latents; null if no latent has one"),
    ms_low=(nullable(pa.float64()), "lower end of the 95 % interval of ms over images; null if ms is"),
    ms_high=(nullable(pa.float64()), "upper end of the 95 % interval of ms over images; null if ms is"),
    ms_best=(nullable(pa.float64()), "highest MonoSemanticity score of a latent; null if no latent has one"),
    ms_left_out=(pa.int32(), "number of latents without a MonoSemanticity score"),
    ms_floor=(
        nullable(pa.float64()),
        "mean pairwise cosine of the judge's embeddings of the same images; null if there are fewer than two",
    ),
    purity=(
        nullable(pa.float64()),
        "mean purity of the 16 strongest images; null if the data set has fewer than two classes",
    ),
    coverage=(
        nullable(pa.float64()),
        "share of the classes that are the most common class of some latent whose purity is at least 0.75; null if the data set has "
        "fewer than two classes",
    ),
    uniqueness=(nullable(pa.float64()), "mean uniqueness of the latents; null if no latent has one"),
    judge=(pa.string(), "name of the judge whose embeddings ms uses"),
)

JUDGED = _table(
    "judged",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "comparisons.dictionary"),
    latent=(pa.int32(), "index of the latent in the dictionary"),
    judge=(pa.string(), "name of the judge whose embeddings ms uses"),
    ms=(
        nullable(pa.float64()),
        "MonoSemanticity score by this judge; null if the activation is constant, or the latent fires on fewer than two of the images "
        "that the judge embedded",
    ),
    ms_low=(nullable(pa.float64()), "lower end of the 95 % interval of ms over images; null if ms is"),
    ms_high=(nullable(pa.float64()), "upper end of the 95 % interval of ms over images; null if ms is"),
    floor=(nullable(pa.float64()), "mean pairwise cosine of this judge's embeddings of the same images; null if there are fewer than two"),
)

FIDELITY = _table(
    "fidelity",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "comparisons.dictionary, for dictionaries that reconstruct"),
    kind=(pa.string(), "kind of token: cls, distillation, register, patch or pooled; all for every token"),
    n_tokens=(pa.int64(), "number of evaluation tokens of this kind"),
    fvu=(
        nullable(pa.float64()),
        "fraction of variance unexplained, relative to the mean of this kind; null if the activations do not vary",
    ),
    cosine=(pa.float64(), "mean cosine of activation and reconstruction"),
    l0=(pa.float64(), "mean number of latents that fire per token"),
)

DENSITIES = _table(
    "densities",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "comparisons.dictionary"),
    low=(pa.float64(), "lower bound of the bin of densities; 0 for latents that never fire"),
    high=(pa.float64(), "upper bound of the bin, exclusive; of the last bin it is 1, inclusive"),
    n_latents=(pa.int32(), "number of latents in the bin"),
)

COFIRING = _table(
    "cofiring",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    rank=(pa.int32(), "rank of the other latent; 1 has the highest lift"),
    other=(pa.int32(), "index of the other latent"),
    lift=(pa.float64(), "number of images on which both fire, divided by that expected if they were independent, > 1"),
    jaccard=(pa.float64(), "number of images on which both fire, as a share of those on which either fires"),
    n_both=(pa.int32(), "number of images on which both fire, at least 8"),
)

LEVELS = _table(
    "levels",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    level=(pa.int32(), "level of the dictionary; 1 is the smallest prefix, and the only level of an SAE that is not Matryoshka"),
    first=(pa.int32(), "index of the first latent that this level adds"),
    last=(pa.int32(), "index of the last latent that this level adds"),
    fvu=(
        nullable(pa.float64()),
        "fraction of variance unexplained when latents up to `last` reconstruct; null if the activations do not vary",
    ),
    ms=(nullable(pa.float64()), "mean MonoSemanticity score of the latents that this level adds; null if none has one"),
    n_ms=(pa.int32(), "number of latents that this level adds and that have a MonoSemanticity score"),
    lca_depth=(nullable(pa.float64()), "mean lca_depth of the latents that this level adds; null if none has one"),
    n_lca=(pa.int32(), "number of latents that this level adds and that have an lca_depth"),
)

PROBES = _table(
    "probes",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    **{"class": (pa.string(), "class to predict: a value of images.label, among the 64 most common")},
    probe=(pa.string(), "latents for a logistic regression on k latents; x for one on activations averaged over the image's tokens"),
    k=(pa.int32(), "number of inputs of the probe: latents, or the width of x"),
    accuracy=(pa.float64(), "balanced accuracy on the held-out half of the evaluation images"),
    auroc=(pa.float64(), "area under the ROC curve on the same images"),
    auroc_low=(pa.float64(), "lower end of the 95 % interval of auroc"),
    auroc_high=(pa.float64(), "upper end of the 95 % interval of auroc"),
    n_positive=(pa.int32(), "number of held-out images of the class"),
    latents=(
        nullable(pa.list_(pa.int32())),
        "latents that the probe uses, by decreasing difference between the class and the rest; null for a probe on x",
    ),
)

ZERO_SHOT = _table(
    "zero_shot",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    spliced=(
        pa.string(),
        "what replaces x in the forward pass: plain (x itself), sae (x̂), sae_with_error (x̂ + (x − x̂), which equals plain unless splicing "
        "itself changes something), mean (the mean training token), or the x̂ of untrained, sparse_neurons, pca, kmeans or nmf",
    ),
    n_images=(pa.int32(), "number of evaluation images classified"),
    n_classes=(pa.int32(), "number of classes, which are the labels of the evaluation split as text; chance is 1 / n_classes"),
    n_replaced=(pa.int32(), "number of tokens per image that are replaced: those that extract.tokens keeps"),
    n_tokens=(pa.int32(), "number of tokens per image at the hookpoint, replaced or not"),
    logit_scale=(pa.float64(), "factor of the cosines before the softmax: the model's own, or fitted on plain training images"),
    accuracy=(pa.float64(), "share of images whose own class has the largest cosine"),
    accuracy_low=(pa.float64(), "lower end of the 95 % interval of accuracy (Wilson)"),
    accuracy_high=(pa.float64(), "upper end of the 95 % interval of accuracy (Wilson)"),
    cross_entropy=(pa.float64(), "mean of −log of the probability of the image's own class, in nats"),
    downstream_loss=(
        pa.float64(),
        "cross_entropy less that of plain, in nats: the downstream loss of Gao et al. 2024. Negative if the model classifies better",
    ),
    downstream_loss_low=(nullable(pa.float64()), "lower end of its 95 % interval over paired images; null for a single image"),
    downstream_loss_high=(nullable(pa.float64()), "upper end of the same"),
    downstream_kl=(
        pa.float64(),
        "mean divergence KL(plain ‖ spliced) of the probabilities of the classes, in nats: 0 only if the output stays the same, even where "
        "the loss does not rise",
    ),
    recovered=(
        nullable(pa.float64()),
        "(cross-entropy of mean − this one) / (cross-entropy of mean − that of plain), so 1 for plain and 0 for mean; null if replacing "
        "tokens by the mean hurts no more than chance would",
    ),
    recovered_low=(nullable(pa.float64()), "lower end of the 95 % interval of recovered, over the same images; null if recovered is"),
    recovered_high=(nullable(pa.float64()), "upper end of the 95 % interval of recovered, over the same images; null if recovered is"),
)

MATCHES = _table(
    "matches",
    "evaluation",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    other_sae=(pa.string(), "name of another SAE of the same activations"),
    other_latent=(pa.int32(), "index of the other SAE's latent whose direction is nearest to this latent's"),
    cosine=(pa.float32(), "cosine of the two directions"),
    jaccard=(
        nullable(pa.float64()),
        "number of evaluation images on which both latents fire, as a share of those on which either fires; null if neither fires",
    ),
)

STABILITY = _table(
    "stability",
    "evaluation",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    other_sae=(pa.string(), "name of another SAE of the same activations"),
    matched=(
        nullable(pa.float64()),
        "share of the SAE's latents that a one-to-one (Hungarian) matching pairs with a cosine above 0.9; null if an SAE has more than "
        "4,096 latents",
    ),
    mutual=(
        pa.float64(),
        "share of the SAE's latents that have a cosine above 0.9 with their best match and are in turn its best match; close to `matched`, "
        "and defined for any number of latents",
    ),
    mmcs=(pa.float64(), "mean cosine of the SAE's latents with their best matches"),
    chance=(pa.float64(), "mmcs with random directions in place of the other SAE's"),
)

_UNSCORED = "null if there is no label, or the latent fires on too few of the images or on all of them"

LABELS = _table(
    "labels",
    "labels/<sae>",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    labeller=(pa.string(), "labeller that made the label: its kind, with a number if there are several of a kind"),
    place=(pa.int8(), "position of the labeller in label.labellers, from 1; of labels with equal scores, `features` shows the first"),
    status=(pa.string(), "ok, unparsed, refused, failed, over_budget or too_few_examples"),
    label=(nullable(pa.string()), "label of the latent; null unless status is ok"),
    detail=(nullable(pa.string()), "why there is no label, or what else the labeller said; null if nothing"),
    similarity=(
        nullable(pa.float64()),
        "cosine of the label and the mean of the latent's strongest images in the joint space; null if there is no label, or the latent "
        "fires on too few images",
    ),
    score=(
        nullable(pa.float64()),
        f"balanced accuracy of the label at detecting held-out firing images, by cosines in the joint space; {_UNSCORED}",
    ),
    auroc=(nullable(pa.float64()), f"area under the ROC curve of the same detection; {_UNSCORED}"),
    auroc_low=(nullable(pa.float64()), f"lower end of the 95 % interval of auroc; {_UNSCORED}"),
    auroc_high=(nullable(pa.float64()), f"upper end of the 95 % interval of auroc; {_UNSCORED}"),
    control_score=(
        nullable(pa.float64()),
        "score of another latent's label, by the same labeller, on the same images; null if score is, or no latent has a different label",
    ),
    random_score=(
        nullable(pa.float64()),
        "score of a random word of the vocabulary on the same images; null if score is, or the vocabulary has no other word",
    ),
    correlation=(
        nullable(pa.float64()),
        f"rank correlation, over the same held-out images, of the cosine with the label and the latent's activation; {_UNSCORED}",
    ),
    control_correlation=(
        nullable(pa.float64()),
        "correlation of the other latent's label that control_score uses; null if correlation or control_score is",
    ),
    precision=(
        nullable(pa.float64()),
        "share of images on which the latent fires among those on which the label predicts that it does, by the threshold of score, over "
        f"all held-out images; of the others, a sample is used. Null if the label predicts it nowhere; {_UNSCORED}",
    ),
    precision_chance=(
        nullable(pa.float64()),
        f"share of all held-out images on which the latent fires, which is the precision of a label that knows nothing; {_UNSCORED}",
    ),
    recall=(nullable(pa.float64()), f"share of the held-out firing images on which the label predicts that the latent fires; {_UNSCORED}"),
    recall_chance=(
        nullable(pa.float64()),
        "share of all held-out images on which the label predicts that the latent fires, which is the recall of a label that predicts as "
        f"often but knows nothing; {_UNSCORED}",
    ),
    detector_score=(
        nullable(pa.float64()),
        "balanced accuracy of the same detection by the labeller itself; null if it does not look at images, or did not answer",
    ),
    detector_auroc=(nullable(pa.float64()), "area under the ROC curve of that detection; null if detector_score is"),
    n_requests=(pa.int32(), "number of requests to a server for the label, including failed ones"),
    n_tokens=(pa.int32(), "number of tokens in those requests and their answers"),
)

N_MISTAKES = 4
"""Maximum number of mistakes of each kind that a label has."""

MISTAKES = _table(
    "mistakes",
    "labels/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    labeller=(pa.string(), "labels.labeller, whose label has a score"),
    kind=(pa.string(), "missed: the latent fires, but the cosine is not above the threshold; false_alarm: it is silent, but the cosine is"),
    rank=(pa.int32(), f"rank among the mistakes of its kind, 1 to {N_MISTAKES}; 1 is the farthest from the threshold"),
    image=(pa.int32(), "images.image; one of the held-out images from which labels.score is computed"),
    cosine=(pa.float32(), "cosine of label and image in the joint space, both centred as for labels.score"),
    threshold=(pa.float32(), "the label's detection threshold, which is the best one on the naming half"),
    act=(pa.float32(), "image-level activation; 0 if it is silent"),
    is_hard=(
        nullable(pa.bool_()),
        "whether the silent image was chosen because it fires a latent with a near direction, and not at random; null if kind is missed",
    ),
)

ARMS = (
    "none",
    "untouched",
    "targeted",
    "sign_flipped",
    "random_latent",
    "random_direction",
    "diff_means",
    "other_label",
    "prompt",
    "leace",
)
"""Ways to run the model on an image: as it is, with the edit, or with one of the controls of the edit."""
_ANSWERS = ("answer_shift", "word_log_odds", "says_label")
OUTCOMES = (
    "toward_label",
    "target_rate",
    "other_rate",
    "specificity",
    "collateral",
    "output_score",
    "drift",
    "patch_target_rate",
    "patch_other_rate",
    "patch_specificity",
    "erasure",
    "erasure_others",
    *_ANSWERS,
    *(f"grey_{outcome}" for outcome in _ANSWERS),
    "answer_drift",
    "steering_score",
)
"""What is measured of the model's output, or of the answers of a model that answers in words."""

INTERVENTIONS = _table(
    "interventions",
    "interventions/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    outcome=(
        pa.string(),
        "what is measured: toward_label (by how much the cosine with the latent's label rises, less the mean of that with others), "
        "target_rate (share of the images that the model takes for the latent's class whose prediction changes), other_rate (the same of "
        "all other images), specificity (target_rate less other_rate), collateral (loss of accuracy on images on which the latent is "
        "silent), output_score (probability and rank of the class texts that the dose raises most, less the same without it), drift (mean "
        "of 1 less the cosine of the output with and without the edit, divided by that of the outputs of two images), erasure (held-out "
        "balanced accuracy of a linear probe for the latent's class on the mean token of images from which the latent is removed; 0.5 if "
        "the class is gone), erasure_others (the same of probes for other classes) or, with masks, patch_target_rate, patch_other_rate and "
        "patch_specificity (as target_rate, other_rate and specificity, of patches at the last hookpoint instead of images, whose class of "
        "the masks a linear head reads). Of a "
        "model that answers in words: word_log_odds (by how much the log-odds rise that the answer begins with the label's first word, in "
        "nats), answer_shift (Kullback-Leibler divergence of its first token from that of the unchanged model, in nats), says_label (share "
        "of the answers whose first word is that of the label), each of them also with grey_ before it for a grey image, answer_drift "
        "(answer_shift on the latent's strongest images, divided by that between two images) or steering_score (cosine of the word "
        "answered and the latent's strongest images, as Pach et al. define it, without the SAE's error)",
    ),
    arm=(
        pa.string(),
        "how the model was run: none (as it is), untouched (x̂ in place of x, without an edit), targeted (the latent set to the dose), "
        "sign_flipped (moved as far the other way), random_latent (other latents that fire about as often), random_direction (moved as far "
        "in random directions), diff_means (moved as far along the mean token where the latent fires less that where it does not), "
        "other_label (as targeted, but measured toward that one of several other labels to which it moves images most), prompt (as it "
        "is, but the question says the label) or leace (tokens from which LEACE erased the class)",
    ),
    dose=(
        pa.float64(),
        "activation to which the latent is set, in units of the 99th percentile of its positive activations; 0 removes it, and stands for "
        "none, untouched, prompt and leace, which have no dose",
    ),
    value=(pa.float64(), "the outcome, over the images and, for a random control, its draws"),
    low=(nullable(pa.float64()), "lower end of the 95 % interval of value; null if there is none"),
    high=(nullable(pa.float64()), "upper end of the 95 % interval of value; null if there is none"),
    n_images=(pa.int32(), "number of evaluation images behind the value"),
    n_draws=(pa.int32(), "number of draws of a random control, or of labels of other_label; 1 for other arms"),
    target=(
        nullable(pa.string()),
        "the latent's class in the rates: the most common one of its strongest images or, by patch, that of the masks on whose patches it "
        "is most active in mean; null for other outcomes",
    ),
)

STATUSES = ("causal", "reads_only", "breaks_model", "untested")
"""What interventions say of a latent."""
_UNTESTED = "null if status is untested"

EFFECTS = _table(
    "effects",
    "interventions/<sae>",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    status=(
        pa.string(),
        "causal (the output changes as the latent promises, and more than under any control), reads_only (it does not), breaks_model (only "
        "at doses at which the output is no longer the model's) or untested",
    ),
    reason=(nullable(pa.string()), "why the latent is untested; null if it is tested"),
    outcome=(nullable(pa.string()), f"interventions.outcome that the status is about; {_UNTESTED}"),
    dose=(nullable(pa.float64()), f"interventions.dose that the effect is of; {_UNTESTED}"),
    act=(nullable(pa.float64()), f"the same dose as an activation; {_UNTESTED}"),
    effect=(nullable(pa.float64()), f"change of the outcome by setting the latent to the dose; {_UNTESTED}"),
    effect_low=(
        nullable(pa.float64()),
        f"effect less half the width of the 95 % interval, over images, of its difference from best_control; {_UNTESTED}",
    ),
    effect_high=(nullable(pa.float64()), f"effect plus the same; {_UNTESTED}"),
    best_control=(
        nullable(pa.float64()),
        "change of the same outcome, at the same dose, by the control that leaves the edit the least room; of a random control it is the "
        f"upper end over draws; {_UNTESTED}",
    ),
    scale=(
        nullable(pa.float64()),
        "activation that dose 1 is: the 99th percentile of the latent's positive activations on sampled training tokens; null if it fires "
        "on none, or the model could not be run",
    ),
    attribution=(
        nullable(pa.float64()),
        "mean over images and classes of the size of what the class's log-odds owe to the latent, estimated from gradients; null if no "
        "class is read from the output",
    ),
    control_causal=(
        nullable(pa.string()),
        f"status that the same rule gives a random latent, matched in density, if it is set in the place of this one; {_UNTESTED}",
    ),
)

N_ATTRIBUTED = 32
"""Maximum number of latents that are listed for an output."""

ATTRIBUTIONS = _table(
    "attributions",
    "interventions/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    output=(pa.string(), "name of the class whose log-odds are attributed"),
    rank=(
        pa.int32(),
        f"rank of the latent by the size of effect, whatever its sign; 1 is the largest, and {N_ATTRIBUTED} the last that is listed",
    ),
    latent=(pa.int32(), "index of the latent"),
    effect=(pa.float64(), "mean over images of what the output owes to the latent, estimated from gradients"),
    exact=(nullable(pa.float64()), "the same, measured by removing the latent; null for all but a few latents"),
    sparsity=(
        pa.float64(),
        "effective number of latents that carry the output, (Σ|effect|)² / Σ effect² over all latents, listed or not: 1 if a single latent "
        "has all of the effect, and the number of latents if all have the same",
    ),
    n_images=(pa.int32(), "number of evaluation images in the means"),
)

AUDIT_STATUSES = ("suspect", "unconfirmed", "untested", "of_another_class", "unsuspicious")
"""What the audit says of a class and a latent, the most alarming first."""
PARTS = ("class_with", "class_without", "others_with")
"""Parts of the pictures of an audited pair."""
AUDIT_GROUPS = ("class_with", "class_without", "others_with", "others_without")
"""Groups of images of an audited pair."""
N_AUDIT_IMAGES = 8
"""Maximum number of images of each part that are listed of an audited pair."""
_HAS = "has the latent: it fires on it and, if it fires on more than half of the evaluation images, is among the stronger half of them"
_AT_ONCE = "of the interval that holds with 95 % for all pairs that were examined at once"
_TESTED = "null unless the pair was tested"
_ATTRIBUTED = "null without intervene.audit.attributes, and if fewer than 10 images have one of the two values"

AUDIT = _table(
    "audit",
    "interventions/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    **{"class": (pa.string(), "a value of images.label")},
    status=(
        pa.string(),
        "suspect (the model answers with the class for the wrong reason: suspicion is above 0, and the model tells the class better "
        "without the latent), unconfirmed (suspicion is above 0, but it does not), untested (suspicion is above 0, but intervene.audit.n "
        "pairs are more suspicious, or it could not be tested), of_another_class (suspicion is above 0 because the latent is a feature of "
        "the classes whose images are mistaken for this one) or unsuspicious",
    ),
    suspicion=(
        pa.float64(),
        "how suspicious the pair is: the lower end of mistaken_more, or that of trust_less or of follows, the larger, if it is smaller; "
        "at most 0 if there is nothing to suspect",
    ),
    n_with=(pa.int32(), f"number of evaluation images of the class that have the latent; an image {_HAS}"),
    n_without=(pa.int32(), "number of the other images of the class"),
    n_others_with=(pa.int32(), "number of images of other classes that have the latent"),
    n_others_without=(pa.int32(), "number of images of other classes that lack it"),
    lift=(pa.float64(), "share of the class that has the latent, divided by that of all images"),
    accuracy_with=(pa.float64(), "share of n_with that the model calls the class"),
    accuracy_without=(pa.float64(), "share of n_without that the model calls the class"),
    accuracy_more=(pa.float64(), "accuracy_with less accuracy_without"),
    accuracy_more_low=(pa.float64(), f"lower end {_AT_ONCE}"),
    accuracy_more_high=(pa.float64(), f"upper end {_AT_ONCE}"),
    mistaken_with=(pa.float64(), "share of n_others_with that the model calls the class"),
    mistaken_more=(pa.float64(), "mistaken_with less the same of all images of the same classes"),
    mistaken_more_low=(pa.float64(), f"lower end {_AT_ONCE}"),
    mistaken_more_high=(pa.float64(), f"upper end {_AT_ONCE}"),
    trust_with=(
        nullable(pa.float64()),
        "share of the images with the latent that the model calls the class that are of it; null if there are none",
    ),
    trust_without=(nullable(pa.float64()), "the same of the images without the latent"),
    trust_less=(nullable(pa.float64()), "trust_without less trust_with; a feature that is the class itself has less than 0"),
    trust_less_low=(pa.float64(), f"lower end {_AT_ONCE}"),
    trust_less_high=(pa.float64(), f"upper end {_AT_ONCE}"),
    attribute=(nullable(pa.string()), f"competing attribute that the latent follows most; {_ATTRIBUTED}"),
    attribute_lift=(
        nullable(pa.float64()),
        "share of the images with the attribute that have the latent, divided by that of all; null if attribute is",
    ),
    follows=(
        nullable(pa.float64()),
        "share of the images of other classes with the attribute that have the latent, less that of the images of the class without it: 1 "
        "if the latent is the attribute, -1 if it is the class; null if attribute is",
    ),
    follows_low=(nullable(pa.float64()), f"lower end {_AT_ONCE}; null if attribute is"),
    follows_high=(nullable(pa.float64()), f"upper end {_AT_ONCE}; null if attribute is"),
    outside=(
        nullable(pa.float64()),
        "share of the latent's activation that is outside the object, mean over up to 32 images of the class; null unless the pair was "
        "tested and intervene.masks has masks of such images",
    ),
    outside_area=(
        nullable(pa.float64()),
        "share of the area of the same images that is outside, as it would be of a latent that is active everywhere; null if outside is",
    ),
    reason=(nullable(pa.string()), "why a pair is untested; null otherwise"),
    n_tested=(nullable(pa.int32()), f"number of images on which the model was run without the latent; {_TESTED}"),
    grouped_by=(
        nullable(pa.string()),
        "what divides the images of each class into two groups in the test: the attribute, if the latent follows it, or else whether they "
        f"have the latent; {_TESTED}",
    ),
    worst_group=(
        nullable(pa.string()),
        "group with the lowest accuracy, at telling whether an image is of the class: class_with, class_without, others_with or "
        f"others_without; {_TESTED}",
    ),
    worst=(nullable(pa.float64()), f"accuracy in the worst of the groups; {_TESTED}"),
    worst_ablated=(nullable(pa.float64()), f"the same after ablating the latent, whichever group is the worst then; {_TESTED}"),
    worst_random=(
        nullable(pa.float64()),
        f"the same after ablating another latent that fires about as often, mean of intervene.draws such; {_TESTED}",
    ),
    worst_random_low=(nullable(pa.float64()), f"the lowest of them; {_TESTED}"),
    worst_random_high=(nullable(pa.float64()), f"the highest of them; {_TESTED}"),
    worst_leace=(
        nullable(pa.float64()),
        f"the same after LEACE has erased from the tokens what divides the images into two groups; {_TESTED}",
    ),
    balanced=(nullable(pa.float64()), f"mean accuracy of the groups; {_TESTED}"),
    balanced_ablated=(nullable(pa.float64()), f"the same after ablating the latent; {_TESTED}"),
    balanced_random=(nullable(pa.float64()), f"the highest of the same after ablating another latent that fires about as often; {_TESTED}"),
    balanced_leace=(nullable(pa.float64()), f"the same after LEACE; {_TESTED}"),
    gain_low=(
        nullable(pa.float64()),
        "by how much ablating the latent gains more in balanced than nothing and than ablating any of the others: the lower end of the "
        f"interval that is paired over images and holds with 95 % for all tests; above 0 if the pair is a suspect; {_TESTED}",
    ),
)

AUDITS = _table(
    "audits",
    "interventions/<sae>",
    sae=(pa.string(), "name of the SAE"),
    status=(pa.string(), "ok, or why nothing was audited"),
    attributes=(pa.list_(pa.field("element", pa.string())), "names of the attributes that were given"),
    n_with_attributes=(pa.int32(), "number of audited images with a known attribute"),
    n_images=(pa.int32(), "number of evaluation images that were audited"),
    n_classes=(pa.int32(), "number of their classes"),
    accuracy=(nullable(pa.float64()), "share of them that the model calls what they are; null if none was audited"),
    n_latents=(pa.int32(), "number of latents that fire on them"),
    n_pairs=(pa.int32(), "number of pairs of a class and a latent"),
    n_too_few=(
        pa.int32(),
        "number of pairs that were left out, because fewer than 10 images are of the class or not, and have the latent or not",
    ),
    n_examined=(pa.int32(), "number of the others"),
    n_unlisted=(pa.int32(), "number of examined pairs that the relation audit leaves out, the least suspicious of classes with over 1,024"),
    n_suspicious=(pa.int32(), "number of examined pairs with a suspicion above 0"),
    n_tested=(pa.int32(), "number of these that were tested by ablating the latent"),
    n_suspects=(pa.int32(), "number of these that are suspects"),
)

AUDIT_IMAGES = _table(
    "audit_images",
    "interventions/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    **{"class": (pa.string(), "class of the pair, which was tested")},
    part=(
        pa.string(),
        "class_with (images of the class that have the latent, the strongest first), class_without (that lack it, those first that the "
        "model does not call the class) or others_with (of other classes that have it, those first that the model calls the class)",
    ),
    rank=(pa.int32(), "rank of the image in its part; 1 is the first, and 8 the last that is listed"),
    image=(pa.int32(), "images.image"),
    called=(pa.string(), "class that the model calls it"),
)

NEIGHBOURS = _table(
    "neighbours",
    "catalog",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    rank=(pa.int32(), "rank of the other latent; 1 is the nearest"),
    other=(pa.int32(), "index of the other latent"),
    cosine=(pa.float32(), "cosine of the two directions"),
)

DIRECTIONS = _table(
    "directions",
    "catalog",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    direction=(
        pa.binary(),
        "direction of the latent (row of W_dec), one signed byte per coordinate, at a scale that differs between latents, so divide by the "
        "norm (`ommatid.catalog.vectors.unpack` does); all zeros if the row is",
    ),
)

MEANINGS = _table(
    "meanings",
    "catalog",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent, which fires on some evaluation image"),
    n_images=(pa.int32(), "number of evaluation images in the mean: those on which the latent fires"),
    embedding=(
        pa.binary(),
        "mean of the embeddings of these images in the joint image-text space, each centred on the mean of all evaluation images and "
        "scaled to unit norm, weighted by the activation; one signed byte per coordinate, at a scale that differs between latents, so "
        "divide by the norm (`ommatid.catalog.vectors.unpack` does). Compare by cosine with the embedding of a text less the mean of many",
    ),
)

PREVIEWS = _table(
    "previews",
    "catalog",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent, which fires on some evaluation image"),
    images=(pa.list_(pa.int32()), "numbers (images.image) of up to 8 images on which it fires most strongly, the strongest first"),
)

IMAGE_LATENTS = _table(
    "image_latents",
    "catalog",
    sae=(pa.string(), "name of the SAE"),
    image=(pa.int32(), "images.image"),
    rank=(pa.int32(), "rank of the latent among those that fire on the image; 1 is the strongest, and 32 the last that is listed"),
    latent=(pa.int32(), "index of the latent"),
    act=(pa.float32(), "image-level activation, > 0"),
)

CLASS_LATENTS = _table(
    "class_latents",
    "catalog",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    **{"class": (pa.string(), "a value of images.label")},
    rank=(pa.int32(), "rank of the latent for the class by recall x precision; 1 is the best, and 48 the last that is listed"),
    latent=(pa.int32(), "index of the latent, which fires on at least two evaluation images of the class"),
    n_both=(pa.int32(), "number of evaluation images of the class on which it fires"),
    recall=(pa.float64(), "n_both as a share of the evaluation images of the class"),
    precision=(pa.float64(), "n_both as a share of the labelled evaluation images on which it fires"),
    lift=(pa.float64(), "precision divided by the share of the class among all labelled evaluation images"),
)

_CHAMPION = "published/champions/<champion>/drift"

KNOWN = _table(
    "known",
    _CHAMPION,
    image_id=(pa.binary(32), "sha256 of an image of the champion's data set, of either split"),
)

EVALUATED = _table(
    "evaluated",
    _CHAMPION,
    image=(pa.int32(), "number of an evaluation image of the champion, among those that new images are compared with"),
    error=(pa.float64(), "sum over its tokens of the squared distance between the target and the champion's reconstruction"),
    variance=(pa.float64(), "sum over its tokens of the squared distance between the target and the mean token of these images"),
)

FIRED = _table(
    "fired",
    _CHAMPION,
    image=(pa.int32(), "evaluated.image"),
    latent=(pa.int32(), "index of a latent of the champion that fires on it"),
    act=(pa.float32(), "image-level activation, > 0"),
)


def drift_embeddings(d_judge: int) -> pa.Schema:
    """Return the schema of the table `embeddings` of a champion's reference: training images, with vectors of `d_judge` float16."""
    return _schema(judge=(pa.binary(2 * d_judge), "the judge's embedding of a training image of the champion, little-endian float16"))


_CHECK = "published/drift/<check>"
_NEVER = "null if there were too few new images, or they cannot be compared"

DRIFT_CHECKS = _table(
    "drift_checks",
    _CHECK,
    check_id=(pa.string(), "name of the check, and of its folder in data/published/drift: its number and a digest of what was compared"),
    checked_at=(pa.timestamp("us"), "time of the check, UTC"),
    sae=(pa.string(), "name of the champion's SAE at that time"),
    verdict=(
        pa.string(),
        "none (no drift was found), slight (some was found, but no threshold of params.yaml is exceeded), drift (one is), too_few (fewer "
        "new images than drift.min_images, which are counted again the next time) or not_comparable (`reason` says why)",
    ),
    reason=(pa.string(), "sentence with the numbers behind the verdict"),
    action=(pa.string(), "drift.action at that time: what a retraining does about drift, warn or stop"),
    n_new=(pa.int32(), "number of new images: neither among the champion's, nor in an earlier check of it that found no drift"),
    n_known=(pa.int32(), "number of images of the champion's data set"),
    n_embedded=(nullable(pa.int32()), f"number of new images whose embeddings were compared; {_NEVER}"),
    n_encoded=(nullable(pa.int32()), f"number of new images whose activations were compared; {_NEVER}"),
    alpha=(pa.float64(), "drift.alpha: largest probability of finding any drift where there is none"),
    mmd=(nullable(pa.float64()), f"unbiased squared maximum mean discrepancy of the judge's embeddings (Gretton et al. 2012); {_NEVER}"),
    mmd_chance=(nullable(pa.float64()), f"its 95th percentile if images are new at random; {_NEVER}"),
    mmd_p=(nullable(pa.float64()), f"its p value by permutation, times the 4 kinds of test; {_NEVER}"),
    auroc=(
        nullable(pa.float64()),
        f"area under the ROC curve of a cross-fitted classifier that tells new images from the champion's by the same embeddings; {_NEVER}",
    ),
    auroc_chance=(nullable(pa.float64()), f"its 95th percentile if images are new at random; {_NEVER}"),
    auroc_p=(nullable(pa.float64()), f"its p value by permutation, times the 4 kinds of test; {_NEVER}"),
    auroc_found=(nullable(pa.float64()), f"smallest area that would have been found with a probability of 80 %; {_NEVER}"),
    fvu=(nullable(pa.float64()), f"fraction of variance unexplained by the champion's SAE on the new images; {_NEVER}"),
    fvu_before=(nullable(pa.float64()), f"the same on the champion's own evaluation images; {_NEVER}"),
    fvu_chance=(nullable(pa.float64()), f"95th percentile of |fvu − fvu_before| if images are new at random; {_NEVER}"),
    fvu_low=(nullable(pa.float64()), f"lower end of the 95 % interval of fvu − fvu_before, over images; {_NEVER}"),
    fvu_high=(nullable(pa.float64()), f"upper end of the same; {_NEVER}"),
    fvu_p=(nullable(pa.float64()), f"p value of the difference by permutation, times the 4 kinds of test; {_NEVER}"),
    fvu_found=(nullable(pa.float64()), f"smallest difference that would have been found with a probability of 80 %; {_NEVER}"),
    n_latents=(nullable(pa.int32()), f"number of latents that fire on enough images to be compared; {_NEVER}"),
    n_changed=(nullable(pa.int32()), f"number of these that fire on another share of the images, or with another activation; {_NEVER}"),
    latents_p=(nullable(pa.float64()), f"smallest drift.p of the check; {_NEVER}"),
    champion=(pa.string(), "folder of the champion in data/published/champions"),
    images_digest=(pa.string(), "sha256 of the manifest of the images that were checked"),
)

DRIFT = _table(
    "drift",
    _CHECK,
    may_be_empty=True,
    check_id=(pa.string(), "drift_checks.check_id"),
    sae=(pa.string(), "name of the champion's SAE"),
    latent=(pa.int32(), "index of the latent"),
    rank=(pa.int32(), "rank of the latent in the check; 1 has the strongest evidence of a change"),
    label=(nullable(pa.string()), "label of the latent in the champion's catalogue; null if it has none"),
    rate=(pa.float64(), "share of the new images on which it fires"),
    rate_before=(pa.float64(), "share of the champion's evaluation images on which it fires"),
    act=(nullable(pa.float64()), "mean of its image-level activation over the new images on which it fires; null if there are none"),
    act_before=(nullable(pa.float64()), "the same of the champion's evaluation images; null if there are none"),
    rate_p=(
        nullable(pa.float64()),
        "p value of the two rates being equal (Fisher's exact test), unadjusted; null if it fires on fewer than 8 images",
    ),
    act_p=(
        nullable(pa.float64()),
        "p value of activations being equally strong (rank-sum test), unadjusted; null if it fires on fewer than 8 images of either kind",
    ),
    p=(
        nullable(pa.float64()),
        "the smaller of the two, adjusted for the number of latents and of tests (Holm), times the 4 kinds of test; null if both are",
    ),
    is_changed=(pa.bool_(), "whether p is at most drift_checks.alpha"),
    change=(
        nullable(pa.string()),
        "more or fewer (it fires on more or fewer images), stronger or weaker (on those on which it fires): the change with the smaller p "
        "value; null unless it is changed",
    ),
)

DRIFT_IMAGES = _table(
    "drift_images",
    _CHECK,
    may_be_empty=True,
    check_id=(pa.string(), "drift_checks.check_id"),
    latent=(pa.int32(), "index of the latent, one of the changed latents with the strongest evidence"),
    side=(pa.string(), "before for the champion's evaluation images, new for new images"),
    rank=(pa.int32(), "rank of the image among those of its side; 1 has the largest activation"),
    image_id=(pa.string(), "sha256 of the image file"),
    path=(pa.string(), "path relative to the source"),
    act=(pa.float32(), "image-level activation"),
    thumbnail=(pa.binary(), "thumbnail, WebP"),
)

COMPARED = _table(
    "compared",
    _CHECK,
    image_id=(pa.binary(32), "sha256 of a new image of the check"),
)


PAST_RUNS = _schema(
    sae=(pa.string(), "name of the SAE, unique"),
    decided_at=(nullable(pa.timestamp("us")), "when it first became the champion, UTC; null if it never did"),
    is_here=(pa.bool_(), "whether it is an SAE of the checkout's training"),
    sae_digest=(pa.string(), "sha256 of the manifest of the SAE"),
    model=(pa.string(), "the model that it explains"),
    hookpoint=(pa.string(), "where the activations that it encodes were captured"),
    target=(nullable(pa.string()), "hookpoint that a transcoder decodes; null if the SAE decodes the activations that it encodes"),
    variant=(pa.string(), "variant of the SAE, such as batch_topk"),
    k=(nullable(pa.int32()), "number of latents meant to fire per token"),
    fvu=(nullable(pa.float64()), "fraction of variance unexplained on the present evaluation images; null if they do not vary"),
    cosine=(nullable(pa.float64()), "mean cosine of activation and reconstruction; null if it is undefined"),
    l0=(nullable(pa.float64()), "mean number of latents that fire per token"),
    dead=(pa.float64(), "share of latents that fire on no evaluation image"),
    coverage=(nullable(pa.float64()), "comparisons.coverage; null if the images have no classes"),
    uniqueness=(nullable(pa.float64()), "comparisons.uniqueness; null if it is undefined for every latent"),
    n_latents=(pa.int32(), "number of latents"),
    judge=(pa.string(), "the main judge, by which ms and its like are"),
    ms=(nullable(pa.float64()), "mean MonoSemanticity score; null if it is undefined for every latent"),
    ms_low=(nullable(pa.float64()), "lower end of the 95 % interval of ms over images; null if ms is"),
    ms_high=(nullable(pa.float64()), "upper end of the 95 % interval of ms over images; null if ms is"),
    ms_best=(nullable(pa.float64()), "highest score of a latent; null if ms is"),
    ms_left_out=(pa.int64(), "number of latents whose score is undefined, which are left out of ms"),
    ms_floor=(nullable(pa.float64()), "score of unrelated images: the mean pairwise cosine of the judge's embeddings"),
)
"""Columns of the relation `runs` of a backfill, to which those of `PAST_LABELLERS` about scores are added."""

PAST_JUDGES = _schema(
    sae=(pa.string(), "name of the SAE"),
    judge=(pa.string(), "name of the judge"),
    place=(pa.int8(), "position of the judge in extract.judge, from 1"),
    ms=(nullable(pa.float64()), "mean MonoSemanticity score by this judge; null if it is undefined for every latent"),
    ms_low=(nullable(pa.float64()), "lower end of the 95 % interval of ms over images; null if ms is"),
    ms_high=(nullable(pa.float64()), "upper end of the 95 % interval of ms over images; null if ms is"),
    ms_best=(nullable(pa.float64()), "highest score of a latent; null if ms is"),
    ms_left_out=(pa.int64(), "number of latents whose score is undefined, which are left out of ms"),
    ms_floor=(nullable(pa.float64()), "score of unrelated images: the mean pairwise cosine of this judge's embeddings"),
    n_images=(pa.int64(), "number of evaluation images that the judge embedded"),
    failed=(pa.int64(), "number of evaluation images for which it gave no finite embedding"),
)
"""Columns of the relation `judges` of a backfill."""

PAST_LABELLERS = _schema(
    sae=(pa.string(), "name of the SAE"),
    labeller=(pa.string(), "name of the labeller: its kind, with a number if there are several of a kind"),
    place=(pa.int8(), "position of the labeller in label.labellers, from 1"),
    n_labelled=(pa.int64(), "number of latents with a label"),
    n_scored=(pa.int64(), "number of latents with a scored label"),
    label_score=(nullable(pa.float64()), "mean label score of these; null if there are none"),
    control_score=(nullable(pa.float64()), "mean score of another latent's label on the same images; null if none has one"),
    beats_control=(nullable(pa.float64()), "share of labels that score higher than another latent's label; null if none has both scores"),
)
"""Columns of the relation `labellers` of a backfill. In `runs` they are of the best label of each latent."""

PAST_LEFT_OUT = _schema(
    sae=(pa.string(), "name of the SAE"),
    decided_at=(nullable(pa.timestamp("us")), "when it became the champion, UTC; null if it never did"),
    reason=(pa.string(), "why it could not be measured"),
)
"""Columns of the relation `left_out` of a backfill."""
