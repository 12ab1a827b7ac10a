"""The flows under a Prefect server: what they run, what they leave alone, and how they fail."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import pipeline
from flows.retrain import retrain
from ommatid.config import load_params
from ommatid.errors import RunError
from ommatid.publish import champion, drift
from ommatid.publish.decisions import Decision, Scores
from support.checkout import REPOSITORY
from support.processes import HANG_SECONDS


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=int(HANG_SECONDS)):
        yield


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(champion, "point_alias", lambda: None)
    return checkout


def ran(checkout: Path) -> list[str]:
    log = checkout / "ran.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def decided(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """Replace the decision, so that it needs no artefacts; return what was published."""
    scores = Scores(sae="a", digest="a", fvu=0.3, l0=32.0, dead=0.1, ms=0.45, ms_floor=0.35)
    published: list[Decision] = []

    def decide(params: object, on_event: object, who: str) -> Decision:
        margins = load_params(REPOSITORY / "params.yaml").retrain.margins
        values = {"decision": "challenger", "reason": "the champion stays: FVU +0.2", "decided_at": datetime.now(UTC), "catalog": "c"}
        return Decision.model_validate({**values, "challenger": scores, "champion": scores, "margins": margins, "run": {}, "who": who})

    monkeypatch.setattr(champion, "decide", decide)
    monkeypatch.setattr(champion, "publish", lambda made, keep, on_event: published.append(made))
    return published


def test_a_failing_stage_fails_the_flow_with_its_error_line(here: Path) -> None:
    params = here / "params.yaml"
    params.write_text(params.read_text().replace("k: 32", "k: 13"))
    state = pipeline(load_params(params), return_state=True)
    assert isinstance(state, State) and state.is_failed()
    assert "train: 13 is unlucky" in str(state.message)
    with pytest.raises(RunError, match="train: 13 is unlucky"):
        state.result()


def test_retrain_does_nothing_when_nothing_changed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = decided(monkeypatch)
    monkeypatch.setattr(champion, "is_decided", lambda: True)
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.is_completed()) == ("Unchanged", True)
    assert published == [] and ran(here) == []


def test_retrain_runs_and_decides_when_images_changed_even_without_a_registry(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = decided(monkeypatch)

    def unreachable() -> None:
        raise RunError("MLflow does not answer")

    monkeypatch.setattr(champion, "is_decided", lambda: True)
    monkeypatch.setattr(champion, "point_alias", unreachable)
    (here / "photos/two.jpg").write_text("two")
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.message) == ("Kept", "the champion stays: FVU +0.2")
    assert len(published) == 1 and ran(here) == ["images", "train", "evaluate"]


@pytest.mark.parametrize(("action", "name", "stages"), [("stop", "Drifted", ["images"]), ("warn", "Kept", ["images", "train", "evaluate"])])
def test_drift_ends_a_retraining_before_training_only_if_it_should(
    here: Path, monkeypatch: pytest.MonkeyPatch, action: str, name: str, stages: list[str]
) -> None:
    published = decided(monkeypatch)
    params = here / "params.yaml"
    params.write_text(params.read_text().replace("action: warn", f"action: {action}"))
    found = drift.Outcome(None, "600 new images differ from the champion's 10,000", is_drift=True)
    monkeypatch.setattr(drift, "check_drift", lambda params, on_event: found)
    (here / "photos/two.jpg").write_text("two")
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.is_failed()) == (name, action == "stop")
    assert ran(here) == stages and len(published) == (action == "warn")
    if action == "stop":
        assert str(state.message).startswith("drift: 600 new images differ from the champion's 10,000; nothing was trained")
