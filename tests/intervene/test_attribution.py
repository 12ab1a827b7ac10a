"""Proves attribution against slow loops, the completeness identities and planted latents, on a model whose gradients are known.

That model's tokens are a table, and its outputs a readout of them that is affine, quadratic or saturating; all in float64. A tiny CLIP
shows that the same holds on a model of transformers.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ommatid.config.models import ClipModel
from ommatid.errors import InputError, ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.intervene import attribution
from ommatid.intervene.attribution import Attributor, MeanEffects, activation, agreement, attribute, class_log_odds, similarity
from ommatid.metrics import rank_correlation
from ommatid.sae.model import SAE, SAEConfig, make_untrained
from ommatid.vlm import Captured, Differentiated, Hookpoint, Replacement, Score, VisionModel, load_model
from support.models import save_tiny_clip
from support.small_saes import KINDS
from support.small_saes import make_sae as make_small_sae
from support.towers import noise

T, D, S = 5, 12, 40
"""Tokens (a class token and four patches), width, and latents."""
HOOKPOINT = Hookpoint(D, ("cls",), (2, 2))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Readout:
    """A model that looks up an image's tokens by its first pixel, and reads y = Σ_t w_t x_t A from them, or a function of y."""

    name = "readout"
    d_embed = d_output = 3
    FUNCTIONS = {  # noqa: RUF012
        "affine": lambda y: y + 1,
        "quadratic": lambda y: y + 0.2 * y.square(),
        "tanh": lambda y: (0.4 * y).tanh(),
    }

    def __init__(self, kind: str, table: Tensor | None = None, A: Tensor | None = None) -> None:
        self.f = self.FUNCTIONS[kind]
        self.table = draw(8, T, D, seed=1) if table is None else table
        self.A = 0.3 * draw(D, 3, seed=2) if A is None else A
        hookpoint = Hookpoint(self.table.shape[2], ("cls",), (2, 2))
        self.hookpoints = {"tokens": hookpoint, "earlier": hookpoint}
        self.n_images = self.n_replaced = 0

    def pixels(self) -> Tensor:
        return torch.arange(len(self.table), dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)

    def outputs(self, x_btd: Tensor) -> Tensor:
        return self.f((x_btd * torch.linspace(0.5, 1.5, T)[:, None]).sum(1) @ self.A)

    def capture(self, pixels: Tensor, hookpoints: Sequence[str]) -> Captured:
        x = self._tokens(pixels)
        return Captured({"tokens": x, "earlier": x.flip(1) * 1.1}, None)

    def splice(self, pixels: Tensor, hookpoint: str, replacements: Sequence[Replacement], read: str | None = None) -> tuple[Tensor, ...]:
        x = self._tokens(pixels)
        self.n_replaced += len(replacements) * len(pixels)
        return tuple(self.outputs(replacement(x)) for replacement in replacements)

    def differentiate(
        self, pixels: Tensor, hookpoint: str, score: Any, replacement: Replacement | None = None, read: str | None = None
    ) -> Differentiated:
        x = self._tokens(pixels)
        x = (replacement(x) if replacement else x).detach().clone().requires_grad_()
        outputs = self.outputs(x)
        return Differentiated(x.detach(), outputs.detach(), torch.autograd.grad(score(outputs).sum(), x)[0])

    def _tokens(self, pixels: Tensor) -> Tensor:
        self.n_images += len(pixels)
        return self.table[pixels[:, 0, 0, 0].long()]


def make_sae(threshold: float = 0.8, seed: int = 3) -> SAE:
    W_dec = normalize(draw(S, D, seed=seed), dim=1)
    config = SAEConfig("batch_topk", D, S, 4, "tokens", "readout")
    return SAE(config, W_dec.T.contiguous(), 0.1 * draw(S, seed=4), W_dec, 0.2 * draw(D, seed=5), torch.tensor(threshold))


def make_attributor(kind: str = "tanh", policy: str = "patch", reads: str = "tokens", **changes: Any) -> Attributor:
    model = cast(Any, Readout(kind, **changes))
    read, write = (TokenPicker(name, model.hookpoints[name], policy) for name in (reads, "tokens"))
    return Attributor(model, make_sae(), read, write)


def pixels_of(attributor: Attributor) -> Tensor:
    return cast(Any, attributor.model).pixels()


def first(outputs: Tensor) -> Tensor:
    return outputs[:, 0] - 0.5 * outputs[:, 2]


CASES = [("affine", "patch", "tokens"), ("quadratic", "cls", "tokens"), ("tanh", "all", "tokens"), ("tanh", "patch", "earlier")]


@pytest.mark.parametrize(("kind", "policy", "reads"), CASES)
def test_effects_equal_loops_over_tokens_and_latents(kind: str, policy: str, reads: str) -> None:
    attributor = make_attributor(kind, policy, reads)
    model, sae = cast(Any, attributor.model), attributor.sae
    kept = {"patch": range(1, T), "cls": range(1), "all": range(T)}[policy]
    n_images = len(model.table)
    cheap, integrated, exact = (torch.zeros(n_images, S, dtype=torch.float64) for _ in range(3))
    maps = torch.zeros(n_images, len(kept), S, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(first(model.outputs(x[None]))[0], x)[0]

    for image, x in enumerate(model.table):
        read = model.capture(pixels_of(attributor)[image : image + 1], []).tokens[reads][0]
        acts = torch.stack([sae.encode(token[None])[0] if t in kept else torch.zeros(S) for t, token in enumerate(read)])
        path = [gradient(x - (1 - (step + 0.5) / 7) * acts @ sae.W_dec) for step in range(7)]
        for latent in range(S):
            for place, t in enumerate(kept):
                maps[image, place, latent] = acts[t, latent] * float(gradient(x)[t] @ sae.W_dec[latent])
                cheap[image, latent] += maps[image, place, latent]
                integrated[image, latent] += acts[t, latent] * sum(float(g[t] @ sae.W_dec[latent]) for g in path) / 7
            ablated = x - acts[:, latent, None] * sae.W_dec[latent]
            exact[image, latent] = float(first(model.outputs(torch.stack([x, ablated]))).diff().neg())
    assert 1 < float((maps != 0).sum((1, 2), dtype=torch.float64).mean()) < 0.9 * S * len(kept)

    pixels = pixels_of(attributor)
    found = attributor.cheap(pixels, first)
    torch.testing.assert_close(found.by_image, cheap)
    torch.testing.assert_close(found.maps(range(S)), maps)
    torch.testing.assert_close(found.maps([7, 3]), maps[:, :, [7, 3]])
    torch.testing.assert_close(attributor.integrated(pixels, first, n_steps=7).by_image, integrated)
    torch.testing.assert_close(attributor.exact(pixels, first, range(S)), exact)
    torch.testing.assert_close(attributor.exact(pixels, first, [31, 5, 8]), exact[:, [31, 5, 8]])


def test_cheap_effects_are_exact_and_complete_if_the_output_is_affine() -> None:
    attributor = make_attributor("affine")
    pixels, mean = pixels_of(attributor), draw(D, seed=6)
    cheap = attributor.cheap(pixels, first)
    torch.testing.assert_close(cheap.by_image, attributor.exact(pixels, first, range(S)))
    without = attributor.completeness(pixels, first, cheap)
    assert without.gap < 1e-12 and not without.error_b.any() and not without.bias_b.any()
    from_mean = attributor.completeness(pixels, first, attributor.cheap(pixels, first, baseline_d=mean))
    assert from_mean.gap < 1e-12
    assert min(float(part.abs().min()) for part in (from_mean.latents_b, from_mean.error_b, from_mean.bias_b)) > 1e-4
    at_mean = cast(Any, attributor.model).table.clone()
    at_mean[:, 1:] = mean
    torch.testing.assert_close(from_mean.baseline_b, first(cast(Any, attributor.model).outputs(at_mean)))


def test_effects_from_means_are_exact_if_the_output_is_affine() -> None:
    attributor = make_attributor("affine")
    model, sae, pixels, means = cast(Any, attributor.model), attributor.sae, pixels_of(attributor), 0.3 * draw(S, seed=7).abs()
    found = attributor.from_means(attributor.cheap(pixels, first), means)
    x = model.table
    for latent in range(0, S, 5):
        acts = sae.encode(x[:, 1:].flatten(0, 1))[:, latent].view(len(x), T - 1, 1)
        at_mean = torch.cat([x[:, :1], x[:, 1:] + (means[latent] - acts) * sae.W_dec[latent]], 1)
        torch.testing.assert_close(found[:, latent], first(model.outputs(x)) - first(model.outputs(at_mean)))


@pytest.mark.parametrize("reads", ["tokens", "earlier"])
@pytest.mark.parametrize("mean", [None, draw(D, seed=6)])
def test_integrated_effects_are_complete(mean: Tensor | None, reads: str) -> None:
    quadratic = make_attributor("quadratic", reads=reads)
    pixels = pixels_of(quadratic)
    one_step = quadratic.integrated(pixels, first, n_steps=1, baseline_d=mean)
    assert quadratic.completeness(pixels, first, one_step).gap < 1e-12  # the midpoint rule is exact for linear gradients
    assert quadratic.completeness(pixels, first, quadratic.cheap(pixels, first, baseline_d=mean)).gap > 1e-2

    saturating = make_attributor("tanh", reads=reads)
    gaps = {
        n: saturating.completeness(pixels, first, saturating.integrated(pixels, first, n, baseline_d=mean)).gap for n in (10, 20, 40, 160)
    }
    assert gaps[160] < 1e-4
    assert gaps[20] / gaps[40] == pytest.approx(4, rel=0.1)  # falls with the square of the number of steps
    assert saturating.completeness(pixels, first, saturating.cheap(pixels, first, baseline_d=mean)).gap > 10 * gaps[10]


def test_latents_that_are_silent_have_no_effect() -> None:
    attributor = make_attributor()
    pixels = pixels_of(attributor)
    silent = attributor.encode(pixels).by_image(attributor.encode(pixels).entries.values) == 0
    assert silent.any() and not silent.all()
    for effects in (attributor.cheap(pixels, first).by_image, attributor.integrated(pixels, first).by_image):
        assert torch.equal(effects == 0, silent)
    assert torch.equal(attributor.exact(pixels, first, range(S)) == 0, silent)

    attributor.sae.threshold = torch.tensor(1e9)
    assert not len(attributor.encode(pixels).firing)
    assert not attributor.cheap(pixels, first).by_image.any() and not attributor.exact(pixels, first, range(S)).any()
    assert attributor.completeness(pixels, first, attributor.integrated(pixels, first)).gap == 0
    mean = attributor.cheap(pixels, first, baseline_d=torch.zeros(D))
    torch.testing.assert_close(mean.error_b + mean.bias_b, (attributor.model.differentiate(pixels, "tokens", first).gradients
        * cast(Any, attributor.model).table)[:, 1:].sum((1, 2)))  # fmt: skip


def test_ablations_take_as_many_passes_as_latents_fire_and_one_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    attributor = make_attributor()
    model, pixels = cast(Any, attributor.model), pixels_of(attributor)
    code = attributor.encode(pixels)
    n_firing = int((code.by_image(code.entries.values) > 0).sum(1).max())
    model.n_images = model.n_replaced = 0
    effects = attributor.exact(pixels, first, range(S), code)
    assert model.n_images == len(pixels)
    assert model.n_replaced == (n_firing + 1) * len(pixels) < S * len(pixels)
    monkeypatch.setattr(attribution, "VALUES", 3 * 3 * len(pixels))  # three passes in a call
    assert torch.equal(attributor.exact(pixels, first, range(S), code), effects)
    assert torch.equal(attributor.exact(pixels, first, [], code), torch.zeros(len(pixels), 0, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_out", [None, D])
def test_every_kind_of_sae(kind: str, d_out: int | None) -> None:
    d_model = 7 if d_out else D
    small = make_small_sae(kind, d_model, S, d_out)
    sae = SAE(small.config, **{name: tensor.double() for name, tensor in small.tensors().items()})
    attributor = make_attributor("tanh", "patch")
    model, pixels = cast(Any, attributor.model), pixels_of(attributor)
    if d_out:
        narrow = draw(len(model.table), T, d_model, seed=14)
        model.capture = lambda pixels, _: Captured({"earlier": narrow[pixels[:, 0, 0, 0].long()], "tokens": model.table}, None)
        model.hookpoints["earlier"] = Hookpoint(d_model, ("cls",), (2, 2))
    reads = TokenPicker("earlier" if d_out else "tokens", model.hookpoints["earlier" if d_out else "tokens"], "patch")
    acts = sae.encode(reads.pick(model.capture(pixels, []).tokens[reads.name]).flatten(0, 1)).unflatten(0, (len(pixels), 4))
    slopes = model.differentiate(pixels, "tokens", first).gradients[:, 1:] @ sae.W_dec.T
    attributor = Attributor(model, sae, reads, attributor.writes)
    torch.testing.assert_close(attributor.cheap(pixels, first).by_image, (acts * slopes).sum(1))
    removed = model.table.repeat(S, 1, 1, 1)
    removed[:, :, 1:] -= acts.permute(2, 0, 1)[..., None] * sae.W_dec[:, None, None]
    exact = first(model.outputs(model.table)) - torch.stack([first(model.outputs(x)) for x in removed])
    torch.testing.assert_close(attributor.exact(pixels, first, range(S)), exact.T)

    tokens, step = draw(6, T, d_model, seed=15).requires_grad_(), 1e-6 * draw(6, T, d_model, seed=16)
    strengths = sae.encode(tokens.detach()[:, 1:].flatten(0, 1)).unflatten(0, (6, 4)).sum(1)
    for latent in strengths.sum(0).topk(2).indices.tolist():
        score = activation(sae, reads, latent)
        torch.testing.assert_close(score(tokens), strengths[:, latent])
        (gradient,) = torch.autograd.grad(score(tokens).sum(), tokens)
        torch.testing.assert_close(score(tokens + step) - score(tokens - step), 2 * (gradient * step).sum((1, 2)), rtol=1e-5, atol=1e-11)
        assert gradient.any()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    folder = tmp_path_factory.mktemp("tiny-clip")
    save_tiny_clip(folder)
    return load_model(ClipModel(kind="clip", path=str(folder)), "float32", "cpu")


def fit(model: VisionModel, hookpoint: str, pixels: Tensor, policy: str, output: str | None = None) -> Attributor:
    """Make an untrained SAE of 40 latents, 6 of which fire per token."""
    picker = TokenPicker(hookpoint, model.hookpoints[hookpoint], policy)
    sample = picker.pick(model.capture(pixels, [hookpoint]).tokens[hookpoint]).flatten(0, 1)
    sae = make_untrained(SAEConfig("batch_topk", sample.shape[1], S, 6, hookpoint, model.name), sample, seed=1)
    return Attributor(model, sae, picker, picker, output)


@pytest.mark.parametrize(
    ("hookpoint", "policy"), [("vision.blocks.1", "patch"), ("vision.blocks.1.mlp", "all"), ("vision.blocks.0", "cls")]
)
def test_effects_on_the_similarity_of_clip(clip: VisionModel, hookpoint: str, policy: str) -> None:
    pixels = noise(clip)
    attributor = fit(clip, hookpoint, pixels, policy)
    score = similarity(*clip.embed_text(["a dog", "a bird"]))
    check_effects(attributor, pixels, score)
    mean = attributor.writes.pick(clip.capture(pixels, [hookpoint]).tokens[hookpoint]).mean((0, 1))
    for baseline in (None, mean):
        sides = attributor.completeness(pixels, score, attributor.integrated(pixels, score, 20, baseline_d=baseline))
        assert sides.gap < 1e-4 and sides.gap < 1e-2 * float(sides.difference_b.abs().max())


def test_effects_on_a_latent_at_a_later_hookpoint(clip: VisionModel) -> None:
    pixels = noise(clip)
    later = fit(clip, "vision.blocks.1", pixels, "patch")
    attributor = fit(clip, "vision.blocks.0", pixels, "all", later.reads.name)
    strengths = later.encode(pixels).by_image(later.encode(pixels).entries.values)
    latent = int(strengths.sum(0).argmax())
    score = activation(later.sae, later.reads, latent)
    (plain,) = clip.splice(pixels, "vision.blocks.0", [lambda tokens: tokens], "vision.blocks.1")
    torch.testing.assert_close(score(plain), strengths[:, latent])
    check_effects(attributor, pixels, score)


def check_effects(attributor: Attributor, pixels: Tensor, score: Score) -> None:
    """Check exact effects against ablations one by one, and cheap ones against small parts of them."""
    model, sae, picker = attributor.model, attributor.sae, attributor.writes
    x = picker.pick(model.capture(pixels, [picker.name]).tokens[picker.name])
    acts = sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def without(latent: int, share: float) -> Tensor:
        removed = share * acts[:, :, latent, None] * sae.W_dec[latent]
        return score(
            model.splice(pixels, picker.name, [lambda tokens: picker.put(tokens, picker.pick(tokens) - removed)], attributor.output)[0]
        )

    plain = without(0, 0)
    one_by_one = torch.stack([plain - without(latent, 1) for latent in range(S)], dim=1)
    exact = attributor.exact(pixels, score, range(S))
    assert exact.abs().max() > 1e-4 and (exact != 0).float().mean() > 0.05
    torch.testing.assert_close(exact, one_by_one, atol=2e-6, rtol=1e-4)
    cheap = attributor.cheap(pixels, score).by_image
    for latent in exact.abs().sum(0).topk(3).indices.tolist():
        part = (without(latent, -0.05) - without(latent, 0.05)) / 0.1
        torch.testing.assert_close(cheap[:, latent], part, atol=1e-2 * float(part.abs().max()), rtol=1e-2)


PLANTED_D, PLANTED_S, READ = 64, 96, 17


def make_planted(n_images: int = 60) -> Attributor:
    """Make a saturating model that reads one latent's direction; each token mixes three directions, which overlap a little."""
    generator = torch.Generator().manual_seed(7)
    W_dec = normalize(draw(PLANTED_S, PLANTED_D, seed=8), dim=1)
    chosen = torch.rand(n_images, T, PLANTED_S, generator=generator).topk(3).indices
    strengths = 1 + torch.rand(chosen.shape, generator=generator, dtype=torch.float64)
    codes = torch.zeros(n_images, T, PLANTED_S, dtype=torch.float64).scatter_(2, chosen, strengths)
    A = torch.stack([W_dec[READ], draw(PLANTED_D, seed=9) / 8, draw(PLANTED_D, seed=10) / 8], dim=1)
    model = cast(Any, Readout("tanh", codes @ W_dec + 0.02 * draw(n_images, T, PLANTED_D, seed=11), A))
    config = SAEConfig("batch_topk", PLANTED_D, PLANTED_S, 3, "tokens", "planted")
    b_enc, b_dec = torch.zeros(PLANTED_S, dtype=torch.float64), torch.zeros(PLANTED_D, dtype=torch.float64)
    sae = SAE(config, W_dec.T.contiguous(), b_enc, W_dec, b_dec, torch.tensor(0.8))
    picker = TokenPicker("tokens", model.hookpoints["tokens"], "all")
    return Attributor(model, sae, picker, picker)


def test_planted_latent_comes_first_and_cheap_effects_order_latents_as_exact_ones_do() -> None:
    attributor = make_planted()
    pixels = pixels_of(attributor)
    batches = [pixels[:25], pixels[25:50], pixels[50:]]
    scores = {"read": lambda outputs: outputs[:, 0], "against": lambda outputs: outputs[:, 0] - outputs[:, 1]}
    for name, found in attribute(attributor, batches, scores, range(PLANTED_S)).items():
        for effects in (found.cheap, found.integrated, found.exact):
            assert int(effects.mean.argmax()) == READ
            assert float(effects.mean[READ] - effects.half_width[READ]) > 0
        for method, agreed in found.agreements.items():
            assert agreed.correlation.value > 0.9, (name, method, agreed)
            assert agreed.n_latents == PLANTED_S and not agreed.is_low and not agreed.note
        assert found.gap < 0.01 * found.difference and not found.notes
        mean = found.exact.mean
        assert found.sparsities["exact"] == pytest.approx(float(mean.abs().sum() ** 2 / mean.square().sum()))
        assert 1 < found.sparsities["cheap"] < PLANTED_S
        whole = attributor.cheap(pixels, scores[name]).by_image
        torch.testing.assert_close(found.cheap.mean, whole.mean(0))
        torch.testing.assert_close(found.cheap.mean_magnitude, whole.abs().mean(0))
        torch.testing.assert_close(found.cheap.half_width, 1.959964 * whole.std(0) / math.sqrt(len(pixels)))


def test_low_agreement_is_said() -> None:
    exact = draw(30, seed=12)
    assert not agreement(exact, exact, "a truck", "cheap").is_low
    noisy = agreement(exact + 2 * draw(30, seed=13), exact, "a truck", "cheap")
    assert noisy.is_low and noisy.correlation.low < noisy.correlation.value < noisy.correlation.high < 0.9
    assert noisy.correlation.value == pytest.approx(rank_correlation(exact + 2 * draw(30, seed=13), exact))
    assert noisy.note.startswith(f"a truck: the rank correlation of cheap effects with exact ones is {noisy.correlation.value:.2f} (")
    few = agreement(exact[:3], exact[:3], "a truck", "cheap")
    assert few.is_low and "is not known over 3 latents" in few.note
    estimated, padded = (torch.cat([values, torch.zeros(500)]) for values in (exact + 2 * draw(30, seed=13), exact))
    assert agreement(estimated, padded, "a truck", "cheap") == noisy  # latents without effects count for nothing
    assert agreement(torch.zeros(9), torch.zeros(9), "a truck", "cheap").is_low


def test_integrated_effects_that_do_not_add_up_are_said() -> None:
    attributor = make_planted()
    pixels, model = pixels_of(attributor), cast(Any, attributor.model)
    few = attribute(attributor, [pixels], {"read": lambda outputs: 4 * (9 * outputs[:, 0]).tanh()}, range(PLANTED_S), n_steps=1)["read"]
    assert few.gap > 0.1 * few.difference
    assert any(note.startswith("read: integrated effects do not add up") for note in few.notes)
    model.f = lambda y: y + (y > 0.5).to(y)  # jumps, which gradients do not show
    jumps = [attribute(attributor, [pixels], {"read": lambda outputs: outputs[:, 0]}, [0], n)["read"] for n in (10, 100)]
    assert all(found.gap == pytest.approx(1, abs=1e-6) for found in jumps)


def test_interval_of_agreement_holds_the_truth_in_95_percent_of_draws() -> None:
    truth, inside = 6 / math.pi * math.asin(0.8 / 2), 0  # of two normal variables with correlation 0.8
    for seed in range(400):
        x, noise = draw(2, 50, seed=seed)
        found = agreement(x, 0.8 * x + 0.6 * noise, "", "").correlation
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.98


class _Memory(TorchDispatchMode):
    """Records the bytes of the tensors that torch makes, at their peak, and the largest number of values of a dense one."""

    peak = largest = 0

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        dense = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for storage in (tensor.untyped_storage() for tensor in dense):
            self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.largest = max([self.largest, *(tensor.numel() for tensor in dense)])
        self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self._live.values()))
        return out


def test_memory_does_not_grow_with_images_and_no_matrix_of_tokens_and_latents_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "ENTRIES", 4 * PLANTED_S)
    attributor = make_planted(240)
    pixels, records = pixels_of(attributor), {}
    for n in (24, 240):
        with _Memory() as records[n]:
            attribute(attributor, (pixels[start : start + 12] for start in range(0, n, 12)), {"first": first}, range(10), n_steps=2)
    assert 0 < records[240].peak < 1.1 * records[24].peak
    assert records[240].largest < 12 * T * PLANTED_S


def test_bad_input_is_refused() -> None:
    attributor = make_attributor()
    pixels, model = pixels_of(attributor), cast(Any, attributor.model)
    with pytest.raises(InputError, match="latent 40: the SAE has 40 latents, 0 to 39"):
        attributor.exact(pixels, first, [3, 40])
    with pytest.raises(InputError, match="latent 3: named twice"):
        attributor.cheap(pixels, first).maps([3, 4, 3])
    with pytest.raises(InputError, match="n_steps 0: must be 1 or more"):
        attributor.integrated(pixels, first, n_steps=0)
    with pytest.raises(InputError, match="pixels: there are no images"):
        attributor.encode(pixels[:0])
    with pytest.raises(InputError, match="code: is of 2 images, 4 tokens and 40 latents, and here are 8 images"):
        attributor.cheap(pixels, first, attributor.encode(pixels[:2]))
    with pytest.raises(InputError, match="batches: there are no images"):
        attribute(attributor, [], {"first": first}, [0])
    with pytest.raises(ModelError, match="pooled is the mean of the patches"):
        make_attributor(policy="pooled")
    wide = TokenPicker("tokens", Hookpoint(16, ("cls",), (2, 2)), "patch")
    with pytest.raises(ModelError, match="activations of readout have 16 numbers there, and the SAE encodes 12"):
        Attributor(model, attributor.sae, wide, wide)
    with pytest.raises(ModelError, match="has 4 kept tokens, and tokens 1"):
        Attributor(model, attributor.sae, attributor.reads, TokenPicker("tokens", HOOKPOINT, "cls"))


def test_scores() -> None:
    outputs, texts = draw(6, 3), draw(4, 3, seed=1)
    cosines = torch.cosine_similarity(outputs[:, None], texts, dim=2)
    torch.testing.assert_close(similarity(texts[0])(outputs), cosines[:, 0])
    torch.testing.assert_close(similarity(texts[0], texts[2])(outputs), cosines[:, 0] - cosines[:, 2])
    p = (7 * cosines).softmax(1)[:, 1]
    torch.testing.assert_close(class_log_odds(texts, 1, 7.0)(outputs), (p / (1 - p)).log())


def test_mean_of_no_images_is_not_a_number() -> None:
    assert MeanEffects(3).mean.isnan().all() and MeanEffects(3).half_width.isnan().all()
