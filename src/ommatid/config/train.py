"""Section `train`."""

import itertools
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ommatid.config.messages import explain
from ommatid.config.section import Section, unique_name
from ommatid.config.variants import Variant

CHAMPION = "champion"
"""Value of `init` that stands for the published SAE, and is replaced by the SAE's folder if there is one."""


class TrainParams(Section):
    """Stage `train`: trains a sparse autoencoder, or several in one pass over the activations."""

    hookpoint: str | None
    """Hookpoint of extract.hookpoints to train on; null if there is only one, or if runs or grid name that of each SAE."""
    target: str | None
    """Hookpoint of extract.hookpoints to reconstruct from the first, which makes a transcoder; null to reconstruct the first itself."""
    variant: Variant
    """Variant of SAE: which latents fire, and which penalty keeps them sparse."""
    d_sae: Annotated[int, Field(ge=2, le=2**20)]
    """Number of latents."""
    k: Annotated[int, Field(ge=1)]
    """Mean number of latents that fire per token (L0)."""
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    """Number of passes over the training tokens."""
    batch_size: Annotated[int, Field(ge=2, le=2**20)]
    """Number of tokens per step."""
    lr: Annotated[float, Field(gt=0, le=1)] | None
    """Peak learning rate of Adam; null for 2e-4 / sqrt(d_sae / 16384)."""
    aux_coefficient: Annotated[float, Field(ge=0, le=1)]
    """Weight of the AuxK loss (arXiv 2406.04093), which revives dead latents of the TopK family; 0 turns it off."""
    ms_weight: Annotated[float, Field(ge=0, le=1)]
    """Weight of the loss 1 - MS of the batch, with joint embeddings in place of the judge's (try 1e-4 to 4e-4); 0 turns it off."""
    patience: Annotated[int, Field(ge=1, le=100)] | None
    """Stop when FVU has not fallen by 0.1 % within this percentage of the run; null to never stop early. A notice is given either way."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the initial weights and of the order of the batches."""
    init: Annotated[str, Field(min_length=1)] | None = None
    """SAE to begin with, so that latents keep their identity: `champion`, or the folder of an SAE; null to begin anew."""
    max_dead: Annotated[float, Field(gt=0, le=1)]
    """Largest share of latents that may be dead when training ends; with more, the gate fails."""
    runs: tuple[dict[str, Any], ...]
    """SAEs to train together, each as its differences from the values above, such as [{k: 8}, {k: 32, d_sae: 5120}]; [] for one SAE."""
    grid: dict[str, tuple[Any, ...]]
    """Values to combine into SAEs, such as {k: [8, 16], seed: [0, 1]}, of all that runs may change: hookpoint, target, variant, d_sae, k,
    lr, seed and the weights; {} for one SAE."""

    @field_validator("variant", mode="before")
    @classmethod
    def _kind_is_enough(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _values_fit(self) -> "TrainParams":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, larger than d_sae {self.d_sae}: at most d_sae latents can fire; lower k or raise d_sae")
        if self.runs and self.grid:
            raise ValueError("runs and grid are both given; use only one of them")
        if self.target is not None and self.target == self.hookpoint:
            raise ValueError(f"hookpoint and target are both {self.target}; set target to null to reconstruct the hookpoint itself")
        if self.runs or self.grid:
            self.each()
        return self

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the SAEs. `init` is left out if it is null, as in the params of older versions."""
        values = super().identity()
        return values if self.init else {key: value for key, value in values.items() if key != "init"}

    def unlisted(self) -> dict[str, Any]:
        """Return what DVC does not see, also of the SAEs in `runs` or `grid`, by the SAE's name."""
        inside = {f"{name}.{key}": value for name, one in self.each().items() for key, value in one._left_out().items()}
        return self._left_out() | inside

    def _left_out(self) -> dict[str, Any]:
        return super().unlisted()

    def each(self) -> dict[str, "TrainParams"]:
        """Return the params of each SAE to train, by name, without `runs` and `grid`.

        Raises:
            ValueError: The values of an SAE are invalid, or two SAEs are the same.
        """
        made: list[TrainParams] = []
        for change in self._changes():
            one = self._changed(change)
            if one in made:
                raise ValueError(f"runs or grid: makes the same SAE twice: {change}")
            made.append(one)
        if len({one.hookpoint is None for one in made}) > 1:
            raise ValueError(f"runs or grid: {len(made)} SAEs, of which some name a hookpoint and some do not; set train.hookpoint as well")
        of_several = len({(one.hookpoint, one.target) for one in made}) > 1
        saes: dict[str, TrainParams] = {}
        for one in made:
            saes[unique_name(f"{one.place}-{one.shape}" if of_several else one.shape, saes)] = one
        return saes

    @property
    def shape(self) -> str:
        """Variant, width, k and seed, of which the name of an SAE consists if all SAEs have the same hookpoint and target."""
        return f"{self.variant.kind}-{self.d_sae}-k{self.k}-s{self.seed}"

    @property
    def place(self) -> str:
        """Hookpoint and, for a transcoder, the target, with which names of SAEs begin if they differ."""
        return "-to-".join(name for name in (self.hookpoint, self.target) if name is not None)

    @property
    def is_aligned(self) -> bool:
        """Whether each encoder is kept near its direction; false for a transcoder, where the two lie in different spaces."""
        return self.variant.is_aligned and self.target is None

    @property
    def aims_at_k(self) -> bool:
        """Whether training aims at k firing latents per token; false if the weight of a sparsity penalty is set instead."""
        return self.variant.aims_at_k

    def _changes(self) -> list[dict[str, Any]]:
        combined = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return list(self.runs) or combined

    def _changed(self, change: dict[str, Any]) -> "TrainParams":
        if shared := sorted(change.keys() - set(PER_SAE)):
            raise ValueError(
                f"runs or grid: {', '.join(shared)}: cannot differ between SAEs that are trained together; these can: {', '.join(PER_SAE)}"
            )
        try:
            return TrainParams.model_validate(self.model_dump(mode="json") | change | {"runs": (), "grid": {}})
        except ValidationError as error:
            raise ValueError(f"runs or grid: {change}: {explain(error, TrainParams)}") from None


PER_SAE = ("hookpoint", "target", "variant", "d_sae", "k", "lr", "aux_coefficient", "ms_weight", "seed")
"""Fields of TrainParams in which SAEs that are trained together may differ."""
