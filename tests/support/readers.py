"""A study of tile pictures with an SAE whose latents' effects on the model's output are known.

The model reads three colours of its tokens. Three latents are detectors of a colour that write it; all others detect a mixture of colours
as well, but write where the model does not read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ommatid.config import Params, TrainParams
from ommatid.label.stage import label
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.vlm import Hookpoint
from support.study import make_test_params
from support.tiles import COLOURS, GRID, TileModel, make_line

D_MODEL = 64
"""Width of the activations, large enough for random directions to be far from the colours'."""
N_READERS = 120
"""Number of latents that the model does not read."""
DRAWS = 20
PLANTED = {0: "red", 1: "green", 2: "blue"}


def plant(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Make an SAE of which the first three latents write what they read, and the others write where the model does not read."""
    model = TileModel()
    generator = torch.Generator().manual_seed(2)
    mixtures = torch.randn(N_READERS, 3, generator=generator)
    reads = torch.cat([torch.eye(3), mixtures / mixtures.norm(dim=1, keepdim=True)]) @ model.spread
    unread = torch.linalg.qr(torch.cat([model.spread, torch.randn(D_MODEL - 3, D_MODEL, generator=generator)]).T).Q.T[3:]
    written = torch.randn(N_READERS, D_MODEL - 3, generator=generator) @ unread
    writes = torch.cat([model.spread, written / written.norm(dim=1, keepdim=True)])
    n = len(reads)
    config = SAEConfig("planted", model.d_model, n, 1, "tiles", "tiles")
    sae = SAE(config, reads.T.contiguous(), torch.zeros(n), writes, torch.zeros(model.d_model), torch.tensor(0.3))
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return draft.seal({"sae": "planted", "dead_latents": []})


@contextmanager
def wide_tile_model() -> Iterator[None]:
    """Make the activations of the tile model wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TileModel, "d_model", D_MODEL)
        patch.setattr(TileModel, "hookpoints", {"tiles": Hookpoint(D_MODEL, ("cls",), GRID)})
        yield


def make_reader_params(folder: Path) -> Params:
    """Make the params of the study, whose labels come from a file of words in a folder."""
    words = folder / "colours.txt"
    words.write_text("\n".join(COLOURS) + "\n")
    return make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": 3 + N_READERS, "k": 1},
        evaluate={"n_top": 16, "n_per_decile": 2},
        label={"labellers": [{"kind": "vocabulary", "words": [str(words)]}], "min_examples": 4, "n_examples": 8},
        intervene={"latents": {"kind": "listed", "latents": list(range(14))}, "n_images": 32, "draws": DRAWS, "max_drift": 1.0},
    )


def make_reader_line(folder: Path, params: Params) -> dict[str, Artefact]:
    """Make the artefacts of the study from `images` to `label`, by stage; `wide_tile_model` must be in effect."""
    return make_line(folder, params, train=plant, label=label)
