"""The networks that run on each image: the explained model, the judges, and the namer if it is another model."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, UInt8
from pydantic import TypeAdapter
from torch import Tensor

from ommatid.config import ExtractParams, Model
from ommatid.errors import ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.store import Artefact
from ommatid.vlm import Judge, VisionModel, check_hookpoint, load_judge, load_model
from ommatid.vlm.network_checks import check_judge, check_model
from ommatid.vlm.precision import resolve_dtype
from ommatid.vlm.preprocess import Preprocess

PROBED = 64
"""Number of components of each output vector that become part of a probe."""
SAME = 0.01
"""Largest relative difference between two probes of the same weights on different machines."""


@dataclass(frozen=True)
class Output:
    """One of the vectors, or lists of tokens, that are kept of each image."""

    network: int
    """Index of the network in `Networks.members`."""
    hookpoint: str | None
    """Name of the hookpoint whose tokens they are; None for an embedding."""
    shape: tuple[int, ...]
    """Shape for one image: (tokens, d_model), or (d_joint,) or (d_judge,)."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type: float16 for tokens, and float32 for embeddings."""
        return torch.float16 if self.hookpoint else torch.float32

    @property
    def width(self) -> int:
        """Bytes for one image."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Outputs:
    """Outputs of all networks for a batch of images, on the CPU."""

    tokens: Mapping[str, Float16[Tensor, "batch _tokens _d_model"]]
    """Kept tokens by hookpoint, `(batch, tokens, d_model)` float16."""
    joint: Float32[Tensor, "batch d_joint"]
    """Embeddings in the joint image-text space, `(batch, d_joint)` float32, unit norm."""
    judges: tuple[Float32[Tensor, "batch _d_judge"], ...]
    """Embeddings by each judge, `(batch, d_judge)` float32, unit norm. A row is NaN if the judge failed on the image."""


def find_device() -> str:
    """Return the device that networks run on: the GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_explained(params: Mapping[str, Any]) -> VisionModel:
    """Load the model whose activations an extraction captured, onto this machine's device.

    Args:
        params: The params section in the extraction's manifest.

    Returns:
        The model.

    Raises:
        ModelError: The model cannot be loaded.
    """
    return load_model(TypeAdapter(Model).validate_python(params["model"]), params["dtype"], find_device())


def load_picker(model: VisionModel, activations: Artefact) -> TokenPicker:
    """Return the picker of the tokens that an extraction kept at one hookpoint.

    Raises:
        ModelError: The model has no such hookpoint, or the hookpoint no such token.
    """
    name = activations.summary["hookpoint"]
    return TokenPicker(name, check_hookpoint(model, name), activations.manifest.params["tokens"])


class Networks:
    """All networks of an `extract` section, loaded on one device.

    Raises:
        ModelError: A model cannot be loaded, a hookpoint is unknown or lacks the tokens, or no model can embed text.
    """

    def __init__(self, params: ExtractParams) -> None:
        self.device = find_device()
        self.params = params
        self.model = load_model(params.model, params.dtype, self.device)
        self.pickers = {name: TokenPicker(name, check_hookpoint(self.model, name), params.tokens) for name in params.hookpoints}
        self.namer = load_model(params.namer, params.dtype, self.device) if params.namer else self.model
        if self.namer.d_embed is None:
            key = "extract.namer" if params.namer else "extract.model"
            raise ModelError(
                f"{key}: {self.namer.name} has no text tower, and latents are labelled in a joint image-text space; "
                "set extract.namer to a model that has one, such as {kind: lite}"
            )
        self.judges = tuple(load_judge(judge, params.dtype, self.device) for judge in params.judges)
        others = () if self.namer is self.model else (self.namer,)
        self.members: tuple[VisionModel | Judge, ...] = (self.model, *others, *self.judges)
        """The networks that run on each image: the explained model, the namer if it is another model, and the judges."""
        self._first_judge = 1 + len(others)
        self.joint = Output(len(others), None, (self.d_joint,))
        """The embedding in the joint space."""
        self.outputs: tuple[Output, ...] = (
            *(Output(0, name, (len(picker.places), picker.hookpoint.d_model)) for name, picker in self.pickers.items()),
            self.joint,
            *(Output(self._first_judge + i, None, (judge.d_embed,)) for i, judge in enumerate(self.judges)),
        )
        """All outputs: the tokens at each hookpoint, the embedding in the joint space, and that of each judge."""
        self.captured = {output.hookpoint: output for output in self.outputs if output.hookpoint}
        """Outputs that are tokens, by hookpoint."""
        self.judged = [output for output in self.outputs if output.network >= self._first_judge]
        """Outputs of the judges."""

    @property
    def d_joint(self) -> int:
        """Width of the joint image-text space."""
        assert self.namer.d_embed is not None
        return self.namer.d_embed

    @cached_property
    def preprocesses(self) -> tuple[Preprocess, ...]:
        """The distinct preprocessings of the networks."""
        return self.preprocesses_of(self.outputs)

    def preprocesses_of(self, wanted: Collection[Output]) -> tuple[Preprocess, ...]:
        """Return the distinct preprocessings of the networks of some outputs."""
        used = {output.network for output in wanted}
        return tuple(dict.fromkeys(network.preprocess for i, network in enumerate(self.members) if i in used))

    def check(self) -> None:
        """Check that the outputs of each network can be trusted (see `vlm.trust`). This is done once per run, not in every worker.

        Raises:
            ModelError: The outputs of a network cannot be trusted.
        """
        dtype = resolve_dtype(self.params.dtype, self.device)
        check_model(self.model, tuple(self.pickers), "extract.model", dtype)
        if self.namer is not self.model:
            check_model(self.namer, (), "extract.namer", dtype)
        for judge in self.judges:
            check_judge(judge, "extract.judge", dtype)

    def run(self, pixels: tuple[UInt8[Tensor, "batch _height _width 3"], ...]) -> Outputs:
        """Run each network once over a batch of images.

        Args:
            pixels: The batch as each of `preprocesses` makes it, `(batch, height, width, 3)` uint8.

        Returns:
            The outputs, on the CPU.
        """
        found = self.forward(dict(zip(self.preprocesses, pixels, strict=True)), self.outputs)
        tokens = {name: found[output] for name, output in self.captured.items()}
        return Outputs(tokens, found[self.joint], tuple(found[output] for output in self.judged))

    def forward(
        self, pixels: Mapping[Preprocess, UInt8[Tensor, "batch _height _width 3"]], wanted: Collection[Output]
    ) -> dict[Output, Tensor]:
        """Run the networks of some outputs once over a batch of images.

        Args:
            pixels: The batch as each preprocessing of these networks makes it, `(batch, height, width, 3)` uint8.
            wanted: The outputs to compute.

        Returns:
            The outputs, `(batch, *shape)` on the CPU: tokens in float16, and embeddings in float32, with unit norm. The embedding of an
            image on which a judge failed is NaN.
        """
        of = {preprocess: x.to(self.device, non_blocking=True) for preprocess, x in pixels.items()}
        found: dict[Output, Tensor] = {}
        for index, network in enumerate(self.members):
            outputs = [output for output in wanted if output.network == index]
            if outputs:
                found.update(self._forward(network, of[network.preprocess], outputs))
        return found

    def _forward(self, network: VisionModel | Judge, pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        if outputs[0].network >= self._first_judge:
            return {outputs[0]: _unit_or_nan(cast(Judge, network).embed(pixels))}
        captured = cast(VisionModel, network).capture(pixels, tuple(output.hookpoint for output in outputs if output.hookpoint))
        found: dict[Output, Tensor] = {}
        for output in outputs:
            if output.hookpoint:
                found[output] = self.pickers[output.hookpoint].pick(captured.tokens[output.hookpoint]).to("cpu", torch.float16)
            else:
                assert captured.embedding is not None
                found[output] = _unit(captured.embedding)
        return found

    @property
    def is_exact(self) -> bool:
        """Whether the networks compute in float32, so that there is no rounding error relative to it."""
        return resolve_dtype(self.params.dtype, self.device) == torch.float32

    def rounding(self, pixels: UInt8[Tensor, "batch _height _width 3"]) -> dict[str, float]:
        """Measure the rounding error of the kept tokens relative to float32: the norm of the difference over the norm in float32.

        Args:
            pixels: A batch of images as the preprocessing of the explained model makes it.

        Returns:
            The relative error, by hookpoint.
        """
        exact = load_model(self.params.model, "float32", self.device)
        x = pixels.to(self.device)
        ours, theirs = (model.capture(x, tuple(self.pickers)).tokens for model in (self.model, exact))
        return {name: _difference(picker.pick(ours[name]), picker.pick(theirs[name])) for name, picker in self.pickers.items()}

    @cached_property
    def probes(self) -> dict[Output, list[float]]:
        """A few components of each output for one random image, from which `is_same` recognises the same weights."""
        rng = np.random.default_rng(0)
        pixels = {p: torch.from_numpy(rng.integers(0, 256, (1, *p.crop, 3), dtype=np.uint8)) for p in self.preprocesses}
        outputs = self.forward(pixels, self.outputs)
        return {o: outputs[o].float().reshape(1, -1, o.shape[-1]).mean(1)[0, :PROBED].tolist() for o in self.outputs}

    def probe(self) -> list[float]:
        """Return the probes of all outputs as one vector."""
        return [value for probe in self.probes.values() for value in probe]


def is_same(probe: list[float], other: list[float]) -> bool:
    """Return whether two probes come from the same weights."""
    x, y = np.nan_to_num(probe), np.nan_to_num(other)
    return x.shape == y.shape and bool(np.linalg.norm(x - y) <= SAME * np.linalg.norm(y))


def _difference(x: Float[Tensor, "*shape"], exact: Float[Tensor, "*shape"]) -> float:
    x, exact = x.double(), exact.double()
    difference = float(((x - exact).square().sum() / exact.square().sum()).sqrt())
    return float(f"{difference:.3g}")  # Rounded because the last digits depend on the number of threads, and manifests must not.


def _unit(x_bd: Float[Tensor, "batch d"]) -> Float32[Tensor, "batch d"]:
    return torch.nn.functional.normalize(x_bd.float(), dim=1).cpu()


def _unit_or_nan(x_bd: Float[Tensor, "batch d"]) -> Float32[Tensor, "batch d"]:
    """Normalise rows to unit norm. Rows that are zero or not finite become NaN."""
    lengths = x_bd.double().norm(dim=1)
    return torch.where(((lengths > 0) & lengths.isfinite())[:, None].cpu(), _unit(x_bd), torch.nan)
