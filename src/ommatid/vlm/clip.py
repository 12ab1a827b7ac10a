"""ClipVision: any transformers CLIP, by hub name or local folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from ommatid.errors import ModelError
from ommatid.vlm import Captured, Dtype, Hookpoint, check_hookpoint, hub
from ommatid.vlm.hooks import capturing
from ommatid.vlm.precision import normalise, resolve_dtype

KEY = "extract.model.path"
PROJECTION = "vision.projection"
TEXT_BATCH = 64


class ClipVision:
    """A ViT with a class token and a grid of patch tokens, and a text tower in the same space.

    Hookpoints: `vision.blocks.<i>`, the residual stream after block i (transformers' hidden_states[i + 1]); and `vision.projection`,
    the class token after the last layer norm and the projection, which is also the embedding.
    """

    text_templates = ("a photo of a {}",)

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.TOKENIZER | hub.PREPROCESSOR)
        config = hub.load_config(folder, path, KEY)
        if not isinstance(config, CLIPConfig):
            raise ModelError(f"{KEY}: {path}: is a {config.model_type} model; kind clip takes transformers' CLIP (model_type clip)")
        self.name = path
        self.preprocess = hub.load_preprocess(folder, path, KEY)
        self.preprocessing: Mapping[str, Any] = self.preprocess.as_json()
        _check_size(config, self.preprocess.crop, path)
        self._tokenizer = hub.load_tokenizer(folder, path, KEY)
        self._model: Any = hub.load_weights(CLIPModel, folder, path, KEY)[0].to(device)
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        self.hookpoints: Mapping[str, Hookpoint] = _hookpoints(config)
        self._modules = _modules(self._model)
        self.d_embed = self.hookpoints[PROJECTION].d_model

    @torch.inference_mode()
    def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
        """Activations at the hookpoints, and the projected image embedding, of uint8 pixels (batch, H, W, 3).

        Raises:
            ModelError: a hookpoint is unknown.
        """
        for name in hookpoints:
            check_hookpoint(self, name)
        x = normalise(pixels, self.preprocess, self._device)
        # Autocast, not weights in bfloat16: the residual stream itself stays in float32.
        with (
            torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32),
            capturing({name: self._modules[name] for name in hookpoints}) as seen,
        ):
            embedding = self._model.get_image_features(pixel_values=x).pooler_output.float()
        tokens = {name: seen[name] if seen[name].ndim == 3 else seen[name][:, None] for name in hookpoints}
        return Captured(tokens=tokens, embedding=embedding)

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Projected text embeddings (texts, d_embed), float32."""
        parts = [self._embed_texts(texts[start : start + TEXT_BATCH]) for start in range(0, len(texts), TEXT_BATCH)]
        return torch.cat([torch.empty(0, self.d_embed, device=self._device), *parts])

    def _embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self._device)
        return self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output.float()


def _check_size(config: Any, crop: tuple[int, int], path: str) -> None:
    side = config.vision_config.image_size
    if crop != (side, side):
        raise ModelError(
            f"{KEY}: {path}: preprocessor crops to {crop[0]} x {crop[1]}, but config.json says image_size {side}; they must agree"
        )


def _hookpoints(config: Any) -> dict[str, Hookpoint]:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    block = Hookpoint(d_model=vision.hidden_size, special=("cls",), grid=(side, side))
    points = {f"vision.blocks.{i}{part}": block for i in range(vision.num_hidden_layers) for part in (".attn", ".mlp", "")}
    return points | {PROJECTION: Hookpoint(d_model=config.projection_dim, special=("cls",), grid=None)}


def _modules(model: Any) -> dict[str, torch.nn.Module]:
    modules = {}
    for i, block in enumerate(model.vision_model.encoder.layers):
        name = f"vision.blocks.{i}"
        modules |= {f"{name}.attn": block.self_attn, f"{name}.mlp": block.mlp, name: block}
    return modules | {PROJECTION: model.visual_projection}
