"""Proves that the picture of a dictionary's health is reproducible, and that planted duplicates are found."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ommatid import schemas
from ommatid.compute import nearest
from ommatid.sae.init import make_weights
from ommatid.sae.learner import histogram, histograms
from ommatid.sae.model import SAE, SAEConfig
from ommatid.show import health
from ommatid.show.health import draw_health, nearest_cosines
from ommatid.store import Artefact, open_draft

D_SAE, D_MODEL = 300, 16


def draw_directions(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((D_SAE, D_MODEL))


@pytest.mark.parametrize("tile", [7, 100, 4096])
def test_nearest_cosines_are_those_of_the_whole_matrix(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "TILE", tile)
    directions = draw_directions()
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    whole = unit @ unit.T
    np.fill_diagonal(whole, -1)
    np.testing.assert_allclose(nearest_cosines(directions), whole.max(1), atol=1e-6)


def test_duplicates_are_found_and_only_some_of_many_latents_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = draw_directions()
    directions[40] = 3 * directions[250]
    cosines = nearest_cosines(directions)
    assert np.flatnonzero(cosines > 0.999).tolist() == [40, 250]
    monkeypatch.setattr(health, "N_COMPARED", 10)
    assert len(nearest_cosines(directions)) == 10


def test_a_histogram_counts_every_value_once() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges, counts = histogram(values)
    expected, _ = np.histogram(values.numpy(), len(counts))
    assert sum(counts) == 1000 and len(edges) == len(counts) + 1
    assert np.abs(np.array(counts) - expected).sum() <= 2  # a value on an edge may fall on either side
    assert histogram(torch.full((5,), 2.0))[1][0] == 5


def test_silent_latents_have_no_density() -> None:
    weights = make_weights(8, torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), None, 0)
    density = torch.tensor([0.0, 0.1, 0.01, 0.0, 1.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = histograms(weights, density)
    assert {name: sum(counts) for name, (_, counts) in found.items()} == {"log10_density": 6, "encoder_norm": 8, "encoder_bias": 8}
    assert found["log10_density"][0][0] == -2 and found["log10_density"][0][-1] == 0
    assert "log10_density" not in histograms(weights, density * 0)


def make_sae(place: Path, is_broken: bool = False) -> Artefact:
    """An SAE with 50 points of curves, as training makes it."""
    directions = torch.from_numpy(draw_directions()).float()
    config = SAEConfig("batch_topk", D_MODEL, D_SAE, 4, "blocks.0", "planted")
    W_enc = directions.T.contiguous()
    if is_broken:
        W_enc[0, 0] = torch.nan
    sae = SAE(config, W_enc, torch.zeros(D_SAE), directions, torch.zeros(D_MODEL), torch.tensor(0.1))
    steps = np.arange(1, 51)
    columns = {name: steps if name in ("step", "tokens") else 1 / steps for name in schemas.CURVES.names}
    with open_draft(place, "sae", {}, {}) as draft:
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
            sae.save(weights, cfg)
        draft.write_table("curves.parquet", pa.table(columns).cast(schemas.CURVES))
        density = ([-3.0, -2.0, -1.0], [200, 90])
        draft.seal({"n_steps": 50, "n_tokens": 50, "fvu": 0.02, "l0": 4.0, "dead": 0.01, "histograms": {"log10_density": density}})
        return draft.publish(place)


def test_encoders_of_equal_norm_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make_sae(tmp_path / "sae")
    for nearly in (0.0, 1e-7):
        lengths = 1 + nearly * np.arange(D_SAE) / D_SAE
        monkeypatch.setattr(health, "_load", lambda sae, names, lengths=lengths: {name: np.diag(lengths) for name in names})
        draw_health(sae, "batch_topk-300-k4-s0", tmp_path / "equal.png")


@pytest.mark.parametrize("is_broken", [False, True])
def test_pictures_are_reproducible_even_of_an_sae_that_fails_the_gate(tmp_path: Path, is_broken: bool) -> None:
    sae = make_sae(tmp_path / "sae", is_broken)
    for name in ("one.png", "two.png"):
        draw_health(sae, "batch_topk-300-k4-s0", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (health.WIDTH, health.HEIGHT)
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 50
