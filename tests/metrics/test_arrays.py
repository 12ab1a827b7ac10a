"""Proves that the library call on plain arrays equals the published loop over pairs, for arrays of any type, layout and partition."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array, csr_array, csr_matrix
from torch.nn.functional import cosine_similarity

from ommatid.errors import InputError, OmmatidError
from ommatid.metrics import Monosemanticity, MonosemanticityScores, arrays, monosemanticity

N, N_LATENTS, WIDTH = 230, 12, 7


def published_loop(acts: torch.Tensor, embeddings: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """Compute scores as sae-for-vlm's metric.py does: for each image, sum weighted cosines and weights over later images, 100 at a time."""
    low, high = acts.amin(0), acts.amax(0)
    a = (acts - low) / (high - low)
    above, below = torch.zeros_like(low), torch.zeros_like(low)
    for i in range(len(a)):
        for start in range(i + 1, len(a), batch):
            later = slice(start, start + batch)
            weights = a[i] * a[later]
            above += (weights * cosine_similarity(embeddings[i][None], embeddings[later])[:, None]).sum(0)
            below += weights.sum(0)
    return above / below


@pytest.fixture(scope="module")
def acts() -> torch.Tensor:
    """Sparse and dense latents, one with negative values, one far from zero, and one that always fires, float64."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(N, N_LATENTS, generator=generator, dtype=torch.float64)
    acts[:, :8] *= torch.rand(N, 8, generator=generator) < 0.04
    acts[:, :7] = acts[:, :7].abs()  # the eighth also has negative entries
    acts[:, 9] -= 5
    acts[:, 10] = acts[:, 10] * 1e3 + 1e6
    acts[:, 11] = acts[:, 11].abs() + 1
    return acts


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


@pytest.fixture(scope="module")
def expected(acts: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    return published_loop(acts, embeddings)


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "torch": lambda x: x,
    "torch, not contiguous": lambda x: x.T.contiguous().T,
    "numpy": lambda x: x.numpy(),
    "numpy, other byte order": lambda x: x.numpy().astype(">f8"),
    "torch CSR": lambda x: x.to_sparse_csr(),
    "scipy CSR": lambda x: csr_array(x.numpy()),
    "scipy CSR matrix": lambda x: csr_matrix(x.numpy()),
    "scipy CSR, not sorted": lambda x: shuffle_rows(csr_array(x.numpy())),
    "scipy CSR with zeros": lambda x: csr_array(
        (x.numpy().ravel(), np.tile(np.arange(x.shape[1]), len(x)), np.arange(len(x) + 1) * x.shape[1])
    ),
}


def shuffle_rows(rows: csr_array) -> csr_array:
    """Return the same matrix with the entries of each row in reverse order."""
    for start, stop in zip(rows.indptr, rows.indptr[1:], strict=False):
        rows.indices[start:stop], rows.data[start:stop] = rows.indices[start:stop][::-1].copy(), rows.data[start:stop][::-1].copy()
    rows.has_sorted_indices = False
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [10**9, 40])
def test_scores_equal_the_published_loop(
    form: str, block: int, acts: torch.Tensor, embeddings: torch.Tensor, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VALUES", "ENTRIES"):
        monkeypatch.setattr(arrays, name, block)
    ms = monosemanticity(FORMS[form](acts), embeddings.numpy() if "torch" not in form else embeddings)
    assert isinstance(ms, torch.Tensor) == form.startswith("torch")
    assert str(ms.dtype).removeprefix("torch.") == "float64"
    np.testing.assert_allclose(np.asarray(ms), expected, rtol=1e-9)


def test_sparse_activations_equal_the_published_loop(acts: torch.Tensor, embeddings: torch.Tensor, expected: torch.Tensor) -> None:
    """Only latents that are mostly zero, for which products run over entries."""
    for form in ("torch", "torch CSR"):
        np.testing.assert_allclose(monosemanticity(FORMS[form](acts[:, :8].contiguous()), embeddings), expected[:8], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_any_real_type_is_accepted(dtype: torch.dtype, acts: torch.Tensor, embeddings: torch.Tensor) -> None:
    few = acts[:, :8].to(dtype)
    fires = (few != 0).sum(0) >= 2
    for given_acts in (few, few.to_sparse_csr() if dtype not in (torch.bool,) else few):
        ms = monosemanticity(given_acts, embeddings.float())
        np.testing.assert_allclose(ms[fires], published_loop(few.double(), embeddings.float().double())[fires], rtol=1e-9)


def test_the_length_of_embeddings_does_not_matter(acts: torch.Tensor, embeddings: torch.Tensor, expected: torch.Tensor) -> None:
    lengths = torch.logspace(-250, 250, N, dtype=torch.float64)[:, None]
    np.testing.assert_allclose(monosemanticity(acts, embeddings * lengths), expected, rtol=1e-9)


def test_scores_are_nan_where_they_are_undefined() -> None:
    acts = torch.zeros(10, 5)
    acts[:, 1] = 3.0  # constant
    acts[2, 2] = 1.0  # one image
    acts[2:4, 3] = 1.0
    acts[3, 4] = -2.0  # fires on one image, whatever its sign
    embeddings = torch.eye(10)
    for form in (acts, acts.to_sparse_csr()):
        assert monosemanticity(form, embeddings).isnan().tolist() == [True, True, True, False, True]
        assert monosemanticity(0 * form, embeddings).isnan().all()
    assert monosemanticity(acts[:1], embeddings[:1]).isnan().all()
    assert monosemanticity(acts[:0], embeddings[:0]).isnan().all()
    assert monosemanticity(acts[:, :0], embeddings).shape == (0,)


@pytest.mark.parametrize(
    ("acts", "embeddings", "says"),
    [
        (np.ones((3, 2)), np.ones((4, 5)), "acts have 3 images and embeddings 4"),
        (csr_array(np.eye(3)), np.ones((4, 5)), "acts have 3 images and embeddings 4"),
        (np.ones(3), np.ones((3, 5)), r"acts have the shape \(3,\); they must be \(images, latents\)"),
        (np.ones((3, 2)), np.ones((3, 5, 2)), r"embeddings have the shape \(3, 5, 2\); they must be \(images, width\)"),
        (np.ones((3, 2)), np.ones((3, 0)), "their width must be 1 or more"),
        (np.ones((3, 2), complex), np.ones((3, 5)), "acts are of type complex128; they must be real"),
        (np.array([["a"], ["b"]]), np.ones((2, 5)), "acts are of type <U1; they must be real"),
        (np.array([[1, 2], [3, np.nan], [np.inf, 1]]), np.ones((3, 5)), "acts are not finite: image 1 latent 1, and 1 more"),
        (csr_array(np.array([[0, 2], [3, 0], [-np.inf, 1]])), np.ones((3, 5)), "acts are not finite: image 2 latent 0"),
        (np.ones((3, 2)), np.array([[1.0, 1], [np.nan, 0], [1, 1]]), "embeddings are not finite: image 1"),
        (np.ones((3, 2)), np.array([[1.0, 1], [1, 1], [np.inf, 0]]), "embeddings are not finite: image 2"),
        (np.ones((3, 2)), np.array([[1.0, 1], [1, 1], [0, -0.0]]), "embeddings are all zeros: image 2.*leave these images out"),
        (csc_array(np.eye(3)), np.ones((3, 5)), r"acts have the format csc; .*acts.tocsr\(\)"),
        (torch.eye(3).to_sparse_coo(), np.ones((3, 5)), "layout torch.sparse_coo.*to_sparse_csr"),
        (torch.eye(3), torch.eye(3).to_sparse_csr(), "embeddings are a tensor of layout torch.sparse_csr; they must be dense"),
        (csr_array((np.ones(4), [0, 1, 1, 0], [0, 1, 3, 4]), shape=(3, 2)), np.ones((3, 5)), r"stored twice, .*acts.sum_duplicates\(\)"),
    ],
)
def test_arrays_that_cannot_be_scored_are_refused(acts: Any, embeddings: Any, says: str) -> None:
    for kind in (InputError, ValueError, OmmatidError):
        with pytest.raises(kind, match=says):
            monosemanticity(acts, embeddings)


class Rows:
    """An object with the attributes of compressed rows."""

    def __init__(self, indptr: list[int], indices: list[int], data: list[float], shape: tuple[int, int]) -> None:
        self.indptr, self.indices, self.data, self.shape = np.array(indptr), np.array(indices), np.array(data), shape


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (Rows([0, 1, 2], [0, 1], [1.0, 1.0], (3, 2)), "not valid compressed rows: 3 images have 3 row pointers"),
        (Rows([0, 2, 1, 2], [0, 1], [1.0, 1.0], (3, 2)), "rising from 0"),
        (Rows([0, 1, 2, 3], [0, 1], [1.0, 1.0], (3, 2)), "2 column indices and 2 values"),
        (Rows([0, 1, 2, 2], [0, 2], [1.0, 1.0], (3, 2)), "a column index is outside 0 to 1"),
    ],
)
def test_invalid_sparse_rows_are_refused(rows: Rows, says: str) -> None:
    with pytest.raises(InputError, match=says):
        monosemanticity(rows, np.ones((3, 4)))


def test_damage_in_a_later_block_is_named_by_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "VALUES", 8)
    acts, embeddings = np.ones((40, 4)), np.ones((40, 3))
    acts[31, 2] = np.nan
    with pytest.raises(InputError, match="image 31 latent 2"):
        monosemanticity(acts, embeddings)
    embeddings[13] = 0
    with pytest.raises(InputError, match="all zeros: image 13"):
        monosemanticity(acts, embeddings)


@given(seed=st.integers(0, 10**6), n_parts=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_any_partition_of_the_images_gives_the_same_scores(seed: int, n_parts: int, acts: torch.Tensor, embeddings: torch.Tensor) -> None:
    """Images are assigned at random to parts, some of them empty, dense or compressed, which are merged in any order."""
    rng = np.random.default_rng(seed)
    of_part = rng.integers(n_parts, size=N)
    parts = []
    for part in range(n_parts):
        rows = torch.from_numpy((of_part == part).nonzero()[0])
        scores = Monosemanticity(N_LATENTS, WIDTH)
        for some in rows.split(50):
            scores.add(acts[some].to_sparse_csr() if rng.random() < 0.5 else acts[some], embeddings[some])
        parts.append(scores)
    first, *others = (parts[i] for i in rng.permutation(n_parts))
    for other in others:
        first.merge(other)
    assert_same(first.scores(), whole(acts, embeddings))


def whole(acts: torch.Tensor, embeddings: torch.Tensor) -> MonosemanticityScores:
    scores = Monosemanticity(N_LATENTS, WIDTH)
    scores.add(acts, embeddings)
    return scores.scores()


def assert_same(one: MonosemanticityScores, other: MonosemanticityScores) -> None:
    torch.testing.assert_close(one.ms, other.ms, rtol=1e-9, atol=0)
    assert one.floor == pytest.approx(other.floor, rel=1e-12)


def test_embeddings_wider_than_a_block_of_sums_are_scored(acts: torch.Tensor) -> None:
    """The sums are computed in blocks of columns; 1,000 columns are two whole blocks and a part of one."""
    embeddings = torch.randn(N, 1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    expected = published_loop(acts, embeddings)
    np.testing.assert_allclose(monosemanticity(acts, embeddings), expected, rtol=1e-9)
    np.testing.assert_allclose(monosemanticity(acts[:, :8].contiguous(), embeddings), expected[:8], rtol=1e-9)
