"""Kinds of SAE; each that is trained here is made by `ommatid/sae/variants/<kind>.py`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ommatid.config.section import Section


class Trained(Section):
    """What training asks of a kind of SAE."""

    @property
    def is_aligned(self) -> bool:
        """Whether encoders are kept near their directions, where the kind has that choice."""
        return getattr(self, "aligned", False)

    @property
    def aims_at_k(self) -> bool:
        """Whether k latents are to fire a token; not where the weight of a penalty is given, whatever that leads to."""
        return True


class TopK(Trained):
    """Of every token the k largest latents fire (arXiv 2406.04093)."""

    kind: Literal["topk"]
    aligned: bool = False
    """Keep encoders near their directions (in the spirit of arXiv 2605.18629): fewer latents die, and they say more of unseen images."""


class BatchTopK(Trained):
    """Of every batch the k · batch largest latents fire; used with the average threshold of training (arXiv 2412.06410)."""

    kind: Literal["batch_topk"]
    aligned: bool = False
    """Keep encoders near their directions (in the spirit of arXiv 2605.18629): fewer latents die, and they say more of unseen images."""


class Matryoshka(Trained):
    """BatchTopK whose first latents must reconstruct by themselves, for several prefixes of the dictionary (arXiv 2503.17547)."""

    kind: Literal["matryoshka"]
    aligned: bool = False
    """Keep encoders near their directions (in the spirit of arXiv 2605.18629): fewer latents die, and they say more of unseen images."""
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


class ReLU(Trained):
    """Whatever is positive fires; an L1 penalty keeps it sparse; dead latents are drawn anew (Bricken et al. 2023)."""

    kind: Literal["relu"]
    l1: Annotated[float, Field(gt=0)] | None = None
    """Weight of the mean L1 norm of a token's activations; null: steered so that k latents fire a token."""

    @property
    def aims_at_k(self) -> bool:
        """See `Trained`."""
        return self.l1 is None


class JumpReLU(Trained):
    """Each latent fires above a threshold of its own that is learned through a straight-through estimator (arXiv 2407.14435)."""

    kind: Literal["jumprelu"]
    sparsity: Literal["l0", "tanh"] = "l0"
    """What is penalised: the number of firing latents, or the sum of tanh(4 · act / scale) (Conerly et al. 2025)."""
    bandwidth: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Width of the estimator's kernel around a threshold, as a share of the mean activation."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Of the penalty; null: steered so that k latents fire a token."""

    @property
    def aims_at_k(self) -> bool:
        """See `Trained`."""
        return self.weight is None


class Gated(Trained):
    """One set of weights decides which latents fire, with magnitudes of their own (arXiv 2404.16014)."""

    kind: Literal["gated"]
    l1: Annotated[float, Field(gt=0)] | None = None
    """Weight of the mean L1 norm of a token's gates; null: steered so that k latents fire a token."""

    @property
    def aims_at_k(self) -> bool:
        """See `Trained`."""
        return self.l1 is None


class Archetypal(Trained):
    """BatchTopK whose directions are near convex combinations of centres of the data, so that seeds agree (RA-SAE, arXiv 2502.12892)."""

    kind: Literal["archetypal"]
    points: Annotated[int, Field(ge=2, le=2**17)] | None = None
    """Centres of the data, found by k-means; null: as many as latents, 2,048 at most."""
    relaxation: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How far, at most, a direction may leave the combination, as a share of its length."""


class Imported(Section):
    """An SAE that another library trained (docs/users/interop.md); d_sae and k are what it has."""

    kind: Literal["imported"]
    path: str
    """Its folder or file, relative to the checkout or absolute."""
    format: str | None = None
    """saelens, sparsify, saev, sae_for_vlm, dictionary_learning, overcomplete or ommatid; null: found by the files."""
    values: Annotated[dict[str, str], Field(default_factory=dict)]
    """What the files don't say, such as {k: "32"}: docs/users/interop.md."""

    @property
    def is_aligned(self) -> bool:
        """See `Trained`; it was trained elsewhere."""
        return False

    @property
    def aims_at_k(self) -> bool:
        """See `Trained`; whatever its k is, it was aimed at elsewhere."""
        return False


TrainedVariant = TopK | BatchTopK | Matryoshka | ReLU | JumpReLU | Gated | Archetypal
Variant = Annotated[TrainedVariant | Imported, Field(discriminator="kind")]
