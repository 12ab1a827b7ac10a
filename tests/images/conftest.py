"""Small pictures, and the stage run on a source in a temporary folder."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ommatid.config import ImagesParams
from ommatid.images.stage import run as make_images
from ommatid.store import Artefact, Draft, open_draft


def _params(source: dict[str, Any], **changes: Any) -> ImagesParams:
    values = {"source": source, "limit": None, "eval_share": 0.3, "max_rejected": 0.1, "thumbnail": 32}
    return ImagesParams.model_validate({**values, **changes})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test find what another saw in the same images."""
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def params() -> Callable[..., ImagesParams]:
    """Makes params of the stage: `params({"kind": ...}, limit=3)`."""
    return _params


@pytest.fixture
def drafting() -> Callable[..., Any]:
    """Opens the draft of a place, as the runner of stages does."""

    @contextmanager
    def opened(place: Path, params: ImagesParams) -> Iterator[Draft]:
        with open_draft(place, "images", params.identity(), {}) as draft:
            yield draft

    return opened


@pytest.fixture
def make(tmp_path: Path, drafting: Callable[..., Any]) -> Callable[..., Artefact]:
    """Runs the stage on a source and publishes the artefact: `make({"kind": ...}, place="out", limit=3)`."""

    def made(source: dict[str, Any], place: str = "artefact", **changes: Any) -> Artefact:
        params = _params(source, **changes)
        with drafting(tmp_path / place, params) as draft:
            make_images(params, {}, draft)
            return draft.publish(tmp_path / place)

    return made


@pytest.fixture
def pixels() -> Callable[..., np.ndarray]:
    """Makes random pixels, (height, width, 3), in blocks, so that lossy formats keep them."""

    def drawn(seed: int = 0, height: int = 24, width: int = 40) -> np.ndarray:
        blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        return np.kron(blocks, np.ones((8, 8, 1), dtype=np.uint8))

    return drawn


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encodes an image: `encode(image, "PNG", **options)`."""

    def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
        return buffer.getvalue()

    return encoded


@pytest.fixture
def png(pixels: Callable[..., np.ndarray], encode: Callable[..., bytes]) -> Callable[[int], bytes]:
    """Makes a small PNG, which differs between seeds."""
    return lambda seed: encode(pixels(seed))


@pytest.fixture
def checksums() -> Callable[[Path], dict[str, str]]:
    """Returns the name and sha256 of every file in a folder."""
    return lambda folder: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
