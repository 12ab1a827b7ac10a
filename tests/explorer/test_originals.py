"""Pages get images in full size as they were in the source, for ever under one address; an artefact that lacks or differs is said."""

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from ommatid.catalog.reader import Catalog
from ommatid.explorer.app import make_app
from ommatid.explorer.originals import KEPT_BYTES, Originals
from ommatid.explorer.web import Settings
from ommatid.images.original import OriginalReader
from support.small_study import Study


def client(study: Study, data: Path) -> TestClient:
    return TestClient(make_app(Settings(study.catalog, str(data))), base_url="http://127.0.0.1:8321")


def images(study: Study) -> list[tuple[int, str, str]]:
    """Number, checksum and path of some images."""
    with Catalog(study.catalog) as catalog:
        return catalog.ask("SELECT image, image_id, path FROM images ORDER BY image_id LIMIT 5").rows


def test_an_image_is_as_it_was_in_the_source(study: Study) -> None:
    with client(study, study.data) as asks:
        for image, image_id, path in images(study):
            answer = asks.get(f"/originals/{image}/{image_id[:12]}")
            assert answer.content == (study.root / "photos" / path).read_bytes()
            assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == ("image/png", "nosniff")
            assert "immutable" in answer.headers["cache-control"]
            assert f'"/originals/{image}/{image_id[:12]}"' in asks.get(f"/images/{image}").text


def test_a_catalogue_alone_shows_thumbnails(study: Study, tmp_path: Path) -> None:
    ((image, image_id, _), *_) = images(study)
    with client(study, tmp_path) as asks:
        answer = asks.get(f"/originals/{image}/{image_id[:12]}")
        assert answer.status_code == 404 and f"The images are not in {tmp_path}/images; the catalogue has thumbnails alone." in answer.text
        page = asks.get(f"/images/{image}").text
        assert f"/thumbs/{image}/" in page and "/originals/" not in page
        assert "/originals/" not in asks.get("/features").text


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("/originals/0/0123456789ab", 404, "holds another image 0 than this catalogue"),
        ("/originals/999/0123456789ab", 404, "there is no image 999; it has 240"),
        ("/originals/-1/0123456789ab", 404, "there is no image -1"),
        ("/originals/0/0123", 400, "hash: got &#39;0123&#39;"),
        ("/originals/0/..%2f..%2fetc%2fpasswd", 404, "There is no page"),
        ("/originals/x/0123456789ab", 400, "image: got &#39;x&#39;"),
    ],
)
def test_what_is_not_there_is_said(study: Study, address: str, status: int, said: str) -> None:
    with client(study, study.data) as asks:
        answer = asks.get(address)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, bytes], list[int]], Originals]:
    """Originals of some files, that note which are read."""

    class Reader:
        def __init__(self, files: dict[int, bytes], read: list[int]):
            self.files, self.noted = files, read

        def read(self, image: int) -> bytes:
            self.noted.append(image)
            return self.files[image]

    def made(files: dict[int, bytes], read: list[int]) -> Originals:
        monkeypatch.setattr(Originals, "_open", lambda self: Reader(files, read))
        return Originals("data")

    return made


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def test_the_least_recently_asked_for_goes_first(of: Callable[..., Originals]) -> None:
    files = {i: b"\xff\xd8\xff" + bytes([i]) * (KEPT_BYTES // 3 - 10) for i in range(4)}
    originals = of(files, read := [])
    for i in (0, 1, 2, 0, 3, 0, 1):
        assert originals.get(i, hash_of(files[i])) == (files[i], "image/jpeg")
    assert read == [0, 1, 2, 3, 1]
    huge = {9: b"\x89PNG" + bytes(KEPT_BYTES)}
    originals = of(huge, read := [])
    assert originals.get(9, hash_of(huge[9])) == originals.get(9, hash_of(huge[9])) and read == [9, 9]


@pytest.mark.parametrize(
    ("format_", "options", "type_"),
    [
        ("JPEG", {}, "image/jpeg"), ("GIF", {}, "image/gif"), ("WEBP", {}, "image/webp"), ("AVIF", {}, "image/avif"),
        ("BMP", {}, "image/bmp"), ("TIFF", {}, "image/jpeg"), ("JPEG2000", {}, "image/jpeg"), ("PPM", {}, "image/jpeg"),
    ],
)  # fmt: skip
def test_what_browsers_do_not_show_is_encoded_anew(format_: str, options: dict, type_: str, of: Callable[..., Originals]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 40), (10, 200, 90)).save(buffer, format_, **options)
    content, found = of({0: buffer.getvalue()}, []).get(0, hash_of(buffer.getvalue()))
    assert found == type_ and (content == buffer.getvalue()) == (format_ not in ("TIFF", "JPEG2000", "PPM"))
    shown = Image.open(io.BytesIO(content))
    assert shown.size == ((5000, 40) if content == buffer.getvalue() else (4096, 33))
    r, g, b = shown.convert("RGB").getpixel((100, 20))  # type: ignore[misc]
    assert abs(r - 10) + abs(g - 200) + abs(b - 90) < 12


def test_markup_is_never_answered(of: Callable[..., Originals]) -> None:
    page = b"<svg onload=alert(1)>"
    with pytest.raises(Exception, match="The image cannot be decoded any more: not_an_image"):
        of({0: page}, []).get(0, hash_of(page))


def test_a_replaced_artefact_is_opened_anew(own_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ((image, image_id, _), *_) = images(own_study)
    opened = []
    made = OriginalReader.__init__
    monkeypatch.setattr(OriginalReader, "__init__", lambda self, artefact: opened.append(artefact) or made(self, artefact))
    originals = Originals(str(own_study.data))
    originals.get(image, image_id[:12])
    originals._kept.clear()
    originals.get(image, image_id[:12])
    assert len(opened) == 1
    (own_study.data / "images").rename(own_study.data / "before")
    with pytest.raises(Exception, match="The images are not in"):
        originals.get(image, image_id[:13])
    (own_study.data / "before").rename(own_study.data / "images")
    with pytest.raises(Exception, match="holds another image"):
        originals.get(image, "0123456789ab")


def test_pyarrow_waits_for_the_first_image() -> None:
    script = "import ommatid.explorer.app, sys; exit('pyarrow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
