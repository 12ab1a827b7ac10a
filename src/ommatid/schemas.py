"""The Arrow schema of every Parquet table in every artefact. `docs/artefacts.md` is generated from these."""

import pyarrow as pa

SCHEMA_VERSION = 3
"""Raised when a table changes so that older readers would misread it."""


def _schema(**columns: tuple[pa.DataType, str]) -> pa.Schema:
    """Columns as name=(type, meaning); a type wrapped by `_null` may be null."""
    return pa.schema([_field(name, type_, meaning) for name, (type_, meaning) in columns.items()])


def _field(name: str, type_: pa.DataType, meaning: str) -> pa.Field:
    optional = meaning.startswith("null: ") or "; null: " in meaning
    return pa.field(name, type_, nullable=optional, metadata={"meaning": meaning})


IMAGES = _schema(
    image=(pa.int32(), "row number in the data set, the key that other tables use"),
    image_id=(pa.string(), "sha256 of the encoded bytes"),
    path=(pa.string(), "where it was in the source, relative to it"),
    split=(pa.string(), "train or eval, by hash of image_id"),
    width=(pa.int32(), "pixels, upright"),
    height=(pa.int32(), "pixels, upright"),
    label=(pa.string(), "class given by the source; null: none"),
    caption=(pa.string(), "caption given by the source; null: none"),
    thumbnail=(pa.binary(), "WebP, upright RGB"),
    encoded=(pa.binary(), "the image file's bytes, as they came"),
)

REJECTED = _schema(
    path=(pa.string(), "where it was in the source"),
    reason=(pa.string(), "empty, truncated, not_an_image, too_large, unreadable or duplicate"),
    detail=(pa.string(), "what the decoder said, or the path it duplicates"),
)


PLAN = _schema(
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


CURVES = _schema(
    step=(pa.int64(), "optimiser steps done"),
    tokens=(pa.int64(), "tokens seen"),
    loss=(pa.float64(), "reconstruction loss plus what is penalised, on scaled activations; null: it was trained elsewhere"),
    fvu=(pa.float64(), "fraction of variance unexplained of the batches since the last row"),
    l0=(pa.float64(), "mean latents that fire a token"),
    dead=(pa.float64(), "share of latents that have not fired in dead_after tokens"),
    lr=(pa.float64(), "learning rate; null: it was trained elsewhere"),
)

LATENTS = _schema(
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    density=(pa.float64(), "share of evaluation tokens on which it fires"),
    mean_act=(pa.float64(), "mean activation over the tokens on which it fires; null: it never fires"),
    max_act=(pa.float64(), "largest activation; 0 if it never fires"),
    n_images=(pa.int32(), "evaluation images on which it fires"),
    is_dead=(pa.bool_(), "never fires on the evaluation split"),
    dead_in_training=(pa.bool_(), "had not fired in dead_after tokens when training ended"),
    ms=(pa.float64(), "MonoSemanticity score (Pach et al. 2025) by the judge; null: constant, or fires on fewer than two images"),
    ms_low=(pa.float64(), "lower end of its 95 % interval over images; null: ms is"),
    ms_high=(pa.float64(), "upper end of its 95 % interval over images; null: ms is"),
    purity=(pa.float64(), "share of the commonest class among its 16 strongest images; null: no labels, or it fires on fewer than 16"),
    top_classes=(pa.list_(pa.string()), "up to three classes of its 16 strongest images, commonest first"),
)

EXAMPLES = _schema(
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    decile=(pa.int8(), "decile of the image's activation among the images on which the latent fires; 10 is the strongest"),
    rank=(pa.int32(), "1 is the strongest of the decile's examples"),
    image=(pa.int32(), "images.image"),
    act=(pa.float32(), "image-level activation"),
    heat=(pa.list_(pa.float32()), "activation of each patch, row by row; null: tokens have no place"),
    rows=(pa.int16(), "rows of heat; 0 if none"),
    cols=(pa.int16(), "columns of heat; 0 if none"),
)

FIRINGS = _schema(
    sae=(pa.string(), "name of the SAE"),
    image=(pa.int32(), "images.image"),
    latent=(pa.int32(), "index of the latent"),
    act=(pa.float32(), "image-level activation, > 0"),
)

COMPARISONS = _schema(
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "sae, untrained (same shape, random directions), neurons (the raw activations), pca, kmeans or nmf"),
    n_latents=(pa.int32(), "latents of the dictionary"),
    fvu=(pa.float64(), "fraction of variance unexplained; null: not a reconstruction"),
    cosine=(pa.float64(), "mean cosine of activation and reconstruction; null: not a reconstruction"),
    l0=(pa.float64(), "mean latents that fire a token"),
    dead=(pa.float64(), "share of latents that never fire on the evaluation split"),
    ms=(pa.float64(), "mean MonoSemanticity score; null: undefined for every latent"),
    ms_low=(pa.float64(), "lower end of its 95 % interval over images; null: ms is"),
    ms_high=(pa.float64(), "upper end of its 95 % interval over images; null: ms is"),
    ms_best=(pa.float64(), "highest MonoSemanticity score of a latent; null: undefined for every latent"),
    ms_left_out=(pa.int32(), "latents whose score is undefined"),
    ms_floor=(pa.float64(), "mean pairwise cosine of the judge on the same images; null: fewer than two images"),
    purity=(pa.float64(), "mean purity of the 16 strongest images; null: no labels"),
    judge=(pa.string(), "the encoder behind ms"),
)

JUDGED = _schema(
    sae=(pa.string(), "name of the SAE"),
    dictionary=(pa.string(), "sae, untrained, neurons, pca, kmeans or nmf, as in comparisons"),
    latent=(pa.int32(), "index of the latent in the dictionary"),
    judge=(pa.string(), "the encoder behind ms"),
    ms=(pa.float64(), "MonoSemanticity score by this judge; null: constant, or fires on fewer than two of the images that it embedded"),
    ms_low=(pa.float64(), "lower end of its 95 % interval over images; null: ms is"),
    ms_high=(pa.float64(), "upper end of its 95 % interval over images; null: ms is"),
    floor=(pa.float64(), "mean pairwise cosine of this judge on the same images; null: fewer than two images"),
)

LABELS = _schema(
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    labeller=(pa.string(), "what made the label"),
    status=(pa.string(), "ok, unparsed, refused or too_few_examples"),
    label=(pa.string(), "the name; null: status is not ok"),
    similarity=(pa.float64(), "cosine of the name and the direction in the joint space that made it; null: status is not ok"),
    score=(
        pa.float64(),
        "balanced accuracy of the name at picking held-out firing images; null: status is not ok, or it fires on every image",
    ),
    auroc=(pa.float64(), "area under the ROC curve of the same detection; null: status is not ok, or it fires on every image"),
    auroc_low=(pa.float64(), "lower end of its 95 % interval; null: status is not ok, or it fires on every image"),
    auroc_high=(pa.float64(), "upper end of its 95 % interval; null: status is not ok, or it fires on every image"),
    control_score=(pa.float64(), "score of another latent's name on the same images; null: status is not ok, or it fires on every image"),
)

NEIGHBOURS = _schema(
    sae=(pa.string(), "name of the SAE"),
    latent=(pa.int32(), "index of the latent"),
    rank=(pa.int32(), "1 is the nearest"),
    other=(pa.int32(), "the other latent"),
    cosine=(pa.float32(), "cosine of the two directions"),
)
