"""Properties that every family of image towers must have: hooks, splices, the residual stream, and positions, also in artefacts."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ommatid.activations.columns import from_float16
from ommatid.errors import ModelError
from ommatid.extract.stage import extract
from ommatid.images.stage import run as make_images
from ommatid.store import Artefact
from ommatid.vlm import VisionModel
from ommatid.vlm.network_checks import check_model
from ommatid.vlm.precision import normalise
from support.study import make_artefact, make_test_params

PARTS = (".attn", ".mlp", "")


def noise(vision: VisionModel, n: int = 5) -> Tensor:
    """Make preprocessed images of noise, uint8 (n, H, W, 3)."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(n)]
    return torch.from_numpy(np.stack([vision.preprocess(image) for image in images]))


def by_processor(processor: Any, pixels: Tensor) -> Tensor:
    """Preprocess pixels of the right size with the family's own processor, (n, 3, H, W)."""
    squares = [Image.fromarray(square.numpy()) for square in pixels]
    return processor(squares, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"].float()


def check_hooks(vision: VisionModel, modules: Mapping[str, nn.Module], run: Callable[[], Any], pixels: Tensor) -> None:
    """Check that every hookpoint of the blocks, captured in one pass, equals a hand-written hook on the reference."""
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: _first(output)}))
    with torch.no_grad():
        run()
    captured = vision.capture(pixels, tuple(modules)).tokens
    assert list(captured) == list(modules)
    for name in modules:
        assert captured[name].shape == (len(pixels), vision.hookpoints[name].n_tokens, vision.hookpoints[name].d_model)
        torch.testing.assert_close(captured[name], seen[name], atol=1e-5, rtol=1e-5)


def _first(output: Any) -> Tensor:
    """Return the tensor that a module outputs, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def check_splice(vision: VisionModel, modules: Mapping[str, nn.Module], run: Callable[[], Tensor], pixels: Tensor) -> None:
    """At every hookpoint: its own tokens change nothing, others what a hand-written hook on the reference says, each asked for once.

    Those of the stream are all that the pass goes on from: another image's tokens give the other image's embedding.
    """
    assert list(modules) == list(vision.hookpoints)
    plain, shapes = vision.capture(pixels, ()).embedding, []
    assert plain is not None and plain.std(0).min() > 1e-4  # else no image would differ from another

    def change(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return 0.5 * x.roll(1, dims=0) + 0.1

    def change_first(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    for name, module in modules.items():
        handle = module.register_forward_hook(change_first)
        with torch.no_grad():
            expected = run()
        handle.remove()
        shapes.clear()
        same, changed, swapped = vision.splice(pixels, name, [lambda x: x, change, lambda x: x.roll(1, dims=0)])
        point = vision.hookpoints[name]
        assert shapes == [(len(pixels), point.n_tokens, point.d_model)]
        assert {x.dtype for x in (same, changed, swapped)} == {torch.float32}
        torch.testing.assert_close(same, plain, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-5)
        assert (changed - plain).norm() > 1e-2 * plain.norm(), name
        is_beside_the_stream = name.endswith((".attn", ".mlp"))
        assert torch.allclose(swapped, plain.roll(1, dims=0), atol=1e-5, rtol=1e-5) != is_beside_the_stream, name
        assert not vision._modules[name]._forward_hooks  # pyright: ignore[reportAttributeAccessIssue]


def check_no_splice(vision: VisionModel, pixels: Tensor) -> None:
    """Check that a model without a text tower refuses splicing at every hookpoint."""
    assert vision.logit_scale is None
    with pytest.raises(ModelError, match=r"has no text tower"):
        vision.splice(pixels, next(iter(vision.hookpoints)), [lambda x: x])


def check_residual_stream(vision: VisionModel, hidden_states: tuple[Tensor, ...], pixels: Tensor) -> None:
    """Check that blocks output the hidden states of transformers, and that attention and MLP output what a block adds to the stream."""
    for i, (before, after) in enumerate(itertools.pairwise(hidden_states)):
        names = [f"vision.blocks.{i}{part}" for part in PARTS]
        attn, mlp, block = vision.capture(pixels, names).tokens.values()
        torch.testing.assert_close(block, after, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(before + attn + mlp, after, atol=1e-5, rtol=1e-5)


def check_planted_patch(vision: VisionModel, grid: tuple[int, int]) -> None:
    """Check that a bright patch at each position in turn changes the token at its row and column most, after the first block."""
    hookpoint = vision.hookpoints["vision.blocks.0"]
    assert hookpoint.grid == grid
    height, width = vision.preprocess.crop
    side = height // grid[0]
    places = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    dark = torch.zeros(len(places), height, width, 3, dtype=torch.uint8)
    bright = dark.clone()
    for i, (row, col) in enumerate(places):
        bright[i, side * row : side * (row + 1), side * col : side * (col + 1)] = 255
    before, after = (vision.capture(x, ["vision.blocks.0"]).tokens["vision.blocks.0"] for x in (dark, bright))
    change = (after - before).norm(dim=-1)
    brightest = change.argmax(1) - len(hookpoint.special)
    assert [divmod(int(i), grid[1]) for i in brightest] == places


def check_trust(vision: VisionModel, dtype: torch.dtype = torch.float32) -> None:
    """Check that the checks at load pass at every hookpoint and for the embeddings of images and texts."""
    check_model(vision, tuple(vision.hookpoints), "extract.model", dtype)


def check_bfloat16(load: Callable[[Any], Any]) -> None:
    """Check that bfloat16 is close to float32, keeps a float32 residual stream, and equals autocast with float32 weights bit for bit."""
    exact, half, cast = (load(dtype) for dtype in ("float32", "bfloat16", "float32"))
    check_trust(half, torch.bfloat16)
    cast._dtype = torch.bfloat16
    names, pixels = tuple(exact.hookpoints), noise(exact)
    theirs, ours, autocast = (model.capture(pixels, names) for model in (exact, half, cast))
    for name in names:
        assert 0 < (ours.tokens[name] - theirs.tokens[name]).norm() / theirs.tokens[name].norm() < 0.02, name
        assert torch.equal(ours.tokens[name], autocast.tokens[name]), name
    assert ours.tokens["vision.blocks.2"].dtype == torch.float32
    if ours.embedding is not None:
        assert ours.embedding.dtype == torch.float32 and torch.equal(ours.embedding, autocast.embedding)


def by_hand(vision: VisionModel, pixels: Tensor) -> Tensor:
    """Normalise pixels by hand, (n, 3, H, W)."""
    return normalise(pixels, vision.preprocess, "cpu")


HOOKPOINT = "vision.blocks.0"
LITE = {"kind": "lite", "variant": "lite0", "image_size": 64}


def check_planted_patch_in_artefact(root: Path, vision: VisionModel, model: Mapping[str, Any]) -> None:
    """Of black images, one of them with one white patch for each place, the artefact's tokens differ most at that row and column.

    Args:
        root: An empty folder.
        vision: The model, which tells its grid and its preprocessing: images are larger, and the patch goes through resize and crop.
        model: The same as params, on which the stages are run.
    """
    places = _draw(root / "photographs", vision)
    params = make_test_params(
        images={"source": {"kind": "folder", "path": str(root / "photographs")}, "limit": None, "eval_share": 0.4},
        extract={"model": model, "hookpoints": [HOOKPOINT], "tokens": "all", "judge": LITE, "namer": LITE, "dtype": "float32"},
    )
    images = make_artefact(root / "images", "images", make_images, params.images, {})
    extraction = make_artefact(root / "extraction", "extraction", extract, params.extract, {"images": images})
    tokens = _patches(extraction.child(HOOKPOINT, "activations"), images)
    dark = tokens.pop("dark.png")
    assert len(tokens) == len(places) == len(dark)
    for name, patches in tokens.items():
        brightest = max(dark, key=lambda place: float((patches[place] - dark[place]).norm()))
        assert brightest == places[name]


def _draw(folder: Path, vision: VisionModel) -> dict[str, tuple[int, int]]:
    """Draw a black image, and one with a white patch for each position of the grid; return the positions by file name."""
    height, width = (side * 3 // 2 for side in vision.preprocess.crop)
    rows, cols = vision.hookpoints[HOOKPOINT].grid or (0, 0)
    left, top, right, bottom = vision.preprocess.box(width, height)
    y, x = (bottom - top) / rows, (right - left) / cols
    folder.mkdir()
    Image.new("RGB", (width, height)).save(folder / "dark.png")
    places = {f"{row} {col}.png": (row, col) for row in range(rows) for col in range(cols)}
    for name, (row, col) in places.items():
        image = Image.new("RGB", (width, height))
        box = (round(left + x * col), round(top + y * row), round(left + x * (col + 1)), round(top + y * (row + 1)))
        image.paste((255, 255, 255), box)
        image.save(folder / name)
    return places


def _patches(activations: Artefact, images: Artefact) -> dict[str, dict[tuple[int, int], Tensor]]:
    """Return activations of patches by the image's file name, row and column."""
    names = dict(zip(*(images.read("images")[column].to_pylist() for column in ("image", "path")), strict=True))
    found: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in names.values()}
    for part in itertools.chain(activations.iter_parts("train"), activations.iter_parts("eval")):
        columns = (part[column].to_pylist() for column in ("image", "kind", "row", "col"))
        for image, kind, row, col, x in zip(*columns, from_float16(part["x"]).float(), strict=True):
            if kind == "patch":
                found[names[image]][row, col] = x
    return found
