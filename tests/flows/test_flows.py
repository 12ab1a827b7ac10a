"""The flows under a Prefect server: what they run, what they leave alone, and how they fail."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from uuid import UUID, uuid4

import duckdb
import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from prefect.testing.utilities import prefect_test_harness

from flows import artifacts
from flows.approval import is_asked
from flows.backfill import backfill
from flows.checkout import Workplace, open_workplace
from flows.pipeline import pipeline
from flows.prefect_api import RESTARTED
from flows.retrain import retrain
from ommatid.backfill.measure import Backfill
from ommatid.backfill.past import LeftOut
from ommatid.config import Params, load_params
from ommatid.errors import GateError, RunError
from ommatid.publish import champion, drift, versions
from ommatid.publish.approval import Waiting, read_waiting
from ommatid.publish.decisions import Decision, Scores, find_champion, make_key, read_decisions
from support.checkout import REPOSITORY
from support.drifting import make_drifted_check
from support.processes import HANG_SECONDS, wait_for


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=int(HANG_SECONDS)):
        yield


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(champion, "point_alias", lambda: None)
    return checkout


@pytest.mark.parametrize("name", ["pipeline", "retrain", "backfill", "serve"])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("train.k=16", 2)])
def test_a_flow_takes_no_arguments(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, argument: str, status: int
) -> None:
    monkeypatch.setattr("sys.argv", [name, argument])
    with pytest.raises(SystemExit) as end:
        import_module(f"flows.{name}").main()
    said = capsys.readouterr()
    assert end.value.code == status and f"usage: python -m flows.{name}" in said.out + said.err and ran(here) == []
    assert ("unrecognized arguments: train.k=16" in said.err) == (status == 2)


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

    monkeypatch.setattr(champion, "is_decided", lambda: False)
    monkeypatch.setattr(champion, "point_alias", unreachable)
    (here / "photos/two.jpg").write_text("two")
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.message) == ("Kept", "the champion stays: FVU +0.2")
    assert len(published) == 1 and ran(here) == ["images", "train", "evaluate"]


def test_stages_that_end_with_the_catalogue_of_the_last_decision_change_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images came in and were removed again after a run that has read them."""
    published = decided(monkeypatch)
    monkeypatch.setattr(champion, "is_decided", lambda: True)
    (here / "photos/two.jpg").write_text("two")
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.is_completed()) == ("Unchanged", True)
    assert published == [] and ran(here) == ["images", "train", "evaluate"]


def test_a_commit_or_push_that_fails_is_a_warning_of_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch)
    monkeypatch.setattr(champion, "is_decided", lambda: True)
    monkeypatch.setattr("flows.retrain.read_decisions", lambda: [SimpleNamespace(flow_run=None)])
    monkeypatch.setattr(versions, "commit", lambda root, made, branch, say, warn, is_half_way: (say("one is done"), warn("one failed")))
    monkeypatch.setattr(versions, "push", lambda root, branch, say, warn: warn("two failed"))
    params = here / "params.yaml"
    params.write_text(params.read_text().replace("publish: local", "publish: push"))
    state = retrain(return_state=True)
    assert isinstance(state, State) and state.is_completed() and state.state_details.flow_run_id
    run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[state.state_details.flow_run_id]))

    def logged() -> dict[str, int]:
        with get_client(sync_client=True) as client:
            return {log.message: log.level for log in client.read_logs(run)}

    wait_for(lambda: "two failed" in logged(), "the run's log")
    assert logged()["one is done"] == logging.INFO and logged()["one failed"] == logged()["two failed"] == logging.WARNING


@pytest.mark.parametrize(("action", "name", "stages"), [("stop", "Drifted", ["images"]), ("warn", "Kept", ["images", "train", "evaluate"])])
def test_drift_ends_a_retraining_before_training_only_if_it_should(
    here: Path, monkeypatch: pytest.MonkeyPatch, action: str, name: str, stages: list[str]
) -> None:
    published = decided(monkeypatch)
    params = here / "params.yaml"
    params.write_text(params.read_text().replace("action: warn", f"action: {action}"))
    found = drift.Outcome(make_drifted_check(here / "own"), "600 new images differ from the champion's 10,000", is_drift=True)
    monkeypatch.setattr(drift, "check_drift", lambda params, on_event: found)
    monkeypatch.setattr(champion, "is_decided", lambda: False)
    shown: dict[str, str] = {}
    monkeypatch.setattr("flows.drift.create_markdown_artifact", lambda page, key, description: shown.update({key: page}))
    (here / "photos/two.jpg").write_text("two")
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.is_failed()) == (name, action == "stop")
    assert ran(here) == stages and len(published) == (action == "warn")
    if action == "stop":
        assert str(state.message).startswith("drift: 600 new images differ from the champion's 10,000; nothing was trained")
    ((key, page),) = shown.items()
    assert key == "drift" and page.startswith("# Drift\n\n600 new images differ") and "data:image/webp;base64," in page


def test_a_gate_that_says_no_ends_a_retrain_as_rejected(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: object, before: object) -> None:
        raise RunError(f"train: {GateError.WORDS}: dead: 0.9 of the latents; nothing was published")

    published = decided(monkeypatch)
    monkeypatch.setattr(champion, "is_decided", lambda: False)
    monkeypatch.setattr("flows.retrain.run_stages", refuse)
    state = retrain(return_state=True)
    assert isinstance(state, State) and (state.name, state.is_failed(), published) == ("Rejected", True, [])
    with pytest.raises(RunError, match="train: quality gate failed: dead"):
        state.result()


class Questions:
    """A deployment of `retrain` whose challengers win and wait for a person."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digest = "catalogue a"
        self.sae = "a"
        self.stale: set[str] = set()
        """What DVC finds stale, which is not asked here."""
        monkeypatch.setattr(Workplace, "stale", lambda place: self.stale)
        monkeypatch.setattr("flows.retrain.run_stages", lambda place, before: self.stale.clear())
        monkeypatch.setattr(champion, "open_stage", lambda name: SimpleNamespace(digest=self.digest))
        monkeypatch.setattr("flows.approval.open_stage", lambda name: SimpleNamespace(digest=self.digest))
        monkeypatch.setattr(champion, "decide", self._decide)
        monkeypatch.setattr(champion, "_keep_winner", self._keep)
        self.deployment = cast(UUID, cast(RunnerDeployment, retrain.to_deployment(f"asks-{uuid4()}")).apply())

    def _decide(self, params: Params, on_event: object, who: str) -> Decision:
        scores = Scores(sae=self.sae, digest=self.sae, fvu=0.3, l0=32.0, dead=0.1, ms=0.45, ms_floor=0.35)
        present = find_champion()
        values = {
            "decision": "champion",
            "reason": "better than the champion: FVU -0.2",
            "decided_at": datetime.now(UTC),
            "run": {"sae": self.sae},
        }
        values |= {"challenger": scores, "champion": None, "margins": params.retrain.margins, "catalog": self.digest, "who": who}
        return Decision.model_validate(values | {"against": present.key if present else None, "key": make_key(self.digest, self.sae)})

    def _keep(self, made: Decision, on_event: object) -> None:
        folder = champion.folder_of(made)
        if not folder.exists():
            folder.mkdir(parents=True)
            with duckdb.connect(folder / "catalog.duckdb") as connection:
                connection.execute("CREATE TABLE runs AS SELECT 'a' AS sae, NULL::VARCHAR AS decision, NULL::VARCHAR AS reason")

    def start(self) -> UUID:
        """Make a run of the deployment, and run it as a worker does."""
        with get_client(sync_client=True) as client:
            run = client.create_flow_run_from_deployment(self.deployment)
        self.go_on(run.id)
        return run.id

    def go_on(self, run: UUID) -> None:
        with get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(run)
        with suppress(Pause):  # by which a process that suspends its run ends
            run_flow(retrain, flow_run=flow_run, return_type="state")

    def answer(self, run: UUID, **values: str) -> None:
        """Answer as the form in the UI does."""
        with get_client(sync_client=True) as client:
            result = client.resume_flow_run(run, run_input=values)
        if result.status != SetStateStatus.ACCEPT:
            raise RunError(str(result.details))

    def state(self, run: UUID) -> tuple[str | None, str | None]:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
        assert state
        return state.name, state.message

    def alarms(self) -> list[datetime]:
        """Times of the runs that are scheduled for the end of a wait."""
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[self.deployment])))
        return [run.expected_start_time for run in runs if run.name.startswith("end-of-wait") and run.state and run.state.is_scheduled()]  # type: ignore[misc]


@pytest.fixture
def questions(here: Path, monkeypatch: pytest.MonkeyPatch) -> Questions:
    params = here / "params.yaml"
    params.write_text(params.read_text().replace("approval: false", "approval: true"))
    return Questions(monkeypatch)


def test_a_run_that_asks_holds_nothing_until_a_person_approves(questions: Questions, here: Path) -> None:
    run = questions.start()
    assert questions.state(run)[0] == "Suspended" and read_decisions() == [] and not champion.CATALOG.exists()
    waiting = read_waiting()
    assert waiting and waiting.flow_run == str(run) and questions.alarms() == [waiting.until]
    with open_workplace(here, load_params(), None, lambda line: pytest.fail(line)):
        pass  # the checkout is free
    later = questions.start()
    name, message = questions.state(later)
    assert name == "Unchanged" and str(message).startswith(
        "a waits for approval: better than the champion: FVU -0.2. Without an answer until "
    )
    assert str(message).endswith(f"/runs/flow-run/{run}") and " the champion stays. To answer, press Resume at http://" in str(message)
    with pytest.raises(RunError, match="who"):
        questions.answer(run, approve="yes")
    questions.answer(run, approve="yes", who="Anna", why="they look right")
    questions.go_on(run)
    assert questions.state(run) == ("Promoted", "approved by Anna: better than the champion: FVU -0.2")
    (made,) = read_decisions()
    assert (made.decision, made.who, made.why) == ("champion", "Anna in the Prefect UI", "they look right")
    assert read_waiting() is None and questions.alarms() == [] and champion.CATALOG.exists()


def test_a_no_and_no_answer_keep_the_champion(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    run = questions.start()
    questions.answer(run, approve="no", who="Anna", why="")
    questions.go_on(run)
    assert questions.state(run) == ("Kept", "the champion stays: Anna did not approve; better than the champion: FVU -0.2")
    assert questions.state(questions.start())[0] == "Unchanged", "it is not asked again"
    questions.digest = "catalogue b"
    run = questions.start()
    assert questions.state(run)[0] == "Suspended"
    monkeypatch.setattr(Waiting, "is_over", property(lambda self: True))
    alarm = questions.start()
    sentence = "the champion stays: nobody answered within 24 hours (retrain.approval_timeout); better than the champion: FVU -0.2"
    assert questions.state(alarm) == questions.state(run) == ("Kept", sentence)
    assert [made.decision for made in read_decisions()] == ["challenger", "challenger"] and questions.alarms() == []
    assert list(champion.CHAMPIONS.iterdir()) == [], "what was not published is not kept"


def test_a_run_that_concludes_a_question_goes_on_with_what_is_new(questions: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    questions.start()
    monkeypatch.setattr(Waiting, "is_over", property(lambda self: True))
    questions.digest, questions.sae, questions.stale = "catalogue b", "b", {"images"}
    run = questions.start()
    assert questions.state(run)[0] == "Suspended" and questions.stale == set(), "the new images were trained on, and b is asked about"
    assert [(made.decision, made.challenger.sae) for made in read_decisions()] == [("challenger", "a")]


@pytest.mark.parametrize(("refusal", "state"), [(f"images {GateError.WORDS}", "Rejected"), ("the disk is full", "Failed")])
def test_an_answer_that_a_run_finds_is_committed_although_the_run_fails(
    questions: Questions, here: Path, monkeypatch: pytest.MonkeyPatch, refusal: str, state: str
) -> None:
    params, committed = here / "params.yaml", []
    params.write_text(params.read_text().replace("publish: local", "publish: commit"))
    monkeypatch.setattr(
        versions, "commit", lambda root, made, branch, say, warn, is_half_way: committed.append((made.challenger.sae, is_half_way))
    )
    questions.answer(questions.start(), approve="yes", who="Anna")
    assert committed == []
    questions.stale = {"images"}

    def refuse(place: Workplace, before: object) -> None:
        raise RunError(refusal)

    monkeypatch.setattr("flows.retrain.run_stages", refuse)
    assert questions.state(questions.start())[0] == state
    assert committed == [("a", True)], "dvc.lock is that of a run that is half-way"


def test_a_question_whose_run_was_killed_is_asked_again_and_its_answer_is_found(
    questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dying:
        dying.setattr("flows.approval.suspend", lambda waiting: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            questions.start()
    assert (before := read_waiting()) and not is_asked(before)
    run = questions.start()
    assert questions.state(run)[0] == "Suspended" and (waiting := read_waiting()) and waiting.flow_run == str(run)
    assert questions.alarms() == [waiting.until]
    questions.answer(run, approve="yes", who="Anna")
    with monkeypatch.context() as dying:
        dying.setattr(champion, "append", lambda made: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            questions.go_on(run)
    assert read_decisions() == []
    assert questions.state(questions.start())[0] == "Promoted", "the answer was kept"
    assert [made.who for made in read_decisions()] == ["Anna in the Prefect UI"]


@pytest.mark.parametrize(("answer", "state"), [("yes", "Promoted"), ("no", "Kept")])
def test_a_run_that_is_killed_after_it_has_decided_tells_it_once_it_is_started_again(
    questions: Questions, monkeypatch: pytest.MonkeyPatch, answer: str, state: str
) -> None:
    questions.answer(run := questions.start(), approve=answer, who="Anna")
    with monkeypatch.context() as dying:
        dying.setattr(champion, "try_alias", lambda on_event: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            questions.go_on(run)
    assert len(read_decisions()) == 1
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Scheduled(name=RESTARTED), force=True)
    assert questions.state(questions.start())[0] == "Unchanged", "another run has nothing to tell"
    questions.go_on(run)
    assert questions.state(run)[0] == state and len(read_decisions()) == 1


def test_a_challenger_that_somebody_promotes_is_asked_about_no_longer(questions: Questions) -> None:
    run, waiting = questions.start(), read_waiting()
    assert waiting
    champion.publish(waiting.decision.model_copy(update={"how": "promote", "who": "Ben", "reason": "promoted by hand"}), 5)
    assert questions.state(questions.start())[0] == "Unchanged"
    assert questions.state(run) == ("Promoted", "promoted by hand")
    assert read_waiting() is None and questions.alarms() == [] and len(read_decisions()) == 1


def test_a_newer_challenger_takes_the_place_of_one_that_waits(questions: Questions) -> None:
    first = questions.start()
    questions.digest, questions.sae, questions.stale = "catalogue b", "b", {"images"}
    second = questions.start()
    assert questions.state(second)[0] == "Suspended" and questions.state(first)[0] == "Kept"
    assert "nobody had answered when b came in its place" in read_decisions()[-1].reason and len(questions.alarms()) == 1
    questions.answer(second, approve="yes", who="Anna")
    questions.go_on(second)
    assert questions.state(second)[0] == "Promoted" and (found := find_champion()) and found.challenger.sae == "b"


def test_a_run_without_a_deployment_says_that_it_cannot_ask(questions: Questions) -> None:
    state = retrain(return_state=True)
    assert isinstance(state, State) and state.name == "Kept" and "belongs to no deployment and cannot ask" in str(state.message)
    assert read_decisions() == [] and read_waiting() is None


def test_backfill_compares_past_saes_in_a_table(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = here / "catalog.duckdb"
    with duckdb.connect(catalog) as connection:
        columns = (
            "'a' AS sae, TIMESTAMP '2026-11-01' AS decided_at, 'blocks.15' AS hookpoint, 0.5e0 AS ms, 0.25e0 AS ms_floor, 0.3e0 AS fvu"
        )
        connection.execute(f"CREATE TABLE runs AS SELECT {columns}, 0e0 AS dead, 0.75e0 AS label_score, NULL::DOUBLE AS control_score")
    made = Backfill(catalog, ("a",), (LeftOut("b", None, "its files are gone"),), {"labeller": 1}, {"evaluation": 1, "judge": 1})
    monkeypatch.setattr("flows.backfill.measure", lambda params, on_event: made)
    state = backfill(return_state=True)
    assert isinstance(state, State) and state.name == "Backfilled"
    assert f"1 SAE in {catalog}; 1 left out; evaluations: 0 computed, 1 found, judges: 0 computed, 1 found, labellers: 1" in str(
        state.message
    )
    page = artifacts.past_saes(made)
    assert "| a | 2026-11-01 00:00 | blocks.15 | 0.2500 | 0.3000 | 0.0000 | 0.7500 | – |" in page and "| b | its files are gone |" in page
