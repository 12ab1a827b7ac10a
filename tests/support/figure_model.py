"""A model of the drawn figures of which it is known what it reads, and an SAE planted on its activations.

Tokens at the first hookpoint hold the factors of the figure on the patches that it covers, and the background on the others, along random
directions, with noise. The rest of the model is an MLP, a mixture over patches, and readers in superposition: each reads two factors at
once, and writes both of their texts. They read shapes, colours and textures only. More texts than the output is wide are in superposition,
too.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ommatid import schemas
from ommatid.config import Params, TrainParams
from ommatid.evaluate.stage import evaluate
from ommatid.extract import networks
from ommatid.extract.stage import extract
from ommatid.images.figure import draw, draw_mask, make_figure
from ommatid.images.shapes import Plan
from ommatid.images.stage import run as make_images
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.vlm import Captured, Differentiated, Hookpoint, Replacement, Score
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.splicing import differentiate
from support.planted_vision import FACTORS, GROUPS, directions
from support.study import make_artefact, make_test_params

PLAN = Plan(n_images=400, size=48, seed=0)
"""Plan of the images."""
GRID = (6, 6)
D_MODEL, D_EMBED = 64, 32
NOISE = 0.05
"""Standard deviation of the noise on each component of an activation."""
DIRECTIONS, TEXTS = directions(D_MODEL, seed=1), directions(D_EMBED, seed=3)
"""Directions of the factors in the activations, and of their texts in the output, (factors, width)."""
READ = [FACTORS.index(name) for group in ("shape", "colour", "texture") for name in GROUPS[group]]
"""Factors that the model reads."""
N_READERS = 64
PLANTED = ("circle", "ring", "square", "star", "cross", "arrow", "red", "yellow", "green", "blue", "striped", "checked")
"""Factors of the first latents, each of which reads and writes one factor that the model reads."""
UNREAD = ("warm", "round", "white", "black", "top left", "centre")
"""Factors of the next latents, which the model does not read, although some go with factors that it reads."""
IN_VAIN = {"red": "warm", "star": "spiky", "striped": "bottom"}
"""Factors of the next latents, which fire where the first of two factors is, but write the second, which the model does not read."""
N_RANDOM = 120
"""Number of the other latents, which read and write mixtures of all factors."""
NAMES = (*PLANTED, *UNREAD, *IN_VAIN)
"""Factor of each planted latent."""


@cache
def activations() -> Mapping[bytes, Tensor]:
    """Return the tokens of all images at the first hookpoint, (patches, d_model), by pixels."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for number in range(PLAN.n_images):
        figure = make_figure(PLAN.seed, number)
        side = PLAN.size // GRID[0]
        covered = torch.from_numpy(draw_mask(figure, PLAN.size)).float().unfold(0, side, side).unfold(1, side, side).mean((2, 3)).flatten()
        codes = torch.zeros(len(covered), len(FACTORS))
        for name in figure.factors:
            share = 1 - covered if name == figure.background else covered
            codes[:, FACTORS.index(name)] = share * (1 + torch.rand(len(share), generator=generator))
        noise = NOISE * torch.randn(len(codes), D_MODEL, generator=generator)
        found[draw(figure, PLAN.size).tobytes()] = codes @ DIRECTIONS + noise
    return found


class FigureModel:
    """The model, which is also the judge. It knows every image by its pixels."""

    name = "figures"
    d_embed = d_output = D_EMBED
    text_templates = ("a photo of a {}",)
    logit_scale = 20.0
    preprocess = Preprocess((PLAN.size,), (PLAN.size, PLAN.size), "nearest", (0, 0, 0), (1, 1, 1))
    preprocessing = preprocess.as_json()
    hookpoints = {"first": Hookpoint(D_MODEL, (), GRID), "last": Hookpoint(D_MODEL, (), GRID)}  # noqa: RUF012

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.mlp = [torch.randn(D_MODEL, D_MODEL, generator=generator) / D_MODEL**0.5 for _ in range(2)]
        pairs = torch.tensor([READ[i % len(READ)] for i in range(2 * N_READERS)])[torch.randperm(2 * N_READERS, generator=generator)]
        reads = DIRECTIONS[pairs].view(N_READERS, 2, -1).sum(1) + 0.1 * torch.randn(N_READERS, D_MODEL, generator=generator)
        self.reads, self.writes = normalize(reads, dim=1), TEXTS[pairs].view(N_READERS, 2, -1).sum(1)
        self.bias = 0.2 * torch.randn(D_EMBED, generator=generator)

    def _first(self, pixels: Tensor) -> Tensor:
        return torch.stack([self._tokens(image) for image in pixels])

    def _tokens(self, image: Tensor) -> Tensor:
        """Return the tokens of an image; an unknown one has its brightness along a direction of no factor."""
        known = activations().get(image.numpy().tobytes())
        if known is not None:
            return known
        side = PLAN.size // GRID[0]
        light = image.float().unflatten(0, (-1, side)).unflatten(2, (-1, side)).mean((1, 3, 4)) / 255
        return light.flatten()[:, None] * DIRECTIONS.sum(0)

    def _last(self, first_bpd: Tensor) -> Tensor:
        up, down = self.mlp
        scaled = D_MODEL**0.5 * normalize(first_bpd, dim=2)
        return first_bpd + 0.1 * (scaled @ up).relu() @ down + 0.1 * first_bpd.mean(1, keepdim=True)

    def _read(self, last_bpd: Tensor) -> Tensor:
        return ((last_bpd @ self.reads.T - 0.2).relu() @ self.writes).mean(1) + self.bias

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        first = self._first(pixels)
        last = self._last(first)
        tokens = {"first": first, "last": last}
        return Captured({name: tokens[name] for name in hookpoints}, self._read(last))

    def splice(self, pixels: Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None) -> tuple[Tensor, ...]:
        first = self._first(pixels)
        if hookpoint == "last":
            assert read is None, "there is no hookpoint after the last"
            return tuple(self._read(replace(self._last(first))) for replace in replacements)
        lasts = [self._last(replace(first)) for replace in replacements]
        return tuple(lasts if read else map(self._read, lasts))

    def differentiate(
        self, pixels: Tensor, hookpoint: str, score: Score, replacement: Replacement | None = None, read: str | None = None
    ) -> Differentiated:
        return differentiate(lambda put: self.splice(pixels, hookpoint, [put], read)[0], score, replacement, f"figures: {hookpoint}")

    def embed(self, pixels: Tensor) -> Tensor:
        return self._first(pixels).mean(1) @ self.mlp[0][:, :D_EMBED]

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._embed_text(text) for text in texts])

    def _embed_text(self, text: str) -> Tensor:
        for name in sorted(FACTORS, key=len, reverse=True):  # "top left" is neither "top" nor "left"
            if text.endswith(f" {name}"):
                return TEXTS[FACTORS.index(name)]
        return normalize(torch.randn(D_EMBED, generator=torch.Generator().manual_seed(sum(text.encode()))), dim=0)


def plant_sae(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Make the artefact of the stage `train`: planted latents, and random ones."""
    generator = torch.Generator().manual_seed(11)
    duals = torch.linalg.pinv(DIRECTIONS).T
    places = [FACTORS.index(name) for name in NAMES]
    written = [FACTORS.index(IN_VAIN.get(name, name) if at >= len(PLANTED) else name) for at, name in enumerate(NAMES)]
    mixed = torch.stack([torch.randperm(len(FACTORS), generator=generator)[:2] for _ in range(N_RANDOM)])
    reads = torch.cat([duals[places], duals[mixed].mean(1)])
    weights = torch.randn(N_RANDOM, len(FACTORS), generator=generator)
    writes = torch.cat([DIRECTIONS[written], normalize(weights @ DIRECTIONS, dim=1)])
    writes = normalize(writes + 0.3 * torch.randn(writes.shape, generator=generator) / D_MODEL**0.5, dim=1)
    n = len(reads)
    config = SAEConfig("planted", D_MODEL, n, 1, "first", "first")
    sae = SAE(config, reads.T.contiguous(), torch.zeros(n), writes, torch.zeros(D_MODEL), torch.tensor(0.3))
    with draft.write_file("sae.safetensors") as weights_file, draft.write_file("cfg.json") as cfg:
        sae.save(weights_file, cfg)
    return draft.seal({"sae": "planted", "dead_latents": []})


def make_figure_params(root: Path, **intervene: Any) -> Params:
    """Return the params of a line on the figures; the plan is written to `root`."""
    (root / "plan.json").write_text(PLAN.model_dump_json())
    return make_test_params(
        images={"source": {"kind": "shapes", "path": str(root / "plan.json")}, "limit": None, "eval_share": 0.4},
        extract={"hookpoints": ["first"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": len(NAMES) + N_RANDOM, "k": 1},
        evaluate={"n_top": 16, "n_per_decile": 2, "baselines": []},
        intervene=intervene,
    )


def make_figure_line(root: Path, params: Params) -> dict[str, Artefact]:
    """Make images, activations, the planted SAE and its evaluation; return all by stage."""
    with pytest.MonkeyPatch.context() as patch:
        use_figure_model(patch)
        made: dict[str, Artefact] = {"images": make_artefact(root / "images", "images", make_images, params.images, {})}
        stages: Mapping[str, Any] = {"extract": (extract, "extraction"), "train": (plant_sae, "sae"), "evaluate": (evaluate, "evaluation")}
        for name, (stage, kind) in stages.items():
            artefact = make_artefact(root / kind, kind, stage, getattr(params, name), made)
            made[name] = artefact.child("first", "activations") if name == "extract" else artefact
        return made


def make_figure_labels(root: Path, params: Params, line: Mapping[str, Artefact], labels: Mapping[int, str]) -> Artefact:
    """Make the artefact of the stage `label` with these labels by latent."""

    def label(params: Any, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
        empty = {field.name: None if field.nullable else 0 for field in schemas.LABELS}
        rows = [
            {**empty, "sae": "planted", "latent": latent, "labeller": "known", "place": 1, "status": "ok", "label": text, "score": 0.9}
            for latent, text in labels.items()
        ]
        draft.write_table("labels.parquet", pa.Table.from_pylist(rows, schema=schemas.LABELS))
        return draft.seal({})

    return make_artefact(root, "labels", label, params.label, line)


def random_labels(seed: int) -> dict[int, str]:
    """Draw a label for each random latent."""
    rng = np.random.default_rng(seed)
    return {len(NAMES) + i: FACTORS[rng.integers(len(FACTORS))] for i in range(N_RANDOM)}


def use_figure_model(patch: pytest.MonkeyPatch) -> None:
    """Use the model, whichever model and judge the params name."""
    model = FigureModel()
    patch.setattr(networks, "load_model", lambda params, dtype, device: model)
    patch.setattr(networks, "load_judge", lambda params, dtype, device: model)
