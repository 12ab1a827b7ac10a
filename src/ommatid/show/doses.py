"""Dose curves: what setting a latent to a dose does to the model's output, beside the controls of the same edit."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ommatid.show.svg import Plot, draw_curves

DECIDING = """
    SELECT max(outcome) AS outcome FROM interventions WHERE sae = $sae AND outcome IN ('toward_label', 'word_log_odds')
"""
"""SQL for the outcome that decides the statuses of an SAE: that of answers, if the model answers in words."""
DOSES = f"""
    WITH of_latent AS (SELECT * FROM interventions WHERE sae = $sae AND latent = $latent)
    SELECT
        outcome, arm, dose, of_latent.value, low, high, n_draws, says.value AS says,
        (SELECT value FROM of_latent WHERE outcome = 'says_label' AND arm = 'none') AS says_plain
    FROM of_latent LEFT JOIN (SELECT arm, dose, value FROM of_latent WHERE outcome = 'says_label') AS says USING (arm, dose)
    WHERE outcome = ({DECIDING.strip()}) ORDER BY arm, dose
"""
"""SQL for the dose curves of a latent, and for the share of answers that say its label if the model answers in words."""


@dataclass(frozen=True)
class Outcome:
    """An outcome that decides statuses, in words; {} stands for what the page calls labels."""

    axis: str
    """Name of its axis."""
    does: str
    """What a causal latent does."""
    do: str
    """The same, as an infinitive."""
    effect: str
    """What an effect is."""
    rivals: str = ""
    """The further control of a causal latent, that of other labels, if there is one."""

    def named(self, label: str) -> "Outcome":
        """Return the words with what the page calls labels."""
        return Outcome(*(words.format(label) for words in dataclasses.astuple(self)))


OUTCOMES = {
    "toward_label": Outcome(
        "closer to its {}, cosine",
        "moves images toward its {}",
        "move images toward its {}",
        "the change of the cosine of image and {}, less that of the other labels, in the direction that the edit promises",
        ", and more than toward other {}s",
    ),
    "word_log_odds": Outcome(
        "log-odds of saying its {}, nats",
        "makes the model say its {}",
        "make the model say its {}",
        "the change of the log-odds that an answer begins with the first word of the {}, in the direction that the edit promises",
    ),
}
"""The outcomes that decide statuses, by their name in `interventions`."""
ARMS = {
    "targeted": "this latent",
    "sign_flipped": "the other way",
    "random_latent": "other latents",
    "random_direction": "random directions",
    "diff_means": "difference of means",
    "other_label": "toward other names",
}
"""What pages call the arms of an intervention whose curves they draw."""
STATUSES_IN_WORDS = {"causal": "causal", "reads_only": "reads only", "breaks_model": "breaks the model", "untested": "untested"}
"""What pages call the causal statuses."""
ALL_ARMS = {**ARMS, "untouched": "reconstruction alone", "prompt": "the name in the question"}
"""What pages call all arms in tables; the last two have no dose."""


def find_outcome(rows: Sequence[Mapping[str, Any]], label: str = "name") -> Outcome:
    """Return the outcome of the answer to `DOSES` or `DECIDING`, in words, given what the page calls labels."""
    found = rows[0]["outcome"] if rows else None
    return OUTCOMES[found or "toward_label"].named(label)


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
    return draw_curves(title, "dose", find_outcome(rows, label).axis, curves, ARMS["targeted"], width, height) if curves else None
