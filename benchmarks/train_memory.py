"""Measures the memory of training steps in a separate process, and prints it as a line of JSON.

python benchmarks/train_memory.py     reads peak and resident memory from /proc, as ru_maxrss may be inherited from the parent
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from synthetic import Synthetic
from train_setup import CPU, POOL, Size

from ommatid.sae.learner import Learner, Sample
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch

N_STEPS = 20
SETTLED = 3
"""Number of steps after which a floor for the selection is known."""


def main() -> None:
    torch.set_num_threads(2)
    size, data = Size(), Synthetic(Size().d_model)
    pool = [data.batch(number, size.batch_size) for number in range(POOL)]
    sample = Sample(torch.cat(pool))
    small = _begin(replace(size, d_sae=256, k=4), Sample(pool[0][:256]))
    _learn(small, [x[:64] for x in pool], range(SETTLED))  # loads the code that a first step needs, which must not count
    before = _restart()
    learner = _begin(size, sample)
    peaks = {}
    for name, steps in (("first", range(SETTLED)), ("later", range(SETTLED, N_STEPS))):
        _restart()
        _learn(learner, pool, steps)
        peaks[name] = _read("VmHWM") - before
    state = learner.state_dict()
    held = sum(tensor.nbytes for key, tensor in state.items() if key.startswith(("weights/", "optimiser/")))
    gradients = sum(tensor.nbytes for tensor in learner.weights.grads().values())
    print(json.dumps({name: peak - held for name, peak in peaks.items()} | {"gradients": gradients}))


def _begin(size: Size, sample: Sample) -> Learner:
    params = size.section(variant="batch_topk", epochs=1, seed=0)
    return Learner.begin("memory", params, make_plan(params, 10_000 * size.batch_size), sample, CPU)


def _learn(learner: Learner, pool: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        x = pool[step % len(pool)]
        learner.learn(Batch(x, x))


def _restart() -> int:
    """Reset the peak to the currently resident memory, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _read("VmRSS")


def _read(name: str) -> int:
    """Read an entry of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


if __name__ == "__main__":
    main()
