"""Tiny models of most vision families of transformers, with random weights and the family's image processor, saved as on a hub."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel

SIDE = 64
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 16}
BLOCKS = {name: VIT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
TEXT = {**BLOCKS, "vocab_size": 99, "max_position_embeddings": 20}
TWO = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 24}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": SIDE, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 2, 2]}
SMALL_CNN = {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}

SQUARE = {"size": {"height": SIDE, "width": SIDE}}
CROPPED = {"size": {"shortest_edge": 73}, "crop_size": {"height": SIDE, "width": SIDE}}
SHORT = {"size": {"shortest_edge": SIDE}}

PACKAGES = {"ChineseCLIP": "chinese_clip", "MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2"}

Case = tuple[str, Mapping[str, Any], str, Mapping[str, Any]]
FAMILIES: Mapping[str, Case] = {
    "aimv2": ("Aimv2Config", TWO, "CLIP", CROPPED),
    "align": ("AlignConfig", {**TWO, "vision_config": SMALL_CNN, "projection_dim": 320}, "EfficientNet", SQUARE),
    "altclip": ("AltCLIPConfig", {**TWO, "text_config": {**TEXT, "project_dim": 24}}, "CLIP", CROPPED),
    "beit": ("BeitConfig", {**VIT, "vocab_size": 99}, "Beit", {**SQUARE, "do_center_crop": False}),
    "bit": ("BitConfig", {**RESNET, "num_groups": 4}, "Bit", CROPPED),
    "blip": ("BlipConfig", TWO, "Blip", SQUARE),
    "chinese_clip": ("ChineseCLIPConfig", TWO, "ChineseCLIP", {**SQUARE, "do_center_crop": False}),
    "clip": ("CLIPConfig", TWO, "CLIP", CROPPED),
    "clipseg": ("CLIPSegConfig", TWO, "ViT", SQUARE),
    "convnext": ("ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "ConvNext", SHORT),
    "convnextv2": ("ConvNextV2Config", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "ConvNext", SHORT),
    "cvt": ("CvtConfig", {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 10]}, "ConvNext", SHORT),
    "data2vec-vision": ("Data2VecVisionConfig", VIT, "Beit", {**SQUARE, "do_center_crop": False}),
    "deit": ("DeiTConfig", VIT, "DeiT", {**CROPPED, "size": {"height": 70, "width": 70}}),
    "dinov2": ("Dinov2Config", VIT, "Bit", CROPPED),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", VIT, "Bit", CROPPED),
    "dpt": (
        "DPTConfig",
        {**VIT, "backbone_out_indices": [0, 0, 1, 1], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8},
        "DPT",
        SQUARE,
    ),
    "efficientnet": ("EfficientNetConfig", SMALL_CNN, "EfficientNet", {**SQUARE, "rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "flava": (
        "FlavaConfig",
        {"image_config": VIT, "text_config": TEXT, "multimodal_config": BLOCKS},
        "Flava",
        {**SQUARE, "crop_size": SIDE},
    ),
    "focalnet": (
        "FocalNetConfig",
        {"image_size": SIDE, "embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
        "Bit",
        CROPPED,
    ),
    "groupvit": (
        "GroupViTConfig",
        {
            **TWO,
            "vision_config": {**VIT, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]},
            "projection_intermediate_dim": 32,
        },
        "CLIP",
        CROPPED,
    ),
    "hiera": (
        "HieraConfig",
        {
            "image_size": [SIDE, SIDE],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "masked_unit_size": [4, 4],
            "num_query_pool": 1,
        },
        "Bit",
        CROPPED,
    ),
    "ijepa": ("IJepaConfig", VIT, "ViT", SQUARE),
    "levit": (
        "LevitConfig",
        {
            "image_size": SIDE,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "attention_ratio": [2, 2, 2],
            "mlp_ratio": [2, 2, 2],
            "key_dim": [8, 8, 8],
        },
        "Levit",
        {**SHORT, "crop_size": SIDE},
    ),
    "metaclip_2": ("MetaClip2Config", TWO, "CLIP", CROPPED),
    "mobilenet_v1": ("MobileNetV1Config", {"image_size": SIDE, "depth_multiplier": 0.25}, "MobileNetV1", CROPPED),
    "mobilenet_v2": ("MobileNetV2Config", {"image_size": SIDE, "depth_multiplier": 0.25}, "MobileNetV2", CROPPED),
    "mobilevit": (
        "MobileViTConfig",
        {"image_size": SIDE, "hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "num_attention_heads": 2},
        "MobileViT",
        CROPPED,
    ),
    "mobilevitv2": ("MobileViTV2Config", {"image_size": SIDE, "width_multiplier": 0.25}, "MobileViT", CROPPED),
    "owlvit": ("OwlViTConfig", TWO, "OwlViT", SQUARE),
    "pixio": ("PixioConfig", VIT, "Bit", CROPPED),
    "poolformer": ("PoolFormerConfig", STAGES, "PoolFormer", {**SHORT, "crop_size": SIDE}),
    "pvt": ("PvtConfig", {"image_size": SIDE, **PYRAMID}, "Pvt", SQUARE),
    "pvt_v2": ("PvtV2Config", {"image_size": SIDE, **PYRAMID}, "Pvt", SQUARE),
    "regnet": ("RegNetConfig", {"embedding_size": 8, **STAGES, "groups_width": 8}, "ConvNext", SHORT),
    "resnet": ("ResNetConfig", {**RESNET, "layer_type": "basic"}, "ConvNext", SHORT),
    "sam_vision_model": (
        "SamVisionConfig",
        {**VIT, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32},
        "ViT",
        SQUARE,
    ),
    "segformer": ("SegformerConfig", PYRAMID, "Segformer", SQUARE),
    "siglip": ("SiglipConfig", TWO, "Siglip", SQUARE),
    "swiftformer": ("SwiftFormerConfig", {"image_size": SIDE, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]}, "ViT", SQUARE),
    "swin": ("SwinConfig", SWIN, "ViT", SQUARE),
    "swinv2": ("Swinv2Config", SWIN, "ViT", SQUARE),
    "vision-text-dual-encoder": (
        "VisionTextDualEncoderConfig",
        {"vision_config": {**VIT, "model_type": "vit"}, "text_config": {**TEXT, "model_type": "bert"}},
        "ViT",
        SQUARE,
    ),
    "vit": ("ViTConfig", VIT, "ViT", SQUARE),
    "vit_mae": ("ViTMAEConfig", VIT, "ViT", SQUARE),
    "vit_msn": ("ViTMSNConfig", VIT, "ViT", SQUARE),
    "yolos": ("YolosConfig", {**VIT, "image_size": [SIDE, SIDE], "num_detection_tokens": 5}, "ViT", SQUARE),
}
"""For each `model_type`, the class of its config, sizes, and the name and settings of its image processor."""

NOT_FIXED = "must end in one fixed size"
REFUSED: Mapping[str, tuple[Case, str]] = {
    "glpn": (("GLPNConfig", PYRAMID, "GLPN", {}), NOT_FIXED),
    "imagegpt": (
        ("ImageGPTConfig", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 17}, "ViT", SQUARE),
        "input_ids",
    ),
    "donut-swin": (("DonutSwinConfig", SWIN, "Donut", SQUARE), NOT_FIXED),
    "owlv2": (("Owlv2Config", TWO, "Owlv2", SQUARE), NOT_FIXED),
    "perceiver": (
        ("PerceiverConfig", {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1}, "Perceiver", SQUARE),
        NOT_FIXED,
    ),
    "sam": (("SamVisionConfig", VIT, "Sam", {}), NOT_FIXED),
    "siglip2": (("Siglip2Config", {"text_config": TEXT, "vision_config": {**BLOCKS, "patch_size": 16}}, "Siglip2", {}), NOT_FIXED),
    "timesformer": (("TimesformerConfig", VIT, "ViT", SQUARE), "gives no embedding for an image .*expected 5, got 4"),
    "videomae": (("VideoMAEConfig", VIT, "VideoMAE", CROPPED), r"image processor \(VideoMAEImageProcessor\) does more than a resize"),
    "vilt": (("ViltConfig", {**VIT, "vocab_size": 99}, "Vilt", {}), NOT_FIXED),
    "xclip": (
        ("XCLIPConfig", {**TWO, "vision_config": {**VIT, "mit_hidden_size": 32, "mit_num_attention_heads": 4}}, "CLIP", CROPPED),
        "expected 5",
    ),
}
"""Models that cannot be a judge, with the error message."""


def make_processor(name: str, settings: Mapping[str, Any]) -> Any:
    """Make a family's own image processor, with the backend that needs no torchvision."""
    package = PACKAGES.get(name, name.lower())
    module = importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}")
    return getattr(module, f"{name}ImageProcessorPil")(**settings)


def save_tiny(folder: Path, case: Case) -> nn.Module:
    """Save a model and its processor, with weights large enough that its output depends on its input, and return the model."""
    config, sizes, processor, settings = case
    torch.manual_seed(0)
    model = AutoModel.from_config(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
    model.save_pretrained(folder)
    make_processor(processor, settings).save_pretrained(folder)
    return model
