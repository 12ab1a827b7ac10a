"""DINOv2 with or without registers, and the ViTs of DINOv3, from a hub name or a local folder."""

from typing import Any

from transformers import Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel

from ommatid.config import models
from ommatid.vlm import Dtype, Hookpoint
from ommatid.vlm.tower import Tower, block_sites, open_model, patch_grid

CLASSES = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel, "dinov3_vit": DINOv3ViTModel}
MODEL_TYPES = tuple(CLASSES)
"""Values of `model_type` in config.json that belong to this family."""


class DinoVision(Tower):
    """A ViT with a class token, register tokens if it has any, and a grid of patches whose size follows from preprocessing.

    The hookpoints `.attn` and `.mlp` come after the layer scale: they are what is added to the residual stream.
    """

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        opened = open_model(path, "dino", CLASSES)
        config = opened.config
        special = ("cls", *("register",) * getattr(config, "num_register_tokens", 0))
        point = Hookpoint(d_model=config.hidden_size, special=special, grid=patch_grid(config, opened.preprocess.crop))
        blocks = _blocks(opened.model)
        sites = block_sites(((block.layer_scale1, block.layer_scale2, block) for block in blocks), point)
        super().__init__(opened, sites, blocks, dtype, device)


def _blocks(model: Any) -> Any:
    return model.model.layer if isinstance(model, DINOv3ViTModel) else model.encoder.layer


def make(params: models.DinoModel, dtype: Dtype, device: str) -> DinoVision:
    """Load the model, as `load_model` describes."""
    return DinoVision(params.path, dtype, device)
