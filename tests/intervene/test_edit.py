"""Proves that edits change activations by (t - c) d and by nothing else, for every kind of SAE, dose and choice of tokens.

The oracle is the definition written out with loops in float64. Suffixes: b images, t tokens, k kept tokens, d width, s latents.
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ommatid.config.models import ClipModel
from ommatid.errors import InputError, ModelError
from ommatid.extract.tokens import TokenPicker
from ommatid.intervene.edit import Edit, Editor, Kind, Where
from ommatid.sae.model import SAE, Activation, SAEConfig
from ommatid.vlm import Hookpoint, VisionModel, load_model
from support.models import save_tiny_clip
from support.small_saes import KINDS, encode_by_hand, make_sae
from support.towers import noise

POINT = Hookpoint(d_model=8, special=("cls", "register"), grid=(2, 3))
LATENTS = (3, 0, 17)
SCALES = torch.linspace(0.5, 3, 20)


def picker(policy: str = "all", name: str = "vision.blocks.1", point: Hookpoint = POINT) -> TokenPicker:
    return TokenPicker(name, point, policy)


def tokens(seed: int = 0, n: int = 3, d: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, POINT.n_tokens, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, so that 0 and -0 differ."""
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    return x.dtype == y.dtype and torch.equal(x.view(integer), y.view(integer))


def edit_by_hand(sae: SAE, x_bkd: Tensor, edit: Edit, chosen_bk: np.ndarray, scales: Tensor) -> np.ndarray:
    """Apply an edit to kept tokens in float64, (b, k, d)."""
    x, W_dec = x_bkd.double().numpy(), sae.W_dec.double().numpy()
    acts = encode_by_hand(sae, x_bkd.flatten(0, 1)).reshape(*x.shape[:2], -1)
    new = x.copy() if edit.error == "keep" else acts @ W_dec + sae.b_dec.double().numpy()
    for image, token in zip(*chosen_bk.nonzero(), strict=True):
        for latent in edit.latents:
            act = acts[image, token, latent]
            dose = (edit.dose or 0.0) * (float(scales[latent]) if edit.unit == "relative" and edit.kind in ("set", "add") else 1.0)
            t = {"set": dose, "add": act + dose, "scale": act * dose, "ablate": 0.0}[edit.kind]
            new[image, token] += (t - act) * W_dec[latent]
    return new


def choose_by_hand(sae: SAE, x_bkd: Tensor, where: Where | Tensor, latents: tuple[int, ...]) -> np.ndarray:
    b, k = x_bkd.shape[:2]
    if isinstance(where, Tensor):
        return np.broadcast_to(where.numpy(), (b, k))
    if where == "firing":
        return (encode_by_hand(sae, x_bkd.flatten(0, 1))[:, list(latents)] > 0).any(1).reshape(b, k)
    return np.broadcast_to([where == "all" or token == 0 for token in range(k)], (b, k))


def test_the_kinds_cover_every_activation() -> None:
    assert {make_sae(kind).config.activation for kind in KINDS} == set(get_args(Activation))


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_some_latents_are_those_of_all(kind: str) -> None:
    sae, x = make_sae(kind), tokens().flatten(0, 1)
    by_hand = encode_by_hand(sae, x)
    assert 0.05 < (by_hand > 0).mean() < 0.7
    np.testing.assert_allclose(sae.encode(x), by_hand, atol=1e-5)
    for latents in ([3, 0, 17], [5], list(range(20))):
        np.testing.assert_allclose(sae.encode_latents(x, torch.tensor(latents)), by_hand[:, latents], atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "topk"])
def test_activations_of_some_latents_cost_nothing_for_others(kind: str) -> None:
    sae, x, latents = make_sae(kind), tokens().flatten(0, 1), torch.tensor(LATENTS)
    expected = sae.encode_latents(x, latents)
    others = torch.ones(20, dtype=torch.bool).index_fill(0, latents, False)
    sae.W_enc[:, others] = torch.nan  # spreads to whatever it takes part in
    assert torch.equal(sae.encode_latents(x, latents), expected)


MASKS = [torch.arange(8) % 3 == 1, torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) > 0]
DOSES: list[tuple[Kind, float | None]] = [
    ("set", 1.5),
    ("set", 0.0),
    ("set", -2.0),
    ("add", 0.7),
    ("scale", 2.5),
    ("scale", 0.0),
    ("ablate", None),
]


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_as_defined(kind: str, error: Any) -> None:
    sae, x = make_sae(kind), tokens()
    editor = Editor(sae, LATENTS, picker(), scales=SCALES)
    places: list[Where | Tensor] = ["all", "firing", "cls", *MASKS]
    for where in places:
        for latents in ((0,), (17, 3)):
            chosen = choose_by_hand(sae, x, where, latents)
            for (change, dose), unit in zip(DOSES, ("relative", "absolute") * 4, strict=False):
                edit = Edit(latents, change, dose, unit, where, error)
                found = editor.replacement(edit)(x)
                np.testing.assert_allclose(found, edit_by_hand(sae, x, edit, chosen, SCALES), atol=2e-5, err_msg=str(edit))
    assert x.equal(tokens())  # replacements must not write into their argument


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_the_error_is_the_edited_code_decoded_plus_the_error(kind: str) -> None:
    sae, x = make_sae(kind), tokens()
    flat = x.flatten(0, 1)
    acts = sae.encode(flat)
    edited = acts.clone()
    edited[:, list(LATENTS)] = torch.tensor([1.0, 0.0, 2.0]) * torch.tensor([1.0, 1.0, 0.5])
    with_error = sae.decode(edited) + (flat - sae.decode(acts))
    editor = Editor(sae, LATENTS, picker())
    found = x
    for latent, t in zip(LATENTS, (1.0, 0.0, 1.0), strict=True):
        found = found + (editor.replacement(Edit((latent,), "set", t, "absolute"))(x) - x)
    assert ((found.flatten(0, 1) - with_error).norm(dim=1) < 1e-6 * with_error.norm(dim=1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_the_error_decodes_the_edited_code(kind: str) -> None:
    """The published steering of LLaVA sets one activation on all tokens, and decodes."""
    sae, x = make_sae(kind), tokens()
    acts = sae.encode(x.flatten(0, 1))
    editor = Editor(sae, LATENTS, picker())
    assert torch.equal(editor.untouched()(x), sae.decode(acts).reshape(x.shape))
    zero = editor.replacement(Edit((17,), "scale", 1.0, error="drop"))(x)
    assert same_bits(zero, editor.untouched()(x))
    acts[:, 17] = 100.0
    found = editor.replacement(Edit((17,), "set", 100.0, "absolute", error="drop"))(x)
    torch.testing.assert_close(found.flatten(0, 1), sae.decode(acts), atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 999), kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=40, deadline=None)
def test_an_edit_that_changes_no_activation_keeps_every_bit(seed: int, kind: str, dtype: torch.dtype) -> None:
    sae, x = make_sae(kind), tokens(seed, dtype=dtype)
    x[0, 3] = -0.0
    x[1, 2, 4] = -0.0
    editor = Editor(sae, LATENTS, picker(), scales=SCALES)
    own = editor.read(x).acts[2, 5, 0]
    only = torch.zeros(3, 8, dtype=torch.bool)
    only[2, 5] = True
    for edit in (
        Edit(LATENTS, "scale", 1.0),
        Edit(LATENTS, "add", 0.0),
        Edit((LATENTS[0],), "set", float(own), "absolute", only),
    ):
        assert same_bits(editor.replacement(edit)(x), x)
    changed = editor.replacement(Edit((LATENTS[0],), "set", float(own) + 1, "absolute", only))(x)
    assert not torch.equal(changed[2, 5], x[2, 5])
    changed[2, 5] = x[2, 5]
    assert same_bits(changed, x)


@given(seed=st.integers(0, 999), a=st.floats(-5, 5), b=st.floats(0, 5), kinds=st.permutations(["set", "add", "scale"]))
@settings(max_examples=40, deadline=None)
def test_edits_of_orthogonal_directions_commute(seed: int, a: float, b: float, kinds: list[Any]) -> None:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    sae = SAE(SAEConfig("relu", 8, 8, 4, "h", "tiny"), W_dec.T.contiguous(), torch.zeros(8), W_dec, torch.zeros(8), torch.tensor(0.0))
    editor, x = Editor(sae, (1, 6), picker()), tokens(seed)
    first, second = (
        editor.replacement(Edit((latent,), kind, dose, "absolute")) for latent, kind, dose in zip((1, 6), kinds, (a, b), strict=False)
    )
    both = editor.replacement(Edit((1, 6), "set", 2.0, "absolute"))
    torch.testing.assert_close(first(second(x)), second(first(x)), atol=1e-5, rtol=1e-5)
    one, other = (editor.replacement(Edit((latent,), "set", 2.0, "absolute")) for latent in (1, 6))
    torch.testing.assert_close(one(other(x)), both(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("policy", "kept"), [("patch", range(2, 8)), ("cls", [0]), ("register", [1]), ("all", range(8))])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_tokens_that_are_not_kept_keep_every_bit(policy: str, kept: Any, error: Any) -> None:
    x = tokens()
    editor = Editor(make_sae("relu"), LATENTS, picker(policy))
    found = editor.replacement(Edit(LATENTS, "set", 9.0, "absolute", error=error))(x)
    changed = (found != x).any(2)
    assert changed[:, list(kept)].all()
    others = [token for token in range(8) if token not in kept]
    assert same_bits(found[:, others].contiguous(), x[:, others].contiguous())


def test_dropped_tokens_of_an_edit_keep_every_bit() -> None:
    x, mask = tokens(), torch.tensor([False, True, False, False, True, False])
    found = Editor(make_sae("relu"), LATENTS, picker("patch")).replacement(Edit((3,), "add", 2.0, "absolute", mask))(x)
    assert (found != x).any(2)[0].nonzero().flatten().tolist() == [3, 6]


class CountingSAE(SAE):
    """An SAE that counts the tokens that it encodes."""

    n_encoded = 0

    def pre_acts(self, x_bd: Any) -> Any:
        self.n_encoded += len(x_bd)
        return super().pre_acts(x_bd)

    def encode_latents(self, x_bd: Any, latents: Any) -> Any:
        if self.config.activation != "topk":
            self.n_encoded += len(x_bd)
        return super().encode_latents(x_bd, latents)


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_tokens_are_encoded_once_for_all_edits(kind: str) -> None:
    editor = Editor(make_sae(kind), LATENTS, picker(), scales=SCALES)
    sae = editor.sae = CountingSAE(editor.sae.config, **editor.sae.tensors())
    edits = [Edit(latents, "set", dose) for latents in ((3,), (0,), (17, 3)) for dose in (0.0, 1.0, 2.0)]
    replacements = [editor.replacement(edit) for edit in edits]
    x = tokens()
    for replacement in replacements:
        replacement(x.clone())
    assert sae.n_encoded == 24
    for replacement in [editor.untouched(), *replacements, editor.replacement(Edit((3,), "set", 1.0, error="drop"))]:
        replacement(x)
    assert sae.n_encoded == 48
    x.copy_(tokens(1))
    fresh = Editor(make_sae(kind), LATENTS, picker(), scales=SCALES)
    for edit, replacement in zip(edits, replacements, strict=True):
        assert torch.equal(replacement(x), fresh.replacement(edit)(tokens(1)))
    assert sae.n_encoded == 72


def test_many_tokens_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sae = tokens(n=5), make_sae("topk")
    whole = Editor(sae, LATENTS, picker()).read(x, reconstruct=True)
    monkeypatch.setattr("ommatid.intervene.edit.ENTRIES", 7 * 20)
    parts = Editor(sae, LATENTS, picker()).read(x, reconstruct=True)
    torch.testing.assert_close(parts.acts, whole.acts)
    torch.testing.assert_close(parts.reconstruction, whole.reconstruction)


def test_products_are_in_float32_under_autocast() -> None:
    x = tokens(dtype=torch.bfloat16)
    edit = Edit(LATENTS, "set", 1.7)
    expected = Editor(make_sae("relu"), LATENTS, picker(), scales=SCALES).replacement(edit)(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = Editor(make_sae("relu"), LATENTS, picker(), scales=SCALES).replacement(edit)(x)
    assert same_bits(found, expected)


def test_gradients_take_the_change_for_a_constant() -> None:
    x, edit = tokens(), Edit((3,), "set", 1.0, "absolute")
    editor = Editor(make_sae("relu"), LATENTS, picker())
    with torch.inference_mode():
        expected = editor.replacement(edit)(x)  # leaves its codes to the next call
    leaf = x.clone().requires_grad_()
    found = editor.replacement(edit)(leaf)
    weights = tokens(4)
    (found * weights).sum().backward()
    assert torch.equal(found.detach(), expected)
    assert leaf.grad is not None and torch.equal(leaf.grad, weights)


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_transcoders_read_one_hookpoint_and_write_another(kind: str) -> None:
    sae = make_sae(kind, d_out=6)
    writes = TokenPicker("target", Hookpoint(6, ("cls", "register"), (2, 3)), "patch")
    x, y = tokens(), tokens(7, d=6)
    editor = Editor(sae, LATENTS, writes, picker("patch"))
    with pytest.raises(InputError, match=r"transcoder encodes the tokens at vision\.blocks\.1: capture them"):
        editor.replacement(Edit((3,), "ablate"))
    codes = editor.read(x, reconstruct=True)
    acts = encode_by_hand(sae, x[:, 2:].flatten(0, 1)).reshape(3, 6, -1)
    W_dec = sae.W_dec.double().numpy()
    expected = y.double().numpy().copy()
    expected[:, 2:] -= acts[..., 3:4] * W_dec[3]
    np.testing.assert_allclose(editor.replacement(Edit((3,), "ablate"), codes)(y), expected, atol=1e-5)
    x_hat = acts @ W_dec + sae.b_dec.double().numpy()
    np.testing.assert_allclose(editor.untouched(codes)(y)[:, 2:], x_hat, atol=1e-5)
    expected[:, 2:] = x_hat + (2.0 - acts[..., 0:1]) * W_dec[0]
    dropped = editor.replacement(Edit((0,), "set", 2.0, "absolute", error="drop"), codes)
    np.testing.assert_allclose(dropped(y), expected, atol=1e-5)
    with pytest.raises(InputError, match=r"codes are for .* = \(3, 6\), and the tokens that are edited for \(2, 6\)"):
        dropped(y[:2])
    with pytest.raises(InputError, match=r"x̂ is needed"):
        editor.untouched(editor.read(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dose": float("nan")}, r"dose is nan; set needs a finite number"),
        ({"dose": float("inf")}, r"dose is inf"),
        ({"dose": "high"}, r"dose is 'high'"),
        ({"dose": True}, r"dose is True"),
        ({"dose": None}, r"dose is None; set needs"),
        ({"kind": "ablate"}, r"dose is 1\.0, but ablate"),
        ({"kind": "clamp"}, r"kind is 'clamp'; allowed values are set, add, scale, ablate"),
        ({"unit": "percent"}, r"unit is 'percent'; allowed values are relative, absolute"),
        ({"error": "half"}, r"error is 'half'; allowed values are keep, drop"),
        ({"tokens": "patches"}, r"tokens is 'patches'; allowed values are all, firing, cls, or a mask"),
        ({"tokens": torch.zeros(8, dtype=torch.bool)}, r"mask is False everywhere"),
        ({"tokens": torch.ones(8)}, r"mask is torch\.float32 \(8,\)"),
        ({"tokens": torch.ones(1, 2, 8, dtype=torch.bool)}, r"mask is torch\.bool \(1, 2, 8\)"),
        ({"latents": ()}, r"latents are \(\)"),
        ({"latents": (3, 3)}, r"latents are \(3, 3\); name one or more latents, each once"),
    ],
)
def test_bad_edits_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Edit(**({"latents": (3,), "kind": "set", "dose": 1.0} | values))


def test_edits_that_do_not_fit_the_editor_are_refused() -> None:
    scales = SCALES.clone()
    scales[0] = torch.nan
    editor = Editor(make_sae("relu"), LATENTS, picker("patch"), scales=scales)
    for edit, message in [
        (Edit((4,), "ablate"), r"latent 4 is not among those that the editor was made for: 3, 0, 17"),
        (Edit((3, 0), "set", 1.0), r"latent 0: its scale is nan, as of a latent that never fires"),
        (Edit((3,), "set", 1e39, "absolute"), r"dose 1e\+39 is too large"),
        (Edit((3,), "ablate", tokens="cls"), r"no class token is kept at vision\.blocks\.1, only patch"),
        (Edit((3,), "ablate", tokens=torch.ones(8, dtype=torch.bool)), r"mask has 8 tokens, but 6 are kept"),
    ]:
        with pytest.raises(InputError, match=message):
            editor.replacement(edit)
    with pytest.raises(InputError, match=r"mask is for 2 images, but the batch has 3"):
        editor.replacement(Edit((3,), "ablate", tokens=torch.ones(2, 6, dtype=torch.bool)))(tokens())
    with pytest.raises(InputError, match=r"the scales of latents are not known"):
        Editor(make_sae("relu"), LATENTS, picker()).replacement(Edit((3,), "set", 1.0))


def test_saes_that_do_not_fit_are_refused() -> None:
    sae = make_sae("relu")
    for latent in (-1, 20):
        with pytest.raises(InputError, match=rf"latent {latent} does not exist; relu has latents 0 to 19"):
            Editor(sae, (3, latent), picker())
    with pytest.raises(InputError, match=r"scales are for 3 latents, but relu has 20"):
        Editor(sae, (3,), picker(), scales=torch.ones(3))
    with pytest.raises(ModelError, match=r"pooled is the mean of the patches"):
        Editor(sae, (3,), picker("pooled"))
    with pytest.raises(ModelError, match=r"vision\.blocks\.1 is 9 wide, but the SAE 8"):
        Editor(sae, (3,), picker(point=Hookpoint(9, ("cls",), None)))
    with pytest.raises(ModelError, match=r"is an autoencoder, which writes the hookpoint that it reads"):
        Editor(sae, (3,), picker(), picker(name="vision.blocks.0"))
    transcoder, writes = make_sae("relu", d_out=6), TokenPicker("target", Hookpoint(6, ("cls", "register"), (2, 3)), "all")
    with pytest.raises(ModelError, match=r"is a transcoder.*give the pickers of vision\.blocks\.1 to read and of target to write"):
        Editor(transcoder, (3,), picker())
    with pytest.raises(ModelError, match=r"6 tokens are kept at vision\.blocks\.1 and 8 at target"):
        Editor(transcoder, (3,), writes, picker("patch"))
    for broken in (0.0, torch.nan):
        sae.W_dec[3] = broken
        Editor(sae, (4,), picker())
        with pytest.raises(InputError, match=r"latent 3: its direction in W_dec is zero or not finite"):
            Editor(sae, (4, 3), picker())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-clip")
    save_tiny_clip(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hookpoint", "policy"), [("vision.blocks.1", "patch"), ("vision.blocks.1.mlp", "all"), ("vision.projection", "cls")]
)
def test_a_model_goes_on_from_edits_as_it_should(clip_folder: Path, dtype: Any, hookpoint: str, policy: str) -> None:
    """A dose of nothing gives the plain embedding bit for bit, and any dose that of x + delta."""
    model: VisionModel = load_model(ClipModel(kind="clip", path=str(clip_folder)), dtype, "cpu")
    pixels, point = noise(model), model.hookpoints[hookpoint]
    sae = make_sae("batch_topk", d_model=point.d_model, d_sae=40)
    picked = TokenPicker(hookpoint, point, policy)
    editor = Editor(sae, (5, 6), picked)
    x = model.capture(pixels, [hookpoint]).tokens[hookpoint]
    acts = sae.encode(picked.pick(x).float().flatten(0, 1))[:, 5].unflatten(0, (len(x), -1))
    assert acts.max() > 0
    by_hand = picked.put(x, picked.pick(x).float() + (8.0 - acts)[..., None] * sae.W_dec[5])
    replacements = [
        lambda tokens: tokens,
        editor.replacement(Edit((5, 6), "scale", 1.0)),
        editor.replacement(Edit((6,), "add", 0.0, "absolute")),
        editor.replacement(Edit((5,), "set", 8.0, "absolute")),
    ]
    plain, scaled, added, found = model.splice(pixels, hookpoint, replacements)
    assert torch.equal(scaled, plain) and torch.equal(added, plain)
    expected = model.splice(pixels, hookpoint, [lambda tokens: by_hand])[0]
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert (found - plain).norm() > 5 * tolerance * plain.norm()
