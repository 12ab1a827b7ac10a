"""Proves the audit on planted pictures: the ruler's latent is named, and no other, and ablating it helps the group that it hurts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid.config import InterveneParams, Params
from ommatid.config.intervene import AuditParams
from ommatid.errors import ConfigError
from ommatid.events import Event, Progress, Warned, ignore
from ommatid.intervene import audit as module
from ommatid.intervene.attributes import load_attributes
from ommatid.intervene.audit import Audited, audit
from ommatid.intervene.subject import Subject
from ommatid.metrics.reliance import Span
from ommatid.store import Artefact
from support import ruler
from support.ruler import RED, RULER, SHADOW, RulerModel
from support.tiles import use_tile_model

DRAWS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ruler")
    ruler.write_sources(root)
    return root


@pytest.fixture(scope="module")
def params(root: Path) -> Params:
    return ruler.make_ruler_params(root, intervene={"draws": DRAWS})


@pytest.fixture(scope="module")
def line(root: Path, params: Params) -> dict[str, Artefact]:
    return ruler.make_ruler_line(root, params)


@pytest.fixture(scope="module", autouse=True)
def model() -> Iterator[RulerModel]:
    model = RulerModel()
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch, model)
        yield model


def run(params: Params, line: dict[str, Artefact], on_event: Any = ignore, **changes: Any) -> Audited:
    return audit(params.intervene.model_copy(update={"audit": AuditParams(**changes)}), Subject(line), on_event)


@pytest.fixture(scope="module")
def audited(params: Params, line: dict[str, Artefact], model: RulerModel) -> Audited:
    return run(params, line)


@pytest.fixture(scope="module")
def told(params: Params, line: dict[str, Artefact], root: Path, model: RulerModel) -> Audited:
    """The audit that is told which pictures have a ruler."""
    return run(params, line, attributes=str(root / "rulers.csv"))


def pair(audited: Audited, latent: int, name: str = "red") -> dict[str, Any]:
    return next(row for row in audited.pairs if (row["latent"], row["class"]) == (latent, name))


@pytest.mark.parametrize("which", ["audited", "told"])
def test_the_ruler_is_the_only_suspect(which: str, request: pytest.FixtureRequest) -> None:
    found: Audited = request.getfixturevalue(which)
    assert [(row["latent"], row["class"]) for row in found.pairs if row["status"] == "suspect"] == [(RULER, "red")]
    assert pair(found, RULER)["suspicion"] == max(row["suspicion"] for row in found.pairs)


@pytest.mark.parametrize("which", ["audited", "told"])
def test_ablation_helps_the_worst_group_at_least_half_as_much_as_leace_and_random_latents_less_than_a_tenth(
    which: str, request: pytest.FixtureRequest
) -> None:
    row = pair(request.getfixturevalue(which), RULER)
    gain = row["worst_ablated"] - row["worst"]
    assert row["worst_group"] == "others_with" and gain > 0.3
    assert gain >= 0.5 * (row["worst_leace"] - row["worst"]) > 0
    assert row["worst_random"] - row["worst"] < 0.1 * gain
    assert row["balanced_ablated"] - row["balanced"] > row["gain_low"] > 0 and row["balanced_ablated"] > row["balanced_random"]


def test_a_latent_of_the_class_is_not_suspicious_although_the_model_is_right_where_it_is_and_wrong_on_others_that_have_it(
    audited: Audited, told: Audited
) -> None:
    for found in (audited, told):
        row = pair(found, RED)
        assert row["status"] == "unsuspicious" and row["suspicion"] < 0
        assert row["accuracy_more"] > 0 and row["mistaken_more_low"] > 0 and row["trust_less_high"] < 0


def test_a_latent_that_fires_with_the_ruler_but_that_the_model_does_not_read_is_not_confirmed(audited: Audited) -> None:
    row = pair(audited, SHADOW)
    assert row["status"] == "unconfirmed" and row["suspicion"] == pair(audited, RULER)["suspicion"]
    assert row["worst_ablated"] == row["worst"] and row["balanced_ablated"] == row["balanced"]


def test_numbers_agree_with_counts_of_the_stored_firings_and_the_model(audited: Audited, line: dict[str, Artefact]) -> None:
    table = line["images"].read("images", ["image", "split", "label"]).to_pylist()
    truth = {row["image"]: row["label"] for row in table if row["split"] == "eval"}
    fired = line["evaluate"].read("firings", ["image", "latent"]).to_pylist()
    having = {row["image"] for row in fired if row["latent"] == RULER}
    subject = Subject(line)
    called = {}
    for numbers, pixels in subject.load_pixels(sorted(truth)):
        scores = subject.readout.scores(subject.model.splice(pixels, "tiles", [lambda tokens: tokens])[0])
        called |= zip(numbers.tolist(), (subject.readout.names[at] for at in scores.argmax(1).tolist()), strict=True)
    red_with = [image for image in having if truth[image] == "red"]
    blue_with = [image for image in having if truth[image] == "blue"]
    row = pair(audited, RULER)
    assert (row["n_with"], row["n_others_with"]) == (len(red_with), len(blue_with))
    assert row["accuracy_with"] == pytest.approx(np.mean([called[image] == "red" for image in red_with]))
    assert row["mistaken_with"] == pytest.approx(np.mean([called[image] == "red" for image in blue_with]))
    called_with = [image for image in having if called[image] == "red"]
    assert row["trust_with"] == pytest.approx(np.mean([truth[image] == "red" for image in called_with]))
    n_red = sum(name == "red" for name in truth.values())
    assert row["lift"] == pytest.approx(len(red_with) / n_red / (len(having) / len(truth)))
    assert audited.counts["accuracy"] == pytest.approx(np.mean([called[image] == truth[image] for image in truth]))
    shown = {(row["part"], row["rank"]): row for row in audited.images if (row["latent"], row["class"]) == (RULER, "red")}
    assert {part for part, _ in shown} == {"class_with", "class_without", "others_with"} and len(shown) == 24
    assert all(shown["others_with", rank]["image"] in blue_with and shown["others_with", rank]["called"] == "red" for rank in range(1, 9))
    assert all(row["called"] == called[row["image"]] for row in shown.values())


def test_an_attribute_says_what_a_latent_follows(audited: Audited, told: Audited) -> None:
    assert all(row["attribute"] is None is row["follows"] for row in audited.pairs)
    of_ruler, of_red = pair(told, RULER), pair(told, RED)
    assert of_ruler["attribute"] == "ruler" == of_ruler["grouped_by"] and of_ruler["follows_low"] > 0.8 and of_ruler["attribute_lift"] > 1.9
    assert of_red["follows_high"] < 0 and of_red["attribute_lift"] < 1.3
    assert told.counts["attributes"] == ["ruler"] and told.counts["n_with_attributes"] == told.counts["n_images"]


def test_masks_say_how_much_of_the_ruler_is_outside_the_lesion(
    params: Params, line: dict[str, Artefact], audited: Audited, root: Path
) -> None:
    assert all("outside" not in row for row in audited.pairs)
    given = params.intervene.model_copy(update={"masks": str(root / "masks")})
    row = pair(audit(given, Subject(line), ignore), RULER)
    assert row["outside"] == pytest.approx(1) and row["outside_area"] == pytest.approx(5 / 6)
    inside = _located(given, line, RED)
    assert inside["outside"] < 0.2 and inside["outside_area"] == pytest.approx(5 / 6)


def _located(params: InterveneParams, line: dict[str, Artefact], latent: int) -> dict[str, Any]:
    """Where a latent is on images of red."""
    subject = Subject(line)
    return module._Audit(params, subject, module._call_images(subject, ignore), {})._locate(latent, 1)


def test_counts_say_what_was_looked_at_and_what_was_left_out(audited: Audited) -> None:
    counts = audited.counts
    assert counts["status"] == "ok" and counts["n_classes"] == 2 and counts["n_pairs"] == 2 * counts["n_latents"]
    assert counts["n_examined"] + counts["n_too_few"] == counts["n_pairs"] and counts["n_examined"] == len(audited.pairs)
    assert (counts["n_suspicious"], counts["n_tested"], counts["n_suspects"]) == (2, 2, 1)


def test_pairs_beyond_n_are_untested_with_the_reason_and_the_model_is_not_run_for_them(
    params: Params, line: dict[str, Artefact], model: RulerModel
) -> None:
    before = model.n_captured
    found = run(params, line, n=0)
    fitted = model.n_captured - before  # the scale of cosines is fitted on training images
    assert {row["status"] for row in found.pairs} == {"untested", "unsuspicious"} and found.images == []
    assert "intervene.audit.n" in pair(found, RULER)["reason"] and "worst" not in pair(found, RULER)
    assert found.counts["n_tested"] == 0 == found.counts["n_suspects"] and found.counts["n_suspicious"] == 2
    before, events = model.n_captured, list[Event]()
    one = run(params, line, events.append, n=1)
    assert one.counts["n_tested"] == 1 and events == [Progress("test suspicious features", 1, 1)]
    assert 0 < model.n_captured - before - fitted <= 4 * 32 + 1, "and one image by which the model's weights are checked"


def test_only_the_most_suspicious_pairs_of_a_class_are_listed(
    params: Params, line: dict[str, Artefact], audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PER_CLASS", 3)
    found = run(params, line)
    assert found.counts["n_unlisted"] == len(audited.pairs) - 6 and len(found.pairs) == 6
    for name in ("red", "blue"):
        best = sorted((row["suspicion"] for row in audited.pairs if row["class"] == name), reverse=True)[:3]
        assert sorted((row["suspicion"] for row in found.pairs if row["class"] == name), reverse=True) == best


def test_a_latent_of_the_classes_that_are_mistaken_is_said_to_be_theirs(
    params: Params, line: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nearly all blue lesions had the ruler, it would be a sign of theirs, and the model would confuse the two."""
    monkeypatch.setattr(module, "share_of", lambda hits, n, n_pairs: Span(*np.zeros((3, len(n)))))
    found = run(params, line)
    assert pair(found, RULER)["status"] == "of_another_class" and found.counts["n_tested"] == 0


def test_images_of_one_class_are_not_audited(params: Params, line: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "classes", {})
    found = run(params, line)
    assert not found.pairs and not found.images and "not of several classes" in found.counts["status"]


def test_without_stored_embeddings_of_its_own_the_model_is_run_on_some_images(
    params: Params, line: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(line["extract"].manifest.params, "namer", {"kind": "lite"})
    monkeypatch.setattr(module, "N_RUN", 400)
    found = run(params, line, n=0)
    assert found.counts["n_images"] == 400 and found.counts["n_suspicious"] >= 1
    row = max(found.pairs, key=lambda row: row["suspicion"])
    assert row["class"] == "red" and row["latent"] in (RULER, SHADOW)


# The file of attributes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,ruler\nred/0000.png,yes\n", ["columns name, ruler", "path, image_id, image"]),
        ("path\nred/0000.png\n", ["columns path", "another for each attribute"]),
        ("", ["columns none"]),
        ("path,ruler\nred/0000.png,perhaps\n", ["row 1, ruler is 'perhaps'", "yes, no"]),
        ("path,ruler\nred/0000.png,yes\nred/0000.png,no\n", ["row 2 names 'red/0000.png' again"]),
        ("path,ruler\nphotos/red/0000.png,yes\n", ["names none of the study's images by path", "an image is '"]),
        ("path,ruler\nred/0000.png\n", ["row 1 has 1 values, but there are 2 columns"]),
        ('path,ruler\n"red/0000.png,yes\n', ["cannot be read as CSV"]),
    ],
)
def test_a_file_of_attributes_that_cannot_be_used_is_refused(
    tmp_path: Path, line: dict[str, Artefact], text: str, words: list[str]
) -> None:
    (tmp_path / "given.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"^intervene\.audit\.attributes: ") as raised:
        load_attributes(str(tmp_path / "given.csv"), line["images"])
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("name", ["missing.csv", "missing.parquet", "text.parquet"])
def test_a_file_of_attributes_that_cannot_be_read_is_refused(tmp_path: Path, line: dict[str, Artefact], name: str) -> None:
    (tmp_path / "text.parquet").write_text("path,ruler\n")
    with pytest.raises(ConfigError, match=rf"^intervene\.audit\.attributes: .*{name} cannot be read as"):
        load_attributes(str(tmp_path / name), line["images"])


def test_parquet_and_numbers_of_images_are_read_and_unknown_values_and_images_are_left_out(
    tmp_path: Path, line: dict[str, Artefact]
) -> None:
    first, second, third = line["images"].read("images", ["image"])["image"].to_pylist()[:3]
    table = {"image": [first, second, third, 10**6], "ruler": [True, False, None, True], "hair": ["YES", "", "0", "no"]}
    pq.write_table(pa.table(table), tmp_path / "given.parquet")
    told: list[Event] = []
    found = load_attributes(str(tmp_path / "given.parquet"), line["images"], told.append)
    assert found == {"ruler": {first: True, second: False}, "hair": {first: True, third: False}}
    (warned,) = told
    assert isinstance(warned, Warned) and "1 of 4 rows of " in warned.what and warned.what.endswith("by image, such as '1000000'")


def test_an_attribute_that_is_known_of_a_single_image_is_no_fault(tmp_path: Path, params: Params, line: dict[str, Artefact]) -> None:
    rows = line["images"].read("images", ["path", "split"]).to_pylist()
    (tmp_path / "given.csv").write_text(f"path,ruler\n{next(row['path'] for row in rows if row['split'] == 'eval')},yes\n")
    found = run(params, line, n=0, attributes=str(tmp_path / "given.csv"))
    assert found.counts["n_with_attributes"] == 1 < found.counts["n_images"]
