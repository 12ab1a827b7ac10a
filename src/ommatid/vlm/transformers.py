"""Judges that are vision models of transformers, with one output vector per image as the embedding."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from transformers import AutoModel

from ommatid.config.models import TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm import Dtype, State, hub, state_of
from ommatid.vlm.network_checks import structured_picture
from ommatid.vlm.precision import normalise, resolve_dtype
from ommatid.vlm.processor import load_preprocess

KEY = "extract.judge.path"


class TransformersVisionJudge:
    """A judge that embeds an image as one vector of a vision model's output.

    The vector is the first of these that the model has: image features in a joint space (CLIP, SigLIP), the output of its pooler, its class
    token, and the mean of its tokens or of its feature map. It is never the token of a place in the image. A masked autoencoder sees the
    whole image, without a mask.
    """

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR)
        self.name = path
        self.preprocess = load_preprocess(folder, path, KEY)
        model, missing = hub.load_weights(AutoModel, folder, path, KEY, optional="pooler.")
        self._model = model.to(device)
        # Models such as facebook/dino-vits16 come without a pooler, and transformers gives them one with random weights.
        self._has_pooler = not missing
        self._unused = missing
        self._is_mae = model.config.model_type == "vit_mae"
        if self._is_mae:
            model.config.mask_ratio = 0.0
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        self._leading: dict[int, bool] = {}
        self.d_embed = self._probe(path)

    @property
    def state(self) -> State:
        """Weights and config: see `Recognisable`."""
        return state_of(self._model, hub.settings(self._model.config), self._has_pooler, sorted(self._leading.items()), unused=self._unused)

    @torch.inference_mode()
    def embed(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float32[Tensor, "batch d_embed"]:
        """Return the embeddings `(batch, d_embed)` float32 of uint8 pixels `(batch, H, W, 3)`."""
        x = normalise(pixels, self.preprocess, self._device)
        with torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32):
            return self._pool(self._run(x)).float()

    def _run(self, x: Tensor) -> Any:
        if hasattr(self._model, "get_image_features"):
            return self._model.get_image_features(pixel_values=x)
        if self._is_mae:  # Without this noise the model would shuffle its patches.
            n_patches = self._model.embeddings.patch_embeddings.num_patches
            return self._model(pixel_values=x, noise=torch.arange(n_patches, device=x.device).expand(len(x), -1))
        return self._model(pixel_values=x)

    def _pool(self, output: Any) -> Tensor:
        pooled = output.get("pooler_output") if self._has_pooler else None
        if pooled is not None and pooled.ndim != 3:
            return pooled.flatten(1)  # A CNN's output is (batch, channels, 1, 1).
        states = next(x for x in (pooled, output.get("cls_token_value"), output["last_hidden_state"]) if x is not None)
        if states.ndim == 4:  # A feature map (batch, channels, rows, columns).
            return states.mean((2, 3))
        return states[:, 0] if self._leading.get(states.shape[1]) else states.mean(1)

    @torch.inference_mode()
    def _probe(self, path: str) -> int:
        """Find the width of the embedding, and whether a class token comes first, by running two pictures that differ everywhere.

        Families name the width differently in their configs. The first module output with as many tokens as the last one is taken to be
        the token embeddings. If their first token is the same for both pictures, it does not depend on the image: it is a class token.
        """
        height, width = self.preprocess.crop
        picture = np.asarray(structured_picture(width, height))
        pixels = torch.from_numpy(np.stack([picture, 255 - picture]))

        def note_leading(_module: nn.Module, _inputs: object, output: object) -> None:
            x = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(x, Tensor) and x.ndim == 3 and len(x) == 2:
                self._leading.setdefault(x.shape[1], torch.equal(x[0, 0], x[1, 0]))

        handles = [module.register_forward_hook(note_leading) for module in self._model.modules()]
        try:
            embedding = self.embed(pixels)
        except Exception as error:  # Each model's code raises its own errors for inputs that it does not take.
            reason = str(error).strip().partition("\n")[0][: hub.MAX_REASON] or type(error).__name__
            raise ModelError(f"{KEY}: {path}: gives no embedding for an image ({reason}); name a vision model") from error
        finally:
            for handle in handles:
                handle.remove()
        if embedding.ndim != 2 or len(embedding) != 2:
            raise ModelError(
                f"{KEY}: {path}: a {type(self._model).__name__} has neither a pooler, nor tokens, nor one feature map for an image; "
                "name a vision model that has one of these"
            )
        return embedding.shape[1]


def make_judge(params: TransformersJudge, dtype: Dtype, device: str) -> TransformersVisionJudge:
    """Load the judge, as `load_judge` describes."""
    return TransformersVisionJudge(params.path, dtype, device)
