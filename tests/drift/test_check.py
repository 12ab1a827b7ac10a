"""No more alarms than promised where nothing has changed; what has changed is found and named; images are counted until they are enough."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta

from ommatid import quality
from ommatid.config import DriftParams, Params, load_params
from ommatid.drift import Champion, Extraction, Reference, check, list_checks, open_reference, write_reference
from ommatid.drift.check import compare
from ommatid.drift.measure import measure
from ommatid.errors import ArtefactError
from ommatid.events import ignore
from ommatid.sae.model import SAE
from support.drifting import D_SAE, N_CLASSES, N_LATENTS, World, write_extraction, write_sae
from support.small_saes import make_sae
from support.study import CHECKOUT

KINDS = ("mmd_p", "auroc_p", "fvu_p", "latents_p")
PARAMS = DriftParams(min_images=30, alpha=0.2)
"""A level at which few permutations are needed."""
USUAL = World()


def test_100_draws_without_drift_give_at_most_5_alarms_at_5_percent() -> None:
    rows = [compare(0.05, USUAL.draw(60, 2 * seed), USUAL.draw(120, 2 * seed + 1), N_LATENTS)[0] for seed in range(100)]
    alarms = sum(any(row[kind] <= 0.05 for kind in KINDS) for row in rows)
    assert alarms <= 5
    # What so few alarms of 100 say of the rate: the exact (Clopper-Pearson) upper bound at 95 % from 5 alarms is 10.2 %.
    assert float(beta.ppf(0.95, alarms + 1, 100 - alarms)) < 0.103
    assert len({row["auroc"] for row in rows}) > 90  # they are draws of their own


@pytest.mark.parametrize(
    ("world", "finds"),
    [
        (World(shares=(0.2, 0.2, 0.2, 0.2, 0.2, 0.0)), {"mmd_p", "auroc_p", "latents_p"}),
        (World(blur=0.5), {"mmd_p", "auroc_p", "latents_p"}),
        (World(unexplained=0.35), {"fvu_p"}),
    ],
    ids=["new class", "blur", "unexplained"],
)
def test_a_planted_shift_is_found_by_the_tests_that_can_see_it(world: World, finds: set[str]) -> None:
    row, latents = compare(0.05, world.draw(300, 1), USUAL.draw(600, 2), N_LATENTS)
    assert {kind for kind in KINDS if row[kind] <= 0.05} == finds
    assert latents is not None
    if world.shares[4]:
        changed = (latents.p <= 0.05).nonzero()[:, 0]
        assert len(changed) >= 6 and (changed % N_CLASSES == 4).all()  # the latents of the new class, and no others
        assert (latents.rate > latents.rate_before)[changed].all()


def test_a_class_as_large_as_said_to_be_found_is_found() -> None:
    row, _ = compare(0.05, USUAL.draw(300, 1), USUAL.draw(600, 2), N_LATENTS)
    share = 2 * (row["auroc_found"] - 0.5)
    assert 0.05 < share < 0.3
    old = (1 - share) / 4
    found = [
        compare(0.05, World(shares=(old, old, old, old, share, 0.0)).draw(300, 3 + seed), USUAL.draw(600, 100 + seed), N_LATENTS)[0]
        for seed in range(5)
    ]
    assert sum(any(row[kind] <= 0.05 for kind in KINDS) for row in found) >= 4


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Champion:
    root = tmp_path_factory.mktemp("champion")
    sae, extraction = write_sae(root / "sae"), write_extraction(root, {"old": range(180)})
    write_reference(root / "drift", sae, extraction, "max")
    return Champion("first", sae, opened(root / "drift"))


def opened(folder: Path) -> Reference:
    reference = open_reference(folder)
    assert reference is not None
    return reference


def extraction(root: Path, shift: float = 0.0, params: dict[str, object] | None = None, **groups: range) -> Extraction:
    return write_extraction(root, {"old": range(170), **groups}, shift, params)


def test_a_reference_holds_the_ids_of_all_images_and_what_the_sae_does_on_its_evaluation_images(champion: Champion) -> None:
    reference = champion.reference
    assert len(reference.known) == 180 and len(reference.embeddings()) == 120
    measured = reference.measured()
    assert measured.images.tolist() == list(range(0, 180, 3))
    sae = make_sae("thresholds", 8, D_SAE)
    draws = [np.random.default_rng(seed).normal(size=(5, 8))[1:] for seed in range(0, 180, 3)]
    x = torch.from_numpy(np.stack(draws)).half().float()
    acts = sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    dense = np.zeros((60, D_SAE), np.float32)
    dense[measured.rows, measured.latents] = measured.acts
    assert dense == pytest.approx(acts.amax(1).numpy(), rel=1e-5)
    error = (x - sae.decode(acts.flatten(0, 1)).unflatten(0, x.shape[:2])).square().sum((1, 2))
    assert measured.error == pytest.approx(error.numpy(), rel=1e-5)
    assert measured.variance == pytest.approx((x - x.mean((0, 1))).square().sum((1, 2)).numpy(), rel=1e-5)


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_activations_of_training_images_are_pooled_in_any_order_of_their_tokens(tmp_path: Path, champion: Champion, how: str) -> None:
    data = extraction(tmp_path)
    chosen = np.array([image for image, _, split in data.rows if split == "train"][:20])
    measured = measure(SAE.load(champion.sae.path), data.activations, None, {"train": chosen}, how, ignore)  # type: ignore[arg-type]
    x = torch.from_numpy(np.stack([np.random.default_rng(int(seed)).normal(size=(5, 8))[1:] for seed in chosen])).half().float()
    acts = make_sae("thresholds", 8, D_SAE).encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    dense = np.zeros((20, D_SAE), np.float32)
    dense[measured.rows, measured.latents] = measured.acts
    assert dense == pytest.approx((acts.mean(1) if how == "mean" else acts[:, 0]).numpy(), rel=1e-4)


def test_of_a_transcoder_what_it_decodes_counts(tmp_path: Path) -> None:
    sae = write_sae(tmp_path / "sae", d_out=8)
    read, decoded = (write_extraction(tmp_path / name, {group: range(30)}, 0.7) for name, group in (("x", "old"), ("y", "shifted")))
    chosen = {split: np.array([image for image, _, of in read.rows if of == split]) for split in ("train", "eval")}
    measured = measure(SAE.load(sae.path), read.activations, decoded.activations, chosen, "max", ignore)
    x = torch.from_numpy(np.stack([np.random.default_rng(seed).normal(size=(5, 8))[1:] for seed in range(30)]))
    transcoder, y = make_sae("thresholds", 8, D_SAE, d_out=8), (x + 0.7).half().float()
    x_hat = transcoder.decode(transcoder.encode(x.half().float().flatten(0, 1))).unflatten(0, (30, 4))
    assert measured.error == pytest.approx((y - x_hat).square().sum((1, 2)).numpy(), rel=1e-4)
    assert measured.variance == pytest.approx((y - y.mean((0, 1))).square().sum((1, 2)).numpy(), rel=1e-4)


def test_images_are_counted_until_they_are_enough_and_then_compared_once(tmp_path: Path, champion: Champion) -> None:
    folder = tmp_path / "drift"
    assert check(PARAMS, folder, champion, extraction(tmp_path / "0")) is None  # images removed, none new
    few = check(PARAMS, folder, champion, extraction(tmp_path / "1", new=range(1000, 1020)))
    assert few is not None and few.verdict == "too_few"
    assert few.row["reason"] == (
        "20 new images are too few to tell whether they differ from the champion's 180: at least 30 are compared, and these will be "
        "among them"
    )
    enough = extraction(tmp_path / "2", new=range(1000, 1060))
    found = check(PARAMS, folder, champion, enough)
    assert found is not None and found.verdict == "none", found and found.row
    assert found.row["n_new"] == 60 and "a share of" in found.row["reason"]
    assert found.pictures() == [] and len(found.latents()) == D_SAE and not any(row["is_changed"] for row in found.latents())
    assert check(PARAMS, folder, champion, enough) is None  # they count as compared
    later = check(PARAMS, folder, champion, extraction(tmp_path / "3", new=range(1000, 1060), newer=range(2000, 2010)))
    assert later is not None and later.row["n_new"] == 10
    assert [one.verdict for one in list_checks(folder)] == ["too_few", "none", "too_few"]


def test_images_of_which_nothing_can_be_compared_are_not_settled(
    tmp_path: Path, champion: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ommatid.drift.check"], "LEAST_COMPARED", 1000)
    data = extraction(tmp_path / "1", new=range(1000, 1060))
    for _ in range(2):  # the second time, they are new again
        found = check(PARAMS, tmp_path / "drift", champion, data)
        assert found is not None and found.verdict == "too_few"
    assert found.row["reason"].startswith("60 new images could not be compared with the champion's 180: fewer than 1000 of them, or of ")
    assert found.row["auroc"] is None and found.latents() == []
    monkeypatch.undo()
    later = check(PARAMS, tmp_path / "drift", champion, extraction(tmp_path / "2", new=range(1000, 1060), newer=range(2000, 2060)))
    assert later is not None and (later.verdict, later.row["n_new"]) == ("none", 120)


def test_a_look_with_other_params_settles_nothing(tmp_path: Path, champion: Champion) -> None:
    folder = tmp_path / "drift"
    data = extraction(tmp_path / "1", shift=0.8, shifted=range(3000, 3060))
    blind = PARAMS.model_copy(update={"max_auroc": 1.0, "max_fvu_rise": 1.0, "max_changed": 1.0})
    look = check(blind, folder, champion, data)
    assert look is not None and look.verdict == "slight"
    found = check(PARAMS.model_copy(update={"action": "stop"}), folder, champion, data)
    assert found is not None and (found.verdict, found.row["n_new"]) == ("drift", 60)
    assert check(blind.model_copy(update={"action": "stop"}), folder, champion, data) is None  # what it does then is no part of the look


def test_drift_is_found_again_until_its_images_are_gone_and_shows_the_changed_latents(tmp_path: Path, champion: Champion) -> None:
    folder = tmp_path / "drift"
    data = extraction(tmp_path / "1", shift=0.8, shifted=range(3000, 3060))
    found = check(PARAMS, folder, champion, data)
    assert found is not None and found.verdict == "drift"
    assert found.row["reason"].startswith(
        "60 new images differ from the champion's 180: a classifier tells them apart with an AUROC of 0.9"
    )
    again = check(PARAMS, folder, champion, data)
    assert again is not None and again.row == found.row  # not made twice
    assert len(list_checks(folder)) == 1
    strongest = found.latents(1)[0]
    assert strongest["is_changed"] and strongest["rank"] == 1 and strongest["change"] in ("more", "fewer", "stronger", "weaker")
    p = [min(value for value in (row["rate_p"], row["act_p"]) if value is not None) for row in found.latents()]
    assert p == sorted(p)
    pictures = [row for row in found.pictures() if row["latent"] == strongest["latent"]]
    assert {row["side"] for row in pictures} == {"new"}  # without a catalogue there are none of the champion's images
    assert all(row["path"].startswith("shifted/") and row["thumbnail"].startswith(b"picture of 30") for row in pictures)
    assert [row["act"] for row in pictures] == sorted((row["act"] for row in pictures), reverse=True)
    more = check(PARAMS, folder, champion, extraction(tmp_path / "2", shift=0.8, shifted=range(3000, 3060), new=range(1000, 1030)))
    assert more is not None and more.verdict == "drift" and more.row["n_new"] == 90
    mended = check(PARAMS, folder, champion, extraction(tmp_path / "3", new=range(1000, 1060)))
    assert mended is not None and mended.verdict == "none"


def test_what_cannot_be_compared_is_named(tmp_path: Path, champion: Champion) -> None:
    other = extraction(tmp_path / "1", params={"tokens": "all"}, new=range(1000, 1060))
    found = check(PARAMS, tmp_path / "drift", champion, other)
    assert found is not None and found.verdict == "not_comparable"
    assert found.row["reason"] == "60 new images cannot be compared with the champion's 180: tokens was patch, is all"


def test_sampled_training_tokens_leave_only_evaluation_images_to_be_encoded(tmp_path: Path, champion: Champion) -> None:
    sampled = extraction(tmp_path / "1", params={"tokens": "patch", "sample": 2}, new=range(1000, 1060))
    found = check(PARAMS, tmp_path / "drift", champion, sampled)
    assert found is not None and (found.row["n_embedded"], found.row["n_encoded"]) == (60, 20)
    few = extraction(tmp_path / "2", params={"tokens": "patch", "sample": 2}, new=range(1000, 1040))
    found = check(PARAMS, tmp_path / "other", champion, few)  # 13 evaluation images
    assert found is not None and found.row["auroc"] is not None and found.row["fvu"] is None and found.latents() == []


def test_a_reference_of_some_images_among_others_needs_both_splits(tmp_path: Path, champion: Champion) -> None:
    data = extraction(tmp_path)
    ids = {image_id for _, image_id, _ in data.rows[:30]}
    write_reference(tmp_path / "some", champion.sae, data, "max", ids)
    assert opened(tmp_path / "some").known == {bytes.fromhex(image_id) for image_id in ids}
    with pytest.raises(ArtefactError, match="no two images of the champion are of the split eval"):
        write_reference(tmp_path / "none", champion.sae, data, "max", {data.rows[1][1], data.rows[2][1], data.rows[4][1]})
    data.activations.summary["model"] = "another"
    with pytest.raises(ArtefactError, match="activations: was made with the model another, and thresholds-20-k4-s0-00000000 with tiny"):
        write_reference(tmp_path / "none", champion.sae, data, "max")
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, ["AUROC above 0.55", "1.0% of the latents"]),
        ({"max_auroc": 1.0, "max_fvu_rise": 1.0}, ["1.0% of the latents"]),
        ({"max_auroc": 1.0, "max_fvu_rise": 1.0, "max_changed": 1.0}, []),
    ],
)
def test_the_gate_fails_exactly_if_the_verdict_is_drift(
    tmp_path: Path, champion: Champion, changes: dict[str, float], fails: list[str]
) -> None:
    params = load_params(CHECKOUT / "params.yaml")
    drift = PARAMS.model_copy(update=changes)
    params: Params = params.model_copy(update={"drift": drift})
    found = check(drift, tmp_path / "drift", champion, extraction(tmp_path / "1", shift=0.8, shifted=range(3000, 3060)))
    assert found is not None
    report = quality.check("drift", found.artefact, params, {})
    assert report.success == (found.verdict != "drift") == (not fails)
    assert len(report.failures) == len(fails) and all(text in one.name for one, text in zip(report.failures, fails, strict=True))
    if not fails:
        assert found.verdict == "slight" and found.row["reason"].startswith("60 new images differ slightly from the champion's 180")
