"""The vision tower and projector of LLaVA 1.5 and LLaVA-NeXT models, read from their folders without loading the language model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from ommatid.config import models
from ommatid.errors import ModelError
from ommatid.vlm import Dtype, Hookpoint, hub, partial_loading
from ommatid.vlm.hooks import capturing
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.processor import load_preprocess, process_picture
from ommatid.vlm.tower import KEY, Opened, Site, Tower, block_sites, check_size, patch_grid

PROJECTION = "vision.projection"
TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"
TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
PROJECTORS = {"llava": LlavaMultiModalProjector, "llava_next": LlavaNextMultiModalProjector}
MODEL_TYPES = tuple(PROJECTORS)
"""Values of `model_type` in config.json that belong to this family."""


class LlavaVision(Tower):
    """A ViT, usually CLIP's, and the projector that maps its patches to the input of a language model.

    For LLaVA-NeXT, only the base view is used, which is the whole image resized to the tower's square. The high-resolution tiles, whose
    number differs from image to image, are not captured.

    Hookpoints are those of the blocks, and `vision.projection`: the output of the projector for the layers and tokens that config.json
    selects by `vision_feature_layer` and `vision_feature_select_strategy` (`default` selects patches only). Its mean token is the output of
    `splice`, to which blocks after the selected layers do not contribute.
    """

    def __init__(self, path: str, dtype: Dtype, device: str) -> None:
        folder = hub.locate(path, KEY, hub.CONFIG | partial_loading.SHARDS | hub.PREPROCESSOR)
        config = hub.load_config(folder, path, KEY)
        check_config(config, path)
        preprocess = load_tower_preprocess(folder, config, path)
        model = _Encoder(*_load(config, folder, path), config, path)
        opened = Opened(path, folder, config, model, preprocess)
        check_size(config.vision_config, opened)
        super().__init__(opened, make_sites(model.tower, model.projector, config, preprocess), model, dtype, device)

    def _read(self, x: Float[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch d_output"]:
        return self._model(pixel_values=x).float().mean(1)


def load_tower_preprocess(folder: Path, config: Any, path: str) -> Preprocess:
    """Read the preprocessing of the image that the tower sees; for LLaVA-NeXT, of the base view.

    Raises:
        ModelError: As for `load_preprocess`.
    """
    if config.model_type != "llava_next":
        return load_preprocess(folder, path, KEY)
    # For the base view, LLaVA-NeXT's processor stretches the image to this square. Only the tiles, which are not used, are padded.
    side = config.vision_config.image_size
    return load_preprocess(folder, path, KEY, {"size": {"height": side, "width": side}, "do_pad": False}, _base_pixels)


def make_sites(tower: Any, projector: nn.Module, config: Any, preprocess: Preprocess) -> dict[str, Site]:
    """Name the hookpoints of a tower and its projector."""
    vision = config.vision_config
    point = Hookpoint(d_model=vision.hidden_size, special=special_tokens(config), grid=patch_grid(vision, preprocess.crop))
    blocks = tower.encoder.layers
    # A pass can resume no later than at the first state that the projector reads.
    first = min(layer % (len(blocks) + 1) for layer in _chosen_states(config))
    sites = block_sites(((block.self_attn, block.mlp, block) for block in blocks), point, first)
    special = () if config.vision_feature_select_strategy == "default" else point.special
    return sites | {PROJECTION: Site(Hookpoint(d_model=config.text_config.hidden_size, special=special, grid=point.grid), projector)}


def _base_pixels(processor: Any, picture: Image.Image) -> Float[np.ndarray, "3 height width"]:
    """Return the base view `(3, H, W)`, which comes before the tiles in the processor's output."""
    return process_picture(processor, picture)[0]


class _Encoder(nn.Module):
    """Maps images `(batch, 3, H, W)` to the language model's inputs `(batch, tokens, width)`."""

    def __init__(self, tower: Any, projector: nn.Module, config: Any, path: str) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector
        self.drops_first = config.vision_feature_select_strategy == "default"
        self._chosen = _chosen_layers(tower, config, path)

    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens width_out"]:
        with capturing(self._chosen) as seen:
            self.tower(pixel_values)
        states = torch.cat([seen[name] for name in self._chosen], dim=-1)
        return self.projector(states[:, 1:] if self.drops_first else states)


def _chosen_states(config: Any) -> list[int]:
    """Return the numbers of the hidden states selected by config.json: state 0 enters block 0, and state i + 1 leaves block i."""
    chosen = config.vision_feature_layer
    return [chosen] if isinstance(chosen, int) else list(chosen)


def _chosen_layers(tower: Any, config: Any, path: str) -> dict[str, nn.Module]:
    """Return the modules that output the hidden states selected by config.json."""
    first = tower.pre_layrnorm if hasattr(tower, "pre_layrnorm") else tower.embeddings
    states = [first, *tower.encoder.layers]
    chosen = _chosen_states(config)
    for layer in chosen:
        if not -len(states) <= layer < len(states):
            raise ModelError(f"{KEY}: {path}: config.json says vision_feature_layer {layer}; the tower has {len(states)} hidden states")
    return {f"{i}: {layer}": states[layer] for i, layer in enumerate(chosen)}


def check_config(config: Any, path: str) -> None:
    """Check that a config is that of a LLaVA with a supported tower.

    Raises:
        ModelError: It is not.
    """
    if config.model_type not in PROJECTORS:
        raise ModelError(f"{KEY}: {path}: is a {config.model_type} model; kind llava takes model_type {' or '.join(PROJECTORS)}")
    tower = config.vision_config.model_type
    if tower not in TOWERS:
        raise ModelError(f"{KEY}: {path}: its vision tower is a {tower}; kind llava takes {' or '.join(TOWERS)}")
    if config.vision_feature_select_strategy == "default" and not special_tokens(config):
        raise ModelError(
            f"{KEY}: {path}: config.json says vision_feature_select_strategy default, which drops the first token, but the tower has no "
            "class token, so the first patch would be lost; set it to full in config.json"
        )


def special_tokens(config: Any) -> tuple[str, ...]:
    """Return the kinds of the tower's tokens before the patches."""
    return ("cls",) if config.vision_config.model_type == "clip_vision_model" else ()


def _load(config: Any, folder: Any, path: str) -> tuple[Any, nn.Module]:
    """Load the tower and the projector."""
    vision = config.vision_config
    tower = partial_loading.load_pretrained(
        TOWERS[vision.model_type], vision, partial_loading.read_weights(folder, TOWER, path, KEY), TOWER, path, KEY
    )
    with torch.device("meta"):
        projector = PROJECTORS[config.model_type](config)
    return tower, partial_loading.load_module(projector, partial_loading.read_weights(folder, PROJECTOR, path, KEY), PROJECTOR, path, KEY)


def make(params: models.LlavaModel, dtype: Dtype, device: str) -> LlavaVision:
    """Load the model, as `load_model` describes."""
    return LlavaVision(params.path, dtype, device)
