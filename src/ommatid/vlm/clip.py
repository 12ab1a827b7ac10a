"""CLIP models of transformers, from a hub name or a local folder."""

from jaxtyping import Float32
from torch import Tensor
from transformers import CLIPModel

from ommatid.config import models
from ommatid.vlm import Dtype, Hookpoint, hub
from ommatid.vlm.tower import IMAGE_NEEDS, JointTower, Site, block_sites, check_size, open_model, patch_grid

PROJECTION = "vision.projection"
MODEL_TYPES = ("clip",)
"""Values of `model_type` in config.json that belong to this family."""


class ClipVision(JointTower):
    """A ViT with a class token and a grid of patch tokens, and a text tower with a joint space.

    Hookpoints are those of the blocks, and `vision.projection`: the class token after the last layer norm and the projection, which is
    also the embedding.
    """

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        opened = open_model(path, "clip", {"clip": CLIPModel}, IMAGE_NEEDS | hub.TOKENIZER)
        config, model = opened.config.vision_config, opened.model
        check_size(config, opened)
        point = Hookpoint(d_model=config.hidden_size, special=("cls",), grid=patch_grid(config, opened.preprocess.crop))
        sites = block_sites(((block.self_attn, block.mlp, block) for block in model.vision_model.encoder.layers), point)
        self.d_embed = opened.config.projection_dim
        sites[PROJECTION] = Site(Hookpoint(d_model=self.d_embed, special=("cls",), grid=None), model.visual_projection)
        super().__init__(opened, sites, model.vision_model, dtype, device)

    def _embed_texts(self, texts: list[str]) -> Float32[Tensor, "texts d_embed"]:
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self._device)
        return self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output.float()


def make(params: models.ClipModel, dtype: Dtype, device: str) -> ClipVision:
    """Load the model, as `load_model` describes."""
    return ClipVision(params.path, dtype, device)
