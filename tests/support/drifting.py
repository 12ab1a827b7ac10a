"""Planted images whose classes decide what the judge sees and which latents fire, so that a shift of classes is a known drift."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from ommatid import schemas, store
from ommatid.activations.columns import to_binary
from ommatid.config import DriftParams
from ommatid.drift import Champion, Check, Extraction, check, open_reference, write_reference
from ommatid.drift.check import Sample
from ommatid.drift.measure import Measured
from ommatid.images.examine import to_webp
from ommatid.store import Artefact
from support.small_saes import make_sae

N_CLASSES = 6
N_LATENTS = 48
"""Eight latents of each class."""
WIDTH = 8


@dataclass(frozen=True)
class World:
    """How images are drawn."""

    shares: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25, 0.0, 0.0)
    """Share of each class."""
    blur: float = 0.0
    """By how much all embeddings are moved, and activations weakened."""
    unexplained: float = 0.3
    """Share of the variance of activations that the SAE does not explain."""

    def draw(self, n: int, seed: int) -> Sample:
        """Draw a sample of images."""
        rng = np.random.default_rng(seed)
        classes = rng.choice(N_CLASSES, n, p=self.shares)
        centres = np.random.default_rng(0).normal(size=(N_CLASSES, WIDTH))
        embeddings = centres[classes] + 0.7 * rng.normal(size=(n, WIDTH)) + self.blur
        fires = rng.random((n, N_LATENTS)) < np.where(np.arange(N_LATENTS) % N_CLASSES == classes[:, None], 0.6, 0.04)
        rows, latents = fires.nonzero()
        acts = (1 + rng.gamma(2, size=len(rows))) / (1 + self.blur)
        variance = rng.gamma(5, size=n)
        error = self.unexplained * variance * rng.uniform(0.7, 1.3, n)
        measured = Measured(np.arange(n), error, variance, rows, latents, acts.astype(np.float32))
        return Sample(torch.from_numpy(embeddings).float(), measured)


NAME = "thresholds-20-k4-s0-00000000"
"""Name of the SAE that `write_sae` writes."""
RED = to_webp(Image.new("RGB", (8, 8), "red"))
D_MODEL, N_TOKENS, D_SAE = 8, 4, 20
"""Sizes of the data set that `write_extraction` writes."""


def write_sae(folder: Path, kind: str = "thresholds", **changes: object) -> Artefact:
    """Write an SAE with random weights as an artefact."""
    with store.open_draft(folder, "sae", {}, {}) as draft:
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as config:
            make_sae(kind, D_MODEL, D_SAE, **changes).save(weights, config)  # type: ignore[arg-type]
        draft.seal({"sae": NAME})
        return draft.publish(folder)


def write_extraction(
    root: Path, seeds: Mapping[str, range], shift: float = 0.0, params: Mapping[str, object] | None = None, picture: bool = False
) -> Extraction:
    """Write images and their activations and embeddings, each of which follows from its seed alone.

    Args:
        root: Folder for the artefacts.
        seeds: Seeds of images; those of the group `shifted` are moved.
        shift: By how much.
        params: Params of the extraction.
        picture: Whether thumbnails are pictures, of one red; otherwise they are texts.
    """
    ids = [(hashlib.sha256(f"{seed}".encode()).hexdigest(), seed, group) for group, some in seeds.items() for seed in some]
    rows = [
        {
            "image": number,
            "image_id": image_id,
            "path": f"{group}/{seed}.png",
            "split": "eval" if seed % 3 == 0 else "train",
            "width": 2,
            "height": 2,
            "label": None,
            "captions": [],
            "taxonomy": None,
            "thumbnail": RED if picture else f"picture of {seed}".encode(),
            "encoded": b"",
        }
        for number, (image_id, seed, group) in enumerate(ids)
    ]
    with store.open_draft(root / "images", "images", {}, {}) as draft:
        draft.write_table("images-00000.parquet", pa.Table.from_pylist(rows, schema=schemas.IMAGES), row_group_size=16)
        images = draft.seal({"n_images": len(rows)}) and draft.publish(root / "images")
    drawn = [
        np.random.default_rng(seed).normal(size=(N_TOKENS + 1, D_MODEL)) + (shift if group == "shifted" else 0) for _, seed, group in ids
    ]
    x = torch.from_numpy(np.stack(drawn))
    summary = {"model": "tiny", "hookpoint": "h", "d_model": D_MODEL, "tokens_per_image": N_TOKENS, "judge": "j", "d_judge": D_MODEL}
    with store.open_draft(root / "activations", "activations", params or {"tokens": "patch"}, {}) as draft:
        order = np.random.default_rng(0).permutation(len(rows))  # training rows are shuffled, evaluation rows by image
        for table, images_of in (("train", order), ("eval", np.arange(len(rows)))):
            numbers = np.array([number for number in images_of if rows[number]["split"] == table], np.int32)
            tokens = [(image, token) for token in range(N_TOKENS) for image in numbers]
            tokens = tokens if table == "train" else sorted(tokens)
            image, token = np.array(tokens, np.int32).reshape(-1, 2).T
            places = [np.zeros(len(image), np.int16)] * 2
            kinds = np.where(token == 0, "cls", "patch")
            columns = [image, token, kinds, *places, to_binary(x[image, token + 1], torch.float16)]
            draft.write_table(f"{table}-00000.parquet", pa.table(columns, schema=schemas.activations(D_MODEL, {})), row_group_size=50)
        judged = [np.arange(len(rows), dtype=np.int32), *[to_binary(x[:, 0], torch.float32)] * 2]
        draft.write_table("embeddings-00000.parquet", pa.table(judged, schema=schemas.embeddings(D_MODEL, D_MODEL)))
        activations = draft.seal(summary) and draft.publish(root / "activations")
    return Extraction(images, activations)


def make_drifted_check(root: Path) -> Check:
    """Make a check that found drift, with red pictures of the new images."""
    sae, known = write_sae(root / "sae"), write_extraction(root / "old", {"old": range(180)})
    write_reference(root / "drift", sae, known, "max")
    reference = open_reference(root / "drift")
    assert reference is not None
    new = write_extraction(root / "new", {"shifted": range(3000, 3060)}, shift=0.8, picture=True)
    found = check(DriftParams(min_images=30, alpha=0.2), root / "checks", Champion("key", sae, reference), new)
    assert found is not None and found.verdict == "drift"
    return found
