"""The steering score equals a plain script on transformers' own model, and the arm `untouched` shows what dropping the error does."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ommatid.config.models import LlavaModel
from ommatid.errors import InputError, ModelError
from ommatid.sae.model import SAE
from ommatid.vlm.speaking import Speaker, load_speaker
from ommatid.vlm.steering_score import DOSE, decode_clamped, score_steering
from support.tiny_llava import NOTHING, SPECIAL, VOCABULARY, WORDS, draw, make_sae, save_tiny_llava

LATENTS = [WORDS.index(word) for word in ("ring", "sand", "dot")]
SEEN = ["star", "ring", None, "leaf", "glass"]


class Joint:
    """A joint space of 24 dimensions, in which every text has a direction of its own, of a norm that does not matter."""

    d_embed = 24

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        generators = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
        return torch.stack([3.0 * torch.randn(self.d_embed, generator=generator) for generator in generators])


JOINT: Any = Joint()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Speaker:
    return load_speaker(LlavaModel(kind="llava", path=str(folder)), "float32")


def strongest() -> Tensor:
    """Return embeddings of 16 images for each latent, near that of its word, and of different norms."""
    words = JOINT.embed_text([WORDS[latent] for latent in LATENTS])
    near = words[:, None] + torch.randn(len(LATENTS), 16, Joint.d_embed, generator=torch.Generator().manual_seed(1))
    return near * torch.linspace(0.5, 2, 16)[:, None]


def keep(sae: SAE, latents: Sequence[int]) -> SAE:
    """Return the SAE with these latents only, so that it leaves an error; the others never fire."""
    kept = torch.zeros(sae.n_latents)
    kept[list(latents)] = 1
    return SAE(sae.config, sae.W_enc * kept, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)


def by_script(speaker: Speaker, folder: Path, sae: SAE, latent: int | None) -> list[str]:
    """Answer as the published script does: a block's output is encoded, clamped and decoded, and the text up to a blank is the word."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    block = model.model.vision_tower.encoder.layers[0]
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = plain(*args, **kwargs)
        pre = x @ sae.W_enc + sae.b_enc
        acts = torch.where(pre > sae.threshold, pre, 0.0)
        if latent is not None:
            acts[..., latent] = 100.0
        return acts @ sae.W_dec + sae.b_dec

    block.forward = forward
    words = []
    for image in draw(SEEN):
        inputs = speaker._prepare([image], "What is shown in this image? Use exactly one word!")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=5)[0]  # the script leaves sampling to the model's own settings, which are greedy
        whole = " ".join(VOCABULARY[int(i)] for i in ids if VOCABULARY[int(i)] not in SPECIAL)
        words.append(whole.split("Answer : ")[-1].split(" ")[0])
    return words


def test_scores_equal_those_of_the_published_script(speaker: Speaker, folder: Path) -> None:
    """Reproduced: question, clamped code without the error, word, text without a template, mean of raw embeddings, cosine.

    The script has no arm `untouched`; it is its computation with nothing clamped. Its mean and deviation are over all latents and images.
    """
    sae, embeddings = keep(make_sae(), [*range(8), len(WORDS)]), strongest()
    assert embeddings.norm(dim=2).std() > 1  # so that a mean of directions would be another one
    score = score_steering(speaker, sae, LATENTS, draw(SEEN), JOINT, embeddings, batch=2)
    rows = {"untouched": [by_script(speaker, folder, sae, None)] * 3, "targeted": [by_script(speaker, folder, sae, k) for k in LATENTS]}
    rows["none"] = [[word or NOTHING for word in SEEN]] * 3
    for arm, words in rows.items():
        assert score.words[arm] == tuple(map(tuple, words)), arm
        texts = torch.stack([torch.cat([JOINT.embed_text([word]) for word in row]) for row in words])
        published = torch.cat([torch.nn.functional.cosine_similarity(embeddings.mean(1), texts[:, i], dim=1) for i in range(len(SEEN))])
        torch.testing.assert_close(score.scores[arm].T.flatten(), published, atol=1e-5, rtol=0)
        assert float(score.means[arm].mean()) == pytest.approx(float(published.mean()), abs=1e-5)
    assert score.n_silent == {"none": 0, "untouched": 0, "targeted": 0}


def test_clamping_raises_the_score_of_the_planted_latents(speaker: Speaker) -> None:
    score = score_steering(speaker, make_sae(), LATENTS, draw(SEEN), JOINT, strongest())
    assert score.words["targeted"] == tuple((WORDS[latent],) * len(SEEN) for latent in LATENTS)
    assert score.words["untouched"] == score.words["none"]  # an SAE without an error
    assert (score.means["targeted"] - score.means["untouched"]).min() > 0.3


def test_dropping_the_error_alone_changes_answers(speaker: Speaker) -> None:
    """With an SAE that has no latent for what is in the images, the model sees nothing; beside `none`, that would count as steering."""
    score = score_steering(speaker, keep(make_sae(), [LATENTS[0], len(WORDS)]), LATENTS[:1], draw(["star"] * 3), JOINT, strongest()[:1])
    assert score.words["none"] == (("star",) * 3,) and score.words["untouched"] == ((NOTHING,) * 3,)


def test_silence_is_counted_and_has_no_score(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["star", ""], ["", "star"], ["", ""]])
    monkeypatch.setattr(speaker, "answer", lambda *_: next(answers))
    score = score_steering(speaker, make_sae(), [3], draw([None, None]), JOINT, strongest()[:1])
    assert score.n_silent == {"none": 1, "untouched": 1, "targeted": 2}
    assert score.words["none"] == (("star", ""),)
    assert torch.equal(score.means["none"], score.means["untouched"]) and score.means["targeted"].isnan().all()


def test_a_word_keeps_its_punctuation_as_in_the_script(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaker, "answer", lambda *_: ["A dog.", "Dog.", "..."])
    score = score_steering(speaker, make_sae(), [3], draw([None]), JOINT, strongest()[:1])
    assert score.words["none"] == (("A", "Dog.", "..."),)


def test_a_clamped_code_is_decoded_without_the_error() -> None:
    sae, x = make_sae(), torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    acts = sae.encode(x.flatten(0, 1))
    acts[:, 4] = DOSE
    torch.testing.assert_close(decode_clamped(sae, x, 4, DOSE), sae.decode(acts).reshape(2, 3, 16))
    torch.testing.assert_close(decode_clamped(sae, x), sae.decode(sae.encode(x.flatten(0, 1))).reshape(2, 3, 16))


def test_bad_input_is_refused(speaker: Speaker) -> None:
    sae, images = make_sae(), draw([None])

    def changed(**changes: Any) -> SAE:
        return SAE(replace(sae.config, **changes), sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)

    for wrong, message in (
        (changed(hookpoint="vision.blocks.7"), "has no such hookpoint"),
        (changed(target="vision.blocks.1"), "the SAE is a transcoder"),
        (changed(d_model=99), r"the SAE has width 99; an autoencoder of width 16 is needed at vision\.blocks\.0"),
    ):
        with pytest.raises(ModelError, match=message):
            score_steering(speaker, wrong, [0], images, JOINT, strongest()[:1])
    with pytest.raises(InputError, match=r"latents: 15: the SAE has the latents 0 to 14"):
        score_steering(speaker, sae, [3, 15], images, JOINT, strongest()[:2])
    for latents, embeddings in (([], strongest()[:0]), ([1], strongest()), ([1], strongest()[:1, :, :8])):
        with pytest.raises(InputError, match=rf"strongest: shape .*; expected \[{len(latents)}, n, 24\]"):
            score_steering(speaker, sae, latents, images, JOINT, embeddings)
    without_text: Any = SimpleNamespace(d_embed=None, name="dinov2")
    with pytest.raises(ModelError, match="dinov2: has no text tower, so words cannot be compared with images"):
        score_steering(speaker, sae, [1], images, without_text, strongest()[:1])
