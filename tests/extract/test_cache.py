"""Proves that networks run only on images that are new, and that an extraction has the same bytes whatever the cache holds.

Forwarded images are counted by a spy in the model, which knows each image by its pixels, so that neither the pictures that check a model
nor the black images at the end of a batch count.
"""

import hashlib
import io
import multiprocessing
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ommatid.config import ExtractParams
from ommatid.errors import ConfigError
from ommatid.events import Event, Progress, Reused, Warned
from ommatid.extract import cache, networks, plan, rows, shard
from ommatid.extract.stage import extract
from ommatid.images import dataset, loader
from ommatid.images.decode import decode
from ommatid.images.stage import run as make_images
from ommatid.store import Artefact, code, open_artefact, open_draft
from ommatid.store.caches import activations_folder
from ommatid.vlm import Captured, Hookpoint
from support.study import make_artefact, make_test_params
from support.tiles import GRID, TileModel

LABELS = ("day", "night")
BATCH = 4


class SpiedModel(TileModel):
    """The tile model, which counts how often it sees each image."""

    hookpoints = TileModel.hookpoints | {"late": Hookpoint(8, ("cls",), GRID)}

    def __init__(self, name: str = "tiles") -> None:
        super().__init__()
        self.name = name
        self.seen: Counter[str] = Counter()
        self.shapes: set[int] = set()

    @property
    def state(self) -> Mapping[str, torch.Tensor | str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {**super().state, "name": self.name}

    def _look(self, pixels: torch.Tensor) -> None:
        self.shapes.add(len(pixels))
        self.seen.update(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in pixels)

    def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
        self._look(pixels)
        found = super().capture(pixels, ["tiles", "cls"])
        tokens = {**found.tokens, "late": found.tokens["tiles"] * 2}
        return Captured({name: tokens[name] for name in hookpoints}, found.embedding)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        self._look(pixels)
        return super().embed(pixels)


@dataclass
class World:
    """A model and judges that every extraction of a test uses, and the pixels of the images that were drawn."""

    model: SpiedModel
    judges: dict[str, SpiedModel]

    def count(self, pictures: Iterable[int]) -> dict[str, int]:
        """Return how many of some pictures each network has seen, counting a picture as often as it was seen, and forget it."""
        known = {pixels_of(number): number for number in pictures}
        found = {}
        for network in (self.model, *self.judges.values()):
            found[network.name] = sum(n for digest, n in network.seen.items() if digest in known)
            network.seen.clear()
        return found


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """A study of tiny images in several shards, chunks and row groups, and an empty cache."""
    return make_world(monkeypatch, tmp_path / "cache")


def make_world(patch: pytest.MonkeyPatch, folder: Path) -> World:
    world = World(SpiedModel(), {name: SpiedModel(name) for name in ("judge", "second")})
    patch.setattr(networks, "load_model", lambda params, dtype, device: world.model)
    patch.setattr(networks, "load_judge", lambda params, dtype, device: world.judges[params.path])
    patch.setattr(plan, "IMAGES_PER_SHARD", 12)
    patch.setattr(shard, "IMAGES_PER_CHUNK", 2 * BATCH)
    patch.setattr(rows, "BYTES_PER_ROW_GROUP", 2 * 12 * 16)
    patch.setitem(dataset.PARQUET, "row_group_size", 3)
    patch.setenv("OMMATID_CACHE", str(folder))
    patch.setenv("OMMATID_CACHE_GB", "0.1")
    return world


def draw(number: int) -> Image.Image:
    tiles = np.random.default_rng(number).integers(0, 256, (*GRID, 3), dtype=np.uint8)
    return Image.fromarray(tiles.repeat(16, axis=0).repeat(16, axis=1))


def pixels_of(number: int) -> str:
    return hashlib.sha256(TileModel.preprocess(draw(number)).tobytes()).hexdigest()


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    draw(number).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def params_of(**changes: Any) -> ExtractParams:
    judge = {"kind": "transformers", "path": "judge"}
    values = make_test_params().model_dump(mode="json")["extract"]
    fixed = {"hookpoints": ["tiles"], "tokens": "patch", "batch_size": BATCH, "dtype": "float32", "judge": judge, "sample": 4}
    return ExtractParams.model_validate(values | fixed | changes)


def images_of(root: Path, pictures: Mapping[int, str], eval_share: float = 0.3) -> Artefact:
    """Make the images artefact of a folder that holds some pictures, each in a sub-folder named for its label."""
    folder = root / "photos"
    shutil.rmtree(folder, ignore_errors=True)
    for number, label in pictures.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number * 7919 % 1000:03d}.png").write_bytes(png(number))
    source = {"kind": "folder", "path": str(folder)}
    params = make_test_params(images={"source": source, "limit": None, "eval_share": eval_share, "thumbnail": 16})
    return make_artefact(root / "images", "images", make_images, params.images, {})


def run(root: Path, images: Artefact, on_event: Callable[[Event], None] = lambda event: None, **changes: Any) -> Artefact:
    section, place = params_of(**changes), root / "activations"
    with open_draft(place, "extraction", section.identity(), {"images": images}) as draft:
        extract(section, {"images": images}, draft, on_event)
        return draft.publish(place)


def from_scratch(root: Path, images: Artefact, **changes: Any) -> Artefact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMMATID_CACHE", str(root / "scratch-cache"))
        shutil.rmtree(root / "scratch-cache", ignore_errors=True)
        return run(root / "scratch", images, **changes)


def segments() -> list[Path]:
    return sorted(activations_folder().rglob("*.rows"))


PICTURES = {number: LABELS[number % 2] for number in range(30)}
NOTHING = {"tiles": 0, "judge": 0, "second": 0}


Step = tuple[str, int]
steps = st.lists(st.tuples(st.sampled_from(["add", "remove", "relabel", "eval_share"]), st.integers(0, 2**16)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def of_sets() -> dict[tuple[float, tuple[tuple[int, str], ...]], str]:
    """Digests of extractions from scratch, by the set of images that they are of."""
    return {}


@given(changes=steps)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_of_changes_gives_the_bytes_of_a_run_from_scratch(
    tmp_path_factory: pytest.TempPathFactory, of_sets: dict[Any, str], changes: list[Step]
) -> None:
    folder, root = tmp_path_factory.mktemp("sequence"), Path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # which would take most of the time
        patch.chdir(folder)  # so that manifests, which name the source, are the same in all sequences
        world = make_world(patch, folder / "cache")
        pictures, share, known = {number: LABELS[number % 2] for number in range(13)}, 0.3, set[int]()
        for step, (change, seed) in enumerate([("none", 0), *changes]):
            pictures, share = change_set(pictures, share, change, random.Random(seed), 100 * step)
            images = images_of(root, pictures, share)
            found = run(root, images)
            new = pictures.keys() - known
            verified = BATCH if not known else 0  # half of the first batch is seen again, to find out whether rows may be reused
            counts = world.count(pictures)
            assert len(new) <= counts["tiles"] == counts["judge"] <= len(new) + verified
            key = share, tuple(sorted(pictures.items()))
            if key not in of_sets:
                of_sets[key] = from_scratch(root, images).digest
                world.count(pictures)
            assert found.digest == of_sets[key]
            known |= new
        found.verify()
    shutil.rmtree(folder)


def change_set(pictures: dict[int, str], share: float, change: str, chosen: random.Random, first: int) -> tuple[dict[int, str], float]:
    """Return pictures and the share of the evaluation split after one change at random."""
    match change:
        case "add":
            return pictures | {number: chosen.choice(LABELS) for number in range(first, first + chosen.randint(1, 6))}, share
        case "remove":
            gone = chosen.sample(sorted(pictures), min(len(pictures) - 4, chosen.randint(1, 5)))
            return {number: label for number, label in pictures.items() if number not in gone}, share
        case "relabel":
            return pictures | {number: chosen.choice(LABELS) for number in chosen.sample(sorted(pictures), 3)}, share
        case "eval_share":
            return pictures, chosen.choice([0.1, 0.5, 0.8])
        case _:
            return pictures, share


KINDS = ("add", "add", "copy", "metadata", "unreadable", "remove", "move", "caption", "limit", "eval_share", "judges", "hookpoints")


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**16)), min_size=2, max_size=6),
    st.sampled_from([3, 4, 5]),
)
@example([("caption", 0), ("remove", 0)], 3)  # which removes exactly the images that have captions
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_files_of_any_kind_and_several_networks_give_the_bytes_of_a_run_from_scratch(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Step], batch_size: int
) -> None:
    """Each network runs once on each new content: neither on copies, nor again after a limit, a judge or a hookpoint came and went."""
    folder, root = tmp_path_factory.mktemp("sequence"), Path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.chdir(folder)
        world = make_world(patch, folder / "cache")
        for number in range(11):
            place = Path("photos", LABELS[number % 2], f"{number:03d}.png")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(number))
        limit, share, judges, hookpoints = None, 0.3, ["judge"], ["tiles"]
        known: dict[str, set[str]] = {name: set() for name in ("tiles", "late", "judge", "second")}
        for step, (change, seed) in enumerate([("none", 0), *changes]):
            chosen = random.Random(seed)
            change_files(change, chosen, step)
            if change == "limit":
                limit = chosen.choice([None, 6, 9])
            elif change == "eval_share":
                share = chosen.choice([0.1, 0.5, 0.8])
            elif change == "judges":
                judges = chosen.choice([["judge"], ["judge", "second"], ["second", "judge"]])
            elif change == "hookpoints":
                hookpoints = chosen.choice([["tiles"], ["tiles", "late"], ["late"]])
            source = {"kind": "folder", "path": "photos"}
            params = make_test_params(images={"source": source, "limit": limit, "eval_share": share, "max_rejected": 0.9, "thumbnail": 16})
            images = make_artefact(root / "images", "images", make_images, params.images, {})
            section = {"batch_size": batch_size, "hookpoints": hookpoints}
            section |= {"judge": [{"kind": "transformers", "path": name} for name in judges]}
            found = run(root, images, **section)
            counts, ids = world.count(range(1000)), set(images.read("images", ["image_id"])["image_id"].to_pylist())
            of_model = [known[name] for name in hookpoints]
            expected = {"tiles": len(ids - set.intersection(*of_model)), "judge": 0, "second": 0}
            expected |= {name: len(ids - known[name]) for name in judges}
            first = {name: not known[name] for name in judges} | {"tiles": not all(of_model)}
            for name, n in expected.items():
                assert n <= counts[name] <= n + batch_size * first.get(name, False), (step, name)
            for kept in (*of_model, *(known[name] for name in judges)):
                kept |= ids
        assert found.digest == from_scratch(root, images, **section).digest
        found.verify()
    shutil.rmtree(folder)


def change_files(change: str, chosen: random.Random, step: int) -> None:
    """Change the files of the folder `photos`, or captions.csv in it."""
    files = sorted(path for path in Path("photos").rglob("*.png"))
    some = chosen.sample(files, min(len(files), chosen.randint(1, 4)))
    match change:
        case "add":
            for number in range(100 * step, 100 * step + chosen.randint(1, 6)):
                Path("photos", chosen.choice(LABELS), f"{chosen.randrange(10**6):06d}.png").write_bytes(png(number))
        case "copy":
            for i, path in enumerate(some):
                path.with_name(f"{chosen.choice('09')}-{step}-{i}.png").write_bytes(path.read_bytes())
        case "metadata":
            for i, path in enumerate(some):
                path.with_name(f"{chosen.choice('09')}-{step}-{i}.png").write_bytes(path.read_bytes() + b"a comment")
        case "unreadable":
            Path("photos", LABELS[0], f"{step}.png").write_bytes(b"no image")
        case "remove":
            for path in some[: len(files) - 6]:
                path.unlink()
        case "move":
            for i, path in enumerate(some):
                path.rename(Path("photos", chosen.choice(LABELS), f"{step}-{i}-{path.name}"))
        case "caption":
            rows = [f"{path.relative_to('photos').as_posix()},a caption {chosen.randrange(9)}" for path in some]
            Path("photos", "captions.csv").write_text("\n".join(["path,caption", *rows]))
        case _:
            pass
    forget_lost_captions(Path("photos", "captions.csv"))


def forget_lost_captions(file: Path) -> None:
    """Let a file of captions name no more images that are gone than others, as the folder would be refused."""
    if not file.exists():
        return
    header, *rows = file.read_text().splitlines()
    here = [row for row in rows if (file.parent / row.partition(",")[0]).exists()]
    lost = [row for row in rows if row not in here][: len(here)]
    if here:
        file.write_text("\n".join([header, *here, *lost]))
    else:
        file.unlink()


def test_a_new_image_is_the_only_one_that_is_read_and_the_event_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, images_of(tmp_path, PICTURES))
    world.count(PICTURES)
    decoded: list[bytes] = []
    monkeypatch.setattr(loader, "decode", lambda file: decoded.append(file) or decode(file))
    heard: list[Event] = []
    again = run(tmp_path, images_of(tmp_path, PICTURES | {99: "day"}), heard.append)
    assert world.count([*PICTURES, 99]) == {"tiles": 1, "judge": 1, "second": 0}
    assert decoded == [png(99)]
    assert [event for event in heard if isinstance(event, Reused)] == [Reused("images", 30, 1)]
    assert world.model.shapes == {1, 7, BATCH}  # the probe, the check of the model, and batches, which are always whole
    assert "reused" not in again.summary


def test_nothing_is_forwarded_when_labels_or_the_split_change_or_images_go(world: World, tmp_path: Path) -> None:
    run(tmp_path, images_of(tmp_path, PICTURES))
    world.count(PICTURES)
    renamed = {number: "dusk" for number in PICTURES}
    fewer = {number: label for number, label in PICTURES.items() if number % 5}
    for pictures, share in ((renamed, 0.3), (PICTURES, 0.6), (fewer, 0.3)):
        images = images_of(tmp_path, pictures, share)
        found = run(tmp_path, images)
        assert world.count(PICTURES) == NOTHING
        assert found.digest == from_scratch(tmp_path, images).digest
        world.count(PICTURES)


def test_a_new_judge_or_hookpoint_runs_no_other_network(world: World, tmp_path: Path) -> None:
    images = images_of(tmp_path, PICTURES)
    run(tmp_path, images)
    judges = [{"kind": "transformers", "path": name} for name in ("judge", "second")]
    world.count(PICTURES)
    found = run(tmp_path, images, judge=judges)
    counts = world.count(PICTURES)
    assert counts["tiles"] == counts["judge"] == 0 and counts["second"] >= 30
    assert found.digest == from_scratch(tmp_path, images, judge=judges).digest
    world.count(PICTURES)
    changes = {"judge": judges, "hookpoints": ["tiles", "late"]}
    found = run(tmp_path, images, **changes)
    counts = world.count(PICTURES)
    assert counts["tiles"] >= 30 and counts["judge"] == counts["second"] == 0
    assert found.digest == from_scratch(tmp_path, images, **changes).digest
    world.count(PICTURES)
    run(tmp_path, images, **changes)
    assert world.count(PICTURES) == NOTHING
    run(tmp_path, images, sample=None, max_norm=3.0, judge=judges[1])  # which tokens are drawn does not matter
    assert world.count(PICTURES) == NOTHING


@pytest.mark.parametrize("change", [{"tokens": "all"}, {"batch_size": 5}, {"dtype": "bfloat16"}])
def test_what_changes_a_row_is_part_of_its_key(world: World, tmp_path: Path, change: dict[str, Any]) -> None:
    images = images_of(tmp_path, PICTURES)
    run(tmp_path, images)
    world.count(PICTURES)
    run(tmp_path, images, **change)
    assert world.count(PICTURES)["tiles"] >= 30


def test_other_weights_are_another_network(world: World, tmp_path: Path) -> None:
    images = images_of(tmp_path, PICTURES)
    run(tmp_path, images)
    world.count(PICTURES)
    world.model.spread = world.model.spread * 1.0001
    found = run(tmp_path, images)
    counts = world.count(PICTURES)
    assert counts["tiles"] >= 30 and counts["judge"] == 0
    assert found.digest == from_scratch(tmp_path, images).digest


def test_a_module_that_computes_something_else_with_the_same_state_is_noticed(world: World, tmp_path: Path) -> None:
    images = images_of(tmp_path, PICTURES)
    run(tmp_path, images)
    colours = world.model.colours
    world.model.colours = lambda pixels: 1.5 * colours(pixels)  # pyright: ignore[reportAttributeAccessIssue]
    heard: list[Event] = []
    found = run(tmp_path, images, heard.append)
    assert any(isinstance(event, Warned) and "computes something else with the same weights now" in event.what for event in heard)
    assert found.digest == from_scratch(tmp_path, images).digest


def test_code_counts_but_not_its_comments_and_not_that_of_other_families(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "ommatid"
    shutil.copytree(Path(code.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "Code", lambda: code.Code(package))

    def digests() -> list[str]:
        cache._code_digest.cache_clear()
        return [cache._code_digest(f"ommatid.vlm.{family}") for family in ("lite", "clip")]

    def edit(file: str, old: str, new: str) -> None:
        text = (package / file).read_text()
        assert old in text
        (package / file).write_text(text.replace(old, new, 1))

    before = digests()
    edit("vlm/clip.py", "class ClipVision", "# A comment.\nclass ClipVision")
    for file in ("store/caches.py", "store/artefact.py", "store/memo.py"):
        edit(file, "\n\n\n", "\n\n\nSTORED = 3\n")
    assert digests() == before
    edit("vlm/clip.py", "max_position_embeddings", "max_position_embedding")
    assert [after == first for after, first in zip(digests(), before, strict=True)] == [True, False]
    edit("vlm/minilm.py", "1e-12", "1e-6")
    assert digests()[0] != before[0]
    edit("vlm/minilm.py", "1e-6", "1e-12")
    assert digests()[0] == before[0]
    edit("images/decode.py", "2**28", "2**29")
    assert digests()[0] != before[0]
    cache._code_digest.cache_clear()


class Leaky(SpiedModel):
    """A model whose outputs depend on the mean of the batch, in their last bits."""

    def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
        found = super().capture(pixels, hookpoints)
        return Captured({name: x + 1e-6 * pixels.float().mean() for name, x in found.tokens.items()}, found.embedding)


def test_rows_that_depend_on_the_batch_are_not_reused_and_all_else_is(world: World, tmp_path: Path) -> None:
    world.model = Leaky()
    heard: list[Event] = []
    run(tmp_path, images_of(tmp_path, PICTURES), heard.append)
    (said,) = [event.what for event in heard if isinstance(event, Warned)]
    assert said.startswith("tiles: on this machine, the last bits of outputs for an image depend on the other images")
    world.count(PICTURES)
    images = images_of(tmp_path, PICTURES | {99: "day"})
    found = run(tmp_path, images)
    assert world.count([*PICTURES, 99]) == {"tiles": 32, "judge": 1, "second": 0}  # once more for its embedding
    assert found.digest == from_scratch(tmp_path, images).digest


class LeakyJudge(SpiedModel):
    """A judge whose embeddings depend on the mean of the batch, in their last bits."""

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().embed(pixels) + 1e-6 * pixels.float().mean()


def test_a_new_network_that_depends_on_the_batch_sees_the_same_batches_whatever_the_cache_holds(world: World, tmp_path: Path) -> None:
    run(tmp_path, images_of(tmp_path, PICTURES))
    world.judges["second"] = LeakyJudge("second")
    images = images_of(tmp_path, PICTURES | dict.fromkeys(range(90, 96), "day"))
    judges = [{"kind": "transformers", "path": name} for name in ("judge", "second")]
    found = run(tmp_path, images, judge=judges)
    assert found.digest == from_scratch(tmp_path, images, judge=judges).digest


def test_damaged_notes_are_made_again(world: World, tmp_path: Path) -> None:
    images = images_of(tmp_path, PICTURES)
    whole = run(tmp_path, images, dtype="bfloat16")
    for i, path in enumerate(sorted(activations_folder().rglob("*.json"))):
        text = path.read_text()
        path.write_text(["[]", text.replace("0", "1").replace("true", "false"), text[:-3], ""][i % 4])
    assert run(tmp_path, images, dtype="bfloat16").digest == whole.digest


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 3, 5, 8])
def test_a_killed_run_continues_with_what_was_finished(world: World, tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FLUSH_BYTES", 1)  # after each batch
    images = images_of(tmp_path, PICTURES)
    whole = from_scratch(tmp_path, images)
    world.count(PICTURES)
    forward, calls = networks.Networks.forward, [0]

    def die(self: networks.Networks, pixels: Any, wanted: Any) -> Any:
        calls[0] += 1
        if calls[0] == moment + 2:  # the probe, and the check whether rows may be reused
            raise Killed
        return forward(self, pixels, wanted)

    monkeypatch.setattr(networks.Networks, "forward", die)
    with pytest.raises(Killed):
        run(tmp_path, images)
    n_done = world.count(PICTURES)["tiles"]
    monkeypatch.setattr(networks.Networks, "forward", forward)
    found = run(tmp_path, images)
    left = world.count(PICTURES)["tiles"]
    assert 30 - n_done <= left <= 30 - n_done + 2 * BATCH + BATCH  # the batch that was being written, and the check of the first one
    assert found.digest == whole.digest


def damage(path: Path, chosen: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match chosen.randrange(3):
        case 0:
            data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        case 1:
            del data[chosen.randrange(len(data)) :]
        case _:
            data += b"\0"
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_rows_are_computed_again(world: World, tmp_path: Path, seed: int) -> None:
    images = images_of(tmp_path, PICTURES)
    whole = run(tmp_path, images)
    chosen = random.Random(seed)
    files = chosen.sample(segments(), 3)
    for path in files:
        damage(path, chosen)
    world.count(PICTURES)
    heard: list[Event] = []
    assert run(tmp_path, images, heard.append).digest == whole.digest
    said = [event.what for event in heard if isinstance(event, Warned)]
    assert len(said) == 3 and all(": damaged (" in line for line in said)
    assert sum(world.count(PICTURES).values()) > 0
    assert run(tmp_path, images).digest == whole.digest
    assert world.count(PICTURES) == NOTHING


def _extract_elsewhere(root: str, folder: str, barrier: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_world(patch, Path(root) / "cache")
        images = open_artefact(Path(root) / "images", "images")
        barrier.wait(60)
        run(Path(root) / folder, images)


def test_two_extractions_at_once_write_the_same(world: World, tmp_path: Path) -> None:
    images = images_of(tmp_path, PICTURES)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_extract_elsewhere, args=(str(tmp_path), name, barrier)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    whole = from_scratch(tmp_path, images)
    world.count(PICTURES)
    assert run(tmp_path, images).digest == whole.digest
    assert world.count(PICTURES) == NOTHING
    digests = [hashlib.sha256((tmp_path / name / "activations" / "manifest.json").read_bytes()).hexdigest() for name in ("one", "two")]
    assert digests == [whole.digest] * 2


def test_the_cache_keeps_to_its_bound_and_says_so_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(tmp_path, PICTURES)
    whole = from_scratch(tmp_path, images)
    monkeypatch.setenv("OMMATID_CACHE_GB", "0.000006")  # 6 kB
    monkeypatch.setattr(cache, "FLUSH_BYTES", 1)
    heard: list[Event] = []
    assert run(tmp_path, images, heard.append).digest == whole.digest
    (said,) = [event.what for event in heard if isinstance(event, Warned)]
    assert "the cache of activations is full: it may take 6 kB" in said
    assert 0 < sum(path.stat().st_size for path in segments()) <= 6000
    world.count(PICTURES)
    assert run(tmp_path, images).digest == whole.digest
    assert 0 < world.count(PICTURES)["tiles"] < 30


def test_rows_that_a_run_needs_later_make_no_room_for_its_new_ones(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, images_of(tmp_path, PICTURES))
    size = sum(path.stat().st_size for path in activations_folder().rglob("*") if path.is_file())
    for age, path in enumerate(segments()):
        os.utime(path, (1 + age, 1 + age))
    monkeypatch.setenv("OMMATID_CACHE_GB", str(size / 1e9))  # which leaves no room
    more = images_of(tmp_path, {**PICTURES, **dict.fromkeys(range(2000, 2004), "more")})
    world.count([])
    run(tmp_path, more)
    assert world.count([*PICTURES])["tiles"] == 0


def test_old_rows_make_room_for_new_ones(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, images_of(tmp_path, PICTURES))
    size = sum(path.stat().st_size for path in activations_folder().rglob("*") if path.is_file())
    for path in segments():
        os.utime(path, (1, 1))
    monkeypatch.setenv("OMMATID_CACHE_GB", str(1.2 * size / 1e9))
    others = images_of(tmp_path, {number + 1000: label for number, label in PICTURES.items()})
    run(tmp_path, others)
    world.count([])
    run(tmp_path, others)
    assert world.count(range(1000, 1030)) == NOTHING
    assert sum(path.stat().st_size for path in segments()) <= 1.2 * size


def test_an_extraction_without_a_cache_is_the_same(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(tmp_path, PICTURES)
    whole = run(tmp_path, images)
    heard: list[Event] = []
    monkeypatch.setenv("OMMATID_CACHE_GB", "0")
    assert run(tmp_path, images, heard.append).digest == whole.digest
    assert all(isinstance(event, Progress) for event in heard)
    monkeypatch.setenv("OMMATID_CACHE_GB", "1")
    monkeypatch.setenv("OMMATID_CACHE", "/proc/nowhere")
    assert run(tmp_path, images, heard.append).digest == whole.digest
    (said,) = [event.what for event in heard if isinstance(event, Warned)]
    assert said.startswith("/proc/nowhere/activations: cannot be used as the cache of activations (")
    monkeypatch.setenv("OMMATID_CACHE_GB", "some")
    with pytest.raises(ConfigError, match="OMMATID_CACHE_GB=some"):
        run(tmp_path, images)


def test_a_full_disk_under_the_cache_is_a_notice(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(tmp_path, PICTURES)
    whole = from_scratch(tmp_path, images)

    tried: list[object] = []

    def fail(*arguments: object) -> None:
        tried.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "FLUSH_BYTES", 1)
    monkeypatch.setattr(cache.RowStore, "write", fail)
    heard: list[Event] = []
    assert run(tmp_path, images, heard.append).digest == whole.digest
    (said,) = [event.what for event in heard if isinstance(event, Warned)]
    assert said.endswith("the cache of activations cannot be written (No space left on device); the run goes on without")
    assert len(tried) == 1, "a disk on which others work is not filled again and again"


def test_a_worker_that_cannot_reach_the_cache_works_without_it(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(tmp_path, PICTURES)
    whole = run(tmp_path, images)
    open_place = cache.open_place
    elsewhere = str(tmp_path / "on-another-machine")

    def open_elsewhere(*arguments: Any) -> cache.Place:
        place = open_place(*arguments)
        assert place is not None
        return replace(place, folder=elsewhere)

    monkeypatch.setattr("ommatid.extract.stage.open_place", open_elsewhere)
    world.count(PICTURES)
    assert run(tmp_path, images).digest == whole.digest
    assert world.count(PICTURES)["tiles"] == 30
    assert not Path(elsewhere).exists()


def test_the_rounding_error_is_measured_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(tmp_path, PICTURES)
    first = run(tmp_path, images, dtype="bfloat16")
    exact = []
    monkeypatch.setattr(networks, "load_model", lambda params, dtype, device: exact.append(dtype) or world.model)
    again = run(tmp_path, images, dtype="bfloat16")
    assert again.digest == first.digest
    assert exact == ["bfloat16"]
