"""Arms of an edit: the model as it is, with the edit, and with the controls without which no effect of an edit is known.

- none: the model as it is.
- untouched: x̂ replaces x on all kept tokens, without the error; what reconstruction alone does.
- targeted: the edit.
- sign_flipped: what the edit adds, times −1.
- random_latent: the edit along the directions of other latents, which fire about as often.
- random_direction: the edit along a Gaussian direction.
- diff_means: the edit along the mean of tokens on which the latent fires, minus the mean of the others.
- prompt: for a model that answers in words, no edit, but a question that says the label; it is not made here.

On every token, the controls after `targeted` add a vector of the same norm as the edit does, and nothing where the edit adds nothing.

Suffixes: b images, k kept tokens, d width of the edited activations, s latents of the SAE, l latents of the edit, r draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.compute.controls import N_DRAWS
from ommatid.compute.nearest import ALIKE
from ommatid.errors import InputError
from ommatid.intervene.edit import Codes, Delta, Edit, Editor
from ommatid.vlm import Replacement

ArmName = Literal["none", "untouched", "targeted", "sign_flipped", "random_latent", "random_direction", "diff_means", "prompt"]


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to run the model on a batch of images."""

    name: ArmName
    """Name of the arm."""
    draw: int
    """Number of the draw of a random control, from 0; 0 for all other arms."""
    edit: Edit | None
    """The edit, whose dose it is; None for the arms `none` and `untouched`."""
    replacement: Replacement
    """Replacement for `VisionModel.splice`."""


@dataclass(frozen=True, eq=False)
class Controls:
    """Directions of the controls of one edit, the same for all images and doses."""

    latents: tuple[int, ...]
    """The edited latents."""
    random_latents: Int64[Tensor, "draws edited"]
    """Latents that take the place of each edited one, `(r, l)`."""
    random_directions: Float32[Tensor, "draws d_out"]
    """Gaussian directions of unit norm, `(r, d)`."""
    diff_means: Float32[Tensor, " d_out"] | None
    """Difference of means, `(d,)`, of unit norm; None if there is none, as for a latent that fires on every token."""


def match_latents(
    densities: Float[Tensor, " d_sae"],
    is_live: Bool[Tensor, " d_sae"],
    directions: Float[Tensor, "d_sae d_out"],
    latents: Sequence[int],
    n: int,
    rng: np.random.Generator,
) -> Int64[Tensor, "n edited"]:
    """Choose live latents that fire about as often as given ones, to stand in for them as controls.

    Those with the nearest logarithm of the density are chosen, the nearest first, and among equally near ones at random. None is one of the
    given latents, or has the direction of one or its opposite (|cosine| > 0.9), or is chosen twice.

    Args:
        densities: Share of tokens on which each latent fires, `(s,)`.
        is_live: Whether each latent fires at all, `(s,)`.
        directions: Directions of any norm, `(s, d)`.
        latents: The given latents.
        n: Number of draws.
        rng: Generator of the draws. Fewer draws from the same seed are the first of more.

    Returns:
        The chosen latents, `(n, l)` int64: a row for each draw, and a column for each given latent.

    Raises:
        InputError: A given latent is dead, or there are too few live latents.
    """
    density = densities.double().cpu().numpy()
    allowed = is_live.cpu().numpy() & (density > 0)
    if dead := [latent for latent in latents if not allowed[latent]]:
        raise InputError(f"latent {dead[0]} is dead: no latent matches the density of one that never fires; choose live latents")
    allowed &= ~_is_alike(directions, latents).cpu().numpy()
    candidates = np.flatnonzero(allowed)
    if len(candidates) < n * len(latents):
        need = f"{n} draws for {len(latents)} need {n * len(latents)}"
        raise InputError(f"only {len(candidates)} live latents differ from latents {tuple(latents)}, but {need}; make fewer draws")
    nearest = []
    for latent in latents:
        distance = np.abs(np.log(density[candidates]) - np.log(density[latent]))
        nearest.append(iter(candidates[np.lexsort((rng.random(len(candidates)), distance))].tolist()))
    taken: set[int] = set()
    chosen = torch.empty(n, len(latents), dtype=torch.int64)
    for draw, column in np.ndindex(n, len(latents)):
        other = next(other for other in nearest[column] if other not in taken)
        chosen[draw, column] = other
        taken.add(other)
    return chosen


def _is_alike(directions_sd: Float[Tensor, "d_sae d_out"], latents: Sequence[int]) -> Bool[Tensor, " d_sae"]:
    """Return whether each latent has the direction of one of the given latents, or its opposite; also if its own is zero, `(s,)`."""
    lengths = directions_sd.norm(dim=1)
    products = directions_sd @ normalize(directions_sd[list(latents)], dim=1).T
    is_alike = (products.abs() > ALIKE * lengths[:, None]).any(1) | (lengths == 0)
    is_alike[list(latents)] = True
    return is_alike


def draw_controls(
    editor: Editor,
    latents: Sequence[int],
    densities: Float[Tensor, " d_sae"],
    is_live: Bool[Tensor, " d_sae"],
    diff_means: Float[Tensor, " d_out"] | None,
    seed: int,
    n_draws: int = N_DRAWS,
) -> Controls:
    """Draw the controls of an edit. The draws depend on nothing but the SAE, its densities, the latents and the seed.

    Args:
        editor: Editor of the latents.
        latents: The edited latents.
        densities: Share of tokens on which each latent fires, `(s,)`.
        is_live: Whether each latent fires at all, `(s,)`.
        diff_means: Mean of the tokens on which an edited latent fires, minus the mean of the others, `(d,)`; None leaves the control out.
        seed: Seed of the draws.
        n_draws: Number of draws of each random control.

    Returns:
        The controls.

    Raises:
        InputError: As for `match_latents`; or the difference of means is zero or not finite.
    """
    if n_draws < 1:
        raise InputError(f"n_draws is {n_draws}; a random control needs at least one draw")
    if diff_means is not None and not 0 < diff_means.norm() < torch.inf:
        raise InputError(f"latents {tuple(latents)}: the difference of means is zero or not finite; give None to leave this control out")
    # A generator for each control, so that one does not depend on the draws of the other.
    of_latents, of_directions = (np.random.default_rng([seed, stream, *latents]) for stream in range(2))
    W_dec = editor.sae.W_dec
    gaussian = torch.from_numpy(of_directions.standard_normal((n_draws, editor.sae.d_out)))
    return Controls(
        tuple(latents),
        match_latents(densities, is_live, W_dec, latents, n_draws, of_latents),
        normalize(gaussian, dim=1).to(W_dec),
        None if diff_means is None else normalize(diff_means.double(), dim=0).to(W_dec),
    )


def make_arms(editor: Editor, edits: Sequence[Edit], controls: Controls, codes: Codes | None = None) -> list[Arm]:
    """Make all arms of edits that differ in their dose, for one call of `VisionModel.splice`.

    `none` and `untouched` come first, once; then, for each edit, `targeted`, `sign_flipped`, the draws of `random_latent`, those of
    `random_direction`, and `diff_means` if there is one. Arms may be used for any number of batches, and in parts, unless codes are given.

    Args:
        editor: Editor of the latents.
        edits: Edits of the latents of the controls.
        controls: Directions of the controls.
        codes: As for `Editor.replacement`, with x̂.

    Returns:
        The arms.

    Raises:
        InputError: As for `Editor.replacement`; or an edit is of other latents than the controls.
    """
    if odd := [edit.latents for edit in edits if edit.latents != controls.latents]:
        raise InputError(f"an edit is of latents {odd[0]}, but the controls are of {controls.latents}; draw controls for each")
    arms = [Arm("none", 0, None, lambda tokens: tokens), Arm("untouched", 0, None, editor.untouched(codes))]
    deltas = _make_deltas(editor.sae.W_dec, controls)
    for edit in edits:
        arms += [Arm(name, draw, edit, editor.replacement(edit, codes, delta)) for name, draw, delta in deltas]
    return arms


def _make_deltas(W_dec: Float32[Tensor, "d_sae d_out"], controls: Controls) -> list[tuple[ArmName, int, Delta]]:
    """Return the name, the draw and the function of each arm that changes activations by the norm of the edit."""
    directions = W_dec[list(controls.latents)]
    lengths = directions.norm(dim=1)

    def along(vector_d: Tensor) -> Delta:
        """Replace the direction of the edit by another one, of unit norm, for positive changes; for negative ones, by its opposite."""

        def delta(changes_bkl: Tensor) -> Tensor:
            sign = torch.where(changes_bkl @ lengths < 0, -1.0, 1.0)
            return (sign * (changes_bkl @ directions).norm(dim=-1))[..., None] * vector_d

        return delta

    def by_others(others_l: Tensor) -> Delta:
        """Replace each edited latent by another one."""
        of_others = normalize(W_dec[others_l], dim=1) * lengths[:, None]

        def delta(changes_bkl: Tensor) -> Tensor:
            return normalize(changes_bkl @ of_others, dim=-1) * (changes_bkl @ directions).norm(dim=-1, keepdim=True)

        return delta

    means = controls.diff_means
    return [
        ("targeted", 0, lambda changes: changes @ directions),
        ("sign_flipped", 0, lambda changes: -(changes @ directions)),
        *(("random_latent", draw, by_others(others)) for draw, others in enumerate(controls.random_latents)),
        *(("random_direction", draw, along(vector)) for draw, vector in enumerate(controls.random_directions)),
        *([("diff_means", 0, along(means))] if means is not None else []),
    ]
