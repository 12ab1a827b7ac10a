"""TransformersVisionJudge: any transformers vision model as the judge, its pooled output as the embedding."""

from typing import Any

import torch
from transformers import AutoModel

from ommatid.errors import ModelError
from ommatid.vlm import Dtype, hub
from ommatid.vlm.precision import normalise, resolve_dtype

KEY = "extract.judge.path"


class TransformersVisionJudge:
    """The first of these that the model has: image features in a joint space (CLIP, SigLIP), its pooler's output, the class token."""

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR)
        self.name = path
        self.preprocess = hub.load_preprocess(folder, path, KEY)
        model, missing = hub.load_weights(AutoModel, folder, path, KEY, optional="pooler.")
        self._model = model.to(device)
        self._has_pooler = not missing  # models such as facebook/dino-vits16 come without one, and transformers makes up random weights
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        self.d_embed = self._measure_width(path)

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """From uint8 (batch, H, W, 3) to (batch, d_embed), float32."""
        x = normalise(pixels, self.preprocess, self._device)
        with torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32):
            return self._pool(x).float()

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        joint = hasattr(self._model, "get_image_features")
        output: Any = self._model.get_image_features(pixel_values=x) if joint else self._model(pixel_values=x)
        if self._has_pooler and output.get("pooler_output") is not None:
            return output.pooler_output.flatten(1)  # of a CNN: (batch, channels, 1, 1)
        return output.last_hidden_state[:, 0]

    def _measure_width(self, path: str) -> int:
        """Families name the width differently in their configs; one blank image tells it, and that the model takes images at all."""
        try:
            embedding = self.embed(torch.zeros(1, *self.preprocess.crop, 3, dtype=torch.uint8))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(f"{KEY}: {path}: gives no embedding for an image ({error}); set it to a vision model") from error
        if embedding.ndim != 2:
            raise ModelError(f"{KEY}: {path}: has neither a pooler nor a class token: {type(self._model).__name__}")
        return embedding.shape[1]
