"""The labeller `vocabulary`: chooses the word of a list that best describes what a latent's strongest images have in common.

Suffixes of tensors: n latents, k images of a latent, u images in all, w words, d dimensions of the joint space.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, assert_never

import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

from ommatid.config.label import VocabularyLabeller
from ommatid.errors import ConfigError
from ommatid.label.labellers.base import WordList
from ommatid.metrics import unit
from ommatid.store import Artefact
from ommatid.vlm import imagenet_classes

By = Literal["mean", "soft_wpmi"]
"""Criterion by which a word is chosen; see `choose`."""

ENTRIES = 2**24
"""Approximate number of entries in a block of words by images or latents, so that only the embeddings grow with the vocabulary."""
CACHED = 2**20
"""Approximate number of entries that go through several operations in a row; this many stay in a processor's cache."""
FOLDS = 3
"""Rounds of multiplying factors in pairs before their logarithm is taken: eight factors of at least 1 - FIRST_MEMBER do not underflow."""
SHARPNESS = 10.0
"""Factor applied to cosines before the softmax over words (CLIP-Dissect, `similarity.py`: a=10)."""
FIRST_MEMBER, LAST_MEMBER = 0.998, 0.97
"""Probability that an image shows what the latent represents, for the strongest image and past the weakest; linear between (ibid.)."""


def load_words(lists: Sequence[str]) -> tuple[str, ...]:
    """Load word lists.

    Args:
        lists: `imagenet`, `common`, or paths of text files with one word or phrase per line; empty lines and lines that begin with # are
            skipped.

    Returns:
        The words of all lists in order, without duplicates.

    Raises:
        ConfigError: A file is missing or has no words.
    """
    words = [word for name in lists for word in _load_list(name)]
    return tuple(dict.fromkeys(words))


def choose(
    by: By,
    images_nk: Sequence[Int[Tensor, " _images"]],
    acts_nk: Sequence[Float[Tensor, " _images"]],
    images_ud: Float32[Tensor, "images d"],
    words_wd: Float32[Tensor, "words d"],
) -> Int64[Tensor, " latents"]:
    """Choose a word for each latent.

    Args:
        by: `mean` for the largest cosine with the activation-weighted mean of the latent's images; `soft_wpmi` for the criterion of
            CLIP-Dissect, see `_soft_wpmi`.
        images_nk: Rows of `images_ud` for each latent, strongest first; at least one.
        acts_nk: Activations of the latent on those images.
        images_ud: Image embeddings, `(images, d_joint)` float32, centred, unit norm.
        words_wd: Word embeddings, `(words, d_joint)` float32, centred, unit norm.

    Returns:
        Index of each latent's word, `(latents,)` int64; the first of words that fit equally well.
    """
    if not images_nk:
        return torch.empty(0, dtype=torch.int64)
    match by:
        case "mean":
            return _best(_cosines(images_nk, acts_nk, images_ud, words_wd))
        case "soft_wpmi":
            return _best(_soft_wpmi(images_nk, images_ud, words_wd))
        case _:
            assert_never(by)


def mean_direction(images_kd: Float[Tensor, "k d"], acts_k: Float[Tensor, " k"]) -> Float64[Tensor, " d"]:
    """Return the activation-weighted mean of a latent's images, `(d_joint,)` float64."""
    weights = acts_k.double()
    return weights @ images_kd.double() / weights.sum()


def _best(scores: Iterator[Tensor]) -> Int64[Tensor, " latents"]:
    """Return the index of the largest score over all blocks of words, each `(latents, words in the block)`."""
    best, place, n = None, None, 0
    for block in scores:
        values, places = block.max(1)
        if best is None or place is None:
            best, place = values, places
        else:
            place = torch.where(values > best, places + n, place)
            best = torch.maximum(values, best)
        n += block.shape[1]
    assert place is not None
    return place


def _cosines(
    images_nk: Sequence[Int[Tensor, " _images"]],
    acts_nk: Sequence[Float[Tensor, " _images"]],
    images_ud: Float32[Tensor, "images d"],
    words_wd: Float32[Tensor, "words d"],
) -> Iterator[Tensor]:
    """Yield the cosines of words with each latent's mean image, `(latents, words in the block)`."""
    means = torch.stack([mean_direction(images_ud[rows], acts) for rows, acts in zip(images_nk, acts_nk, strict=True)])
    directions_nd = unit(means).float()
    for block in words_wd.split(_words_at_once(len(directions_nd))):
        yield directions_nd @ block.T


def _soft_wpmi(
    images_nk: Sequence[Int[Tensor, " _images"]], images_ud: Float32[Tensor, "images d"], words_wd: Float32[Tensor, "words d"]
) -> Iterator[Tensor]:
    """Yield the soft weighted pointwise mutual information of latents and words, `(latents, words in the block)`.

    The criterion is that of CLIP-Dissect (Oikarinen and Weng 2023, arXiv 2204.10965). Let p(t|x) be the softmax over words of `SHARPNESS`
    times the cosine of image and word, and s_x the probability that image x shows what latent k represents, which falls linearly over the
    latent's images from `FIRST_MEMBER` to `LAST_MEMBER`. Then log p(t|k) = Σ_x log(1 + s_x (p(t|x) − 1)), and the score is
    log p(t|k) − log p(t), where p(t) is the mean of p(t|k) over the latents. If latents have different numbers of images, the sums are
    scaled to the largest number; otherwise p(t) would be determined by the latents with the fewest images.
    """
    used, places = torch.unique(torch.cat(list(images_nk)), return_inverse=True)
    images_ud = images_ud[used]
    n_images = torch.tensor([len(rows) for rows in images_nk])
    table_nk, members_nk = _pad(places, n_images)
    scale_n1 = n_images.max() / n_images[:, None]
    total_u = torch.full((len(used),), -torch.inf)
    n_words = _words_at_once(max(len(used), len(images_nk)))
    for block in words_wd.split(n_words):
        total_u = torch.logaddexp(total_u, (SHARPNESS * images_ud @ block.T).logsumexp(1))
    n_latents = max(1, CACHED // (table_nk.shape[1] * n_words))
    for block in words_wd.split(n_words):
        p_uw = (SHARPNESS * images_ud @ block.T).sub_(total_u[:, None]).exp_()
        pairs = zip(table_nk.split(n_latents), members_nk.split(n_latents), strict=True)
        given_nw = scale_n1 * torch.cat([_log_given(p_uw[rows], members) for rows, members in pairs])
        yield given_nw - given_nw.logsumexp(0)


def _log_given(p_nkw: Float32[Tensor, "latents k words"], members_nk: Float[Tensor, "latents k"]) -> Float32[Tensor, "latents words"]:
    """Return log p(t|k) of some latents and words, `(latents, words)`; overwrites `p_nkw`."""
    factors = p_nkw.sub_(1).mul_(members_nk[:, :, None]).add_(1)
    for _ in range(FOLDS):
        factors = factors[:, ::2] * factors[:, 1::2]
    return factors.log_().sum(1)


def _pad(
    places: Int64[Tensor, " places"], n_images: Int64[Tensor, " latents"]
) -> tuple[Int64[Tensor, "latents k"], Float[Tensor, "latents k"]]:
    """Pad the images of each latent to the same number, a multiple of 2^FOLDS.

    Args:
        places: Rows of the images of all latents, one latent after the other, `(sum of n_images,)`.
        n_images: Number of images of each latent, `(latents,)`.

    Returns:
        Rows of each latent's images, `(latents, k)`, and the probability s_x of each, `(latents, k)`, which is 0 for the padding.
    """
    ranks = torch.arange(-(-int(n_images.max()) // 2**FOLDS) * 2**FOLDS)
    has_nk = ranks < n_images[:, None]
    table = torch.zeros(has_nk.shape, dtype=torch.int64)
    table[has_nk] = places
    members = FIRST_MEMBER - ranks / n_images[:, None] * (FIRST_MEMBER - LAST_MEMBER)
    return table, members * has_nk


def _words_at_once(n: int) -> int:
    """Return the number of words in a block with n images or latents."""
    return max(16, ENTRIES // n)


def _load_list(name: str) -> Sequence[str]:
    if name == "imagenet":
        return imagenet_classes()
    if name == "common":
        return _parse((files("ommatid.label") / "words" / "common.txt").read_text(encoding="utf-8"))
    try:
        words = _parse(Path(name).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"label.labellers: {name!r}: {error}; use imagenet, common, or a text file with one word per line") from None
    if not words:
        raise ConfigError(f"label.labellers: {name!r} has no words; write one word per line")
    return words


def _parse(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def make(name: str, params: VocabularyLabeller, saes: Mapping[str, Artefact], warn: Callable[[str], None]) -> WordList:
    """Make the source; see `make_source`."""
    return WordList(load_words(params.words), params.by)
