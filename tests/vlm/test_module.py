"""A user's own module: every sub-module is a hookpoint by its dotted name, and problems of the code are reported in a sentence."""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ommatid.config import load_params
from ommatid.config.models import ModuleModel
from ommatid.errors import ConfigError, ModelError
from ommatid.vlm import Hookpoint, load_model
from ommatid.vlm.module import ModuleVision, make_preprocess
from ommatid.vlm.network_checks import check_model
from support.study import CHECKOUT, make_test_params
from support.towers import (
    Order,
    check_finite_differences,
    check_gradients,
    check_planted_patch_in_artefact,
    check_reading,
    check_splice,
    check_splice_alone,
)

FILE = '''
import collections

import torch
import yaml
from torch import nn


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.mlp(x)


class Vit(nn.Module):
    """Patches of 8 pixels, a class token and registers, two blocks, a head."""

    def __init__(self, d=16, n_special=1, grid=(4, 4)):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, d, 8, stride=8)
        self.special = nn.Parameter(torch.randn(1, n_special, d))
        self.pos = nn.Parameter(0.02 * torch.randn(1, n_special + grid[0] * grid[1], d))
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.head = nn.Linear(d, 10)

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.special.expand(len(images), -1, -1), patches], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Conv(nn.Module):
    """A network of maps, whose activation writes into its input, runs twice, and which ends in a map with the channels last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.body = nn.Conv2d(6, 7, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.weights = nn.Identity()
        for parameter in self.parameters():  # brighter in, more out
            parameter.data.abs_()

    def forward(self, images):
        self.weights(self.stem.weight)
        x = self.relu(self.body(self.relu(self.stem(images))))
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.pool(x)


def vit():
    torch.manual_seed(0)
    return Vit()


def vit_with_registers():
    torch.manual_seed(0)
    return Vit(n_special=5)


def wide():
    torch.manual_seed(0)
    return Vit(grid=(2, 3))


def conv():
    torch.manual_seed(0)
    return Conv()


def like_timm():
    model = conv()
    model.pretrained_cfg = {
        "input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.2)
    }
    return model


class Changed(Conv):
    """The network with something before or after the first layer."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.stem = nn.Sequential(before or nn.Identity(), self.stem, after or nn.Identity())

    def forward(self, images):
        return self.pool(self.relu(self.body(self.relu(self.stem(images)))))


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.1, training=True)


class LooksAtTheMiddle(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x[:, :, 8:24, 8:24], (8, 8, 8, 8))


class LooksAtTheLeft(nn.Module):
    def forward(self, x):
        return torch.cat([x[..., :20], torch.zeros_like(x[..., 20:])], dim=-1)


class FailsLate(nn.Module):
    """On more than two images, which is not seen when the shapes are."""

    def forward(self, x):
        return x if len(x) < 3 else x.reshape(-1, 7)


class Overflows(nn.Module):
    def forward(self, x):
        return x * 1e38 * 1e38


def batch_statistics():
    torch.manual_seed(0)
    return Changed(after=nn.BatchNorm2d(6, track_running_stats=False))


def always_drops():
    torch.manual_seed(0)
    return Changed(before=AlwaysDrops())


def looks_at_the_middle():
    torch.manual_seed(0)
    return Changed(before=LooksAtTheMiddle())


def looks_at_the_left():
    torch.manual_seed(0)
    return Changed(before=LooksAtTheLeft())


def fails_late():
    torch.manual_seed(0)
    return Changed(before=FailsLate())


def overflows():
    torch.manual_seed(0)
    return Changed(after=Overflows())


class Returns(Vit):
    """The transformer with an output that a function makes of the image features."""

    def __init__(self, make_output):
        super().__init__()
        self.make_output = make_output

    def forward(self, images):
        return self.make_output(super().forward(images))


class ForgetsGradients(Vit):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class WritesInPlace(Vit):
    def forward(self, images):
        y = super().forward(images).exp()
        return (y * y).add_(y.add_(1))


class KeepsATensor(Vit):
    """Keeps positions that it makes in its first pass."""

    kept = None

    def forward(self, images):
        self.kept = torch.full((10,), 2.0) if self.kept is None else self.kept
        return super().forward(images).exp() * self.kept


class Several(nn.Module):
    """Sub-modules whose outputs are a named tuple and a list, of which the first is used, and a side branch."""

    Pair = collections.namedtuple("Pair", "features other")

    class Makes(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            return self.make(x)

    def __init__(self):
        super().__init__()
        self.pair, self.list = self.Makes(lambda x: self.Pair(x.mean((2, 3)), 1)), self.Makes(lambda x: [2 * x, None])
        self.side, self.last = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, images):
        x, _ = self.list(self.pair(images).features)
        self.side(x)
        return self.last(x)[:, None], x


def several():
    torch.manual_seed(0)
    return Several()


def returns(make_output):
    torch.manual_seed(0)
    return Returns(make_output)


def returns_a_dict():
    return returns(lambda y: {"features": y})


def returns_a_loss():
    return returns(lambda y: y.mean())


def returns_tokens_of_no_grid():
    return returns(lambda y: y[:, None].expand(-1, 7, -1))


def forgets_gradients():
    return ForgetsGradients()


def writes_in_place():
    return WritesInPlace()


def keeps_a_tensor():
    torch.manual_seed(0)
    return KeepsATensor()


def needs_an_argument(x):
    return x


def gives_text():
    return "model"


def takes_text():
    return nn.Embedding(3, 3)


a_number = 3
'''
NAME = "some_users_model"


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's file in the current directory, beside params.yaml."""
    path = tmp_path / f"{NAME}.py"
    path.write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]


def load(factory: str, dtype: str = "float32", **params: Any) -> ModuleVision:
    sizes = {"crop": (32, 32), "resize": (32,)} | params
    model = load_model(ModuleModel(kind="module", factory=f"{NAME}:{factory}", **sizes), dtype, "cpu")  # pyright: ignore[reportArgumentType]
    assert isinstance(model, ModuleVision)
    return model


def make(factory: str) -> torch.nn.Module:
    return getattr(sys.modules[NAME], factory)().eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))


def normalised(vision: ModuleVision, pixels: torch.Tensor) -> torch.Tensor:
    x = pixels.double() - torch.tensor(vision.preprocess.mean).double()
    return (x / torch.tensor(vision.preprocess.std).double()).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("factory", ["vit", "vit_with_registers", "conv"])
def test_the_checks_at_load_pass(factory: str) -> None:
    vision = load(factory)
    names = [name for name in vision.hookpoints if name != "weights"]
    check_model(vision, names, "extract.model", torch.float32)


def test_a_module_that_fails_on_a_batch_is_refused() -> None:
    with pytest.raises(ModelError, match=f"^extract.model: {NAME}:fails_late@.*: fails on a picture: RuntimeError: Expected 3D"):
        check_model(load("fails_late"), ["body"], "extract.model", torch.float32)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("always_drops", "two passes over the same input differ by .* is random in every pass"),
        ("batch_statistics", "outputs for the same input alone and in a batch differ by .* inputs of a batch influence one another"),
        ("looks_at_the_middle", "unaffected by rows 0 to 8 and columns 0 to 8 of the 32 x 32"),
        ("looks_at_the_left", "unaffected by rows 0 to 8 and columns 24 to 32"),
        ("overflows", "NaN or infinity for a test picture"),
    ],
)
def test_modules_that_fail_the_checks_are_refused_by_their_cause(factory: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"^extract.model: {NAME}:{factory}@.*: the activations at body: {reason}"):
        check_model(load(factory), ["body"], "extract.model", torch.float32)


def test_hookpoints_of_a_transformer_in_the_order_of_the_pass() -> None:
    vision = load("vit")
    sequence = Hookpoint(16, ("cls",), (4, 4))
    assert dict(vision.hookpoints) == {
        "patch_embed": Hookpoint(16, (), (4, 4)),
        **{
            f"blocks.{i}{name}": Hookpoint(d, ("cls",), (4, 4))
            for i in (0, 1)
            for name, d in ((".norm", 16), (".attn", 16), (".mlp.0", 32), (".mlp.1", 32), (".mlp.2", 16), (".mlp", 16), ("", 16))
        },
        "head": Hookpoint(10, ("pooled",), None),
    }
    assert [name for name, point in vision.hookpoints.items() if point == sequence][:3] == [
        "blocks.0.norm",
        "blocks.0.attn",
        "blocks.0.mlp.2",
    ]
    assert [*vision.hookpoints][0 :: len(vision.hookpoints) - 1] == ["patch_embed", "head"]
    assert vision.d_embed is None


def test_registers_come_after_the_class_token() -> None:
    assert load("vit_with_registers").hookpoints["blocks.1"] == Hookpoint(16, ("cls", *("register",) * 4), (4, 4))


def test_hookpoints_of_a_network_of_maps() -> None:
    vision = load("conv")
    assert dict(vision.hookpoints) == {  # relu runs twice, and weights says nothing of the images
        "stem": Hookpoint(6, (), (8, 8)),
        "body": Hookpoint(7, (), (4, 4)),
        "last": Hookpoint(7, (), (4, 4)),
        "pool": Hookpoint(7, ("pooled",), None),
    }


def test_transformer_equals_hand_written_hooks(pixels: torch.Tensor) -> None:
    vision = load("vit")
    model, seen = make("vit"), {}
    for name in ("blocks.0", "blocks.1.mlp", "blocks.1.attn", "head"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model(normalised(vision, pixels))
    seen |= {"blocks.1.attn": seen["blocks.1.attn"][0], "head": seen["head"][:, None]}
    captured = vision.capture(pixels, list(seen))
    assert captured.embedding is None and list(captured.tokens) == list(seen)
    for name, expected in seen.items():
        torch.testing.assert_close(captured.tokens[name], expected, atol=1e-5, rtol=1e-5)


def test_maps_equal_hand_written_hooks_although_the_next_layer_writes_into_them(pixels: torch.Tensor) -> None:
    vision = load("conv")
    model = make("conv")
    setattr(model.get_submodule("relu"), "inplace", False)  # noqa: B010
    with torch.no_grad():
        stem = model.get_submodule("stem")(normalised(vision, pixels))
        body = model.get_submodule("body")(stem.relu())
    assert (stem < 0).any()
    tokens = vision.capture(pixels, ["stem", "body", "last", "pool"]).tokens
    rows = {name: x.flatten(2).transpose(1, 2) for name, x in (("stem", stem), ("body", body), ("last", body.relu()))}
    for name, expected in (rows | {"pool": body.relu().mean((2, 3))[:, None]}).items():
        torch.testing.assert_close(tokens[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("factory", "hookpoint", "params", "size", "grid"),
    [
        ("vit", "blocks.1", {}, (32, 32), (4, 4)),
        ("vit_with_registers", "blocks.1", {}, (32, 32), (4, 4)),
        ("wide", "blocks.1", {"grid": (2, 3), "crop": (16, 24), "resize": (16, 24)}, (16, 24), (2, 3)),
        ("conv", "stem", {}, (32, 32), (8, 8)),
        ("conv", "last", {}, (32, 32), (4, 4)),
    ],
)
def test_bright_patch_is_found_at_its_row_and_column(factory: str, hookpoint: str, params: dict, size: tuple, grid: tuple) -> None:
    vision = load(factory, **params)
    places = [(0, 1), (1, 2), (1, 0), (grid[0] - 1, grid[1] - 1)]
    dark = torch.full((len(places), *size, 3), 120, dtype=torch.uint8)
    bright = dark.clone()
    height, width = size[0] // grid[0], size[1] // grid[1]
    for image, (row, col) in zip(bright, places, strict=True):
        image[height * row : height * (row + 1), width * col : width * (col + 1)] = 255
    assert vision.hookpoints[hookpoint].grid == grid
    before, after = (vision.capture(x, [hookpoint]).tokens[hookpoint] for x in (dark, bright))
    change = (after - before)[:, len(vision.hookpoints[hookpoint].special) :].norm(dim=-1)
    assert [divmod(int(i), grid[1]) for i in change.argmax(1)] == places


def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, user_file: Path) -> None:
    nested = "\n\nclass Nested(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.vision = Vit(grid=(2, 3))\n\n"
    user_file.write_text(
        f"{FILE}{nested}    def forward(self, x):\n        return self.vision(x)\n\n\ndef nested():\n    return Nested()\n"
    )
    sizes: dict[str, Any] = {"crop": (16, 24), "resize": (16, 24), "grid": (2, 3)}
    model = {"kind": "module", "factory": f"{NAME}:nested", **sizes}
    check_planted_patch_in_artefact(tmp_path, load("nested", **sizes), model)


def test_an_unknown_grid_must_be_given() -> None:
    wide: dict[str, Any] = {"crop": (16, 24), "resize": (16, 24)}
    with pytest.raises(ModelError, match=r"extract\.model\.grid: .* sub-module blocks\.0\.norm outputs 7 tokens .*images are 16 x 24"):
        load("wide", **wide)
    assert load("wide", **wide, grid=(2, 3)).hookpoints["blocks.0"] == Hookpoint(16, ("cls",), (2, 3))


def test_a_sequence_that_is_not_a_square_needs_a_grid(user_file: Path) -> None:
    with_text = FILE.replace("self.pos = ", "self.text = nn.Identity(); self.pos = ")
    user_file.write_text(with_text.replace("for block", "self.text(x[:, :12])\n        for block"))
    with pytest.raises(ModelError, match=r"extract\.model\.grid: .* text outputs 12 tokens .*the largest square, 3 x 3, leaves 3\)"):
        load("vit")
    assert "text" not in load("vit", grid=(4, 4)).hookpoints


def test_an_output_that_changes_its_shape_is_refused(user_file: Path, pixels: torch.Tensor) -> None:
    user_file.write_text(FILE.replace("for block", "x = x if len(images) == 2 else x[:, :5]\n        for block"))
    vision = load("vit")
    with pytest.raises(ModelError, match=r"hookpoint 'blocks\.0': gave \[\[3, 5, 16\]\] for 3 images"):
        vision.capture(pixels, ["blocks.0"])


def test_no_hook_is_left_behind_even_after_errors(pixels: torch.Tensor) -> None:
    vision = load("vit")
    vision.capture(pixels, ["blocks.0"])
    with pytest.raises(RuntimeError):
        vision.capture(pixels[:, :20], ["blocks.0"])
    assert not any(module._forward_hooks for module in vision._module.modules())


def test_splices_and_gradients_of_a_transformer_equal_hand_written_hooks(pixels: torch.Tensor) -> None:
    vision, model = load("vit"), make("vit")
    x = normalised(vision, pixels)
    modules = {name: model.get_submodule(name) for name in vision.hookpoints}
    bypassed = [name for name in modules if name not in ("blocks.0", "blocks.1", "head", "patch_embed")]
    order = OfMaps(("patch_embed",))
    assert vision.d_output == 10
    check_splice(vision, modules, lambda: model(x), pixels, order, bypassed)
    check_gradients(vision, modules, lambda: model(x), pixels, order)
    check_splice_alone(vision, pixels, "blocks.0.mlp")
    check_reading(vision, pixels, "blocks.0.mlp", "blocks.1")


class OfMaps(Order):
    """Tokens of some hookpoints in maps (n, d, rows, columns), or with the channels last."""

    def __init__(self, names: Sequence[str], channels_last: Sequence[str] = ()) -> None:
        self.names, self.channels_last, self.sizes = names, channels_last, {}

    def tokens(self, name: str, output: torch.Tensor) -> torch.Tensor:
        if name not in (*self.names, *self.channels_last):
            return super().tokens(name, output)
        rows = output if name in self.channels_last else output.permute(0, 2, 3, 1)
        self.sizes[name] = rows.shape[1:3]
        return rows.flatten(1, 2)

    def output(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        if name not in (*self.names, *self.channels_last):
            return tokens
        rows = tokens.unflatten(1, self.sizes[name])
        return rows if name in self.channels_last else rows.permute(0, 3, 1, 2)


def test_splices_and_gradients_of_maps_equal_hand_written_hooks(pixels: torch.Tensor) -> None:
    """The next layer writes into some of them, and what the forward pass returns is a map with one place."""
    vision, model = load("conv"), make("conv")
    x = normalised(vision, pixels)
    modules = {name: model.get_submodule(name) for name in vision.hookpoints}
    order = OfMaps(("stem", "body", "pool"), ("last",))
    check_splice(vision, modules, lambda: model(x)[..., 0, 0], pixels, order)
    setattr(model.get_submodule("relu"), "inplace", False)  # noqa: B010
    check_gradients(vision, modules, lambda: model(x)[..., 0, 0], pixels, order)
    check_splice_alone(vision, pixels, "body")
    check_reading(vision, pixels, "stem", "body")


def test_the_first_of_several_outputs_is_replaced_and_returned(pixels: torch.Tensor) -> None:
    vision, model = load("several"), make("several")
    x = normalised(vision, pixels).mean((2, 3))
    assert list(vision.hookpoints) == ["pair", "list", "side", "last"] and vision.d_output == 4
    for name, expected in (("pair", 6 * x), ("list", 6 * x), ("side", 2 * x)):
        (found,) = vision.splice(pixels, name, [lambda tokens: 3 * tokens])
        torch.testing.assert_close(found, model.get_submodule("last")(expected), atol=1e-5, rtol=1e-5)
    check_finite_differences(vision, pixels, "list")
    with pytest.raises(ModelError, match=r"several@.*: hookpoint 'side': the model's output does not depend on these tokens"):
        vision.differentiate(pixels, "side", lambda y: y.sum(1))


def test_features_of_tokens_and_maps(pixels: torch.Tensor, user_file: Path) -> None:
    """Of a sequence, the class token; of a map, the mean of its places."""
    ends = {"tokens": ("Vit", "return self.head(x[:, 0])", "return x"), "map": ("Conv", "return self.pool(x)", "return x")}
    for name, (_, old, new) in ends.items():
        user_file.write_text(FILE.replace(old, new))
        sys.modules.pop(NAME, None)
        vision = load("vit" if name == "tokens" else "conv")
        last = "blocks.1" if name == "tokens" else "last"
        tokens = vision.capture(pixels, [last]).tokens[last]
        expected = tokens[:, 0] if name == "tokens" else tokens.mean(1)
        (found,) = vision.splice(pixels, next(iter(vision.hookpoints)), [lambda x: x])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("factory", ["returns_a_dict", "returns_a_loss", "returns_tokens_of_no_grid"])
def test_a_module_that_returns_no_features_can_be_captured_but_not_spliced(factory: str, pixels: torch.Tensor) -> None:
    vision = load(factory)
    assert vision.capture(pixels, ["blocks.0"]).tokens["blocks.0"].shape == (3, 17, 16)
    message = f"{factory}@.*: its forward pass returns no features, .* wrap the model in a module that does"
    for use in (
        lambda: vision.splice(pixels, "blocks.0", [lambda x: x]),
        lambda: vision.differentiate(pixels, "blocks.0", lambda y: y.sum(1)),
        lambda: vision.d_output,
    ):
        with pytest.raises(ModelError, match=message):
            use()


def test_modules_that_cannot_be_differentiated_are_refused(pixels: torch.Tensor) -> None:
    for factory, message in (("forgets_gradients", r"without torch\.no_grad"), ("writes_in_place", "replace its in-place operations")):
        with pytest.raises(ModelError, match=rf"{factory}@.*: hookpoint 'blocks\.0': .*{message}"):
            load(factory).differentiate(pixels, "blocks.0", lambda y: y.sum(1))
    vision = load("vit")
    with pytest.raises(RuntimeError, match="of the score"):  # which is not the module's
        vision.differentiate(pixels, "blocks.0", lambda y: (_ for _ in ()).throw(RuntimeError("of the score")))


def test_a_tensor_kept_from_an_earlier_pass_can_be_differentiated_through(pixels: torch.Tensor) -> None:
    vision = load("keeps_a_tensor")
    vision.capture(pixels, ["blocks.0"])
    check_finite_differences(vision, pixels, "blocks.0")


def test_an_output_that_changes_its_shape_cannot_be_spliced(user_file: Path, pixels: torch.Tensor) -> None:
    user_file.write_text(FILE.replace("return self.head(x[:, 0])", "return self.head(x[:, 0])[:, : 12 - len(images)]"))
    with pytest.raises(ModelError, match=r"returned \[3, 9\] for 3 images, but \[2, 10\] for 2 blank ones"):
        load("vit").splice(pixels, "blocks.0", [lambda x: x])
    user_file.write_text(FILE.replace("for block", "x = x if len(images) == 2 else x[:, :5]\n        for block"))
    sys.modules.pop(NAME)
    with pytest.raises(ModelError, match=r"hookpoint 'blocks\.0': gave \[\[3, 5, 16\]\] for 3 images"):
        load("vit").splice(pixels, "blocks.0", [lambda x: x])


def test_bfloat16_is_close(pixels: torch.Tensor) -> None:
    exact, rough = (load("vit", dtype).capture(pixels, ["blocks.1"]).tokens["blocks.1"] for dtype in ("float32", "bfloat16"))
    assert 0 < (rough.float() - exact).norm() / exact.norm() < 0.02


def test_the_name_identifies_the_code(user_file: Path) -> None:
    assert load("vit").name == f"{NAME}:vit@{hashlib.sha256(FILE.encode()).hexdigest()[:12]}"


def test_without_params_preprocessing_is_that_of_imagenet() -> None:
    preprocess = make_preprocess(ModuleModel(kind="module", factory="a:b"), {})
    assert (preprocess.resize, preprocess.crop, preprocess.interpolation) == ((256,), (224, 224), "bicubic")
    assert preprocess.mean == pytest.approx((123.675, 116.28, 103.53)) and preprocess.std == pytest.approx((58.395, 57.12, 57.375))


def test_preprocessing_is_read_from_timms_config() -> None:
    vision = load("like_timm", crop=None, resize=None)
    assert (vision.preprocess.resize, vision.preprocess.crop, vision.preprocess.interpolation) == ((35,), (32, 32), "bilinear")
    assert vision.preprocess.mean == pytest.approx((127.5, 102, 76.5)) and vision.preprocess.std == pytest.approx((63.75, 127.5, 51))
    image = Image.new("RGB", (70, 50), (200, 100, 50))
    x = torch.from_numpy(vision.preprocess(image))[None]
    colour = (torch.tensor([200, 100, 50]) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.25, 0.5, 0.2])
    expected = make("like_timm").get_submodule("stem")(colour[None, :, None, None].expand(1, 3, 32, 32))
    torch.testing.assert_close(vision.capture(x, ["stem"]).tokens["stem"], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("params", "cfg", "resize"),
    [
        ({"crop": (100, 100)}, {}, (114,)),
        ({"resize": (50, 60), "crop": (40, 40)}, {"crop_pct": 1.0}, (50, 60)),
        ({}, {"input_size": (3, 96, 64), "crop_pct": 1.0, "crop_mode": "squash"}, (96, 64)),
        ({}, {"crop_pct": 1.0}, (224,)),
    ],
)
def test_params_take_precedence_over_the_modules_own_preprocessing(params: dict, cfg: dict, resize: tuple) -> None:
    assert make_preprocess(ModuleModel(kind="module", factory="a:b", **params), cfg).resize == resize


@pytest.mark.parametrize(
    ("params", "cfg", "message"),
    [
        ({"crop": (64, 96)}, {}, r"crop_mode 'center'\); set extract\.model\.resize"),
        ({}, {"crop_mode": "border"}, r"crop_mode 'border'\); set extract\.model\.resize"),
        ({}, {"interpolation": "random"}, r"interpolation 'random'; set extract\.model\.interpolation"),
        ({"resize": (20,), "crop": (32, 32)}, {}, r"extract\.model\.resize: \[20\] is smaller than crop \[32, 32\]"),
    ],
)
def test_unknown_preprocessing_must_be_given(params: dict, cfg: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_preprocess(ModuleModel(kind="module", factory="a:b", **params), cfg)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("vitt", r"has no vitt; did you mean vit\?"),
        ("a_number", r"is an int, which cannot be called"),
        ("needs_an_argument", r"calling it without arguments failed: TypeError: .*missing 1 required"),
        ("gives_text", r"returned a str, not a torch\.nn\.Module"),
        ("takes_text", r"its forward pass fails on images \(2, 3, 32, 32\): RuntimeError: .*set extract\.model\.crop"),
    ],
)
def test_factories_that_return_no_model_are_refused(factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=rf"extract\.model\.factory: {NAME}:{factory}: .*{message}"):
        load(factory)


@pytest.mark.parametrize(
    ("content", "module", "message"),
    [
        (None, "no_such_package.models", r"no module no_such_package: neither installed, nor no_such_package\.py in /"),
        ("import nothing_like_this", f"{NAME}_2", r"imports nothing_like_this, which is not installed here"),
        ("1 / 0", f"{NAME}_3", r"importing some_users_model_3 failed: ZeroDivisionError"),
        ("raise SystemExit(3)", f"{NAME}_6", r"importing some_users_model_6 failed: SystemExit: 3"),
        ("def make():\n    exit(3)", f"{NAME}_7", r"calling it without arguments failed: SystemExit: 3"),
        ("def (", f"{NAME}_4", r"importing some_users_model_4 failed: SyntaxError"),
    ],
)
def test_modules_that_cannot_be_imported_are_named(tmp_path: Path, content: str | None, module: str, message: str) -> None:
    if content:
        (tmp_path / f"{module}.py").write_text(content)
    with pytest.raises(ModelError, match=message):
        load_model(ModuleModel(kind="module", factory=f"{module}:make"), "float32", "cpu")


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("factory: my_model.make", "extract.model.factory: got 'my_model.make'; expected package.module:function, such as my_model:make"),
        ("factory: 'm:f', grid: [4]", "extract.model.grid.1: missing"),
        ("factory: 'm:f', resize: [1, 2, 3]", "extract.model.resize: got [1, 2, 3]; tuple should have at most 2 items"),
        ("factory: 'm:f', std: [1, 0, 1]", "extract.model.std.1: got 0; input should be greater than 0"),
        ("factory: 'm:f', size: 3", "extract.model.size: unknown key"),
    ],
)
def test_unusable_params_are_refused(params: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_params(CHECKOUT / "params.yaml", [f"extract.model={{kind: module, {params}}}"])
    assert says in str(error.value)


def test_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs/users/models.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    params = [make_test_params(**example).extract for example in examples if "model" in example["extract"]]
    assert [extract.model.kind for extract in params] == ["llava", "qwen", "module"]  # pyright: ignore[reportAttributeAccessIssue]
    (module,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def make" in text)
    (tmp_path / "my_model.py").write_text(module)
    vision = load_model(params[-1].model, "float32", "cpu")  # pyright: ignore[reportArgumentType]
    assert vision.hookpoints[params[-1].hookpoints[0]] == Hookpoint(64, (), (14, 14))
    del sys.modules["my_model"]
