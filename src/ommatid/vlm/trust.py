"""Trust: what is asked of every network before its numbers are believed, whatever family or code it is of.

That preprocessing is the model's own is asked where it is read: see `processor`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.vlm import Judge, VisionModel
from ommatid.vlm.preprocess import Preprocess

SHAPES = ((301, 207), (207, 301))
"""Width and height of pictures that are neither square nor even."""


def structured_picture(width: int, height: int) -> Image.Image:
    """A picture in which no two places, directions or channels look alike: three gradients, and edges in three colours."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (1 - x) * (1 - y)], axis=-1)
    row, col = np.indices((height, width))
    for channel, (step, turn) in enumerate(((13, 0), (17, 1), (23, 2))):
        stripe = (row + turn * col) // step % 4
        pixels[..., channel] = np.where(stripe == channel, 1, np.where(stripe == 3, 0, pixels[..., channel]))
    return Image.fromarray((255 * pixels).astype(np.uint8))


PARTS = ((0, 0), (0, 6), (3, 3), (6, 0), (6, 6))
"""Where the parts of a picture begin that are changed one at a time, top and left in eighths; each is a quarter high and wide."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""What rounding makes of one vector in another batch, relative to its length; TensorFloat-32, which GPUs take for float32, included."""
SEEN = 1e-6
"""A vector that changes by less, relatively, is the same but for rounding in a batch."""
TEXTS = ("a dog", "a red car in front of a house, seen from above")
Run = Callable[[Tensor], Mapping[str, Tensor]]


def check_model(model: VisionModel, hookpoints: Sequence[str], key: str, dtype: torch.dtype) -> None:
    """Ask of a model what `check` does, at hookpoints and of its image embedding, and then of its texts.

    Args:
        model: Loaded.
        hookpoints: Those whose activations are wanted; none for the embedding alone.
        key: Where it is written, such as `extract.model`.
        dtype: What it computes in.

    Raises:
        ModelError: as `check` says; or texts do as images must not.
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
    """Ask of a judge what `check` does.

    Raises:
        ModelError: as `check` says.
    """
    check(lambda pixels: {"the embedding": judge.embed(pixels)[:, None]}, judge.preprocess, f"{key}: {judge.name}", dtype)


def check(run: Run, preprocess: Preprocess, where: str, dtype: torch.dtype) -> None:
    """Look at what a network makes of one picture, and of others that differ from it in one part each: eight images are run.

    Args:
        run: From uint8 pixels (images, H, W, 3) to vectors by what they are, each (images, tokens, width).
        preprocess: What makes its pixels.
        where: What the errors begin with: the key, and the network's name.
        dtype: What it computes in.

    Raises:
        ModelError: numbers are not finite, two passes differ, an image alone differs from the same image in a batch, or a part of the
            picture changes nothing.
    """
    pixels = _pictures(preprocess)
    with _running(f"{where}: fails on a picture"):
        alone, batch = run(pixels[:1]), run(pixels)
    for name, vectors in batch.items():
        what = f"{where}: {name}"
        if not (vectors.isfinite().all() and alone[name].isfinite().all()):
            raise ModelError(f"{what}: NaN or infinity for a plain picture; set extract.dtype to float32, or use another model")
        _compare(lambda name=name: run(pixels[:1])[name], alone[name], vectors[:1], what, dtype)
        _check_sight(vectors, preprocess.crop, what)


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Every error of a model's code becomes ours."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the model's code: whatever it raises
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{what}: {type(error).__name__}: {reason}; is its configuration that of its weights?") from error


def _pictures(preprocess: Preprocess) -> Tensor:
    """A picture as preprocessing makes it; the same with one of its parts in the opposite colours, for each part; and a black one.

    The black one moves whatever is taken over a batch.
    """
    plain = preprocess(structured_picture(*SHAPES[0]))
    pictures = [plain]
    for top, bottom, left, right in _parts(plain.shape[:2]):
        changed = plain.copy()
        changed[top:bottom, left:right] = 255 - changed[top:bottom, left:right]
        pictures.append(changed)
    return torch.from_numpy(np.stack([*pictures, np.zeros_like(plain)]))


def _parts(shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Top, bottom, left and right of each part."""
    (height, width), n = shape, 8
    return [(top * height // n, (top + 2) * height // n, left * width // n, (left + 2) * width // n) for top, left in PARTS]


def _compare(run: Callable[[], Tensor], alone: Tensor, in_batch: Tensor, where: str, dtype: torch.dtype) -> None:
    """Whether two passes gave the same; what `run` gives in a third, over the first's input, tells why not."""
    difference = _difference(in_batch, alone)
    if difference <= TOLERANCES[dtype]:
        return
    if _difference(run(), alone) > TOLERANCES[dtype]:
        raise ModelError(
            f"{where}: two passes over the same input differ by {difference:.2g} of their length: something in the model is drawn anew in "
            "every pass, such as masks or a dropout that eval() does not switch off; switch it off, or use another model"
        )
    raise ModelError(
        f"{where}: the same input alone and in a batch differs by {difference:.2g} of its length: the entries of a batch mix, as by a "
        "batch norm that takes the statistics of the batch; switch it off, or use another model"
    )


def _check_sight(vectors: Tensor, shape: tuple[int, int], where: str) -> None:
    for changed, (top, bottom, left, right) in zip(vectors[1:-1], _parts(shape), strict=True):
        if _difference(changed, vectors[0]) <= SEEN:
            raise ModelError(
                f"{where}: the same whatever stands in rows {top} to {bottom} and columns {left} to {right} of the "
                f"{shape[0]} x {shape[1]} pixels that it gets; a model must see the whole picture: use another, or another hookpoint"
            )


def _check_texts(embed: Callable[[Sequence[str]], Tensor], where: str, dtype: torch.dtype) -> None:
    with _running(f"{where}: fails on a text"):
        first, both = embed(TEXTS[:1])[:, None], embed(TEXTS)[:, None]
    if not both.isfinite().all():
        raise ModelError(f"{where}: the embedding of a text has NaN or infinity; use another model, or another extract.namer")
    _compare(lambda: embed(TEXTS[:1])[:, None], first, both[:1], f"{where}: the embedding of a text", dtype)
    if _difference(both[0], both[1]) <= SEEN:
        raise ModelError(
            f"{where}: the texts {TEXTS[0]!r} and {TEXTS[1]!r} have the same embedding; is the tokenizer of this model? use another "
            "extract.namer"
        )


def _difference(x: Tensor, y: Tensor) -> float:
    """The largest distance of two vectors, relative to the length of the second or of all of them together, whichever is larger."""
    x, y = x.double(), y.double()
    lengths = y.norm(dim=-1)
    scale = torch.maximum(lengths, lengths.square().mean().sqrt()).clamp_min(1e-300)
    return float(((x - y).norm(dim=-1) / scale).max())
