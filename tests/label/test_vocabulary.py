"""Proves that words are chosen as their criteria are defined, in blocks of any size, and that any list of words can be used."""

import math
import time
from pathlib import Path
from typing import cast
from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.errors import ConfigError
from ommatid.label import scoring
from ommatid.label.labellers import vocabulary
from ommatid.label.labellers.vocabulary import By, choose, load_words
from ommatid.label.scoring import Texts
from ommatid.vlm import VisionModel

BYS: tuple[By, ...] = ("mean", "soft_wpmi")


def draw(n_latents: int, n_images: int, n_words: int, d: int = 6) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Sample latents with 2 to 9 images each, strongest first, and embeddings of images and words."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(n_images, generator=generator)[: 2 + i % 8] for i in range(n_latents)]
    acts = [torch.rand(len(own), generator=generator).sort(descending=True).values.double() + 0.1 for own in rows]
    images, words = (normalize(torch.randn(n, d, generator=generator), dim=1) for n in (n_images, n_words))
    return rows, acts, images, words


def slow_mean(rows: list[Tensor], acts: list[Tensor], images: Tensor, words: Tensor) -> list[int]:
    found = []
    for own, weights in zip(rows, acts, strict=True):
        mean = torch.stack([weight * images[row].double() for row, weight in zip(own, weights, strict=True)]).sum(0)
        found.append(int(torch.stack([torch.cosine_similarity(mean, word.double(), dim=0) for word in words]).argmax()))
    return found


def slow_soft_wpmi(rows: list[Tensor], acts: list[Tensor], images: Tensor, words: Tensor) -> list[int]:
    """Compute the criterion term by term, with Python's floats."""
    likely = [[math.exp(10 * float(image @ word)) for word in words] for image in images.double()]
    p = [[value / sum(of) for value in of] for of in likely]
    most = max(map(len, rows))
    given = []
    for own in rows:
        member = [0.998 - i / len(own) * (0.998 - 0.97) for i in range(len(own))]
        logs = [[math.log(1 + s * (p[row][w] - 1)) for row, s in zip(own.tolist(), member, strict=True)] for w in range(len(words))]
        given.append([sum(of) * most / len(own) for of in logs])
    prior = [math.log(sum(math.exp(of[w]) for of in given) / len(given)) for w in range(len(words))]
    return [max(range(len(words)), key=lambda w: of[w] - prior[w]) for of in given]


@pytest.mark.parametrize("entries", [2**24, 64])
@pytest.mark.parametrize("by", BYS)
def test_words_equal_those_of_a_slow_definition_for_any_block_size(by: By, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "ENTRIES", entries)
    rows, acts, images, words = draw(30, 25, 50)
    slow = slow_mean if by == "mean" else slow_soft_wpmi
    assert choose(by, rows, acts, images, words.float()).tolist() == slow(rows, acts, images, words.double())


@pytest.mark.parametrize("by", BYS)
def test_no_latents_give_no_words_and_equal_words_give_the_first(by: By) -> None:
    rows, acts, images, words = draw(5, 10, 4)
    assert choose(by, [], [], images, words).tolist() == []
    twice = torch.cat([words, words])
    assert max(choose(by, rows, acts, images, twice).tolist()) < 4


def test_soft_wpmi_prefers_a_word_specific_to_one_latent() -> None:
    """The images of all latents are nearest to the first word; each latent also has its own word, slightly farther away."""
    n = 5
    basis = torch.eye(n + 1)
    rows = [torch.arange(4) + 4 * i for i in range(n)]
    images = normalize(torch.cat([(basis[0] + 0.8 * basis[i + 1]).repeat(4, 1) for i in range(n)]), dim=1)
    acts = [torch.ones(4, dtype=torch.float64)] * n
    assert choose("mean", rows, acts, images, basis).tolist() == [0] * n
    assert choose("soft_wpmi", rows, acts, images, basis).tolist() == [1, 2, 3, 4, 5]


def test_word_lists_are_read_without_duplicates_empty_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeffred\n\n  green \n# no word\nred\n\t\nblue\r\ngreen\n", encoding="utf-8")
    assert load_words([str(path)]) == ("red", "green", "blue")
    assert load_words([str(path), str(path)]) == ("red", "green", "blue")
    both = load_words(["imagenet", "common"])
    assert len(both) == len(set(both)) > 4500
    assert {"zebra", "striped"} <= set(both)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b"# nothing\n\n", "has no words"), (b"\xff\xfe\x00", "can't decode")]
)
def test_files_without_words_are_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"words.txt.*{says}"):
        load_words([str(path)])


class Letters:
    """A text tower without a network, which embeds a text by its checksum."""

    text_templates = ("a {}", "the {}")

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed_text(self, names: list[str]) -> Tensor:
        self.asked += names
        seeds = torch.tensor([crc32(name.encode()) for name in names], dtype=torch.float64)
        return torch.sin(seeds[:, None] * torch.arange(1, 9) / 1e5).float()


def test_embeddings_are_means_over_templates_centred_on_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BLOCK", 3)
    words = [f"word {i}" for i in range(10)]
    made = Texts(cast(VisionModel, Letters()), words)
    raw = torch.stack([normalize(Letters().embed_text([f"{article} {word}" for word in words]), dim=1) for article in ("a", "the")]).mean(0)
    torch.testing.assert_close(made.embeddings, normalize(raw - raw.mean(0), dim=1))
    torch.testing.assert_close(made.embeddings[made.rows(["word 7", "word 2"])], made.embeddings[[7, 2]])


def test_labels_outside_the_list_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Letters()
    made = Texts(cast(VisionModel, model), ["one", "two", "three"])
    model.asked.clear()
    found = made.embed(["two", "a {brace}", "two", "a {brace}", "four"])
    assert model.asked == ["a a {brace}", "a four", "the a {brace}", "the four"]
    torch.testing.assert_close(found[[0, 2]], made.embeddings[[1, 1]])
    torch.testing.assert_close(found[1], found[3])
    # a word is embedded the same whether it is in the list or not
    torch.testing.assert_close(Texts(cast(VisionModel, model), ["one", "two", "three", "two"]).embed(["two"]).shape, torch.Size([1, 8]))
    assert made.embed([]).shape == (0, 8)


@pytest.mark.parametrize("by", BYS)
def test_a_hundred_thousand_words_are_processed_in_blocks(by: By, tmp_path: Path) -> None:
    """With duplicates and empty lines; a table of words by images or by latents would have 4e7 entries, a block has 2^24."""
    path = tmp_path / "many.txt"
    rows, acts, images, _ = draw(20, 400, 1, d=8)

    def seconds(n: int) -> float:
        path.write_text("\n\n".join(f"word {i}" for i in range(n)) + "\nword 5\n")
        begun = time.process_time()
        words = load_words([str(path)])
        made = Texts(cast(VisionModel, Letters()), words)
        found = choose(by, rows, acts, images, made.embeddings)
        assert len(words) == n == len(made.embeddings)
        assert made.embeddings.dtype == torch.float32
        assert found.shape == (20,)
        return time.process_time() - begun

    few = seconds(10_000)
    assert seconds(100_000) < 40 * few  # looking for each word among the others would take a hundred times as long
