"""What all families share when the tokens at a hookpoint are replaced, or when an output is differentiated with respect to them."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.vlm import Differentiated, Replacement, Score


def replace_tokens(tokens: Float[Tensor, "batch tokens d_model"], replacement: Replacement) -> Float[Tensor, "batch tokens d_model"]:
    """Call a replacement, without autocast, so that it computes in the dtype of its own weights, and check the shape of its result."""
    with torch.autocast(tokens.device.type, enabled=False):
        new = replacement(tokens)
    assert new.shape == tokens.shape, f"tokens {tuple(new.shape)} cannot take the place of {tuple(tokens.shape)}"
    return new


def differentiate(
    run: Callable[[Replacement], Float32[Tensor, "batch d_output"]], score: Score, replacement: Replacement | None, where: str
) -> Differentiated:
    """Differentiate a score with respect to tokens, as `VisionModel.differentiate` describes.

    Args:
        run: Function that runs the model with the tokens at the hookpoint replaced, and returns the outputs. Its operations after the
            replacement must be known to autograd, and no weight may require a gradient.
        score: The score.
        replacement: The replacement, if any.
        where: Names of the model and the hookpoint, for messages.

    Returns:
        The tokens, the outputs and the gradients.

    Raises:
        ModelError: The output does not depend on the tokens.
    """
    leaves: list[Tensor] = []

    def put_leaf(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            new = tokens if replacement is None else replace_tokens(tokens, replacement)
            # Rounded to the model's dtype, so that the gradient is taken at the tokens with which the model computes.
            leaves.append(new.to(tokens).to(torch.float32, copy=True))
        return leaves[-1].requires_grad_()

    with torch.inference_mode(False), torch.enable_grad():
        outputs = run(put_leaf)
        assert len(leaves) == 1, f"{where}: the tokens were replaced {len(leaves)} times"
        if not outputs.requires_grad:
            raise ModelError(
                f"{where}: the model's output does not depend on these tokens, so it has no gradient; choose a hookpoint from which the "
                "output is computed; a module of your own must compute it without torch.no_grad() and detach()"
            )
        scores = score(outputs)
        assert scores.shape == outputs.shape[:1], f"score gave {tuple(scores.shape)} for outputs {tuple(outputs.shape)}"
        assert scores.requires_grad, "the score cannot be differentiated with respect to the outputs"
        (gradients,) = torch.autograd.grad(scores.sum(), leaves)
    return Differentiated(leaves[0].detach(), outputs.detach(), gradients)
