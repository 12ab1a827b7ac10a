"""Proves that training recovers a planted dictionary, that stopping and continuing changes no bit, and that bad runs stop."""

import math
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ommatid.compute import checkpoint
from ommatid.compute.checkpoint import Checkpoint, inside
from ommatid.config import TrainParams
from ommatid.errors import StoppedError, TrainingError
from ommatid.events import Event, Listener, Measured, Noticed, Progress, ignore
from ommatid.sae import trainer as trainer_module
from ommatid.sae.learner import CURVE_COLUMNS, Learner, Sample
from ommatid.sae.model import SAE, SAEConfig, make_untrained
from ommatid.sae.schedule import make_plan
from ommatid.sae.step import Batch
from ommatid.sae.trainer import Trainer
from ommatid.store import Draft, open_draft
from support.planted import begin, iter_planted, make_correlated, make_hierarchical, make_planted, make_train_params, mmcs
from support.study import make_test_params

D_MODEL, K = 32, 3


def go_on(learners: list[Learner], x: torch.Tensor, on_event: Listener = ignore, checkpoint: Checkpoint | None = None) -> None:
    first = learners[0]
    batches = iter_planted(x, first.plan.batch_size, first.guides.step)
    Trainer(learners, on_event, checkpoint, first.params.patience).fit(batches)


def fit(params: TrainParams, x: torch.Tensor) -> Learner:
    learner = begin(params, x)
    go_on([learner], x)
    return learner


def finish(learner: Learner) -> SAE:
    return learner.finish("blocks.0", "planted", None)


@pytest.fixture
def draft(tmp_path: Path) -> Iterator[Draft]:
    """Draft in which checkpoints are written."""
    with open_draft(tmp_path / "sae", "sae", {}, {}) as draft:
        yield draft


CONFIG = SAEConfig("batch_topk", D_MODEL, 64, K, "blocks.0", "planted")


VARIANTS: dict[str, dict[str, object]] = {
    "batch_topk": {},
    "aligned": {"variant": {"kind": "batch_topk", "aligned": True}},
    "topk": {},
    "matryoshka": {"variant": {"kind": "matryoshka", "prefixes": [0.75, 1]}, "d_sae": 96},
    "relu": {"epochs": 100},
    "jumprelu": {"epochs": 160},
    "jumprelu tanh": {"variant": {"kind": "jumprelu", "sparsity": "tanh"}, "epochs": 160},
    "gated": {"epochs": 100},
    "archetypal": {"variant": {"kind": "archetypal", "points": 64, "relaxation": 0.8}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_recovers_a_planted_dictionary(name: str) -> None:
    planted = make_planted(8192)
    x = planted.x
    sae = finish(fit(make_train_params(**({"variant": name} | VARIANTS[name])), x))
    assert mmcs(sae.W_dec, planted.directions) > 0.95
    acts = sae.encode(x)
    fvu = float((x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum())
    l0 = float((acts > 0).sum(1).float().mean())
    assert fvu < (0.6 if name == "relu" else 0.08), (fvu, l0)  # the L1 penalty that keeps ReLU at k shrinks its activations
    assert l0 == pytest.approx(K, rel=0.1), (fvu, l0)


@pytest.mark.parametrize("name", ["batch_topk", "topk", "jumprelu"])
def test_recovers_features_that_fire_in_pairs(name: str) -> None:
    planted = make_correlated(8192)
    sae = finish(fit(make_train_params(variant=name, epochs=60), planted.x))
    assert mmcs(sae.W_dec, planted.directions) > 0.85


def test_matryoshka_learns_parents_first() -> None:
    planted = make_hierarchical(8192)
    shares = {}
    for name in ("batch_topk", "matryoshka"):
        variant = {"kind": name} | ({"prefixes": [0.2, 1]} if name == "matryoshka" else {})
        sae = finish(fit(make_train_params(variant=variant, d_sae=40), planted.x))
        shares[name] = float((planted.directions[:8] @ sae.W_dec[:8].T).amax(1).mean())  # eight parents, eight first latents
    assert shares["matryoshka"] > 0.8 > 0.6 > shares["batch_topk"], shares


def test_a_transcoder_recovers_the_planted_directions_of_its_target() -> None:
    planted = make_planted(8192)
    x = planted.x
    other = torch.nn.functional.normalize(torch.randn(48, 20, generator=torch.Generator().manual_seed(9)), dim=1)
    target = planted.codes @ other + 1
    params = make_train_params(epochs=60)
    learner = Learner.begin("one", params, make_plan(params, len(x)), Sample(x, target), torch.device("cpu"))

    def batches() -> Iterator[Batch]:
        for step in range(10**6):
            generator = torch.Generator().manual_seed(step // 16)
            order = torch.randperm(len(x), generator=generator)[step % 16 * 512 :][:512]
            yield Batch(x[order], target[order])

    Trainer([learner], ignore, None).fit(batches())
    sae = learner.finish("blocks.0", "planted", "blocks.1")
    assert (sae.config.target, sae.d_out) == ("blocks.1", 20)
    error = (sae.decode(sae.encode(x)) - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.1
    assert mmcs(sae.W_dec, other) > 0.9


def test_the_scale_of_the_data_changes_nothing_but_the_scale() -> None:
    x = make_planted(2048).x
    params = make_train_params(epochs=5)
    one, thousand = (finish(fit(params, x * factor)) for factor in (1.0, 1024.0))
    torch.testing.assert_close(one.encode(x) * 1024, thousand.encode(x * 1024))


def test_directions_stay_of_unit_norm_and_the_encoder_has_its_own_memory() -> None:
    x = make_planted(2048).x
    learner = begin(make_train_params(epochs=2), x)
    assert learner.weights.W_enc.data_ptr() != learner.weights.W_dec.data_ptr()
    go_on([learner], x)
    torch.testing.assert_close(finish(learner).W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("kind", ["batch_topk", "topk", "matryoshka"])
def test_aligned_encoders_are_nearer_to_their_directions(kind: str) -> None:
    x = make_planted(2048, noise=0.5).x
    learners = [begin(make_train_params(variant={"kind": kind, "aligned": aligned}, epochs=20), x) for aligned in (True, False)]
    go_on(learners, x)
    aligned, free = (float(torch.cosine_similarity(one.weights.W_enc, one.weights.W_dec).mean()) for one in learners)
    assert 1 - aligned < 0.8 * (1 - free), (aligned, free)


@pytest.mark.parametrize("name", VARIANTS)
def test_continuing_from_a_checkpoint_is_bit_identical(name: str, draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    x = make_planted(4096).x
    params = make_train_params(**({"variant": name} | VARIANTS[name] | {"epochs": 6}))
    whole = fit(params, x)
    learner = begin(params, x)

    class Killed(BaseException):
        pass

    class Killing(Checkpoint):
        def save(self, values: Mapping[str, Any]) -> None:
            super().save(values)
            if learner.guides.step >= 20:
                raise Killed

    with pytest.raises(Killed):
        go_on([learner], x, checkpoint=Killing(draft, "scratch/one"))
    again = Learner.restore(
        "one", params, make_plan(params, len(x)), inside(Checkpoint(draft, "scratch/one").load(), "one"), torch.device("cpu")
    )
    assert again.guides.step == 20
    go_on([again], x)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_several_saes_in_one_pass_equal_those_of_single_runs() -> None:
    x = make_planted(2048).x
    many = [make_train_params(epochs=4, k=k, d_sae=d, seed=seed) for k, d, seed in ((2, 64, 0), (3, 64, 1), (4, 96, 0))]
    learners = [begin(one, x, f"{i}") for i, one in enumerate(many)]
    go_on(learners, x)
    for one, learner in zip(many, learners, strict=True):
        alone = fit(one, x)
        assert all(torch.equal(tensor, learner.state_dict()[key]) for key, tensor in alone.state_dict().items())


def test_auxk_revives_dead_latents() -> None:
    x = make_planted(2048).x
    shares = []
    for coefficient in (0.0, 1 / 32):
        learner = begin(make_train_params(epochs=40, d_sae=128, aux_coefficient=coefficient), x)
        learner.weights.b_enc[:64] = (
            -0.6 * learner.weights.W_enc[0].norm()
        )  # too low to be among the largest, high enough to be positive at times
        go_on([learner], x)
        shares.append(len(learner.dead) / 128)
    assert shares[0] > 0.2, "the control must have dead latents"
    assert shares[1] < 0.7 * shares[0], shares


def test_the_first_reconstruction_has_the_right_length() -> None:
    x = make_planted(4096).x
    learner = begin(make_train_params(epochs=1), x)
    weights, centred = learner.weights, (x - x.mean(0)) * learner.scales.x
    pre_acts = centred @ weights.W_enc.T
    top = pre_acts.topk(K, dim=1)
    x_hat = torch.zeros_like(pre_acts).scatter_(1, top.indices, top.values.relu()) @ weights.W_dec
    fvu = [float((centred - scale * x_hat).square().sum() / centred.square().sum()) for scale in (0.8, 1.0, 1.25)]
    assert fvu[1] < 1
    assert fvu[1] < min(fvu[0], fvu[2]), "a longer or a shorter encoder must be worse"


def test_resampling_gives_dead_latents_of_relu_new_directions() -> None:
    x = make_planted(2048).x
    learner = begin(make_train_params(variant={"kind": "relu", "l1": 0.01}, epochs=40), x)
    learner.weights.b_enc[:20] = -10.0  # never positive
    go_on([learner], x)
    assert len(learner.dead) == 0
    assert bool((learner.weights.b_enc[:20] > -1).all())


def test_divergence_is_reported_with_the_step_and_keeps_the_weights() -> None:
    x = make_planted(2048).x
    x[7, 3] = float("nan")
    params = make_train_params(epochs=2)
    learner = Learner.begin("one", params, make_plan(params, len(x)), Sample(x[8:]), torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"train: one: the loss is nan.*at step \d+.*lower train.lr"):
        go_on([learner], x)
    assert all(bool(tensor.isfinite().all()) for tensor in learner.weights.tensors().values())


def test_an_sae_that_diverges_is_dropped_and_does_not_affect_the_others() -> None:
    x = make_planted(2048).x
    events: list[Event] = []
    alone, beside, bad = begin(make_train_params(epochs=4), x), begin(make_train_params(epochs=4), x), begin(make_train_params(epochs=4), x)
    bad.name = "bad"
    bad.weights.b_dec[0] = math.nan
    go_on([alone], x)
    go_on([bad, beside], x, events.append)
    assert bad.has_diverged and not beside.has_diverged and bad.guides.step < beside.guides.step == alone.guides.step
    for one, other in zip(alone.weights.tensors().values(), beside.weights.tensors().values(), strict=True):
        assert torch.equal(one, other)
    assert [event.sae for event in events if isinstance(event, Noticed) and event.what.startswith("given up; training continues")] == [
        "bad"
    ]
    again = Learner.restore("bad", bad.params, bad.plan, bad.state_dict(), torch.device("cpu"))
    assert again.has_diverged and again.guides.step == 0


def test_a_request_to_stop_writes_a_checkpoint_first(draft: Draft) -> None:
    x = make_planted(2048).x
    before = signal.getsignal(signal.SIGTERM)
    learner = begin(make_train_params(epochs=50), x)

    def ask(event: Event) -> None:
        if isinstance(event, Progress) and event.done > 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match=r"train: stopped at step \d+ of 200; run it again"):
        go_on([learner], x, ask, Checkpoint(draft, "scratch/one"))
    assert Checkpoint(draft, "scratch/one").load()["one/guides/step"].tolist() == learner.guides.step
    assert 20 < learner.guides.step < 60
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_plateau_is_reported_and_ends_the_run_early_if_requested() -> None:
    x = make_planted(2048).x
    for patience, n_steps in ((None, 400), (25, 300)):
        events: list[Event] = []
        learner = begin(make_train_params(epochs=100, lr=1e-9, patience=patience), x)
        go_on([learner], x, events.append)
        said = [event.what for event in events if isinstance(event, Noticed)]
        assert any("no progress" in what for what in said)
        assert any("training ends at step" in what for what in said) == (patience is not None)
        assert learner.guides.step == 400 if patience is None else learner.guides.step < n_steps
        plan = make_plan(learner.params, len(x))
        assert Learner.restore("one", learner.params, plan, learner.state_dict(), torch.device("cpu")).plan == learner.plan
        assert Progress("train steps", learner.guides.step, learner.guides.step) in events


def curve(fvu: torch.Tensor) -> Learner:
    """Make a learner with a given curve of FVU."""
    learner = begin(make_train_params(epochs=1), make_planted(1024).x)
    learner.curves = torch.zeros(len(fvu), len(CURVE_COLUMNS), dtype=torch.float64)
    learner.curves[:, CURVE_COLUMNS.index("fvu")] = fvu
    return learner


def test_a_falling_saw_tooth_is_progress_and_a_plateau_is_not() -> None:
    at = torch.arange(100, dtype=torch.float64)
    teeth = 0.03 * (1 - at % 10 / 10)  # of the size and length of those in the demo
    for n in range(1, 101):
        assert curve(0.42 - 0.001 * at[:n] + teeth[:n]).n_stalled < 5
    assert curve(0.42 - 0.001 * at.clamp(max=60) + teeth).n_stalled in range(25, 45)
    assert curve(torch.full((100,), 0.4).double()).n_stalled == 90


@pytest.mark.parametrize(("changes", "is_said"), [({"epochs": 2}, True), ({"epochs": 13}, False), ({"epochs": 13, "d_sae": 2000}, True)])
def test_a_run_that_is_too_short_is_reported_with_the_length_needed(changes: dict[str, object], is_said: bool) -> None:
    x = make_planted(8192).x
    said = list(trainer_module._short_run_notices(begin(make_train_params(**changes), x)))  # pyright: ignore[reportPrivateUsage]
    assert bool(said) == is_said
    if said:
        epochs = int(said[0].split("train.epochs to ")[1].split()[0])
        assert not list(trainer_module._short_run_notices(begin(make_train_params(**(changes | {"epochs": epochs})), x)))  # pyright: ignore[reportPrivateUsage]


def test_too_few_tokens_is_refused() -> None:
    with pytest.raises(TrainingError, match="1 training tokens"):
        make_plan(make_train_params(), 1)


def test_a_trial_counts_dead_latents_as_the_whole_run_would() -> None:
    whole = make_plan(make_train_params(epochs=40), 100_000)
    trial = make_plan(make_train_params(epochs=2), 4096).like(whole)
    assert (trial.measure_every, trial.dead_after) == (whole.measure_every, whole.dead_after)
    assert (trial.n_steps, trial.lr) == (make_plan(make_train_params(epochs=2), 4096).n_steps, whole.lr)


def test_events_carry_curves_histograms_and_progress() -> None:
    x = make_planted(2048).x
    events: list[Event] = []
    learner = begin(make_train_params(epochs=10), x)
    go_on([learner], x, events.append)
    measured = [e for e in events if isinstance(e, Measured)]
    assert measured[-1].step == learner.plan.n_steps == 40
    assert measured[-1].values["fvu"] < measured[0].values["fvu"]
    assert {"tokens_per_second", "waiting", "peak_memory_mb", "grad_norm"} <= measured[-1].values.keys()
    edges, counts = measured[-1].histograms["encoder_norm"]
    assert len(edges) == len(counts) + 1 and sum(counts) == 64
    assert Progress("train steps", 40, 40) in events


def test_save_and_load_agree(tmp_path: Path) -> None:
    x = make_planted(512).x
    sae = make_untrained(CONFIG, x, seed=3)
    sae.save(tmp_path / "sae.safetensors", tmp_path / "cfg.json")
    loaded = SAE.load(tmp_path)
    assert loaded.config == sae.config
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_an_untrained_sae_fires_k_latents_per_token() -> None:
    x = make_planted(512).x
    acts = make_untrained(CONFIG, x, seed=3).encode(x)
    assert float((acts > 0).sum(1).float().mean()) == pytest.approx(K, abs=0.05)


@pytest.mark.parametrize(
    ("n_tokens", "epochs", "dead_after"),
    [(100_000, 10, 98_304), (100_000, 1000, 800_000), (10**9, 1, 10_000_000), (1000, 1, 100)],
    ids=["a tenth of the run", "8 epochs", "10 million", "less than a batch"],
)
def test_latents_count_as_dead_early_enough_to_be_revived(n_tokens: int, epochs: int, dead_after: int) -> None:
    params = make_test_params(train={"epochs": epochs, "batch_size": 2048}).train
    assert make_plan(params, n_tokens).dead_after == dead_after
