"""Section `train`."""

import itertools
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ommatid.config.problems import explain
from ommatid.config.section import Section, unlike
from ommatid.config.variants import Variant


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
            saes[unlike(f"{one.variant.kind}-{one.d_sae}-k{one.k}-s{one.seed}", saes)] = one
        return saes

    @property
    def is_aligned(self) -> bool:
        """Whether encoders are kept near their directions; not in a transcoder, where they are of two spaces."""
        return self.variant.is_aligned and self.target is None

    @property
    def aims_at_k(self) -> bool:
        """Whether k latents are to fire a token; not where the weight of a penalty is given, whatever that leads to."""
        return self.variant.aims_at_k

    def _changes(self) -> list[dict[str, Any]]:
        combined = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return list(self.runs) or combined

    def _changed(self, change: dict[str, Any]) -> "TrainParams":
        if odd := sorted(change.keys() - set(PER_SAE)):
            raise ValueError(f"runs or grid: {', '.join(odd)}: cannot differ between SAEs of one pass; what can: {', '.join(PER_SAE)}")
        try:
            return TrainParams.model_validate(self.model_dump(mode="json") | change | {"runs": (), "grid": {}})
        except ValidationError as error:
            raise ValueError(f"runs or grid: {change}: {explain(error, TrainParams)}") from None


PER_SAE = ("variant", "d_sae", "k", "lr", "aux_coefficient", "ms_weight", "seed")
"""Fields of TrainParams in which SAEs of one pass may differ."""
