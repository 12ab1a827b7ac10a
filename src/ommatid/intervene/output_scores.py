"""Output scores of many latents by a single edit of each, to choose those that are worth a test.

Arad et al. (2025, arXiv 2505.20063) choose latents for steering in this way, beside how well they are labelled.
"""

from collections.abc import Sequence

import torch

from ommatid.errors import InputError
from ommatid.extract.drawn import draw_images
from ommatid.images.labels import list_split
from ommatid.intervene.edit import Edit
from ommatid.intervene.latent_test import raised_count
from ommatid.intervene.study import Study
from ommatid.metrics.interventions import output_score, raised_most

N_TRIED = 16
"""Number of images; on each half, the classes are chosen that are raised on the other half. They are training images, on which no latent is
tested: on the images that chose it, a latent does more than on others."""
AT_ONCE = 32
"""Number of latents that are set in one call of the model."""


def output_scores(study: Study, latents: Sequence[int]) -> dict[int, float]:
    """Return the mean output score of setting each latent to dose 1 on all tokens of a few training images; see `metrics.output_score`.

    Args:
        study: The study, from whose output classes are read.
        latents: The latents.

    Returns:
        Score by latent, for those that fire on a sampled token.

    Raises:
        InputError: There are fewer than two training images.
    """
    subject, readout = study.subject, study.readout
    assert readout, "no class is read from the output"
    images = subject.inputs["images"]
    drawn = draw_images(images, list_split(images, "train"), N_TRIED).numbers.tolist()
    if len(drawn) < 2:
        raise InputError("latents cannot be ranked by output_score, as there are no training images; name ms in intervene.latents.by")
    halves = torch.arange(len(drawn)).split(len(drawn[::2]))
    pixels = torch.cat([batch for part in (drawn[::2], drawn[1::2]) for _, batch in subject.load_pixels(part)])
    read = subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name]
    found: dict[int, float] = {}
    for start in range(0, len(latents), AT_ONCE):
        described = [one for one in subject.describe(latents[start : start + AT_ONCE]) if one.n_firing]
        editor = subject.editor(described)
        codes = editor.read(read) if subject.reads != subject.writes else None
        edits = [editor.replacement(Edit((one.latent,), "set", 1.0), codes) for one in described]
        outputs = subject.model.splice(pixels, subject.writes.name, [lambda tokens: tokens, *edits])
        plain, *edited = (study.among_common(readout.log_probabilities(one.float().cpu())) for one in outputs)
        for one, log_p in zip(described, edited, strict=True):
            raised = [raised_most((log_p - plain)[half].sum(0), raised_count(plain.shape[1])) for half in halves]
            scores = [output_score(plain[half], log_p[half], of_other) for half, of_other in zip(halves, reversed(raised), strict=True)]
            found[one.latent] = float(torch.cat(scores).mean())
    return found
