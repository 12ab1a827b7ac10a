"""Runs steps of other projects' trainers on request, in the peers' environment; requests and answers are lines of JSON.

Each trainer is used as in its own project's training loop, in float32. Code is copied only where that loop is tied to a model and a
stream of text: `Sparsify`, whose Trainer computes activations in a hook, and the reading of batches.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from synthetic import HELD_OUT, Synthetic, first_of, fvu
from torch import Tensor

GROUPS = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
"""Shares of the latents that each level of a Matryoshka dictionary adds."""
POOL = 4
"""Number of batches made before steps are timed."""


class SAELens:
    """Steps of SAELens' SAETrainer, with its BatchTopK, TopK or Matryoshka SAE."""

    def __init__(self, p: dict[str, Any]) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        sae, config, extra = {
            "batch_topk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
            "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {}),
            "matryoshka": (
                MatryoshkaBatchTopKTrainingSAE,
                MatryoshkaBatchTopKTrainingSAEConfig,
                {"matryoshka_widths": _widths(p["d_sae"])},
            ),
        }[p["variant"]]
        torch.manual_seed(p["seed"])
        values = {"d_in": p["d_model"], "d_sae": p["d_sae"], "k": p["k"], "use_sparse_activations": p.get("sparse", False)}
        schedule = SAETrainerConfig(
            total_training_samples=p["n_steps"] * p["batch_size"],
            train_batch_size_samples=p["batch_size"],
            lr=p["lr"],
            lr_end=p["lr"] / 10,  # as its runner does; unused by a constant schedule
            lr_warm_up_steps=p["warmup"],
            lr_decay_steps=p["n_steps"] - p["decay_start"],
        )
        self._trainer = SAETrainer(schedule, sae(config(**values, **extra)), iter(()))

    def step(self, number: int, x: Tensor) -> None:
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def inference(self) -> Any:
        """The SAE as saved for inference; one trained with BatchTopK then has a threshold."""
        from sae_lens.saes.sae import SAE

        with tempfile.TemporaryDirectory() as folder:
            self._trainer.sae.save_inference_model(folder)
            return SAE.load_from_disk(folder)


class DictionaryLearning:
    """Updates of dictionary_learning's BatchTopK, TopK or Matryoshka trainer."""

    def __init__(self, p: dict[str, Any]) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = {"batch_topk": BatchTopKTrainer, "topk": TopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer}[p["variant"]]
        extra = {"group_fractions": GROUPS} if p["variant"] == "matryoshka" else {}
        self._trainer = trainer(
            steps=p["n_steps"],
            activation_dim=p["d_model"],
            dict_size=p["d_sae"],
            k=p["k"],
            layer=0,
            lm_name="",
            lr=p["lr"],
            warmup_steps=p["warmup"],
            decay_start=p["decay_start"],
            threshold_beta=p["threshold_decay"],
            threshold_start_step=p["threshold_start"],
            seed=p["seed"],
            device="cpu",
            **extra,
        )

    def step(self, number: int, x: Tensor) -> None:
        self._trainer.update(number, x)

    def inference(self) -> Any:
        return self._trainer.ae


class Sparsify:
    """Steps of eai-sparsify's Trainer: forward and backward pass, projection, optimiser, and count of firings."""

    def __init__(self, p: dict[str, Any]) -> None:
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(p["seed"])
        self._sae = SparseCoder(p["d_model"], SparseCoderConfig(num_latents=p["d_sae"], k=p["k"]), "cpu", torch.float32)
        self._optimiser, self._scheduler = self._signum(p) if p["optimiser"] == "signum" else self._adam(p)
        self._since_fired = torch.zeros(p["d_sae"], dtype=torch.long)
        self._fvu = 0.0

    def _signum(self, p: dict[str, Any]) -> tuple[Any, Any]:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        groups = [{"params": self._sae.parameters(), "lr": 5e-3 / (p["d_sae"] / 2**14) ** 0.5}]
        optimiser = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        optimiser.train()
        return optimiser, None

    def _adam(self, p: dict[str, Any]) -> tuple[Any, Any]:
        from transformers import get_linear_schedule_with_warmup

        adam = torch.optim.Adam([{"params": self._sae.parameters(), "lr": p["lr"]}])
        return adam, get_linear_schedule_with_warmup(adam, p["warmup"], p["n_steps"])

    def step(self, number: int, x: Tensor) -> None:
        sae = self._sae
        x = x.clone()[torch.ones(len(x), dtype=torch.bool)]  # its hook copies the batch and drops masked tokens
        if number == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        fired = torch.zeros_like(self._since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self._fvu = float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self._optimiser.step()
        self._optimiser.zero_grad()
        if self._scheduler:
            self._scheduler.step()
        self._since_fired += len(x)
        self._since_fired[fired] = 0

    def inference(self) -> Any:
        if not self._scheduler:
            self._optimiser.eval()
        return Whole(lambda x: self._sae(x).sae_out)


class Whole:
    """An SAE of which only the whole reconstruction is available, not its latents."""

    def __init__(self, reconstruct: Callable[[Tensor], Tensor]) -> None:
        self.encode, self.decode = reconstruct, lambda x_hat: x_hat


def _widths(d_sae: int) -> list[int]:
    return [round(sum(GROUPS[: i + 1]) * d_sae) for i in range(len(GROUPS))]


PEERS = {"sae_lens": SAELens, "dictionary_learning": DictionaryLearning, "sparsify": Sparsify}


class Session:
    """The current trainer, and the requests that it answers."""

    def versions(self, names: list[str]) -> dict[str, str]:
        return {name: metadata.version(name) for name in names}

    def make(self, **p: Any) -> None:
        """Replace the trainer; its steps run on synthetic batches multiplied by `scale`."""
        self._trainer: Any = None  # frees the memory of the last trainer first
        self._p = p
        gc.collect()
        torch.set_num_threads(p["n_threads"])
        self._data, self._done = Synthetic(p["d_model"]), 0
        self._pool = [self._batch(number) for number in range(POOL)]
        self._trainer = PEERS[p["peer"]](p)

    def _batch(self, number: int) -> Tensor:
        return self._data.batch(number, self._p["batch_size"]) * self._p["scale"]

    def steps(self, n: int) -> list[float]:
        """Make `n` steps and return the seconds of each."""
        return [self._timed(self._pool[self._done % POOL]) for _ in range(n)]

    def _timed(self, x: Tensor) -> float:
        start = time.perf_counter()
        self._trainer.step(self._done, x)
        self._done += 1
        return time.perf_counter() - start

    def train(self) -> float:
        """Make all steps, each on a new batch; return the sum of squares of the first batch, by which the data are compared."""
        for number in range(self._p["n_steps"]):
            self._timed(self._batch(number))
        return float(self._pool[0].double().square().sum())

    @torch.no_grad()
    def fvu(self, n_batches: int, bound: int | None = None) -> float:
        """FVU on held-out batches with the library's inference; with `bound`, of the first `bound` latents alone."""
        sae = self._trainer.inference()
        batches = [self._batch(HELD_OUT + number) for number in range(n_batches)]
        return fvu([(x, sae.decode(first_of(sae.encode(x), bound))) for x in batches])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the libraries' own output apart from the answers
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(session, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
