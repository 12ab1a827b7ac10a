"""The embeddings of images in the joint image-text space that extraction stores beside the activations."""

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ommatid.activations.columns import from_float32
from ommatid.store import Artefact


def read_joint(activations: Artefact, images: Int64[np.ndarray, " images"]) -> Float32[Tensor, "images d_joint"]:
    """Read the joint embeddings of some images, `(images, d_joint)` float32, given their numbers, ascending, `(images,)`."""
    joint = torch.empty(len(images), activations.summary["d_joint"])
    for batch in activations.iter_batches("embeddings", ["image", "joint"], n_rows=4096):
        numbers = batch["image"].to_numpy()
        place = np.searchsorted(images, numbers).clip(max=len(images) - 1)
        keep = images[place] == numbers
        joint[torch.from_numpy(place[keep])] = from_float32(batch["joint"])[torch.from_numpy(keep)]
    return joint
