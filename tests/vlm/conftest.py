"""Tiny models with random weights, saved as on a hub; no network is needed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.models import save_tiny_clip


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: small batches gain nothing from more, and on a busy machine threads that wait for each other are 40 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 3 blocks, 32 wide, on 48 x 48 images in 16-pixel patches: a 3 x 3 grid."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    save_tiny_clip(folder)
    return folder
