"""What labels and a taxonomy say of each latent of an SAE, from its firings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ommatid.halves import Fired, Halves
from ommatid.metrics import label_entropy, lca_depth, purity

N_TOP = 64
"""Images of purity@64; among them those of the taxonomy are looked for."""
N_LCA = 16
"""Images whose lowest common ancestor is taken."""


@dataclass(frozen=True)
class Meaning:
    """Of each latent, (d_sae,) float64; NaN where it is undefined."""

    purity_64: Tensor
    """Purity@64."""
    label_entropy: Tensor
    """Activation-weighted entropy of the labels of all images on which it fires."""
    lca_depth: Tensor
    """Depth of the lowest common ancestor of the strongest images that have a path."""


def measure_meaning(
    fired: Iterable[Fired], halves: Halves, labels: Mapping[int, str], paths: Mapping[int, Sequence[str]], d_sae: int
) -> Meaning:
    """Measure all latents.

    A taxonomy may have holes: of a latent's 64 strongest images the 16 strongest with a path count, and a latent with fewer has no
    depth. Fewer images have a deeper ancestor by chance, so depths are compared over equally many.

    Args:
        fired: The latents that fire.
        halves: The evaluation images.
        labels: Class of each that has one.
        paths: Path from the root of the taxonomy of each that has one.
        d_sae: Latents.
    """
    images = halves.images.tolist()
    classes = {name: code for code, name in enumerate(sorted(set(labels.values())))}
    codes = np.array([classes[labels[image]] if image in labels else -1 for image in images], dtype=np.int64)
    path_of = [paths.get(image) for image in images]
    found = Meaning(*(torch.full((d_sae,), torch.nan, dtype=torch.float64) for _ in range(3)))
    for one in fired:
        top, code = one.rows[:N_TOP], codes[one.rows]
        known = code >= 0
        found.purity_64[one.latent] = purity([code[:N_TOP][known[:N_TOP]].tolist()], N_TOP)[0]
        found.label_entropy[one.latent] = label_entropy(np.bincount(code[known], weights=one.acts[known]))
        placed = [path for row in top.tolist() if (path := path_of[row])][:N_LCA]
        if len(placed) == N_LCA:
            found.lca_depth[one.latent] = lca_depth(placed)
    return found
