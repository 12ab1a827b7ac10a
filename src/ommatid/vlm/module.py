"""Any torch.nn.Module that takes images `(batch, 3, H, W)` and is made by the user's function.

Shapes: b images, l tokens of a sequence, c channels, r rows, q columns, d the width d_model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from ommatid.config.models import ModuleModel
from ommatid.errors import ModelError
from ommatid.vlm import (
    Captured,
    Differentiated,
    Dtype,
    Hookpoint,
    Replacement,
    Score,
    State,
    check_hookpoint,
    check_hookpoints,
    splicing,
    state_of,
    user_code,
)
from ommatid.vlm.hooks import replacing
from ommatid.vlm.precision import normalise, resolve_dtype
from ommatid.vlm.preprocess import Interpolation, Preprocess

KEY = "extract.model.factory"
IMAGENET: Mapping[str, Any] = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
"""Usual preprocessing of ImageNet models, which is also timm's default for values that a `pretrained_cfg` lacks."""
SPECIAL = {
    0: (),
    1: ("cls",),
    2: ("cls", "distillation"),
    4: ("register",) * 4,
    5: ("cls", *("register",) * 4),
    8: ("register",) * 8,
    9: ("cls", *("register",) * 8),
}
"""Kinds of the tokens before the patches in usual vision transformers, by the number of such tokens."""
MAX_SPECIAL = 16
"""Largest number of tokens before the patches. A longer sequence does not have its patches on the given grid, and is no hookpoint."""


@dataclass(frozen=True)
class Layout:
    """The layout of tokens in a sub-module's output."""

    hookpoint: Hookpoint
    """The hookpoint with these tokens."""
    shape: tuple[int, ...]
    """Shape of the output, without the batch."""
    channels_first: bool
    """Whether a map is `(b, c, r, q)` rather than `(b, r, q, c)`."""

    def tokens(self, output: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch tokens d_model"]:
        """Reshape an output to tokens `(b, tokens, d_model)`."""
        if len(self.shape) == 1:
            return output.unsqueeze(1)
        if len(self.shape) == 2:
            return output
        return output.flatten(2).transpose(1, 2) if self.channels_first else output.flatten(1, 2)

    def output(self, tokens: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch ..."]:
        """Reshape tokens `(b, tokens, d_model)` to an output."""
        is_transposed = len(self.shape) == 3 and self.channels_first
        return (tokens.transpose(1, 2) if is_transposed else tokens).reshape(-1, *self.shape)

    def features(self, output: Float[Tensor, "batch ..."]) -> Float32[Tensor, "batch d_model"]:
        """Return one vector per image: the class token or the only token, and else the mean of the patches."""
        tokens, special = self.tokens(output).float(), self.hookpoint.special
        return tokens[:, 0] if special[:1] in (("cls",), ("pooled",)) else tokens[:, len(special) :].mean(1)


class ModuleVision:
    """A module made by the user's function, whose hookpoints are sub-modules with the names of `named_modules()`.

    A sub-module is a hookpoint if it runs once per forward pass, and its output, or the first element of a tuple, is one of these:

    - a sequence `(b, l, d)` of special tokens followed by patches
    - a map `(b, c, r, q)` or `(b, r, q, c)` with the aspect ratio of the images
    - one vector per image, `(b, d)`

    Nothing is computed in inference mode, because a module may keep a tensor for later passes, and one that was made in inference mode
    could not be differentiated through.
    """

    text_templates: tuple[str, ...] = ()
    d_embed = None
    logit_scale = None

    def __init__(self, params: ModuleModel, dtype: Dtype, device: str) -> None:
        module = user_code.call_factory(params.factory, KEY)
        self.name = f"{params.factory}@{user_code.checksum(params.factory)[:12]}"
        self.preprocess = make_preprocess(params, _pretrained_cfg(module))
        self.preprocessing: Mapping[str, Any] = self.preprocess.as_json()
        self._module = module.eval().requires_grad_(False).to(device)
        self._device, self._dtype = device, resolve_dtype(dtype, device)
        self._layouts, self._output = self._find_layouts(params)
        self.hookpoints: Mapping[str, Hookpoint] = {name: layout.hookpoint for name, layout in self._layouts.items()}

    @property
    def state(self) -> State:
        """Weights, the structure of the module, and the code of all its parts: see `Recognisable`."""
        return state_of(self._module, self.name, str(self._module), self.hookpoints, user_code.checksum_of_parts(self._module))

    @property
    def d_output(self) -> int:
        """Width of the features that the forward pass returns.

        Raises:
            ModelError: It returns no features.
        """
        return self._find_output().hookpoint.d_model

    @torch.no_grad()
    def capture(self, pixels: UInt8[Tensor, "batch height width 3"], hookpoints: Sequence[str]) -> Captured:
        """Return activations at one or more hookpoints, without an embedding: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown, or the shape of its output has changed.
        """
        for name in hookpoints:
            check_hookpoint(self, name)
        outputs = self._run(pixels, hookpoints)
        return Captured(tokens={name: self._tokens(name, outputs[name], len(pixels)) for name in hookpoints}, embedding=None)

    @torch.no_grad()
    def splice(
        self, pixels: UInt8[Tensor, "batch height width 3"], hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> tuple[Float32[Tensor, "batch ..."], ...]:
        """Return the features `(b, d_output)`, or the tokens that are read, with one full forward pass each: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown, the one to read is not a later one, the shape of an output has changed, or the forward pass
                returns no features.
        """
        check_hookpoints(self, hookpoint, read)
        return tuple(self._splice(pixels, hookpoint, read, replacement) for replacement in replacements)

    def differentiate(
        self,
        pixels: UInt8[Tensor, "batch height width 3"],
        hookpoint: str,
        score: Score,
        replacement: Replacement | None = None,
        read: str | None = None,
    ) -> Differentiated:
        """Return the gradients of a score with respect to the tokens at a hookpoint: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown, the one to read is not a later one, the shape of an output has changed, the forward pass
                returns no features or cannot be differentiated, or the features do not depend on the hookpoint.
        """
        check_hookpoints(self, hookpoint, read)
        where = f"{self.name}: hookpoint {hookpoint!r}"
        try:
            return splicing.differentiate(partial(self._splice, pixels, hookpoint, read), score, replacement, where)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise ModelError(
                f"{where}: the forward pass writes into a tensor that its gradient needs; replace its in-place operations, such as "
                "x += y, by others, such as x = x + y"
            ) from error

    def embed_text(self, texts: Sequence[str]) -> Float32[Tensor, "texts d_embed"]:
        """Raise an error: the model has no text tower.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"{self.name}: has no text tower")

    def _tokens(self, name: str, outputs: list[Tensor], n_images: int) -> Tensor:
        self._check_shapes(name, [list(output.shape) for output in outputs], n_images)
        return self._layouts[name].tokens(outputs[0])

    def _check_shapes(self, name: str, shapes: list[list[int]], n_images: int) -> None:
        layout = self._layouts[name]
        if shapes != [[n_images, *layout.shape]]:
            raise ModelError(
                f"hookpoint {name!r}: gave {shapes} for {n_images} images, but {[[2, *layout.shape]]} for 2 blank ones; "
                "a hookpoint's output must have the same shape for every image"
            )

    def _find_output(self) -> Layout:
        if self._output is None:
            raise ModelError(
                f"{self.name}: its forward pass returns no features, so the effect of replaced tokens cannot be measured; it must return "
                "one tensor with an entry for each image, (b, d), (b, tokens, d) or a map; wrap the model in a module that does"
            )
        return self._output

    def _splice(self, pixels: Tensor, hookpoint: str, read: str | None, replacement: Replacement) -> Tensor:
        """Run one forward pass with the tokens at a hookpoint replaced, and return the features `(b, d_output)` or tokens in float32."""
        layout, shapes, later = self._layouts[hookpoint], [], {}
        features = None if read else self._find_output()

        def replace(output: Tensor) -> Tensor:
            shapes.append(list(output.shape))
            self._check_shapes(hookpoint, shapes, len(pixels))
            tokens = splicing.replace_tokens(layout.tokens(output), replacement)
            # The layout in memory is kept, because sums may be rounded differently in another one.
            return torch.empty_like(output).copy_(layout.output(tokens))

        x = normalise(pixels, self.preprocess, self._device)
        with self._autocast(), replacing(self._module.get_submodule(hookpoint), replace), self._keeping(later, (read,) if read else ()):
            output = _first(self._module(x))
        self._check_shapes(hookpoint, shapes, len(pixels))
        if features is None:
            assert read is not None
            return self._tokens(read, later[read], len(pixels)).float()
        if list(output.shape) != [len(pixels), *features.shape]:
            raise ModelError(
                f"{self.name}: its forward pass returned {list(output.shape)} for {len(pixels)} images, but {[2, *features.shape]} for 2 "
                "blank ones; its output must have the same shape for every image"
            )
        return features.features(output)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self._device).type, self._dtype, enabled=self._dtype != torch.float32)

    def _run(self, pixels: Tensor, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Run one forward pass, and return outputs of sub-modules by name: a list with one output for each time that the sub-module ran."""
        outputs: dict[str, list[Tensor]] = {}
        x = normalise(pixels, self.preprocess, self._device)
        with self._autocast(), self._keeping(outputs, names):
            self._module(x)
        return outputs

    @contextmanager
    def _keeping(self, outputs: dict[str, list[Tensor]], names: Sequence[str]) -> Iterator[None]:
        """Keep the outputs of sub-modules during forward passes inside the block, by name: one for each time that the sub-module ran."""
        modules = dict(self._module.named_modules())
        handles = [modules[name].register_forward_hook(partial(_keep, outputs, name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _find_layouts(self, params: ModuleModel) -> tuple[dict[str, Layout], Layout | None]:
        """Find hookpoints and their layouts by running two blank images, which shows which outputs have one entry per image.

        Returns:
            The layouts of the hookpoints, and that of what the forward pass returns; None if these are no features.
        """
        names = [name for name, _ in self._module.named_modules()]
        pixels = torch.zeros(2, *self.preprocess.crop, 3, dtype=torch.uint8)
        try:
            outputs = self._run(pixels, names)
        except Exception as error:  # The user's code may raise anything.
            raise ModelError(
                f"{KEY}: {params.factory}: its forward pass fails on images (2, 3, {self.preprocess.crop[0]}, {self.preprocess.crop[1]}): "
                f"{type(error).__name__}: {error}; it must take one tensor of images; set extract.model.crop to their size"
            ) from error
        once = {name: seen[0] for name, seen in outputs.items() if len(seen) == 1 and len(seen[0]) == 2}
        returned = once.pop("", None)
        found = {name: _layout(name, tuple(output.shape[1:]), self.preprocess.crop, params) for name, output in once.items()}
        layouts = {name: layout for name, layout in found.items() if layout}
        if not layouts:
            raise ModelError(f"{KEY}: {params.factory}: none of its {len(names) - 1} sub-modules outputs tokens for every image")
        try:
            return layouts, None if returned is None else _layout("", tuple(returned.shape[1:]), self.preprocess.crop, params)
        except ModelError:  # The grid of a sequence is not clear, so neither is whether it begins with a class token.
            return layouts, None


def _first(output: Any) -> Any:
    """Return what a module outputs, or the first element of a tuple or list."""
    return output[0] if isinstance(output, tuple | list) and output else output


def _keep(outputs: dict[str, list[Tensor]], name: str, _module: nn.Module, _inputs: object, output: object) -> None:
    first = _first(output)
    if isinstance(first, Tensor) and first.is_floating_point() and first.ndim:
        # Cloned because the next layer may write into it, as ReLU(inplace=True) does.
        outputs.setdefault(name, []).append(first.clone())


def _layout(name: str, shape: tuple[int, ...], crop: tuple[int, int], params: ModuleModel) -> Layout | None:
    """Return the layout of an output of a given shape without the batch, or None if it holds no tokens."""
    match shape:
        case (int(d),) | (1, int(d)) | (int(d), 1, 1):
            return Layout(Hookpoint(d_model=d, special=("pooled",), grid=None), shape, True)
        case (int(n), int(d)):
            grid = params.grid or _square(name, n, d, crop, params)
            n_special = n - grid[0] * grid[1]
            if not 0 <= n_special <= MAX_SPECIAL:
                return None
            special = SPECIAL.get(n_special, ("cls", *("register",) * (n_special - 1)))
            return Layout(Hookpoint(d_model=d, special=special, grid=grid), shape, False)
        case (int(c), int(r), int(q)) if _fits((r, q), crop):
            return Layout(Hookpoint(d_model=c, special=(), grid=(r, q)), shape, True)
        case (int(r), int(q), int(c)) if _fits((r, q), crop):
            return Layout(Hookpoint(d_model=c, special=(), grid=(r, q)), shape, False)
        case _:
            return None


def _square(name: str, n: int, d: int, crop: tuple[int, int], params: ModuleModel) -> tuple[int, int]:
    """Return the grid of a sequence of n tokens: the largest square, if images are square and `SPECIAL` has the number of other tokens."""
    side = math.isqrt(n)
    if crop[0] == crop[1] and n - side**2 in SPECIAL:
        return side, side
    why = f"images are {crop[0]} x {crop[1]}" if crop[0] != crop[1] else f"the largest square, {side} x {side}, leaves {n - side**2}"
    raise ModelError(
        f"extract.model.grid: {params.factory}: sub-module {name} outputs {n} tokens of width {d}, whose grid is not clear ({why}); "
        "set it to [rows, columns] of the patches; sequences of any other length will then not be hookpoints"
    )


def _fits(grid: tuple[int, int], crop: tuple[int, int]) -> bool:
    """Return whether a map can come from images of a given size: their aspect ratios must agree, up to rounding at the borders."""
    if crop[0] == crop[1]:
        return grid[0] == grid[1]
    stride = max(crop[0] / grid[0], crop[1] / grid[1])
    return all(abs(side - pixels / stride) <= 1 for side, pixels in zip(grid, crop, strict=True))


def _pretrained_cfg(module: nn.Module) -> Mapping[str, Any]:
    """Return the `pretrained_cfg` in which timm's models describe their preprocessing, or an empty mapping."""
    cfg = getattr(module, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def make_preprocess(params: ModuleModel, cfg: Mapping[str, Any]) -> Preprocess:
    """Make the preprocessing from the parameters. Those that are null come from `pretrained_cfg`, or else from `IMAGENET`.

    If `resize` is null, the crop is the share `crop_pct` of the resized image, as in timm. The offset of the crop is rounded down here,
    and to the nearest pixel in timm, so that the two can differ by one pixel.

    Args:
        params: Parameters of the model.
        cfg: The module's `pretrained_cfg`.

    Returns:
        The preprocessing.

    Raises:
        ModelError: `cfg` describes something other than a resize followed by a centre crop.
    """
    settings = {**IMAGENET, **{name: cfg[name] for name in IMAGENET if cfg.get(name) is not None}}
    crop = params.crop or tuple(settings["input_size"][-2:])
    interpolation = params.interpolation or settings["interpolation"]
    if interpolation not in ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"):
        raise ModelError(f"{KEY}: {params.factory}: pretrained_cfg says interpolation {interpolation!r}; set extract.model.interpolation")
    resize = params.resize or _resize(crop, settings, params)
    if resize[0] < crop[0] or resize[-1] < crop[1]:
        raise ModelError(f"extract.model.resize: {list(resize)} is smaller than crop {list(crop)}; it must be at least as large")
    return Preprocess(
        resize=resize,
        crop=crop,
        interpolation=cast(Interpolation, interpolation),
        mean=tuple(255 * value for value in params.mean or settings["mean"]),
        std=tuple(255 * value for value in params.std or settings["std"]),
    )


def _resize(crop: tuple[int, int], settings: Mapping[str, Any], params: ModuleModel) -> tuple[int, ...]:
    height, width = (math.floor(side / settings["crop_pct"]) for side in crop)
    match settings["crop_mode"]:
        case "squash":
            return height, width
        case "center" if height == width:
            return (height,)
        case mode:
            raise ModelError(
                f"{KEY}: {params.factory}: the size from which {crop[0]} x {crop[1]} pixels are cropped is not clear (crop_mode {mode!r}); "
                "set extract.model.resize to [shorter side], or to [height, width]"
            )


def make(params: ModuleModel, dtype: Dtype, device: str) -> ModuleVision:
    """Load the model, as `load_model` describes."""
    return ModuleVision(params, dtype, device)
