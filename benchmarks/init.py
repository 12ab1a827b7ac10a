"""Benchmark of `train.init`: what training from the SAE before gives on three successive data sets, against starting anew.

The data sets are parts of a study's images: those of all classes but two, a quarter more of them, and in the end those of the two other
classes, too. One chain of SAEs starts anew on each, with another seed; others begin with the SAE of the data set before. All are measured
on held-out images of the classes so far.

    python benchmarks/init.py --data data --epochs 10
"""

import argparse
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from ommatid.config import TrainParams, load_params
from ommatid.metrics import Monosemanticity, best_matches, match_one_to_one, nan_mean
from ommatid.sae.learner import Learner, Sample
from ommatid.sae.model import SAE
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch

ALIKE = 0.7
"""Cosine above which two directions count as the same feature, as in the relation `matches`."""
SAMPLE = 16384
CHUNK = 4096


@dataclass(frozen=True)
class Tokens:
    """Tokens of the study's images, in the order of their rows."""

    image: np.ndarray
    x: np.ndarray

    def of(self, images: np.ndarray) -> torch.Tensor:
        """Return the tokens of some images, `(tokens, d_model)` float16."""
        return torch.from_numpy(self.x[np.isin(self.image, images)])


def load_tokens(files: list[Path]) -> Tokens:
    """Read tokens from the Parquet files of an artefact of activations."""
    tables = [pq.read_table(file, columns=["image", "x"]) for file in files]
    images = np.concatenate([table["image"].to_numpy() for table in tables])
    flat = [np.frombuffer(b"".join(table["x"].to_pylist()), dtype=np.float16).reshape(len(table), -1) for table in tables]
    return Tokens(images, np.concatenate(flat))


def iter_batches(x: torch.Tensor, size: int, seed: int) -> Generator[Batch]:
    """Iterate over batches in another order in each epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // size * size].split(size):
            batch = x[rows].float()
            yield Batch(batch, batch)


def train(params: TrainParams, x: torch.Tensor, start: SAE | None) -> SAE:
    """Train one SAE on all tokens."""
    plan = make_plan(params, len(x))
    sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLE]].float()
    learner = Learner.begin("sae", params, plan, Sample(sample), torch.device("cpu"), start)
    with closing(iter_batches(x, plan.batch_size, params.seed)) as batches:
        for _ in range(plan.n_steps):
            learner.learn(next(batches))
    return learner.finish("hookpoint", "model", None)


def measure(sae: SAE, tokens: Tokens, images: np.ndarray, judged: np.ndarray) -> dict[str, float]:
    """Measure FVU, and the mean MS above its floor, on held-out images."""
    chosen = np.isin(tokens.image, images)
    image, x = tokens.image[chosen], torch.from_numpy(tokens.x[chosen])
    mean, error, total = x.float().mean(0), 0.0, 0.0
    known = {int(number): place for place, number in enumerate(images)}
    strongest = torch.zeros(len(images), sae.n_latents)
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK].float()
        acts = sae.encode(part)
        error += float((sae.decode(acts) - part).square().sum())
        total += float((part - mean).square().sum())
        places = torch.tensor([known[int(number)] for number in image[start : start + CHUNK]])
        strongest.scatter_reduce_(0, places[:, None].expand(-1, sae.n_latents), acts, "amax")
    score = Monosemanticity(sae.n_latents, judged.shape[1])
    score.add(strongest, torch.from_numpy(judged[images]))
    scores = score.scores()
    return {"fvu": error / total, "ms": nan_mean(scores.ms) - scores.floor, "dead": float((strongest.amax(0) == 0).float().mean())}


def compare(before: SAE, after: SAE) -> dict[str, float]:
    """Compare the directions of two SAEs."""
    there, _ = best_matches(before.W_dec, after.W_dec)
    cosines = match_one_to_one(before.W_dec, after.W_dec)
    assert cosines is not None, "too many latents for a one-to-one matching"
    same = torch.cosine_similarity(before.W_dec, after.W_dec) > ALIKE
    return {"matched": float((cosines > ALIKE).float().mean()), "same": float(same.float().mean()), "mmcs": there.mmcs}


def main() -> None:
    """Print a line for each SAE of each chain."""
    options = argparse.ArgumentParser(description="Train on three successive data sets, anew and from the SAE before.")
    options.add_argument("--data", type=Path, default=Path("data"))
    options.add_argument("--hookpoint", default="blocks.15")
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--epochs-again", type=int, default=None, help="epochs of an SAE that begins with another; as many if left out")
    given = options.parse_args()
    folder = given.data / "activations" / given.hookpoint
    training, held_out = (load_tokens(sorted(folder.glob(f"{split}-*.parquet"))) for split in ("train", "eval"))
    table = pq.ParquetDataset(sorted((given.data / "images").glob("images-*.parquet"))).read(columns=["image", "label", "split"])
    labels = np.array(table["label"].to_pylist())[np.argsort(table["image"].to_numpy())]
    embeddings = pq.ParquetDataset(sorted(folder.glob("embeddings-*.parquet"))).read(columns=["image", "judge"])
    judged = np.stack([np.frombuffer(row, dtype=np.float32) for row in embeddings["judge"].to_pylist()])[
        np.argsort(embeddings["image"].to_numpy())
    ]
    late = sorted(set(labels))[-2:]
    old, new = (np.unique(training.image[np.isin(labels[training.image], late) == is_late]) for is_late in (False, True))
    old = np.random.default_rng(0).permutation(old)
    sets = [old[: len(old) * 4 // 5], old, np.concatenate([old, new])]
    seen = [np.unique(held_out.image[~np.isin(labels[held_out.image], late)])] * 2 + [np.unique(held_out.image)]
    base = load_params().train.model_copy(update={"epochs": given.epochs, "init": None, "hookpoint": None, "target": None})
    lr = make_plan(base, len(training.image)).lr
    chains = {"anew": None, "from the one before": 1.0, "from the one before, a third of the learning rate": 1 / 3}
    print(
        "| data | training | seconds | FVU | MS above floor | dead | matched | same number | MMCS |\n|---|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    first: SAE | None = None
    for chain, share in chains.items():
        before: SAE | None = None
        for number, (images, judges) in enumerate(zip(sets, seen, strict=True)):
            if number == 0 and first is not None:  # all chains begin with the same
                before = first
                continue
            changes: dict[str, object] = {"seed": number}
            if share and before:
                changes |= {"lr": lr * share, "epochs": given.epochs_again or given.epochs}
            began = time.perf_counter()
            sae = train(base.model_copy(update=changes), training.of(images), before if share else None)
            seconds = time.perf_counter() - began
            found = measure(sae, held_out, judges, judged)
            found |= compare(before, sae) if before else {}
            cells = [f"{found[key]:.3f}" if key in found else "" for key in ("fvu", "ms", "dead", "matched", "same", "mmcs")]
            print("| " + " | ".join([f"{len(images):,} images", chain, f"{seconds:.0f}", *cells]) + " |", flush=True)
            before, first = sae, first or sae


if __name__ == "__main__":
    main()
