"""Proves, on a small world with planted latents, that evaluation finds how latents relate to one another, to classes and to a taxonomy.

Every number is compared with one computed from all activations at once; then holes, missing labels, one image, dead latents, and a kill.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ommatid.compute import checkpoint
from ommatid.evaluate import batches, latent_pairs, monosemanticity
from ommatid.evaluate.latent_pairs import MIN_BOTH, iter_fires, measure_structure
from ommatid.events import Progress
from ommatid.images.eval_split import load_eval_split
from ommatid.sae.model import SAE
from ommatid.store import Artefact
from support.world import ALWAYS, D_SAE, DEAD, DOG, DOG_AGAIN, KINDS, LEVELS, PATHS, SHOWN, make_inputs, make_sae, make_world, run

N_IMAGES = 240
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def fifty_wait() -> Iterator[None]:
    """Let fifty images be judged at once, so that blocks cross the borders of shards, which have eighty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monosemanticity, "IMAGES", 50)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fifty_wait: None) -> dict[str, Artefact]:
    """Inputs and their evaluation."""
    root = tmp_path_factory.mktemp("world")
    x, labels = make_world(N_IMAGES)
    inputs = make_inputs(root, x, labels, ["/".join(PATHS[label]) for label in labels])
    return {**inputs, "evaluate": run(root / "evaluation", inputs)}


@pytest.fixture(scope="module")
def acts() -> torch.Tensor:
    """Activations of all tokens, (images, tokens, d_sae)."""
    x, _ = make_world(N_IMAGES)
    return make_sae().encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def rows_of(evaluation: Artefact, table: str) -> Rows:
    return evaluation.read(table).to_pylist()


# ---- among latents


def test_cofiring_equals_a_count_over_all_pairs(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    fires = acts.amax(1) > 0
    n = fires.sum(0).tolist()
    pairs = []
    for a, b in itertools.permutations(range(D_SAE), 2):
        both = int((fires[:, a] & fires[:, b]).sum())
        lift = both * N_IMAGES / (n[a] * n[b]) if both else 0.0
        if both >= MIN_BOTH and lift > 1:
            pairs.append((a, -lift, b, both / (n[a] + n[b] - both), both))
    expected = [
        (a, rank, b, pytest.approx(-lift), pytest.approx(jaccard), both)
        for _, mine in itertools.groupby(sorted(pairs), key=lambda pair: pair[0])
        for rank, (a, lift, b, jaccard, both) in enumerate(itertools.islice(mine, latent_pairs.N_PARTNERS), start=1)
    ]
    found = [tuple(row.values())[1:] for row in rows_of(world["evaluate"], "cofiring")]
    assert found == expected
    assert {row[2] for row in found if row[0] == DOG} == {0, 1, DOG_AGAIN}


def test_tiles_and_steps_change_nothing(world: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(path) for path in world["evaluate"].files("firings")]
    directions = SAE.load(world["train"].path).W_dec
    whole = measure_structure("s", files, directions, N_IMAGES)
    for name, value in (("PAIRS", 4 * D_SAE), ("PAIRS_AT_ONCE", 3 * D_SAE), ("VALUES", 7 * D_SAE)):
        monkeypatch.setattr(latent_pairs, name, value)
    tiled = measure_structure("s", files, directions, N_IMAGES)
    assert tiled.cofiring.equals(whole.cofiring)
    assert torch.equal(tiled.duplicate_of, whole.duplicate_of)


def test_images_are_whole_although_firings_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fires = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    image, latent = fires.nonzero(as_tuple=True)
    files = []
    for i, rows in enumerate(np.array_split(np.arange(len(image)), 13)):
        files.append(str(tmp_path / f"firings-{i:05d}.parquet"))
        pq.write_table(pa.table({"image": image[rows].numpy(), "latent": latent[rows].numpy()}), files[-1])
    monkeypatch.setattr(latent_pairs, "VALUES", 4 * 6)
    steps = list(iter_fires(files, 6))
    assert max(len(step) for step in steps) == 4
    assert torch.equal(torch.cat(steps), fires[fires.any(1)].float())


def test_near_duplicates_name_each_other(world: dict[str, Artefact]) -> None:
    found = {row["latent"]: row["duplicate_of"] for row in rows_of(world["evaluate"], "latents")}
    assert {latent: other for latent, other in found.items() if other is not None} == {DOG: DOG_AGAIN, DOG_AGAIN: DOG}


def test_equal_directions_that_fire_on_other_images_are_no_duplicates(world: dict[str, Artefact]) -> None:
    """And latents that fire on the same images with other directions are none either."""
    files = [str(path) for path in world["evaluate"].files("firings")]
    directions = SAE.load(world["train"].path).W_dec
    directions[4], directions[DOG_AGAIN] = directions[DOG], directions[5]
    assert measure_structure("s", files, directions, N_IMAGES).duplicate_of.tolist() == [-1] * D_SAE


def test_uniqueness_is_computed_over_the_sixteen_strongest_images(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    pooled = acts.amax(1)
    top = [set(np.argsort(-pooled[:, latent].numpy(), kind="stable")[:16].tolist()) for latent in range(D_SAE)]
    for row in rows_of(world["evaluate"], "latents"):
        mine = row["latent"]
        best = max(len(top[mine] & top[b]) / len(top[mine] | top[b]) for b in range(D_SAE) if b not in (mine, DEAD))
        assert row["uniqueness"] == (None if mine == DEAD else pytest.approx(1 - best))


def test_flags_follow_from_density(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    density = (acts.flatten(0, 1) > 0).double().mean(0)
    for row in rows_of(world["evaluate"], "latents"):
        assert row["is_dense"] == (float(density[row["latent"]]) > 0.1)
        assert not row["is_rare"]
    assert rows_of(world["evaluate"], "latents")[ALWAYS]["density"] == 1


def test_densities_count_every_latent_of_every_dictionary(world: dict[str, Artefact]) -> None:
    comparisons = {row["dictionary"]: row["n_latents"] for row in rows_of(world["evaluate"], "comparisons")}
    densities = rows_of(world["evaluate"], "densities")
    for dictionary, n in comparisons.items():
        assert sum(row["n_latents"] for row in densities if row["dictionary"] == dictionary) == n
    mine = [(row["low"], row["n_latents"]) for row in densities if row["dictionary"] == "sae"]
    assert mine[0] == (0, 1)
    assert mine[-1] == (0.1, 10)


# ---- kinds of token and levels


def test_fidelity_of_each_kind_equals_a_direct_computation(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    x, _ = make_world(N_IMAGES)
    sae = make_sae()
    found = {row["kind"]: row for row in rows_of(world["evaluate"], "fidelity") if row["dictionary"] == "sae"}
    assert list(found) == ["cls", "patch", "all"]
    for kind, row in found.items():
        tokens = [i for i, own in enumerate(KINDS) if kind in (own, "all")]
        mine, fired = x[:, tokens].flatten(0, 1), acts[:, tokens].flatten(0, 1)
        x_hat = sae.decode(fired)
        assert row["n_tokens"] == len(mine)
        assert row["fvu"] == pytest.approx(float((mine - x_hat).square().sum() / (mine - mine.mean(0)).square().sum()), rel=1e-4)
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(mine, x_hat, dim=1).mean()), rel=1e-4)
        assert row["l0"] == pytest.approx(float((fired > 0).sum(1).double().mean()))
    assert found["all"]["fvu"] == pytest.approx(world["evaluate"].summary["fvu"])
    assert {row["dictionary"] for row in rows_of(world["evaluate"], "fidelity")} == {"sae", "untrained", "sparse_neurons"}


def test_later_levels_go_deeper_and_explain_more(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    x, _ = make_world(N_IMAGES)
    sae, levels, latents = make_sae(), rows_of(world["evaluate"], "levels"), rows_of(world["evaluate"], "latents")
    assert [(row["level"], row["first"], row["last"]) for row in levels] == [(1, 0, 0), (2, 1, 2), (3, 3, 10)]
    for row, bound in zip(levels, LEVELS, strict=True):
        kept = acts.flatten(0, 1) * (torch.arange(D_SAE) < bound)
        rest = x.flatten(0, 1) - sae.decode(kept)
        assert row["fvu"] == pytest.approx(float(rest.square().sum() / (x - x.mean((0, 1))).square().sum()), rel=1e-4)
        mine = latents[row["first"] : row["last"] + 1]
        for mean, n, column in (("ms", "n_ms", "ms"), ("lca_depth", "n_lca", "lca_depth")):
            known = [latent[column] for latent in mine if latent[column] is not None]
            assert (row[n], row[mean]) == (len(known), pytest.approx(np.mean(known)))
    assert levels[0]["lca_depth"] == 1
    assert levels[1]["lca_depth"] == 2
    assert levels[0]["ms"] < levels[1]["ms"]


def test_an_sae_without_levels_is_one_level(tmp_path: Path) -> None:
    x, labels = make_world(40)
    sae = make_sae()
    plain = SAE(dataclasses.replace(sae.config, prefixes=None), **sae.tensors())
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, labels, [None] * 40, plain))
    (level,) = rows_of(evaluation, "levels")
    assert (level["first"], level["last"], level["fvu"]) == (0, D_SAE - 1, evaluation.summary["fvu"])
    assert level["lca_depth"] is None
    assert level["n_lca"] == 0


# ---- labels


def test_depth_is_that_of_the_planted_classes(world: dict[str, Artefact]) -> None:
    depths = {row["latent"]: row["lca_depth"] for row in rows_of(world["evaluate"], "latents")}
    assert [depths[latent] for latent in range(9)] == [1, 2, 2, 3, 3, 3, 3, 2, 3]
    assert depths[DEAD] is None


def test_entropy_and_purity_are_computed_over_all_activations(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    _, labels = make_world(N_IMAGES)
    pooled = acts.amax(1).double()
    for row in rows_of(world["evaluate"], "latents"):
        mine = pooled[:, row["latent"]]
        mass = {name: float(sum(a for a, label in zip(mine, labels, strict=True) if label == name)) for name in PATHS}
        total = sum(mass.values())
        bits = sum(-m / total * math.log2(m / total) for m in mass.values() if m) if total else None
        assert row["label_entropy"] == (None if bits is None else pytest.approx(bits, abs=1e-9))
        fired = [labels[i] for i in np.argsort(-mine.numpy(), kind="stable") if mine[i] > 0][:64]
        commonest = max(map(fired.count, fired)) / 64 if len(fired) == 64 else None
        assert row["purity_64"] == commonest
    assert world["evaluate"].summary["coverage"] == 1


def test_a_taxonomy_with_holes_uses_the_images_that_have_a_path(tmp_path: Path) -> None:
    x, labels = make_world(N_IMAGES)
    paths = ["/".join(PATHS[label]) for label in labels]
    halved: list[str | None] = [path if i % 2 else None for i, path in enumerate(paths)]  # 5 classes in turn: half of each
    few: list[str | None] = [path if i < 70 else None for i, path in enumerate(paths)]  # 14 of each class
    depths = []
    for name, holes in (("halved", halved), ("few", few)):
        evaluation = run(tmp_path / name / "evaluation", make_inputs(tmp_path / name, x, labels, holes))
        depths.append([row["lca_depth"] for row in rows_of(evaluation, "latents")][:9])
    assert depths[0] == [1, 2, 2, 3, 3, 3, 3, 2, 3]
    assert depths[1][3:] == [None] * 6


@pytest.mark.parametrize("label", [None, "dog"])
def test_class_metrics_are_null_with_fewer_than_two_classes(tmp_path: Path, label: str | None) -> None:
    x, _ = make_world(60)
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, [label] * 60, [None] * 60))
    for row in rows_of(evaluation, "latents"):
        assert [row[name] for name in ("purity", "purity_64", "label_entropy", "lca_depth")] == [None] * 4
        assert row["top_classes"] == []
    for row in rows_of(evaluation, "comparisons"):
        assert (row["purity"], row["coverage"]) == (None, None)
    assert rows_of(evaluation, "probes") == []


# ---- probes


def test_probes_find_the_latents_that_are_planted(world: dict[str, Artefact]) -> None:
    probes = rows_of(world["evaluate"], "probes")
    assert [(row["class"], row["probe"], row["k"]) for row in probes] == sorted(
        (name, probe, k) for name in PATHS for probe, k in [*(("latents", k) for k in (1, 2, 5, 10)), ("x", 16)]
    )
    places = {name: latent for latent, name in reversed(SHOWN.items())}
    held_out = load_eval_split(world["images"]).is_held_out
    _, labels = make_world(N_IMAGES)
    for row in probes:
        assert row["n_positive"] == sum(label == row["class"] and out for label, out in zip(labels, held_out, strict=True))
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        assert row["accuracy"] > 0.97
        if row["probe"] == "latents":
            assert len(row["latents"]) == row["k"]
            assert places[row["class"]] in (row["latents"] if row["class"] != "dog" else row["latents"] + [DOG])
        else:
            assert row["latents"] is None


def test_latents_of_a_probe_are_chosen_on_the_half_that_fits_it(world: dict[str, Artefact], acts: torch.Tensor) -> None:
    _, labels = make_world(N_IMAGES)
    fits = torch.from_numpy(~load_eval_split(world["images"]).is_held_out)
    for row in rows_of(world["evaluate"], "probes"):
        if row["k"] == 10:
            mine = torch.tensor([label == row["class"] for label in labels])
            means = [acts.amax(1)[fits & chosen].double().mean(0) for chosen in (mine, ~mine)]
            order = np.argsort(-(means[0] - means[1]).abs().numpy(), kind="stable")
            assert row["latents"] == order[:10].tolist()


def test_rare_classes_are_not_probed(tmp_path: Path) -> None:
    x, labels = make_world(120)
    few = [label if label != "car" or i < 20 else None for i, label in enumerate(labels)]
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, few, [None] * 120))
    assert {row["class"] for row in rows_of(evaluation, "probes")} == set(PATHS) - {"car"}


# ---- edges


def test_one_image_gives_nulls(tmp_path: Path) -> None:
    x, _ = make_world(1)
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, ["dog"], ["animal/mammal/dog"], n_shards=1))
    for row in rows_of(evaluation, "latents"):
        assert [row[name] for name in ("ms", "purity", "label_entropy", "lca_depth", "uniqueness", "duplicate_of")][:5] == [None] * 5
    assert rows_of(evaluation, "cofiring") == []
    assert all(row["ms"] is None and row["ms_floor"] is None for row in rows_of(evaluation, "comparisons"))


def test_all_latents_dead_gives_nulls(tmp_path: Path) -> None:
    x, labels = make_world(120)
    sae = make_sae()
    sae.b_enc -= 1000
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, labels, ["/".join(PATHS[label]) for label in labels], sae))
    for row in rows_of(evaluation, "latents"):
        assert row["is_dead"] and not row["is_rare"] and not row["is_dense"]
        assert [row[name] for name in ("ms", "purity", "purity_64", "label_entropy", "lca_depth", "uniqueness", "duplicate_of")] == [
            None
        ] * 7
    assert rows_of(evaluation, "cofiring") == rows_of(evaluation, "examples") == rows_of(evaluation, "near_misses") == []
    assert evaluation.summary["ms"] is None
    assert {row["accuracy"] for row in rows_of(evaluation, "probes") if row["probe"] == "latents"} == {0.5}


# ---- a kill


@pytest.mark.parametrize("at", range(1, 8))
def test_a_killed_evaluation_continues_and_ends_with_the_same_bytes(
    world: dict[str, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Three shards in each of two passes, a step and an event each; checkpoints where a shard begins."""
    monkeypatch.setattr(checkpoint, "SECONDS", -1.0)
    inputs = {name: world[name] for name in ("images", "extract", "train")}

    class Killed(BaseException):
        pass

    events: list[tuple[str, int]] = []

    def listen(event: Any) -> None:
        if isinstance(event, Progress):
            events.append((event.what, event.done))
            if len(events) == at:
                raise Killed

    if at <= 6:
        with pytest.raises(Killed):
            run(tmp_path / "evaluation", inputs, listen)
        assert not (tmp_path / "evaluation").exists()
        died = events[-1]
        again = run(tmp_path / "evaluation", inputs, listen)
        assert events[at] == died  # the shard in which it died is done again, none before it
        assert len(events) == 7
    else:
        again = run(tmp_path / "evaluation", inputs, listen)
    assert again.digest == world["evaluate"].digest


def test_a_checkpoint_that_is_due_within_a_shard_waits_for_the_next(
    world: dict[str, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps a shard; a checkpoint is due from the second shard's first step on, and the run is killed in its third."""
    monkeypatch.setattr(batches, "ENTRIES", 20 * len(KINDS) * D_SAE)
    inputs = {name: world[name] for name in ("images", "extract", "train")}
    unbroken = run(tmp_path / "unbroken", inputs)
    events: list[int] = []

    class Killed(BaseException):
        pass

    def listen(event: Any) -> None:
        if isinstance(event, Progress):
            events.append(event.done)
            if len(events) == 5:
                monkeypatch.setattr(checkpoint, "SECONDS", -1.0)
            if len(events) == 7:
                raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "evaluation", inputs, listen)
    assert events == [20 * n for n in range(1, 8)]
    assert run(tmp_path / "evaluation", inputs).digest == unbroken.digest


def test_each_step_of_the_stream_is_one_shard(world: dict[str, Artefact]) -> None:
    """The test above relies on it."""
    steps = list(batches.iter_images(world["extract"], None, D_SAE, N_IMAGES, "", lambda event: None))
    assert [batch.shard for batch in steps] == [0, 1, 2]
