"""The Arrow schema of every Parquet table in every artefact. `docs/developers/artefacts.md` is generated from these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 4
"""Raised when a table or the manifest changes so that older readers would misread it."""


Place = Literal["images", "activations", "sae/<sae>", "evaluation", "evaluation/<sae>", "labels/<sae>", "catalog"]
"""Artefact that holds a table, by its folder in data; `<sae>` is the folder of each SAE. Tables of `catalog` are nowhere else."""


@dataclass(frozen=True)
class Table:
    """A Parquet table of an artefact; it is a relation of the catalogue where catalog/sql has a file of its name."""

    place: Place
    """Artefact that holds the table."""
    schema: pa.Schema
    """Its columns, each with its meaning."""
    may_be_empty: bool
    """Whether a sound artefact may hold it without rows; the catalogue's gate requires rows of every other relation."""


TABLES: dict[str, Table] = {}
"""Every table whose schema does not depend on the model, by name. The catalogue builds its relations in this order."""

DERIVED: Mapping[str, tuple[str, ...]] = {"features": ("latents", "comparisons", "labels"), "runs": ("comparisons",)}
"""Relations that are computed from other relations, in the order in which they are built once all tables are there. A column that their SQL
does not comment on means what the first of these tables to have it says."""


@dataclass(frozen=True)
class _Nullable:
    type: pa.DataType


def nullable(type_: pa.DataType) -> _Nullable:
    """Type of a column that may hold nulls; its meaning says when."""
    return _Nullable(type_)


def _schema(**columns: tuple[pa.DataType | _Nullable, str]) -> pa.Schema:
    """Schema of columns given as name=(type, meaning)."""
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
    image=(pa.int32(), "row number in the data set, the key that other tables use"),
    image_id=(pa.string(), "sha256 of the encoded bytes"),
    path=(pa.string(), "where it was in the source, relative to it"),
    split=(pa.string(), "train or eval, by hash of image_id"),
    width=(pa.int32(), "pixels, upright"),
    height=(pa.int32(), "pixels, upright"),
    label=(nullable(pa.string()), "class given by the source; null: none"),
    captions=(pa.list_(pa.field("element", pa.string())), "captions given by the source, which may be several, or none"),
    taxonomy=(nullable(pa.string()), "path of classes from the root, separated by /, given by the source; null: none"),
    thumbnail=(pa.binary(), "WebP, upright RGB"),
    encoded=(pa.binary(), "the image file's bytes, as they came"),
)

REJECTED = _table(
    "rejected",
    "images",
    path=(pa.string(), "where it was in the source"),
    reason=(pa.string(), "empty, truncated, not_an_image, too_large, unreadable or duplicate"),
    detail=(pa.string(), "what the decoder said, or the path it duplicates"),
)


PLAN = _table(
    "plan",
    "activations",
    shard=(pa.int32(), "shard of the activations that holds these images"),
    file=(pa.int32(), "index of the file in the images artefact"),
    row_group=(pa.int32(), "index of the row group in that file"),
    n_images=(pa.int32(), "images in the row group"),
)


def activations(d_model: int, metadata: dict[str, str]) -> pa.Schema:
    """One row a token; `x` is d_model little-endian float16 values. `metadata` names model, hookpoint, width and dtype."""
    schema = _schema(
        image=(pa.int32(), "images.image"),
        token=(pa.int32(), "position of the token in the model's sequence; 0 for pooled"),
        kind=(pa.string(), "cls, distillation, register, patch, pooled or imported"),
        row=(pa.int16(), "row of a patch in the grid; -1 for tokens without a place"),
        col=(pa.int16(), "column of a patch in the grid; -1 for tokens without a place"),
        x=(pa.binary(2 * d_model), "activation, little-endian float16"),
    )
    return schema.with_metadata({**metadata, "d_model": str(d_model), "dtype": "float16"})


def judge_columns(n: int) -> list[str]:
    """Columns of `embeddings` that hold the judges' vectors, in the order of extract.judge: judge, judge_1, judge_2 ..."""
    return ["judge", *(f"judge_{i}" for i in range(1, n))]


def embeddings(d_joint: int, *d_judges: int) -> pa.Schema:
    """One row an image, in image order; vectors are little-endian float32 of unit norm. A column for each judge, the main one first."""
    widths = dict(zip(judge_columns(len(d_judges)), d_judges, strict=True))
    meaning = "embedding, little-endian float32; all NaN: it failed on this image"
    schema = _schema(
        image=(pa.int32(), "images.image"),
        joint=(pa.binary(4 * d_joint), "the model's joint image-text embedding, little-endian float32"),
        **{
            name: (pa.binary(4 * width), f"the judge's {meaning}" if name == "judge" else f"another judge's {meaning}")
            for name, width in widths.items()
        },
    )
    return schema.with_metadata({"d_joint": str(d_joint), **{f"d_{name}": str(width) for name, width in widths.items()}})


CURVES = _table(
    "curves",
    "sae/<sae>",
    step=(pa.int64(), "optimiser steps done"),
    tokens=(pa.int64(), "tokens seen"),
    loss=(nullable(pa.float64()), "reconstruction loss plus what is penalised, on scaled activations; null: it was trained elsewhere"),
    fvu=(pa.float64(), "fraction of variance unexplained of the batches since the last row"),
    l0=(pa.float64(), "mean latents that fire a token"),
    dead=(pa.float64(), "share of latents that have not fired in dead_after tokens"),
    lr=(nullable(pa.float64()), "learning rate; null: it was trained elsewhere"),
)

LATENTS = _table(
    "latents",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    density=(pa.float64(), "share of evaluation tokens on which it fires"),
    mean_act=(nullable(pa.float64()), "mean activation over the tokens on which it fires; null: it never fires"),
    max_act=(pa.float64(), "largest activation; 0 if it never fires"),
    n_images=(pa.int32(), "evaluation images on which it fires"),
    is_dead=(pa.bool_(), "never fires on the evaluation split"),
    dead_in_training=(pa.bool_(), "had not fired in dead_after tokens when training ended"),
    ms=(nullable(pa.float64()), "MonoSemanticity score (Pach et al. 2025) by the judge; null: constant, or fires on fewer than two images"),
    ms_low=(nullable(pa.float64()), "lower end of its 95 % interval over images; null: ms is"),
    ms_high=(nullable(pa.float64()), "upper end of its 95 % interval over images; null: ms is"),
    purity=(
        nullable(pa.float64()),
        "share of the commonest class among its 16 strongest images; null: one of them has no label, it fires on fewer, or there are "
        "not two classes",
    ),
    purity_64=(nullable(pa.float64()), "the same of its 64 strongest images; null: as purity"),
    top_classes=(pa.list_(pa.string()), "up to three classes of its 16 strongest images, commonest first"),
    label_entropy=(
        nullable(pa.float64()),
        "entropy in bits of the classes of the images on which it fires, each weighed by its activations; 0 is one class; null: it "
        "fires on no labelled image, or there are not two classes",
    ),
    lca_depth=(
        nullable(pa.int32()),
        "depth in the taxonomy of the lowest common ancestor of its 16 strongest images that have a path, 0 is the root; null: fewer than "
        "16 of its 64 strongest have one",
    ),
    uniqueness=(
        nullable(pa.float64()),
        "1 - largest Jaccard of its 16 strongest images with those of another latent, 1 shares none; null: it fires on fewer than 16",
    ),
    is_dense=(pa.bool_(), "fires on more than a tenth of the tokens"),
    is_rare=(pa.bool_(), "fires, but on fewer than 16 images"),
    duplicate_of=(
        nullable(pa.int32()),
        "the latent with the nearest direction of those with cosine >= 0.9 that share at least half of the images on which either fires; "
        "null: there is none",
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
        "1 is the strongest of the decile's examples; ORDER BY decile DESC, rank begins with the 16 strongest images",
    ),
    image=(pa.int32(), "images.image"),
    act=(pa.float32(), "image-level activation"),
    heat=(nullable(pa.list_(pa.float32())), "activation of each patch, row by row; null: tokens have no place"),
    rows=(pa.int16(), "rows of heat; 0 if none"),
    cols=(pa.int16(), "columns of heat; 0 if none"),
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
        "sae, untrained (same shape, random directions), neurons (the raw activations), sparse_neurons (rare ones), pca, kmeans or nmf",
    ),
    n_latents=(pa.int32(), "latents of the dictionary"),
    fvu=(nullable(pa.float64()), "fraction of variance unexplained; null: not a reconstruction"),
    cosine=(nullable(pa.float64()), "mean cosine of activation and reconstruction; null: not a reconstruction"),
    l0=(pa.float64(), "mean latents that fire a token"),
    dead=(pa.float64(), "share of latents that never fire on the evaluation split"),
    ms=(nullable(pa.float64()), "mean MonoSemanticity score; null: undefined for every latent"),
    ms_low=(nullable(pa.float64()), "lower end of its 95 % interval over images; null: ms is"),
    ms_high=(nullable(pa.float64()), "upper end of its 95 % interval over images; null: ms is"),
    ms_best=(nullable(pa.float64()), "highest MonoSemanticity score of a latent; null: undefined for every latent"),
    ms_left_out=(pa.int32(), "latents whose score is undefined"),
    ms_floor=(nullable(pa.float64()), "mean pairwise cosine of the judge on the same images; null: there are not two"),
    purity=(nullable(pa.float64()), "mean purity of the 16 strongest images; null: there are not two classes"),
    coverage=(
        nullable(pa.float64()),
        "share of the classes that some latent stands for, with purity of at least 0.75; null: there are not two classes",
    ),
    uniqueness=(nullable(pa.float64()), "mean uniqueness of latents; null: undefined for every latent"),
    judge=(pa.string(), "the encoder behind ms"),
)

JUDGED = _table(
    "judged",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "comparisons.dictionary"),
    latent=(pa.int32(), "index of the latent in the dictionary"),
    judge=(pa.string(), "the encoder behind ms"),
    ms=(
        nullable(pa.float64()),
        "MonoSemanticity score by this judge; null: constant, or fires on fewer than two of the images that it embedded",
    ),
    ms_low=(nullable(pa.float64()), "lower end of its 95 % interval over images; null: ms is"),
    ms_high=(nullable(pa.float64()), "upper end of its 95 % interval over images; null: ms is"),
    floor=(nullable(pa.float64()), "mean pairwise cosine of this judge on the same images; null: fewer than two images"),
)

FIDELITY = _table(
    "fidelity",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "comparisons.dictionary, where it is a reconstruction"),
    kind=(pa.string(), "cls, distillation, register, patch or pooled; all: every token"),
    n_tokens=(pa.int64(), "evaluation tokens of this kind"),
    fvu=(nullable(pa.float64()), "fraction of variance unexplained, the mean taken over this kind; null: the activations do not vary"),
    cosine=(pa.float64(), "mean cosine of activation and reconstruction"),
    l0=(pa.float64(), "mean latents that fire a token"),
)

DENSITIES = _table(
    "densities",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "comparisons.dictionary"),
    low=(pa.float64(), "least density of these latents; 0: those that never fire"),
    high=(pa.float64(), "density below which they are; 1 is among the last"),
    n_latents=(pa.int32(), "latents"),
)

COFIRING = _table(
    "cofiring",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    rank=(pa.int32(), "1 has the highest lift"),
    other=(pa.int32(), "the other latent"),
    lift=(pa.float64(), "how many times as often both fire on an image as if they were independent, > 1"),
    jaccard=(pa.float64(), "of the images on which either fires, the share on which both do"),
    n_both=(pa.int32(), "images on which both fire, at least 8"),
)

LEVELS = _table(
    "levels",
    "evaluation/<sae>",
    sae=(pa.string(), "name of the SAE"),
    level=(pa.int32(), "1 is the smallest dictionary; an SAE that is not Matryoshka has one level"),
    first=(pa.int32(), "first latent that this level adds"),
    last=(pa.int32(), "last latent of this level"),
    fvu=(nullable(pa.float64()), "fraction of variance unexplained with the latents up to the last; null: the activations do not vary"),
    ms=(nullable(pa.float64()), "mean MonoSemanticity score of the latents that it adds; null: undefined for each of them"),
    n_ms=(pa.int32(), "of them, those that have a score"),
    lca_depth=(nullable(pa.float64()), "mean depth in the taxonomy of the latents that it adds; null: undefined for each of them"),
    n_lca=(pa.int32(), "of them, those that have a depth"),
)

PROBES = _table(
    "probes",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    **{"class": (pa.string(), "images.label; the 64 commonest at most")},
    probe=(pa.string(), "latents: a logistic regression on k of them; x: on the activations, averaged over the image's tokens"),
    k=(pa.int32(), "features of the probe: latents, or the width of x"),
    accuracy=(pa.float64(), "balanced accuracy on the held-out half of the evaluation images"),
    auroc=(pa.float64(), "area under the ROC curve on the same images"),
    auroc_low=(pa.float64(), "lower end of its 95 % interval"),
    auroc_high=(pa.float64(), "upper end of its 95 % interval"),
    n_positive=(pa.int32(), "held-out images of the class"),
    latents=(nullable(pa.list_(pa.int32())), "those of the probe, the largest difference between class and rest first; null: it is on x"),
)

ZERO_SHOT = _table(
    "zero_shot",
    "evaluation/<sae>",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    spliced=(
        pa.string(),
        "what the model goes on from in place of x: plain (x itself), sae (x̂), sae_with_error (x̂ + (x − x̂): equal to plain, or splicing "
        "itself changes something), mean (the mean training token), untrained (another x̂), sparse_neurons, pca, kmeans or nmf",
    ),
    n_images=(pa.int32(), "evaluation images that were classified"),
    n_classes=(pa.int32(), "labels of the evaluation split: the classes, by their texts; chance is one in as many"),
    n_replaced=(pa.int32(), "tokens of an image that were replaced: those that extract.tokens keeps"),
    n_tokens=(pa.int32(), "tokens of an image at the hookpoint; the others stayed what they were"),
    logit_scale=(pa.float64(), "what cosines were multiplied by before the softmax: the model's, or fitted on plain training images"),
    accuracy=(pa.float64(), "share of images whose own class had the largest cosine"),
    accuracy_low=(pa.float64(), "lower end of its 95 % interval (Wilson)"),
    accuracy_high=(pa.float64(), "upper end of its 95 % interval (Wilson)"),
    cross_entropy=(pa.float64(), "mean −log of the probability of the own class, in nats"),
    recovered=(
        nullable(pa.float64()),
        "(cross-entropy of mean − this one) / (cross-entropy of mean − that of plain): 1 for plain, 0 for mean; null: the mean hurts no "
        "more than chance would",
    ),
    recovered_low=(nullable(pa.float64()), "lower end of its 95 % interval, over the same images; null: recovered is"),
    recovered_high=(nullable(pa.float64()), "upper end of its 95 % interval, over the same images; null: recovered is"),
)

MATCHES = _table(
    "matches",
    "evaluation",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    other_sae=(pa.string(), "name of another SAE of the same activations"),
    other_latent=(pa.int32(), "the other SAE's latent whose direction is nearest to this latent's"),
    cosine=(pa.float32(), "cosine of the two directions"),
    jaccard=(nullable(pa.float64()), "evaluation images that fire both over those that fire either; null: neither fires"),
)

STABILITY = _table(
    "stability",
    "evaluation",
    may_be_empty=True,
    sae=(pa.string(), "name of the SAE"),
    other_sae=(pa.string(), "name of another SAE of the same activations"),
    matched=(
        nullable(pa.float64()),
        "share of the SAE's latents that one-to-one (Hungarian) matching by cosine pairs above 0.9; null: one has more than 4,096 latents",
    ),
    mutual=(
        pa.float64(),
        "share of the SAE's latents above 0.9 with a latent whose best match they are, too; close to matched, at any width",
    ),
    mmcs=(pa.float64(), "mean over the SAE's latents of the cosine of their best match"),
    chance=(pa.float64(), "what mmcs would be were the other's directions drawn at random"),
)

_UNSCORED = "null: there is no label, too few images fire it, or all do"

LABELS = _table(
    "labels",
    "labels/<sae>",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    labeller=(pa.string(), "what made the label: its kind, with a number where there are several of a kind"),
    place=(pa.int8(), "place of the labeller in label.labellers, from 1: of labels that score the same, the first is the feature's"),
    status=(pa.string(), "ok, unparsed, refused, failed, over_budget or too_few_examples"),
    label=(nullable(pa.string()), "the name; null: status is not ok"),
    detail=(nullable(pa.string()), "why there is no label, or what else the labeller said; null: nothing"),
    similarity=(
        nullable(pa.float64()),
        "cosine of the name and the mean of its strongest images in the joint space; null: there is no label, or too few images fire it",
    ),
    score=(nullable(pa.float64()), f"balanced accuracy of the name at picking held-out firing images, by the joint space; {_UNSCORED}"),
    auroc=(nullable(pa.float64()), f"area under the ROC curve of the same detection; {_UNSCORED}"),
    auroc_low=(nullable(pa.float64()), f"lower end of its 95 % interval; {_UNSCORED}"),
    auroc_high=(nullable(pa.float64()), f"upper end of its 95 % interval; {_UNSCORED}"),
    control_score=(
        nullable(pa.float64()),
        "score of another latent's name by the same labeller on the same images; null: score is, or there is none",
    ),
    random_score=(nullable(pa.float64()), "score of a random word of the vocabulary on the same images; null: score is, or there is none"),
    correlation=(
        nullable(pa.float64()),
        f"rank correlation of the name's cosine to the same held-out images with what the latent does on them; {_UNSCORED}",
    ),
    control_correlation=(nullable(pa.float64()), "the same of the name behind control_score; null: correlation or that is"),
    detector_score=(
        nullable(pa.float64()),
        "balanced accuracy of the same detection by the labeller's own eyes; null: it has none, or no answer",
    ),
    detector_auroc=(nullable(pa.float64()), "area under its ROC curve; null: detector_score is"),
    n_requests=(pa.int32(), "requests to a server that the label took, failed ones included"),
    n_tokens=(pa.int32(), "tokens of these, asked and answered"),
)

NEIGHBOURS = _table(
    "neighbours",
    "catalog",
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    rank=(pa.int32(), "1 is the nearest"),
    other=(pa.int32(), "the other latent"),
    cosine=(pa.float32(), "cosine of the two directions"),
)
