"""Properties that every family of towers must have: hooks, splices, gradients, the residual stream, and positions, also in artefacts."""

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Order:
    """The order of tokens in a module's output: here `(n, tokens, d)` row by row, or `(n, d)`; `OfOneSequence` is another."""

    def tokens(self, name: str, output: Tensor) -> Tensor:
        """Return the output of a hookpoint as tokens, (n, tokens, d)."""
        return output if output.ndim == 3 else output[:, None]

    def output(self, name: str, tokens: Tensor) -> Tensor:
        """Return tokens in the order of the output, in any shape."""
        return tokens


ROW_BY_ROW = Order()


@dataclass(frozen=True)
class OfOneSequence(Order):
    """The tokens of all images in one sequence (n * tokens, d), at places (row, column) on the grid that are the same for each image."""

    places: Mapping[str, list[tuple[int, int]]]
    """Places by hookpoint, in the order of the sequence."""

    def _numbers(self, name: str) -> list[int]:
        n_columns = 1 + max(column for _, column in self.places[name])
        return [row * n_columns + column for row, column in self.places[name]]

    def tokens(self, name: str, output: Tensor) -> Tensor:
        numbers = self._numbers(name)
        tokens = torch.full_like(output, torch.nan).unflatten(0, (-1, len(numbers)))
        return tokens.index_copy(1, torch.tensor(numbers), output.unflatten(0, (-1, len(numbers))))

    def output(self, name: str, tokens: Tensor) -> Tensor:
        return torch.stack([tokens[:, number] for number in self._numbers(name)], dim=1)


@contextmanager
def putting(module: nn.Module, name: str, order: Order, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the tokens that a module outputs, alone or first in a tuple, before any hook of transformers sees them."""
    forward = module.forward

    def put(*inputs: Any, **options: Any) -> Any:
        output = forward(*inputs, **options)
        first = _first(output)
        new = order.output(name, change(order.tokens(name, first))).reshape(first.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    module.forward = put
    try:
        yield
    finally:
        del module.forward


def change(x: Tensor) -> Tensor:
    """Change tokens (n, tokens, d) by those of another image and by their position, not into the argument."""
    return 0.5 * x.roll(1, dims=0) + 0.1 + 0.1 * torch.arange(x.shape[1])[:, None] / x.shape[1]


def check_splice(
    vision: VisionModel,
    modules: Mapping[str, nn.Module],
    run: Callable[[], Tensor],
    pixels: Tensor,
    order: Order = ROW_BY_ROW,
    bypassed: Sequence[str] = (),
    without_effect: Sequence[str] = (),
) -> None:
    """At every hookpoint: its own tokens change no bit, others change what a hand-written hook on the reference says, each asked for once.

    Those of the stream are all that the pass goes on from: another image's tokens give the other image's output.

    Args:
        vision: The model.
        modules: Modules of the reference, by hookpoint.
        run: Function that runs the reference on the same images.
        pixels: The images.
        order: Order of the tokens in the reference.
        bypassed: Hookpoints that something of the image bypasses, beside those of attention and MLP.
        without_effect: Hookpoints on which the output does not depend.
    """
    assert list(modules) == list(vision.hookpoints)
    (plain,) = vision.splice(pixels, next(iter(modules)), [lambda x: x])
    embedding = vision.capture(pixels, ()).embedding
    assert embedding is None or torch.equal(plain, embedding)
    with torch.no_grad():
        torch.testing.assert_close(plain, run(), atol=1e-5, rtol=1e-5)
    assert plain.std(0).min() > 1e-4  # else no image would differ from another
    assert plain.shape == (len(pixels), vision.d_output) and vision.d_embed in (None, vision.d_output)
    shapes = []

    def counted(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return change(x)

    for name, module in modules.items():
        with putting(module, name, order, change), torch.no_grad():
            expected = run()
        shapes.clear()
        same, changed, copied, swapped = vision.splice(
            pixels, name, [lambda x: x, counted, lambda x: x.double() + 0, lambda x: x.roll(1, dims=0)]
        )
        point = vision.hookpoints[name]
        assert shapes == [(len(pixels), point.n_tokens, point.d_model)]
        assert {x.dtype for x in (same, changed, swapped)} == {torch.float32}
        assert torch.equal(same, plain) and torch.equal(copied, plain), name
        torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-5)
        assert ((changed - plain).norm() > 1e-2 * plain.norm()) == (name not in without_effect), name
        if name not in without_effect:
            is_bypassed = name.endswith((".attn", ".mlp")) or name in bypassed
            assert torch.allclose(swapped, plain.roll(1, dims=0), atol=1e-5, rtol=1e-5) != is_bypassed, name
        check_nothing_left(vision)


def check_nothing_left(vision: VisionModel) -> None:
    """Check that no hook, no skipped module and no gradient is left in a tower."""
    model = getattr(vision, "_model", None) or vision._module  # pyright: ignore[reportAttributeAccessIssue]
    assert not any(module._forward_hooks for name, module in model.named_modules() if not name.endswith("patch_embed"))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


def make_score(vision: VisionModel, n: int) -> Callable[[Tensor], Tensor]:
    """Make a score that is not linear and weighs every number of the outputs (n, d_output) differently."""
    weights = torch.randn(n, vision.d_output, generator=torch.Generator().manual_seed(3)).double()
    return lambda outputs: (outputs.double().tanh() * weights).sum(1)


def check_gradients(
    vision: VisionModel,
    modules: Mapping[str, nn.Module],
    run: Callable[[], Tensor],
    pixels: Tensor,
    order: Order = ROW_BY_ROW,
    without_effect: Sequence[str] = (),
) -> None:
    """Gradients at every hookpoint equal autograd's on the reference, at its own tokens and at others, and finite differences of splices.

    Args:
        vision: The model.
        modules: Modules of the reference, by hookpoint.
        run: Function that runs the reference on the same images.
        pixels: The images.
        order: Order of the tokens in the reference.
        without_effect: Hookpoints on which the output does not depend.
    """
    score = make_score(vision, len(pixels))
    for name, module in modules.items():
        if name in without_effect:
            with pytest.raises(ModelError, match=f"{name}': the model's output does not depend on these tokens"):
                vision.differentiate(pixels, name, score)
            continue
        for replacement in (None, change):
            found = vision.differentiate(pixels, name, score, replacement)
            leaves: list[Tensor] = []

            def leaf(x: Tensor, replacement: Any = replacement, leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append((replacement(x) if replacement else x).detach().requires_grad_())
                return leaves[0]

            with putting(module, name, order, leaf):
                outputs = run()
            (expected,) = torch.autograd.grad(score(outputs).sum(), leaves)
            assert found.gradients.dtype == found.tokens.dtype == found.outputs.dtype == torch.float32
            torch.testing.assert_close(found.tokens, leaves[0].detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.outputs, outputs.detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.gradients, expected, atol=1e-5 * float(expected.abs().max()) + 1e-7, rtol=1e-3)
        check_finite_differences(vision, pixels, name)
        check_nothing_left(vision)


def check_finite_differences(vision: VisionModel, pixels: Tensor, name: str, step: float = 2e-3) -> None:
    """Check the gradient at a hookpoint against central differences of spliced scores, along itself and along a random direction."""
    score = make_score(vision, len(pixels))
    found = vision.differentiate(pixels, name, score)
    gradient, tokens = found.gradients.double(), found.tokens.double()
    random = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(4)).double()
    assert gradient.norm() > 0
    for direction in (gradient, gradient / gradient.norm() + random / random.norm()):
        h = direction * (step * tokens.norm() / direction.norm())
        up, down = vision.splice(pixels, name, [lambda x, h=h: x + h, lambda x, h=h: x - h])
        difference = float((score(up) - score(down)).sum()) / 2
        assert difference == pytest.approx(float((gradient * h).sum()), rel=5e-2), name  # curvature and float32


def check_splice_alone(vision: VisionModel, pixels: Tensor, name: str) -> None:
    """Check that outputs and gradients at a hookpoint are the same whatever else is called, also within torch.inference_mode()."""
    score = make_score(vision, len(pixels))
    (alone,) = vision.splice(pixels, name, [change])
    first = vision.differentiate(pixels, name, score)
    n_tensors = count_tensors()
    with torch.inference_mode():
        again = vision.differentiate(pixels.clone(), name, score, lambda x: x)
        beside = vision.splice(pixels, name, [lambda x: 0 * x, change, lambda x: x])
    assert torch.equal(alone, beside[1])
    assert torch.equal(first.gradients, again.gradients) and not again.gradients.requires_grad and not again.outputs.requires_grad
    for _ in range(3):
        vision.differentiate(pixels, name, score)
    del again, beside
    assert count_tensors() == n_tensors


def check_reading(vision: VisionModel, pixels: Tensor, name: str, read: str) -> None:
    """Check tokens read after a splice, and their gradients, at a later hookpoint on whose tokens alone the output depends.

    The output goes on from the tokens that were read, and gradients obey the chain rule.
    """
    same, changed = vision.splice(pixels, name, [lambda x: x, change], read)
    torch.testing.assert_close(same, vision.capture(pixels, [read]).tokens[read].float(), atol=1e-5, rtol=1e-5)
    assert (changed - same).norm() > 1e-3 * same.norm()
    (onward,), (expected,) = vision.splice(pixels, read, [lambda _: changed]), vision.splice(pixels, name, [change])
    torch.testing.assert_close(onward, expected, atol=1e-5, rtol=1e-5)

    score = make_score(vision, len(pixels))
    onward = vision.differentiate(pixels, read, score, lambda _: changed).gradients
    found = vision.differentiate(pixels, name, lambda tokens: (tokens * onward).sum((1, 2)), change, read)
    expected = vision.differentiate(pixels, name, score, change).gradients
    torch.testing.assert_close(found.outputs, changed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.gradients, expected, atol=1e-5 * float(expected.abs().max()) + 1e-7, rtol=1e-3)
    for other in (name, next(iter(vision.hookpoints))):
        with pytest.raises(ModelError, match=f"hookpoint '{other}' is not after '{name}'"):
            vision.splice(pixels, name, [lambda x: x], other)
    with pytest.raises(ModelError, match=r"hookpoint 'none': .* has no such hookpoint"):
        vision.differentiate(pixels, name, score, read="none")


def count_tensors() -> int:
    """Count the tensors that live."""
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


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
    for name in names[:3] + names[-1:]:
        (plain,) = half.splice(pixels, name, [lambda x: x])
        assert torch.equal(plain, half.splice(pixels, names[0], [lambda x: x.float()])[0])
        assert ours.embedding is None or torch.equal(plain, ours.embedding)
    for name in names[:3]:
        near, rough = (model.differentiate(pixels, name, make_score(model, len(pixels))) for model in (exact, half))
        assert {x.dtype for x in (rough.tokens, rough.outputs, rough.gradients)} == {torch.float32}
        assert torch.equal(rough.tokens, ours.tokens[name].float())
        assert 0 < (rough.gradients - near.gradients).norm() < 0.1 * near.gradients.norm(), name


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
