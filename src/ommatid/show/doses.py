"""Dose curves: what setting a latent to a dose does to the model's output, beside the controls of the same edit."""

from collections.abc import Mapping, Sequence
from typing import Any

from ommatid.show.svg import Plot, draw_curves

DOSES = """
    SELECT arm, dose, value, low, high, n_draws FROM interventions
    WHERE sae = $sae AND latent = $latent AND outcome = 'toward_label' ORDER BY arm, dose
"""
ARMS = {
    "targeted": "this latent",
    "sign_flipped": "the other way",
    "random_latent": "other latents",
    "random_direction": "random directions",
    "diff_means": "difference of means",
}
"""What pages call the arms of an intervention."""


def draw_doses(rows: Sequence[Mapping[str, Any]], label: str = "name", width: int = 560, height: int = 300) -> Plot | None:
    """Draw the effect of setting a latent by dose, beside those of its controls.

    Args:
        rows: Answer to `DOSES`.
        label: What the page calls labels.
        width: Width of the plot.
        height: Height of the plot.

    Returns:
        The plot; None if there are no rows.
    """
    curves = {text: [(row["dose"], row["value"]) for row in rows if row["arm"] == arm] for arm, text in ARMS.items()}
    curves = {text: points for text, points in curves.items() if points}
    title = "Effect of setting the latent to a dose, and of the controls"
    return draw_curves(title, "dose", f"closer to its {label}, cosine", curves, ARMS["targeted"], width, height) if curves else None
