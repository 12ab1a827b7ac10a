"""The labeller `captioner` finds the planted phrase, and its captions equal those of transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ommatid.errors import ModelError
from ommatid.label.labellers.captioner import Captioner, Phrase, TransformersCaptions, shared_phrase
from support.cases import LEFT, make_case
from support.models import WORDS, save_tiny_captioner, save_tiny_clip


@pytest.mark.parametrize(
    ("firing", "silent", "expected"),
    [
        (["a red car on the road", "the red car", "a man in a red car"], ["a blue car", "a red bird"], Phrase("red car", 3, 0)),
        (["a photo of a dog", "a photo of a dog", "a photo of a cat"], ["a photo of a car"], Phrase("dog", 2, 0)),
        # what all captions share says nothing, however frequent
        (["grass and a horse", "grass", "grass and a horse"], ["grass", "green grass"], Phrase("horse", 2, 0)),
        # of equals the longer, then the first by alphabet
        (["bow of a ship", "bow of a ship"], [], Phrase("bow", 2, 0)),
        (["polar bear", "polar bear"], ["brown bear"], Phrase("polar bear", 2, 0)),
        (["Zebra; stripes", "stripes? ZEBRA"], [], Phrase("stripes", 2, 0)),
        (["Jack's cat-flap.", "jack's  cat-flap"], ["a door"], Phrase("jack's cat-flap", 2, 0)),
        # twice in one caption is once
        (["dog dog dog", "cat"], [], None),
        (["a b c", "d e f"], ["g"], None),
        (["the of a", "the of a"], [], None),
        ([], ["dog"], None),
        # two of nine are not what they have in common, and what silent images show more often is not it either
        (["dog", "dog", *"abcdefg"], [], None),
        (["dog", "dog", "cat"], ["dog", "dog", "dog"], None),
    ],
)
def test_the_phrase_is_shared_by_firing_captions_and_absent_from_silent_ones(
    firing: list[str], silent: list[str], expected: Phrase | None
) -> None:
    assert shared_phrase(firing, silent) == expected


def test_a_planted_word_is_found_among_random_words() -> None:
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfghjklm" for b in "aeiou"]
    for _ in range(20):
        firing, silent = ([" ".join(rng.choice(words, 4)) for _ in range(16)] for _ in range(2))
        planted = [f"{caption} zebra" if i < 11 else caption for i, caption in enumerate(firing)]
        found = shared_phrase(planted, [*silent[:14], "a zebra", silent[15]])
        assert found == Phrase("zebra", 11, 1)


def colour(images: Sequence[Image.Image]) -> list[str]:
    """Caption images by their mean colour, which differs between a cropped image and the whole one."""
    means = [np.asarray(image).reshape(-1, 3).mean(0) for image in images]
    return [f"a photo that is {'purple' if red > 60 and blue > 60 else 'red' if red > 60 else 'green'}" for red, _, blue in means]


def test_firing_images_are_cropped_where_they_fire_and_silent_ones_are_whole() -> None:
    spot = np.zeros((4, 4), np.float32)
    spot[1, 0] = 1.0
    answer = Captioner("captioner", colour).answer(make_case(0, n_firing=40, heat=spot))
    assert (answer.status, answer.label) == ("ok", "red")
    assert answer.detail == "in 16 of 16 captions of firing images, and in 0 of 4 of silent ones"
    assert Captioner("captioner", colour).answer(make_case(0, heat=None)).label == "purple"


def test_captions_with_nothing_in_common_give_no_label() -> None:
    def numbered(images: Sequence[Image.Image]) -> list[str]:
        return [f"thing{'abcdefghijklmnopq'[i]}" for i in range(len(images))]

    answer = Captioner("captioner", numbered).answer(make_case(0, heat=LEFT))
    assert (answer.status, answer.label) == ("unparsed", None)
    assert answer.detail == "the captions share no phrase; the first are: thinga; thingb; thingc"
    assert Captioner("captioner", numbered).answer(make_case(0, n_firing=0)).status == "too_few_examples"


@pytest.mark.parametrize("family", ["blip", "git", "vision-encoder-decoder"])
def test_captions_equal_those_that_the_model_gives_one_by_one(family: str, tmp_path: Path) -> None:
    model = save_tiny_captioner(tmp_path, family)
    rng = np.random.default_rng(0)
    four = rng.integers(0, 2, (20, 2, 2, 3)) * 255  # colours of the quarters; more images than a batch
    images = [Image.fromarray(np.kron(colours, np.ones((16, 16, 1))).astype(np.uint8)) for colours in four]
    captions = TransformersCaptions(str(tmp_path))(images)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for image, caption in list(zip(images, captions, strict=True))[::6]:
        x = torch.from_numpy((np.asarray(image) / 255 - mean) / std).float().permute(2, 0, 1)[None]
        (tokens,) = model.generate(pixel_values=x, max_new_tokens=24, do_sample=False).tolist()
        assert caption == " ".join(WORDS[token] for token in tokens if token not in (0, 2, 3, 1, 4))
    assert len(set(captions)) > 1


def test_a_model_that_is_missing_or_does_not_caption_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"someone/captions: no such folder here.*leave this labeller out, or copy the model's files"):
        TransformersCaptions("someone/captions")
    with pytest.raises(ModelError, match="OWNER/NAME"):
        TransformersCaptions("no such folder")
    save_tiny_clip(tmp_path)
    with pytest.raises(ModelError, match="is a clip model; a captioner must be of one of the families blip, git"):
        TransformersCaptions(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights"):
        TransformersCaptions(str(tmp_path))


def test_a_captioner_that_masks_at_random_is_refused(tmp_path: Path) -> None:
    save_tiny_captioner(tmp_path, "masked")
    with pytest.raises(ModelError, match=r"label.labellers.path: .*: captions a picture '.*' when alone, and '.*' in a batch"):
        TransformersCaptions(str(tmp_path))
