"""Proves, on pictures and latents with planted colours, that evaluation and labelling find the planted truth.

Tiles are red, green, blue or grey. The SAE is made by hand: latents 0 to 2 fire on one colour each, 3 on red and green, 4 never,
5 on everything. So MS must rank pure above mixed, purity must be 1, heat maps must be bright where the tile is, and the names
must be the colours. Training is run on the same activations for what its stage adds to the trainer: resuming, order, errors.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ommatid.activations.batches import load_sample
from ommatid.activations.columns import from_float16, from_float32
from ommatid.compute import checkpoint
from ommatid.config import Baseline, Params, TrainParams
from ommatid.errors import ConfigError, TrainingError
from ommatid.evaluate.passes import CONTROL_SEED
from ommatid.events import Measured
from ommatid.images.decode import decode
from ommatid.images.eval_split import iter_latent_firings, load_eval_split
from ommatid.label import evidence as label_examples
from ommatid.label.context import load_joint
from ommatid.label.labellers.vocabulary import load_words
from ommatid.label.stage import label
from ommatid.sae.baselines import make_baseline
from ommatid.sae.model import SAE
from ommatid.store import Artefact, open_draft
from ommatid.train.stage import run as train
from support.study import make_artefact, make_test_params
from support.tiles import ALWAYS, COLOURS, D_SAE, DEAD, GRID, MIXED, PURE, TileModel, make_line


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "colours.txt"
    path.write_text("# colours\n" + "\n".join(COLOURS) + "\n")
    return path


@pytest.fixture(scope="module")
def params(words: Path) -> Params:
    return make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": D_SAE, "k": 1, "epochs": 20, "batch_size": 128, "lr": 0.01},
        evaluate={"n_top": 16, "n_per_decile": 2, "baselines": ["pca", "kmeans", "nmf"]},
        label={"labellers": [{"kind": "vocabulary", "words": [str(words)]}], "min_examples": 4, "n_examples": 16},
    )


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, params: Params) -> dict[str, Artefact]:
    """Artefacts of all stages up to `label`."""
    return make_line(tmp_path_factory.mktemp("line"), params, label=label)


def latents_of(line: Mapping[str, Artefact]) -> list[dict[str, Any]]:
    return line["evaluate"].read("latents").to_pylist()


def test_pure_latents_rank_above_mixed_above_floor(line: dict[str, Artefact]) -> None:
    latents, floor = latents_of(line), line["evaluate"].summary["ms_floor"]
    for latent in PURE:
        assert latents[latent]["ms"] > latents[MIXED]["ms"] + 0.2 > floor + 0.2
        assert latents[latent]["ms_low"] <= latents[latent]["ms"] <= latents[latent]["ms_high"]
    assert latents[DEAD]["ms"] is None
    assert line["evaluate"].summary["ms_left_out"] == 1


def test_zero_shot_accuracy_is_in_the_evaluation(line: dict[str, Artefact]) -> None:
    rows = {row["spliced"]: row for row in line["evaluate"].read("zero_shot").to_pylist()}
    assert list(rows) == ["plain", "sae", "sae_with_error", "mean", "untrained", "pca", "kmeans", "nmf"]
    assert {row["sae"] for row in rows.values()} == {"planted"}
    summary = line["evaluate"].summary
    assert summary["zero_shot"] == "ok" and summary["zero_shot_accuracy"] == rows["plain"]["accuracy"] == 1.0


def test_dead_latents_are_flagged_by_evaluation_and_by_training(line: dict[str, Artefact]) -> None:
    assert [row["is_dead"] for row in latents_of(line)] == [i == DEAD for i in range(D_SAE)]
    assert [row["dead_in_training"] for row in latents_of(line)] == [i == DEAD for i in range(D_SAE)]


def test_purity_and_top_classes_are_those_of_the_colours(line: dict[str, Artefact]) -> None:
    latents = latents_of(line)
    for latent, colour in PURE.items():
        assert latents[latent]["top_classes"] == [colour]
        assert latents[latent]["purity"] == 1.0
    assert set(latents[MIXED]["top_classes"]) == {"red", "green"}
    assert latents[DEAD]["purity"] is None


def test_numbers_equal_a_direct_computation(line: dict[str, Artefact]) -> None:
    """Density, n_images, max and mean are computed by encoding everything at once."""
    sae = SAE.load(line["train"].path)
    x = from_float16(line["extract"].read("eval")["x"]).float()
    acts = sae.encode(x)
    by_image = acts.unflatten(0, (-1, GRID[0] * GRID[1])).amax(1)
    for row in line["evaluate"].read("latents").to_pylist():
        mine = acts[:, row["latent"]]
        assert row["density"] == pytest.approx(float((mine > 0).double().mean()))
        assert row["n_images"] == int((by_image[:, row["latent"]] > 0).sum())
        assert row["max_act"] == pytest.approx(float(mine.max()), rel=1e-5)
        assert row["is_dead"] == (row["density"] == 0) == (row["mean_act"] is None)
    assert line["evaluate"].rows("firings") == int((by_image > 0).sum())
    fvu = float((x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum())
    assert line["evaluate"].summary["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert line["evaluate"].summary["l0"] == pytest.approx(float((acts > 0).sum(1).double().mean()))


def test_examples_are_ranked_by_decile_and_hot_where_the_tile_is(line: dict[str, Artefact]) -> None:
    firings = line["evaluate"].read("firings").to_pandas()
    examples = line["evaluate"].read("examples").to_pandas()
    encoded = dict(zip(*(line["images"].read("images")[name].to_pylist() for name in ("image", "encoded")), strict=True))
    model = TileModel()
    for latent, colour in PURE.items():
        mine = examples[examples.latent == latent]
        fired = firings[firings.latent == latent].sort_values(["act", "image"], ascending=[False, True])
        ordered = mine.sort_values(["decile", "rank"], ascending=[False, True])
        top, rest = ordered[:16], ordered[16:]
        assert top.image.tolist() == fired.image.tolist()[:16]
        assert set(rest.decile) <= set(range(1, 10)) and rest.groupby("decile").size().max() <= 2
        edges = {d: g.act for d, g in mine.groupby("decile")}
        assert all(edges[a].max() <= edges[b].min() for a in edges for b in edges if a < b)
        for _, example in top.iterrows():
            tiles = model.colours(torch.from_numpy(np.array(decode(encoded[example.image])))[None])[0]
            reference = torch.tensor(COLOURS[colour]).float() / 128 - 1
            hottest = int(np.argmax(example.heat))
            assert float(torch.cosine_similarity(tiles[hottest // GRID[1], hottest % GRID[1]], reference, dim=0)) > 0.9
            assert float(np.max(example.heat)) == pytest.approx(example.act, rel=1e-5)
            assert (example.rows, example.cols) == GRID


def test_purity_is_computed_over_the_images_shown(line: dict[str, Artefact]) -> None:
    examples = line["evaluate"].read("examples").to_pandas().sort_values(["latent", "decile", "rank"], ascending=[True, False, True])
    images = line["images"].read("images")
    label = dict(zip(images["image"].to_pylist(), images["label"].to_pylist(), strict=True))
    pure = {row["latent"]: row["purity"] for row in latents_of(line) if row["purity"] is not None}
    shown = {latent: Counter(map(label.get, mine.image[:16])) for latent, mine in examples.groupby("latent")}
    assert pure and pure == {latent: shown[latent].most_common(1)[0][1] / 16 for latent in pure}


def test_comparisons_have_a_row_for_the_sae_and_each_control(line: dict[str, Artefact]) -> None:
    rows = {row["dictionary"]: row for row in line["evaluate"].read("comparisons").to_pylist()}
    assert list(rows) == ["sae", "untrained", "neurons", "pca", "kmeans", "nmf"]
    assert rows["neurons"]["n_latents"] == TileModel.d_model
    assert rows["neurons"]["fvu"] is None
    assert len({row["ms_floor"] for row in rows.values()}) == 1


def test_baselines_are_measured_in_the_same_way_as_the_sae(line: dict[str, Artefact]) -> None:
    """The baselines are fitted and encoded on everything at once."""
    rows = {row["dictionary"]: row for row in line["evaluate"].read("comparisons").to_pylist()}
    config = SAE.load(line["train"].path).config
    sample = load_sample(line["extract"], line["extract"].rows("train"))
    x = from_float16(line["extract"].read("eval")["x"]).float()
    kinds: tuple[Baseline, ...] = ("pca", "kmeans", "nmf")
    for kind in kinds:
        row, baseline = rows[kind], make_baseline(kind, config, sample, CONTROL_SEED)
        acts = baseline.encode(x)
        fvu = float((x - baseline.decode(acts)).square().sum() / (x - x.mean(0)).square().sum())
        assert row["n_latents"] == baseline.n_latents == D_SAE
        assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
        assert row["l0"] == pytest.approx(float((acts > 0).sum(1).double().mean()), rel=1e-3)
        assert row["l0"] <= config.k
        assert row["dead"] == pytest.approx(float((acts == 0).all(0).double().mean()))
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert 0.25 <= row["purity"] <= 1
    # six centres for four colours leave little; one component of two signs more; a part needs the mean of the tokens besides
    assert rows["kmeans"]["fvu"] < 0.05 < rows["pca"]["fvu"] < 1


def test_labels_are_the_colours_and_beat_their_controls(line: dict[str, Artefact]) -> None:
    labels = line["label"].read("labels").to_pylist()
    assert len(labels) == D_SAE
    for latent, colour in PURE.items():
        assert labels[latent]["label"] == colour
        assert labels[latent]["score"] > 0.9
        assert labels[latent]["auroc_low"] > 0.8
    assert labels[DEAD]["status"] == "too_few_examples"
    assert labels[ALWAYS]["status"] == "ok"
    assert labels[ALWAYS]["score"] is None  # it fires on every image: nothing to tell apart
    assert all((row["label"] is None) == (row["status"] != "ok") for row in labels)
    assert line["label"].summary["score"] > line["label"].summary["control_score"] + 0.1


def test_labels_are_scored_on_images_that_were_not_used_to_make_them(line: dict[str, Artefact]) -> None:
    halves = load_eval_split(line["images"])
    assert 0.3 < halves.is_held_out.mean() < 0.7
    fired = next(iter(iter_latent_firings(line["evaluate"].files("firings"), halves, "")))
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        test = label_examples.draw_test(fired, halves, held_out, [fired.rows, np.arange(5)], rng)
        assert (halves.is_held_out[np.concatenate([test.positive, test.negative])] == held_out).all()
        assert not set(test.negative) & set(fired.rows)
        assert len(set(test.negative)) == len(test.negative)


def test_iter_latent_firings_gives_each_latent_once_with_all_its_images(line: dict[str, Artefact]) -> None:
    halves = load_eval_split(line["images"])
    firings = line["evaluate"].read("firings").to_pandas()
    seen = {f.latent: f for f in iter_latent_firings(line["evaluate"].files("firings"), halves, "")}
    assert {k: len(f.rows) for k, f in seen.items()} == firings.groupby("latent").size().to_dict()
    assert all((np.diff(f.acts) <= 0).all() for f in seen.values())


def test_training_killed_in_the_middle_ends_with_the_same_weights(
    line: dict[str, Artefact], params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    place, section = tmp_path / "sae", with_runs(params, [{}])

    class Killed(BaseException):
        pass

    def kill(event: object) -> None:
        if getattr(event, "step", 0) > 40:
            raise Killed

    with pytest.raises(Killed), open_draft(place, "training", section.identity(), line) as draft:
        train(section, line, draft, kill)
    assert not place.exists()
    unbroken = make_artefact(tmp_path / "unbroken", "training", train, section, line)
    steps: list[int] = []
    with open_draft(place, "training", section.identity(), line) as draft:
        train(section, line, draft, lambda event: steps.append(getattr(event, "step", 0)))
        again = draft.publish(place)
    assert min(step for step in steps if step) > 20  # it did not start over
    assert again.digest == unbroken.digest


def with_runs(params: Params, runs: list[dict[str, Any]]) -> TrainParams:
    return TrainParams.model_validate(params.train.model_dump() | {"runs": runs})


def test_a_training_of_two_saes_killed_between_measurements_continues_with_both(
    line: dict[str, Artefact], params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    place, section = tmp_path / "sae", with_runs(params, [{}, {"d_sae": 12, "k": 2}])
    first, second = section.each()
    unbroken = make_artefact(tmp_path / "unbroken", "training", train, section, line)

    class Killed(BaseException):
        pass

    def kill(event: object) -> None:
        if isinstance(event, Measured) and event.sae == second and event.step > 20:
            raise Killed

    with pytest.raises(Killed), open_draft(place, "training", section.identity(), line) as draft:
        train(section, line, draft, kill)
    heard: list[Measured] = []
    with open_draft(place, "training", section.identity(), line) as draft:
        train(section, line, draft, lambda event: heard.append(event) if isinstance(event, Measured) else None)
        again = draft.publish(place)
    assert {event.sae for event in heard} == {first, second}
    assert min(event.step for event in heard) > 20
    assert again.digest == unbroken.digest
    assert again.summary["saes"] == [first, second]
    assert {name: (sae.manifest.params["d_sae"], sae.manifest.params["k"]) for name, sae in again.each().items()} == {
        first: (6, 1),
        second: (12, 2),
    }


def test_embeddings_belong_to_the_evaluation_images(line: dict[str, Artefact]) -> None:
    halves = load_eval_split(line["images"])
    joint = load_joint(line["extract"], halves)
    table = line["extract"].read("embeddings")
    raw = from_float32(table["joint"])[torch.from_numpy(halves.images)]
    centred = raw - raw[torch.from_numpy(~halves.is_held_out)].mean(0)
    torch.testing.assert_close(joint, torch.nn.functional.normalize(centred, dim=1))


def test_no_training_tokens_is_refused(line: dict[str, Artefact], params: Params, tmp_path: Path) -> None:
    activations = line["extract"]

    class Empty(Artefact):
        def rows(self, table: str) -> int:
            return 0

    empty = Empty(activations.folder, activations.manifest, activations.digest)
    with pytest.raises(TrainingError, match="0 training tokens"), open_draft(tmp_path / "sae", "training", {}, {}) as draft:
        train(params.train, {"extract": empty}, draft)


def test_word_lists_of_different_kinds_are_loaded(tmp_path: Path, words: Path) -> None:
    assert load_words([str(words)]) == tuple(COLOURS)
    both = load_words(["imagenet", "common"])
    assert len(both) == len(set(both)) > 4500
    assert {"zebra", "striped"} <= set(both)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name, says in ((str(tmp_path / "none.txt"), "No such file"), (str(tmp_path / "empty.txt"), "has no words")):
        with pytest.raises(ConfigError, match=says):
            load_words([name])
