"""A speaker is transformers' own model with one hook: it says what a clamped latent stands for, and controls do not make it do so."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ommatid.config.intervene import ONE_WORD
from ommatid.config.models import ClipModel, LlavaModel, QwenModel
from ommatid.errors import ConfigError, InputError, ModelError
from ommatid.vlm import Replacement, load_model, speaking
from ommatid.vlm.qwen import patch_order
from ommatid.vlm.speaking import Speaker, load_speaker, read_prompt
from support.models import save_llava, save_qwen
from support.tiny_llava import HOOKPOINT, NOTHING, VOCABULARY, WORDS, D, N, draw, make_sae, save_tiny_llava, save_words

SIZE = 32  # of Qwen's squares: 8 x 8 patches, 4 x 4 merge groups, windows of 3 x 3 groups
PLANTED = [WORDS.index(word) for word in ("grid", "fur", "glass")]
FAMILIES = ("llava", "next", "qwen2.5", "qwen2")


def load_tiny(folder: Path, dtype: Any = "float32") -> Speaker:
    return load_speaker(LlavaModel(kind="llava", path=str(folder)), dtype)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="module")
def speaker(tiny: Path) -> Speaker:
    return load_tiny(tiny)


# What the planted model says


def move(latent: int, dose: float, direction: Callable[[Tensor], Tensor] = lambda delta: delta) -> Replacement:
    """Set a latent to a dose on every token: x + (t - c) d; `direction` makes a control of the same size from (t - c) d."""
    sae = make_sae()

    def replace(x: Tensor) -> Tensor:
        acts = sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + direction((dose - acts[..., latent, None]) * sae.W_dec[latent])

    return replace


def at_random(seed: int) -> Callable[[Tensor], Tensor]:
    direction = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(seed)), dim=0)
    return lambda delta: delta.norm(dim=-1, keepdim=True) * direction


def without(word: str, n: int = 5) -> list[str | None]:
    return [other for other in (*WORDS, None) if other != word] * n


def said(speaker: Speaker, word: str, images: list[Image.Image], replacement: Replacement) -> float:
    """Return the share of answers that are a word."""
    answers = speaker.answer(images, replacement=replacement, hookpoint=HOOKPOINT)
    return sum(answer == word for answer in answers) / len(answers)


def test_the_planted_model_says_what_it_sees(speaker: Speaker) -> None:
    words = [*WORDS, None] * 5
    assert speaker.answer(draw(words)) == [word or NOTHING for word in words]


@pytest.mark.parametrize("latent", PLANTED)
def test_clamping_the_planted_latent_makes_it_say_the_word_and_controls_do_not(speaker: Speaker, latent: int) -> None:
    word, images, dose = WORDS[latent], draw(without(WORDS[latent])), 8.0
    assert word not in speaker.answer(images)
    assert said(speaker, word, images, move(latent, dose)) >= 0.95
    assert said(speaker, word, images, move(latent, dose, lambda delta: -delta)) <= 0.15
    others = [said(speaker, word, images, move(other, dose)) for other in range(N) if other != latent]
    assert max(others) <= 0.15
    random = [said(speaker, word, images, move(latent, dose, at_random(seed))) for seed in range(24)]
    assert sum(random) / len(random) <= 0.15 and max(random) > 0  # such directions do change answers


@pytest.mark.parametrize("latent", PLANTED)
def test_ablating_the_planted_latent_makes_it_fall_silent_and_others_do_not(speaker: Speaker, latent: int) -> None:
    word, images = WORDS[latent], draw([WORDS[latent]] * 40)
    assert said(speaker, word, images, lambda x: x) == 1
    assert said(speaker, word, images, move(latent, 0.0)) == 0
    assert all(said(speaker, word, images, move(other, 0.0)) >= 0.95 for other in range(N) if other != latent)
    assert said(speaker, word, images, move(latent, 0.0, at_random(0))) >= 0.85
    words = without(word)
    answers = speaker.answer(draw(words), replacement=move(latent, 0.0), hookpoint=HOOKPOINT)
    assert answers == [other or NOTHING for other in words]


def test_an_edit_reaches_the_projector_on_the_first_pass_and_on_later_ones(tiny: Path) -> None:
    """Transformers' own hooks on the blocks, which collect what the projector reads, exist only after the first pass."""
    speaker, images, edit = load_tiny(tiny), draw([None] * 3), move(4, 8.0)
    first = speaker.answer(images, replacement=edit, hookpoint=HOOKPOINT)
    plain = speaker.answer(images)
    again = speaker.answer(images, replacement=edit, hookpoint=HOOKPOINT)
    assert first == again == [WORDS[4]] * 3 and plain == [NOTHING] * 3


def test_tokens_are_those_that_extraction_captures(speaker: Speaker, tiny: Path) -> None:
    vision = load_model(LlavaModel(kind="llava", path=str(tiny)), "float32", "cpu")
    assert speaker.hookpoints == vision.hookpoints and speaker.preprocess == vision.preprocess
    images, seen = draw(["star", None]), []
    pixels = torch.from_numpy(np.stack([vision.preprocess(image) for image in images]))
    speaker.answer(images, replacement=lambda x: seen.append(x.clone()) or x, hookpoint=HOOKPOINT)
    torch.testing.assert_close(seen, [vision.capture(pixels, [HOOKPOINT]).tokens[HOOKPOINT]], atol=1e-6, rtol=1e-6)


# Against transformers


class Case:
    """A tiny model with random weights as a speaker, and plain transformers with inputs made by hand."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.question = family, "Use exactly one word !"
        rng = np.random.default_rng(0)
        self.images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in ((60, 80), (90, 40), (48, 48))]
        token = "<image>" if family in ("llava", "next") else "<|image_pad|>"
        self.image_id = VOCABULARY.index(token)
        if family in ("llava", "next"):
            save_llava(folder, next_=family == "next", image_token_index=self.image_id)
            cls: Any = LlavaNextForConditionalGeneration if family == "next" else LlavaForConditionalGeneration
            params: Any = LlavaModel(kind="llava", path=str(folder))
        else:
            save_qwen(folder, windows=family == "qwen2.5")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"image_token_id": self.image_id}))
            cls = Qwen2_5_VLForConditionalGeneration if family == "qwen2.5" else Qwen2VLForConditionalGeneration
            params = QwenModel(kind="qwen", path=str(folder), image_size=SIZE)
        save_words(folder, token)
        self.token, self.params = token, params
        self.speaker = load_speaker(params, "float32")
        self.full = cls.from_pretrained(folder).eval().requires_grad_(False)  # weights that want gradients are multiplied otherwise
        self.inputs = self._inputs(folder)

    def _inputs(self, folder: Path) -> dict[str, Tensor]:
        if self.family == "llava":
            batch = CLIPImageProcessorPil.from_pretrained(folder)(self.images, return_tensors="pt")
            counts = [9] * 3
        elif self.family == "next":
            batch = LlavaNextImageProcessorPil.from_pretrained(folder)(self.images, return_tensors="pt")
            with torch.no_grad():
                counts = [len(one) for one in self.full.get_image_features(**batch).pooler_output]
            assert len(set(counts)) > 1  # so that texts are padded
        else:
            squares = [image.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in self.images]
            batch = Qwen2VLImageProcessorPil.from_pretrained(folder)(squares, return_tensors="pt", do_resize=False)
            counts = [16] * 3
        texts = [f"User : {' '.join([self.token] * n)} {self.question} Answer :" for n in counts]
        tokenized = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True, padding_side="left")
        inputs = {**batch, "input_ids": tokenized["input_ids"], "attention_mask": tokenized["attention_mask"]}
        if self.family.startswith("qwen"):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_id).int()
        return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}

    def generate(self, n: int) -> Any:
        with torch.no_grad():
            return self.full.generate(**self.inputs, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True)

    def module(self, hookpoint: str) -> Any:
        is_llava = self.family in ("llava", "next")
        if hookpoint == "vision.projection":
            return self.full.model.multi_modal_projector if is_llava else self.full.model.visual.merger
        blocks = self.full.model.vision_tower.encoder.layers if is_llava else self.full.model.visual.blocks
        block, _, part = hookpoint.removeprefix("vision.blocks.").partition(".")
        return {"": blocks[int(block)], "attn": getattr(blocks[int(block)], "self_attn" if is_llava else "attn", None)}.get(
            part, blocks[int(block)].mlp
        )

    def read(self) -> list[str]:
        """Return the hookpoints on which the language model depends; LLaVA reads the second to last hidden state."""
        return [name for name in self.speaker.hookpoints if self.family.startswith("qwen") or not name.startswith("vision.blocks.2")]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(request.param, tmp_path_factory.mktemp(request.param))


def change(rows: Tensor) -> Tensor:
    """Change tokens, each in its own way by its place in the image, and so that no layer norm undoes it."""
    place, dimension = torch.linspace(-1, 1, rows.shape[1])[:, None], torch.linspace(-1, 1, rows.shape[2])
    return (0.5 + 0.3 * dimension) * rows + 0.5 * place * dimension


def patched(forward: Callable[..., Any], order: list[int] | None) -> Callable[..., Any]:
    """Return a block's forward with its output changed; `order` is that of the patches in Qwen's tower."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        x = output[0] if isinstance(output, tuple) else output
        if order is None:
            y = change(x)
        else:
            y = torch.empty_like(x)
            for image in range(len(x) // len(order)):
                own = slice(image * len(order), (image + 1) * len(order))
                rows = torch.empty_like(x[own])
                rows[order] = x[own]
                y[own] = change(rows[None])[0][order]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return run


def test_without_an_edit_and_with_an_empty_one_logits_are_transformers_own_bit_for_bit(case: Case) -> None:
    expected = case.generate(5)
    logprobs = expected.logits[0].float().log_softmax(-1)
    assert torch.equal(case.speaker.next_token_logprobs(case.images, case.question), logprobs)
    texts = [text.strip() for text in case.speaker._tokenizer.batch_decode(expected.sequences[:, -5:], skip_special_tokens=True)]
    assert case.speaker.answer(case.images, case.question, max_new_tokens=5) == texts
    for name in case.read():
        calls: list[torch.Size] = []
        same = case.speaker.next_token_logprobs(case.images, case.question, lambda x, calls=calls: calls.append(x.shape) or x, name)
        assert torch.equal(same, logprobs), name
        point = case.speaker.hookpoints[name]
        n_views = 9 if case.family == "next" else 3  # each of these three images has a base view and two tiles
        assert calls == [(n_views, point.n_tokens, point.d_model)]
        assert "replacing" not in repr(case.speaker._modules[name]._forward_hooks)


def test_an_edit_at_every_hookpoint_equals_a_patched_block_of_transformers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = case.speaker.next_token_logprobs(case.images, case.question)
    for name in case.read():
        order = None
        if case.family.startswith("qwen"):
            m, window = (1 if name == "vision.projection" else 2), (3 if case.family == "qwen2.5" else 1)
            order = patch_order(case.speaker.hookpoints[name].grid or (0, 0), m, window)
        module = case.module(name)
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", patched(module.forward, order))
            expected = case.generate(1).logits[0].float().log_softmax(-1)
        edited = case.speaker.next_token_logprobs(case.images, case.question, change, name)
        torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)
        assert (edited - plain).abs().max() > 1e-3, name


def test_a_batch_answers_as_single_images_do(case: Case) -> None:
    name = case.read()[-1]
    batch = case.speaker.next_token_logprobs(case.images, case.question, change, name)
    single = [case.speaker.next_token_logprobs([image], case.question, change, name) for image in case.images]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-4, rtol=1e-4)


def test_asking_again_gives_what_a_whole_pass_gives_bit_for_bit_and_runs_the_first_blocks_once(case: Case) -> None:
    for name in case.read():
        whole = [case.speaker.next_token_logprobs(case.images, case.question, one, name) for one in (change, lambda x: -x)]
        runs: list[int] = []
        handle = case.speaker._modules["vision.blocks.0.mlp"].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        other = "What is shown in this image ?"
        with case.speaker.asking(case.images, name, case.question, 2, read="vision.blocks.0") as asked:
            said = [asked.again(one, None) for one in (change, lambda x: -x, lambda x: x)]
            by_other_question = asked.again(None, other)
        handle.remove()
        assert [torch.equal(one.log_p, expected) for one, expected in zip(said, whole, strict=False)] == [True, True], name
        assert torch.equal(said[2].log_p, asked.plain.log_p) and said[2].answers == asked.plain.answers
        assert asked.plain.answers == tuple(case.speaker.answer(case.images, case.question, max_new_tokens=2))
        assert torch.equal(by_other_question.log_p, case.speaker.next_token_logprobs(case.images, other))
        assert len(runs) == (5 if name in ("vision.blocks.0.attn", "vision.blocks.0.mlp") else 1), name  # inside the first block
        seen: list[Tensor] = []
        case.speaker.answer(case.images, case.question, lambda x, seen=seen: seen.append(x.clone()) or x, "vision.blocks.0", 1)
        assert torch.equal(asked.tokens, seen[0])
        assert asked.n_views == (3 if case.family == "next" else 1,) * 3
        assert "forward" not in vars(case.speaker._modules["vision.blocks.0"])


def test_a_forward_that_accelerate_put_on_a_block_is_kept(speaker: Speaker) -> None:
    block = speaker._modules[HOOKPOINT]
    block.forward = own = block.forward
    with speaker.asking(draw(["star"]), HOOKPOINT) as asked:
        assert asked.again(lambda x: x, None).answers == ("star",)
    assert block.forward is own
    del block.forward


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (33, 90), (90, 33), (55, 48)])
def test_a_mask_of_an_image_is_that_of_the_same_area_in_every_view(tmp_path: Path, size: tuple[int, int]) -> None:
    """In the tower's own input, the patches that the mask chooses are bright in the middle, as the area is white, and no others are."""
    save_words(save_llava(tmp_path, next_=True, image_token_index=VOCABULARY.index("<image>")))
    speaker = load_speaker(LlavaModel(kind="llava", path=str(tmp_path)), "float32")
    masks = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 1], [1, 0, 1]]]).bool()
    images = [
        Image.fromarray((255 * mask).byte().numpy()).convert("RGB").resize((size[1], size[0]), Image.Resampling.NEAREST) for mask in masks
    ]
    views = speaker.spread_masks(images, masks)
    inputs = speaker._prepare(images, "a")["pixel_values"].flatten(0, 1)
    middles = inputs.mean(1).unflatten(1, (3, 16)).unflatten(3, (3, 16))[:, :, 7:9, :, 7:9].mean((2, 4))
    assert views.shape == middles.shape == (6, 3, 3)  # each image has a base view and two tiles
    assert torch.equal(views, middles > middles.amax() / 2 + middles.amin() / 2)
    assert torch.equal(views[[0, 3]], masks) and views[1:3].any()
    pixels = torch.from_numpy(np.stack([speaker.preprocess(image) for image in images]))
    assert torch.equal(speaker.spread_masks(pixels, masks)[[0, 3]], masks)


def test_an_image_of_another_family_is_its_own_view(speaker: Speaker) -> None:
    masks = torch.tensor([[[True, False], [False, False]]])
    assert speaker.spread_masks(draw([None]), masks) is masks


def test_pixels_of_the_tower_answer_as_images_do(case: Case) -> None:
    pixels = torch.from_numpy(np.stack([case.speaker.preprocess(image) for image in case.images]))
    by_pixels = case.speaker.next_token_logprobs(pixels, case.question)
    by_image = case.speaker.next_token_logprobs(case.images, case.question)
    if case.family == "next":  # whose tiles are cut from the base view then
        assert by_pixels.shape == by_image.shape and not torch.equal(by_pixels, by_image)
    else:
        torch.testing.assert_close(by_pixels, by_image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_empty_edits_are_bit_equal(case: Case, dtype: Any) -> None:
    speaker = load_speaker(case.params, dtype)
    assert speaker.dtype == getattr(torch, dtype)
    exact = case.speaker.next_token_logprobs(case.images, case.question)
    half = speaker.next_token_logprobs(case.images, case.question)
    assert 0 < (half - exact).abs().max() < 0.1
    seen = []
    same = speaker.next_token_logprobs(case.images, case.question, lambda x: seen.append(x.dtype) or x, case.read()[0])
    assert torch.equal(same, half) and seen == [torch.float32]


def test_an_edit_that_the_data_type_cannot_hold_is_refused(tiny: Path) -> None:
    speaker, images = load_tiny(tiny, "float16"), draw(["leaf"])
    assert speaker.answer(images, replacement=move(4, 100.0), hookpoint=HOOKPOINT) == [WORDS[4]]
    with pytest.raises(ModelError, match=r"'vision\.blocks\.0': the replaced tokens are not finite in torch\.float16"):
        speaker.answer(images, replacement=move(4, 1e6), hookpoint=HOOKPOINT)


# Prompts and words


def test_prompts_are_texts_or_files(speaker: Speaker, tmp_path: Path) -> None:
    assert read_prompt(ONE_WORD) == "What is shown in this image? Use exactly one word!"
    images = draw(["star", None])
    file = tmp_path / "prompt.txt"
    file.write_text("Use exactly one word : brick\n")
    assert speaker.answer(images, file) == speaker.answer(images, "Use exactly one word : brick") == ["brick", "brick"]
    with pytest.raises(ConfigError, match=r"prompt: is empty; write a question"):
        speaker.answer(images, " \n")
    file.write_text("\n")
    with pytest.raises(ConfigError, match=r"prompt: the file .*prompt\.txt is empty"):
        speaker.answer(images, file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"prompt\.txt: cannot be read as UTF-8 text"):
        speaker.answer(images, file)
    with pytest.raises(ConfigError, match=r"nowhere\.txt: cannot be read"):
        speaker.answer(images, tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match="prompt: contains <image>, which stands for the image; leave it out"):
        speaker.answer(images, "What is in <image> ?")


def test_first_tokens_are_the_columns_of_words(speaker: Speaker) -> None:
    columns = speaker.first_tokens(WORDS)
    logprobs = speaker.next_token_logprobs(draw(WORDS))
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(N))
    assert [columns[i] for i in logprobs[:, columns].argmax(1)] == columns
    with pytest.raises(ConfigError, match=r"word ' ': the tokenizer of .* makes no token of it"):
        speaker.first_tokens(["star", " "])
    assert speaker.beginnings("Star") == [VOCABULARY.index("star")] and speaker.beginnings("answer") == [VOCABULARY.index("Answer")]
    with pytest.raises(InputError, match=r"the tokenizer of .* does not know the word 'zebra', so it cannot be looked for in answers"):
        speaker.beginnings("zebra")


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hookpoint": "vision.blocks.9", "replacement": change}, ModelError, r"'vision\.blocks\.9': .* has no such hookpoint"),
        (
            {"hookpoint": "vision.blocks.1.mlp", "replacement": change},
            ModelError,
            r"'vision\.blocks\.1\.mlp': the language model of .* does not depend on it.* the last block that it reads is vision\.blocks\.0",
        ),
        ({"hookpoint": HOOKPOINT}, InputError, "only one of them was given"),
        ({"replacement": change}, InputError, "only one of them was given"),
        ({"images": []}, InputError, "images: none were given"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens: got 0; expected 1 or more"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(
    speaker: Speaker, changes: dict, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaker._model, "generate", None)
    with pytest.raises(error, match=message):
        speaker.answer(**{"images": draw([None]), **changes})


def test_a_model_without_a_language_model_is_refused(copy: Path) -> None:
    with pytest.raises(ModelError, match="clip models have no language model and cannot answer in words; use kind llava or qwen"):
        load_speaker(ClipModel(kind="clip"))
    weights = load_file(copy / "model.safetensors")
    tower = {name: tensor for name, tensor in weights.items() if not name.startswith("language_model")}
    assert len(tower) < len(weights)
    save_file(tower, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack .*language_model"):
        load_tiny(copy)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = 4 * sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert needed == 4 * 6616
    monkeypatch.setattr(speaking, "free_memory", lambda device: needed)
    load_tiny(tiny)
    monkeypatch.setattr(speaking, "free_memory", lambda device: needed - 1)
    load_tiny(tiny, "bfloat16")  # takes half
    monkeypatch.setattr(speaking.hub, "load_weights", None)
    with pytest.raises(
        ModelError, match=r"the weights take 2\.65e-05 GB in float32, but only 2\.65e-05 GB are free in main memory; .*bfloat16"
    ):
        load_tiny(tiny)
    monkeypatch.setattr(speaking, "free_memory", lambda device: 10**9 if device.type == "cpu" else 1000)
    with pytest.raises(ModelError, match="but only 1e-06 GB are free in cuda"):
        load_speaker(LlavaModel(kind="llava", path=str(tiny)), "float32", "cuda")
    shards = save_llava(tmp_path, shards=True, image_token_index=VOCABULARY.index("<image>"))
    save_words(shards)
    n = sum(tensor.numel() for file in shards.glob("*.safetensors") for tensor in load_file(file).values())
    monkeypatch.setattr(speaking, "free_memory", lambda device: 0)
    with pytest.raises(ModelError, match=f"the weights take {4 * n / 1e9:.3g} GB"):
        load_tiny(shards)


def test_quantised_weights_are_refused_before_they_are_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(speaking.hub, "load_weights", None)
    with pytest.raises(ModelError, match=r"its weights are quantised \(bitsandbytes, according to quantization_config in config\.json\)"):
        load_tiny(copy)


def test_a_device_map_needs_accelerate(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaking, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"device_map: 'auto' needs accelerate, which is not installed; `pip install accelerate`"):
        load_speaker(LlavaModel(kind="llava", path=str(tiny)), "float32", device_map="auto")


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"missing in this folder: a tokenizer \(tokenizer\.json"):
        load_tiny(copy)


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
def test_chat_templates_are_found_in_every_file(copy: Path, speaker: Speaker, file: str) -> None:
    template = copy / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    with pytest.raises(ModelError, match=r"the folder has no chat template \(chat_template\.jinja, "):
        load_tiny(copy)
    settings = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps(settings | {"chat_template": text}))
    images = draw(["star", "sand"])
    assert torch.equal(load_tiny(copy).next_token_logprobs(images), speaker.next_token_logprobs(images))
    (copy / file).write_text(json.dumps(settings | {"chat_template": "Answer :"}))
    with pytest.raises(ModelError, match=r"cannot be read|make no token of the image"):
        load_tiny(copy)


def test_loading_and_answering_are_silent_and_leave_the_random_state(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    load_tiny(tiny).answer(draw(["star"]), replacement=move(3, 8.0), hookpoint=HOOKPOINT)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), state)
