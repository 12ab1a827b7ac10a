"""Checks that every network must pass before its outputs are used, even if its code comes from transformers or from Ommatid itself.

Whether preprocessing agrees with the model's own image processor is checked where it is read: see `processor`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.vlm import Judge, VisionModel
from ommatid.vlm.preprocess import Preprocess

SHAPES = ((301, 207), (207, 301))
"""Width and height of each test picture. No picture is square, and all sides are odd."""


def structured_picture(width: int, height: int) -> Image.Image:
    """Make a picture in which no two places, directions or channels look alike: three gradients, and edges in three colours."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (1 - x) * (1 - y)], axis=-1)
    row, col = np.indices((height, width))
    for channel, (step, turn) in enumerate(((13, 0), (17, 1), (23, 2))):
        stripe = (row + turn * col) // step % 4
        pixels[..., channel] = np.where(stripe == channel, 1, np.where(stripe == 3, 0, pixels[..., channel]))
    return Image.fromarray((255 * pixels).astype(np.uint8))


PARTS = ((0, 0), (0, 6), (3, 3), (6, 0), (6, 6))
"""Top left corners, in eighths of the picture, of the parts that are changed one at a time. Each part is a quarter of the picture high and
wide."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Relative difference that rounding may cause between outputs for the same image, allowing for TensorFloat-32 on GPUs."""
SEEN = 1e-6
"""Relative difference below which an output counts as unchanged: it is no more than rounding within a batch."""
TEXTS = ("a dog", "a red car in front of a house, seen from above")
Run = Callable[[Tensor], Mapping[str, Tensor]]


def check_model(model: VisionModel, hookpoints: Sequence[str], key: str, dtype: torch.dtype) -> None:
    """Check the activations and image embeddings of a model, as `check` does, and its text embeddings.

    Args:
        model: The model.
        hookpoints: Hookpoints whose activations are checked. If there are none, only embeddings are.
        key: Key of the parameter, such as `extract.model`, for messages.
        dtype: Data type in which the model computes.

    Raises:
        ModelError: An image fails as in `check`; or text embeddings are not finite, not repeatable, depend on the batch, or are the same
            for different texts.
    """

    def run(pixels: Tensor) -> dict[str, Tensor]:
        captured = model.capture(pixels, tuple(hookpoints))
        tokens = {f"the activations at {name}": x for name, x in captured.tokens.items()}
        return tokens if captured.embedding is None else tokens | {"the image embedding": captured.embedding[:, None]}

    where = f"{key}: {model.name}"
    check(run, model.preprocess, where, dtype)
    if model.d_embed is not None:
        _check_texts(model.embed_text, where, dtype)


def check_judge(judge: Judge, key: str, dtype: torch.dtype) -> None:
    """Check the embeddings of a judge, as `check` does.

    Raises:
        ModelError: As for `check`.
    """
    check(lambda pixels: {"the embedding": judge.embed(pixels)[:, None]}, judge.preprocess, f"{key}: {judge.name}", dtype)


def check(run: Run, preprocess: Preprocess, where: str, dtype: torch.dtype) -> None:
    """Check a network on one picture, alone and in a batch with variants of it; it runs on eight images in all.

    Args:
        run: Function from uint8 pixels `(images, H, W, 3)` to outputs `(images, tokens, width)`, by their description.
        preprocess: Preprocessing of the network.
        where: Beginning of messages: the key, and the name of the network.
        dtype: Data type in which the network computes.

    Raises:
        ModelError: An output is not finite, differs between two passes, differs between an image alone and the same image in a batch, or
            does not depend on some part of the picture.
    """
    pixels = _pictures(preprocess)
    with _model_errors(f"{where}: fails on a picture"):
        alone, batch = run(pixels[:1]), run(pixels)
    for name, vectors in batch.items():
        what = f"{where}: {name}"
        if not (vectors.isfinite().all() and alone[name].isfinite().all()):
            raise ModelError(f"{what}: NaN or infinity for a test picture; set extract.dtype to float32, or use another model")
        _compare(lambda name=name: run(pixels[:1])[name], alone[name], vectors[:1], what, dtype)
        _check_sight(vectors, preprocess.crop, what)


@contextmanager
def _model_errors(what: str) -> Iterator[None]:
    """Turn every error of a model's code inside the block into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # The model's code may raise anything.
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{what}: {type(error).__name__}: {reason}; does its configuration fit its weights?") from error


def _pictures(preprocess: Preprocess) -> Tensor:
    """Return a preprocessed picture, copies with one part each in inverted colours, and a black picture.

    The black picture changes any statistics that a network takes over the batch.
    """
    plain = preprocess(structured_picture(*SHAPES[0]))
    pictures = [plain]
    for top, bottom, left, right in _parts(plain.shape[:2]):
        changed = plain.copy()
        changed[top:bottom, left:right] = 255 - changed[top:bottom, left:right]
        pictures.append(changed)
    return torch.from_numpy(np.stack([*pictures, np.zeros_like(plain)]))


def _parts(shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Return top, bottom, left and right of each part."""
    (height, width), n = shape, 8
    return [(top * height // n, (top + 2) * height // n, left * width // n, (left + 2) * width // n) for top, left in PARTS]


def _compare(run: Callable[[], Tensor], alone: Tensor, in_batch: Tensor, where: str, dtype: torch.dtype) -> None:
    """Check that an input gave the same output alone and in a batch. If not, running it alone again shows the cause."""
    difference = _difference(in_batch, alone)
    if difference <= TOLERANCES[dtype]:
        return
    if _difference(run(), alone) > TOLERANCES[dtype]:
        raise ModelError(
            f"{where}: two passes over the same input differ by {difference:.2g} of their norm: something in the model is random in every "
            "pass, such as masks or a dropout that eval() does not switch off; switch it off, or use another model"
        )
    raise ModelError(
        f"{where}: outputs for the same input alone and in a batch differ by {difference:.2g} of their norm: the inputs of a batch "
        "influence one another, for example through a batch norm that uses the statistics of the batch; switch it off, or use another model"
    )


def _check_sight(vectors: Tensor, shape: tuple[int, int], where: str) -> None:
    for changed, (top, bottom, left, right) in zip(vectors[1:-1], _parts(shape), strict=True):
        if _difference(changed, vectors[0]) <= SEEN:
            raise ModelError(
                f"{where}: unaffected by rows {top} to {bottom} and columns {left} to {right} of the {shape[0]} x {shape[1]} input "
                "pixels; a model must see the whole picture: use another model, or another hookpoint"
            )


def _check_texts(embed: Callable[[Sequence[str]], Tensor], where: str, dtype: torch.dtype) -> None:
    with _model_errors(f"{where}: fails on a text"):
        first, both = embed(TEXTS[:1])[:, None], embed(TEXTS)[:, None]
    if not both.isfinite().all():
        raise ModelError(f"{where}: the embedding of a text contains NaN or infinity; use another model, or another extract.namer")
    _compare(lambda: embed(TEXTS[:1])[:, None], first, both[:1], f"{where}: the embedding of a text", dtype)
    if _difference(both[0], both[1]) <= SEEN:
        raise ModelError(
            f"{where}: the texts {TEXTS[0]!r} and {TEXTS[1]!r} have the same embedding; does the tokenizer belong to this model? use "
            "another extract.namer"
        )


def _difference(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> float:
    """Return the largest distance of a vector of x from that of y, relative to y's norm, or to the RMS of y's norms if that is larger."""
    x, y = x.double(), y.double()
    lengths = y.norm(dim=-1)
    scale = torch.maximum(lengths, lengths.square().mean().sqrt()).clamp_min(1e-300)
    return float(((x - y).norm(dim=-1) / scale).max())
