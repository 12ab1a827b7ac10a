"""Section `extract`, and the kinds of executor, each of which is implemented by `ommatid/executors/<kind>.py`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ommatid.config.models import JudgeModel, LiteModel, Model, TransformersJudge, network_of
from ommatid.config.section import Section


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Judges = Annotated[
    Annotated[JudgeModel, Tag("one")] | Annotated[tuple[JudgeModel, ...], Field(min_length=1), Tag("several")],
    Discriminator(_one_or_several),
]


class ExecutorSection(Section):
    """Base of the kinds of executor."""

    @property
    def workers_here(self) -> int | None:
        """Number of shards made on this machine at once; None for one, or one for each GPU."""
        return None

    @property
    def trial(self) -> "Executor":
        """Executor with which `ommatid estimate` extracts a sample to measure time and memory."""
        return LocalExecutor(kind="local")


class LocalExecutor(ExecutorSection):
    """This process, or one process for each GPU if there are several."""

    kind: Literal["local"]


class DaskExecutor(ExecutorSection):
    """A Dask cluster (`pip install 'ommatid[dask]'`)."""

    kind: Literal["dask"]
    address: str | None
    """Address of the scheduler, such as tcp://10.0.0.1:8786; null for a cluster on this machine that lasts as long as the run."""
    workers: Annotated[int, Field(ge=1)]
    """Number of processes of a cluster on this machine."""

    @property
    def workers_here(self) -> int | None:
        """Number of shards made on this machine at once; 1 for a cluster at an address, as this machine may be one of its workers."""
        return 1 if self.address else self.workers


class RayExecutor(ExecutorSection):
    """A Ray cluster (`pip install 'ommatid[ray]'`)."""

    kind: Literal["ray"]
    address: str | None
    """Address of the cluster, such as auto or ray://10.0.0.1:10001; null for one on this machine that lasts as long as the run."""
    workers: Annotated[int, Field(ge=1)]
    """Number of processes of a cluster on this machine."""

    @property
    def workers_here(self) -> int | None:
        """Number of shards made on this machine at once; 1 for a cluster at an address, as this machine may be one of its workers."""
        return 1 if self.address else self.workers


Executor = Annotated[LocalExecutor | DaskExecutor | RayExecutor, Field(discriminator="kind")]


class ExtractParams(Section):
    """Stage `extract`: captures activations at one or more hookpoints in one pass over the images, and embeds every image."""

    runtime_keys: ClassVar[frozenset[str]] = frozenset({"executor"})

    source: Literal["images"]
    """`images` for the images of the stage `images`, or `files` for activations that were made elsewhere."""
    model: Model
    """Model to explain."""
    hookpoints: Annotated[tuple[str, ...], Field(min_length=1)]
    """Hookpoints at which activations are captured, each into an artefact of its own; an unknown one is refused with a list of all."""
    tokens: Literal["patch", "cls", "register", "pooled", "all"]
    """Tokens to keep: patches, class tokens, register tokens, the mean of the patches, or all tokens."""
    sample: Annotated[int, Field(ge=1)] | None
    """Largest number of tokens per training image, drawn with a fixed seed; null for all. Evaluation images keep all, for heat maps."""
    max_norm: Annotated[float, Field(gt=1)] | None
    """Largest norm of a training token, as a multiple of the median norm in its image (arXiv 2309.16588); null for no limit."""
    judge: Judges
    """Independent encoder whose embeddings the monosemanticity score uses, or a list of encoders of which the first is the main one."""
    namer: Model | None
    """Model whose joint image-text space is used to label latents; null for the explained model, which must have a text tower."""
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    """Number of images of every forward pass; the last pass of a shard has black images at its end. The last bits depend on it."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Data type of the forward pass; auto for bfloat16 if the hardware computes in it, else float32."""
    executor: Executor
    """Executor that makes the shards; the artefact does not depend on it."""

    @model_validator(mode="after")
    def _judge_is_independent(self) -> "ExtractParams":
        network = network_of(self.model)
        if network is not None and network in map(network_of, self.judges):
            raise ValueError(f"judge must be a different encoder from model: both are {network}")
        return self

    @model_validator(mode="after")
    def _judges_differ(self) -> "ExtractParams":
        known = [(network_of(judge), getattr(judge, "image_size", None)) for judge in self.judges]
        if twice := [network for network, size in known if known.count((network, size)) > 1]:
            raise ValueError(f"judge names {twice[0]} twice; every judge must be a different encoder")
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
    """Stage `extract` without images: imports activations that were made elsewhere (docs/users/activations.md)."""

    reads_artefacts = False

    source: Literal["files"]
    """`files` for activations that were made elsewhere."""
    path: str
    """A .npy, .safetensors, .pt or .parquet file, or a folder of them, relative to the checkout or absolute."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the hookpoint that the activations come from, such as vision.blocks.11."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model that they come from, in your own words; it is recorded in the SAE's cfg.json and the lineage."""
    key: str | None = None
    """Name of the tensor or column that holds the activations; null if each file has only one."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of images, chosen by a hash of the image's number, that are kept from training."""

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Names of the hookpoints, of which there is one."""
        return (self.name,)
