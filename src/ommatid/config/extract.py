"""Section `extract`, and the kinds of executor; each is `ommatid/executors/<kind>.py`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ommatid.config.models import Judge, LiteModel, Model, TransformersJudge, network_of
from ommatid.config.section import Section


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Judges = Annotated[
    Annotated[Judge, Tag("one")] | Annotated[tuple[Judge, ...], Field(min_length=1), Tag("several")], Discriminator(_one_or_several)
]


class ExecutorSection(Section):
    """A kind of executor."""

    @property
    def workers_here(self) -> int | None:
        """Shards that are made on this machine at a time; None: one, or one for each GPU."""
        return None

    @property
    def trial(self) -> "Executor":
        """Executor with which `ommatid estimate` tries the extraction of a sample, and by which it counts time and memory."""
        return LocalExecutor(kind="local")


class LocalExecutor(ExecutorSection):
    """This process; with several GPUs a process each."""

    kind: Literal["local"]


class DaskExecutor(ExecutorSection):
    """A Dask cluster (`pip install 'ommatid[dask]'`)."""

    kind: Literal["dask"]
    address: str | None
    """Of the scheduler, such as tcp://10.0.0.1:8786; null: a cluster on this machine for the time of the run."""
    workers: Annotated[int, Field(ge=1)]
    """Processes of the cluster on this machine."""

    @property
    def workers_here(self) -> int | None:
        """Shards that are made on this machine at a time; on a cluster elsewhere this machine may be one of the workers."""
        return 1 if self.address else self.workers


class RayExecutor(ExecutorSection):
    """A Ray cluster (`pip install 'ommatid[ray]'`)."""

    kind: Literal["ray"]
    address: str | None
    """Of the cluster, such as auto or ray://10.0.0.1:10001; null: one on this machine for the time of the run."""
    workers: Annotated[int, Field(ge=1)]
    """Processes of the cluster on this machine."""

    @property
    def workers_here(self) -> int | None:
        """Shards that are made on this machine at a time; on a cluster elsewhere this machine may be one of the workers."""
        return 1 if self.address else self.workers


Executor = Annotated[LocalExecutor | DaskExecutor | RayExecutor, Field(discriminator="kind")]


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
        network = network_of(self.model)
        if network is not None and network in map(network_of, self.judges):
            raise ValueError(f"judge must be another encoder than model: both are {network}")
        return self

    @model_validator(mode="after")
    def _judges_differ(self) -> "ExtractParams":
        known = [(network_of(judge), getattr(judge, "image_size", None)) for judge in self.judges]
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
    """Stage `extract` without images: activations that were made elsewhere. What the files must hold: docs/users/activations.md."""

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
