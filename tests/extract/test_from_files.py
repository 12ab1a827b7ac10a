"""Proves that imported activations are all there once, bit for bit, in every format, and that problems are reported before any work."""

import os
import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from ommatid.activations.columns import from_float16
from ommatid.cli.app import app
from ommatid.config import ExtractFiles, Params, dotted, load_params, make_params
from ommatid.errors import ArtefactError, ConfigError, GateError, SourceError
from ommatid.events import Progress, Warned, ignore
from ommatid.extract.from_files import plan
from ommatid.extract.from_files import stage as module
from ommatid.extract.from_files.formats import open_files
from ommatid.extract.from_files.stage import import_files, is_eval
from ommatid.pipeline import open_stage
from ommatid.pipeline.run import run_stage
from ommatid.store import Artefact, open_draft
from support.study import CHECKOUT, make_test_params

D_MODEL = 6


def planted(*shape: int, seed: int = 0) -> Tensor:
    """Make activations that float16 can hold, with all rows different."""
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed)).half()


def write_npy(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    np.save(path.with_suffix(".npy"), x.numpy())
    if image is not None:
        np.save(path.with_suffix(".image.npy"), image.numpy())
    return path.with_suffix(".npy")


def _named(x: Tensor, image: Tensor | None) -> dict[str, Tensor]:
    return {"acts": x} if image is None else {"acts": x, "image": image}


def write_safetensors(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    save_file(_named(x, image), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_pt(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    torch.save(x if image is None else _named(x, image), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def write_old_pt(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    torch.save(_named(x, image), path.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pth")


def _write_parquet(path: Path, column: pa.Array, image: Tensor | None, **options: Any) -> Path:
    columns = {"acts": column} if image is None else {"image": pa.array(image.numpy()), "acts": column}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"), **{"row_group_size": 7, **options})
    return path.with_suffix(".parquet")


def write_bytes(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    return _write_parquet(path, pa.array([row.tobytes() for row in x.numpy()], pa.binary(2 * D_MODEL)), image)


def write_loose_bytes(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    return _write_parquet(path, pa.array([row.tobytes() for row in x.numpy()], pa.binary()), image)


def write_lists(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    return _write_parquet(path, pa.array(x.float().tolist(), pa.list_(pa.float32())), image)


def write_fixed_lists(path: Path, x: Tensor, image: Tensor | None = None) -> Path:
    return _write_parquet(path, pa.FixedSizeListArray.from_arrays(pa.array(x.double().numpy().ravel()), D_MODEL), image)


Write = Callable[..., Path]
ARRAYS: list[Write] = [write_npy, write_safetensors, write_pt, write_old_pt]
PARQUET: list[Write] = [write_bytes, write_loose_bytes, write_lists, write_fixed_lists]


def section(path: Path, **changes: Any) -> ExtractFiles:
    return ExtractFiles(source="files", path=str(path), model="theirs", **{"name": "imported", "eval_share": 0.3, **changes})


def make(place: Path, path: Path, on_event: Any = ignore, **changes: Any) -> Artefact:
    """Import and publish activations, and return the artefact."""
    params = section(path, **changes)
    with open_draft(place, "extraction", params.model_dump(mode="json"), {}) as draft:
        import_files(params, {}, draft, on_event)
        return draft.publish(place).child(params.name, "activations")


def rows_of(artefact: Artefact, table: str) -> dict[tuple[int, int], bytes]:
    """Return the bytes of x for each (image, token), which must occur once."""
    read = artefact.read(table)
    keys = list(zip(read["image"].to_pylist(), read["token"].to_pylist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, read["x"].to_pylist(), strict=True))


def all_rows(artefact: Artefact) -> dict[tuple[int, int], bytes]:
    train, held = rows_of(artefact, "train"), rows_of(artefact, "eval")
    assert not train.keys() & held.keys()
    return train | held


def expected(x: Tensor, images: list[int] | None = None) -> dict[tuple[int, int], bytes]:
    """Compute the rows by hand from activations, (entries, tokens, d_model), and the image of each entry."""
    found: dict[tuple[int, int], bytes] = {}
    counts: dict[int, int] = {}
    for entry, tokens in enumerate(x):
        image = entry if images is None else images[entry]
        for token in tokens:
            found[image, counts.get(image, 0)] = token.numpy().tobytes()
            counts[image] = counts.get(image, 0) + 1
    return found


def small(monkeypatch: pytest.MonkeyPatch, rows_per_block: int, images_per_shard: int, rows_per_shard: int = 1) -> None:
    """Shrink the sizes, so that a few rows give many blocks, shards and row groups."""
    monkeypatch.setattr(plan, "BYTES_PER_BLOCK", rows_per_block * 2 * D_MODEL)
    monkeypatch.setattr(plan, "IMAGES_PER_SHARD", images_per_shard)
    monkeypatch.setattr(plan, "BYTES_PER_SHARD", rows_per_shard * 2 * D_MODEL)
    monkeypatch.setattr(module, "BYTES_PER_ROW_GROUP", 20 * 2 * D_MODEL)


@pytest.mark.parametrize("write", ARRAYS + PARQUET)
@pytest.mark.parametrize("has_images", [False, True])
def test_every_token_is_there_once_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, has_images: bool) -> None:
    small(monkeypatch, rows_per_block=5, images_per_shard=8)
    (tmp_path / "in").mkdir()
    x = planted(83)
    images = sorted(torch.randint(100, 130, (83,), generator=torch.Generator().manual_seed(1)).tolist()) if has_images else None
    for part, (start, end) in enumerate([(0, 40), (40, 41), (41, 83)], start=9):  # 9, 10, 11: names not in order of their letters
        write(tmp_path / "in" / f"part{part}", x[start:end].clone(), images and torch.tensor(images[start:end]))
    artefact = make(tmp_path / "out", tmp_path / "in")
    # an image that goes on in the next file counts its tokens anew there
    if images is None:
        assert all_rows(artefact) == expected(x[:, None])
    else:
        got = [row for table in ("train", "eval") for row in artefact.read(table).select(["image", "x"]).to_pylist()]
        want = [{"image": i, "x": row.numpy().tobytes()} for i, row in zip(images, x, strict=True)]
        assert sorted(map(str, got)) == sorted(map(str, want))
    summary = artefact.summary
    assert (summary["n_train_tokens"], summary["n_eval_tokens"]) == (artefact.rows("train"), artefact.rows("eval"))
    assert summary["n_images"] == (len(set(images)) if images else 83)
    assert (summary["d_model"], summary["tokens_per_image"], summary["model"]) == (D_MODEL, None if images else 1, "theirs")
    assert len(artefact.files("train")) > 2


@pytest.mark.parametrize("write", ARRAYS)
@pytest.mark.parametrize("images", [None, [7, 7, 2, 3, 9, 9, 9, 2**31 - 1, 0, 0, 0, 0, 0, 5]])
def test_images_may_have_several_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, images: list[int] | None) -> None:
    small(monkeypatch, rows_per_block=8, images_per_shard=3)
    x = planted(14, 4)
    path = write(tmp_path / "acts", x, images and torch.tensor(images))
    artefact = make(tmp_path / "out", path)
    assert all_rows(artefact) == expected(x, images)  # runs of one image are numbered on
    assert artefact.summary["tokens_per_image"] == 4
    table = artefact.read("train")
    assert set(table["kind"].to_pylist()) == {"imported"}
    assert set(table["row"].to_pylist()) | set(table["col"].to_pylist()) == {-1}
    assert artefact.tables == ["eval", "train"]


def test_the_split_depends_on_the_image_alone(tmp_path: Path) -> None:
    images = torch.arange(1000).repeat(3)
    artefact = make(tmp_path / "out", write_safetensors(tmp_path / "x", planted(3000), images[torch.randperm(3000)]))
    train, held = (set(artefact.read(table)["image"].to_pylist()) for table in ("train", "eval"))
    assert not train & held
    assert train | held == set(range(1000))
    assert held == set(np.arange(1000)[is_eval(np.arange(1000), 0.3)].tolist())
    assert 0.25 < len(held) / 1000 < 0.35
    assert abs(float(is_eval(np.arange(10**6, 2 * 10**6), 0.1).mean()) - 0.1) < 0.002


def test_the_same_data_gives_the_same_tables_whatever_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows_per_block=5, images_per_shard=8)
    x, images = planted(60), torch.arange(60) // 3
    digests = set()
    for i, write in enumerate(ARRAYS + PARQUET):
        artefact = make(tmp_path / f"out{i}", write(tmp_path / "acts", x, images))
        digests.add(tuple((file.name, file.sha256) for file in artefact.manifest.files))
    assert len(digests) == 1
    assert len(digests.pop()) == 4  # two shards


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("write", [write_safetensors, write_pt])
def test_every_float_is_rounded_to_the_nearest_float16(tmp_path: Path, dtype: torch.dtype, write: Write) -> None:
    x = (planted(50).double() * 1.0001 * torch.logspace(-8, 4, 50, dtype=torch.float64)[:, None]).to(dtype)
    got = all_rows(make(tmp_path / "out", write(tmp_path / "x", x)))
    assert got == expected(x.half()[:, None])


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f2"])
def test_numpy_arrays_may_have_any_byte_order_and_layout(tmp_path: Path, dtype: str) -> None:
    x = np.asfortranarray(planted(20).numpy().astype(dtype))
    np.save(tmp_path / "x.npy", x)
    assert all_rows(make(tmp_path / "out", tmp_path / "x.npy")) == expected(planted(20)[:, None])


def test_binary_columns_are_read_as_their_metadata_says(tmp_path: Path) -> None:
    x = planted(20)
    column = pa.array([row.tobytes() for row in x.float().numpy()], pa.binary(4 * D_MODEL))
    pq.write_table(pa.table({"x": column}).replace_schema_metadata({"dtype": "float32"}), tmp_path / "x.parquet")
    assert all_rows(make(tmp_path / "out", tmp_path / "x.parquet")) == expected(x[:, None])


def test_our_own_tables_can_be_imported(tmp_path: Path) -> None:
    x = planted(40, 3)
    first = make(tmp_path / "first", write_npy(tmp_path / "x", x))
    again = make(tmp_path / "again", tmp_path / "first" / "imported", key="x")
    for table in ("train", "eval"):
        theirs, ours = (sorted(map(str, a.read(table).select(["image", "x"]).to_pylist())) for a in (first, again))
        assert theirs == ours


def test_tensors_with_gradients_and_other_objects_beside_them_are_read(tmp_path: Path) -> None:
    x = planted(20)
    torch.save({"acts": torch.nn.Parameter(x.float()), "layer": 11, "names": ["a"], "logits": torch.zeros(3)}, tmp_path / "x.pt")
    assert all_rows(make(tmp_path / "out", tmp_path / "x.pt", key="acts")) == expected(x[:, None])


def test_adjacent_rows_come_from_different_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows_per_block=40, images_per_shard=100, rows_per_shard=1)
    x = torch.arange(400)[:, None, None].expand(400, 10, D_MODEL).half()  # image i is filled with i, in order
    artefact = make(tmp_path / "out", write_npy(tmp_path / "x", x))
    window = artefact.summary["window"]
    assert window > 40
    for part in artefact.iter_parts("train"):
        image = part["image"].to_numpy()
        assert all(len(set(image[i : i + window])) == window for i in range(len(image) - window))
        assert image.max() - image.min() > 200  # every shard is drawn from all of the file
        assert (from_float16(part["x"])[:, 0].numpy() == image).all()


def test_images_in_no_order_are_shuffled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows_per_block=50, images_per_shard=100)
    images = torch.randperm(2000, generator=torch.Generator().manual_seed(0)) // 10
    x = planted(2000)
    artefact = make(tmp_path / "out", write_pt(tmp_path / "x", x, images))
    got = sorted(zip(artefact.read("train")["image"].to_pylist(), artefact.read("train")["x"].to_pylist(), strict=True))
    held = is_eval(images.numpy(), 0.3)
    assert got == sorted((int(i), row.numpy().tobytes()) for i, row, h in zip(images, x, held, strict=True) if not h)


def refuse(tmp_path: Path, path: Path, message: str, **changes: Any) -> None:
    with pytest.raises(SourceError, match=message):
        make(tmp_path / "out", path, lambda event: pytest.fail("it began to work"), **changes)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    refuse(
        tmp_path,
        tmp_path / "none",
        r"none: no such file or folder; bring it back with `dvc pull` .*, or set extract.path to a folder of .npy, .safetensors, .pt",
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("hello")
    refuse(tmp_path, tmp_path / "in", r"in: there are no .npy, .safetensors, .pt, .pth, .parquet files in this folder")
    refuse(tmp_path, tmp_path / "in" / "readme.txt", r"readme.txt: extract.path must end in .npy, ")


def test_files_that_do_not_match_are_refused(tmp_path: Path) -> None:
    write_npy(tmp_path / "a", planted(4))
    write_pt(tmp_path / "b", planted(4))
    refuse(tmp_path, tmp_path, "holds files of several formats, such as a.npy and b.pt")
    (tmp_path / "a.npy").unlink()
    write_pt(tmp_path / "c", planted(4)[:, :4])
    refuse(tmp_path, tmp_path, r"b.pt and .*c.pt differ in shape: \(4, 6\) and \(4, 4\)")
    write_pt(tmp_path / "c", planted(4, 2))
    refuse(tmp_path, tmp_path, r"differ in shape: \(4, 6\) and \(4, 2, 6\)")
    write_pt(tmp_path / "c", planted(4), torch.arange(4))
    refuse(tmp_path, tmp_path, r"c.pt has 'image' ids and .*b.pt has none")


@pytest.mark.parametrize("shape", [(6,), (2, 2, 2, 6)])
@pytest.mark.parametrize("write", ARRAYS)
def test_arrays_of_other_shapes_are_refused(tmp_path: Path, write: Write, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "x", torch.zeros(shape))
    refuse(tmp_path, path, rf"x\.\w+: has shape \({', '.join(map(str, shape))}\); activations must be \(tokens, d_model\) or")


@pytest.mark.parametrize("write", ARRAYS + PARQUET)
def test_empty_files_are_refused(tmp_path: Path, write: Write) -> None:
    refuse(tmp_path, write(tmp_path / "x", planted(0)), r"x\.\w+: is empty, its shape is \(0, ")


@pytest.mark.parametrize("write", ARRAYS)
def test_integers_are_refused(tmp_path: Path, write: Write) -> None:
    refuse(
        tmp_path, write(tmp_path / "x", torch.ones(4, 6, dtype=torch.int64)), "activations must be float16, bfloat16, float32 or float64"
    )


def test_an_unknown_or_missing_key_is_named(tmp_path: Path) -> None:
    x = planted(4).float()
    save_file({"resid": x, "mlp": x + 1}, tmp_path / "x.safetensors")
    listed = r"the file has mlp \(F32 \(4, 6\)\), resid \(F32 \(4, 6\)\)"
    refuse(tmp_path, tmp_path / "x.safetensors", rf"extract.key is 'acts', and there is no such tensor; {listed}", key="acts")
    refuse(tmp_path, tmp_path / "x.safetensors", rf"which tensor holds the activations\? Set extract.key; {listed}")
    torch.save({"resid": x, "mlp": x}, tmp_path / "x.pt")
    refuse(tmp_path, tmp_path / "x.pt", r"there is no such tensor; the file has resid \(float32 \(4, 6\)\), mlp", key="acts")
    torch.save({"layer": 11}, tmp_path / "x.pt")
    refuse(tmp_path, tmp_path / "x.pt", "has no tensor that can hold activations, which are floats")
    pq.write_table(pa.table({"image": [1], "acts": [[1.0]], "text": ["a"]}), tmp_path / "x.parquet")
    refuse(tmp_path, tmp_path / "x.parquet", r"no such column; the file has image \(int64\), acts \(list<.*>\), text", key="x")
    refuse(tmp_path, tmp_path / "x.parquet", "column text holds string; activations must be", key="text")
    for path in (write_npy(tmp_path / "y", x), write_pt(tmp_path / "y", x)):
        refuse(tmp_path, path, "extract.key is 'acts', and the file holds one array without a name", key="acts")


@pytest.mark.parametrize("images", [sorted([*range(20)] * 2), tuple(sorted([*range(20)] * 2))], ids=["list", "tuple"])
def test_images_in_a_list_are_images(tmp_path: Path, images: Any) -> None:
    x = planted(40)
    torch.save({"x": x, "image": images}, tmp_path / "x.pt")
    listed = make(tmp_path / "out", tmp_path / "x.pt")
    assert listed.summary["n_images"] == 20
    assert all_rows(listed) == all_rows(make(tmp_path / "again", write_pt(tmp_path / "y", x, torch.tensor(images)), key="acts"))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([0, 1], r"'image' is torch.int64 of shape \(2\); it must be whole numbers, one for each of the 4 entries"),
        ([0.0, 1.0, 2.0, 3.0], "'image' is a list; it must be a tensor or a list of whole numbers"),
        ([True] * 4, "'image' is a list"),
        (["a", "b", "c", "d"], "'image' is a list"),
        ([[0, 1], [2, 3]], "'image' is a list"),
        ([0, 1, 2, 2**70], "'image' is a list"),
        ({0: 1}, "'image' is a dict"),
        (None, "'image' is a NoneType"),
        (7, "'image' is a int"),
        (torch.arange(4.0), "'image' is torch.float32"),
        ([0, 1, 2, -1], "the image of row 3 is -1; it must be from 0"),
        (np.arange(4), "needs pickle, which can run any code"),
    ],
    ids=str,
)
def test_objects_that_are_not_image_ids_are_refused(tmp_path: Path, images: Any, said: str) -> None:
    torch.save({"x": planted(4), "image": images}, tmp_path / "x.pt")
    refuse(tmp_path, tmp_path / "x.pt", said)


@pytest.mark.parametrize("name", ["Image", "images", "image_id", "image_ids", "img_idx", "sample_index", "ids", "index"])
def test_image_ids_under_another_name_are_not_ignored(tmp_path: Path, name: str) -> None:
    said = f"'{name}' is not read; call it 'image' if it says which image an entry comes from, or leave it out"
    x, images = planted(4).float(), torch.tensor([0, 0, 1, 1])
    torch.save({"x": x, name: images.tolist()}, tmp_path / "x.pt")
    save_file({"x": x, name: images}, tmp_path / "x.safetensors")
    pq.write_table(pa.table({"x": x.tolist(), name: images.tolist()}), tmp_path / "x.parquet")
    for ending in ("pt", "safetensors", "parquet"):
        refuse(tmp_path, tmp_path / f"x.{ending}", said, key="x")


def test_unread_files_are_reported_and_hidden_ones_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a", ".ipynb_checkpoints/a-checkpoint", ".b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lists(folder / name, planted(4), torch.arange(4))
    pq.write_table(
        pa.table({"acts": planted(4, seed=1).tolist(), "image": range(4, 8), "token": range(4), "text": "abcd"}), folder / "B.PARQUET"
    )
    (tmp_path / "elsewhere").mkdir()
    write_lists(tmp_path / "elsewhere/c", planted(4, seed=2), torch.arange(8, 12))
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "notes.txt").write_text("hello")
    events: list[Any] = []
    made = make(tmp_path / "out", folder, events.append)
    assert made.summary["n_images"] == 12
    assert [event.what.removeprefix(f"{folder}: ") for event in events if isinstance(event, Warned)] == [
        "1 file is not read, because its name does not end in .npy or .safetensors or .pt or .pth or .parquet: notes.txt",
        "token, text in the files are not read",
    ]


def test_without_image_ids_each_row_counts_as_an_image(tmp_path: Path) -> None:
    for shape, n in (((40,), 1), ((10, 4), 0)):
        events: list[Any] = []
        make(tmp_path / f"out{n}", write_npy(tmp_path / f"x{n}", planted(*shape)), events.append)
        said = [event.what for event in events if isinstance(event, Warned)]
        assert len(said) == n and all("do not say which image a row comes from, so each of 40 rows counts" in what for what in said)


def test_image_ids_without_activations_are_refused(tmp_path: Path) -> None:
    write_npy(tmp_path / "a", planted(4), torch.arange(4))
    (tmp_path / "a.image.npy").rename(tmp_path / "b.image.npy")
    refuse(tmp_path, tmp_path, "b.image.npy: holds the images of the entries of b.npy, and there is no such file")


def test_a_url_of_activations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"s3://bucket/acts: extract.path must be on this machine"):
        open_files("s3://bucket/acts", None)


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(8)


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.npy", b"hunter2 hunter2", "not a complete npy file .it does not begin like one"),
        ("x.npy", _npy(b"hunter2 hunter2"), "not a complete npy file"),
        ("x.npy", _npy(b"{'descr': 'hunter2', 'fortran_order': False, 'shape': (3,)}"), "not a complete npy file"),
        ("x.safetensors", b"hunter2 hunter2", "not a complete safetensors file"),
        ("x.safetensors", _safetensors(b'{"x":{"dtype":"hunter2","shape":[1],"data_offsets":[0,4]}}'), "not a complete safetensors file"),
        ("x.safetensors", _safetensors(b'{"x":"hunter2"}'), "not a complete safetensors file"),
        ("x.pt", b"hunter2 hunter2", "not a complete file written by torch.save"),
        ("x.parquet", b"hunter2 hunter2", "cannot be read as Parquet"),
    ],
)
def test_messages_about_damaged_files_do_not_quote_them(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """The file may be a link to a private one."""
    (tmp_path / "secret").write_bytes(content)
    (tmp_path / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=said) as caught:
        open_files(str(tmp_path / name), None)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("ending", ["npy", "safetensors", "pt", "parquet"])
def test_a_broken_link_is_named(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"x.{ending}").symlink_to("nowhere")
    with pytest.raises(SourceError, match=rf"x\.{ending}: cannot be read .*No such file or directory"):
        open_files(str(tmp_path), None)


@pytest.mark.parametrize(("names", "twice"), [(["x", "x", "image"], "x"), (["x", "image", "image"], "image")])
def test_two_columns_with_the_same_name_are_refused(tmp_path: Path, names: list[str], twice: str) -> None:
    columns = [pa.array([[1.0]]) if name == "x" else pa.array([1]) for name in names]
    pq.write_table(pa.table(columns, names=names), tmp_path / "x.parquet")
    refuse(tmp_path, tmp_path / "x.parquet", f"has 2 columns named {twice}; give each another name")


class NotATensor:
    """An object that only pickle can load."""


def test_a_pt_file_that_needs_pickle_is_not_opened(tmp_path: Path) -> None:
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"acts": planted(4), "args": NotATensor()}, tmp_path / "x.pt", **options)
        refuse(
            tmp_path, tmp_path / "x.pt", r"x.pt: needs pickle, which can run any code, so it is not opened; save a tensor, torch.save\(x"
        )
    torch.save([planted(4)], tmp_path / "x.pt")
    refuse(tmp_path, tmp_path / "x.pt", "x.pt: holds a list; save a tensor")
    torch.save(planted(4).float().to_sparse(), tmp_path / "x.pt")
    refuse(tmp_path, tmp_path / "x.pt", r"holds a sparse tensor \(torch.sparse_coo\); save it dense")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}, {"b": 2}], dtype=object))
    refuse(tmp_path, tmp_path / "x.npy", "x.npy: an array of Python objects; write it with np.save")
    (tmp_path / "y.npy").write_bytes(pickle.dumps([1, 2]))
    refuse(tmp_path, tmp_path / "y.npy", "y.npy: not a complete npy file")


@pytest.mark.parametrize("write", ARRAYS + PARQUET)
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, write: Write, keep: float) -> None:
    path = write(tmp_path / "x", planted(500))
    os.truncate(path, int(keep * path.stat().st_size) if isinstance(keep, float) else keep)
    refuse(tmp_path, path, r"x\.\w+: (not a complete|cannot be read)")


def test_image_ids_of_the_wrong_shape_type_or_range_are_refused(tmp_path: Path) -> None:
    x = planted(4)
    for image in (torch.arange(5), torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)):
        for write in ARRAYS:
            refuse(tmp_path, write(tmp_path / "x", x, image), "it must be whole numbers, one for each of the 4 entries")
        for path in tmp_path.glob("x.*"):
            path.unlink()
    for value in (-1, 2**31):
        image = torch.tensor([0, 1, value, value])
        refuse(tmp_path, write_safetensors(tmp_path / "x", x, image), rf"the image of row 2 is {value}; it must be from 0 to 2147483647")
    pq.write_table(pa.table({"image": ["a"], "x": [[1.0]]}), tmp_path / "x.parquet")
    refuse(tmp_path, tmp_path / "x.parquet", "'image' is string")
    pq.write_table(pa.table({"image": pa.array([0, 2**64 - 1], pa.uint64()), "x": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    refuse(tmp_path, tmp_path / "x.parquet", f"the image of row 1 is {2**63 - 1}; it must be from 0 to")
    pq.write_table(pa.table({"image": [1, None], "x": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    refuse(tmp_path, tmp_path / "x.parquet", "row 1 of column image is null")


def test_columns_that_do_not_form_a_matrix_are_refused(tmp_path: Path) -> None:
    def parquet(column: pa.Array, metadata: dict[str, str] | None = None) -> Path:
        pq.write_table(pa.table({"x": column}).replace_schema_metadata(metadata), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    refuse(tmp_path, parquet(pa.array([b"abc"] * 3, pa.binary(3))), "column x is 3 bytes wide, not a multiple of the size of float16")
    refuse(
        tmp_path, parquet(pa.array([b"abcd"] * 3), {"dtype": "int8"}), "metadata says dtype=int8; it must be float16, float32 or float64"
    )
    refuse(tmp_path, parquet(pa.array([[1], [2]])), "has no column that can hold activations, which are floats")
    for column, message in [
        ([[1.0, 2.0], [1.0, 2.0], [1.0]], "row 2 of column x has 1 values, row 0 has 2"),
        ([[1.0, 2.0], None], "row 1 of column x is null"),
        ([[1.0, 2.0], [1.0, None]], "row 1 of column x is null"),
        ([b"abcd", b"abcd", b"ab"], "row 2 of column x has 1 values, row 0 has 2"),
    ]:
        with pytest.raises(SourceError, match=message):
            make(tmp_path / "out", parquet(pa.array(column)))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [write_npy, write_lists])
def test_values_outside_the_range_of_float16_are_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    small(monkeypatch, rows_per_block=5, images_per_shard=8)
    (tmp_path / "in").mkdir()
    whole = planted(30).float()
    x = whole.clone()
    x[17, 2], x[18, 0], x[19, 5], x[20, 1], x[29, 3] = torch.nan, torch.inf, -torch.inf, 65505, -1e9
    for part, values in enumerate([whole, x, whole, whole.where(torch.arange(30)[:, None] != 3, torch.nan)]):
        if write is write_lists:
            _write_parquet(tmp_path / "in" / f"{part}", pa.array(values.tolist(), pa.list_(pa.float32())), None)
        else:
            write(tmp_path / "in" / f"{part}", values)
    message = (
        r"activations that cannot be stored as float16: .*1\.\w+: 1 with NaN, 2 with infinity, 2 with more than 65504 \(first: row 17\); "
        r".*3\.\w+: 1 with NaN \(first: row 3\); correct or remove these rows"
    )
    for _ in range(2):  # also when it is tried again
        with pytest.raises(SourceError, match=message):
            make(tmp_path / "out", tmp_path / "in")
        assert not (tmp_path / "out").exists()


def test_a_bad_token_of_an_image_is_named(tmp_path: Path) -> None:
    x = planted(10, 4)
    x[3, 2, 1] = torch.inf
    with pytest.raises(SourceError, match=r"1 with infinity \(first: row 3 token 2\)"):
        make(tmp_path / "out", write_npy(tmp_path / "x", x))


def test_the_largest_float16_is_kept(tmp_path: Path) -> None:
    x = planted(10).float()
    x[3, 2] = -65504
    assert all_rows(make(tmp_path / "out", write_npy(tmp_path / "x", x))) == expected(x.half()[:, None])


class Killed(BaseException):
    """Stands for SIGKILL, after which nothing cleans up."""


@pytest.mark.parametrize(
    ("what", "at"), [("read blocks", 1), ("read blocks", 7), ("read blocks", 17), ("write shards", 1), ("write shards", 3)]
)
@pytest.mark.parametrize("write", [write_npy, write_old_pt, write_lists])
def test_a_killed_import_continues_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, what: str, at: int
) -> None:
    small(monkeypatch, rows_per_block=5, images_per_shard=3)
    (tmp_path / "in").mkdir()
    images = torch.arange(45) // 7  # images go on in the next block
    for part in range(2):
        write(tmp_path / "in" / f"{part}", planted(45, seed=part), images + 7 * part)
    whole = make(tmp_path / "whole", tmp_path / "in")

    def kill(event: Any) -> None:
        if isinstance(event, Progress) and (event.what, event.done) == (what, at):
            raise Killed

    with pytest.raises(Killed):
        make(tmp_path / "killed", tmp_path / "in", kill)
    assert not (tmp_path / "killed").exists()
    read: list[Any] = []
    again = make(tmp_path / "killed", tmp_path / "in", lambda event: read.append(event))
    n_read = sum(event.what == "read blocks" for event in read)
    assert n_read == (18 - at if what == "read blocks" else 0)
    assert again.manifest.files == whole.manifest.files


def test_other_files_start_an_import_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows_per_block=5, images_per_shard=5)
    path = write_npy(tmp_path / "x", planted(60))

    def kill(event: Any) -> None:
        if event.what == "write shards" and event.done == 2:
            raise Killed

    with pytest.raises(Killed):
        make(tmp_path / "out", path, kill)
    write_npy(tmp_path / "x", planted(20, seed=1))
    assert all_rows(make(tmp_path / "out", path)) == expected(planted(20, seed=1)[:, None])


def test_other_images_beside_the_same_file_start_an_import_anew(tmp_path: Path) -> None:
    x = planted(60)
    path = write_npy(tmp_path / "x", x, torch.arange(60))

    def kill(event: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        make(tmp_path / "out", path, kill)
    np.save(tmp_path / "x.image.npy", np.arange(100, 160))
    assert {image for image, _ in all_rows(make(tmp_path / "out", path))} == set(range(100, 160))


def test_an_image_with_very_many_rows_is_spread_over_the_whole_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, rows_per_block=500, images_per_shard=10_000)
    images = torch.arange(1000) // 4
    images = torch.cat([torch.full((200,), 999), images])  # the first block is mostly of one image
    artefact = make(tmp_path / "out", write_npy(tmp_path / "x", planted(1200), images), eval_share=1e-9)
    (part,) = (part["image"].to_numpy() for part in artefact.iter_parts("train"))
    ends = (part == 999).nonzero()[0]
    assert (len(ends), ends.min() < 12, ends.max() > 1188, np.diff(ends).max() < 24) == (200, True, True, True)
    assert 3 <= artefact.summary["window"] <= 6


def test_a_hookpoint_that_cannot_name_a_folder_is_refused(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "x", planted(4))
    with pytest.raises(ConfigError, match=r"extract.name: 'scratch' is a folder that Ommatid uses itself"):
        make(tmp_path / "out", path, name="scratch")
    values = load_params().model_dump(mode="json") | {"extract": section(path).model_dump(mode="json") | {"name": "../up"}}
    with pytest.raises(ConfigError, match=r"extract.name: got '../up'"):
        make_params(values, "test")


def test_a_disk_that_is_too_small_is_reported_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npy(tmp_path / "x", planted(4))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(ArtefactError, match=r"the import needs \d+ kB, but only 0 kB is free; make room"):
        make(tmp_path / "out", path, lambda event: pytest.fail("it began to work") if isinstance(event, Progress) else None)


def import_params(path: Path, **train: Any) -> Params:
    """Return the params of the checkout with an import as `extract`."""
    values = make_test_params(train={"d_sae": 16, "k": 2, "epochs": 30, "batch_size": 64, "lr": 0.01, **train}).model_dump(mode="json")
    return make_params(values | {"extract": section(path, name="theirs.blocks.3").model_dump(mode="json")}, "test")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def test_an_sae_can_be_trained_on_an_import_and_stages_that_need_images_say_so(checkout: Path) -> None:
    truth = torch.nn.functional.normalize(torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(0)), dim=1)
    active = torch.randint(8, (3000,), generator=torch.Generator().manual_seed(1))
    params = import_params(write_pt(checkout / "acts", truth[active] * 3, torch.arange(3000) // 3))
    extracted = run_stage("extract", params, ignore)
    assert extracted.children == ["theirs.blocks.3"]
    (sae,) = run_stage("train", params, ignore).each().values()
    assert sae.summary["fvu"] < 0.2
    assert (checkout / "data/quality/extract.html").exists()
    assert '"theirs"' in (sae.path / "cfg.json").read_text()
    for stage in ("evaluate", "label", "intervene", "catalog"):
        with pytest.raises(ArtefactError, match=rf"{stage} needs images .* imported .* extract.source: images"):
            run_stage(stage, params, ignore)
        assert not (checkout / f"data/{stage}").exists()


def test_the_gate_checks_an_import(checkout: Path) -> None:
    x = planted(200)
    x[7] = 0
    with pytest.raises(GateError, match=r"no activation is all zeros: .*image 7 token 0"):
        run_stage("extract", import_params(write_npy(checkout / "x", x)), ignore)
    assert not (checkout / "data/activations").exists()


def test_the_params_of_an_import_are_validated(tmp_path: Path) -> None:
    params = import_params(tmp_path)
    assert params.read_and_decoded == (("theirs.blocks.3", None),)
    assert dotted(params)["extract.source"] == "files"
    values = params.model_dump(mode="json")
    for key, value, message in [
        ("source", "film", "extract.source: .*'images'.*'files'"),
        ("kind", "npy", "extract.kind: unknown key"),
        ("eval_share", 2, "extract.eval_share: got 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_params(values | {"extract": values["extract"] | {key: value}}, "test")
    with pytest.raises(ConfigError, match=r"train.hookpoint: 'blocks.15' is not in extract.hookpoints: theirs.blocks.3"):
        make_params(values | {"train": values["train"] | {"hookpoint": "blocks.15"}}, "test")


PAGE = (CHECKOUT / "docs/users/activations.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("edited", [True, False])
def test_the_example_of_the_page_runs(checkout: Path, edited: bool) -> None:
    (code,), (section_,), (commands,) = blocks("python"), blocks("yaml"), blocks("sh")
    exec(code, {})
    values = make_test_params(train={"d_sae": 128, "epochs": 4}).model_dump(mode="json")
    values |= yaml.safe_load(section_) if edited else {}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    (override,) = re.findall(r"--set '(.*?)'", PAGE)
    extra = [] if edited else ["--set", override]
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "ommatid"
        result = CliRunner().invoke(app, [*arguments, *extra])
        assert result.exit_code == 0, result.output
    artefact = open_stage("extract", "vision.blocks.11")
    assert (artefact.summary["n_images"], artefact.summary["tokens_per_image"]) == (800, 16)
    assert artefact.rows("train") + artefact.rows("eval") == 800 * 16
    (sae,) = open_stage("train").each().values()
    assert sae.summary["fvu"] < 1


def test_the_changes_to_dvc_yaml_on_the_page_apply() -> None:
    stage = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["extract"]
    assert "data/images" in stage["deps"]
    assert "data/sources/extract.json" in stage["deps"]
    (params,) = re.findall(r"`params: (\[extract\])`", PAGE)
    assert all(key.startswith("extract.") for key in stage["params"]) and yaml.safe_load(params) == ["extract"]
