"""Proves that training recovers a planted dictionary, that stopping and going on changes no bit, and that bad runs stop."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae.planted import make_planted, mmcs

from ommatid.config import TrainParams
from ommatid.errors import TrainingError
from ommatid.events import Measured, Progress, ignore
from ommatid.sae.model import SAE, SAEConfig, make_untrained
from ommatid.sae.trainer import State, Trainer, finish, make_plan, make_state

D_MODEL, K = 32, 3


def make_params(**changes: object) -> TrainParams:
    values = {
        "d_sae": 64,
        "k": K,
        "epochs": 60,
        "batch_size": 512,
        "lr": 3e-3,
        "aux_coefficient": 1 / 32,
        "seed": 0,
        "max_dead": 0.5,
        "hookpoint": "blocks.0",
        "target": None,
        "variant": "batch_topk",
        "ms_weight": 0.0,
        "runs": [],
        "grid": {},
    }
    return TrainParams.model_validate(values | changes)


def iter_batches(x: torch.Tensor, batch_size: int, start: int = 0) -> Iterator[torch.Tensor]:
    per_epoch = len(x) // batch_size
    step = start
    while True:
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        yield x[order[i * batch_size : (i + 1) * batch_size]]
        step += 1


def fit(params: TrainParams, x: torch.Tensor) -> State:
    plan = make_plan(params, len(x))
    state = make_state(params, x)
    Trainer(params, plan, state, ignore).fit(iter_batches(x, plan.batch_size), lambda state: None)
    return state


CONFIG = SAEConfig("batch_topk", D_MODEL, 64, K, "blocks.0", "planted")


def test_recovers_a_planted_dictionary() -> None:
    planted = make_planted(8192)
    x = planted.x
    sae = finish(fit(make_params(), x), CONFIG)
    assert mmcs(sae.W_dec, planted.directions) > 0.95
    acts = sae.encode(x)
    fvu = float((x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < 0.08
    assert float((acts > 0).sum(1).float().mean()) == pytest.approx(K, rel=0.15)


def test_scale_of_the_data_changes_nothing_but_the_scale() -> None:
    x = make_planted(2048).x
    params = make_params(epochs=5)
    one, thousand = (finish(fit(params, x * factor), CONFIG) for factor in (1.0, 1024.0))
    torch.testing.assert_close(one.encode(x) * 1024, thousand.encode(x * 1024))


def test_directions_stay_unit_and_encoder_is_no_view() -> None:
    x = make_planted(2048).x
    params = make_params(epochs=2)
    state = make_state(params, x)
    assert state.weights.W_enc.data_ptr() != state.weights.W_dec.data_ptr()
    sae = finish(fit(params, x), CONFIG)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_going_on_from_a_checkpoint_is_bit_identical(tmp_path: Path) -> None:
    x = make_planted(4096).x
    params = make_params(epochs=6)
    whole = fit(params, x)
    plan = make_plan(params, len(x))

    class Killed(BaseException):
        pass

    def kill(state: State) -> None:
        state.save(tmp_path / "checkpoint.safetensors")
        if int(state.step) >= 20:
            raise Killed

    with pytest.raises(Killed):
        Trainer(params, plan, make_state(params, x), ignore).fit(iter_batches(x, plan.batch_size), kill)
    state = State.load(tmp_path / "checkpoint.safetensors", "cpu")
    Trainer(params, plan, state, ignore).fit(iter_batches(x, plan.batch_size, int(state.step)), lambda state: None)
    for one, other in zip(whole.weights.all(), state.weights.all(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.threshold, state.threshold)
    assert torch.equal(whole.curves, state.curves)


def test_auxk_revives_dead_latents() -> None:
    x = make_planted(2048).x
    shares = []
    for coefficient in (0.0, 1 / 32):
        params = make_params(epochs=40, d_sae=128, aux_coefficient=coefficient)
        plan = make_plan(params, len(x))
        state = make_state(params, x)
        state.weights.b_enc[:64] = -0.6  # too low to be among the largest, high enough to be positive at times
        Trainer(params, plan, state, ignore).fit(iter_batches(x, plan.batch_size), lambda state: None)
        shares.append(float((state.idle >= plan.dead_after).float().mean()))
    assert shares[0] > 0.2, "the control must have dead latents"
    assert shares[1] < 0.7 * shares[0], shares


def test_divergence_names_the_step_and_what_to_do() -> None:
    x = make_planted(2048).x
    x[7, 3] = float("nan")
    with pytest.raises(TrainingError, match=r"loss is nan at step \d+.*lower train.lr"):
        fit(make_params(epochs=2), x)


def test_too_few_tokens_is_refused() -> None:
    with pytest.raises(TrainingError, match="1 training tokens"):
        make_plan(make_params(), 1)


def test_events_carry_curves_and_progress() -> None:
    x = make_planted(2048).x
    params = make_params(epochs=10)
    plan = make_plan(params, len(x))
    events: list[Measured | Progress] = []
    state = make_state(params, x)
    Trainer(params, plan, state, events.append).fit(iter_batches(x, plan.batch_size), lambda state: None)
    measured = [e for e in events if isinstance(e, Measured)]
    assert measured[-1].step == plan.n_steps == 40
    assert measured[-1].values["fvu"] < measured[0].values["fvu"]
    assert Progress("train steps", 40, 40) in events


def test_save_and_load_agree(tmp_path: Path) -> None:
    x = make_planted(512).x
    sae = make_untrained(CONFIG, x, seed=3)
    sae.save(tmp_path / "sae.safetensors", tmp_path / "cfg.json")
    loaded = SAE.load(tmp_path)
    assert loaded.config == sae.config
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_untrained_fires_k_latents_a_token() -> None:
    x = make_planted(512).x
    acts = make_untrained(CONFIG, x, seed=3).encode(x)
    assert float((acts > 0).sum(1).float().mean()) == pytest.approx(K, abs=0.05)
