"""SigLIP, and SigLIP 2 models with a fixed resolution, from a hub name or a local folder."""

from jaxtyping import Float32
from torch import Tensor
from transformers import SiglipModel

from ommatid.config import models
from ommatid.errors import ModelError
from ommatid.vlm import Dtype, Hookpoint, hub
from ommatid.vlm.tower import IMAGE_NEEDS, KEY, JointTower, Site, block_sites, check_size, open_model, patch_grid

HEAD = "vision.head"
MODEL_TYPES = ("siglip",)
"""Values of `model_type` in config.json that belong to this family."""


class SiglipVision(JointTower):
    """A ViT with patch tokens only, pooled by an attention head, and a text tower with a joint space.

    Hookpoints are those of the blocks, and `vision.head`: the output of the pooling head for the patches after the last layer norm, which
    is also the embedding.
    """

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        opened = open_model(path, "siglip", {"siglip": SiglipModel}, IMAGE_NEEDS | hub.TOKENIZER)
        config, tower = opened.config.vision_config, opened.model.vision_model
        if not config.vision_use_head:
            raise ModelError(f"{KEY}: {path}: has no pooling head (vision_use_head is false in config.json), and so no image embedding")
        check_size(config, opened)
        point = Hookpoint(d_model=config.hidden_size, special=(), grid=patch_grid(config, opened.preprocess.crop))
        sites = block_sites(((block.self_attn, block.mlp, block) for block in tower.encoder.layers), point)
        self.d_embed = config.hidden_size
        sites[HEAD] = Site(Hookpoint(d_model=self.d_embed, special=("pooled",), grid=None), tower.head)
        super().__init__(opened, sites, tower.encoder, dtype, device)

    def _embed_texts(self, texts: list[str]) -> Float32[Tensor, "texts d_embed"]:
        # The model was trained on lower-case texts, padded to the full length, without a mask for the padding. SigLIP's tokenizer converts
        # texts to lower case itself, but the one in SigLIP 2 folders does not.
        texts, longest = [text.lower() for text in texts], self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        return self._model.get_text_features(tokens["input_ids"].to(self._device)).pooler_output.float()


def make(params: models.SiglipModel, dtype: Dtype, device: str) -> SiglipVision:
    """Load the model, as `load_model` describes."""
    return SiglipVision(params.path, dtype, device)
