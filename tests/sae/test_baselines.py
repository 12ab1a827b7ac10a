"""Proves that PCA, k-means and NMF find planted structure, agree with scikit-learn, and can be used like an SAE."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.decomposition import NMF as SklearnNMF
from sklearn.decomposition import PCA as SklearnPCA

from ommatid.config import Baseline
from ommatid.metrics import Fidelity
from ommatid.sae.baselines import Dictionary, Neurons, make_baseline, make_pca, make_sparse_neurons
from ommatid.sae.kmeans import KMeans, find_centres, find_nearest
from ommatid.sae.model import SAEConfig, make_untrained
from ommatid.sae.nmf import NMF, fit_nmf
from support.planted import make_planted, mmcs

D_MODEL, D_SAE, K = 32, 64, 3
KINDS: tuple[Baseline, ...] = ("sparse_neurons", "pca", "kmeans", "nmf")
DRAW_NOTHING = ("sparse_neurons", "pca")
"""Baselines that have two latents per direction and do not depend on the seed."""


def make_config(d_sae: int = D_SAE, k: int = K, d_model: int = D_MODEL) -> SAEConfig:
    return SAEConfig("batch_topk", d_model, d_sae, k, "blocks.0", "planted")


def make_noise(n: int, d_model: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))


def fvu_of(dictionary: Dictionary, x: torch.Tensor) -> float:
    fidelity = Fidelity()
    acts = dictionary.encode(x)
    fidelity.add(x, dictionary.decode(acts), int((acts > 0).sum()))
    return fidelity.fvu


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return make_planted(2048).x


# the protocol


def test_sparse_neurons_fire_as_rarely_as_latents(sample: torch.Tensor) -> None:
    config = make_config()
    sparse = make_sparse_neurons(config, sample)
    acts = sparse.encode(sample)
    assert float((acts > 0).float().mean()) == pytest.approx(K / D_SAE, rel=0.05)
    z = (sample - sample.mean(0)) / sample.std(0)
    both = torch.cat([z, -z], dim=1)
    torch.testing.assert_close(acts, torch.where(both > sparse.threshold, both, 0), rtol=1e-4, atol=1e-5)
    everything = make_sparse_neurons(make_config(k=D_SAE), sample)
    torch.testing.assert_close(everything.decode(everything.encode(sample)), sample, rtol=1e-4, atol=1e-4)


def test_every_baseline_is_a_dictionary(sample: torch.Tensor) -> None:
    untrained = make_untrained(make_config(), sample, seed=3)
    dictionaries: list[Dictionary] = [Neurons(D_MODEL), untrained, *(make_baseline(kind, make_config(), sample, 0) for kind in KINDS)]
    assert [d.name for d in dictionaries] == ["neurons", "untrained", *KINDS]
    for dictionary in dictionaries:
        before = sample.clone()
        acts = dictionary.encode(sample)
        assert acts.shape == (len(sample), dictionary.n_latents)
        assert dictionary.decode(acts).shape == (len(sample), dictionary.d_model)
        assert torch.equal(sample, before)
        assert (acts >= 0).all() or dictionary.name == "neurons"
        assert acts.dtype == torch.float32


@pytest.mark.parametrize(("kind", "most"), [("pca", K), ("kmeans", 1), ("nmf", K)])
def test_no_more_latents_fire_per_token_than_in_the_sae(sample: torch.Tensor, kind: Baseline, most: int) -> None:
    n_firing = (make_baseline(kind, make_config(), sample, 0).encode(sample) > 0).sum(1)
    assert int(n_firing.max()) == most
    assert float(n_firing.double().mean()) > most - 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(sample: torch.Tensor, kind: Baseline) -> None:
    one, same, other = (make_baseline(kind, make_config(), sample, seed) for seed in (5, 5, 6))
    assert torch.equal(one.encode(sample), same.encode(sample))
    assert torch.equal(one.decode(one.encode(sample)), same.decode(same.encode(sample)))
    assert torch.equal(one.encode(sample), other.encode(sample)) == (kind in DRAW_NOTHING)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tokens_than_latents_give_one_latent_per_token(kind: Baseline) -> None:
    few = make_noise(10, D_MODEL)
    dictionary = make_baseline(kind, make_config(), few, 0)
    assert dictionary.n_latents == (2 * D_MODEL if kind in DRAW_NOTHING else 10)
    assert torch.isfinite(dictionary.decode(dictionary.encode(few))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_are_reconstructed(kind: Baseline) -> None:
    same = make_noise(1, D_MODEL).repeat(100, 1)
    dictionary = make_baseline(kind, make_config(), same, 0)
    torch.testing.assert_close(dictionary.decode(dictionary.encode(same)), same)


# PCA


@pytest.mark.parametrize("rank", [1, 7, 20, D_MODEL])
def test_the_fvu_of_pca_is_the_tail_of_the_spectrum(rank: int) -> None:
    x = make_noise(4000, D_MODEL) * torch.linspace(0.1, 3, D_MODEL) + 4
    spectrum = np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False) ** 2
    pca = make_pca(make_config(d_sae=2 * rank, k=rank), x)
    assert pca.n_latents == 2 * rank
    assert fvu_of(pca, x) == pytest.approx(spectrum[rank:].sum() / spectrum.sum(), abs=1e-6)


def test_pca_reconstructs_as_scikit_learn_does(sample: torch.Tensor) -> None:
    oracle = SklearnPCA(10).fit(sample.numpy())
    expected = torch.from_numpy(oracle.inverse_transform(oracle.transform(sample.numpy())))
    pca = make_pca(make_config(d_sae=20, k=10), sample)
    torch.testing.assert_close(pca.decode(pca.encode(sample)), expected, rtol=1e-4, atol=1e-4)


def test_only_one_sign_of_a_component_fires(sample: torch.Tensor) -> None:
    pca = make_pca(make_config(k=D_MODEL), sample)
    up, down = pca.encode(sample).chunk(2, dim=1)
    assert not ((up > 0) & (down > 0)).any()
    assert torch.equal(pca.W_dec[:D_MODEL], -pca.W_dec[D_MODEL:])


def test_pca_keeps_the_k_largest(sample: torch.Tensor) -> None:
    whole, limited = (make_pca(make_config(k=k), sample).encode(sample) for k in (D_MODEL, K))
    smallest = whole.topk(K, dim=1).values[:, -1:]
    assert torch.equal(limited, whole * (whole >= smallest))


# k-means


def make_clusters(n_clusters: int, per_cluster: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample tokens of clusters that are far from one another and farther from zero; return tokens and centres."""
    centres = 100 + 10 * make_noise(n_clusters, D_MODEL, seed)
    x = centres.repeat(per_cluster, 1) + 0.1 * make_noise(n_clusters * per_cluster, D_MODEL, seed + 1)
    return x, centres


@pytest.mark.parametrize("n_clusters", [2, 12, 50])
def test_kmeans_finds_planted_clusters(n_clusters: int) -> None:
    x, centres = make_clusters(n_clusters, 40)
    found = find_centres(x, n_clusters, seed=1)
    nearest, distances = find_nearest(centres, found)
    assert sorted(nearest.tolist()) == list(range(n_clusters))
    assert float(distances.max()) < 0.1
    acts = KMeans(found).encode(x)
    assert (acts.sum(1) == 1).all()
    assert (acts.sum(0) == 40).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_finds_nearly_all_of_very_many_clusters(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ommatid.sae.kmeans.ROUNDS", 50)
    x, centres = make_clusters(200, 20)
    assert len(set(find_nearest(centres, find_centres(x, 200, seed))[0].tolist())) > 190


@pytest.mark.parametrize("n_centres", [8, 100])
def test_inertia_equals_that_of_scikit_learn(n_centres: int) -> None:
    x = make_noise(3000, 8)
    oracle: Any = SklearnKMeans(n_centres, n_init=3, random_state=0).fit(x.numpy()).inertia_  # pyright: ignore[reportArgumentType] inferred from a default
    inertia = float(find_nearest(x, find_centres(x, n_centres, seed=0))[1].sum())
    assert inertia < 1.03 * oracle


def test_the_nearest_centre_is_found_far_from_the_origin() -> None:
    x, centres = make_noise(500, 16) + 1e4, make_noise(40, 16, seed=1) + 1e4
    nearest, distances = find_nearest(x, centres)
    expected = torch.cdist(x.double(), centres.double()).min(1)
    assert torch.equal(nearest, expected.indices)
    torch.testing.assert_close(distances, expected.values.square().float(), rtol=1e-3, atol=1e-3)


def test_an_empty_centre_moves_to_the_tokens_that_are_farthest() -> None:
    from ommatid.sae.kmeans import _move

    x = torch.tensor([[0.0], [2.0], [10.0], [40.0]])
    nearest, distances = torch.tensor([0, 0, 0, 0]), torch.tensor([0.0, 4.0, 100.0, 1600.0])
    assert _move(x, nearest, distances, 3).tolist() == [[13.0], [40.0], [10.0]]


# NMF


def make_parts(n_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample sparse mixtures of 8 parts, each with 6 dimensions that overlap with those of its neighbours; return tokens and parts."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.zeros(8, D_MODEL)
    for i in range(8):
        parts[i, (torch.arange(6) + 4 * i) % D_MODEL] = 1 + torch.rand(6, generator=generator)
    codes = torch.rand(n_tokens, 8, generator=generator) * (torch.rand(n_tokens, 8, generator=generator) < 0.3)
    return codes @ parts, parts


def test_nmf_finds_planted_parts() -> None:
    x, parts = make_parts(8192)
    nmf = fit_nmf(x, 8, 8, seed=0)
    assert mmcs(nmf.W, parts) > 0.98
    assert fvu_of(nmf, x) < 0.01
    assert (nmf.W >= 0).all()


def test_shifted_non_negative_data_are_factorised_too() -> None:
    x, parts = make_parts(8192)
    offset = 10 * make_noise(1, D_MODEL)[0]
    nmf = fit_nmf(x + offset, 8, 8, seed=0)
    torch.testing.assert_close(nmf.low, x.amin(0) + offset)
    assert mmcs(nmf.W, parts) > 0.98


def test_nmf_reconstructs_as_scikit_learn_does() -> None:
    x = make_noise(4096, 12).abs() @ make_noise(12, D_MODEL, seed=1).abs() + 0.1 * make_noise(4096, D_MODEL, seed=2).abs()
    x -= x.amin(0)
    oracle = SklearnNMF(8, max_iter=2000, random_state=0).fit(x.numpy()).reconstruction_err_ ** 2  # pyright: ignore[reportArgumentType] inferred from a default
    nmf = fit_nmf(x, 8, 8, seed=0)
    error = float((x - nmf.decode(nmf.encode(x))).double().square().sum())
    assert error < 1.1 * oracle


@settings(max_examples=20, deadline=None)
@given(n_latents=st.integers(1, 8), seed=st.integers(0, 1000))
def test_without_a_limit_encoding_is_non_negative_least_squares(n_latents: int, seed: int) -> None:
    W = torch.nn.functional.normalize(make_noise(n_latents, 12, seed).abs(), dim=1)
    x = make_noise(5, 12, seed + 1).abs()
    nmf = NMF(W, torch.zeros(12), n_latents)
    for row, acts in zip(x, nmf.encode(x), strict=True):
        _, best = nnls(W.double().T.numpy(), row.double().numpy())
        assert float((row - acts @ W).norm()) <= best * 1.02 + 1e-3


def test_a_token_made_of_k_parts_is_decomposed() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.rand(40, 200, generator=generator) * (torch.rand(40, 200, generator=generator) < 0.1), dim=1)
    codes = torch.zeros(64, 40).scatter_(1, torch.rand(64, 40, generator=generator).topk(4, dim=1).indices, 1.0)
    codes *= 1 + torch.rand(64, 40, generator=generator)
    torch.testing.assert_close(NMF(W, torch.zeros(200), 4).encode(codes @ W), codes, rtol=1e-3, atol=1e-3)


def test_encoding_does_not_depend_on_batches(sample: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    nmf, centres = fit_nmf(sample, D_SAE, K, seed=0), find_centres(sample, D_SAE, seed=0)
    whole, nearest = nmf.encode(sample), find_nearest(sample, centres)[0]
    monkeypatch.setattr("ommatid.sae.nmf.ENTRIES", 100 * K * D_MODEL)
    monkeypatch.setattr("ommatid.sae.kmeans.ENTRIES", 100 * D_SAE)
    torch.testing.assert_close(nmf.encode(sample), whole)
    assert torch.equal(find_nearest(sample, centres)[0], nearest)
