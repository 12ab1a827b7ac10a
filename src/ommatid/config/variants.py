"""Variants of SAE; each that Ommatid trains is implemented by `ommatid/sae/variants/<kind>.py`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ommatid.config.section import Section


class Trained(Section):
    """Base of the variants that Ommatid trains."""

    has_unit_directions: ClassVar[bool] = True
    """Whether the decoder directions have unit norm."""
    can_continue: ClassVar[bool] = False
    """Whether training can begin with a trained SAE of the variant; not if a penalty must be steered first, or if it has other tensors."""

    @property
    def is_aligned(self) -> bool:
        """Whether each encoder is kept near its direction; false for variants without that option."""
        return getattr(self, "aligned", False)

    @property
    def aims_at_k(self) -> bool:
        """Whether training aims at k firing latents per token; false if the weight of a sparsity penalty is set instead."""
        return True


class TopK(Trained):
    """The k largest latents of every token fire (arXiv 2406.04093)."""

    can_continue: ClassVar[bool] = True

    kind: Literal["topk"]
    aligned: bool = False
    """Keep each encoder near its direction (in the spirit of arXiv 2605.18629), so that fewer latents die and more of them generalise."""


class BatchTopK(Trained):
    """The k · batch largest latents of every batch fire; after training, a mean threshold replaces the batch (arXiv 2412.06410)."""

    can_continue: ClassVar[bool] = True

    kind: Literal["batch_topk"]
    aligned: bool = False
    """Keep each encoder near its direction (in the spirit of arXiv 2605.18629), so that fewer latents die and more of them generalise."""


class Matryoshka(Trained):
    """BatchTopK in which several prefixes of the dictionary must each reconstruct by themselves (arXiv 2503.17547)."""

    can_continue: ClassVar[bool] = True

    kind: Literal["matryoshka"]
    aligned: bool = False
    """Keep each encoder near its direction (in the spirit of arXiv 2605.18629), so that fewer latents die and more of them generalise."""
    prefixes: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Lengths of the prefixes as shares of d_sae, ascending and ending with 1."""
    random: bool = False
    """Draw as many prefixes anew at every step, short ones more often (Pareto); `prefixes` then only sets the levels in the catalogue."""

    @field_validator("prefixes")
    @classmethod
    def _prefixes_rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or value[-1] != 1:
            raise ValueError(f"prefixes are {list(value)}; they must rise and end with 1")
        return value


class ReLU(Trained):
    """Every positive latent fires; an L1 penalty keeps activations sparse, and dead latents are resampled (Bricken et al. 2023)."""

    kind: Literal["relu"]
    l1: Annotated[float, Field(gt=0)] | None = None
    """Weight of the mean L1 norm of a token's activations; null to adjust it so that k latents fire per token."""

    @property
    def aims_at_k(self) -> bool:
        """Whether training aims at k firing latents per token."""
        return self.l1 is None


class JumpReLU(Trained):
    """Each latent fires above a threshold of its own, which is learned with a straight-through estimator (arXiv 2407.14435)."""

    kind: Literal["jumprelu"]
    sparsity: Literal["l0", "tanh"] = "l0"
    """Penalty: the number of firing latents, or the sum of tanh(4 · act / scale) (Conerly et al. 2025)."""
    bandwidth: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Width of the estimator's kernel around a threshold, as a share of the mean activation."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Weight of the penalty; null to adjust it so that k latents fire per token."""

    @property
    def aims_at_k(self) -> bool:
        """Whether training aims at k firing latents per token."""
        return self.weight is None


class Gated(Trained):
    """Gates decide which latents fire, and a separate path computes their magnitudes (arXiv 2404.16014)."""

    kind: Literal["gated"]
    l1: Annotated[float, Field(gt=0)] | None = None
    """Weight of the mean L1 norm of a token's gates; null to adjust it so that k latents fire per token."""

    @property
    def aims_at_k(self) -> bool:
        """Whether training aims at k firing latents per token."""
        return self.l1 is None


class Archetypal(Trained):
    """BatchTopK whose directions stay near convex combinations of data centres, so that seeds agree (RA-SAE, arXiv 2502.12892)."""

    kind: Literal["archetypal"]
    points: Annotated[int, Field(ge=2, le=2**17)] | None = None
    """Number of centres of the data, found by k-means; null for as many as latents, but at most 2,048."""
    relaxation: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest distance of a direction from its convex combination, as a share of the combination's length."""


class Imported(Section):
    """An SAE trained by another library (docs/users/interop.md), with its own d_sae and k."""

    has_unit_directions: ClassVar[bool] = False

    kind: Literal["imported"]
    path: str
    """Folder or file of the SAE, relative to the checkout or absolute."""
    format: str | None = None
    """saelens, sparsify, saev, sae_for_vlm, dictionary_learning, overcomplete or ommatid; null to recognise it by its files."""
    values: Annotated[dict[str, str], Field(default_factory=dict)]
    """Values that the files do not contain, such as {k: "32"} (docs/users/interop.md)."""

    @property
    def is_aligned(self) -> bool:
        """False, since the SAE is not trained here."""
        return False

    @property
    def aims_at_k(self) -> bool:
        """False, since the SAE is not trained here."""
        return False


TrainedVariant = TopK | BatchTopK | Matryoshka | ReLU | JumpReLU | Gated | Archetypal
Variant = Annotated[TrainedVariant | Imported, Field(discriminator="kind")]
