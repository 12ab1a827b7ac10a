"""Proves that activations have the right row and position, in a reproducible shuffled order, and that a kill loses one chunk at most."""

import errno
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ommatid.activations.columns import from_float16, from_float32
from ommatid.config import ExtractParams
from ommatid.errors import ArtefactError, ModelError
from ommatid.events import Listener, Progress, ignore
from ommatid.extract import batches, disk_space, networks, plan, rows, shard
from ommatid.extract.cache import Place
from ommatid.extract.plan import make_plan
from ommatid.extract.rows import order_rows, window
from ommatid.extract.shard import ShardJob
from ommatid.extract.stage import extract
from ommatid.extract.tokens import TokenPicker, draw_kept
from ommatid.images import dataset
from ommatid.images.decode import decode
from ommatid.store import Artefact, Draft, open_draft
from ommatid.vlm import Captured, Hookpoint
from support.study import make_test_params
from support.tiles import GRID, TileModel, make_images_artefact

N_IMAGES = 600
N_CHECKED = 8
"""Pictures with which a model is checked before the images."""


def params(**changes: object) -> ExtractParams:
    values = make_test_params().model_dump(mode="json")["extract"]
    return ExtractParams.model_validate(
        values | {"hookpoints": ["tiles"], "tokens": "patch", "batch_size": 7, "dtype": "float32", **changes}
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TileModel:
    """A model that stands for all networks; a run has several shards of several chunks of several row groups."""
    model = TileModel()
    monkeypatch.setattr(networks, "load_model", lambda params, dtype, device: model)
    monkeypatch.setattr(networks, "load_judge", lambda params, dtype, device: model)
    monkeypatch.setattr(plan, "IMAGES_PER_SHARD", 300)
    monkeypatch.setattr(shard, "IMAGES_PER_CHUNK", 100)
    monkeypatch.setattr(rows, "BYTES_PER_ROW_GROUP", 2 * 300 * 16)
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.PARQUET, "row_group_size", 16)
        return make_images_artefact(tmp_path_factory.mktemp("images"), N_IMAGES)


def make(root: Path, images: Artefact, on_event: Listener = ignore, **changes: object) -> Artefact:
    """Run a whole extraction."""
    section, place = params(**changes), root / "activations"
    with open_draft(place, "extraction", section.identity(), {"images": images}) as draft:
        extract(section, {"images": images}, draft, on_event)
        return draft.publish(place)


def make_tiles(root: Path, images: Artefact, **changes: Any) -> Artefact:
    return make(root, images, **changes).child("tiles", "activations")


def expected(model: TileModel, images: Artefact) -> dict[tuple[int, int, int], torch.Tensor]:
    """Return the activation of each (image, row, col), computed by hand."""
    found = zip(*(images.read("images")[name].to_pylist() for name in ("image", "encoded")), strict=True)
    return {
        (image, r, c): (model.colours(torch.from_numpy(np.array(decode(encoded)))[None])[0, r, c] @ model.spread).half()
        for image, encoded in found
        for r in range(GRID[0])
        for c in range(GRID[1])
    }


def splits(images: Artefact) -> dict[int, str]:
    return dict(zip(*(images.read("images")[name].to_pylist() for name in ("image", "split")), strict=True))


def test_every_patch_is_written_once_with_its_position_and_value(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    artefact = make_tiles(tmp_path, images)
    assert len(artefact.files("train")) == 2  # shards
    truth, split = expected(model, images), splits(images)
    seen = set()
    for table_name in ("train", "eval"):
        table = artefact.read(table_name)
        x = from_float16(table["x"])
        for i, row in enumerate(table.select(["image", "token", "kind", "row", "col"]).to_pylist()):
            key = (row["image"], row["row"], row["col"])
            torch.testing.assert_close(x[i], truth[key], rtol=2e-3, atol=2e-3)
            assert row["token"] == 1 + row["row"] * GRID[1] + row["col"]  # the class token is 0
            assert row["kind"] == "patch"
            assert split[row["image"]] == table_name
            seen.add(key)
    assert seen == set(truth)
    assert artefact.rows("train") + artefact.rows("eval") == len(truth)
    assert artefact.summary["n_train_tokens"] == artefact.rows("train")


def test_adjacent_rows_come_from_different_images(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    artefact = make_tiles(tmp_path, images)
    size = artefact.summary["window"]
    n_train = sum(split == "train" for split in splits(images).values())
    assert 0.7 * n_train / 2 < size < n_train / 2  # of two shards
    for part in artefact.iter_parts("train", ["image"]):
        image = part["image"].to_numpy()
        for start in range(0, len(image) - size):
            assert len(np.unique(image[start : start + size])) == size
    held = [part["image"].to_numpy() for part in artefact.iter_parts("eval")]
    assert all((np.diff(image) >= 0).all() for image in held)


def test_a_shard_is_a_sample_of_the_whole_set(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    for part in make_tiles(tmp_path, images).iter_parts("embeddings", ["image"]):
        image = part["image"].to_numpy()
        assert image.min() < N_IMAGES / 2 < image.max()
        assert (np.diff(image) > 0).all()


def test_each_image_has_one_embedding_of_unit_norm(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    table = make_tiles(tmp_path, images).read("embeddings")
    assert sorted(table["image"].to_pylist()) == list(range(N_IMAGES))
    for column in ("joint", "judge"):
        vectors = from_float32(table[column])
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(N_IMAGES))


def test_several_hookpoints_take_one_pass_and_have_an_artefact_each(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    alone = make_tiles(tmp_path / "alone", images, tokens="all")
    model.n_captured = 0
    both = make(tmp_path / "both", images, hookpoints=["tiles", "cls"], tokens="all")
    n_black = -304 % 7 + -296 % 7  # in the last batches of the two shards
    assert model.n_captured == N_IMAGES + n_black + N_CHECKED + 1  # the probe
    tiles, cls = (both.child(name, "activations") for name in ("tiles", "cls"))
    assert [(f.name, f.sha256) for f in tiles.manifest.files] == [(f.name, f.sha256) for f in alone.manifest.files]
    assert cls.summary["tokens_per_image"] == 1
    assert cls.rows("train") + cls.rows("eval") == N_IMAGES
    assert cls.files("embeddings")[0].samefile(tiles.files("embeddings")[0])  # no second copy
    both.verify()


def test_a_planted_bright_tile_is_the_brightest_patch(model: TileModel) -> None:
    picker = TokenPicker("tiles", model.hookpoints["tiles"], "patch")
    for index, place in enumerate(picker.places):
        pixels = np.full((32, 48, 3), 128, np.uint8)
        pixels[place.row * 16 : place.row * 16 + 16, place.col * 16 : place.col * 16 + 16] = 255
        shown = model.preprocess(Image.fromarray(pixels))
        tokens = picker.pick(model.capture(torch.from_numpy(shown)[None], ("tiles",)).tokens["tiles"])
        assert int(tokens[0].norm(dim=1).argmax()) == index


def test_each_token_policy_keeps_its_tokens() -> None:
    x = torch.arange(2 * 8 * 4.0).view(2, 8, 4)
    whole = Hookpoint(4, ("cls", "register"), GRID)

    def kinds(policy: str) -> list[tuple[int, str]]:
        return [(place.token, place.kind) for place in TokenPicker("h", whole, policy).places]

    patches = [(token, "patch") for token in range(2, 8)]
    assert kinds("pooled") == [(0, "pooled")]
    assert kinds("patch") == patches
    assert kinds("cls") == [(0, "cls")]
    assert kinds("register") == [(1, "register")]
    assert kinds("all") == [(0, "cls"), (1, "register"), *patches]
    torch.testing.assert_close(TokenPicker("h", whole, "pooled").pick(x)[:, 0], x[:, 2:].mean(1))
    torch.testing.assert_close(TokenPicker("h", whole, "register").pick(x), x[:, 1:2])
    torch.testing.assert_close(TokenPicker("h", whole, "patch").pick(x), x[:, 2:])
    for policy, kept in (("patch", slice(2, 8)), ("cls", slice(0, 1)), ("all", slice(0, 8))):
        picker, expected = TokenPicker("h", whole, policy), x.clone()
        expected[:, kept] = -1
        torch.testing.assert_close(picker.put(x, torch.full_like(picker.pick(x), -1, dtype=torch.float64)), expected)
    assert x.min() == 0  # what was given stayed what it was
    with pytest.raises(ModelError, match="pooled is the mean of the patches at h"):
        TokenPicker("h", whole, "pooled").put(x, x[:, :1])
    assert TokenPicker("h", whole, "register").grid is None
    assert TokenPicker("h", whole, "all").grid == GRID
    with pytest.raises(ModelError, match="hookpoint h has no 'cls'; it has patch, pooled, all"):
        TokenPicker("h", Hookpoint(4, (), GRID), "cls")
    with pytest.raises(ModelError, match="hookpoint h has no 'patch'; it has cls, all"):
        TokenPicker("h", Hookpoint(4, ("cls",), None), "patch")


def test_a_sample_keeps_the_given_number_of_tokens_per_training_image(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    artefact = make_tiles(tmp_path, images, sample=2)
    train = artefact.read("train", ["image", "token"]).to_pandas()
    assert set(train.groupby("image").size()) == {2}
    assert not train.duplicated().any()
    counts = train["token"].value_counts()
    assert len(counts) == 6
    assert counts.min() > 0.7 * counts.mean()
    assert artefact.rows("eval") == 6 * sum(split == "eval" for split in splits(images).values())


def test_long_tokens_are_left_out_of_training() -> None:
    x = torch.ones(3, 5, 4)
    x[1, 2] = 30.0
    kept = draw_kept(x, None, 10.0, np.random.default_rng(0))
    assert kept.sum() == 14
    assert not kept[1, 2]
    x[0] = torch.nan
    x[2, 0] = torch.inf
    assert draw_kept(x, None, 10.0, np.random.default_rng(0)).sum() == 14  # the gate must see what is not a number
    x[0], x[2, 0] = 1.0, 1.0
    sampled = draw_kept(x, 5, 10.0, np.random.default_rng(0))
    assert sampled.sum(axis=1).tolist() == [5, 4, 5]


def test_the_plan_assigns_every_block_once_and_evenly() -> None:
    blocks = np.array([(file, group, 128) for file in range(50) for group in range(20)], dtype=np.int32)
    table = make_plan(blocks)
    dealt = np.stack([table[name].to_numpy() for name in ("file", "row_group", "n_images")], axis=1)
    assert sorted(map(tuple, dealt)) == sorted(map(tuple, blocks))
    shard = table["shard"].to_numpy()
    sizes = np.bincount(shard, dealt[:, 2])
    assert len(sizes) == -(-50 * 20 * 128 // plan.IMAGES_PER_SHARD)
    assert sizes.max() - sizes.min() <= 256
    assert (np.diff(shard) >= 0).all()
    assert all((np.diff(dealt[shard == i, 0] * 20 + dealt[shard == i, 1]) > 0).all() for i in range(len(sizes)))
    assert len(make_plan(blocks[:0])) == 0
    assert make_plan(np.array([(0, 0, 50_000), (0, 1, 3)], np.int32))["shard"].to_pylist() == [0, 1]


def test_rows_are_ordered_in_rounds_over_the_images() -> None:
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(400), 5)
    order = order_rows(image, rng)
    size = window(np.bincount(order.stratum), 5)
    assert size == 300
    sequence = image[order.argsort()]
    assert all(len(np.unique(sequence[i : i + size])) == size for i in range(len(sequence) - size))
    assert sorted(zip(image, order.round, strict=True)) == [(i, r) for i in range(400) for r in range(5)]
    assert len(order_rows(np.empty(0, np.int64), rng).argsort()) == 0


def test_an_image_with_many_rows_is_spread_over_the_whole_order() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([100] + [50] * 200 + [10] * 400)
    image = rng.permutation(np.arange(len(counts)).repeat(counts))
    order = order_rows(image, rng)
    size = window(np.bincount(order.stratum), 100)
    assert 95 < size < 110
    sequence = image[order.argsort()]
    n_different = [len(np.unique(sequence[i : i + size])) for i in range(len(sequence) - size)]
    assert min(n_different) > 0.85 * size
    assert np.mean(n_different) > 0.99 * size
    tenths = np.array([np.bincount(part, minlength=len(counts)) for part in np.array_split(sequence, 10)])
    assert np.abs(tenths - counts / 10).max() <= 2
    stretched = order_rows(image, rng, 1000)
    assert 0 <= stretched.round.min() < stretched.round.max() < 1000
    assert len(set(zip(image, stretched.round, strict=True))) == len(image)


def test_unknown_hookpoint_is_refused_before_any_image(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    with pytest.raises(ModelError, match="tiles"):
        make(tmp_path, images, hookpoints=["tile"])
    assert model.n_captured == 0


def test_a_model_without_text_needs_a_namer(tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = TileModel()
    silent.d_embed = None  # pyright: ignore[reportAttributeAccessIssue]
    lite = {"kind": "lite", "variant": "lite2"}
    monkeypatch.setattr(networks, "load_model", lambda params, dtype, device: model if params.variant == "lite2" else silent)
    with pytest.raises(ModelError, match=r"extract.model: tiles has no text tower.*set extract.namer"):
        make(tmp_path, images)
    table = make_tiles(tmp_path, images, namer=lite, judge={"kind": "transformers", "path": "x"}).read("embeddings")
    assert len(table) == N_IMAGES


def test_the_difference_from_float32_is_reported(
    tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rough(TileModel):
        def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
            exact = super().capture(pixels, hookpoints)
            return Captured({name: x * 1.25 for name, x in exact.tokens.items()}, exact.embedding)

    monkeypatch.setattr(networks, "load_model", lambda params, dtype, device: Rough() if dtype == "bfloat16" else model)
    assert make_tiles(tmp_path / "rough", images, dtype="bfloat16").summary["rounding"] == pytest.approx(0.25)
    assert make_tiles(tmp_path / "exact", images).summary["rounding"] == 0


class Killed(BaseException):
    pass


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    whole = make(tmp_path / "whole", images)
    model.n_captured = 0

    def kill(event: object) -> None:
        if isinstance(event, Progress) and event.done >= 450:
            raise Killed

    with pytest.raises(Killed):
        make(tmp_path / "killed", images, kill)
    assert not (tmp_path / "killed/activations").exists()
    again = make(tmp_path / "killed", images)
    assert N_IMAGES <= model.n_captured <= N_IMAGES + 2 * 128  # at most the chunk that was computed, and the one before on its way out
    assert again.digest == whole.digest
    again.verify()


def test_a_draft_begun_with_other_weights_is_not_continued(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    def kill(event: object) -> None:
        if isinstance(event, Progress) and event.done >= 450:
            raise Killed

    old = model.spread.clone()
    model.spread *= -1
    with pytest.raises(Killed):
        make(tmp_path / "killed", images, kill)
    model.spread.copy_(old)
    assert make(tmp_path / "killed", images).digest == make(tmp_path / "whole", images).digest


def test_a_shard_whose_file_was_lost_is_made_again(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    section, place = params(), tmp_path / "activations"

    def make_first(draft: Draft) -> None:
        with pytest.raises(Killed):
            extract(section, {"images": images}, draft, kill)

    def kill(event: object) -> None:
        if isinstance(event, Progress) and event.done == N_IMAGES:
            raise Killed

    with open_draft(place, "extraction", section.identity(), {"images": images}) as draft:
        make_first(draft)
        (draft.scratch.parent / "tiles" / "eval-00000.parquet").unlink()
        extract(section, {"images": images}, draft)
        draft.publish(place).verify()


def test_images_that_changed_under_a_worker_are_refused(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    job = ShardJob(params().model_dump_json(), images.url, "other", str(tmp_path), tuple(networks.Networks(params()).probe()))
    with pytest.raises(ArtefactError, match="changed since this extraction was planned"):
        job(0)
    stranger = replace(job, digest=images.digest, probe=(1.0,) * len(job.probe))
    with pytest.raises(ModelError, match="its weights here differ"):
        stranger(0)


@pytest.mark.parametrize("name", ["embeddings", "scratch"])
def test_two_names_of_hookpoints_are_reserved(
    name: str, tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(TileModel):
        hookpoints = {name: Hookpoint(8, ("cls",), GRID)}  # noqa: RUF012

        def capture(self, pixels: torch.Tensor, hookpoints: Sequence[str]) -> Captured:
            found = super().capture(pixels, ["tiles"] * len(hookpoints))
            return Captured(dict.fromkeys(hookpoints, found.tokens.get("tiles", torch.empty(0))), found.embedding)

    monkeypatch.setattr(networks, "load_model", lambda params, dtype, device: Named())
    if name == "scratch":
        with pytest.raises(ModelError, match="'scratch' is the name of a folder"):
            make(tmp_path, images, hookpoints=[name])
    else:
        assert make(tmp_path, images, hookpoints=[name]).child(name, "activations").rows("embeddings") == N_IMAGES


def test_a_job_is_pickled_without_its_listener() -> None:
    place = Place("/cache", 1e9, 1.5)
    job = ShardJob("{}", "images", "digest", "draft", (0.5,), place, on_chunk=lambda shard, done: None)
    assert pickle.loads(pickle.dumps(job)) == ShardJob("{}", "images", "digest", "draft", (0.5,), place)
    assert pickle.loads(pickle.dumps(job)).on_chunk is not job.on_chunk


def test_a_small_disk_is_an_error_with_the_space_needed_and_a_way_to_need_less(
    tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[[Any], Any] = shutil.disk_usage
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage(path)._replace(free=100_000))
    ways = r"images.limit=[1-9]\d*, or extract.sample=[1-9].*extract.tokens=pooled"
    with pytest.raises(ArtefactError, match=rf"needs \d+ kB .* 100 kB is free; make room, or set {ways}"):
        make(tmp_path, images)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    with pytest.raises(ArtefactError, match=r"0 kB is free; make room, or set extract.tokens=pooled$"):
        make(tmp_path, images)
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/activations").mkdir(parents=True)
    (tmp_path / "cache/activations/a.rows").write_bytes(bytes(3_000))
    with pytest.raises(ArtefactError, match=r"; make room \(`ommatid gc --all activations` frees 3 kB\), or set extract.tokens=pooled$"):
        make(tmp_path, images)
    assert model.n_captured == 0
    monkeypatch.setattr(disk_space.shutil, "disk_usage", usage)
    make(tmp_path, images)


def test_the_size_is_known_in_advance(tmp_path: Path, images: Artefact, model: TileModel) -> None:
    artefact = make(tmp_path, images, sample=3)
    size = disk_space.size_of(params(sample=3), images.summary, networks.Networks(params(sample=3)))
    found = sum(path.stat().st_size for path in artefact.path.rglob("*.parquet"))
    assert size.final == pytest.approx(found, rel=0.35)  # tables this small are half headers


def test_an_image_that_was_lost_is_named(tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(numbers: np.ndarray, is_train: np.ndarray, files: list[bytes], preprocesses: Any) -> Any:
        return encoded(
            numbers, is_train, [file[:50] if number == 5 else file for number, file in zip(numbers, files, strict=True)], preprocesses
        )

    encoded = batches.Encoded
    monkeypatch.setattr(batches, "Encoded", cut)
    with pytest.raises(ArtefactError, match="image 5 cannot be decoded any more"):
        make(tmp_path, images)


def test_a_full_disk_in_the_middle_loses_nothing(
    tmp_path: Path, images: Artefact, model: TileModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole", images)
    write = pa.ipc.RecordBatchFileWriter.write_batch
    calls: list[int] = []

    def fail(self: Any, batch: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, batch, **options)

    monkeypatch.setattr(pa.ipc.RecordBatchFileWriter, "write_batch", fail)
    with pytest.raises(ArtefactError, match="disk is full"):
        make(tmp_path / "full", images)
    monkeypatch.setattr(pa.ipc.RecordBatchFileWriter, "write_batch", write)
    assert make(tmp_path / "full", images).digest == whole.digest
