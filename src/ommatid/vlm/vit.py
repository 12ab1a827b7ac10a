"""ViT and DeiT models of transformers, from a hub name or a local folder."""

from transformers import DeiTModel, ViTModel

from ommatid.config import models
from ommatid.vlm import Dtype, Hookpoint
from ommatid.vlm.tower import Tower, block_sites, check_size, open_model, patch_grid

CLASSES = {"vit": ViTModel, "deit": DeiTModel}
MODEL_TYPES = tuple(CLASSES)
"""Values of `model_type` in config.json that belong to this family."""
SPECIAL = {"vit": ("cls",), "deit": ("cls", "distillation")}


class VitVision(Tower):
    """A ViT with a class token, a distillation token if it has one, and a grid of patches."""

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        opened = open_model(path, "vit", CLASSES)
        config, blocks = opened.config, opened.model.layers
        check_size(config, opened)
        grid = patch_grid(config, opened.preprocess.crop)
        point = Hookpoint(d_model=config.hidden_size, special=SPECIAL[config.model_type], grid=grid)
        sites = block_sites(((block.attention, block.mlp, block) for block in blocks), point)
        super().__init__(opened, sites, blocks, dtype, device)


def make(params: models.VitModel, dtype: Dtype, device: str) -> VitVision:
    """Load the model, as `load_model` describes."""
    return VitVision(params.path, dtype, device)
