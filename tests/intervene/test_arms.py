"""Proves that every control changes the same tokens by the same norm as the edit, and that controls are matched and seeded.

The planted truth is a model whose output reads a known direction. Suffixes: b images, k kept tokens, d width, s latents.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ommatid.config.models import ClipModel
from ommatid.errors import InputError
from ommatid.extract.tokens import TokenPicker
from ommatid.intervene.arms import Arm, Controls, draw_controls, make_arms, match_latents
from ommatid.intervene.edit import Edit, Editor
from ommatid.sae.model import SAE, SAEConfig
from ommatid.vlm import Hookpoint, load_model
from support.models import save_tiny_clip
from support.small_saes import KINDS, make_sae
from support.tiles import TileModel
from support.towers import noise

D_MODEL, D_SAE, N_DRAWS = 8, 40, 8
POINT = Hookpoint(D_MODEL, ("cls",), (2, 3))
PATCHES = TokenPicker("vision.blocks.1", POINT, "patch")
DENSITIES = torch.rand(D_SAE, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 4 + 1e-4
LIVE = torch.arange(D_SAE) % 10 != 9


def make_editor(kind: str = "imported", latents: tuple[int, ...] = (3,)) -> Editor:
    return Editor(make_sae(kind, D_MODEL, D_SAE), latents, PATCHES, scales=torch.linspace(0.5, 3, D_SAE))


def make_controls(editor: Editor, latents: tuple[int, ...] = (3,), seed: int = 0, n_draws: int = N_DRAWS) -> Controls:
    means = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(8))
    return draw_controls(editor, latents, DENSITIES, LIVE, means, seed, n_draws)


def tokens(seed: int = 0, n: int = 3) -> Tensor:
    return torch.randn(n, POINT.n_tokens, D_MODEL, generator=torch.Generator().manual_seed(seed))


def added(arms: list[Arm], x: Tensor, base: Tensor | None = None) -> dict[tuple[str, int], Tensor]:
    """Return what each arm adds to tokens (b, t, d), or to others that stand in for them, by name and draw."""
    return {(arm.name, arm.draw): arm.replacement(x) - (x if base is None else base) for arm in arms}


EDITS = [
    Edit((3,), "set", 1.0),
    Edit((3,), "set", -0.5),
    Edit((3,), "scale", 3.0),
    Edit((3,), "ablate"),
    Edit((3,), "add", 2.0, tokens="firing"),
]


def test_arms_are_one_list_in_a_plain_order() -> None:
    editor = make_editor()
    arms = make_arms(editor, EDITS[:2], make_controls(editor))
    of_edit = ["targeted", "sign_flipped", *["random_latent"] * 8, *["random_direction"] * 8, "diff_means"]
    assert [arm.name for arm in arms] == ["none", "untouched", *of_edit, *of_edit]
    draws = [0, 0, *range(8), *range(8), 0]
    assert [arm.draw for arm in arms] == [0, 0, *draws, *draws]
    assert [arm.edit for arm in arms] == [None, None, *[EDITS[0]] * 19, *[EDITS[1]] * 19]
    without = draw_controls(editor, (3,), DENSITIES, LIVE, None, 0, 2)
    assert Counter(arm.name for arm in make_arms(editor, EDITS[:1], without)) == {
        "none": 1, "untouched": 1, "targeted": 1, "sign_flipped": 1, "random_latent": 2, "random_direction": 2
    }  # fmt: skip


@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    latents=st.sampled_from([(3,), (0,), (3, 0), (1, 12, 5)]),
    change=st.sampled_from([("set", 1.5), ("set", 0.0), ("set", -1.0), ("add", -2.0), ("scale", 4.0), ("ablate", None)]),
    where=st.sampled_from(["all", "firing", torch.tensor([True, False, False, True, False, False])]),
    error=st.sampled_from(["keep", "drop"]),
)
@settings(max_examples=40, deadline=None)
def test_controls_have_the_norm_of_the_edit_on_every_token(
    seed: int, kind: str, latents: tuple[int, ...], change: Any, where: Any, error: Any
) -> None:
    editor, x = make_editor(kind, latents), tokens(seed)
    edit = Edit(latents, *change, tokens=where, error=error)
    arms = make_arms(editor, [edit], make_controls(editor, latents, seed))
    found = added(arms, x, editor.untouched()(x) if error == "drop" else x)
    found = {key: delta for key, delta in found.items() if key[0] not in ("none", "untouched")}
    targeted = found["targeted", 0]
    is_zero = (targeted == 0).all(-1)
    assert is_zero[:, 0].all()  # the class token is not kept
    for (name, _), delta in found.items():
        assert torch.equal((delta == 0).all(-1), is_zero), name
        torch.testing.assert_close(delta.norm(dim=-1), targeted.norm(dim=-1), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found["sign_flipped", 0], -targeted, rtol=1e-5, atol=2e-6)
    plain, flipped = arms[2].replacement(x), arms[3].replacement(x)
    torch.testing.assert_close(plain + flipped, 2 * (x if error == "keep" else editor.untouched()(x)), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("edit", EDITS)
def test_every_arm_is_as_defined(edit: Edit) -> None:
    editor, x = make_editor(), tokens()
    controls = make_controls(editor)
    arms = make_arms(editor, [edit], controls)
    found = {(arm.name, arm.draw): arm.replacement(x).double().numpy() for arm in arms}
    W_dec = editor.sae.W_dec.double().numpy()
    kept = x[:, 1:].flatten(0, 1)
    acts = editor.sae.encode(kept)
    act = acts[:, 3].double().numpy().reshape(3, 6)
    dose = float(editor.doses(edit)[0])
    change = {"set": dose - act, "add": np.full_like(act, dose), "scale": (dose - 1) * act, "ablate": -act}[edit.kind]
    if edit.tokens == "firing":
        change = change * (act > 0)
    length = np.linalg.norm(W_dec[3])
    directions = {("targeted", 0): W_dec[3] / length, ("sign_flipped", 0): -W_dec[3] / length}
    for draw in range(N_DRAWS):
        other = W_dec[int(controls.random_latents[draw, 0])]
        directions["random_latent", draw] = other / np.linalg.norm(other)
        directions["random_direction", draw] = controls.random_directions[draw].double().numpy()
    means = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(8)).double().numpy()
    directions["diff_means", 0] = means / np.linalg.norm(means)
    assert set(found) == {*directions, ("none", 0), ("untouched", 0)}
    for key, direction in directions.items():
        expected = x.double().numpy().copy()
        for image, token in np.ndindex(3, 6):
            expected[image, token + 1] += change[image, token] * length * direction
        np.testing.assert_allclose(found[key], expected, atol=1e-5, err_msg=str(key))
    assert np.array_equal(found["none", 0], x.double().numpy())
    np.testing.assert_allclose(found["untouched", 0][:, 1:].reshape(-1, D_MODEL), editor.sae.decode(acts), atol=1e-5)


def test_several_latents_are_replaced_one_by_one() -> None:
    editor, x = make_editor(latents=(3, 0)), tokens()
    edit = Edit((3, 0), "set", 1.0)
    controls = make_controls(editor, (3, 0))
    found = added(make_arms(editor, [edit], controls), x)
    doses, acts = editor.doses(edit), editor.read(x).acts
    lengths = editor.directions((3, 0)).norm(dim=1)
    for draw, others in enumerate(controls.random_latents.tolist()):
        of_others = normalize(editor.directions(others), dim=1) * lengths[:, None]
        cosines = cosine_similarity(found["random_latent", draw][:, 1:], (doses - acts) @ of_others, dim=-1)
        torch.testing.assert_close(cosines, torch.ones_like(cosines))
    assert len(set(controls.random_latents.flatten().tolist())) == 2 * N_DRAWS


def test_controls_are_reproducible() -> None:
    editor = make_editor(latents=(3, 0))
    one, same = make_controls(editor), make_controls(editor)
    assert torch.equal(one.random_latents, same.random_latents) and torch.equal(one.random_directions, same.random_directions)
    fewer = make_controls(editor, n_draws=3)
    assert torch.equal(one.random_latents[:3], fewer.random_latents) and torch.equal(one.random_directions[:3], fewer.random_directions)
    torch.testing.assert_close(one.random_directions.norm(dim=1), torch.ones(N_DRAWS))
    for other in (make_controls(editor, seed=1), make_controls(editor, (0,))):
        cosines = cosine_similarity(one.random_directions[:, None], other.random_directions[None], dim=2)
        assert cosines.abs().max() < 1 - 1e-4


def test_random_directions_are_isotropic() -> None:
    drawn = draw_controls(make_editor(), (3,), DENSITIES, LIVE, None, 0, 30).random_directions
    many = torch.cat(
        [drawn, *(draw_controls(make_editor(), (3,), DENSITIES, LIVE, None, seed, 30).random_directions for seed in range(1, 40))]
    )
    assert many.mean(0).abs().max() < 5 / (len(many) * D_MODEL) ** 0.5
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(D_MODEL) / D_MODEL, atol=0.03, rtol=0)


def match_by_hand(latent: int, n: int, W_dec: Tensor) -> list[int]:
    """Return the n allowed latents that are nearest in log density; no two of the densities are equally near."""
    allowed = []
    for other in range(len(W_dec)):
        cosine = float(cosine_similarity(W_dec[other], W_dec[latent], dim=0))
        if other != latent and bool(LIVE[other]) and abs(cosine) <= 0.9:
            allowed.append(other)
    return sorted(allowed, key=lambda other: abs(float((DENSITIES[other] / DENSITIES[latent]).log())))[:n]


@pytest.mark.parametrize("latent", [0, 3, 21, 38])
def test_matched_latents_are_nearest_in_log_density(latent: int) -> None:
    W_dec = make_sae("imported", D_MODEL, D_SAE).W_dec
    expected = match_by_hand(latent, 8, W_dec)
    for seed in range(3):
        found = match_latents(DENSITIES, LIVE, W_dec, [latent], 8, np.random.default_rng(seed))
        assert found.flatten().tolist() == expected


def test_latents_of_the_same_direction_or_its_opposite_are_never_controls() -> None:
    """The two latents with the very density of the edited one are its near duplicate and its opposite, at different norms."""
    W_dec, densities = make_sae("relu", D_MODEL, D_SAE).W_dec.clone(), DENSITIES.clone()
    W_dec[10], W_dec[11] = 7 * (W_dec[3] + 0.1 * W_dec[4]), -0.1 * W_dec[3]
    W_dec[12] = 0
    densities[[10, 11, 12, 19]] = float(densities[3])  # latent 19 is not live
    found = match_latents(densities, LIVE, W_dec, [3], 25, np.random.default_rng(0))
    assert not {3, 10, 11, 12, 19} & set(found.flatten().tolist())
    W_dec[10] = W_dec[3] + 3 * W_dec[4]
    assert match_latents(densities, LIVE, W_dec, [3], 25, np.random.default_rng(0))[0].tolist() == [10]


def test_equally_near_latents_are_chosen_at_random() -> None:
    W_dec = make_sae("relu", D_MODEL, D_SAE).W_dec
    densities = torch.full((D_SAE,), 0.01)
    rows = [match_latents(densities, LIVE, W_dec, [3], 4, np.random.default_rng(seed)).flatten().tolist() for seed in range(200)]
    counts = Counter(latent for row in rows for latent in row)
    allowed = match_by_hand(3, D_SAE, W_dec)
    assert set(counts) == set(allowed)
    assert max(counts.values()) < 2.5 * 800 / len(allowed)


@pytest.mark.parametrize(
    ("latents", "n", "message"),
    [
        ([9], 8, r"latent 9 is dead: no latent matches the density of one that never fires"),
        ([3], 60, r"only \d+ live latents differ from latents \(3,\), but 60 draws for 1 need 60; make fewer draws"),
        ([3, 4], 20, r"20 draws for 2 need 40"),
    ],
)
def test_what_cannot_be_matched_is_refused(latents: list[int], n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        match_latents(DENSITIES, LIVE, make_sae("relu", D_MODEL, D_SAE).W_dec, latents, n, np.random.default_rng(0))


def test_controls_that_cannot_be_made_are_refused() -> None:
    editor = make_editor(latents=(3, 0))
    for means in (torch.zeros(D_MODEL), torch.full((D_MODEL,), torch.nan)):
        with pytest.raises(InputError, match=r"difference of means is zero or not finite; give None"):
            draw_controls(editor, (3,), DENSITIES, LIVE, means, 0)
    with pytest.raises(InputError, match=r"n_draws is 0"):
        draw_controls(editor, (3,), DENSITIES, LIVE, None, 0, 0)
    with pytest.raises(InputError, match=r"an edit is of latents \(0,\), but the controls are of \(3,\)"):
        make_arms(editor, [Edit((0,), "ablate")], make_controls(editor))


def test_one_splice_runs_all_doses_and_arms_of_several_latents(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path)
    model: Any = load_model(ClipModel(kind="clip", path=str(tmp_path)), "float32", "cpu")
    name = "vision.blocks.1"
    sae = make_sae("topk", 32, D_SAE)
    editor = Editor(sae, (3, 0), TokenPicker(name, model.hookpoints[name], "all"), scales=torch.ones(D_SAE))
    arms: list[Arm] = []
    for latent in (3, 0):
        controls = draw_controls(editor, (latent,), DENSITIES, LIVE, torch.ones(32), 0)
        arms += make_arms(editor, [Edit((latent,), "set", dose) for dose in (0.0, 1.0, 4.0)], controls)
    ran: Counter[int] = Counter()
    for place, block in enumerate(model._model.vision_model.encoder.layers):
        block.mlp.register_forward_hook(lambda _module, _inputs, _output, place=place: ran.update([place]))
    pixels = noise(model)
    embeddings = model.splice(pixels, name, [arm.replacement for arm in arms])
    assert len(embeddings) == len(arms) == 2 * (2 + 3 * 19)
    assert ran == {0: 1, 1: 1, 2: len(arms)}, "blocks up to the hookpoint run once"
    alone = [model.splice(pixels, name, [arm.replacement])[0] for arm in arms]
    for together, apart in zip(embeddings, alone, strict=True):
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)


def test_only_the_edit_of_the_planted_latent_is_seen_by_a_model_that_reads_its_direction() -> None:
    """Tiles: the embedding is the mean colour, so setting the latent of red to 1 in two of six tiles makes it (1 - red) / 3 redder."""
    model, rng = TileModel(), np.random.default_rng(0)
    others = torch.linalg.qr(torch.cat([model.spread, torch.eye(8)]).T).Q.T[3:]
    directions = torch.cat([model.spread, others])
    W_dec = torch.cat([directions, normalize(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), dim=1)])
    W_enc = torch.cat([directions, torch.zeros(24, 8)]).T.contiguous()
    sae = SAE(SAEConfig("relu", 8, 32, 1, "tiles", "tiles"), W_enc, torch.zeros(32), W_dec, torch.zeros(8), torch.tensor(0.0))
    editor = Editor(sae, (0,), TokenPicker("tiles", model.hookpoints["tiles"], "patch"))
    mask = torch.tensor([True, False, False, False, True, False])
    controls = draw_controls(editor, (0,), torch.full((32,), 0.1), torch.ones(32, dtype=torch.bool), model.spread[1], 0)
    arms = make_arms(editor, [Edit((0,), "set", 1.0, "absolute", mask)], controls)
    pixels = torch.from_numpy(rng.integers(100, 256, (20, 32, 48, 3), dtype=np.uint8))
    embeddings = dict(
        zip([(arm.name, arm.draw) for arm in arms], model.splice(pixels, "tiles", [arm.replacement for arm in arms]), strict=True)
    )
    red = model.colours(pixels).flatten(1, 2)[:, mask, 0].relu()
    change = (1 - red).sum(1) / 6
    gained = {key: (embedding - embeddings["none", 0])[:, 0] for key, embedding in embeddings.items()}
    torch.testing.assert_close(gained["targeted", 0], change)
    torch.testing.assert_close(gained["sign_flipped", 0], -change)
    torch.testing.assert_close(gained["diff_means", 0], torch.zeros(20), atol=1e-6, rtol=0)
    for draw, (other, random) in enumerate(zip(controls.random_latents[:, 0], controls.random_directions, strict=True)):
        torch.testing.assert_close(gained["random_latent", draw], change * (W_dec[other] @ model.spread[0]), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gained["random_direction", draw], change * (random @ model.spread[0]), atol=1e-6, rtol=1e-5)
        assert gained["random_latent", draw].abs().max() < 0.9 * change.max()
