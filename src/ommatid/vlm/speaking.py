"""Whole LLaVA 1.5, LLaVA-NeXT, Qwen2.5-VL and Qwen2-VL models, which answer in words while the tokens of their tower are replaced.

Everything but the hook at the hookpoint is transformers' own: the classes, the processors, the chat templates and `generate`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.processing_utils import ProcessorMixin

from ommatid.compute.hardware import free_memory
from ommatid.config.intervene import ONE_WORD
from ommatid.config.models import LlavaModel, Model, QwenModel
from ommatid.errors import ConfigError, InputError, ModelError
from ommatid.vlm import Dtype, Hookpoint, Replacement, check_hookpoint, hub, llava, partial_loading, qwen
from ommatid.vlm.hooks import capturing, replacing, skipping
from ommatid.vlm.network_checks import SHAPES, structured_picture
from ommatid.vlm.precision import resolve_dtype
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.processor import load_image_processor
from ommatid.vlm.tower import KEY, Site

MAX_NEW_TOKENS = 20
"""Largest number of tokens in an answer, unless another is asked for."""
NEEDS = hub.CONFIG | partial_loading.SHARDS | hub.PREPROCESSOR | hub.TOKENIZER
TEMPLATES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
"""Files of a folder in which its chat template may be; the tokenizer's own is used if none of them has one."""

SpeakerDtype = Dtype | Literal["float16"]
DeviceMap = str | Mapping[str, int | str]
"""Devices of the sub-modules, as accelerate takes them: "auto", or a device for each."""
Images = Sequence[Image.Image] | UInt8[Tensor, "batch height width 3"]
"""Images, or uint8 pixels `(b, H, W, 3)` from `Speaker.preprocess`."""


@dataclass(frozen=True, eq=False)
class Said:
    """What a model says of a batch of images."""

    answers: tuple[str, ...]
    """The answer for each image, without the prompt, special tokens, or blanks at its ends; "" if the model ends it at once."""
    log_p: Float32[Tensor, "batch n_vocabulary"]
    """Log-probabilities of the first token of each answer, `(b, n_vocabulary)` float32, on the device of the model's output."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question asked about a batch of images, which can be asked again while tokens are replaced."""

    plain: Said
    """What the model says as it is."""
    tokens: Float32[Tensor, "views tokens d_model"]
    """Tokens at the hookpoint that is read, `(v, n_tokens, d_model)` float32; only LLaVA-NeXT has several views of an image."""
    n_views: tuple[int, ...]
    """Number of views of each image, one after another in the first axis of the tokens."""
    again: Callable[[Replacement | None, str | None], Said]
    """Function that asks again: with a replacement of the tokens at the hookpoint, and with another question; None for the same."""


class Speaker(ABC):
    """A vision tower and the language model that answers questions on its images.

    Hookpoints are those of the tower that `load_model` loads from the same folder, with tokens in the same order, so that SAEs trained on
    its activations apply. They are replaced by forward hooks; a replacement receives float32 tokens on the device of the hookpoint,
    `(b, n_tokens, d_model)`, and what it returns is converted to the data type of the model.
    """

    def __init__(self, path: str, config: Any, preprocess: Preprocess, sites: Mapping[str, Site], model: Any, processor: Any) -> None:
        self.name = path
        self.preprocess = preprocess
        """Function from an RGB image to the pixels that `answer` takes, which is that of the tower."""
        self.hookpoints: Mapping[str, Hookpoint] = {name: site.hookpoint for name, site in sites.items()}
        self.dtype: torch.dtype = model.dtype
        self._modules = {name: site.module for name, site in sites.items()}
        self._bottlenecks = {name for name, site in sites.items() if site.is_bottleneck}
        self._model, self._processor, self._tokenizer = model, processor, processor.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        with hub.reading(path, KEY, "its processor"):
            ids = self._prepare([structured_picture(*SHAPES[0])], "a")["input_ids"]
        if not (ids == config.image_token_id).any():
            raise ModelError(
                f"{KEY}: {path}: its chat template and tokenizer make no token of the image, which is number {config.image_token_id} "
                f"according to config.json; do {', '.join(TEMPLATES)} and the tokenizer belong to this model?"
            )

    def answer(
        self,
        images: Images,
        prompt: str | Path = ONE_WORD,
        replacement: Replacement | None = None,
        hookpoint: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """Answer a question on each image of a batch, by greedy decoding.

        Args:
            images: The images. From pixels, the processor makes no other crop.
            prompt: The question, or the path of a text file that holds it. The model's chat template puts it after the image.
            replacement: Function that replaces the tokens at the hookpoint; it is called once. None leaves the model as it is.
            hookpoint: Name of the hookpoint; None if nothing is replaced.
            max_new_tokens: Largest number of tokens in an answer.

        Returns:
            The answers, without the prompt, special tokens, or blanks at their ends.

        Raises:
            ConfigError: The prompt is empty or unreadable, or names the token of the image; or `max_new_tokens` is below 1.
            InputError: There are no images, or only one of `replacement` and `hookpoint` is given.
            ModelError: The hookpoint is unknown or nothing follows it, or the replaced tokens are not finite in the model's data type.
        """
        return list(self._ask(images, prompt, replacement, hookpoint, max_new_tokens).answers)

    def next_token_logprobs(
        self,
        images: Images,
        prompt: str | Path = ONE_WORD,
        replacement: Replacement | None = None,
        hookpoint: str | None = None,
    ) -> Float32[Tensor, "batch n_vocabulary"]:
        """Return the log-probabilities of the first token of the answers, `(b, n_vocabulary)` float32, on the CPU.

        Arguments and errors are those of `answer`. `first_tokens` gives the columns of words.
        """
        return self._ask(images, prompt, replacement, hookpoint, 1).log_p.cpu()

    @contextmanager
    def asking(
        self,
        images: Images,
        hookpoint: str,
        prompt: str | Path = ONE_WORD,
        max_new_tokens: int = MAX_NEW_TOKENS,
        read: str | None = None,
    ) -> Iterator[Asked]:
        """Ask a question about a batch of images, and inside the block again and again while tokens are replaced.

        The blocks of the tower before the hookpoint run once. The rest of the tower, the projector and the language model run once each
        time, with the same batch, so that a replacement that returns its argument gives the plain answer bit for bit.

        Args:
            images: The images, as for `answer`.
            hookpoint: Name of the hookpoint whose tokens are replaced.
            prompt: The question, or the path of a text file that holds it.
            max_new_tokens: Largest number of tokens in an answer.
            read: Hookpoint whose tokens are returned; None for the one whose tokens are replaced.

        Yields:
            The plain answers, the tokens, and the function that asks again.

        Raises:
            ConfigError, InputError, ModelError: As for `answer`.
        """
        for name in (hookpoint, read or hookpoint):
            check_hookpoint(self, name)
        self._check_read(hookpoint)
        names = list(self._modules)
        before = [self._modules[name] for name in names[: names.index(hookpoint) + 1] if name in self._bottlenecks]
        inputs = self._prepare(images, self._check(images, prompt, max_new_tokens))
        wanted = {"read": self._modules[read or hookpoint]} | ({"state": before[-1]} if before else {})
        with capturing(wanted) as seen:
            plain = self._say(inputs, max_new_tokens)
        tokens = self._as_tokens(seen["read"], read or hookpoint).float()

        def again(replacement: Replacement | None, question: str | None) -> Said:
            asked = inputs if question is None else self._prepare(images, self._check(images, question, max_new_tokens))
            with nullcontext() if replacement is None else self._replacing(replacement, hookpoint):
                return self._say(asked, max_new_tokens)

        with skipping(before, seen["state"]) if before else nullcontext():
            yield Asked(plain, tokens, tuple(self.count_views(images)), again)

    def count_views(self, images: Images) -> list[int]:
        """Return the number of views of each image that go through the tower."""
        return [self._count_views(image) for image in images]

    def spread_masks(self, images: Images, masks: Bool[Tensor, "batch rows cols"]) -> Bool[Tensor, "views rows cols"]:
        """Turn masks of images into masks of the views that a replacement receives: here each image is its only view.

        Args:
            images: The images, as for `answer`.
            masks: Whether each patch of the whole image is chosen, `(b, rows, columns)`.

        Returns:
            Whether each patch of each view is chosen, `(v, rows, columns)`.
        """
        return masks

    def first_tokens(self, words: Sequence[str]) -> list[int]:
        """Return the number of the first token of each word, as a word begins an answer.

        Raises:
            ConfigError: A word has no token.
        """
        ids = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, tokens in zip(words, ids, strict=True):
            if not tokens:
                raise ConfigError(f"word {word!r}: the tokenizer of {self.name} makes no token of it")
        return [tokens[0] for tokens in ids]

    def beginnings(self, word: str) -> list[int]:
        """Return the numbers of the first tokens of a word as an answer may begin with it: as it is, in lower case, and capitalised.

        Raises:
            InputError: The tokenizer does not know the word.
        """
        tokens = {token for one in (word, word.lower(), word.capitalize()) for token in self.first_tokens([one])}
        if not (known := tokens - {self._tokenizer.unk_token_id}):
            raise InputError(f"the tokenizer of {self.name} does not know the word {word!r}, so it cannot be looked for in answers")
        return sorted(known)

    def _ask(self, images: Images, prompt: str | Path, replacement: Replacement | None, hookpoint: str | None, n: int) -> Said:
        question = self._check(images, prompt, n)
        with self._replacing(replacement, hookpoint):
            return self._say(self._prepare(images, question), n)

    def _check(self, images: Images, prompt: str | Path, n: int) -> str:
        """Return the question, after checking it, and that there are images and that the answers may have a token."""
        question = self.check_question(prompt)
        if len(images) == 0:
            raise InputError("images: none were given; expected one or more")
        if n < 1:
            raise ConfigError(f"max_new_tokens: got {n}; expected 1 or more")
        return question

    @torch.inference_mode()
    def _say(self, inputs: Mapping[str, Tensor], n: int) -> Said:
        """Answer by greedy decoding, with at most n tokens."""
        sampling = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        returned = {"return_dict_in_generate": True, "output_logits": True}
        with hub.quiet():
            output = self._model.generate(**inputs, **sampling, **returned, max_new_tokens=n, pad_token_id=self._tokenizer.pad_token_id)
        log_p = output.logits[0].float().log_softmax(-1)
        if not log_p.isfinite().all():
            raise ModelError(f"{self.name}: its output is not finite in {self.dtype}; compute in bfloat16 or float32")
        texts = self._tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return Said(tuple(text.strip() for text in texts), log_p)

    def check_question(self, prompt: str | Path) -> str:
        """Return a question, or that in a text file, as the model is asked it.

        Raises:
            ConfigError: It is empty or unreadable, or names the token of the image.
        """
        question, token = read_prompt(prompt), self._processor.image_token
        if token in question:
            raise ConfigError(f"prompt: contains {token}, which stands for the image; leave it out: the chat template adds it")
        return question

    def _replacing(self, replacement: Replacement | None, hookpoint: str | None) -> AbstractContextManager[None]:
        if replacement is None and hookpoint is None:
            return nullcontext()
        if replacement is None or hookpoint is None:
            raise InputError("replacement and hookpoint: only one of them was given; give both, or neither")
        check_hookpoint(self, hookpoint)
        self._check_read(hookpoint)
        return replacing(self._modules[hookpoint], lambda output: self._replace(output, hookpoint, replacement))

    def _replace(self, output: Tensor, hookpoint: str, replacement: Replacement) -> Tensor:
        tokens = self._as_tokens(output, hookpoint).float()
        changed = replacement(tokens)
        assert changed.shape == tokens.shape, f"tokens {tuple(changed.shape)} cannot take the place of {tuple(tokens.shape)}"
        changed = changed.to(output)
        if not changed.isfinite().all():
            raise ModelError(
                f"hookpoint {hookpoint!r}: the replaced tokens are not finite in {self.dtype}, in which {self.name} computes; use a lower "
                "dose, or compute in bfloat16 or float32"
            )
        return self._as_output(changed, hookpoint).reshape(output.shape)

    def _prepare(self, images: Images, question: str) -> Mapping[str, Tensor]:
        """Return the inputs of the model for a question on each image."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        # Templates that write the token of the text's beginning themselves would have it twice.
        bos = self._tokenizer.bos_token
        is_begun = bos is not None and text.startswith(bos)
        settings = {"return_tensors": "pt", "padding": True, "add_special_tokens": not is_begun}
        inputs = self._process(images, [text] * len(images), settings)
        return {
            name: x.to(self._model.device, self.dtype) if x.is_floating_point() else x.to(self._model.device) for name, x in inputs.items()
        }

    def _count_views(self, image: Image.Image | Tensor) -> int:
        """Return the number of views of an image that go through the tower."""
        return 1

    @abstractmethod
    def _process(self, images: Images, texts: list[str], settings: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Run the model's processor on images and texts."""

    def _check_read(self, hookpoint: str) -> None:
        """Check that the language model depends on a hookpoint."""
        return

    def _as_tokens(self, output: Tensor, hookpoint: str) -> Tensor:
        """Return the output of a hookpoint's module as tokens `(b, n_tokens, d_model)`, row by row."""
        return output

    def _as_output(self, tokens: Tensor, hookpoint: str) -> Tensor:
        """Return tokens in the order of the module's output."""
        return tokens


class LlavaSpeaker(Speaker):
    """LLaVA 1.5 or LLaVA-NeXT.

    LLaVA-NeXT sends every view of an image through the same tower: first the base view, which is the whole image and the only one that
    extraction captures, then the tiles of a larger version. All of them are replaced, or what was removed from the base view would
    still be seen in the tiles. So the first axis of the tokens that a replacement receives counts views, those of an image one after
    another. Tiles of pixels, which are the base view already, are no sharper than it: give images.
    """

    def __init__(self, path: str, dtype: SpeakerDtype, device: str, device_map: DeviceMap | None) -> None:
        folder = hub.locate(path, KEY, NEEDS)
        config = hub.load_config(folder, path, KEY)
        llava.check_config(config, path)
        self._is_next = config.model_type == "llava_next"
        preprocess = llava.load_tower_preprocess(folder, config, path)
        cls = LlavaNextForConditionalGeneration if self._is_next else LlavaForConditionalGeneration
        model = _load(cls, folder, path, dtype, device, device_map)
        settings = {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": len(llava.special_tokens(config)),
        }
        processor = _load_processor(LlavaNextProcessor if self._is_next else LlavaProcessor, folder, path, **settings)
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        sites = llava.make_sites(tower, projector, config, preprocess)
        chosen, n_states = config.vision_feature_layer, len(tower.encoder.layers) + 1
        # Hidden state i + 1 leaves block i.
        self._n_read = max(layer % n_states for layer in ([chosen] if isinstance(chosen, int) else chosen))
        super().__init__(path, config, preprocess, sites, model, processor)

    def _process(self, images: Images, texts: list[str], settings: Mapping[str, Any]) -> Mapping[str, Tensor]:
        is_cropped = isinstance(images, Tensor) and not self._is_next
        kept = {"do_resize": False, "do_center_crop": False} if is_cropped else {}
        return self._processor(images=_as_pictures(images), text=texts, **kept, **settings)

    def spread_masks(self, images: Images, masks: Bool[Tensor, "batch rows cols"]) -> Bool[Tensor, "views rows cols"]:
        """Turn masks of the base views into masks of all views: in a tile, a patch is chosen where its centre lies in the mask.

        Tiles are cut from a larger version of the image that keeps its aspect ratio, with a margin around it. Patches of the margin are
        never chosen.
        """
        if not self._is_next:
            return masks
        found = []
        for mask, image in zip(masks, images, strict=True):
            found += [mask[None], self._cut(mask, *self._enlarge(image))]
        return torch.cat(found)

    def _count_views(self, image: Image.Image | Tensor) -> int:
        if not self._is_next:
            return 1
        _, whole = self._enlarge(image)
        return 1 + math.prod(all_ // side for all_, side in zip(whole, self.preprocess.crop, strict=True))

    def _enlarge(self, image: Image.Image | Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the height and width of an image, and of the larger version with its margin, which is cut into tiles."""
        height, width = image.shape[:2] if isinstance(image, Tensor) else image.size[::-1]
        return (height, width), select_best_resolution((height, width), self._processor.image_processor.image_grid_pinpoints)

    def _cut(self, mask: Bool[Tensor, "rows cols"], size: tuple[int, int], whole: tuple[int, int]) -> Bool[Tensor, "tiles rows cols"]:
        """Return the mask in each tile of an image."""
        scale = min(whole[0] / size[0], whole[1] / size[1])
        axes = []
        for all_, own, side, n in zip(whole, size, self.preprocess.crop, mask.shape, strict=True):
            inside = min(math.ceil(own * scale), all_)
            centres = (torch.arange(all_ // side * n) + 0.5) * side / n - (all_ - inside) // 2
            axes.append((centres / inside * n).floor().long())
        rows, cols = axes
        is_inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((cols >= 0) & (cols < mask.shape[1]))
        large = mask[rows.clamp(0, mask.shape[0] - 1)][:, cols.clamp(0, mask.shape[1] - 1)] & is_inside.to(mask.device)
        tiles = large.unflatten(0, (-1, mask.shape[0])).unflatten(2, (-1, mask.shape[1])).transpose(1, 2)
        return tiles.flatten(0, 1)

    def _check_read(self, hookpoint: str) -> None:
        block = hookpoint.split(".")[2:3]
        if block and int(block[0]) >= self._n_read:
            last = f"vision.blocks.{self._n_read - 1}" if self._n_read else "none"
            raise ModelError(
                f"hookpoint {hookpoint!r}: the language model of {self.name} does not depend on it, because vision_feature_layer in "
                f"config.json selects an earlier state; the last block that it reads is {last}"
            )


class QwenSpeaker(Speaker):
    """Qwen2.5-VL or Qwen2-VL. Images are resized to a square, as for extraction; the processor by itself would keep the aspect ratio."""

    def __init__(self, path: str, image_size: int, dtype: SpeakerDtype, device: str, device_map: DeviceMap | None) -> None:
        folder = hub.locate(path, KEY, NEEDS)
        config = hub.load_config(folder, path, KEY)
        grid = qwen.check_config(config, image_size, path)
        preprocess = qwen.load_tower_preprocess(folder, config, image_size, path)
        is_newer = config.model_type == "qwen2_5_vl"
        model = _load(
            Qwen2_5_VLForConditionalGeneration if is_newer else Qwen2VLForConditionalGeneration, folder, path, dtype, device, device_map
        )
        processor = _load_processor(_QwenImages, folder, path)
        sites = qwen.make_sites(model.model.visual, config, grid)
        self._orders = {name: qwen.tower_order(name, site.hookpoint, config.vision_config) for name, site in sites.items()}
        super().__init__(path, config, preprocess, sites, model, processor)

    def _process(self, images: Images, texts: list[str], settings: Mapping[str, Any]) -> Mapping[str, Tensor]:
        pictures = _as_pictures(images if isinstance(images, Tensor) else [Image.fromarray(self.preprocess(image)) for image in images])
        return self._processor(images=pictures, text=texts, do_resize=False, **settings)

    def _as_tokens(self, output: Tensor, hookpoint: str) -> Tensor:
        order = self._orders[hookpoint].to(output.device)
        return output.unflatten(0, (-1, len(order)))[:, order.argsort()]

    def _as_output(self, tokens: Tensor, hookpoint: str) -> Tensor:
        return tokens[:, self._orders[hookpoint].to(tokens.device)]


class _QwenImages(Qwen2VLProcessor):
    """The processor without that for videos, which needs torchvision; the class for Qwen2.5-VL treats images and texts in the same way."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_speaker(
    params: Model, dtype: SpeakerDtype = "auto", device: str = "cpu", device_map: DeviceMap | None = None
) -> LlavaSpeaker | QwenSpeaker:
    """Load a whole model.

    Args:
        params: Section of the parameters, as for the tower.
        dtype: Data type of all weights; `auto` is bfloat16 if the hardware computes in it, and float32 otherwise.
        device: Device of the model, unless there is a device map.
        device_map: Devices of the sub-modules, which needs accelerate; None puts the whole model on `device`.

    Returns:
        The model, ready to answer.

    Raises:
        ModelError: The kind has no language model, files cannot be found or used, or the weights do not fit into memory. The message says
            which, and what to do.
    """
    known = check_speaks(params)
    if isinstance(known, LlavaModel):
        return LlavaSpeaker(known.path, dtype, device, device_map)
    return QwenSpeaker(known.path, known.image_size, dtype, device, device_map)


def check_speaks(params: Model) -> LlavaModel | QwenModel:
    """Return the section of a model that answers in words.

    Raises:
        ModelError: The kind has no language model.
    """
    if not isinstance(params, LlavaModel | QwenModel):
        raise ModelError(
            f"extract.model.kind: {params.kind} models have no language model and cannot answer in words; use kind llava or qwen"
        )
    return params


def read_prompt(prompt: str | Path, key: str = "prompt") -> str:
    """Return a prompt, or the text of the file that holds it, without blanks at its ends.

    Args:
        prompt: The prompt, or the path of the file.
        key: What the prompt is called in messages.

    Raises:
        ConfigError: The file cannot be read as UTF-8 text, or the prompt is empty.
    """
    try:
        text = prompt.read_text(encoding="utf-8") if isinstance(prompt, Path) else prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {prompt}: cannot be read as UTF-8 text ({error}); name a text file") from None
    if not text.strip():
        where = f"the file {prompt} is empty" if isinstance(prompt, Path) else "is empty"
        raise ConfigError(f'{key}: {where}; write a question, such as "What is shown in this image?"')
    return text.strip()


def _load(cls: Any, folder: Path, path: str, dtype: SpeakerDtype, device: str, device_map: DeviceMap | None) -> Any:
    """Load a whole model after checking that it fits."""
    if device_map is not None and find_spec("accelerate") is None:
        raise ModelError(f"device_map: {device_map!r} needs accelerate, which is not installed; `pip install accelerate`, or leave it out")
    resolved = torch.float16 if dtype == "float16" else resolve_dtype(dtype, device)
    _check_unquantised(folder, path)
    needed = partial_loading.count_weights(folder, path, KEY) * resolved.itemsize
    for place, free in _free(device, device_map).items():
        if needed > free:
            name = str(resolved).removeprefix("torch.")
            raise ModelError(
                f"{KEY}: {path}: the weights take {needed / 1e9:.3g} GB in {name}, but only {free / 1e9:.3g} GB are free in {place}; close "
                "other programs, load it in bfloat16 or float16, or use a smaller model, more memory, or a device_map over several devices"
            )
    model, _ = hub.load_weights(cls, folder, path, KEY, dtype=resolved, device_map=device_map)
    return model if device_map is not None else model.to(device)


def _check_unquantised(folder: Path, path: str) -> None:
    """Check that a folder has weights that transformers loads by itself."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if found:
        method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else "an unknown method"
        raise ModelError(
            f"{KEY}: {path}: its weights are quantised ({method}, according to quantization_config in config.json), and loading them needs "
            "packages that are not installed with Ommatid; name a folder with the weights in float32, bfloat16 or float16"
        )


def _free(device: str, device_map: DeviceMap | None) -> Mapping[str, int]:
    """Return the free bytes of the places through which the weights pass; a device map may use all of them together."""
    main = free_memory(torch.device("cpu"))
    if device_map is not None:
        gpus = sum(free_memory(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
        return {"main memory and GPUs together": main + gpus}
    own = {} if torch.device(device).type == "cpu" else {device: free_memory(torch.device(device))}
    return {"main memory": main, **own}


def _load_processor(cls: Callable[..., Any], folder: Path, path: str, **settings: Any) -> Any:
    """Make the processor of images and texts with the folder's image processor, tokenizer and chat template."""
    tokenizer = hub.load_tokenizer(folder, path, KEY)
    with hub.reading(path, KEY, "its processor"):
        template = _find_template(folder) or tokenizer.chat_template
        if not template:
            raise ModelError(
                f"{KEY}: {path}: the folder has no chat template ({', '.join(TEMPLATES)}), so prompts cannot be written for it"
            )
        return cls(load_image_processor(folder), tokenizer, chat_template=template, **settings)


def _find_template(folder: Path) -> str | None:
    """Return the chat template in the files of TEMPLATES."""
    for file in (folder / name for name in TEMPLATES):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            if template := text if file.suffix == ".jinja" else json.loads(text).get("chat_template"):
                return template
    return None


def _as_pictures(images: Images) -> list[Image.Image]:
    """Return images as RGB pictures."""
    if isinstance(images, Tensor):
        return [Image.fromarray(one.cpu().numpy()) for one in images]
    return [image.convert("RGB") for image in images]
