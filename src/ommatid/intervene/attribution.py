"""Attribution: how much each latent contributes to an output of the model, and where in the image.

An output m is a number per image that a `Score` computes from the model's embedding or final features: the similarity to one text minus
that to another, log-odds, a logit. The activation of a latent at a later hookpoint can be an output, too. Three effects of latent k on m
are defined here. c_k are its activations, d_k is its direction, and sums are over the kept tokens of the image:

exact: m(x) − m(x − c_k d_k), by ablation. Only latents that fire are ablated: the effect of others is 0.
cheap: Σ c_k (∂m/∂x · d_k), the first-order estimate of the exact effect. One backward pass serves all latents.
integrated: Σ c_k (g · d_k), where g is the mean of ∂m/∂x along the straight line from a baseline to x (integrated gradients, Sundararajan,
    Taly and Yan 2017, arXiv 1703.01365), taken at the midpoints of n steps.

The baseline x₀ is x without the contributions of all latents, x − Σ_k c_k d_k, which keeps the SAE's error and bias; or a given vector,
such as the mean activation, at every kept token. With the error e = x − x̂ and x̂ = Σ_k c_k d_k + b_dec, the line from x₀ to x has the
direction Σ_k c_k d_k, or Σ_k c_k d_k + e + (b_dec − x₀). Completeness is the identity

    Σ_k effect of latent k + effect of the error + effect of the bias = m(x) − m(x₀),

in which the last two effects are those of e and b_dec − x₀, and 0 for the first baseline. It holds exactly for cheap effects if m is affine
in the tokens; for integrated effects if m is at most quadratic along the line, and otherwise up to the error of the midpoint rule, which
falls with the square of the number of steps. m must be continuous along the line: the embedding of `lite` jumps where another class comes
among the ten likeliest, so its integrated effects do not add up, whatever the number of steps. In general exact effects do not add up
either, because latents interact.

Memory: entries, the pairs of a token and a latent that fires on it, are stored sparsely; beside them, one matrix (b, s) and the model's own
passes. A matrix of tokens x latents is only made in chunks of at most ENTRIES values. Nothing grows with the number of batches.

Suffixes: b images of a batch, t tokens of the model, k kept tokens, d d_model, s latents, n entries or chosen latents.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.intervals import Z, spearman_interval
from ommatid.compute.nonzero import true_at
from ommatid.errors import InputError, ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.metrics import Interval, ablation_sparsity, rank_correlation
from ommatid.sae.entries import Levels, Sparse
from ommatid.sae.model import SAE
from ommatid.vlm import Replacement, Score, VisionModel

ENTRIES = 2**22
"""Largest number of activations, tokens x latents, that are computed at once."""
VALUES = 2**24
"""Approximate number of values of the outputs of one call of `splice`, which are held together: 64 MiB in float32."""
TRUSTED = 0.8
"""Smallest lower end of the interval of a rank correlation with exact effects at which latents may be ordered by an estimate."""
TOLERATED = 0.05
"""Largest gap in the completeness identity that is not warned of, as a share of the difference from the baseline."""


def similarity(text_d: Float[Tensor, " d"], against_d: Float[Tensor, " d"] | None = None) -> Score:
    """Return the score cos(image, text) − cos(image, against), or the first term alone, given the embeddings of texts, `(d,)` each."""
    direction = normalize(text_d, dim=0) - (0 if against_d is None else normalize(against_d, dim=0))
    return lambda outputs: normalize(outputs, dim=1) @ direction.to(outputs)


def class_log_odds(texts_cd: Float[Tensor, "classes d"], index: int, scale: float) -> Score:
    """Return the score log(p / (1 − p)), where p is the probability of a class by a softmax over scale · cosine of image and text.

    Args:
        texts_cd: Embedding of each class's text, `(classes, d)`; two or more classes.
        index: The class.
        scale: The model's logit scale, or one from `metrics.fit_scale`.

    Returns:
        The score.
    """
    rivals = [other for other in range(len(texts_cd)) if other != index]

    def score(outputs: Tensor) -> Tensor:
        logits = scale * normalize(outputs, dim=1) @ normalize(texts_cd, dim=1).to(outputs).T
        return logits[:, index] - logits[:, rivals].logsumexp(1)

    return score


def activation(sae: SAE, reads: TokenPicker, latent: int) -> Score:
    """Return the score Σ c_j over kept tokens, for effects of latents on a latent j at a later hookpoint.

    Args:
        sae: The SAE of the later hookpoint.
        reads: Tokens that it encodes; their hookpoint is the `output` of the `Attributor`.
        latent: The latent j.

    Returns:
        The score, whose gradient is 0 where the latent is silent: cheap effects do not say what would make it fire there.
    """
    index = torch.tensor([latent], device=sae.W_enc.device)

    def score(tokens_btd: Tensor) -> Tensor:
        kept_bkd = reads.pick(tokens_btd).to(sae.W_enc)
        return sae.encode_latents(kept_bkd.flatten(0, 1), index).view(kept_bkd.shape[:2]).sum(1)

    return score


@dataclass(frozen=True)
class Code:
    """The latents that fire on each kept token of a batch of images."""

    n_images: int
    """Number of images."""
    entries: Sparse
    """Pairs of token and latent, with the activation as value; tokens are numbered through the batch, image by image."""

    @property
    def n_kept(self) -> int:
        """Number of kept tokens per image."""
        return self.entries.n_tokens // self.n_images

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return self.entries.levels.bounds[-1]

    @property
    def firing(self) -> Int[Tensor, " latents"]:
        """The latents that fire on any token of the batch, ascending, `(n,)` int64."""
        return self.entries.latents.unique()

    def by_image(self, values_n: Float[Tensor, " entries"]) -> Float[Tensor, "images latents"]:
        """Sum values of entries, `(n,)`, over each image's tokens, `(b, s)`."""
        places = self.entries.rows // self.n_kept * self.n_latents + self.entries.latents
        return values_n.new_zeros(self.n_images * self.n_latents).index_add_(0, places, values_n).view(self.n_images, -1)

    def maps(self, values_n: Float[Tensor, " entries"], latents: Sequence[int]) -> Float[Tensor, "images kept chosen"]:
        """Spread values of entries, `(n,)`, over the kept tokens, for chosen latents, `(b, k, chosen)`; 0 where a latent is silent.

        Raises:
            InputError: A latent does not exist, or is named twice.
        """
        place = _places(latents, self.n_latents, values_n.device)[self.entries.latents]
        is_chosen = place >= 0
        flat = values_n.new_zeros(self.entries.n_tokens * len(latents))
        flat[self.entries.rows[is_chosen] * len(latents) + place[is_chosen]] = values_n[is_chosen]
        return flat.view(self.n_images, self.n_kept, len(latents))


def _places(latents: Sequence[int], n_latents: int, device: torch.device) -> Int[Tensor, " d_sae"]:
    """Return the place of each latent of an SAE in a list of chosen ones, `(s,)`; −1 for those that are not chosen."""
    if wrong := [latent for latent in latents if not 0 <= latent < n_latents]:
        raise InputError(f"latent {wrong[0]}: the SAE has {n_latents} latents, 0 to {n_latents - 1}; name only these")
    if len(set(latents)) < len(latents):
        twice = next(latent for latent in latents if list(latents).count(latent) > 1)
        raise InputError(f"latent {twice}: named twice; name each latent once")
    place = torch.full((n_latents,), -1, device=device)
    place[torch.tensor(list(latents), dtype=torch.int64, device=device)] = torch.arange(len(latents), device=device)
    return place


@dataclass(frozen=True)
class Attribution:
    """Cheap or integrated effects of all latents on one output, for a batch of images."""

    code: Code
    """The latents that fire."""
    effects_n: Float[Tensor, " entries"]
    """Effect of each entry of the code, `(n,)`."""
    error_b: Float[Tensor, " images"]
    """Effect of the SAE's error, `(b,)`; 0 if the baseline has it too."""
    bias_b: Float[Tensor, " images"]
    """Effect of the SAE's bias minus the baseline, `(b,)`; 0 if the baseline has the bias too."""
    baseline_d: Float[Tensor, " d"] | None
    """Vector at every kept token of the baseline, `(d,)`; None if the baseline is x without the contributions of all latents."""
    gradient_bd: Float[Tensor, "images d"]
    """Gradient of the output, summed over kept tokens, `(b, d)`."""

    @cached_property
    def by_image(self) -> Float[Tensor, "images latents"]:
        """Effect of each latent on each image, `(b, s)`; 0 where it is silent."""
        return self.code.by_image(self.effects_n)

    def maps(self, latents: Sequence[int]) -> Float[Tensor, "images kept chosen"]:
        """Return the effects of chosen latents by kept token, `(b, k, chosen)`: where in the image they contribute.

        Kept tokens are in the order of `TokenPicker.places`. The sum over tokens is the latent's effect on the image.

        Raises:
            InputError: A latent does not exist, or is named twice.
        """
        return self.code.maps(self.effects_n, latents)


@dataclass(frozen=True)
class Completeness:
    """The two sides of the completeness identity, for each image of a batch: see the module."""

    latents_b: Float[Tensor, " images"]
    """Sum of the effects of all latents, `(b,)`."""
    error_b: Float[Tensor, " images"]
    """Effect of the SAE's error, `(b,)`."""
    bias_b: Float[Tensor, " images"]
    """Effect of the SAE's bias minus the baseline, `(b,)`."""
    plain_b: Float[Tensor, " images"]
    """Output of the plain model, `(b,)`."""
    baseline_b: Float[Tensor, " images"]
    """Output at the baseline, `(b,)`."""

    @property
    def effects_b(self) -> Float[Tensor, " images"]:
        """Left side: the sum of all effects, `(b,)`."""
        return self.latents_b + self.error_b + self.bias_b

    @property
    def difference_b(self) -> Float[Tensor, " images"]:
        """Right side: the output of the plain model minus that at the baseline, `(b,)`."""
        return self.plain_b - self.baseline_b

    @property
    def gap(self) -> float:
        """Largest distance between the two sides over images."""
        return float((self.effects_b - self.difference_b).abs().max())


@dataclass(frozen=True)
class Attributor:
    """Computes effects of an SAE's latents on outputs of the model.

    The SAE's dtype and device are those of effects and of everything that is computed outside the model.

    Raises:
        ModelError: The SAE does not fit the hookpoints, or tokens are pooled, so that they cannot be replaced.
    """

    model: VisionModel
    """The explained model."""
    sae: SAE
    """The SAE."""
    reads: TokenPicker
    """Tokens that are encoded."""
    writes: TokenPicker
    """Tokens from which contributions are removed: those that are encoded, except for a transcoder."""
    output: str | None = None
    """A later hookpoint, whose tokens are given to scores; None gives them the model's output."""

    def __post_init__(self) -> None:
        for picker, what, width in ((self.reads, "encodes", self.sae.d_model), (self.writes, "decodes", self.sae.d_out)):
            if picker.hookpoint.d_model != width:
                raise ModelError(
                    f"{picker.name}: activations of {self.model.name} have {picker.hookpoint.d_model} numbers there, and the SAE {what} "
                    f"{width}: use an SAE of this hookpoint"
                )
        if len(self.reads.places) != len(self.writes.places):
            raise ModelError(
                f"{self.reads.name} has {len(self.reads.places)} kept tokens, and {self.writes.name} {len(self.writes.places)}: a "
                "transcoder needs the same number at both"
            )
        blank = torch.zeros(1, self.writes.hookpoint.n_tokens, self.writes.hookpoint.d_model)
        self.writes.put(blank, self.writes.pick(blank))

    def encode(self, pixels: UInt8[Tensor, "images height width 3"]) -> Code:
        """Return the latents that fire on images, uint8 pixels `(b, H, W, 3)`; takes one forward pass as far as the hookpoint.

        Raises:
            InputError: There are no images.
        """
        self._check(pixels, None)
        return self._encode(self.reads.pick(self.model.capture(pixels, [self.reads.name]).tokens[self.reads.name]))

    def cheap(
        self,
        pixels: UInt8[Tensor, "images height width 3"],
        score: Score,
        code: Code | None = None,
        baseline_d: Float[Tensor, " d"] | None = None,
    ) -> Attribution:
        """Compute cheap effects of all latents by one forward and one backward pass.

        Args:
            pixels: uint8 pixels `(b, H, W, 3)`.
            score: The output.
            code: The latents that fire on these images, if they are known already.
            baseline_d: Vector at every kept token of the baseline, `(d,)`, or None: see the module. The effects of latents are the same
                for every baseline.

        Returns:
            The effects.

        Raises:
            InputError: There are no images, or the code is not of these.
        """
        code = self._check(pixels, code)
        found = self.model.differentiate(pixels, self.writes.name, score, read=self.output)
        code = code or self._code_of(pixels, found.tokens)
        return self._attribution(code, self.writes.pick(found.tokens), self.writes.pick(found.gradients), baseline_d)

    def integrated(
        self,
        pixels: UInt8[Tensor, "images height width 3"],
        score: Score,
        n_steps: int = 10,
        code: Code | None = None,
        baseline_d: Float[Tensor, " d"] | None = None,
    ) -> Attribution:
        """Compute integrated effects of all latents by a forward and a backward pass for each step.

        Args:
            pixels: uint8 pixels `(b, H, W, 3)`.
            score: The output.
            n_steps: Number of steps from the baseline to the tokens, 1 or more.
            code: The latents that fire on these images, if they are known already.
            baseline_d: Vector at every kept token of the baseline, `(d,)`, or None: see the module.

        Returns:
            The effects.

        Raises:
            InputError: The number of steps is below 1, there are no images, or the code is not of these.
        """
        if n_steps < 1:
            raise InputError(f"n_steps {n_steps}: must be 1 or more; 10 is usual")
        code = self._check(pixels, code)
        x = self.model.capture(pixels, [self.writes.name]).tokens[self.writes.name]
        code = code or self._code_of(pixels, x)
        x_bkd = self._cast(self.writes.pick(x))
        away_bkd = x_bkd - self._baseline(code, x_bkd, baseline_d)
        mean_bkd = torch.zeros_like(x_bkd)
        for step in range(n_steps):
            left = 1 - (step + 0.5) / n_steps
            found = self.model.differentiate(pixels, self.writes.name, score, self._shifted(-left * away_bkd), self.output)
            mean_bkd += self._cast(self.writes.pick(found.gradients))
        return self._attribution(code, x_bkd, mean_bkd.div_(n_steps), baseline_d)

    def exact(
        self, pixels: UInt8[Tensor, "images height width 3"], score: Score, latents: Sequence[int], code: Code | None = None
    ) -> Float[Tensor, "images chosen"]:
        """Compute exact effects of chosen latents by ablation.

        Each replaced pass ablates one latent of each image, and another one in each image, so that the number of passes is the largest
        number of chosen latents that fire on one image. The layers before the hookpoint run once for as many passes as VALUES allows.

        Args:
            pixels: uint8 pixels `(b, H, W, 3)`.
            score: The output.
            latents: The latents; those that are silent on an image have no effect on it.
            code: The latents that fire on these images, if they are known already.

        Returns:
            The effects, `(b, chosen)`.

        Raises:
            InputError: A latent does not exist or is named twice, there are no images, or the code is not of these.
        """
        code = self._check(pixels, code) or self.encode(pixels)
        turns, n = _turns(code, latents), max(1, VALUES // (len(pixels) * self._width))
        effects = torch.zeros(code.n_images, len(latents), dtype=self.sae.W_dec.dtype, device=self.sae.W_dec.device)
        for first in range(0, len(turns), n):
            now = turns[first : first + n]
            plain, *ablated = self._scores(pixels, score, [_same, *(self._removing(code, turn.removed) for turn in now)])
            for turn, scores in zip(now, ablated, strict=True):
                effects[turn.images, turn.columns] = (plain - scores)[turn.images]
        return effects

    def from_means(self, attribution: Attribution, means_s: Float[Tensor, " latents"]) -> Float[Tensor, "images latents"]:
        """Return effects by which latents differ from given activations instead of from silence: Σ (c_k − means_k) (∂m/∂x · d_k), `(b, s)`.

        Args:
            attribution: Cheap or integrated effects.
            means_s: Activation of each latent on every kept token, such as its mean, `(s,)`.
        """
        return attribution.by_image - means_s.to(self.sae.W_dec) * (attribution.gradient_bd @ self.sae.W_dec.T)

    def completeness(self, pixels: UInt8[Tensor, "images height width 3"], score: Score, attribution: Attribution) -> Completeness:
        """Compute both sides of the completeness identity of cheap or integrated effects.

        Args:
            pixels: The images of the effects, `(b, H, W, 3)`.
            score: The output of the effects.
            attribution: The effects; their baseline is used.

        Returns:
            Both sides; the module says when they are equal.

        Raises:
            InputError: There are no images, or the effects are not of these.
        """
        code = attribution.code
        self._check(pixels, code)

        def at_baseline(tokens: Tensor) -> Tensor:
            x_bkd = self._cast(self.writes.pick(tokens))
            return self.writes.put(tokens, self._baseline(code, x_bkd, attribution.baseline_d))

        plain, baseline = self._scores(pixels, score, [_same, at_baseline])
        of_latents = attribution.effects_n.new_zeros(code.n_images)
        of_latents.index_add_(0, code.entries.rows // code.n_kept, attribution.effects_n)
        return Completeness(of_latents, attribution.error_b, attribution.bias_b, plain, baseline)

    @property
    def _width(self) -> int:
        """Number of values of the output of one image."""
        later = self.model.hookpoints[self.output] if self.output else None
        return later.n_tokens * later.d_model if later else self.model.d_output

    def _check(self, pixels: Tensor, code: Code | None) -> Code | None:
        if not len(pixels):
            raise InputError("pixels: there are no images; give one or more")
        expected = len(pixels), len(self.reads.places), self.sae.n_latents
        if code and (found := (code.n_images, code.n_kept, code.n_latents)) != expected:
            sizes = (f"{images} images, {kept} tokens and {latents} latents" for images, kept, latents in (found, expected))
            raise InputError("code: is of {}, and here are {}; give the code of these images".format(*sizes))
        return code

    def _code_of(self, pixels: Tensor, written_btd: Tensor) -> Code:
        """Return the code of images, given all tokens at the hookpoint that is written, which is usually the one that is read."""
        return self._encode(self.reads.pick(written_btd)) if self.reads == self.writes else self.encode(pixels)

    def _encode(self, x_bkd: Float[Tensor, "images kept d_model"]) -> Code:
        x_nd, s = x_bkd.to(self.sae.W_enc).flatten(0, 1), self.sae.n_latents
        per_chunk = max(1, ENTRIES // s)
        chunks = [_positive(self.sae.encode(rows)) for rows in x_nd.split(per_chunk)]
        places = torch.cat([at + i * per_chunk * s for i, (at, _) in enumerate(chunks)])
        values = torch.cat([acts for _, acts in chunks])
        return Code(len(x_bkd), Sparse(len(x_nd), Levels((s,), x_nd.device), places // s, places % s, values))

    def _attribution(self, code: Code, x_bkd: Tensor, gradients_bkd: Tensor, baseline_d: Tensor | None) -> Attribution:
        """Multiply the contributions of latents, error and bias with gradients, given the kept tokens, `(b, k, d)` each."""
        x_bkd, gradients_bkd = self._cast(x_bkd), self._cast(gradients_bkd)
        slopes_n = code.entries.product(gradients_bkd.flatten(0, 1)[:, None], self.sae.W_dec)
        error_b = bias_b = x_bkd.new_zeros(code.n_images)
        if baseline_d is not None:
            x_hat_bkd = self._contributions(code) + self.sae.b_dec
            error_b = (gradients_bkd * (x_bkd - x_hat_bkd)).sum((1, 2))
            bias_b = gradients_bkd.sum(1) @ (self.sae.b_dec - self._cast(baseline_d))
        return Attribution(code, code.entries.values * slopes_n, error_b, bias_b, baseline_d, gradients_bkd.sum(1))

    def _baseline(self, code: Code, x_bkd: Tensor, baseline_d: Tensor | None) -> Tensor:
        """Return the kept tokens of the baseline, `(b, k, d)`."""
        return x_bkd - self._contributions(code) if baseline_d is None else self._cast(baseline_d).expand_as(x_bkd)

    def _contributions(self, code: Code) -> Float[Tensor, "images kept d_out"]:
        """Return the sum of the contributions of all latents, Σ_k c_k d_k, `(b, k, d)`."""
        return code.entries.decode(code.entries.values, self.sae.W_dec)[:, 0].view(code.n_images, code.n_kept, -1)

    def _removing(self, code: Code, at: Int[Tensor, " removed"]) -> Replacement:
        """Return the replacement that removes the contributions of some entries, by their places in the code."""

        def remove(tokens: Tensor) -> Tensor:
            x_bkd = self._cast(self.writes.pick(tokens))
            removed = code.entries.values[at, None] * self.sae.W_dec[code.entries.latents[at]]
            return self.writes.put(tokens, x_bkd.flatten(0, 1).index_add(0, code.entries.rows[at], removed, alpha=-1).view(x_bkd.shape))

        return remove

    def _shifted(self, shift_bkd: Float[Tensor, "images kept d_out"]) -> Replacement:
        """Return the replacement that adds a vector to each kept token, `(b, k, d)`."""
        return lambda tokens: self.writes.put(tokens, self._cast(self.writes.pick(tokens)) + shift_bkd)

    def _scores(self, pixels: Tensor, score: Score, replacements: Sequence[Replacement]) -> list[Float[Tensor, " images"]]:
        """Return the output of each image under each replacement, `(b,)` each."""
        return [self._cast(score(outputs)) for outputs in self.model.splice(pixels, self.writes.name, replacements, self.output)]

    def _cast(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return values.to(self.sae.W_dec)


def _same(tokens: Tensor) -> Tensor:
    return tokens


def _positive(acts_bs: Float[Tensor, "rows latents"]) -> tuple[Int[Tensor, " firings"], Float[Tensor, " firings"]]:
    """Return the flat places of positive activations, ascending, and their values, `(n,)` each."""
    at = true_at(acts_bs > 0)
    return at, acts_bs.flatten()[at]


@dataclass(frozen=True)
class _Turn:
    """A turn in which one of the chosen latents that fire on an image is ablated, on each image that has any left."""

    removed: Int[Tensor, " removed"]
    """Places in the code of the entries that are removed, `(n,)`."""
    images: Int[Tensor, " ablated"]
    """Images on which a latent is ablated, `(n,)`."""
    columns: Int[Tensor, " ablated"]
    """Place of each of these latents among the chosen ones, `(n,)`."""


def _turns(code: Code, latents: Sequence[int]) -> list[_Turn]:
    """Arrange the ablations of chosen latents in as few turns as possible."""
    places = _places(latents, code.n_latents, code.entries.latents.device)[code.entries.latents]
    chosen, n = (places >= 0).nonzero()[:, 0], max(1, len(latents))
    pairs, pair_of = torch.unique(code.entries.rows[chosen] // code.n_kept * n + places[chosen], return_inverse=True)
    images, columns = pairs // n, pairs % n
    turn = torch.arange(len(pairs), device=pairs.device) - torch.searchsorted(images, images)
    parts = (_split(values, by) for values, by in ((chosen, turn[pair_of]), (images, turn), (columns, turn)))
    return [_Turn(*part) for part in zip(*parts, strict=True)]


def _split(values: Int[Tensor, " n"], turn: Int[Tensor, " n"]) -> tuple[Tensor, ...]:
    """Split values into those of each turn, in their order."""
    return values[turn.argsort(stable=True)].split(turn.bincount().tolist()) if len(values) else ()


class MeanEffects(Accumulator):
    """Accumulates the mean effect of each latent over images, on each of which it may be silent."""

    STATE = ("n", "sum", "squares", "magnitude")

    def __init__(self, n_latents: int) -> None:
        self.n = 0
        """Number of images."""
        self.sum = torch.zeros(n_latents, dtype=torch.float64)
        """Sum of effects over images, `(latents,)`."""
        self.squares = torch.zeros(n_latents, dtype=torch.float64)
        """Sum of squared effects, `(latents,)`."""
        self.magnitude = torch.zeros(n_latents, dtype=torch.float64)
        """Sum of absolute effects, `(latents,)`."""

    def add(self, effects_bn: Float[Tensor, "images latents"]) -> None:
        """Add the effects on some images, `(b, latents)`."""
        effects = effects_bn.cpu()
        self.n += len(effects)
        self.sum += effects.sum(0, dtype=torch.float64)
        self.squares += effects.square().sum(0, dtype=torch.float64)
        self.magnitude += effects.abs().sum(0, dtype=torch.float64)

    @property
    def mean(self) -> Float64[Tensor, " latents"]:
        """Mean effect over all images, `(latents,)`; NaN if there are none."""
        return self.sum / self.n

    @property
    def mean_magnitude(self) -> Float64[Tensor, " latents"]:
        """Mean absolute effect over all images, `(latents,)`; NaN if there are none."""
        return self.magnitude / self.n

    @property
    def half_width(self) -> Float64[Tensor, " latents"]:
        """Half the width of the 95 % interval of each mean by the central limit theorem, `(latents,)`; NaN for fewer than two images."""
        variance = (self.squares - self.sum.square() / self.n).clamp_min(0) / (self.n - 1 or math.nan)
        return Z * (variance / self.n).sqrt()


@dataclass(frozen=True)
class Agreement:
    """Agreement of estimated effects with exact ones."""

    n_latents: int
    """Number of latents compared: those whose effect is not 0 by either method."""
    correlation: Interval
    """Spearman's rank correlation over latents, with its 95 % interval (Bonett and Wright 2000); NaN where it is undefined."""
    note: str
    """What to do if the agreement is low or not known; empty if it is high."""

    @property
    def is_low(self) -> bool:
        """Whether latents should not be ordered by the estimate: the interval does not lie above TRUSTED."""
        return not self.correlation.low >= TRUSTED


def agreement(estimated_n: Float[Tensor, " latents"], exact_n: Float[Tensor, " latents"], output: str, method: str) -> Agreement:
    """Compare the order of latents by estimated effects with that by exact effects.

    Args:
        estimated_n: Effect of each latent by an estimate, `(n,)`: on one image, or the mean over images.
        exact_n: Exact effects of the same latents, `(n,)`.
        output: Name of the output, for the note.
        method: Name of the estimate, for the note: cheap or integrated.

    Returns:
        The agreement. Latents with no effect by either method are left out, because their equal ranks would raise the correlation.
    """
    counts = (estimated_n != 0) | (exact_n != 0)
    n, estimated, exact = int(counts.sum()), estimated_n[counts].cpu(), exact_n[counts].cpu()
    value = rank_correlation(estimated, exact) if n else math.nan
    correlation = Interval(value, *spearman_interval(value, n))
    if correlation.low >= TRUSTED:
        return Agreement(n, correlation, "")
    found = f"{value:.2f} ({correlation.low:.2f} to {correlation.high:.2f})" if math.isfinite(correlation.low) else "not known"
    note = (
        f"{output}: the rank correlation of {method} effects with exact ones is {found} over {n} latents, and is not shown to be above "
        f"{TRUSTED}: order latents of this output by exact effects"
    )
    return Agreement(n, correlation, note)


@dataclass(frozen=True)
class Effects:
    """Effects of latents on one output, over many images."""

    output: str
    """Name of the output."""
    latents: tuple[int, ...]
    """The latents that were ablated."""
    cheap: MeanEffects
    """Cheap effects of all latents."""
    integrated: MeanEffects
    """Integrated effects of all latents."""
    exact: MeanEffects
    """Exact effects of the ablated latents, in their order."""
    gap: float
    """Largest distance, over images, between the two sides of the completeness identity of integrated effects."""
    difference: float
    """Largest absolute difference, over images, of the output at the baseline from that of the plain model."""

    @property
    def sparsities(self) -> dict[str, float]:
        """Ablation sparsity of mean effects, by method: the effective number of latents that carry the output.

        Exact effects are those of the ablated latents only. NaN if no latent has an effect.
        """
        means = {"cheap": self.cheap.mean, "integrated": self.integrated.mean, "exact": self.exact.mean}
        return {method: ablation_sparsity(mean) for method, mean in means.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings, one sentence each: estimates by which latents should not be ordered, and integrated effects that do not add up."""
        notes = [agreement.note for agreement in self.agreements.values() if agreement.is_low]
        if self.gap > TOLERATED * self.difference:
            notes.append(
                f"{self.output}: integrated effects do not add up to the difference from the baseline: on some image they miss by "
                f"{self.gap:.2g}, where differences are up to {self.difference:.2g}: take more steps; if that does not help, the output "
                "jumps somewhere between the baseline and the image"
            )
        return tuple(notes)

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        """Agreement of mean cheap and integrated effects with the exact ones of the ablated latents, by method."""
        chosen, exact = list(self.latents), self.exact.mean
        estimates = {"cheap": self.cheap, "integrated": self.integrated}
        return {method: agreement(effects.mean[chosen], exact, self.output, method) for method, effects in estimates.items()}


def attribute(
    attributor: Attributor,
    batches: Iterable[UInt8[Tensor, "_images _height _width 3"]],
    outputs: Mapping[str, Score],
    latents: Sequence[int],
    n_steps: int = 10,
    baseline_d: Float[Tensor, " d"] | None = None,
) -> dict[str, Effects]:
    """Compute effects of latents on several outputs, as means over many images, of which one batch is in memory at a time.

    Args:
        attributor: Model and SAE.
        batches: Batches of uint8 pixels, `(b, H, W, 3)` each.
        outputs: The outputs by name.
        latents: Latents that are also ablated, with which cheap and integrated effects are compared: a sample of those that fire.
        n_steps: Number of steps of integrated effects, 1 or more.
        baseline_d: Vector at every kept token of the baseline, `(d,)`, or None: see the module.

    Returns:
        The effects, by output.

    Raises:
        InputError: There are no images, a latent does not exist or is named twice, or the number of steps is below 1.
    """
    s = attributor.sae.n_latents
    means = {name: (MeanEffects(s), MeanEffects(s), MeanEffects(len(latents))) for name in outputs}
    gaps, differences = (dict.fromkeys(outputs, 0.0) for _ in range(2))
    _places(latents, s, torch.device("cpu"))
    for pixels in batches:
        code = attributor.encode(pixels)
        for name, score in outputs.items():
            cheap, integrated, exact = means[name]
            cheap.add(attributor.cheap(pixels, score, code).by_image)
            path = attributor.integrated(pixels, score, n_steps, code, baseline_d)
            integrated.add(path.by_image)
            exact.add(attributor.exact(pixels, score, latents, code))
            sides = attributor.completeness(pixels, score, path)
            gaps[name] = max(gaps[name], sides.gap)
            differences[name] = max(differences[name], float(sides.difference_b.abs().max()))
    if any(not mean.n for mean, _, _ in means.values()):
        raise InputError("batches: there are no images; give one or more")
    return {name: Effects(name, tuple(latents), *means[name], gaps[name], differences[name]) for name in outputs}
