"""The reference of a champion: what new images are compared with, kept beside the champion so that its data may go."""

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from ommatid import schemas
from ommatid.activations.columns import from_float16, from_float32, to_binary
from ommatid.compute.evenly import spread_evenly
from ommatid.config.evaluate import ImageActivation
from ommatid.drift.measure import Measured, measure
from ommatid.errors import ArtefactError
from ommatid.events import Listener, ignore
from ommatid.sae.model import SAE
from ommatid.store import Artefact, Draft, open_artefact
from ommatid.store.filesystem import open_folder, sync, temporary_path
from ommatid.store.per_sae import read_config
from ommatid.summaries import DriftReferenceSummary, check_keys

KIND = "drift_reference"
N_IMAGES = 4096
"""Largest number of images of each sample: of training images whose embeddings are kept, and of evaluation images that are encoded."""


@dataclass(frozen=True)
class Extraction:
    """The images of a data set, and what the networks gave for them."""

    images: Artefact
    """The images."""
    activations: Artefact
    """Activations that the champion encodes, with the judge's embeddings."""
    target: Artefact | None = None
    """Activations that a transcoder decodes; None for an autoencoder."""

    @cached_property
    def rows(self) -> list[tuple[int, str, str]]:
        """Number, id and split of each image, in the order of the table `images`."""
        table = self.images.read("images", ["image", "image_id", "split"])
        return list(zip(*(table[name].to_pylist() for name in ("image", "image_id", "split")), strict=True))

    @property
    def made_with(self) -> dict[str, Any]:
        """What must be equal for numbers of two extractions to be comparable."""
        summary, params = self.activations.summary, self.activations.manifest.params
        names = ("model", "hookpoint", "d_model", "tokens_per_image", "judge", "d_judge")
        target = {"target": self.target.summary["hookpoint"]} if self.target else {}
        return {name: summary[name] for name in names} | {"tokens": params.get("tokens")} | target

    def judge(self, numbers: Int64[np.ndarray, " images"]) -> Float16[Tensor, "embedded width"]:
        """Read the main judge's embeddings of some images as float16, in no order; images on which it failed are left out."""
        wanted, found = np.sort(numbers), [torch.empty(0, self.activations.summary["d_judge"], dtype=torch.float16)]
        for batch in self.activations.iter_batches("embeddings", ["image", "judge"], n_rows=4096) if len(wanted) else ():
            images = batch["image"].to_numpy()
            place = np.searchsorted(wanted, images).clip(max=len(wanted) - 1)
            embeddings = from_float32(batch["judge"])[torch.from_numpy(wanted[place] == images)]
            found.append(embeddings[embeddings.isfinite().all(1)].half())
        return torch.cat(found)


@dataclass(frozen=True)
class Reference:
    """The opened reference of a champion."""

    artefact: Artefact
    """Its artefact."""

    @property
    def made_with(self) -> Mapping[str, Any]:
        """What must be equal for numbers of two extractions to be comparable."""
        return self.artefact.summary["made_with"]

    @property
    def image_activation(self) -> ImageActivation:
        """How activations of an image's tokens become one."""
        return self.artefact.summary["image_activation"]

    @cached_property
    def known(self) -> frozenset[bytes]:
        """Ids of all images of the champion's data set, as bytes."""
        return frozenset(self.artefact.read("known")["image_id"].to_pylist())

    def embeddings(self) -> Float16[Tensor, "images width"]:
        """Read the judge's embeddings of a sample of training images."""
        return from_float16(self.artefact.read("embeddings")["judge"])

    def measured(self) -> Measured:
        """Read what the champion's SAE does on a sample of its evaluation images."""
        evaluated, fired = self.artefact.read("evaluated"), self.artefact.read("fired")
        images = evaluated["image"].to_numpy().astype(np.int64)
        rows = np.searchsorted(images, fired["image"].to_numpy())
        latents, acts = fired["latent"].to_numpy().astype(np.int64), fired["act"].to_numpy()
        return Measured(images, evaluated["error"].to_numpy(), evaluated["variance"].to_numpy(), rows, latents, acts)


def open_reference(folder: Path) -> Reference | None:
    """Open the reference in a folder; None if there is none.

    Raises:
        ArtefactError: It is damaged.
    """
    return Reference(open_artefact(folder, KIND)) if folder.exists() else None


def write_reference(
    folder: Path,
    sae: Artefact,
    extraction: Extraction,
    image_activation: ImageActivation,
    among: Collection[str] | None = None,
    on_event: Listener = ignore,
) -> None:
    """Write the reference of a champion, unless the folder exists. It appears whole or not at all.

    It holds the ids of all images, the judge's embeddings of up to `N_IMAGES` training images, and what the SAE does on up to `N_IMAGES`
    evaluation images; both samples are spread evenly over all.

    Args:
        folder: Folder to write, beside the champion's SAE.
        sae: The champion's SAE.
        extraction: Images and activations of its training.
        image_activation: How its evaluation made the activations of an image's tokens one.
        among: Ids of the champion's images, if the data set has gained others since; None for all.
        on_event: Called with each progress event.

    Raises:
        ArtefactError: The activations are damaged, do not belong to the images or are of another model, or no image is of one of the
            splits.
    """
    if folder.exists():
        return
    trained, here = read_config(sae)["model"], extraction.activations.summary["model"]
    if trained != here:
        raise ArtefactError(f"{extraction.activations.url}: was made with the model {here}, and {sae.summary['sae']} with {trained}")
    chosen = [row for row in extraction.rows if among is None or row[1] in among]
    of_split = {split: np.array([image for image, _, of in chosen if of == split], np.int64) for split in ("train", "eval")}
    if lacking := [split for split, numbers in of_split.items() if len(numbers) < 2]:
        raise ArtefactError(f"{extraction.images.url}: no two images of the champion are of the split {' or '.join(lacking)}")
    train, evaluated = (numbers[spread_evenly(len(numbers), N_IMAGES)] for numbers in of_split.values())
    measured = measure(SAE.load(sae.path), extraction.activations, extraction.target, {"eval": evaluated}, image_activation, on_event)
    judge = extraction.judge(train)
    tables = {
        "known": pa.table([[bytes.fromhex(image_id) for _, image_id, _ in chosen]], schema=schemas.KNOWN),
        "embeddings": pa.table([to_binary(judge, torch.float16)], schema=schemas.drift_embeddings(judge.shape[1])),
        "evaluated": pa.table([measured.images, measured.error, measured.variance], schema=schemas.EVALUATED),
        "fired": pa.table([measured.images[measured.rows], measured.latents, measured.acts], schema=schemas.FIRED),
    }
    summary = DriftReferenceSummary(
        made_with=extraction.made_with,
        image_activation=image_activation,
        n_images=len(chosen),
        n_embedded=len(judge),
        n_encoded=len(measured.images),
    )
    write_artefact(folder, KIND, {"train": sae, "extract": extraction.activations, "images": extraction.images}, tables, summary)


def write_artefact(
    folder: Path, kind: str, inputs: Mapping[str, Artefact], tables: Mapping[str, pa.Table], summary: Mapping[str, Any], **params: Any
) -> Artefact:
    """Write small tables as an artefact beside its place, and rename it there, unless another process has done so meanwhile."""
    temporary = temporary_path(folder)
    try:
        (temporary / "scratch").mkdir(parents=True)
        digests = {name: artefact.digest for name, artefact in inputs.items()}
        draft = Draft(open_folder(temporary), temporary, open_folder(folder), kind, params, digests)
        for name, table in tables.items():
            draft.write_table(f"{name}.parquet", table, compression="zstd")
        check_keys(kind, summary)
        draft.seal(summary)
        sync(temporary)
        if not folder.exists():
            os.rename(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_artefact(folder, kind)
