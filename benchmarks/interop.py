"""Compares SAEs of other libraries before and after import, and Ommatid's before and after export, for every class of each library.

python benchmarks/interop.py [PYTHON]     writes benchmarks/results/interop.json; PYTHON has the libraries (default: .peers/bin/python)
The value of a row is the larger of two differences, of acts and of reconstructions, relative to the largest entry.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from report import Row, publish
from safetensors.torch import load_file, save_file
from torch import Tensor

from ommatid.sae.interop import Overrides, export_sae, import_sae
from ommatid.sae.model import SAE, SAEConfig

HERE = Path(__file__).parent
D_MODEL, D_SAE, N, K = 96, 576, 64, 16
MUST = 1e-5
OVERRIDES = Overrides(hookpoint="vision.blocks.11", model="clip", target="vision.blocks.11.mlp")

PLACES = {
    "threshold": ("saelens", "dictionary_learning", "sae_for_vlm"),
    "threshold per latent": ("saelens", "dictionary_learning", "sae_for_vlm"),
    "matryoshka": ("saelens", "dictionary_learning", "sae_for_vlm"),
    "relu": ("saelens", "dictionary_learning", "saev"),
    "topk": ("saelens", "dictionary_learning", "sparsify"),
    "gated": ("saelens", "dictionary_learning"),
    "transcoder": ("saelens",),
    "transcoder with threshold": ("saelens",),
    "topk transcoder": ("sparsify",),
    "topk without b_dec": ("overcomplete",),
    "threshold per latent without b_dec": ("overcomplete",),
    "relu without b_dec": ("overcomplete",),
}
"""Libraries that each kind of SAE can be exported to."""


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def compare(sae: SAE, x: Tensor, acts: Tensor, x_hat: Tensor) -> float:
    ours = sae.encode(x)
    return max(difference(acts, ours), difference(x_hat, sae.decode(ours)))


def make_own(kind: str) -> SAE:
    generator = torch.Generator().manual_seed(len(kind))

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    activation = "topk" if "topk" in kind else "gated" if kind == "gated" else "threshold"
    per_latent = torch.rand(D_SAE, generator=generator) + 0.1
    threshold = per_latent if "per latent" in kind else torch.tensor(0.5 if "threshold" in kind or kind == "matryoshka" else 0.0)
    d_out = D_MODEL if "transcoder" not in kind or "topk" in kind else D_MODEL + 8
    config = SAEConfig("batch_topk", D_MODEL, D_SAE, K, OVERRIDES.hookpoint or "", OVERRIDES.model or "", activation)
    config = replace(config, target=OVERRIDES.target) if "transcoder" in kind else config
    config = replace(config, prefixes=(64, 192, D_SAE)) if kind == "matryoshka" else config
    config = replace(config, k=0) if kind == "relu" else config
    b_dec = torch.zeros(d_out) if "without b_dec" in kind else draw(d_out)
    W_dec = torch.nn.functional.normalize(draw(D_SAE, d_out), dim=1)
    gated = {"gate_scale": draw(D_SAE).exp(), "gate_shift": draw(D_SAE)} if kind == "gated" else {}
    return SAE(config, draw(D_MODEL, D_SAE), draw(D_SAE), W_dec, b_dec, threshold, **gated)


def read_rows(root: Path) -> Iterator[Row]:
    """Rows for SAEs made by the peers and imported into Ommatid."""
    expected = load_file(root / "expected.safetensors")
    for name, said in json.loads((root / "cases.json").read_text(encoding="utf-8"))["said"].items():
        inside = root / name / "checkpoints" / "ae_5.pt"
        path = inside if inside.exists() else root / name
        sae = import_sae(path, replace(OVERRIDES, values=said))
        acts, x_hat = expected[f"{name}.acts"], expected[f"{name}.x_hat"]
        yield Row(f"read: {name}", compare(sae, expected["x"], acts, x_hat), "relative", MUST, better="lower")


def write_rows(root: Path, python: str) -> Iterator[Row]:
    """Rows for SAEs exported by Ommatid and loaded by the peers."""
    x = load_file(root / "expected.safetensors")["x"]
    out = root / "exports"
    places = {f"{form}: {kind}": (form, make_own(kind)) for kind, forms in PLACES.items() for form in forms}
    for name, (form, sae) in places.items():
        export_sae(sae, form, out / name)
    save_file({"x": x}, out / "x.safetensors")
    (out / "exports.json").write_text(json.dumps({name: form for name, (form, _) in places.items()}), encoding="utf-8")
    ask(python, "load", str(out))
    loaded = load_file(out / "loaded.safetensors")
    for name, (_, sae) in places.items():
        acts, x_hat = loaded[f"{name}.acts"], loaded[f"{name}.x_hat"]
        yield Row(f"write: {name}", compare(sae, x, acts, x_hat), "relative", MUST, better="lower")


def ask(python: str, *arguments: str) -> None:
    subprocess.run([python, str(HERE / "peers.py"), *arguments], check=True, stdout=subprocess.DEVNULL)


def main(python: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ask(python, "make", str(root), str(D_MODEL), str(D_SAE), str(N))
        versions = json.loads((root / "cases.json").read_text(encoding="utf-8"))["versions"]
        rows = [*read_rows(root), *write_rows(root, python)]
    notes = [
        f"{len(rows)} SAEs of d_model {D_MODEL}, d_sae {D_SAE}, random weights, biases and norms, {N} inputs; float32 on both sides",
        "peers: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "sae_for_vlm is not on PyPI; its classes are copied from dictionary_learning and used here under its names",
    ]
    publish("interop", rows, ["torch", "safetensors"], notes)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(HERE.parent / ".peers" / "bin" / "python"))
