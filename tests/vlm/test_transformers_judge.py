"""Any vision model of transformers can be a judge, by its pooler, class token, feature maps or joint image features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ommatid.config.models import TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm import load_judge
from ommatid.vlm.precision import normalise

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
}
VIT = ViTConfig(**TINY)
MODELS = {
    "pooler": (lambda: ViTModel(VIT), lambda output: output.pooler_output),
    "no pooler in the file": (lambda: ViTModel(VIT, add_pooling_layer=False), lambda output: output.last_hidden_state[:, 0]),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**TINY)), lambda output: output.pooler_output),
    "cnn": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        lambda output: output.pooler_output.flatten(1),
    ),
}


def save_processor(folder: Path) -> None:
    CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_embedding_equals_transformers(tmp_path: Path, kind: str) -> None:
    make, pool = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    judge = load_judge(TransformersJudge(kind="transformers", path=str(tmp_path)), "float32", "cpu")
    pixels = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = pool(model(normalise(pixels, judge.preprocess, "cpu")))
    actual = judge.embed(pixels)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual.shape == (3, judge.d_embed)


def test_clip_judges_with_its_image_features(tiny_clip: Path) -> None:
    judge = load_judge(TransformersJudge(kind="transformers", path=str(tiny_clip)), "float32", "cpu")
    pixels = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        model: Any = CLIPModel.from_pretrained(tiny_clip).eval()
        expected = model.get_image_features(normalise(pixels, judge.preprocess, "cpu")).pooler_output
    torch.testing.assert_close(judge.embed(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_text_model_is_no_judge(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)).save_pretrained(
        tmp_path
    )
    save_processor(tmp_path)
    with pytest.raises(ModelError, match="gives no embedding for an image"):
        load_judge(TransformersJudge(kind="transformers", path=str(tmp_path)), "float32", "cpu")
