"""The catalogue agrees with the artefacts: grain, columns, comments, the best label, neighbours, lineage.

It is replaced whole, and never by a build that was killed, met a full disk or read damaged inputs.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from ommatid import schemas
from ommatid.catalog import meanings
from ommatid.catalog.meanings import iter_meanings
from ommatid.catalog.neighbours import iter_neighbours
from ommatid.catalog.reader import Catalog
from ommatid.catalog.stage import RELATIONS
from ommatid.catalog.vectors import pack, unpack
from ommatid.compute import nearest
from ommatid.errors import ArtefactError
from ommatid.intervene.subject import best_labels
from ommatid.store import Artefact, Draft
from support import catalog as artefacts

GRAIN = {
    "images": "image",
    "latents": "sae, latent",
    "examples": "sae, latent, decile, rank",
    "near_misses": "sae, latent, rank",
    "firings": "sae, image, latent",
    "labels": "sae, latent, labeller",
    "mistakes": "sae, latent, labeller, kind, rank",
    "neighbours": "sae, latent, rank",
    "directions": "sae, latent",
    "meanings": "sae, latent",
    "previews": "sae, latent",
    "image_latents": "sae, image, rank",
    "class_latents": "sae, class, rank",
    "comparisons": "sae, dictionary",
    "judged": "sae, dictionary, latent, judge",
    "fidelity": "sae, dictionary, kind",
    "densities": "sae, dictionary, low",
    "cofiring": "sae, latent, rank",
    "levels": "sae, level",
    "probes": "sae, class, probe, k",
    "zero_shot": "sae, spliced",
    "interventions": "sae, latent, outcome, arm, dose",
    "attributions": "sae, output, rank",
    "audit": "sae, latent, class",
    "audits": "sae",
    "audit_images": "sae, latent, class, part, rank",
    "matches": "sae, latent, other_sae",
    "stability": "sae, other_sae",
    "features": "sae, latent",
    "runs": "sae",
}
COUNTS = {"images": 6, "latents": 4, "examples": 7, "firings": 7, "labels": 5, "neighbours": 8, "comparisons": 3, "features": 4, "runs": 1}
COUNTS |= {
    "near_misses": 4,
    "mistakes": 4,
    "judged": 6,
    "fidelity": 3,
    "densities": 4,
    "cofiring": 2,
    "levels": 1,
    "probes": 4,
    "zero_shot": 5,
    "interventions": 4,
    "attributions": 3,
    "audit": 1,
    "audits": 1,
    "audit_images": 3,
    "matches": 0,
    "stability": 0,
    "directions": 4,
    "meanings": 0,
    "previews": 3,
    "image_latents": 7,
    "class_latents": 2,
}


# ---- relations


def test_relations_are_those_of_the_design(catalog: Catalog) -> None:
    assert catalog.relations().keys() == GRAIN.keys()


@pytest.mark.parametrize("relation", GRAIN)
def test_relations_have_one_row_per_key_of_their_grain(catalog: Catalog, relation: str) -> None:
    assert catalog.rows(f"SELECT {GRAIN[relation]}, count(*) FROM {relation} GROUP BY ALL HAVING count(*) > 1") == []
    (header,) = catalog.rows("SELECT comment FROM duckdb_tables() WHERE table_name = ?", [relation])[0]
    assert header.startswith(f"{relation}({GRAIN[relation]}): ")


def test_every_column_says_what_it_means(catalog: Catalog) -> None:
    silent = [(relation, column.name) for relation, columns in catalog.relations().items() for column in columns if not column.comment]
    assert silent == []


def test_tables_have_the_columns_of_their_schemas(catalog: Catalog) -> None:
    relations = {name: [column.name for column in columns] for name, columns in catalog.relations().items()}
    for table in set(schemas.TABLES) & set(RELATIONS) - {"images"}:
        assert relations[table] == schemas.TABLES[table].schema.names
    assert relations["images"] == [name for name in schemas.IMAGES.names if name != "encoded"] + ["seen_width", "seen_height"]


def test_features_have_every_documented_column(catalog: Catalog) -> None:
    promised = ["sae", "latent", "label", "label_score", "ms", "ms_floor", "judge", "density", "is_dead", "max_act", "purity"]
    assert set(promised) <= {column.name for column in catalog.relations()["features"]}


def test_features_take_the_best_ok_label_and_keep_every_latent(catalog: Catalog) -> None:
    assert catalog.rows("SELECT latent, label, label_score, control_score, labeller, label_status FROM features ORDER BY latent") == [
        (0, "cat", 0.9, 0.4, "prompts", "ok"),
        (1, "truck", 0.6, 0.7, "words", "ok"),
        (2, None, None, None, "words", "too_few_examples"),
        (3, None, None, None, None, None),
    ]


def check_tested_labels(inputs: Mapping[str, Artefact], catalog: Catalog) -> None:
    """Check that interventions move outputs toward the labels that `features` shows."""
    (labels,) = inputs["label"].each().values()
    of_features = catalog.rows("SELECT latent, label, label_score FROM features WHERE label IS NOT NULL ORDER BY latent")
    assert [(latent, row["label"], row["score"]) for latent, row in sorted(best_labels(labels).items())] == of_features


def test_what_people_say_comes_first_with_its_own_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it scores lower than other labels or has no score; of several by people the best is shown."""
    by_people = [
        (0, "human", 3, "ok", "a lion", 0.3, 0.5),
        (1, "human", 3, "ok", "a lorry", None, None),
        (1, "human-2", 4, "ok", "a van", 0.55, 0.5),
    ]
    monkeypatch.setattr(artefacts, "LABELS", [*artefacts.LABELS, *by_people])
    inputs = artefacts.make_inputs(tmp_path)
    artefacts.build(tmp_path, inputs)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        check_tested_labels(inputs, catalog)
        assert catalog.rows("SELECT latent, label, label_score, labeller FROM features ORDER BY latent LIMIT 3") == [
            (0, "a lion", 0.3, "human"),
            (1, "a van", 0.55, "human-2"),
            (2, None, None, "words"),
        ]


def test_features_carry_statistics_floor_and_judge(catalog: Catalog) -> None:
    assert catalog.rows("SELECT latent, ms, ms_floor, judge, density, is_dead, max_act, purity FROM features ORDER BY latent") == [
        (0, 0.8, 0.35, "lite2", 0.4, False, 4.0, 0.75),
        (1, 0.6, 0.35, "lite2", 0.2, False, 2.0, 1.0),
        (2, None, 0.35, "lite2", 0.1, False, 1.0, None),
        (3, None, 0.35, "lite2", 0.0, True, 0.0, None),
    ]


def test_features_carry_structure(catalog: Catalog) -> None:
    columns = "latent, is_dense, is_rare, uniqueness, label_entropy, lca_depth, duplicate_of"
    assert catalog.rows(f"SELECT {columns} FROM features ORDER BY latent") == [
        (latent, *structure) for latent, structure in enumerate(artefacts.STRUCTURE)
    ]


def test_features_carry_what_a_latent_does_and_say_untested_of_every_other(catalog: Catalog) -> None:
    columns = "latent, causal, causal_reason, effect, effect_low, effect_high, best_control, control_causal, dose"
    assert catalog.rows(f"SELECT {columns} FROM features ORDER BY latent") == [
        (0, "causal", None, 0.5, 0.25, 0.75, 0.125, "reads_only", 1.0),
        (1, "reads_only", None, 0.1, -0.25, 0.5, 0.2, "causal", 0.5),
        (2, "untested", "not chosen", None, None, None, None, None, None),
        (3, "untested", None, None, None, None, None, None, None),
    ]
    assert catalog.rows("SELECT DISTINCT sae FROM attributions") == [(artefacts.SAE,)]
    assert catalog.rows("SELECT output, latent, exact FROM attributions WHERE rank = 1 ORDER BY output") == [
        ("cat", 0, 0.4),
        ("label of latent 0", 0, None),
    ]


def test_interventions_of_several_saes_stay_apart(tmp_path: Path) -> None:
    """Latents of the same index in two SAEs, only one of which was tested."""
    inputs = artefacts.make_inputs(tmp_path, names=(artefacts.NAME, artefacts.OTHER))
    artefacts.build(tmp_path, inputs)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        rows = catalog.rows("SELECT sae, count(*) FILTER (causal = 'causal'), count(*) FROM features GROUP BY sae ORDER BY sae")
        assert rows == [(f"{artefacts.OTHER}-00000000", 1, 2), (artefacts.SAE, 1, 4)]


def test_labels_are_null_unless_their_status_is_ok(catalog: Catalog) -> None:
    assert catalog.rows("SELECT count(*) FROM labels WHERE (status = 'ok') <> (label IS NOT NULL)") == [(0,)]


def test_runs_have_the_lineage_of_each_sae(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    artefacts.build(tmp_path, inputs)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        (run,) = catalog.ask("FROM runs").dicts()
    assert json.loads(run.pop("params")) == {
        "images": {"limit": 6},
        "train": {"k": 2},
        "evaluate": {"n_top": 2},
        "label": {"seed": 0},
        "intervene": {"draws": 8},
        "catalog": {"n_neighbours": 2},
    }
    assert run.pop("created_at").year >= 2024
    assert run == {
        "sae": artefacts.SAE,
        "name": artefacts.NAME,
        "model": "lite0",
        "hookpoint": "blocks.15",
        "target": None,
        "variant": "batch_topk",
        "k": 2,
        **artefacts.LINEAGE,
        "git_dirty": False,
        "images_digest": inputs["images"].digest,
        "activations_digest": inputs["train"].manifest.inputs["extract"],
        "sae_digest": inputs["train"].each()[artefacts.NAME].digest,
        "fvu": 0.2,
        "l0": 2.0,
        "dead": 0.25,
        "ms": 0.7,
        "ms_floor": 0.35,
        "judge": "lite2",
        "downstream_loss": pytest.approx(0.1),
        "downstream_kl": 0.25,
        "n_latents": 4,
        "n_labelled": 2,
        "label_score": 0.75,
        "control_score": pytest.approx(0.55),
        "beats_control": 0.5,
        "decision": None,
        "decided_at": None,
        "reason": None,
    }


@pytest.mark.parametrize(
    ("resize", "crop", "seen"),
    [([64], [64, 64], (0.5, 1.0)), ([80], [64, 64], (0.4, 0.8)), ([64, 64], [64, 64], (1.0, 1.0)), (None, None, (None, None))],
)
def test_images_have_the_share_that_the_model_sees(tmp_path: Path, resize: list[int] | None, crop: list[int] | None, seen: tuple) -> None:
    inputs = artefacts.make_inputs(tmp_path, width=200, height=100)
    preprocessing = {"resize": resize, "crop": crop} if resize else {}
    inputs["extract"] = artefacts.make(tmp_path / "extract", "activations", lambda draft: {"preprocessing": preprocessing}, {})
    artefacts.build(tmp_path, inputs)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        ((width, height),) = catalog.rows("SELECT DISTINCT seen_width, seen_height FROM images")
    assert (width, height) == pytest.approx(seen)


def test_judged_has_the_floor_of_every_judge(catalog: Catalog) -> None:
    above = "SELECT judge, avg(ms - floor), count(*) - count(ms) FROM judged WHERE dictionary = 'sae' GROUP BY judge ORDER BY judge"
    assert catalog.rows(above) == [("dino", pytest.approx(0.4), 1), ("lite2", pytest.approx(0.35), 0)]


def test_summary_counts_the_rows(tmp_path: Path) -> None:
    summary = artefacts.build(tmp_path, artefacts.make_inputs(tmp_path)).summary
    assert summary["saes"] == [artefacts.NAME]
    assert summary["rows"] == COUNTS


# ---- several SAEs


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    root = tmp_path_factory.mktemp("two")
    artefacts.build(root, artefacts.make_inputs(root, names=[artefacts.NAME, artefacts.OTHER]))
    with Catalog(artefacts.path_in(root)) as opened:
        yield opened


def test_relations_hold_the_same_rows_of_an_sae_whether_or_not_there_are_others(two: Catalog, catalog: Catalog) -> None:
    other = f"{artefacts.OTHER}-00000000"
    for relation in set(GRAIN) - {"images", "runs", "matches", "stability", "meanings"}:
        counts = dict(two.rows(f"SELECT sae, count(*) FROM {relation} GROUP BY sae"))
        assert counts.keys() == {artefacts.SAE, other}
        assert counts[artefacts.SAE] == COUNTS[relation]
        mine = "FROM {} WHERE sae = ? ORDER BY ALL"
        assert two.rows(mine.format(relation), [artefacts.SAE]) == catalog.rows(mine.format(relation), [artefacts.SAE])
    assert two.rows("SELECT latent, other, round(cosine::DOUBLE, 4) FROM neighbours WHERE sae = ? ORDER BY latent", [other]) == [
        (0, 1, 0.8),
        (1, 0, 0.8),
    ]


def test_runs_have_the_name_lineage_and_params_of_each_sae(two: Catalog) -> None:
    rows = two.rows("SELECT name, k, n_latents, n_labelled, mlflow_run_id, params->'train'->'k' FROM runs ORDER BY sae")
    assert rows == [
        (artefacts.OTHER, 1, 2, 2, f"run of {artefacts.OTHER}", "1"),
        (artefacts.NAME, 2, 4, 2, "run-1", "2"),
    ]
    assert two.rows("SELECT count(DISTINCT sae_digest) FROM runs") == [(2,)]


def test_two_saes_are_compared_and_a_single_one_is_not(two: Catalog, catalog: Catalog) -> None:
    other = f"{artefacts.OTHER}-00000000"
    assert two.rows("SELECT sae, latent, other_sae, other_latent FROM matches ORDER BY ALL") == [
        *((other, latent, artefacts.SAE, latent) for latent in range(2)),
        *((artefacts.SAE, latent, other, latent % 2) for latent in range(4)),
    ]
    assert two.rows("SELECT sae, other_sae, matched FROM stability ORDER BY sae") == [
        (other, artefacts.SAE, 1.0),
        (artefacts.SAE, other, 0.5),
    ]
    assert catalog.rows("FROM matches") == catalog.rows("FROM stability") == []


def test_an_sae_that_was_not_labelled_is_named(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path, names=[artefacts.NAME, artefacts.OTHER])
    fewer = artefacts.make_inputs(tmp_path / "fewer")
    with pytest.raises(ArtefactError, match=f"labels: has no '{artefacts.OTHER}' inside; it has {artefacts.NAME}"):
        artefacts.build(tmp_path, {**inputs, "label": fewer["label"]})


# ---- neighbours


def test_neighbours_are_the_nearest_by_cosine(catalog: Catalog) -> None:
    found = catalog.rows("SELECT latent, rank, other, cosine FROM neighbours WHERE latent < 2 ORDER BY latent, rank")
    assert [row[:3] for row in found] == [(0, 1, 1), (0, 2, 2), (1, 1, 0), (1, 2, 2)]
    assert [row[3] for row in found] == pytest.approx([0.8, 0.0, 0.8, 0.6])


def test_neighbours_in_tiles_equal_those_of_the_whole_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directions = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    save_file({"W_dec": directions}, tmp_path / "sae.safetensors")
    monkeypatch.setattr(nearest, "TILE", 7)
    tables = list(iter_neighbours(tmp_path, "s", 5))
    assert max(len(table) for table in tables) == 7 * 5
    found = np.concatenate([table["other"].to_numpy() for table in tables]).reshape(50, 5)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(50)
    assert np.array_equal(found, np.argsort(-cosines, axis=1)[:, :5])


def test_asking_for_more_neighbours_than_latents_gives_all_of_them(tmp_path: Path) -> None:
    artefacts.build(tmp_path, artefacts.make_inputs(tmp_path), n_neighbours=64)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        assert catalog.rows("SELECT count(*) FROM neighbours") == [(4 * 3,)]


# ---- what pages look up


def test_previews_are_the_strongest_images(catalog: Catalog) -> None:
    assert catalog.rows("SELECT latent, images FROM previews ORDER BY latent") == [(0, [0, 1, 2, 3]), (1, [3, 4]), (2, [5])]


def test_image_latents_are_the_strongest_of_each_image(catalog: Catalog) -> None:
    found = catalog.rows("SELECT image, rank, latent, act FROM image_latents WHERE image >= 3 ORDER BY ALL")
    assert found == [(3, 1, 1, 2.0), (3, 2, 0, 1.0), (4, 1, 1, 1.0), (5, 1, 2, 1.0)]


def test_class_latents_have_recall_precision_and_lift(catalog: Catalog) -> None:
    found = catalog.rows("SELECT class, rank, latent, n_both, recall, precision, lift FROM class_latents ORDER BY class, rank")
    assert found == [("cat", 1, 0, 3, 1.0, 0.75, pytest.approx(1.5)), ("truck", 1, 1, 2, 1.0, 1.0, pytest.approx(3.0))]


def test_class_latents_count_images_that_have_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "IMAGES", [(*row[:3], None if row[0] == 3 else row[3]) for row in artefacts.IMAGES])
    monkeypatch.setattr(artefacts, "FIRINGS", [(image, 0, 1.0) for image in range(5)])
    artefacts.build(tmp_path, artefacts.make_inputs(tmp_path))
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        found = catalog.rows("SELECT class, latent, n_both, recall, precision, lift FROM class_latents")
    assert found == [("cat", 0, 3, 1.0, 0.75, pytest.approx(0.75 / 0.6))]


def test_lists_for_pages_end_at_their_limits_with_the_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "FIRINGS", [(image, latent, 1.0 + latent % 7) for image in range(6) for latent in range(60)])
    rows = [(latent, *artefacts.LATENTS[0][1:4], 6, *artefacts.LATENTS[0][5:]) for latent in range(60)]
    monkeypatch.setattr(artefacts, "LATENTS", rows)
    monkeypatch.setattr(artefacts, "STRUCTURE", [artefacts.STRUCTURE[0]] * 60)
    monkeypatch.setattr(artefacts, "DIRECTIONS", np.ones((60, 3), np.float32))
    monkeypatch.setattr(artefacts, "EXAMPLES", [(0, 10, 12 - image, image, 1.0, None) for image in range(12)])
    name = "batch_topk-60-k2-s0"
    artefacts.build(tmp_path, artefacts.make_inputs(tmp_path, names=[name]))
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        assert catalog.rows("FROM previews SELECT images") == [([11, 10, 9, 8, 7, 6, 5, 4],)]
        by_act = sorted(range(60), key=lambda latent: (-(latent % 7), latent))
        assert catalog.rows("SELECT latent FROM image_latents WHERE image = 2 ORDER BY rank") == [(latent,) for latent in by_act[:32]]
        assert catalog.rows("SELECT latent FROM class_latents WHERE class = 'cat' ORDER BY rank") == [(latent,) for latent in range(48)]


def test_an_image_is_found_by_the_index(catalog: Catalog) -> None:
    with duckdb.connect(catalog.path, read_only=True) as connection:
        ((_, plan),) = connection.execute("EXPLAIN ANALYZE SELECT thumbnail FROM images WHERE image = 3").fetchall()
    assert "Index Scan" in plan


# ---- directions and meanings


def test_directions_keep_the_cosines_of_the_decoder(catalog: Catalog) -> None:
    rows = catalog.rows("SELECT direction FROM directions ORDER BY latent")
    assert unpack([direction for (direction,) in rows]) == pytest.approx(artefacts.DIRECTIONS, abs=0.005)


def test_packed_vectors_keep_their_direction_and_zeros_stay_zeros() -> None:
    vectors = np.random.default_rng(0).standard_t(3, (200, 96)) * np.logspace(-6, 6, 200)[:, None]
    vectors[7] = 0
    found = unpack(pack(vectors).to_pylist())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    cosines = (unit * found).sum(1)
    assert cosines[7] == 0 and not found[7].any()
    assert np.delete(cosines, 7).min() > 0.999
    assert len(unpack([])) == 0


def make_activations(root: Path, images: np.ndarray, joint: np.ndarray, d_joint: int | None) -> Artefact:
    """Activations with embeddings of some images, in two parts of which neither is in the order of the images."""

    def fill(draft: Draft) -> dict[str, Any]:
        schema = schemas.embeddings(joint.shape[1], 1)
        for part, rows in enumerate(np.split(np.random.default_rng(1).permutation(len(images)), [len(images) // 3])):
            columns = [images[rows], *([bytes(row) for row in x[rows].astype("<f4")] for x in (joint, joint[:, :1]))]
            table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
            draft.write_table(f"embeddings-{part:05}.parquet", table)
        return {"d_joint": d_joint, "preprocessing": {}}

    return artefacts.make(root / "extract", "activations", fill, {})


def test_meanings_are_the_weighted_mean_of_centred_images_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, d_sae = np.random.default_rng(0), 9
    images = np.arange(40, dtype=np.int32) * 3
    is_eval = rng.random(40) < 0.7
    joint = rng.normal(size=(40, 16)) + 2
    joint /= np.linalg.norm(joint, axis=1, keepdims=True)
    acts = np.where(rng.random((40, d_sae)) < 0.3, rng.exponential(size=(40, d_sae)), 0).astype(np.float32)
    acts[~is_eval] = acts[:, 4] = 0
    centred = joint - joint[is_eval].mean(0)
    expected = acts.T @ (centred / np.linalg.norm(centred, axis=1, keepdims=True))

    pq.write_table(pa.table({"image": images, "split": np.where(is_eval, "eval", "train")}), tmp_path / "images.parquet")
    at, latents = acts.nonzero()
    shuffled = rng.permutation(len(at))
    fired = {"sae": ["s"] * len(at), "image": images[at], "latent": latents.astype(np.int32), "act": acts[at, latents]}
    pq.write_table(pa.table(fired).take(shuffled), tmp_path / "firings.parquet")
    monkeypatch.setattr(meanings, "BLOCK_BYTES", 4 * 16 * 5)
    monkeypatch.setattr(meanings, "READ_ROWS", 3)
    monkeypatch.setattr(nearest, "TILE", 4)
    activations = make_activations(tmp_path, images, joint, 16)
    paths = [str(tmp_path / "images.parquet")], [str(tmp_path / "firings.parquet")]
    found = pa.concat_tables(iter_meanings(activations, *paths, "s", d_sae))
    assert found["latent"].to_pylist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert found["n_images"].to_pylist() == [int(n) for n in (acts > 0).sum(0) if n]
    unit = np.delete(expected / np.linalg.norm(expected, axis=1, keepdims=True).clip(1e-12), 4, axis=0)
    assert (unit * unpack(found["embedding"].to_pylist())).sum(1).min() > 0.9995


def test_words_find_the_latent_that_fires_on_their_images(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    towards = np.eye(6, dtype=np.float32)[[0, 0, 0, 1, 1, 2]] + 1  # by class, beside what all images share
    inputs["extract"] = make_activations(tmp_path, np.arange(6, dtype=np.int32), towards / np.linalg.norm(towards, axis=1)[:, None], 6)
    artefacts.build(tmp_path, inputs)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        latents, vectors = zip(*catalog.rows("SELECT latent, embedding FROM meanings ORDER BY latent"), strict=True)
    assert latents == (0, 1, 2)  # latent 3 never fires
    cat, truck, ship = np.eye(6)[:3]
    assert [int(np.argmax(unpack(vectors) @ word)) for word in (cat, truck, ship)] == [0, 1, 2]


def test_without_a_joint_space_there_are_no_meanings(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    inputs["extract"] = artefacts.make(tmp_path / "extract", "activations", lambda draft: {"d_joint": None, "preprocessing": {}}, {})
    assert artefacts.build(tmp_path, inputs).summary["rows"] == COUNTS


# ---- whole or not at all


def test_a_reader_keeps_the_old_file_while_it_is_replaced(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    artefacts.build(tmp_path, inputs, n_neighbours=1)
    count = "SELECT count(*) FROM neighbours"
    with Catalog(artefacts.path_in(tmp_path)) as before:
        artefacts.build(tmp_path, inputs, n_neighbours=3)
        with Catalog(artefacts.path_in(tmp_path)) as after:
            assert (before.rows(count), after.rows(count)) == ([(4,)], [(12,)])
        assert before.rows("SELECT label FROM features WHERE latent = 0") == [("cat",)]


BEFORE = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support import catalog as artefacts
from ommatid import errors, store
root = Path(sys.argv[2])
places = {"images": ("images", "images"), "train": ("sae", "training")}
places |= {"evaluate": ("evaluation", "evaluations"), "label": ("labels", "labellings"), "intervene": ("interventions", "interventions")}
inputs = {stage: store.open_artefact(root / place, kind) for stage, (place, kind) in places.items()}
"""


def _run(root: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a separate process in which `root` and `inputs` are defined."""
    command = [sys.executable, "-c", BEFORE + script, str(Path(artefacts.__file__).parents[1]), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_killed_build_leaves_nothing_and_the_next_succeeds(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    killed = _run(tmp_path, "artefacts.build(root, inputs, on_event=lambda e: e.done == 4 and os.kill(os.getpid(), signal.SIGKILL))")
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "catalog").exists()
    assert list(tmp_path.glob(".work/catalog-*/scratch/building/catalog.duckdb*"))
    artefact = artefacts.build(tmp_path, inputs)
    assert [path.name for path in sorted(artefact.path.iterdir())] == ["catalog.duckdb", "manifest.json"]
    assert artefact.summary["rows"]["features"] == 4


def test_a_build_that_died_before_its_manifest_is_continued(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    killed = _run(
        tmp_path,
        "store.Draft.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nartefacts.build(root, inputs)",
    )
    assert killed.returncode == -9, killed.stderr
    events = []
    assert artefacts.build(tmp_path, inputs, on_event=events.append).summary["rows"]["features"] == 4
    assert events == []


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    artefacts.make_inputs(tmp_path)
    full = _run(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\nartefacts.build(root, inputs)")
    assert full.returncode == 1
    assert "ArtefactError" in full.stderr and "catalog.duckdb: a file became larger than is allowed here" in full.stderr
    assert not (tmp_path / "catalog").exists()
    # before the database is begun pyarrow writes tables for it
    script = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\ntry: artefacts.build(root, inputs)\n"
    early = _run(tmp_path, script + "except Exception as error: print(errors.find_lack(error))")
    assert early.stdout == "Lack.FILE_SIZE\n", early.stderr
    assert not (tmp_path / "catalog").exists()


def test_all_damaged_inputs_are_named(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    latents, image_part = tmp_path / f"evaluation/{artefacts.NAME}/latents.parquet", tmp_path / "images/images-00001.parquet"
    latents.write_bytes(latents.read_bytes()[:-40])
    image_part.write_bytes(b"x" * image_part.stat().st_size)
    with pytest.raises(ArtefactError, match=r"(?s)images-00001\.parquet: checksum differs.*latents\.parquet: checksum differs"):
        artefacts.build(tmp_path, inputs)
    assert not (tmp_path / "catalog").exists()


def test_a_damaged_sae_is_named(tmp_path: Path) -> None:
    inputs = artefacts.make_inputs(tmp_path)
    (tmp_path / f"sae/{artefacts.NAME}/sae.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match=rf"sae: damaged \(1\): {artefacts.NAME}/sae\.safetensors: checksum differs"):
        artefacts.build(tmp_path, inputs)


@pytest.mark.parametrize(
    ("labels", "best"),
    [
        ([("captioner", 1, 0.8), ("words", 2, 0.8)], "captioner"),
        ([("words", 1, 0.8), ("captioner", 2, 0.8)], "words"),
        ([("words", 1, 0.8), ("captioner", 2, 0.9)], "captioner"),
        ([("words", 1, None), ("captioner", 2, 0.1)], "captioner"),
        ([("vlm", 1, None), ("captioner", 2, None)], "vlm"),
    ],
)
def test_among_equal_label_scores_the_first_labellers_label_is_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[tuple[str, int, float | None]], best: str
) -> None:
    rows = [(0, labeller, place, "ok", f"by {labeller}", score, None) for labeller, place, score in labels]
    monkeypatch.setattr(artefacts, "LABELS", rows)
    inputs = artefacts.make_inputs(tmp_path)
    artefacts.build(tmp_path, inputs)
    with Catalog(artefacts.path_in(tmp_path)) as catalog:
        check_tested_labels(inputs, catalog)
        assert catalog.rows("SELECT label, labeller FROM features WHERE latent = 0") == [(f"by {best}", best)]
        assert catalog.rows("SELECT labeller FROM labels WHERE latent = 0") == [(labeller,) for labeller, _, _ in labels]
        assert catalog.rows("SELECT beats_control FROM runs") == [(None,)]
