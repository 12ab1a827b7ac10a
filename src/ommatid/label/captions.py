"""Captions of images by a transformers model on this machine."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ommatid.errors import ModelError
from ommatid.vlm import hub
from ommatid.vlm.picture import SHAPES, structured_picture
from ommatid.vlm.precision import normalise
from ommatid.vlm.processor import load_preprocess

KEY = "label.labellers.path"
FAMILIES = ("blip", "git", "vision-encoder-decoder")
"""Values of model_type in config.json: models that caption an image without being asked a question."""
MAX_TOKENS = 24
"""Of a caption."""
BATCH = 16


class TransformersCaptions:
    """BLIP, GIT, or an image encoder with a text decoder; greedy, so that an image always gets the same caption."""

    def __init__(self, path: str) -> None:
        instead = "leave this labeller out"
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR | hub.TOKENIZER, instead)
        family = hub.load_config(folder, path, KEY).model_type
        if family not in FAMILIES:
            raise ModelError(
                f"{KEY}: {path}: is a {family} model; models that caption are of the families {', '.join(FAMILIES)}; one that is asked "
                "questions goes behind a server such as vLLM, and is used as {kind: vlm}"
            )
        self._preprocess = load_preprocess(folder, path, KEY)
        self._tokenizer = hub.load_tokenizer(folder, path, KEY)
        model, _ = hub.load_weights(AutoModelForImageTextToText, folder, path, KEY)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device)
        self._check(path)

    def _check(self, path: str) -> None:
        """Whether a picture alone and in a batch is said to be the same: no mask is drawn anew, and no picture looks at another."""
        picture, other = (structured_picture(*shape) for shape in SHAPES)
        with hub.reading(path, KEY, "what the model says of a picture"):
            alone, batch = self([picture]), self([picture, other])
        if alone[0] != batch[0]:
            raise ModelError(
                f"{KEY}: {path}: says {alone[0]!r} of a picture alone, and {batch[0]!r} of the same picture in a batch: something in the "
                "model is drawn anew in every pass, such as masks, or the pictures of a batch mix; use another model"
            )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption of each image."""
        captions: list[str] = []
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([torch.from_numpy(self._preprocess(image)) for image in images[start : start + BATCH]])
            x = normalise(pixels, self._preprocess, self._device).contiguous()
            with hub.quiet():
                tokens: Any = self._model.generate(pixel_values=x, max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=1)
            captions += self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in captions]
