"""SiglipVision: SigLIP, and SigLIP 2 of a fixed resolution, by hub name or local folder."""

from torch import Tensor
from transformers import SiglipModel

from ommatid.config import models
from ommatid.errors import ModelError
from ommatid.vlm import Dtype, Hookpoint, hub
from ommatid.vlm.tower import IMAGE_NEEDS, KEY, JointTower, Site, block_sites, check_size, open_model, patch_grid

HEAD = "vision.head"
MODEL_TYPES = ("siglip",)
"""Values of model_type in config.json that are of this family."""


class SiglipVision(JointTower):
    """A ViT of patch tokens alone, pooled by an attention head, and a text tower in the same space.

    Hookpoints: those of the blocks; and `vision.head`, what the pooling head makes of the patches after the last layer norm, which is
    also the embedding.
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

    def _embed_texts(self, texts: list[str]) -> Tensor:
        # As it was trained: in lower case, padded to the full length, and the padding attended to. SigLIP's tokenizer lowers the case
        # itself; the one in the folders of SigLIP 2 does not.
        texts, longest = [text.lower() for text in texts], self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        return self._model.get_text_features(tokens["input_ids"].to(self._device)).pooler_output.float()


def make(params: models.SiglipModel, dtype: Dtype, device: str) -> SiglipVision:
    """See `load_model`."""
    return SiglipVision(params.path, dtype, device)
