"""Measures whether the order of training rows matters, with an SAE for each order, on this checkout's activations (from `make demo`).

python benchmarks/order.py      writes benchmarks/results/order.json; FVU and dead latents are measured on the evaluation split
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from report import Row, publish
from torch import Tensor

from ommatid import store
from ommatid.activations.batches import iter_batches, load_sample
from ommatid.activations.columns import from_float16
from ommatid.config import load_params
from ommatid.metrics import Fidelity
from ommatid.pipeline import open_stage
from ommatid.sae.learner import Learner, Sample
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch
from ommatid.sae.trainer import Trainer
from ommatid.train.stage import SAMPLE


def load(activations: store.Artefact, table: str) -> tuple[np.ndarray, np.ndarray, Tensor]:
    rows = activations.read(table, ["image", "token", "x"])
    return rows["image"].to_numpy(), rows["token"].to_numpy(), from_float16(rows["x"])


def in_order(x: Tensor, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
    n = len(x) // batch_size * batch_size
    while True:
        for rows in torch.from_numpy(order[:n]).split(batch_size):
            some = x[rows]
            yield Batch(some, some)


def uniform(x: Tensor, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    n_steps = len(x) // batch_size
    while True:
        yield from islice(in_order(x, rng.permutation(len(x)), batch_size), n_steps)


def main() -> None:
    params = load_params(Path("params.yaml"))
    activations, images = open_stage("extract", params.hookpoint), open_stage("images").read("images", ["image", "label"])
    image, token, x = load(activations, "train")
    held = load(activations, "eval")[2].float()
    label = np.array(images.sort_by("image")["label"].to_pylist())[image]
    size = params.train.batch_size
    orders = {
        "as stored (rounds of images)": lambda: iter_batches(activations, size, params.train.seed),
        "shuffled uniformly every epoch": lambda: uniform(x, size, np.random.default_rng(0)),
        "image after image": lambda: in_order(x, np.lexsort((token, image)), size),
        "class after class": lambda: in_order(x, np.lexsort((token, image, label)), size),
    }
    rows = []
    for name, batches in orders.items():
        (one,) = params.train.each().values()
        learner = Learner.begin(name, one, make_plan(one, len(x)), Sample(load_sample(activations, SAMPLE)), torch.device("cpu"))
        first = next(batches()).x
        distinct = len({row.tobytes() for row in first.numpy()})
        assert distinct > size / 2
        Trainer([learner], lambda event: None, None).fit(batches())
        sae = learner.finish(params.hookpoint, name, None)
        fidelity, fired = Fidelity(), torch.zeros(one.d_sae, dtype=torch.bool)
        for some in held.split(4096):
            acts = sae.encode(some)
            fidelity.add(some, sae.decode(acts), int((acts > 0).sum()))
            fired |= (acts > 0).any(0)
        rows += [
            Row(f"{name}: FVU", fidelity.fvu, "", better="lower"),
            Row(f"{name}: dead latents", float((~fired).float().mean()), "share", better="lower"),
        ]
        print(name, fidelity.fvu, float((~fired).float().mean()), flush=True)
    publish("order", rows, ["ommatid", "torch"], [f"{len(x)} training tokens, {len(held)} evaluation tokens, {params.train.epochs} epochs"])


if __name__ == "__main__":
    main()
