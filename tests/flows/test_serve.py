"""`make up`, end to end, with a real Prefect UI in a browser: what starts by itself, what a person starts, and what is said of faults.

All tests share one `make up`, in whose checkout there is one additional deployment, made by the recipe
docs/developers/add-a-deployment.md. Ctrl-C ends everything, and no log has an error that a test has not caused.
"""

import re
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from playwright.sync_api import Page, expect

from flows import monitor
from flows.prefect_api import Api
from flows.project import read_project, takes_params
from flows.serve import _restart_orphans
from ommatid.errors import ConfigError, RunError
from support.browser import RunningBrowser, Windows, find_chromium, opening, running
from support.checkout import bytes_of, run
from support.prefect_ui import answer, press, see_artifact
from support.processes import HANG_SECONDS, TESTS, wait_for, wait_for_end
from support.recipes import Tree, assert_only_named, blocks_of, copy_tree
from support.up import ENDED, Receiver, Up, environment, making_up, receiving

PAGE = "add-a-deployment.md"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


@pytest.fixture(scope="module")
def up(made: Path, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    checkout = folder / "checkout"
    shutil.copytree(made, checkout, symlinks=True)
    (checkout / "ran.log").unlink()
    tree = copy_tree(folder / "tree")
    add_deployment(tree)
    assert_only_named(tree, PAGE)
    for name in ("flows", "infra"):
        shutil.copytree(tree.root / name, checkout / name)
    set_schedules(checkout)
    plant_decisions(checkout)
    run(checkout, "git", "add", "-A")
    run(checkout, "git", "commit", "-qm", "Flows")
    # the scheduler looks more often than every 5 seconds at deployments that have changed
    variables = {"OMMATID_WEBHOOK_TOKEN": "secret", "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "2"}
    with making_up(checkout, environment(folder) | variables, receiver) as running_up:
        assert f"Webhook  {running_up.webhook}\n" in running_up.said
        assert f"Images   {checkout / 'photos'} (when they change, retrain starts)\n" in running_up.said
        yield running_up
        assert len(psutil.Process(running_up.process.pid).children(recursive=True)) >= 5


def add_deployment(tree: Tree) -> None:
    """Add a deployment by following the recipe."""
    project = "infra/prefect.yaml"
    tree.write("flows/count.py", blocks_of(PAGE)[0])
    tree.write(project, (tree.root / project).read_text(encoding="utf-8") + "\n" + blocks_of(PAGE, "text")[0])


def set_schedules(checkout: Path) -> None:
    """Schedule the pipeline at short intervals and the count at long ones, and wait for changes and messages for seconds only."""
    path = checkout / "infra/prefect.yaml"
    project = yaml.safe_load(path.read_text())
    deployments = {one["name"]: one for one in project["deployments"]}
    assert deployments["retrain"].pop("schedules")
    deployments["pipeline"]["schedules"] = [{"interval": 30, "active": True}]
    deployments["count"] |= {"schedules": [{"interval": 7 * 86400, "active": True}], "concurrency_limit": 1}
    project["watch"]["quiet_seconds"] = 3
    path.write_text(yaml.safe_dump(project))


PLANTED = """
import hashlib, json, sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import duckdb

from flows import approval, artifacts
from ommatid.publish import champion, drift
from ommatid.publish.decisions import Decision, Scores, find_champion, make_key

sys.path.append(TESTS)


def digest():
    return hashlib.sha256(Path("data/images/out.json").read_bytes()).hexdigest()


def open_stage(name):
    return SimpleNamespace(digest=digest())


def decide(params, on_event, who):
    n_images = len(json.loads(Path("data/images/out.json").read_text())[1])
    present = find_champion()
    scores = Scores(sae=f"sae-of-{n_images}", digest=digest(), fvu=0.3, l0=32.0, dead=0.1, ms=0.45, ms_floor=0.35)
    return Decision(
        decision="champion", reason="better than the champion: FVU -0.2", who=who, decided_at=datetime.now(UTC), challenger=scores,
        champion=present and present.challenger, against=present and present.key, margins=params.retrain.margins, catalog=digest(),
        run={"sae": scores.sae}, key=make_key(digest(), digest()),
    )


def keep_winner(made, on_event):
    folder = champion.folder_of(made)
    if not folder.exists():
        folder.mkdir(parents=True)
        with duckdb.connect(folder / "catalog.duckdb") as connection:
            connection.execute("CREATE TABLE runs AS SELECT 'a' AS sae, NULL::VARCHAR AS decision, NULL::VARCHAR AS reason")


def check_drift(params, on_event):
    if not Path("photos/another-camera.jpg").exists():
        return drift.Outcome(None, "no images have come in that were not compared before")
    from support.drifting import make_drifted_check

    found = make_drifted_check(Path("data/drifted"))
    return drift.Outcome(found, found.row["reason"], is_drift=True)


champion.open_stage = approval.open_stage = open_stage
champion.decide, champion._keep_winner, champion.point_alias = decide, keep_winner, lambda: None
drift.check_drift = check_drift
artifacts._best_of_both = lambda made: ()  # the catalogues have no pictures
"""
"""Code with which every data set has an SAE that wins, and the images drift if one of them is `another-camera.jpg`."""


def plant_decisions(checkout: Path) -> None:
    """Let `retrain` decide in this way, as the checkout's stages make no artefacts."""
    (checkout / "flows/planted.py").write_text(PLANTED.replace("TESTS", repr(str(TESTS))))
    with (checkout / "flows/retrain.py").open("a") as file:
        file.write("\n\nimport flows.planted\n")


def errors_in(logs: Path) -> list[str]:
    """Return the lines of all logs that report an error; the name of a run may be `exceptional-iguana`."""
    said = [f"{path.name}: {line}" for path in sorted(logs.glob("*.log")) for line in _text_of(path).splitlines()]
    return [line for line in said if re.search(r"ERROR|CRITICAL|Traceback|Error\b|[Ee]xception(?!al)", line)]


def _text_of(log: Path) -> str:
    text = log.read_text(errors="replace")
    return "\n".join(f"ERROR {error}" for error in monitor.errors_in(text)) if log.stem == "prefect" else text


@pytest.fixture
def windows(browser: RunningBrowser) -> Iterator[Windows]:
    with opening(browser) as opened:
        yield opened
        # Prefect's pages ask for an icon that it lacks, and draw runs with WebGL, which not every browser has
        opened.faults[:] = [fault for fault in opened.faults if "favicon.ico" not in fault and "suitable renderer" not in fault]


@pytest.fixture(scope="module")
def browser() -> Iterator[RunningBrowser]:
    with running(find_chromium()) as run:
        yield run


def test_forms_of_flows_are_filled_with_the_params(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    add_deployment(tree)
    found = {one.name: (one.work_pool.name, takes_params(tree.root, one)) for one in read_project(tree.root).deployments}
    assert found == {
        "pipeline": ("ommatid", True),
        "retrain": ("ommatid", False),
        "backfill": ("ommatid", False),
        "count": ("ommatid", False),
    }


def test_an_asynchronous_flow_is_deployed_too(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    add_deployment(tree)
    tree.replace("flows/count.py", "def count(", "async def count(")
    (deployment,) = [one for one in read_project(tmp_path).deployments if one.name == "count"]
    assert not takes_params(tmp_path, deployment)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("entrypoint: flows/count.py:count", "schedules: []", "infra/prefect.yaml: deployments.3.entrypoint: missing"),
        ("    work_pool: *pool\n", "", "infra/prefect.yaml: deployments.3.work_pool: missing"),
        ("flows/count.py:count", "flows/count.py:cuont", "deployment count: entrypoint 'flows/count.py:cuont' is not a function"),
        ("flows/count.py:count", "flows/cuont.py:count", "deployment count: entrypoint 'flows/cuont.py:count' is not a function"),
        ("*pool", "*lake", "infra/prefect.yaml: not valid YAML"),
    ],
)
def test_an_invalid_deployment_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    tree = copy_tree(tmp_path)
    add_deployment(tree)
    path = tmp_path / "infra/prefect.yaml"
    before, _, added = path.read_text().rpartition("  - name: count")
    path.write_text(f"{before}  - name: count{added.replace(old, new)}")
    with pytest.raises(ConfigError) as error:
        for deployment in read_project(tmp_path).deployments:
            takes_params(tmp_path, deployment)
    assert says in str(error.value)


def test_a_schedule_starts_runs_by_itself(up: Up) -> None:
    first = wait_for(lambda: up.runs("pipeline", *ENDED - {"CANCELLED"}), "a run that a schedule starts")[0]
    up.pause("pipeline")
    assert first["auto_scheduled"] and first["state_type"] == "COMPLETED", first["state"]
    assert not (up.checkout / "ran.log").exists(), "nothing had changed"


def test_a_run_with_an_override_is_an_experiment_that_leaves_the_checkout_alone(up: Up) -> None:
    before, status = bytes_of(up.checkout), run(up.checkout, "git", "status", "--porcelain")
    form = up.deployment("pipeline")["parameter_openapi_schema"]["properties"]["params"]["default"]  # what the form shows at first
    form["train"]["k"] = "many"
    with pytest.raises(RunError, match=r"409.*is not of type 'integer'"):
        up.start("pipeline", {"params": form})
    form["train"]["k"] = 12
    ended = up.ended(up.start("pipeline", {"params": form}))
    assert ended["state_type"] == "COMPLETED", ended["state"]
    name = ended["name"]
    assert name.startswith("train-k-12-") and f"experiment:{name}" in ended["tags"]
    assert name in run(up.checkout, "dvc", "exp", "list", "--name-only").split()
    ran = [line.split() for line in (up.checkout / "ran.log").read_text().splitlines()]
    assert ran == [["train", name, ended["id"]], ["evaluate", name, ended["id"]]]
    assert bytes_of(up.checkout) == before and run(up.checkout, "git", "status", "--porcelain") == status
    shown = up.api.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [ended["id"]]}}})
    assert {"quality-images", "quality-train", "progress-train", "health", "metrics"} <= {artifact["key"] for artifact in shown}


def test_the_flow_of_the_recipe_runs(up: Up) -> None:
    counted = up.ended(up.start("count"))
    assert counted["state"]["message"] == f"{len(list((up.checkout / 'data/images').iterdir()))} files"


def test_a_person_starts_runs_in_the_ui_with_the_params_of_now(up: Up, windows: Windows) -> None:
    """Quick run after an edit of params.yaml works in the checkout with the new values, and the form shows them."""
    up.pause("pipeline")  # its runs read params.yaml, too
    params = up.checkout / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("  k: 32", "  k: 24"))
    try:
        wait_for(lambda: str(shown_k(up)) == "24", "the form to follow params.yaml")
        known = {found["id"] for found in up.runs("pipeline", *ENDED)}
        page = windows.open(f"{up.prefect}/deployments/deployment/{up.deployment('pipeline')['id']}/run")
        page.wait_for_function("[...document.querySelectorAll('input')].some(input => input.value === '24')")  # they have no labels
        page.goto(f"{up.prefect}/deployments/deployment/{up.deployment('pipeline')['id']}")
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_text("Quick run", exact=True).click()
        (new,) = wait_for(lambda: [found for found in up.runs("pipeline", *ENDED) if found["id"] not in known], "the end of the run")
        assert new["state_type"] == "COMPLETED" and not any(tag.startswith("experiment:") for tag in new["tags"]), new
        ran = [line.split() for line in (up.checkout / "ran.log").read_text().splitlines()]
        assert ["train", "-", new["id"]] in ran, "it worked in the checkout"
        params.write_text(before.replace("  k: 32", "  k: many"))
        assert "train.k: got 'many'" in up.heard("warning: the forms in the Prefect UI still show the params of before")
    finally:
        params.write_text(before)
    wait_for(lambda: str(shown_k(up)) == "32", "the form to follow params.yaml")


def shown_k(up: Up) -> int:
    return up.deployment("pipeline")["parameter_openapi_schema"]["properties"]["params"]["default"]["train"]["k"]


def test_no_page_reaches_another_host(up: Up, windows: Windows) -> None:
    """Requests that the browser refuses to send, as the server's policy tells it to, do not count.

    Pages of the explorer with a catalogue are tested in tests/explorer, where this would be a fault, too.
    """
    for server, places in ((up.prefect, pages_of_prefect(up)), (up.mlflow, pages_of_mlflow(up)), (up.explorer, ["/robots.txt"])):
        page = windows.open(server + places[0])
        sent: list[str] = []
        page.context.on("requestfinished", lambda request, sent=sent: sent.append(request.url))
        page.context.on("requestfailed", lambda request, sent=sent: sent.append(request.url) if request.failure != "csp" else None)
        for some in batched(places, 8):
            opened = [page.context.new_page() for _ in some]
            for one, place in zip(opened, some, strict=True):
                one.goto(server + place)
            page.wait_for_timeout(1000)  # what pages ask for once they are drawn
            for one in opened:
                assert "/v2" not in one.url, "Prefect's second UI is left out"
                for tab in one.locator(".p-tab:visible").all():
                    tab.click()
            page.wait_for_timeout(500)
            for one in opened:
                one.close()
        foreign = [url for url in sent if not url.startswith((server, "data:", "blob:"))]
        assert len(sent) >= len(places) and not foreign, foreign
    with pytest.raises(urllib.error.HTTPError, match="503"):  # the explorer of a checkout without a catalogue
        urllib.request.urlopen(up.explorer).close()
    windows.faults.clear()  # those of the Prefect and MLflow pages are not ours


def pages_of_prefect(up: Up) -> list[str]:
    """List every page of the Prefect UI, and an instance of each that is about something."""

    def newest(path: str, **wanted: object) -> dict[str, Any]:
        return up.api.post(f"/{path}/filter", {"limit": 1, **wanted})[0]

    deployment = f"/deployments/deployment/{up.deployment('pipeline')['id']}"
    pool, queue = "/work-pools/work-pool/ommatid", "/work-pools/work-pool/ommatid/queue"
    automation = f"/automations/automation/{newest('automations')['id']}"
    block = f"/blocks/block/{newest('block_documents')['id']}"
    artifact = newest("artifacts")
    event = up.api.post("/events/filter", {"limit": 1})["events"][0]
    limit = up.api.post("/concurrency_limits/", {"tag": "of-a-test", "concurrency_limit": 1})["id"]
    shared = up.api.post("/v2/concurrency_limits/", {"name": "of-a-test", "limit": 1})["id"]
    return [
        *("/", "/dashboard", "/runs", "/runs?tab=task-runs", f"/runs/flow-run/{up.runs('pipeline', *ENDED)[0]['id']}"),
        *(f"/runs/task-run/{newest('task_runs')['id']}", "/flows", f"/flows/flow/{newest('flows')['id']}"),
        *("/deployments", deployment, f"{deployment}/run", f"{deployment}/edit", f"{deployment}/duplicate"),
        *("/work-pools", "/work-pools/create", pool, f"{pool}/edit", f"{queue}/default", f"{queue}/default/edit", f"{queue}/create"),
        *("/blocks", "/blocks/catalog", "/blocks/catalog/slack-webhook", "/blocks/catalog/slack-webhook/create", block, f"{block}/edit"),
        *("/variables", "/automations", "/automations/create", automation, f"{automation}/edit"),
        *("/events", f"/events/event/{event['occurred'][:10]}/{event['id']}", "/concurrency-limits"),
        *(f"/concurrency-limits/concurrency-limit/{limit}", f"/concurrency-limits/concurrency-limit-v2/{shared}"),
        *("/artifacts", f"/artifacts/key/{artifact['key']}", f"/artifacts/artifact/{artifact['id']}", "/settings"),
        *("/notifications", "/work-queues", "/flow-runs", "/no-such-page", "/docs", "/redoc", "/v2", "/v2/dashboard"),
    ]


def pages_of_mlflow(up: Up) -> list[str]:
    """List every page of MLflow, with a run and a registered model."""
    api = Api(f"{up.mlflow}/api/2.0/mlflow", HANG_SECONDS)
    one, two = (api.post("/runs/create", {"experiment_id": "0", "start_time": 1})["run"]["info"]["run_id"] for _ in range(2))
    api.post("/registered-models/create", {"name": "of-a-test"})
    api.post("/model-versions/create", {"name": "of-a-test", "source": f"runs:/{one}/sae", "run_id": one})
    experiment, flow_run = "/#/experiments/0", f"/#/experiments/0/runs/{one}"
    tabs = ("runs", "models", "traces", "datasets", "chat-sessions", "evaluation-runs", "judges", "prompts", "playground", "review-queue")
    return [
        *("/", "/#/experiments", experiment, *(f"{experiment}/{tab}" for tab in tabs), f"{experiment}/overview/usage", flow_run),
        *(f"{flow_run}/{tab}" for tab in ("model-metrics", "system-metrics", "artifacts", "traces")),
        *(f'/#/compare-runs?runs=["{one}","{two}"]&experiments=["0"]', "/#/models", "/#/models/of-a-test"),
        *(
            "/#/models/of-a-test/versions/1",
            "/#/prompts",
            "/#/settings",
            "/#/gateway",
            "/#/gateway/api-keys",
            "/#/gateway/endpoints/create",
        ),
        *("/#/gateway/budgets", "/#/gateway/usage", "/#/account", "/#/admin"),
    ]


def batched(items: list[str], n: int) -> Iterator[list[str]]:
    """Yield the items in lists of `n`."""
    for start in range(0, len(items), n):
        yield items[start : start + n]


def test_a_second_make_up_in_the_checkout_says_what_to_do(up: Up) -> None:
    command = [sys.executable, "-m", "flows.serve"]
    done = subprocess.run(command, cwd=up.checkout, env=environment(up.checkout.parent), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"error: `make up` runs in this checkout already (process {up.process.pid}, {up.prefect}); use its servers, or end it by Ctrl-C "
        "there first\n"
    )


def schedule_anew(up: Up) -> list[dict[str, Any]]:
    """Give `count` another weekly schedule, as the server makes no run twice for the same time, and return its next runs."""
    anchor = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    weekly = [{"active": True, "schedule": {"interval": 7 * 86400, "anchor_date": anchor}}]
    up.api.patch(f"/deployments/{up.deployment('count')['id']}", {"schedules": weekly})
    return wait_for(lambda: found if len(found := up.runs("count", "SCHEDULED")) >= 3 else None, "the next runs of the schedule")


def test_a_run_that_a_schedule_made_sends_its_message_soon(up: Up) -> None:
    """Prefect tells nobody that the scheduler has made a run, and its automations would wait for that event for 15 minutes."""
    waiting = schedule_anew(up)[-1]
    up.receiver.bodies.clear()
    for kind in ("PENDING", "RUNNING", "FAILED"):
        up.api.set_state(waiting["id"], kind, "as a test wants it")
    (body,) = wait_for(lambda: up.receiver.bodies, "the message")
    assert (body["subject"], body["run"]) == ("A run failed", waiting["name"])


def test_a_clock_that_jumps_starts_one_run_at_most(up: Up) -> None:
    """Three weekly runs become overdue at once, as they do on a machine that has slept for three weeks."""
    ids = [found["id"] for found in schedule_anew(up)]
    with database(up) as connection:
        long_ago = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-7 days')"  # a run that began after all were due would do what they do
        connection.execute(
            f"UPDATE flow_run SET expected_start_time = {long_ago}, start_time = {long_ago} "
            "WHERE start_time IS NOT NULL AND deployment_id = ?",
            (up.deployment("count")["id"],),
        )
        for i, flow_run in enumerate(ids):
            past = f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{len(ids) - i} hours')"
            connection.execute(
                f"UPDATE flow_run SET expected_start_time = {past}, next_scheduled_start_time = {past} WHERE id = ?", (flow_run,)
            )
            connection.execute(
                f"UPDATE flow_run_state SET state_details = json_set(state_details, '$.scheduled_time', {past} || 'Z') "
                "WHERE flow_run_id = ?",
                (flow_run,),
            )
    up.heard(r"count: .* missed \(the machine slept")
    states = [up.ended(flow_run)["state_type"] for flow_run in ids]
    assert sorted(states) == ["CANCELLED"] * (len(ids) - 1) + ["COMPLETED"], states


def test_an_overdue_run_that_a_worker_takes_meanwhile_is_the_one_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    due = {"auto_scheduled": True, "run_count": 0, "deployment_id": "d", "expected_start_time": "2026-01-01T00:00:00+00:00"}
    for taken in "abc":
        cancelled: list[str] = []

        def runs(self: Api, taken: str = taken, *, state: dict[str, Any], **filters: object) -> list[dict[str, Any]]:
            kinds = state["type"]["any_"]
            return [due | {"id": name} for name in ("abc" if "SCHEDULED" in kinds else taken if "PENDING" in kinds else "")]

        def cancel(self: Api, run: str, *said: str, cancelled: list[str] = cancelled) -> None:
            cancelled.append(run)

        monkeypatch.setattr(Api, "runs", runs)
        monkeypatch.setattr(Api, "set_state", cancel)
        monkeypatch.setattr(Api, "get", lambda self, path: {"name": "count"})
        (line,) = monitor.skip_missed_runs(Api("http://127.0.0.1:1"))
        assert line.startswith("count: 2 scheduled runs were missed") and sorted([*cancelled, taken]) == ["a", "b", "c"]


def database(up: Up) -> sqlite3.Connection:
    return sqlite3.connect(up.checkout / ".prefect/prefect.db", timeout=HANG_SECONDS)


ENDS = {
    ("FAILED", "Failed"): "A run failed",
    ("CRASHED", "Crashed"): "A run failed",
    ("FAILED", "Rejected"): "A gate rejected a run",
    ("FAILED", "Drifted"): "New images have drifted",
    ("COMPLETED", "Promoted"): "There is a new champion",
    ("PAUSED", "Suspended"): "A challenger waits for approval",
}


def test_each_event_sends_one_message(up: Up) -> None:
    up.receiver.bodies.clear()
    ids = {name: up.pretend(kind, name, f'because "of" {name}') for kind, name in ENDS}
    for kind, name in (("COMPLETED", "Completed"), ("COMPLETED", "Kept"), ("COMPLETED", "Unchanged"), ("CANCELLED", "Cancelled")):
        up.pretend(kind, name, "nothing to tell")
    wait_for(lambda: len(up.receiver.bodies) >= len(ENDS), "the messages")
    time.sleep(3)  # for one too many
    up.api.set_state(ids["Suspended"], "CANCELLED", "nobody has to answer it")  # or other tests would find a question without a form
    assert sorted(up.receiver.subjects()) == sorted(ENDS.values())
    for body in up.receiver.bodies:
        link = f"{up.prefect}/runs/flow-run/{ids[body['state']]}"
        said = {"flow": "retrain", "run": f"run-{body['state']}", "message": f'because "of" {body["state"]}', "link": link}
        assert said.items() <= body.items()
        assert body["text"] == f"{body['subject']}: retrain {body['run']}: {body['state']}. {body['message']}\n{link}"


def test_a_run_that_lost_its_worker_starts_again_once(up: Up) -> None:
    """As at the start of `make up` after the machine was restarted, but with a worker that is there."""
    up.pause("pipeline")  # or its runs would be started again, too
    assert _restart_orphans(up.api) == [], "a run that waits is none"
    up.receiver.bodies.clear()
    waiting = schedule_anew(up)[0]
    up.api.set_state(lost := waiting["id"], "RUNNING", "")
    (said,) = _restart_orphans(up.api)
    assert said == f"{waiting['name']} was cut short: its worker ended; it starts again and continues where it stopped"
    ended = up.ended(lost)
    assert ended["state_type"] == "COMPLETED" and ended["run_count"] == 2
    up.api.set_state(lost, "RUNNING", "")
    (said,) = _restart_orphans(up.api)
    assert said.startswith(f"warning: {waiting['name']} is marked as crashed: its worker ended for the second time; start the same run ")
    up.api.set_state(lost, "SCHEDULED", "as Retry does", "AwaitingRetry")
    wait_for(lambda: up.api.get(f"/flow_runs/{lost}")["state_type"] == "COMPLETED", "the end of the retry")
    up.api.set_state(lost, "RUNNING", "")
    assert "starts again" in _restart_orphans(up.api)[0] and up.ended(lost)["state_type"] == "COMPLETED", "a person had started it"
    up.pretend("CANCELLING", "Cancelling", "", "count")
    assert _restart_orphans(up.api) == ["run-Cancelling is cancelled: its worker ended while it was being cancelled"]
    wait_for(lambda: len(up.receiver.bodies) >= 3, "the messages")
    assert up.receiver.subjects() == ["A run was cut short and starts again", "A run failed", "A run was cut short and starts again"]


def test_automations_that_are_declared_again_stay_as_they_are(up: Up) -> None:
    before = up.automations()
    assert len(before) == 7 and all(found["enabled"] for found in before.values())
    up.receiver.bodies.clear()
    done = up.declare_messages(up.receiver.url)
    assert (done.returncode, done.stderr) == (0, "") and up.automations() == before, "an update would begin the wait for a run anew"
    time.sleep(2)
    assert up.receiver.bodies == []


def test_no_run_for_too_long_sends_a_message(up: Up) -> None:
    path = up.checkout / "infra/prefect.yaml"
    text = path.read_text()
    path.write_text(text.replace("within: 691200", "within: 10"))
    up.receiver.bodies.clear()
    try:
        assert up.declare_messages(up.receiver.url).returncode == 0
        wait_for(lambda: up.receiver.bodies, "a message")
    finally:
        path.write_text(text)
        up.declare_messages(up.receiver.url)
    assert up.receiver.bodies[0]["subject"] == "No retrain for eight days"
    assert up.receiver.bodies[0]["text"] == "No retrain for eight days: see the runs in the Prefect UI"


def test_a_receiver_that_refuses_or_hangs_is_reported_and_blocks_no_run(up: Up) -> None:
    for status, says in ((500, r"it answered 500"), (None, r"ReadTimeout")):
        up.receiver.status = status
        up.pretend("FAILED", "Failed", "for the receiver")
        assert up.ended(up.start("count"))["state_type"] == "COMPLETED"
        assert "check OMMATID_MESSAGES" in up.heard(rf"warning: the message 'A run failed' did not reach its receiver \(.*{says}")
        up.receiver.status = 200
        n_before = sum("the receiver of messages: works again" in line for line in up.said)
        up.pretend("FAILED", "Failed", "the receiver is back")
        wait_for(lambda n=n_before: sum("the receiver of messages: works again" in line for line in up.said) > n, "the end of the fault")


def test_any_service_that_apprise_knows_gets_messages(up: Up) -> None:
    assert up.declare_messages(up.receiver.url.replace("http://", "json://")).returncode == 0
    up.receiver.bodies.clear()
    up.pretend("COMPLETED", "Promoted", "better by 0.02")
    (body,) = wait_for(lambda: up.receiver.bodies, "a message by Apprise")
    assert body["title"] == "There is a new champion" and body["message"].startswith("retrain run-Promoted: Promoted. better by 0.02\n")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nonsense", "is neither an address nor a block"),
        ("slack-webhook/team", "the Prefect server has no block of this type and name"),
        ("hooks.slack.com/services/secret", "the Prefect server has no block of this type and name"),
        ("nothing://secret/x", "Apprise cannot use this address, which begins with nothing://"),
    ],
)
def test_a_receiver_that_cannot_be_used_is_named(up: Up, address: str, says: str) -> None:
    done = up.declare_messages(address)
    assert done.returncode == 1 and done.stderr.startswith("error: OMMATID_MESSAGES: ") and says in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_without_a_receiver_nothing_is_sent_and_nothing_fails(up: Up) -> None:
    assert up.declare_messages().returncode == 0
    assert {found["enabled"] for found in up.automations().values()} == {False}
    up.receiver.bodies.clear()
    up.pretend("FAILED", "Failed", "nobody hears of it")
    time.sleep(3)
    assert up.receiver.bodies == [] and up.declare_messages(up.receiver.url).returncode == 0


def test_no_log_has_an_error(up: Up) -> None:
    logs = up.checkout / ".prefect/logs"
    assert {path.stem for path in logs.glob("*.log")} == {
        *("prefect", "mlflow", "explorer", "pool-ommatid", "deploy", "worker-ommatid", "messages", "watch"),
    }
    assert errors_in(logs) == []


def test_a_run_with_params_that_are_not_valid_fails_and_says_why(up: Up) -> None:
    params = up.checkout / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("  k: 32", "  k: many"))
    try:
        states = [up.ended(up.start(flow))["state"] for flow in ("pipeline", "retrain")]
    finally:
        params.write_text(before)
    for state in states:
        assert state["name"] == "Failed" and "params.yaml: train.k: got 'many'; input should be a valid integer" in state["message"], state


def test_images_that_are_dropped_start_one_retrain(up: Up) -> None:
    assert up.runs("retrain", "RUNNING", "PENDING", "SCHEDULED") == []
    known = {found["id"] for found in up.runs("retrain", *ENDED)}
    for i in range(3):
        (up.checkout / f"photos/new-{i}.jpg").write_text(f"new {i}")
        time.sleep(1)
    assert "photos has changed (4 files): started retrain as " in up.heard("has changed")
    wait_for(lambda: not up.runs("retrain", "RUNNING", "PENDING", "SCHEDULED"), "the end of the run")
    (new,) = [found for found in up.runs("retrain", *ENDED) if found["id"] not in known]
    assert "images changed" in new["tags"] and new["start_time"]
    time.sleep(8)
    assert len([found for found in up.runs("retrain", *ENDED, "SCHEDULED", "PENDING", "RUNNING")]) == len(known) + 1


def test_a_person_answers_in_the_ui_whether_a_challenger_is_published(up: Up, windows: Windows) -> None:
    """The first is approved; the second, which was trained on images that drifted, is not."""
    up.receiver.bodies.clear()
    edit(up.checkout / "params.yaml", "approval: false", "approval: true")
    page = asked(up, windows, "same-camera.jpg")
    page.get_by_role("button", name="Resume", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(re.compile(r"sae-of-\d+ waits for approval: better than the champion: FVU -0\.2\. Without an answer"))
    dialog.get_by_role("button", name="Submit").click()
    page.get_by_text("'approve' is a required property").wait_for()
    answer(page, "yes", "Anna", "they look right")
    page.get_by_text("Promoted", exact=True).wait_for()
    artifact = see_artifact(up, page, "decision", "Promoted")
    assert "approved by Anna: better than the champion: FVU -0.2." in artifact
    assert "Decided by Anna in the Prefect UI: they look right." in artifact

    page = asked(up, windows, "another-camera.jpg")
    question = page.url
    assert "60 new images differ" in see_artifact(up, page, "drift", "Drift")
    page.get_by_role("img", name="changed features").wait_for()
    page.goto(question)
    page.get_by_role("button", name="Resume", exact=True).click()
    answer(page, "no", "Ben", "another camera")
    page.get_by_text("Kept", exact=True).wait_for()
    assert "the champion stays: Ben did not approve" in see_artifact(up, page, "decision", "Kept")

    env = environment(up.checkout.parent)
    listed = subprocess.run([sys.executable, "-m", "ommatid", "champion", "list"], cwd=up.checkout, env=env, capture_output=True, text=True)
    rows = [line for line in listed.stdout.splitlines() if " in the Prefect UI " in line]
    assert ["Ben in" in rows[0], "Anna in" in rows[1]] == [True, True] and " champion " in rows[1], listed
    asked_for = [subject for subject in up.receiver.subjects() if subject == "A challenger waits for approval"]
    assert len(asked_for) == 2
    edit(up.checkout / "params.yaml", "approval: true", "approval: false")


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that occurs once in a file."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    file.write_text(text.replace(old, new))


def asked(up: Up, windows: Windows, image: str) -> Page:
    """Drop an image, and open the page of the run that it starts once that asks a person."""
    (up.checkout / "photos" / image).write_text(image)
    (found,) = wait_for(lambda: up.runs("retrain", "PAUSED"), "a question")

    def has_form() -> bool:  # Prefect keeps it a moment after it suspends the run
        last = found["state"]["state_details"]["run_input_keyset"]["description"]
        return bool(up.api.post(f"/flow_runs/{found['id']}/input/filter", {"prefix": last}))

    wait_for(has_form, "the form of the question")
    return windows.open(f"{up.prefect}/runs/flow-run/{found['id']}")


def test_a_person_cancels_a_run_in_the_ui(up: Up, windows: Windows) -> None:
    """The stage ends, nothing is half-written, and the next run goes on."""
    lock, hold = (up.checkout / "dvc.lock").read_bytes(), up.checkout / "hold"
    (up.checkout / "src/train.py").write_text("cancelled = True\n")
    hold.touch()
    try:
        flow_run = up.start("pipeline")
        stage = psutil.Process(int(wait_for(hold.read_text, "the stage")))
        page = windows.open(f"{up.prefect}/runs/flow-run/{flow_run}")
        press(page, "Cancel", "Confirm")
        assert up.ended(flow_run)["state_type"] == "CANCELLED"
        page.get_by_text("Cancelled", exact=True).first.wait_for()
        wait_for_end([stage], "the stage")
        assert (up.checkout / "dvc.lock").read_bytes() == lock
    finally:
        hold.unlink()
    assert "train" in run(up.checkout, "dvc", "status")
    assert up.ended(up.start("pipeline"))["state_type"] == "COMPLETED"
    assert run(up.checkout, "dvc", "status") == "sources:\n\talways changed\n"


def test_a_person_retries_a_failed_run_in_the_ui(up: Up, windows: Windows) -> None:
    """The cause stands on the page of the run, which succeeds once it is mended."""
    edit(up.checkout / "params.yaml", "  k: 32", "  k: 13")
    flow_run = up.start("pipeline")
    assert up.ended(flow_run)["state_type"] == "FAILED"
    page = windows.open(f"{up.prefect}/runs/flow-run/{flow_run}")
    page.get_by_text("error: train: 13 is unlucky").first.wait_for()
    edit(up.checkout / "params.yaml", "  k: 13", "  k: 32")
    press(page, "Retry", "Retry")
    wait_for(lambda: up.api.get(f"/flow_runs/{flow_run}")["state_type"] == "COMPLETED", "the end of the retry")
    page.get_by_text("Completed", exact=True).first.wait_for()


def test_a_scheduler_that_fails_is_reported_although_the_server_says_it_is_healthy(up: Up) -> None:
    count = up.deployment("count")["id"]
    schedule_anew(up)
    time.sleep(2 * monitor.LOOK_SECONDS)  # for the end of an earlier fault to be said
    n_before = len(up.said)

    def change() -> None:
        """Change the deployment, which takes its next runs away, and at which the scheduler looks at once."""
        up.api.patch(f"/deployments/{count}", {"description": f"at {time.monotonic()}"})

    def is_said(line: str) -> bool:
        return any(line in said for said in up.said[n_before:])

    def changed_until_said(line: str) -> bool:
        change()
        time.sleep(1)
        return is_said(line)

    with database(up) as connection:
        connection.execute("CREATE TRIGGER broken BEFORE INSERT ON flow_run WHEN NEW.auto_scheduled BEGIN SELECT RAISE(ABORT, 'no'); END")
    try:
        fails = "warning: the Prefect server's schedule_recent_deployments fails again and again"
        wait_for(lambda: changed_until_said(fails), "the scheduler's errors")
        wait_for(lambda: is_said("warning: the schedule of count is active but has no next run"), "the schedule")
        assert up.api.get("/health") is True and up.api.get("/ready") == {"message": "OK"}
    finally:
        with database(up) as connection:
            connection.execute("DROP TRIGGER broken")
    change()  # once, as each change takes the next runs away
    wait_for(lambda: is_said("the schedule of count: works again"), "the end of the fault")
    for fault in ("schedule_recent_deployments fails", "the schedule of count is active"):
        (line,) = [line for line in up.said[n_before:] if fault in line]  # it is said once
        assert str(up.checkout / ".prefect/logs/prefect.log") in line


def test_a_worker_that_is_silent_is_reported(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SILENT_SECONDS", 0.0)
    faults = monitor.Monitor(up.api, up.checkout / ".prefect/none", ["ommatid"])
    said = [line for _ in range(monitor.N_LOOKS + 2) for line in faults.look()]
    assert [line.partition(" has not")[0] for line in said if "worker" in line] == ["warning: the worker of ommatid"]
    monkeypatch.setattr(monitor, "SILENT_SECONDS", 120.0)
    assert "the worker of ommatid: works again" in faults.look()
