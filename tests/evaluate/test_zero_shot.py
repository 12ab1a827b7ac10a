"""Proves, on pictures with planted colours, that zero-shot classification with x̂ spliced in equals a direct computation.

The tile model's embedding is the mean colour of the tiles at the hookpoint, so the effect of any x̂ is known. Classes are colours.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ommatid import schemas
from ommatid.activations.batches import load_sample
from ommatid.errors import ModelError
from ommatid.evaluate import zero_shot
from ommatid.evaluate.zero_shot import ZeroShot, measure_zero_shot
from ommatid.events import Event, Warned
from ommatid.extract import classifier, drawn, networks
from ommatid.extract.drawn import draw_images, iter_drawn_pixels
from ommatid.extract.stage import extract
from ommatid.images.decode import decode
from ommatid.images.labels import load_labels
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, open_draft
from ommatid.vlm import Captured, Hookpoint, Replacement
from support.study import make_artefact, make_test_params
from support.tiles import TileModel, make_images_artefact

N_IMAGES = 200
COLOURS = ("blue", "green", "red")


class TwoPlaces(TileModel):
    """A second hookpoint after `tiles`, with the same tokens twice as large; the embedding comes from there."""

    hookpoints = {**TileModel.hookpoints, "doubled": Hookpoint(8, ("cls",), (2, 3))}  # noqa: RUF012

    def capture(self, pixels: torch.Tensor, hookpoints: list[str]) -> Captured:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = super().capture(pixels, ["tiles", "cls"])
        return Captured({**found.tokens, "doubled": 2 * found.tokens["tiles"]}, found.embedding)

    def splice(self, pixels: torch.Tensor, hookpoint: str, replacements: Any, read: str | None = None) -> tuple[torch.Tensor, ...]:
        if hookpoint != "doubled":
            return super().splice(pixels, hookpoint, replacements)
        return super().splice(pixels, "tiles", [lambda x, r=replace: r(2 * x) / 2 for replace in replacements])


@pytest.fixture(scope="module")
def model() -> Iterator[TileModel]:
    made = TwoPlaces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "load_model", lambda params, dtype, device: made)
        patch.setattr(networks, "load_judge", lambda params, dtype, device: made)
        yield made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return make_images_artefact(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def extraction(model: TileModel, images: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    sections = {"extract": {"hookpoints": ["tiles", "doubled"], "tokens": "patch", "dtype": "float32"}, "train": {"hookpoint": "tiles"}}
    params = make_test_params(**sections)
    return make_artefact(tmp_path_factory.mktemp("extraction"), "extraction", extract, params.extract, {"images": images})


@pytest.fixture
def inputs(images: Artefact, extraction: Artefact) -> dict[str, Artefact]:
    return {"images": images, "extract": extraction.child("tiles", "activations")}


def make_sae(directions: torch.Tensor, b_dec: torch.Tensor | None = None, decodes: torch.Tensor | None = None) -> SAE:
    """Make an SAE that encodes by relu(x · directions) and decodes by acts · decodes + b_dec."""
    config = SAEConfig("planted", 8, len(directions), 1, "tiles", "tiles")
    b_dec = torch.zeros(8) if b_dec is None else b_dec
    return SAE(
        config, directions.T.contiguous(), torch.zeros(len(directions)), directions if decodes is None else decodes, b_dec, torch.zeros(())
    )


def exact_sae(model: TileModel) -> SAE:
    """Make an SAE with x̂ = x, which has a latent for every colour and its opposite."""
    return make_sae(torch.cat([model.spread, -model.spread]))


def red_sae(model: TileModel) -> SAE:
    """Make an SAE that reconstructs red alone."""
    return make_sae(model.spread[:1])


def silent_sae(activations: Artefact) -> SAE:
    """Make an SAE that always reconstructs the mean of the training tokens."""
    return make_sae(torch.zeros(1, 8), load_sample(activations, zero_shot.N_MEAN).mean(0))


def rows_of(found: ZeroShot) -> dict[str, dict[str, Any]]:
    assert found.status == "ok", found.status
    return {row["spliced"]: row for row in found.table().to_pylist()}


def measure(inputs: Mapping[str, Artefact], heard: list[Event] | None = None, **dictionaries: SAE) -> ZeroShot:
    return measure_zero_shot("planted", dictionaries, inputs, (heard if heard is not None else []).append)


class ByHand:
    """Computes the same numbers from all pixels at once."""

    def __init__(self, model: TileModel, inputs: Mapping[str, Artefact], split: str) -> None:
        rows = [row for row in inputs["images"].read("images").to_pylist() if row["split"] == split]
        self.own = torch.tensor([COLOURS.index(row["label"]) for row in rows])
        self.pixels = torch.from_numpy(np.stack([model.preprocess(decode(row["encoded"])) for row in rows]))
        self.tokens = model.capture(self.pixels, ["tiles"]).tokens["tiles"]
        self.model = model

    def losses(self, patches: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each image is classified correctly, and its cross-entropy, if the model continues from these patches."""
        embeddings = (patches.mean(1) @ self.model.spread.T + 0.01).double()
        texts = self.model.embed_text(["a photo of a " + name for name in COLOURS]).double()
        cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], texts[None], dim=2)
        return cosines.argmax(1) == self.own, -(scale * cosines).log_softmax(1)[torch.arange(len(self.own)), self.own]


def test_every_number_equals_a_direct_computation(model: TileModel, inputs: dict[str, Artefact]) -> None:
    bias = torch.tensor([0.03, -0.02, 0.01]) @ model.spread  # no two classes are equally far from an image without these colours
    sae, other = (make_sae(directions, bias) for directions in (model.spread[:1], model.spread[1:]))
    rows = rows_of(measure(inputs, sae=sae, untrained=other))
    assert list(rows) == ["plain", "sae", "sae_with_error", "mean", "untrained"]
    by_hand, training = ByHand(model, inputs, "eval"), ByHand(model, inputs, "train")
    x = by_hand.tokens[:, 1:]
    mean = load_sample(inputs["extract"], zero_shot.N_MEAN).mean(0).expand_as(x)
    spliced = {"plain": x, "sae_with_error": x, "mean": mean} | {
        name: one.decode(one.encode(x.flatten(0, 1))).view_as(x) for name, one in (("sae", sae), ("untrained", other))
    }
    scale = rows["plain"]["logit_scale"]
    losses = {name: by_hand.losses(patches, scale) for name, patches in spliced.items()}
    entropy = {name: float(loss.mean()) for name, (_, loss) in losses.items()}
    for name, row in rows.items():
        assert row["accuracy"] == pytest.approx(float(losses[name][0].double().mean())), name
        assert row["cross_entropy"] == pytest.approx(entropy[name], rel=1e-4), name
        expected = (entropy["mean"] - entropy[name]) / (entropy["mean"] - entropy["plain"])
        assert row["recovered"] == pytest.approx(expected, rel=1e-3, abs=1e-6), name
        assert row["recovered_low"] <= row["recovered"] <= row["recovered_high"]
        assert row["downstream_loss"] == pytest.approx(entropy[name] - entropy["plain"], rel=1e-3, abs=1e-6), name
        assert row["downstream_loss_low"] <= row["downstream_loss"] <= row["downstream_loss_high"]
        assert (row["n_images"], row["n_classes"], row["n_replaced"], row["n_tokens"]) == (len(x), 3, 6, 7)
        assert row["sae"] == "planted" and row["logit_scale"] == scale
    fitted = [float(training.losses(training.tokens[:, 1:], scale * factor)[1].mean()) for factor in (0.99, 1, 1.01)]
    assert fitted[1] == min(fitted)
    assert rows["plain"]["downstream_kl"] == 0 <= rows["sae_with_error"]["downstream_kl"] < 1e-9
    assert min(rows["mean"]["downstream_kl"], rows["sae"]["downstream_kl"]) > 1e-3


def test_planted_colours_are_classified_as_planted(model: TileModel, inputs: dict[str, Artefact]) -> None:
    """Colours are told apart; all of it is recovered by x̂ = x, none by the mean, some by one colour of three."""
    rows = rows_of(measure(inputs, sae=exact_sae(model), untrained=silent_sae(inputs["extract"]), pca=red_sae(model)))
    assert rows["plain"]["accuracy"] == 1.0 and rows["plain"]["accuracy_low"] > 0.9
    assert rows["sae"]["recovered"] == pytest.approx(1, abs=1e-4)
    assert rows["sae_with_error"]["cross_entropy"] == pytest.approx(rows["plain"]["cross_entropy"], rel=1e-5)
    assert rows["untrained"]["recovered"] == pytest.approx(0, abs=1e-4)
    assert 0.05 < rows["pca"]["recovered"] < 0.95
    assert rows["mean"]["accuracy"] == pytest.approx(1 / 3, abs=0.15)


def test_summary_has_the_headline_numbers(model: TileModel, inputs: dict[str, Artefact]) -> None:
    found = measure(inputs, sae=exact_sae(model), untrained=red_sae(model))
    rows = rows_of(found)
    assert found.summary() == {
        "zero_shot": "ok",
        "zero_shot_accuracy": rows["plain"]["accuracy"],
        "zero_shot_accuracy_sae": rows["sae"]["accuracy"],
        "zero_shot_recovered": rows["sae"]["recovered"],
        "zero_shot_recovered_untrained": rows["untrained"]["recovered"],
    }


def test_a_transcoder_is_spliced_where_it_decodes(model: TileModel, inputs: dict[str, Artefact], extraction: Artefact) -> None:
    exact = exact_sae(model)
    inputs["target"] = extraction.child("doubled", "activations")
    doubling = make_sae(exact.W_dec, decodes=2 * exact.W_dec)
    rows = rows_of(measure(inputs, sae=doubling))
    assert list(rows) == ["plain", "sae", "sae_with_error", "mean"]
    assert rows["sae"]["recovered"] == pytest.approx(1, abs=1e-4)
    other_colours = model.spread.roll(1, dims=0)
    wrong = make_sae(exact.W_dec, decodes=2 * torch.cat([other_colours, -other_colours]))
    assert rows_of(measure(inputs, sae=wrong))["sae"]["recovered"] < 0


def test_at_most_the_given_number_of_images_is_sampled(
    model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot, "N_IMAGES", 10)
    heard: list[Event] = []
    assert rows_of(measure(inputs, heard, sae=exact_sae(model)))["sae"]["n_images"] == 10
    assert not any(isinstance(event, Warned) for event in heard)


def test_a_models_own_scale_is_used(model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "logit_scale", 7.0, raising=False)
    row = rows_of(measure(inputs, sae=exact_sae(model)))["plain"]
    assert row["logit_scale"] == 7.0
    assert row["cross_entropy"] == pytest.approx(
        float(ByHand(model, inputs, "eval").losses(ByHand(model, inputs, "eval").tokens[:, 1:], 7.0)[1].mean()), rel=1e-4
    )


# ---- where there is nothing to measure


def refused(inputs: Mapping[str, Artefact], **dictionaries: SAE) -> str:
    """Return the reason in the summary, which must also be in a warning."""
    heard: list[Event] = []
    found = measure(inputs, heard, **dictionaries)
    assert found.rows == [] and found.table().schema == schemas.ZERO_SHOT
    assert found.summary() == {"zero_shot": found.status, **dict.fromkeys(list(found.summary())[1:])}
    assert heard == [Warned(f"planted: no zero-shot check: {found.status}")]
    return found.status


@pytest.mark.parametrize(("labels", "reason"), [({}, "they have no labels"), ({1: "dog", 2: "dog"}, "all labels are 'dog'")])
def test_nothing_is_measured_without_several_classes(
    model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch, labels: dict[int, str], reason: str
) -> None:
    monkeypatch.setattr(zero_shot, "load_labels", lambda images, of_split="eval": labels)
    assert refused(inputs, sae=exact_sae(model)) == f"the evaluation images are not of several classes: {reason}"


def test_nothing_is_measured_without_labelled_training_images(
    model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "load_labels", lambda images, of_split: {})
    assert "no training image has a label" in refused(inputs, sae=exact_sae(model))


def test_nothing_is_measured_without_a_text_tower(model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "d_embed", None, raising=False)
    assert refused(inputs, sae=exact_sae(model)) == "tiles has no text tower with which to embed the names of classes"


def test_nothing_is_measured_if_the_model_is_gone(model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise ModelError("extract.model.path: no such folder")

    monkeypatch.setattr(networks, "load_model", gone)
    assert refused(inputs, sae=exact_sae(model)) == "extract.model.path: no such folder"


def test_nothing_is_measured_if_a_mean_of_tokens_was_encoded(model: TileModel, images: Artefact, tmp_path: Path) -> None:
    params = make_test_params(extract={"hookpoints": ["tiles"], "tokens": "pooled", "dtype": "float32"})
    pooled = make_artefact(tmp_path / "pooled", "extraction", extract, params.extract, {"images": images})
    inputs = {"images": images, "extract": pooled.child("tiles", "activations")}
    assert refused(inputs, sae=exact_sae(model)) == (
        "extract.tokens: pooled is the mean of the patches at tiles, not a token that can be replaced"
    )


def test_nothing_is_recovered_if_the_hookpoint_has_no_influence(
    model: TileModel, inputs: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the patches after CLIP's last block: accuracies are there, and nothing is recovered of nothing."""

    def without_influence(pixels: torch.Tensor, hookpoint: str, replacements: list[Replacement]) -> list[torch.Tensor | None]:
        return [model.capture(pixels, []).embedding for _ in replacements]

    monkeypatch.setattr(model, "splice", without_influence)
    rows = rows_of(measure(inputs, sae=red_sae(model)))
    assert {row["accuracy"] for row in rows.values()} == {1.0}
    assert {row[name] for row in rows.values() for name in ("recovered", "recovered_low", "recovered_high")} == {None}


# ---- which images


def test_sampled_images_are_spread_and_the_same_ones_are_read(images: Artefact) -> None:
    labels = load_labels(images)
    some = draw_images(images, labels, 7)
    numbers = some.numbers.tolist()
    assert len(numbers) == 7 and set(numbers) < set(labels) and numbers[0] == min(labels) and numbers[-1] == max(labels)
    assert draw_images(images, labels, 10**6).numbers.tolist() == sorted(labels)
    none = draw_images(images, [], 5)
    assert len(none.numbers) == 0 and list(iter_drawn_pixels(images, none, TileModel.preprocess, "cpu")) == []
    encoded = images.read("images", ["encoded"])["encoded"].to_pylist()
    preprocess = TileModel.preprocess
    found = list(iter_drawn_pixels(images, some, preprocess, "cpu"))
    assert np.concatenate([batch.numbers for batch in found]).tolist() == numbers
    expected = np.stack([preprocess(decode(encoded[number])) for number in numbers])
    assert np.array_equal(torch.cat([batch.of[0] for batch in found]), expected)


def test_images_are_found_if_numbers_and_rows_differ(images: Artefact, tmp_path: Path) -> None:
    """As those of a sample are, on which a run is estimated."""
    kept = images.read("images").slice(0, 20).take(list(range(1, 20, 2)))
    with open_draft(tmp_path / "sample", "images", {}, {}) as draft:
        draft.write_table("images-00000.parquet", kept, row_group_size=4)
        draft.seal({})
        sample = draft.publish(tmp_path / "sample")
    some = draw_images(sample, [3, 7, 15, 19], 4)
    (batch,) = iter_drawn_pixels(sample, some, TileModel.preprocess, "cpu")
    assert batch.numbers.tolist() == [3, 7, 15, 19]
    encoded = images.read("images", ["encoded"])["encoded"].to_pylist()
    assert np.array_equal(batch.of[0], np.stack([TileModel.preprocess(decode(encoded[number])) for number in (3, 7, 15, 19)]))


def test_sampled_images_come_from_few_row_groups(images: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(images.row_groups("images")) == [[128, N_IMAGES - 128]]
    monkeypatch.setattr(drawn, "N_BLOCKS", 1)
    found = draw_images(images, range(N_IMAGES), 20)
    assert len(found.numbers) == 20 and found.numbers.max() < 128
    monkeypatch.setattr(drawn, "BATCH", 8)
    assert [len(batch.numbers) for batch in iter_drawn_pixels(images, found, TileModel.preprocess, "cpu")] == [8, 8, 4]
