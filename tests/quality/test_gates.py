"""Every gate passes a good artefact and fails each planted damage, naming the row or part; its report is whole and stable.

The artefacts are small fakes made through store.open_draft, so nothing here needs a model or a stage.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from ommatid import quality, schemas, store
from ommatid.catalog.stage import RELATIONS
from ommatid.config import Params, TrainParams, load_params, make_params
from ommatid.errors import GateError
from ommatid.events import ignore
from ommatid.pipeline.run import run_stage
from ommatid.quality import Check, Report
from ommatid.store import Artefact, Draft, part_name
from ommatid.summaries import ImagesSummary
from support.catalog import AUDIT, AUDITS
from support.study import CHECKOUT

N_LATENTS, N_IMAGES, WIDTH = 4, 9, 8
Rows = list[dict[str, Any]]
Tables = dict[str, pa.Table]
Files = Mapping[str, pa.Table | Callable[[Path], None]]
ONE, OTHER = "batch_topk-4-k2-s0", "batch_topk-3-k1-s0"
SUMMARY = {"n": 3, "n_images": N_IMAGES, "share": 0.5, "name": "text", "nested": {"deep": 1}, "missing": None, "n_images_in_both": 0}
SHAPES = "every tensor is present in its expected shape"
PARENTS = {"sae": "training", "evaluation": "evaluations", "labels": "labellings", "effects": "interventions"}


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(CHECKOUT / "params.yaml", [f"train.d_sae={N_LATENTS}", "train.k=2", "images.max_rejected=0.25"])


def table(schema: pa.Schema, rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def check(stage: str, artefact: Artefact, params: Params) -> Report:
    return quality.check(stage, artefact, params, params.train.each() if artefact.manifest.kind in PARENTS.values() else {})


def artefact_of(folder: Path, kind: str, files: Files) -> Artefact:
    with store.open_draft(folder / kind, kind, {}, {}) as draft:
        write(draft, files)
        return draft.publish(folder / kind)


def inside_of(folder: Path, kind: str, saes: Mapping[str, Files]) -> Artefact:
    """Make the artefact of a stage with some SAEs inside."""
    with store.open_draft(folder / kind, PARENTS[kind], {}, {}) as draft:
        for name, files in saes.items():
            write(draft.child(name, kind), files)
        draft.seal({"saes": list(saes)})
        return draft.publish(folder / kind)


def write(draft: Draft, files: Files) -> None:
    for name, content in files.items():
        if isinstance(content, pa.Table):
            draft.write_table(name, content)
        else:
            with draft.write_file(name) as path:
                content(path)
    draft.seal(SUMMARY)


def extraction_of(folder: Path, tables: Mapping[str, pa.Table]) -> Artefact:
    with store.open_draft(folder / "activations", "extraction", {}, {}) as draft:
        for name, content in tables.items():
            draft.child("block", "activations").write_table(name, content)
        draft.child("block", "activations").seal({})
        draft.seal({})
        return draft.publish(folder / "activations")


def failed(report: Report) -> dict[str, Check]:
    return {check.title: check for check in report.failures}


# images


def image_rows(first: int, n: int) -> Rows:
    keys = range(first, first + n)
    shared = {"width": 32, "height": 24, "label": None, "captions": [], "thumbnail": b"t", "encoded": b"bytes"}
    return [
        {"image": i, "image_id": hashlib.sha256(bytes([i])).hexdigest(), "path": f"{i}.png", "split": ("train", "eval")[i % 2], **shared}
        for i in keys
    ]


def images_artefact(folder: Path, parts: list[Rows], rejected: Rows) -> Artefact:
    files = {part_name("images", i): table(schemas.IMAGES, rows) for i, rows in enumerate(parts)}
    return artefact_of(folder, "images", {**files, "rejected.parquet": table(schemas.REJECTED, rejected)})


def rejection(path: str, reason: str) -> dict[str, str]:
    return {"path": path, "reason": reason, "detail": ""}


def test_images_pass(tmp_path: Path, params: Params) -> None:
    parts = [image_rows(0, 4), [], image_rows(4, 2)]
    rejected = [rejection("a.txt", "not_an_image"), *[rejection(f"again{i}.png", "duplicate") for i in range(9)]]
    report = check("images", images_artefact(tmp_path, parts, rejected), params)
    assert report.success, report.failures
    assert all(check.reason and check.observed and not check.detail for check in report.checks)


@pytest.mark.parametrize(
    ("row", "change", "name", "words"),
    [
        (5, {"split": "test"}, "every split is train or eval", ["images-00001.parquet", "image 5 test"]),
        (1, {"width": 0}, "width and height are positive", ["images-00000.parquet", "image 1 1.png"]),
        (4, {"encoded": b""}, "every image has its bytes", ["images-00001.parquet", "image 4"]),
        (4, {"image": 0}, "image keys are unique", ["image 0 (2 times)"]),
        (4, {"image_id": hashlib.sha256(bytes([0])).hexdigest()}, "image ids are unique", [hashlib.sha256(bytes([0])).hexdigest()]),
    ],
)
def test_images_damage_is_named(tmp_path: Path, params: Params, row: int, change: dict, name: str, words: list[str]) -> None:
    parts = [image_rows(0, 4), image_rows(4, 2)]
    (parts[0] + parts[1])[row].update(change)
    found = failed(check("images", images_artefact(tmp_path, parts, []), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in words), found[name].detail


def test_images_rejected_share_names_the_files(tmp_path: Path, params: Params) -> None:
    rejected = [rejection(f"{i}.txt", "not_an_image") for i in range(3)]
    found = failed(check("images", images_artefact(tmp_path, [image_rows(0, 6)], rejected), params))
    assert set(found) == {"few images are rejected"}
    assert "0.txt (not_an_image)" in found["few images are rejected"].detail
    assert "0.333333" in found["few images are rejected"].observed


@pytest.mark.parametrize("parts", [[], [[]], [[row for row in image_rows(0, 4) if row["split"] == "train"]]])
def test_images_need_both_splits(tmp_path: Path, params: Params, parts: list[Rows]) -> None:
    found = failed(check("images", images_artefact(tmp_path, parts, []), params))
    assert set(found) == {"both splits have images"}
    assert "split eval: images 0" in found["both splits have images"].detail


# extract


def activation_table(images: list[int], change: Callable[[np.ndarray], None] = lambda x: None) -> pa.Table:
    x = np.random.default_rng(0).standard_normal((2 * len(images), WIDTH)).astype(np.float16)
    change(x)
    places = [{"image": image, "token": token, "kind": "patch", "row": 0, "col": token} for image in images for token in (0, 1)]
    rows = [{**place, "x": vector.tobytes()} for place, vector in zip(places, x, strict=True)]
    return table(schemas.activations(WIDTH, {}), rows)


def embedding_table(images: list[int], change: Callable[[np.ndarray], None] = lambda e: None) -> pa.Table:
    vectors = np.random.default_rng(1).standard_normal((len(images), WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    change(vectors)
    rows = [{"image": image, "joint": v.tobytes(), "judge": v.tobytes()} for image, v in zip(images, vectors, strict=True)]
    return table(schemas.embeddings(WIDTH, WIDTH), rows)


def activations_tables() -> Tables:
    return {
        part_name("train", 0): activation_table([0, 2]),
        part_name("train", 1): activation_table([]),
        part_name("train", 2): activation_table([4]),
        part_name("eval", 0): activation_table([1, 3]),
        "embeddings.parquet": embedding_table([0, 1, 2, 3, 4]),
    }


def assign(index: Any, value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[index] = value

    return change


def test_extract_passes(tmp_path: Path, params: Params) -> None:
    report = check("extract", extraction_of(tmp_path, activations_tables()), params)
    assert report.success, report.failures


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (
            {"train-00000.parquet": activation_table([0, 2], assign((3, 5), np.nan))},
            "no activation is NaN",
            ["image 2 token 1", "with NaN 1"],
        ),
        ({"eval-00000.parquet": activation_table([1, 3], assign((0, 0), -np.inf))}, "no activation is infinite", ["image 1 token 0"]),
        (
            {"train-00002.parquet": activation_table([4], assign(slice(None), -0.0))},
            "no activation is all zeros",
            ["zeros 2", "image 4 token 0"],
        ),
        ({"embeddings.parquet": embedding_table([0, 1, 2, 3, 4], assign((2, 0), np.nan))}, "embeddings are finite", ["judge", "image 2"]),
        ({"embeddings.parquet": embedding_table([0, 1, 2, 3, 4], assign(3, 1.0))}, "embeddings have unit norm", ["joint", "image 3"]),
        ({"embeddings.parquet": embedding_table([0, 1, 2, 3])}, "activations and embeddings are of the same images", ["image 4"]),
        ({"embeddings.parquet": embedding_table([0, 1, 2, 3, 4, 3])}, "every image has one embedding", ["image 3"]),
    ],
)
def test_extract_damage_is_named(tmp_path: Path, params: Params, change: Tables, name: str, words: list[str]) -> None:
    found = failed(check("extract", extraction_of(tmp_path, activations_tables() | change), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in [*words, *(part for part in change if "same" not in name and "one" not in name)])


def test_a_judge_may_fail_on_some_images_but_not_on_all_of_them(tmp_path: Path, params: Params) -> None:
    for name, images in (("some", 2), ("all", slice(None))):
        rows = embedding_table([0, 1, 2, 3, 4]).to_pydict()
        nan = np.full(WIDTH, np.nan, np.float32).tobytes()
        failed_on = range(5) if name == "all" else [images]
        rows["judge"] = [nan if i in failed_on else v for i, v in enumerate(rows["judge"])]
        embeddings = pa.table(rows, schema=schemas.embeddings(WIDTH, WIDTH))
        (tmp_path / name).mkdir()
        report = check("extract", extraction_of(tmp_path / name, activations_tables() | {"embeddings.parquet": embeddings}), params)
        assert set(failed(report)) == (set() if name == "some" else {"every judge embedded some image"})


def test_a_further_judge_is_checked_too(tmp_path: Path, params: Params) -> None:
    rows = embedding_table([0, 1, 2, 3, 4]).to_pydict()
    rows["judge_1"] = [rows["judge"][0]] * 4 + [(np.frombuffer(rows["judge"][0], np.float32) * 2).tobytes()]
    embeddings = pa.table(rows, schema=schemas.embeddings(WIDTH, WIDTH, WIDTH))
    found = failed(check("extract", extraction_of(tmp_path, activations_tables() | {"embeddings.parquet": embeddings}), params))
    assert set(found) == {"embeddings have unit norm"}
    assert all(word in found["embeddings have unit norm"].detail for word in ("judge_1", "image 4"))


def test_extract_needs_tokens_and_embeddings(tmp_path: Path, params: Params) -> None:
    tables = {"train-00000.parquet": activation_table([]), "eval-00000.parquet": activation_table([])}
    found = failed(check("extract", extraction_of(tmp_path, tables), params))
    assert set(found) == {"both splits have tokens", "activations and embeddings are both present"}


def test_extract_large_finite_activation_passes(tmp_path: Path, params: Params) -> None:
    tables = activations_tables() | {"train-00000.parquet": activation_table([0, 2], assign((0, 0), 65504))}
    assert check("extract", extraction_of(tmp_path, tables), params).success


# train


def sae_tensors() -> dict[str, np.ndarray]:
    w_dec = np.eye(N_LATENTS, WIDTH, dtype=np.float32)
    zeros = {"b_enc": np.zeros(N_LATENTS, np.float32), "b_dec": np.zeros(WIDTH, np.float32), "threshold": np.array(0.1, np.float32)}
    return {"W_enc": np.ascontiguousarray(w_dec.T), "W_dec": w_dec, **zeros}


def curve(**last: float) -> pa.Table:
    row = {"step": 10, "tokens": 100, "loss": 0.1, "fvu": 0.4, "l0": 2.0, "dead": 0.1, "lr": 1e-4}
    return table(schemas.CURVES, [row | {"fvu": 3.0}, row | last])


def sae_files(tensors: dict[str, np.ndarray], curves: pa.Table) -> Files:
    return {"sae.safetensors": lambda path: save_file(tensors, path), "curves.parquet": curves}


def sae_artefact(folder: Path, tensors: dict[str, np.ndarray], curves: pa.Table) -> Artefact:
    return inside_of(folder, "sae", {ONE: sae_files(tensors, curves)})


def test_train_passes(tmp_path: Path, params: Params) -> None:
    report = check("train", sae_artefact(tmp_path, sae_tensors(), curve()), params)
    assert report.success, report.failures


@pytest.mark.parametrize(
    ("tensor", "value", "name", "words"),
    [
        ("W_enc", None, "every tensor is present in its expected shape", ["tensor W_enc", "missing"]),
        ("W_enc", np.zeros((2, 2), np.float32), "every tensor is present in its expected shape", ["W_enc", "[2, 2]", "[8, 4]"]),
        ("b_enc", np.zeros(N_LATENTS, np.float16), "every tensor is present in its expected shape", ["b_enc", "float16"]),
        ("b_enc", np.array([0, np.nan, 0, np.inf], np.float32), "weights are finite", ["tensor b_enc", "2"]),
        ("W_dec", np.diag([1, 1, 2, 1]).astype(np.float32) @ np.eye(4, 8, dtype=np.float32), "directions have unit norm", ["latent 2"]),
    ],
)
def test_train_damaged_weights_are_named(tmp_path: Path, params: Params, tensor: str, value: Any, name: str, words: list[str]) -> None:
    tensors = {key: array for key, array in (sae_tensors() | {tensor: value}).items() if array is not None}
    found = failed(check("train", sae_artefact(tmp_path, tensors, curve()), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in words), found[name].detail


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ({"fvu": 1.0}, "the final FVU is below 1"),
        ({"fvu": float("nan")}, "the final FVU is a number"),
        ({"l0": 0.9}, "L0 is near k"),
        ({"l0": 4.1}, "L0 is near k"),
        ({"dead": 0.6}, "few latents are dead"),
    ],
)
def test_a_training_that_ended_badly_is_named(tmp_path: Path, params: Params, last: dict[str, float], name: str) -> None:
    found = failed(check("train", sae_artefact(tmp_path, sae_tensors(), curve(**last)), params))
    assert set(found) == {name}
    assert "step 10" in found[name].detail


def test_train_needs_curves(tmp_path: Path, params: Params) -> None:
    found = failed(check("train", sae_artefact(tmp_path, sae_tensors(), table(schemas.CURVES, [])), params))
    assert set(found) == {"there is a training curve"}


def test_weights_of_every_variant_pass(tmp_path: Path, params: Params) -> None:
    """Thresholds per latent, gates and the output width of a transcoder pass, and fail if another variant has them."""
    each, gate = {"threshold": np.zeros(N_LATENTS, np.float32)}, dict.fromkeys(("gate_scale", "gate_shift"), np.ones(N_LATENTS, np.float32))
    wide = {"W_dec": np.eye(N_LATENTS, 2 * WIDTH, dtype=np.float32), "b_dec": np.zeros(2 * WIDTH, np.float32)}
    cases = [("jumprelu", None, each), ("gated", None, gate), ("batch_topk", "deep", wide)]
    for kind, target, tensors in cases:
        artefact = inside_of(tmp_path / kind, "sae", {f"{kind}-4-k2-s0": sae_files(sae_tensors() | tensors, curve())})
        assert check("train", artefact, with_train(params, variant=kind, target=target)).success
    artefact = inside_of(tmp_path / "lacking", "sae", {"gated-4-k2-s0": sae_files(sae_tensors(), curve())})
    assert "tensor gate_scale" in failed(check("train", artefact, with_train(params, variant="gated")))[SHAPES].detail
    assert "W_enc" in failed(check("train", sae_artefact(tmp_path, sae_tensors() | wide, curve()), params))[SHAPES].detail


@pytest.mark.parametrize("variant", [{"kind": "relu", "l1": 0.1}, {"kind": "gated", "l1": 0.1}, {"kind": "jumprelu", "weight": 0.1}])
def test_with_a_fixed_sparsity_weight_l0_is_not_checked(tmp_path: Path, params: Params, variant: dict) -> None:
    gate = dict.fromkeys(("gate_scale", "gate_shift"), np.ones(N_LATENTS, np.float32)) if variant["kind"] == "gated" else {}
    artefact = inside_of(tmp_path, "sae", {f"{variant['kind']}-4-k2-s0": sae_files(sae_tensors() | gate, curve(l0=50.0))})
    assert check("train", artefact, with_train(params, variant=variant)).success
    assert set(failed(check("train", artefact, with_train(params, variant=variant["kind"])))) == {"L0 is near k"}


def with_train(params: Params, **changes: Any) -> Params:
    return params.model_copy(update={"train": TrainParams.model_validate(params.train.model_dump() | changes)})


# several SAEs


def two_saes(params: Params) -> Params:
    return with_train(params, runs=[{}, {"d_sae": 3, "k": 1}])


def test_each_sae_is_checked_against_its_own_width_and_k(tmp_path: Path, params: Params) -> None:
    narrow = {"W_enc": np.eye(WIDTH, 3, dtype=np.float32), "W_dec": np.eye(3, WIDTH, dtype=np.float32), "b_enc": np.zeros(3, np.float32)}
    saes = {ONE: sae_files(sae_tensors(), curve()), OTHER: sae_files(sae_tensors() | narrow, curve(l0=1.0))}
    report = check("train", inside_of(tmp_path, "sae", saes), two_saes(params))
    assert report.success, report.failures
    assert report.numbers[f"{OTHER}.share"] == 0.5
    saes[OTHER] = sae_files(sae_tensors() | narrow, curve(l0=2.5))
    found = failed(check("train", inside_of(tmp_path, "sae", saes), two_saes(params)))
    assert set(found) == {f"{OTHER}: L0 is near k"}


def test_evaluations_and_labels_name_the_sae_that_fails(tmp_path: Path, params: Params) -> None:
    evaluations = inside_of(tmp_path, "evaluation", {ONE: evaluation_files(), OTHER: evaluation_files()})
    assert set(failed(check("evaluate", evaluations, two_saes(params)))) == {
        f"{OTHER}: each of 3 latents has one row",
        f"{OTHER}: firings are positive and belong to known latents",
    }  # the sums are of the artefact alone: they are those of four latents in both
    files = {name: {"labels.parquet": table(schemas.LABELS, label_rows()[:3])} for name in (ONE, OTHER)}
    assert set(failed(check("label", inside_of(tmp_path, "labels", files), two_saes(params)))) == {
        f"{ONE}: every latent has one row for each labeller"
    }


def test_a_transcoder_needs_no_fvu_of_an_untrained_sae(tmp_path: Path, params: Params) -> None:
    evaluation = evaluation_artefact(tmp_path, comparisons=edited(comparison_rows(), 1, fvu=None))
    assert check("evaluate", evaluation, with_train(params, target="deep")).success
    lost = evaluation_artefact(tmp_path, comparisons=edited(edited(comparison_rows(), 1, fvu=None), 0, fvu=None))
    assert set(failed(check("evaluate", lost, with_train(params, target="deep")))) == {"the FVU is a number"}


# evaluate


def latent_rows() -> Rows:
    shared = {"sae": "s", "mean_act": 1.0, "max_act": 2.0, "dead_in_training": False, "purity": None, "top_classes": []}
    shared |= {"is_dense": False, "is_rare": False}
    rows: Rows = [{"latent": i, "density": 0.1 * i, "is_dead": i == 0, "ms": 0.1 * i if i else None} for i in range(N_LATENTS)]
    return [shared | row | {"n_images": min(row["latent"], 1)} for row in rows]


def example_rows() -> Rows:
    shared = {"sae": "s", "act": 1.0, "heat": [0.5] * 4, "rows": 2, "cols": 2}
    return [shared | {"latent": i, "decile": 10, "rank": 1, "image": i} for i in range(1, N_LATENTS)]


def firing_rows() -> Rows:
    return [{"sae": "s", "image": i, "latent": i, "act": 1.0} for i in range(1, N_LATENTS)]


def near_miss_rows() -> Rows:
    rest = {"sae": "s", "closeness": None}
    pairs = [(latent, image) for latent in range(1, N_LATENTS) for image in range(N_IMAGES) if image != latent]
    return [{**rest, "latent": latent, "image": image, "rank": image + (image < latent), "margin": -0.1 * image} for latent, image in pairs]


def comparison_rows() -> Rows:
    names = {"sae": 0.3, "untrained": 0.8, "neurons": None}
    other = {"cosine": 0.9, "l0": 2.0, "dead": 0.0, "ms": 0.5, "ms_low": None, "ms_high": None, "ms_best": 0.9, "ms_left_out": 0}
    rest = {"sae": "s", "n_latents": N_LATENTS, "ms_floor": 0.3, "purity": None, "judge": "j"}
    return [{**rest, **other, "dictionary": name, "fvu": fvu} for name, fvu in names.items()]


def zero_shot_rows(with_error: float) -> Rows:
    rest = {"sae": "s", "n_images": 9, "n_classes": 3, "n_replaced": 4, "n_tokens": 4, "logit_scale": 10.0}
    rest |= dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "downstream_loss", "downstream_kl"), 0.5)
    rest |= dict.fromkeys(("recovered", "recovered_low", "recovered_high"))
    return [
        {**rest, "spliced": name, "cross_entropy": loss} for name, loss in (("plain", 1.5), ("sae", 1.9), ("sae_with_error", with_error))
    ]


def evaluation_artefact(folder: Path, **changed: Rows) -> Artefact:
    return inside_of(folder, "evaluation", {ONE: evaluation_files(**changed)})


def evaluation_files(**changed: Rows) -> Files:
    rows = {"latents": latent_rows(), "examples": example_rows(), "firings": firing_rows(), "comparisons": comparison_rows()}
    rows |= {"zero_shot": zero_shot_rows(1.504), "fidelity": fidelity_rows(), "densities": density_rows(), "levels": level_rows()}
    rows |= {"near_misses": near_miss_rows(), "cofiring": [], "probes": [], **changed}
    return {f"{name}.parquet": table(getattr(schemas, name.upper()), rows[name]) for name in rows}


def fidelity_rows() -> Rows:
    counts = {"cls": 3, "patch": 9, "all": 12}
    return [
        {"sae": "s", "dictionary": "sae", "kind": kind, "n_tokens": n, "fvu": 0.3, "cosine": 0.9, "l0": 2.0} for kind, n in counts.items()
    ]


def density_rows() -> Rows:
    lows = {0.0: 1, 0.1: N_LATENTS - 1}
    names = ("sae", "untrained", "neurons")
    return [{"sae": "s", "dictionary": name, "low": low, "high": 1.0, "n_latents": n} for name in names for low, n in lows.items()]


def level_rows() -> Rows:
    bounds = {1: (0, 1), 2: (2, N_LATENTS - 1)}
    rest = {"fvu": 0.3, "ms": 0.2, "n_ms": 2, "lca_depth": None, "n_lca": 0}
    return [{"sae": "s", "level": level, "first": first, "last": last, **rest} for level, (first, last) in bounds.items()]


def edited(rows: Rows, index: int, **change: Any) -> Rows:
    rows[index] |= change
    return rows


def test_evaluate_passes(tmp_path: Path, params: Params) -> None:
    report = check("evaluate", evaluation_artefact(tmp_path), params)
    assert report.success, report.failures
    without = check("evaluate", evaluation_artefact(tmp_path / "no zero-shot", zero_shot=[]), params)
    assert without.success, without.failures


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({"latents": latent_rows()[:3]}, "each of 4 latents has one row", ["latent 3"]),
        ({"latents": latent_rows() + latent_rows()[1:2]}, "each of 4 latents has one row", ["latent 1"]),
        ({"latents": edited(latent_rows(), 2, density=1.5)}, "density is a share", ["latent 2", "1.5"]),
        ({"latents": edited(latent_rows(), 2, is_dead=True)}, "latents are dead if and only if their density is 0", ["latent 2"]),
        ({"latents": edited(latent_rows(), 3, ms=-1.2)}, "monosemanticity lies between -1 and 1", ["latent 3", "-1.2"]),
        ({"latents": [row | {"ms": None} for row in latent_rows()]}, "some latent has a monosemanticity score", ["ms 0"]),
        (
            {"examples": edited(example_rows(), 1, decile=0)},
            "examples have a decile from 1 to 10",
            ["latent 2 image 2", "examples.parquet"],
        ),
        ({"examples": edited(example_rows(), 1, rank=0)}, "ranks of examples start at 1", ["latent 2 image 2"]),
        ({"examples": []}, "there are examples and firings", ["table examples"]),
        (
            {"firings": edited(firing_rows(), 0, act=0.0)},
            "firings are positive and belong to known latents",
            ["image 1 latent 1", "firings.parquet"],
        ),
        ({"firings": edited(firing_rows(), 0, latent=9)}, "firings are positive and belong to known latents", ["latent 9"]),
        ({"near_misses": edited(near_miss_rows(), 9, margin=0.5)}, "margins of near misses are at most 0", ["latent 2 image 1 margin 0.5"]),
        ({"near_misses": edited(near_miss_rows(), 9, margin=float("nan"))}, "margins of near misses are at most 0", ["latent 2 image 1"]),
        ({"near_misses": edited(near_miss_rows(), 9, image=2)}, "the latent does not fire on its near misses", ["latent 2 image 2"]),
        ({"near_misses": near_miss_rows()[:-2]}, "counts add up", ["near misses and silent images", "-2"]),
        ({"comparisons": edited(comparison_rows(), 1, fvu=0.2)}, "FVU is below the untrained SAE's", ["-0.1"]),
        ({"comparisons": edited(comparison_rows(), 1, fvu=None)}, "both FVUs are numbers", ["null"]),
        ({"comparisons": comparison_rows()[:2]}, "the baselines are present", ["neurons"]),
        ({"zero_shot": zero_shot_rows(1.45)}, "splicing changes nothing by itself", ["0.05"]),
        ({"comparisons": edited(comparison_rows(), 0, fvu=0.0)}, "the SAE's FVU is above 0", ["fvu of the sae 0"]),
        ({"comparisons": edited(comparison_rows(), 0, dead=0.95)}, "few latents are dead", ["0.95"]),
        ({"comparisons": edited(comparison_rows(), 0, ms=0.3)}, "monosemanticity is above its floor on average", ["0"]),
        ({"latents": edited(latent_rows(), 1, label_entropy=float("nan"))}, "no value is NaN", ["table latents", "label_entropy"]),
        ({"latents": edited(latent_rows(), 1, n_images=2)}, "counts add up", ["firings and latents.n_images", "-1"]),
        ({"densities": density_rows()[1:]}, "counts add up", ["latents of sae in densities", "-1"]),
        ({"fidelity": fidelity_rows()[1:]}, "counts add up", ["tokens of sae in fidelity", "-3"]),
        ({"levels": level_rows()[:1]}, "counts add up", ["latents of levels and latents", "-2"]),
    ],
)
def test_evaluate_damage_is_named(tmp_path: Path, params: Params, changed: dict[str, Rows], name: str, words: list[str]) -> None:
    found = failed(check("evaluate", evaluation_artefact(tmp_path, **changed), params))
    assert set(found) - ({"counts add up"} - {name}) == {name}  # rows that are missing are missing in sums, too
    assert all(word in found[name].detail for word in words), found[name].detail


def test_an_fvu_of_one_fails_evaluate(tmp_path: Path, params: Params) -> None:
    comparisons = edited(edited(comparison_rows(), 0, fvu=1.0), 1, fvu=2.0)
    assert set(failed(check("evaluate", evaluation_artefact(tmp_path, comparisons=comparisons), params))) == {"the SAE's FVU is below 1"}


# label


LABEL_NULLS = dict.fromkeys(field.name for field in schemas.LABELS if field.nullable)


def label_rows(labeller: str = "vocabulary", place: int = 1) -> Rows:
    shared = {"sae": "s", "labeller": labeller, "place": place, "status": "too_few_examples", "n_requests": 0, "n_tokens": 0}
    rows: Rows = [{**LABEL_NULLS, **shared, "latent": i} for i in range(N_LATENTS)]
    rows[1] |= {"status": "ok", "label": "dog", "similarity": 0.3, "score": 0.8, "control_score": 0.5, "random_score": 0.6}
    return rows


def mistake_rows(labels: Rows) -> Rows:
    """One missed image and one false alarm for each label whose score is below 1."""
    rest = {"sae": "s", "rank": 1, "image": 7, "threshold": 0.5}
    kinds = (
        {"kind": "missed", "cosine": 0.5, "act": 1.0, "is_hard": None},
        {"kind": "false_alarm", "cosine": 0.6, "act": 0.0, "is_hard": True},
    )
    wrong = [row for row in labels if row["score"] is not None and row["score"] < 1]
    return [{**rest, **kind, "latent": row["latent"], "labeller": row["labeller"]} for row in wrong for kind in kinds]


def labels_artefact(folder: Path, rows: Rows, sae: str = ONE, mistakes: Rows | None = None) -> Artefact:
    mistakes = mistake_rows(rows) if mistakes is None else mistakes
    tables = {"labels.parquet": table(schemas.LABELS, rows), "mistakes.parquet": table(schemas.MISTAKES, mistakes)}
    return inside_of(folder, "labels", {sae: tables})


def with_labellers(params: Params, *kinds: Mapping[str, Any]) -> Params:
    return make_params(params.model_dump(mode="json") | {"label": params.label.model_dump(mode="json") | {"labellers": kinds}}, "test")


@pytest.mark.parametrize("score", [0.8, None])
def test_label_passes(tmp_path: Path, params: Params, score: float | None) -> None:
    """A label without a score passes, because the label of a latent that fires on every image cannot be scored."""
    report = check("label", labels_artefact(tmp_path, edited(label_rows(), 1, score=score)), params)
    assert report.success, report.failures


@pytest.mark.parametrize(
    ("rows", "name", "words"),
    [
        (edited(label_rows(), 2, status="great"), "every status is known", ["latent 2", "great"]),
        (edited(label_rows(), 3, label="cat"), "there is a label if and only if the status is ok", ["latent 3"]),
        (edited(label_rows(), 1, label=" "), "no label is empty", ["latent 1"]),
        (edited(label_rows(), 3, score=0.5), "only labels with status ok have a score", ["latent 3"]),
        (edited(label_rows(), 1, score=1.5), "scores lie between 0 and 1", ["latent 1", "score 1.5"]),
        (edited(label_rows(), 1, auroc=-0.1), "scores lie between 0 and 1", ["latent 1", "auroc -0.1"]),
        (edited(label_rows(), 1, correlation=-1.5), "correlations lie between -1 and 1", ["latent 1", "correlation -1.5"]),
        (label_rows()[:3], "every latent has one row for each labeller", ["vocabulary", "latent 3"]),
        ([*label_rows(), label_rows()[2]], "every latent has one row for each labeller", ["latent 2"]),
        (
            edited(label_rows(), 1, status="refused", label=None, score=None),
            "some latent has a label",
            ["ok labels 0", "1 refused", "too_few_examples"],
        ),
    ],
)
def test_label_damage_is_named(tmp_path: Path, params: Params, rows: Rows, name: str, words: list[str]) -> None:
    found = failed(check("label", labels_artefact(tmp_path, rows), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in words), found[name].detail


def wrong(index: int, **change: Any) -> Rows:
    return edited(mistake_rows(label_rows()), index, **change)


KIND, AGREES = "mistakes are what their kind says", "labels have mistakes if and only if their score is below 1"


@pytest.mark.parametrize(
    ("score", "mistakes", "name", "words"),
    [
        (0.8, wrong(0, cosine=0.6), KIND, ["latent 1 missed image 7"]),
        (0.8, wrong(0, act=0.0), KIND, ["latent 1 missed image 7"]),
        (0.8, wrong(0, is_hard=False), KIND, ["latent 1 missed image 7"]),
        (0.8, wrong(1, cosine=0.5), KIND, ["latent 1 false_alarm image 7"]),
        (0.8, wrong(1, cosine=float("nan")), KIND, ["latent 1 false_alarm image 7"]),
        (0.8, wrong(1, act=1.0), KIND, ["latent 1 false_alarm image 7"]),
        (0.8, wrong(1, is_hard=None), KIND, ["latent 1 false_alarm image 7"]),
        (0.8, wrong(1, kind="odd"), KIND, ["latent 1 odd image 7"]),
        (0.8, wrong(1, rank=5), KIND, ["latent 1 false_alarm image 7"]),
        (0.8, [], AGREES, ["latent 1 (vocabulary)"]),
        (1.0, wrong(0), AGREES, ["latent 1 (vocabulary)"]),
        (None, wrong(0), AGREES, ["latent 1 (vocabulary)"]),
    ],
)
def test_damaged_mistakes_are_named(
    tmp_path: Path, params: Params, score: float | None, mistakes: Rows, name: str, words: list[str]
) -> None:
    found = failed(check("label", labels_artefact(tmp_path, edited(label_rows(), 1, score=score), mistakes=mistakes), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in words), found[name].detail


def test_labels_of_several_labellers_are_each_counted(tmp_path: Path, params: Params) -> None:
    """People need not label every latent, but a vocabulary must."""
    vocabulary = {"kind": "vocabulary", "words": ["common"]}
    both = with_labellers(params, vocabulary, {"kind": "human", "path": "labels.csv"})
    by_people = [row for row in label_rows("human", 2) if row["label"]]
    assert check("label", labels_artefact(tmp_path, label_rows() + by_people), both).success
    lost = edited(label_rows(), 1, label="")
    found = failed(check("label", labels_artefact(tmp_path, lost[:3] + by_people + by_people), both))
    assert found["no label is empty"].detail.startswith("latent 1 (vocabulary)")
    assert "human: latents missing or repeated 1 (first: latent 1)" in found["every latent has one row for each labeller"].detail
    (unknown,) = failed(check("label", labels_artefact(tmp_path, label_rows() + by_people), with_labellers(params, vocabulary))).values()
    assert unknown.name == "all rows come from the labellers of label.labellers"


def test_an_image_that_both_made_and_scored_a_label_fails(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUMMARY, "n_images_in_both", 3)
    found = failed(check("label", labels_artefact(tmp_path, label_rows()), params))
    assert list(found) == ["no image both made and scored a label"]


@pytest.mark.parametrize("control", ["control_score", "random_score"])
def test_controls_far_from_chance_fail_once_there_are_enough_of_them(tmp_path: Path, params: Params, control: str) -> None:
    n, sae = 400, ONE.replace("4", "400")
    many = params.model_copy(update={"train": params.train.model_copy(update={"d_sae": n})})
    row = label_rows()[1]
    for score, passes in ((0.5, True), (0.64, True), (0.66, False), (0.34, False)):
        rows = [{**row, "latent": i, control: score} for i in range(n)]
        report = check("label", labels_artefact(tmp_path / f"{score}", rows, sae), many)
        assert report.success == passes
        assert all("scores near chance" in failure.name for failure in report.failures)
    few = [{**row, "latent": i, control: 0.9} for i in range(N_LATENTS)]
    assert check("label", labels_artefact(tmp_path, few), params).success


# intervene


EFFECT_NULLS = dict.fromkeys(field.name for field in schemas.EFFECTS if field.nullable)
EFFECT_COUNTS = {"n_tested": 2, "n_causal": 1, "n_reads_only": 1, "n_breaks_model": 0, "n_untested": 2, "share_causal": 0.5}
EFFECT_COUNTS |= {"random_causal": 0.0, "zero_dose": 0.0}
NUMBERS = {
    "outcome": "toward_label",
    "dose": 1.0,
    "act": 4.0,
    "effect": 0.5,
    "effect_low": 0.25,
    "effect_high": 0.75,
    "best_control": 0.125,
    "control_causal": "reads_only",
}


def effect_rows() -> Rows:
    rows: Rows = [{**EFFECT_NULLS, "sae": "s", "latent": i, "status": "untested", "reason": "not chosen"} for i in range(N_LATENTS)]
    rows[1] |= {**NUMBERS, "status": "causal", "reason": None}
    rows[2] |= {**NUMBERS, "status": "reads_only", "reason": None, "effect_low": -0.25, "best_control": 0.75}
    return rows


def intervention_rows() -> Rows:
    shared = {"sae": "s", "latent": 1, "outcome": "toward_label", "dose": 1.0, "n_images": 16}
    rows: Rows = [{**shared, "arm": "targeted", "value": 0.5, "low": 0.25, "high": 0.75, "n_draws": 1}]
    return [*rows, {**shared, "arm": "random_latent", "value": 0.125, "low": None, "high": None, "n_draws": 8}]


def attribution_rows() -> Rows:
    shared = {"sae": "s", "output": "cat", "sparsity": 1.8, "n_images": 16}
    rows: Rows = [{**shared, "rank": 1, "latent": 1, "effect": -0.5, "exact": -0.4}]
    return [*rows, {**shared, "rank": 2, "latent": 3, "effect": 0.25, "exact": None}]


def audit_rows() -> Rows:
    """A suspect, a pair that is more suspicious than was tested, and one that nothing speaks against."""
    pair = {**dict.fromkeys(schemas.AUDIT.names), **AUDIT, "sae": "s"}
    tested = [name for name in schemas.AUDIT.names if name.startswith(("worst", "balanced", "gain", "n_tested", "grouped"))]
    untested = {**pair, **dict.fromkeys(tested), "status": "untested", "class": "dog", "reason": "others are more suspicious"}
    return [pair, untested, {**untested, "status": "unsuspicious", "class": "ship", "suspicion": -0.5, "reason": None}]


def effects_artefact(
    folder: Path,
    effects: Rows | None = None,
    interventions: Rows | None = None,
    attributions: Rows | None = None,
    sae: str = ONE,
    audit: Rows | None = None,
    audits: Mapping[str, Any] | None = None,
    **summary: Any,
) -> Artefact:
    tables = {
        "effects.parquet": table(schemas.EFFECTS, effect_rows() if effects is None else effects),
        "interventions.parquet": table(schemas.INTERVENTIONS, intervention_rows() if interventions is None else interventions),
        "attributions.parquet": table(schemas.ATTRIBUTIONS, attribution_rows() if attributions is None else attributions),
        "audit.parquet": table(schemas.AUDIT, audit_rows() if audit is None else audit),
        "audits.parquet": table(schemas.AUDITS, [{**AUDITS, "sae": "s", "n_examined": 3, "n_pairs": 11, **(audits or {})}]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (EFFECT_COUNTS | summary).items():
            patch.setitem(SUMMARY, key, value)
        return inside_of(folder, "effects", {sae: tables})


def test_intervene_passes(tmp_path: Path, params: Params) -> None:
    report = check("intervene", effects_artefact(tmp_path), params)
    assert report.success, report.failures
    assert report.numbers["n_causal"] == 1


def test_an_sae_whose_model_cannot_be_run_passes_with_the_reason(tmp_path: Path, params: Params) -> None:
    untested: Rows = [{**EFFECT_NULLS, "sae": "s", "latent": i, "status": "untested", "reason": "no model"} for i in range(N_LATENTS)]
    counts = {key: 0 for key in EFFECT_COUNTS if key.startswith("n_")} | {"n_untested": N_LATENTS}
    unknown: dict[str, Any] = {"share_causal": None, "random_causal": None, "zero_dose": None}
    report = check("intervene", effects_artefact(tmp_path, untested, [], [], **counts, **unknown), params)
    assert report.success, report.failures


COUNTED = "the audit counts what it lists"


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, {"status": "guilty"}),
        (0, {"suspicion": 0.0}),
        (0, {"n_tested": None}),
        (0, {"worst_group": "the rest"}),
        (0, {"gain_low": 0.0}),
        (0, {"gain_low": None}),
        (0, {"accuracy_with": 1.5}),
        (0, {"trust_less_low": 0.75}),
        (0, {"n_others_with": 0}),
        (0, {"latent": N_LATENTS}),
        (1, {"reason": None}),
        (2, {"suspicion": 0.125}),
        (2, {"reason": "why not"}),
        (2, {"suspicion": float("nan")}),
    ],
)
def test_pairs_of_the_audit_that_contradict_themselves_are_named(
    tmp_path: Path, params: Params, place: int, change: Mapping[str, Any]
) -> None:
    rows = edited(audit_rows(), place, **change)
    found = failed(check("intervene", effects_artefact(tmp_path, audit=rows), params))
    assert set(found) - {COUNTED} == {ROWS}
    assert f"latent {rows[place]['latent']} {rows[place]['class']}" in found[ROWS].detail


@pytest.mark.parametrize("change", [{"n_tested": 2}, {"n_suspects": 0}, {"n_too_few": 9}, {"n_unlisted": 1}])
def test_counts_of_the_audit_that_disagree_are_named(tmp_path: Path, params: Params, change: Mapping[str, int]) -> None:
    found = failed(check("intervene", effects_artefact(tmp_path, audits=change), params))
    assert set(found) == {COUNTED} and any(name in found[COUNTED].detail for name in (*change, "n_pairs", "n_examined"))


AGREE, EVERY = "statuses agree with their numbers", "every latent has one row of effects"
ROWS, KEYS = "rows have known latents, arms, outcomes and ranks, and finite numbers", "no key is repeated"
RANKED = "attributions are ranked by size without gaps"


@pytest.mark.parametrize(
    ("rows", "name", "words"),
    [
        (edited(effect_rows(), 1, effect_low=-0.125), AGREE, ["latent 1", "causal", "effect 0.5 from -0.125"]),
        (edited(effect_rows(), 1, effect_low=0.0), AGREE, ["latent 1", "causal"]),
        (edited(effect_rows(), 1, best_control=0.5), AGREE, ["latent 1", "best_control 0.5"]),
        (edited(effect_rows(), 1, best_control=None), AGREE, ["latent 1", "best_control is not a number"]),
        (edited(effect_rows(), 2, effect=float("inf")), AGREE, ["latent 2", "effect is not a number"]),
        (edited(effect_rows(), 2, effect_low=0.8), AGREE, ["latent 2", "effect_low 0.8 above effect_high 0.75"]),
        (edited(effect_rows(), 2, dose=-1.0), AGREE, ["latent 2", "dose below 0"]),
        (edited(effect_rows(), 2, outcome="fame"), AGREE, ["latent 2", "outcome fame"]),
        (edited(effect_rows(), 2, outcome=None), AGREE, ["latent 2", "outcome"]),
        (edited(effect_rows(), 2, reason="not chosen"), AGREE, ["latent 2", "tested, but with a reason"]),
        (edited(effect_rows(), 3, effect=0.5), AGREE, ["latent 3", "untested, but with effect"]),
        (edited(effect_rows(), 3, outcome="drift"), AGREE, ["latent 3", "untested, but with outcome"]),
        (edited(effect_rows(), 3, reason=None), AGREE, ["latent 3", "untested without a reason"]),
        (effect_rows()[:3], EVERY, ["latent 3"]),
        ([*effect_rows(), effect_rows()[1]], EVERY, ["latent 1"]),
        ([*effect_rows(), {**effect_rows()[3], "latent": N_LATENTS}], EVERY, [f"latent {N_LATENTS}"]),
    ],
)
def test_damaged_effects_are_named(tmp_path: Path, params: Params, rows: Rows, name: str, words: list[str]) -> None:
    found = failed(check("intervene", effects_artefact(tmp_path, rows, **_count(rows)), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in words), found[name].detail


def _count(rows: Rows) -> dict[str, Any]:
    n_untested = sum(row["status"] == "untested" for row in rows)
    of = {f"n_{status}": sum(row["status"] == status for row in rows) for status in schemas.STATUSES}
    return of | {"n_tested": len(rows) - n_untested}


def test_an_unknown_status_is_named(tmp_path: Path, params: Params) -> None:
    rows = edited(effect_rows(), 2, status="great")
    found = failed(check("intervene", effects_artefact(tmp_path, rows, **_count(rows)), params))
    assert set(found) == {"every status is known"} and "latent 2" in found["every status is known"].detail


@pytest.mark.parametrize(
    ("interventions", "attributions", "name", "words"),
    [
        (edited(intervention_rows(), 0, arm="lucky"), None, ROWS, ["interventions", "latent 1 toward_label lucky"]),
        (edited(intervention_rows(), 0, arm="drift"), None, ROWS, ["latent 1 toward_label drift"]),
        (edited(intervention_rows(), 0, outcome="fame"), None, ROWS, ["latent 1 fame targeted"]),
        (edited(intervention_rows(), 0, latent=N_LATENTS), None, ROWS, [f"latent {N_LATENTS} "]),
        (edited(intervention_rows(), 0, value=float("nan")), None, ROWS, ["latent 1 toward_label targeted"]),
        (edited(intervention_rows(), 0, dose=-1.0), None, ROWS, ["latent 1 toward_label targeted -1"]),
        (edited(intervention_rows(), 0, low=0.9), None, ROWS, ["latent 1 toward_label targeted"]),
        (edited(intervention_rows(), 1, n_draws=0), None, ROWS, ["latent 1 toward_label random_latent"]),
        (edited(intervention_rows(), 1, arm="targeted"), None, KEYS, ["interventions", "latent 1 toward_label targeted"]),
        (None, edited(attribution_rows(), 1, latent=-1), ROWS, ["attributions", "latent -1 cat 2"]),
        (None, edited(attribution_rows(), 1, effect=float("nan")), ROWS, ["latent 3 cat 2"]),
        (None, edited(attribution_rows(), 0, exact=float("inf")), ROWS, ["latent 1 cat 1"]),
        (None, edited(attribution_rows(), 1, rank=1), KEYS, ["attributions", "cat 1"]),
        (None, edited(attribution_rows(), 1, rank=3), RANKED, ["attributions", "latent 3 cat 3"]),
        (None, edited(attribution_rows(), 1, effect=0.75), RANKED, ["attributions", "latent 3 cat 2"]),
    ],
)
def test_damaged_interventions_and_attributions_are_named(
    tmp_path: Path, params: Params, interventions: Rows | None, attributions: Rows | None, name: str, words: list[str]
) -> None:
    found = failed(check("intervene", effects_artefact(tmp_path, None, interventions, attributions), params))
    assert set(found) == {name}
    assert all(word in found[name].detail for word in words), found[name].detail


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"zero_dose": 1e-7}, "an edit that moves nothing changes nothing"),
        ({"zero_dose": None}, "an edit that moves nothing was tried"),
        ({"n_causal": 2}, "the summary counts the statuses"),
        ({"n_untested": 0}, "the summary counts the statuses"),
        ({"share_causal": 1.5}, "shares lie between 0 and 1"),
    ],
)
def test_a_summary_that_cannot_be_is_named(tmp_path: Path, params: Params, change: Mapping[str, Any], name: str) -> None:
    assert set(failed(check("intervene", effects_artefact(tmp_path, **change), params))) == {name}


def test_random_latents_that_are_causal_fail_once_there_are_more_than_chance_allows(tmp_path: Path, params: Params) -> None:
    """With a chance of 5 %, fewer than 1 in 1,000 draws of 400 latents have 36 causal ones; 1 of 2 is too few to tell."""
    name, n = "random latents are not causal", 400
    many = params.model_copy(update={"train": params.train.model_copy(update={"d_sae": n})})
    rows = [{**effect_rows()[2], "latent": i} for i in range(n)]
    for share, passes in ((0.05, True), (35 / n, True), (36 / n, False), (1.0, False)):
        found_of = {**_count(rows), "random_causal": share, "share_causal": 0.0}
        made = effects_artefact(tmp_path / f"{share}", rows, [], [], ONE.replace("4", f"{n}"), **found_of)
        found = failed(check("intervene", made, many))
        assert (found == {}) == passes and set(found) <= {name}
        assert passes or f"{share:.3g} of {n} are causal" in found[name].detail
    assert check("intervene", effects_artefact(tmp_path / "few", random_causal=0.5), params).success


# catalog


HAS_VECTORS = "every latent has its direction, and every latent that fires its meaning"


def catalog_artefact(folder: Path, *statements: str) -> Artefact:
    def build(path: Path) -> None:
        with duckdb.connect(str(path)) as connection:
            for name in set(RELATIONS) - {"latents", "features", "directions", "meanings"}:
                connection.execute(f"CREATE TABLE {name} AS SELECT 1 AS a")
            columns = "'s' AS sae, CAST(range AS INTEGER) AS latent, 0.1 AS density, CAST(range AS INTEGER) AS n_images"
            connection.execute(f"CREATE TABLE latents AS SELECT {columns} FROM range(4)")
            connection.execute("CREATE TABLE features AS FROM latents")
            connection.execute("CREATE TABLE directions AS SELECT sae, latent, '\\x01\\x02'::BLOB AS direction FROM latents")
            # latent 0 fires on no image
            connection.execute("CREATE TABLE meanings AS SELECT sae, latent, direction AS embedding FROM directions WHERE latent > 0")
            for statement in statements:
                connection.execute(statement)

    return artefact_of(folder, "catalog", {"catalog.duckdb": build})


@pytest.mark.parametrize("emptied", ["probes", "meanings"])  # without labels, and without a joint image-text space
def test_catalog_passes(tmp_path: Path, params: Params, emptied: str) -> None:
    report = check("catalog", catalog_artefact(tmp_path, f"DELETE FROM {emptied}"), params)
    assert report.success, report.failures


@pytest.mark.parametrize(
    ("statement", "names", "words"),
    [
        ("DELETE FROM neighbours", {"every relation is present and has rows"}, ["relation neighbours", "empty"]),
        (
            "DROP TABLE runs",
            {"every relation is present and has rows", "features can be compared with latents"},
            ["relation runs", "cannot be read"],
        ),
        ("DROP TABLE probes", {"every relation is present and has rows", "features can be compared with latents"}, ["relation probes"]),
        ("DELETE FROM features WHERE latent = 2", {"features has one row for each latent"}, ["latent 2 (0 times)"]),
        ("INSERT INTO features FROM latents WHERE latent = 3", {"features has one row for each latent"}, ["latent 3 (2 times)"]),
        ("DELETE FROM directions WHERE latent = 2", {HAS_VECTORS}, ["relation directions", "latent 2 (0)"]),
        ("INSERT INTO directions FROM directions WHERE latent = 1", {HAS_VECTORS}, ["relation directions", "latent 1 (2)"]),
        ("DELETE FROM meanings WHERE latent = 3", {HAS_VECTORS}, ["relation meanings", "latent 3 (0)"]),
        ("UPDATE latents SET n_images = 0 WHERE latent = 1", {HAS_VECTORS}, ["relation meanings", "latent 1 (1)"]),
        (
            "UPDATE meanings SET embedding = '\\x01'::BLOB WHERE latent = 2",
            {"all vectors of an SAE have the same width"},
            ["relation meanings", "latent 2 (1 bytes)"],
        ),
    ],
)
def test_catalog_damage_is_named(tmp_path: Path, params: Params, statement: str, names: set[str], words: list[str]) -> None:
    found = failed(check("catalog", catalog_artefact(tmp_path, statement), params))
    assert set(found) == names
    detail = " ".join(check.detail for check in found.values())
    assert all(word in detail for word in words), detail


# the report


def test_many_failures_are_counted_and_not_listed(tmp_path: Path, params: Params) -> None:
    rows = [row | {"density": 2.0} for row in latent_rows()]
    detail = failed(check("evaluate", evaluation_artefact(tmp_path, latents=rows), params))["density is a share"].detail
    assert detail.count("latent ") == 3
    assert detail.endswith("and 1 more")


def make_report() -> Report:
    checks = (Check("fine", "because", True, "1", ""), Check("broken <b>", "of harm", False, "2", "part a&b: 3"))
    return Report("images", checks, {"n": 3, "share": 0.25, "nan": float("nan"), "name": "text", "nested": {"deep": 1}})


def test_report_json_has_metrics_at_the_top_and_checks_as_a_list(tmp_path: Path) -> None:
    json_path, _ = quality.write_report(make_report(), tmp_path / "quality")
    value = json.loads(json_path.read_text())
    assert (value["success"], value["n_checks"], value["n_failed"]) == (False, 2, 1)
    assert value["summary"] == {"n": 3, "share": 0.25, "nested.deep": 1}
    assert value["checks"][1]["detail"] == "part a&b: 3"


def test_report_page_needs_no_network_and_escapes(tmp_path: Path) -> None:
    _, html_path = quality.write_report(make_report(), tmp_path)
    page = html_path.read_text()
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\(", page)
    assert "broken &lt;b&gt;" in page and "part a&amp;b: 3" in page
    assert "✗ failed" in page and "✓ passed" in page
    assert page.index("✗ failed") < page.index("✓ passed"), "what failed is shown first"


def test_reports_are_reproducible_and_leave_no_other_files(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in quality.write_report(make_report(), tmp_path)]
    assert first == [path.read_bytes() for path in quality.write_report(make_report(), tmp_path)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.html", "images.json"]


def test_failing_gate_leaves_a_report_and_no_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: Params) -> None:
    def make_images(section: Any, inputs: Any, draft: Draft, on_event: Any) -> Artefact:
        draft.write_table(part_name("images", 0), table(schemas.IMAGES, image_rows(0, 1)))
        draft.write_table("rejected.parquet", table(schemas.REJECTED, []))
        return draft.seal(dict.fromkeys(ImagesSummary.__required_keys__))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ommatid.images.stage.run", make_images)
    with pytest.raises(GateError, match=r"both splits have images: split eval: images 0.*data/quality/images\.html"):
        run_stage("images", params, ignore)
    assert not (tmp_path / "data/images").exists()
    assert json.loads((tmp_path / "data/quality/images.json").read_text())["success"] is False
