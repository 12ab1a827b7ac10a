"""TransformersVisionJudge: a transformers vision model as the judge, one vector of what it makes of an image as the embedding."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from ommatid.errors import ModelError
from ommatid.vlm import Dtype, hub
from ommatid.vlm.precision import normalise, resolve_dtype
from ommatid.vlm.processor import load_preprocess
from ommatid.vlm.trust import structured_picture

KEY = "extract.judge.path"


class TransformersVisionJudge:
    """One vector for an image, of whatever a model makes of it.

    It is the first of these that the model has: image features in a joint space (CLIP, SigLIP), its pooler's output, the class token,
    the mean of its tokens or of its map. It is never a token that stands for a place. Masked autoencoders get the whole image.
    """

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR)
        self.name = path
        self.preprocess = load_preprocess(folder, path, KEY)
        model, missing = hub.load_weights(AutoModel, folder, path, KEY, optional="pooler.")
        self._model = model.to(device)
        self._has_pooler = not missing  # models such as facebook/dino-vits16 come without one, and transformers makes up random weights
        self._is_mae = model.config.model_type == "vit_mae"
        if self._is_mae:
            model.config.mask_ratio = 0.0
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        self._leading: dict[int, bool] = {}
        self.d_embed = self._look(path)

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """From uint8 (batch, H, W, 3) to (batch, d_embed), float32."""
        x = normalise(pixels, self.preprocess, self._device)
        with torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32):
            return self._pool(self._run(x)).float()

    def _run(self, x: Tensor) -> Any:
        if hasattr(self._model, "get_image_features"):
            return self._model.get_image_features(pixel_values=x)
        if self._is_mae:  # it shuffles the patches that it keeps, unless they are numbered
            n_patches = self._model.embeddings.patch_embeddings.num_patches
            return self._model(pixel_values=x, noise=torch.arange(n_patches, device=x.device).expand(len(x), -1))
        return self._model(pixel_values=x)

    def _pool(self, output: Any) -> Tensor:
        pooled = output.get("pooler_output") if self._has_pooler else None
        if pooled is not None and pooled.ndim != 3:
            return pooled.flatten(1)  # of a CNN: (batch, channels, 1, 1)
        states = next(x for x in (pooled, output.get("cls_token_value"), output["last_hidden_state"]) if x is not None)
        if states.ndim == 4:  # a map (batch, channels, rows, columns)
            return states.mean((2, 3))
        return states[:, 0] if self._leading.get(states.shape[1]) else states.mean(1)

    @torch.inference_mode()
    def _look(self, path: str) -> int:
        """The width of the embedding, which families name differently in their configs, and whether a class token leads the others.

        Two pictures that are unlike everywhere show both: the embedding of the tokens is the first output of a module with as many tokens
        as the last, and a token that is the same in it for both pictures stands for no place.
        """
        height, width = self.preprocess.crop
        picture = np.asarray(structured_picture(width, height))
        pixels = torch.from_numpy(np.stack([picture, 255 - picture]))

        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            x = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(x, Tensor) and x.ndim == 3 and len(x) == 2:
                self._leading.setdefault(x.shape[1], torch.equal(x[0, 0], x[1, 0]))

        handles = [module.register_forward_hook(look) for module in self._model.modules()]
        try:
            embedding = self.embed(pixels)
        except Exception as error:  # the model's code, which says in as many ways as there are models that it takes something else
            reason = str(error).strip().partition("\n")[0][: hub.MAX_REASON] or type(error).__name__
            raise ModelError(f"{KEY}: {path}: gives no embedding for an image ({reason}); set it to a vision model") from error
        finally:
            for handle in handles:
                handle.remove()
        if embedding.ndim != 2 or len(embedding) != 2:
            raise ModelError(
                f"{KEY}: {path}: a {type(self._model).__name__} has neither a pooler, nor tokens, nor one map for an image; "
                "set it to a vision model that has"
            )
        return embedding.shape[1]
