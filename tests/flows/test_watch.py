"""Images that change start one run once they are quiet, whatever happens in between, and a webhook hears of them sooner.

The Prefect server is a stand-in that remembers its runs; test_serve.py has a real one.
"""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from flows import watch
from flows.prefect_api import Api
from flows.project import Watch, read_project
from flows.watch import MEMORY, MOST_BYTES, Watcher, Webhook
from ommatid.config import load_params
from ommatid.errors import ArtefactError, ConfigError, RunError
from ommatid.sources.stage import write_sources
from support.checkout import REPOSITORY
from support.processes import HANG_SECONDS, wait_for

QUIET = 10.0


class Server(Api):
    """A server with one deployment, which starts no run by itself."""

    def __init__(self) -> None:
        super().__init__("http://nowhere/api")
        self.made: list[dict[str, Any]] = []
        self.is_down = False

    def _call(self, method: str, path: str, body: Any) -> Any:
        if self.is_down:
            raise RunError("the Prefect server does not answer")
        if path == "/deployments/filter":
            return [{"id": "d"}]
        if path == "/flow_runs/filter":
            found = [run for run in self.made if run["state_type"] in body["flow_runs"]["state"]["type"]["any_"]]
            return found[::-1][: body["limit"]] if body["sort"] == "EXPECTED_START_TIME_DESC" else found
        assert path == "/deployments/d/create_flow_run", path
        known = next((run for run in self.made if run["key"] == body["idempotency_key"]), None)
        if known is None:
            known = {
                "name": f"run-{len(self.made)}",
                "state_type": "SCHEDULED",
                "state_name": "Scheduled",
                "run_count": 0,
                "key": body["idempotency_key"],
            }
            self.made.append(known)
        return known


class Day:
    """A checkout whose images are watched, with a clock."""

    def __init__(self, root: Path, source: dict[str, Any]) -> None:
        self.root = root
        self.photos = root / "photos"
        self.photos.mkdir(parents=True)
        (self.photos / "one.jpg").write_text("one")
        values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
        values["images"]["source"] = source
        (root / "params.yaml").write_text(yaml.safe_dump(values))
        self.server = Server()
        self.now = 0.0
        self.begin()

    def begin(self) -> None:
        """Start to watch, as after a restart."""
        self.watcher = Watcher(self.root, self.server, Watch(deployment="retrain", quiet_seconds=QUIET))

    def passes(self, seconds: float = 2 * QUIET) -> list[str]:
        """Let time pass, looking every second; return what was said."""
        said = []
        for _ in range(int(seconds)):
            self.now += 1
            said += self.watcher.look(self.now)
        return said

    def finish(self, kind: str = "COMPLETED", name: str = "Completed") -> None:
        """Let all runs end that have not."""
        for run in self.server.made:
            if run["state_type"] in ("SCHEDULED", "RUNNING"):
                run |= {"state_type": kind, "state_name": name, "run_count": 1}


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Day:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made = Day(tmp_path / "checkout", {"kind": "folder", "path": str(tmp_path / "checkout/photos")})
    assert made.passes() == [] and made.server.made == [], "what is there at first starts nothing"
    return made


def test_many_files_copied_over_a_minute_start_one_run(day: Day) -> None:
    for i in range(12):
        (day.photos / f"new-{i}.jpg").write_text("new")
        assert day.passes(5) == []
    (said,) = day.passes()
    assert said == f"notice: {day.photos} has changed (13 files): started retrain as run-0"
    day.finish()
    assert day.passes(100) == [] and len(day.server.made) == 1


def test_a_file_that_grows_is_waited_for(day: Day) -> None:
    for size in range(1, 12):
        (day.photos / "large.jpg").write_bytes(b"x" * size)
        assert day.passes(QUIET / 2) == [] and day.server.made == []
    assert len(day.passes()) == 1


def test_the_same_content_starts_nothing_again_but_new_content_does(day: Day) -> None:
    (day.photos / "one.jpg").write_text("two")
    day.passes()
    day.finish()
    (day.photos / "one.jpg").touch()
    (day.photos / "copy.jpg").write_text("x")
    (day.photos / "copy.jpg").unlink()
    assert day.passes() == [] and len(day.server.made) == 1
    (day.photos / "one.jpg").write_text("one")  # as it was at first
    assert len(day.passes()) == 1 and len(day.server.made) == 2
    (day.photos / "one.jpg").write_text("two")
    day.finish()
    assert len(day.passes()) == 1 and len(day.server.made) == 3, "known content that comes back is a change"


def test_linked_folders_are_watched_as_the_stage_reads_them(day: Day, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (day.photos / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/a.jpg").write_text("a")
    day.passes()
    day.finish()
    (tmp_path / "elsewhere/b.jpg").write_text("b")
    (day.photos / ".hidden.jpg").write_text("not read")
    assert len(day.passes()) == 1 and len(day.server.made) == 2


def test_changes_while_nothing_watched_start_one_run(day: Day) -> None:
    (day.photos / "night.jpg").write_text("night")
    day.begin()
    assert len(day.passes()) == 1
    day.finish()
    day.begin()
    assert day.passes() == [] and len(day.server.made) == 1


def test_a_kill_between_the_request_and_its_note_starts_nothing_twice(day: Day) -> None:
    (day.photos / "new.jpg").write_text("new")
    before = (day.root / MEMORY).read_text()
    day.passes()
    day.finish()
    (day.root / MEMORY).write_text(before)
    day.begin()
    day.passes()
    assert len(day.server.made) == 1


def test_one_more_run_at_most_is_queued(day: Day) -> None:
    (day.photos / "a.jpg").write_text("a")
    day.passes()
    day.server.made[0] |= {"state_type": "RUNNING", "run_count": 1}
    for name in "bcd":
        (day.photos / f"{name}.jpg").write_text(name)
        day.passes()
    assert [run["state_type"] for run in day.server.made] == ["RUNNING", "SCHEDULED"]


def test_images_that_are_gone_are_reported_once_and_watched_again_when_they_are_back(day: Day) -> None:
    (day.photos / "one.jpg").unlink()
    (said,) = day.passes()
    assert said.startswith(f"notice: changes of the images start nothing: {day.photos}: there are no files in this folder")
    day.photos.rmdir()
    (said,) = day.passes()
    assert "no such folder" in said and day.server.made == []
    day.photos.mkdir()
    (day.photos / "two.jpg").write_text("two")
    assert len(day.passes()) == 1 and len(day.server.made) == 1


def test_the_first_images_of_a_folder_that_was_empty_start_a_run(day: Day) -> None:
    (day.root / MEMORY).unlink()
    (day.photos / "one.jpg").unlink()
    day.begin()
    assert len(day.passes()) == 1 and day.server.made == []
    (day.photos / "one.jpg").write_text("one")
    assert day.passes() == [f"notice: {day.photos} has changed (1 files): started retrain as run-0"]


@pytest.mark.parametrize(
    ("state", "n_runs"), [(("FAILED", "Failed"), 2), (("CRASHED", "Crashed"), 1), (("FAILED", "Rejected"), 1), (("COMPLETED", "Kept"), 1)]
)
def test_images_that_are_put_back_after_a_run_failed_without_them_start_another(day: Day, state: tuple[str, str], n_runs: int) -> None:
    (day.photos / "two.jpg").write_text("two")
    day.passes()
    day.photos.rename(day.root / "elsewhere")
    day.finish(*state)
    day.passes()
    (day.root / "elsewhere").rename(day.photos)
    (said,) = day.passes()
    if n_runs == 2:
        assert said == f"notice: {day.photos} is back, and the last run failed (2 files): started retrain as run-1"
    else:
        assert said == "notice: changes of the images start runs again"
    day.finish(*state)
    assert day.passes(100) == [] and len(day.server.made) == n_runs, "a run that fails for another reason starts no third one"


def test_a_run_that_goes_on_when_the_images_are_put_back_may_still_fail_without_them(day: Day) -> None:
    (day.photos / "two.jpg").write_text("two")
    day.passes()
    day.server.made[0] |= {"state_type": "RUNNING", "state_name": "Running", "run_count": 1}
    day.photos.rename(day.root / "elsewhere")
    day.passes()
    (day.root / "elsewhere").rename(day.photos)
    assert day.passes(100) == [], "the run has not ended"
    day.finish("FAILED", "Failed")
    assert len(day.passes()) == 1 and len(day.server.made) == 2


def test_a_fault_that_is_over_is_said_even_if_a_run_waits_anyway(day: Day) -> None:
    (day.photos / "two.jpg").write_text("two")
    day.passes()
    (day.photos / "three.jpg").write_text("three")
    day.server.is_down = True
    assert len(day.passes()) == 1
    day.server.is_down = False
    waits, over = day.passes()
    assert waits.endswith("a run of retrain is waiting to start anyway") and over == "notice: changes of the images start runs again"


def test_a_server_that_is_down_is_asked_again(day: Day) -> None:
    day.server.is_down = True
    (day.photos / "two.jpg").write_text("two")
    assert day.passes(60) == ["notice: changes of the images start nothing: the Prefect server does not answer"]
    day.server.is_down = False
    assert len(day.passes()) == 1 and len(day.server.made) == 1


def test_a_server_that_hangs_for_a_minute_does_not_make_the_watcher_sleep(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(watch, "time", clock)
    (day.photos / "two.jpg").write_text("two")
    day.server.is_down = True
    monkeypatch.setattr(day.server, "deployments", lambda name: [setattr(clock, "now", clock.now + 60), day.server.post("", {})])
    assert day.passes() == ["notice: changes of the images start nothing: the Prefect server does not answer"]
    assert clock.now >= 60 and day.watcher.wait == watch.LOOK_SECONDS


def test_a_store_that_cannot_be_reached_is_not_asked_all_the_time(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(params: object) -> None:
        raise ArtefactError("s3://b/photos: access denied")

    params = day.root / "params.yaml"
    params.write_text(params.read_text().replace(str(day.photos), "s3://b/photos"))
    monkeypatch.setattr(watch, "list_input", refuse)
    day.begin()
    assert day.passes() == ["notice: changes of the images start nothing: s3://b/photos: access denied"]
    assert day.watcher.wait >= QUIET / 3 > watch.LOOK_SECONDS


def test_other_images_in_the_params_start_nothing(day: Day, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/a.jpg").write_text("a")
    params = day.root / "params.yaml"
    params.write_text(params.read_text().replace(str(day.photos), str(tmp_path / "others")))
    assert day.passes() == [] and day.server.made == []
    (tmp_path / "others/b.jpg").write_text("b")
    assert len(day.passes()) == 1


def test_what_has_changed_since_a_run_made_by_hand_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    day = Day(tmp_path / "checkout", {"kind": "folder", "path": str(tmp_path / "checkout/photos")})
    write_sources(load_params(day.root / "params.yaml"), day.root / "data/sources")
    assert day.passes() == []
    (day.root / MEMORY).unlink()
    (day.photos / "two.jpg").write_text("two")
    day.begin()
    assert len(day.passes()) == 1


def test_objects_in_a_store_are_watched_less_often(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ommatid.store.filesystem import open_folder

    def put(name: str) -> None:
        (tmp_path / name).write_text(name)
        open_folder(s3).put(tmp_path / name, name)

    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    put("one.jpg")
    day = Day(tmp_path / "checkout", {"kind": "folder", "path": s3})
    day.passes()
    assert day.watcher.wait >= 60
    put("two.jpg")
    assert len(day.passes()) == 1 and len(day.server.made) == 1
    assert day.watcher.covers([f"{s3}/two.jpg"]) is None
    assert day.watcher.covers(["s3://other/two.jpg", f"{s3}-other/two.jpg"]) == f"only {s3} is watched"


EVENT = {"Records": [{"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": "photos/a+b%C3%A9.jpg"}}}]}


@pytest.fixture
def webhook(day: Day) -> Iterator[Webhook]:
    with Webhook(("127.0.0.1", 0), "secret", day.watcher) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(HANG_SECONDS)


def post(webhook: Webhook, body: bytes = b"", path: str = "/", token: str = "Bearer secret", method: str = "POST") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{webhook.server_port}{path}", body, {"Authorization": token}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
            return answer.status, json.load(answer)["message"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["message"]


def test_a_notification_makes_the_watcher_look_at_once(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    assert post(webhook)[0] == 202 and webhook.called.is_set()
    asked: list[list[str]] = []
    monkeypatch.setattr(webhook.watcher, "covers", lambda urls: asked.append(urls))
    minio = {"EventName": "s3:ObjectCreated:Put", "Key": "b/photos/a.jpg", **EVENT}
    bridge = {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": "b"}, "object": {"key": "photos/a bé.jpg"}},
    }
    for event in (EVENT, minio, bridge):
        webhook.called.clear()
        assert post(webhook, json.dumps(event).encode())[0] == 202 and webhook.called.is_set()
    assert asked == [["s3://b/photos/a bé.jpg"]] * 3


def test_a_notification_about_other_objects_does_nothing(webhook: Webhook, day: Day) -> None:
    assert post(webhook, json.dumps(EVENT).encode()) == (200, f"nothing to do: only {day.photos} is watched")
    assert not webhook.called.is_set()


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        ({"token": ""}, 401, "Authorization: Bearer TOKEN"),
        ({"token": "Bearer other"}, 401, "Authorization: Bearer TOKEN"),
        ({"path": "/other"}, 404, "send the POST to /"),
        ({"method": "PUT"}, 405, "send a POST"),
        ({"method": "DELETE"}, 405, "send a POST"),
        ({"body": b"nonsense"}, 400, "not a notification: send no body, or an event of S3, MinIO or EventBridge"),
        ({"body": b"[1]"}, 400, "not a notification"),
        ({"body": b'{"Records": [{"s3": {}}]}'}, 400, "not a notification"),
        ({"body": b'{"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": 3}}}]}'}, 400, "not a notification"),
        ({"body": b'{"detail": {"bucket": {"name": "b"}}}'}, 400, "not a notification"),
        ({"body": b'{"Type": "SubscriptionConfirmation", "SubscribeURL": "https://x"}'}, 400, "not a notification"),
        ({"body": b"\xff\xfe"}, 400, "not a notification"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(webhook: Webhook, sent: dict[str, Any], status: int, says: str) -> None:
    code, message = post(webhook, **sent)
    assert code == status and says in message and not webhook.called.is_set()


def begin(webhook: Webhook, *headers: str) -> socket.socket:
    """Send the beginning of a request."""
    client = socket.create_connection(("127.0.0.1", webhook.server_port), HANG_SECONDS)
    client.sendall("".join(f"{line}\r\n" for line in ("POST / HTTP/1.1", "Host: x", *headers)).encode())
    return client


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Content-Length: {MOST_BYTES + 1}", "413"),
        ("Content-Length: many", "411"),
        ("Content-Length: -1", "411"),
        ("Transfer-Encoding: chunked", "411"),
        ("X-Other: `curl -X POST` sends no length, as there is no body", "202"),
    ],
)
def test_a_body_of_unknown_or_too_great_length_is_not_read(webhook: Webhook, header: str, status: str) -> None:
    with begin(webhook, "authorization: bearer  secret", header, "") as client:
        assert client.recv(100).decode().split()[1] == status


@pytest.mark.parametrize("sent", [b"", b"\r\n{"])
def test_a_client_that_sends_a_byte_now_and_then_is_turned_away(webhook: Webhook, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(watch, "REQUEST_SECONDS", 1.0)
    with begin(webhook, "Authorization: Bearer secret", "Content-Length: 1000000") as client:
        client.sendall(sent or b"X-Slow: ")
        answer = b""

        def dripped() -> bool:
            nonlocal answer
            with suppress(OSError):  # it is closed
                client.sendall(b"x")
            client.settimeout(0.1)
            with suppress(TimeoutError):
                answer += client.recv(1000)
            return bool(answer)

        wait_for(dripped, "an answer")
    assert b" 408 " in answer.splitlines()[0]
    wait_for(lambda: not webhook.began, "the end of the connection")
    assert post(webhook)[0] == 202


def test_a_hundred_notifications_at_once_are_all_answered_and_list_the_files_only_now_and_then(webhook: Webhook, day: Day) -> None:
    idle = [begin(webhook) for _ in range(20)]
    with ThreadPoolExecutor(100) as pool:
        assert {answer[0] for answer in pool.map(lambda _: post(webhook), range(100))} == {202}
    for client in idle:
        client.close()
    day.watcher.look(day.now)
    assert watch.LOOK_SECONDS <= day.watcher.rest <= day.watcher.wait


def test_more_clients_than_can_be_served_are_turned_away(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_CLIENTS", 2)
    with begin(webhook), begin(webhook):
        wait_for(lambda: len(webhook.began) == 2, "two connections")
        with begin(webhook) as third:
            assert third.recv(100) == b""
    wait_for(lambda: not webhook.began, "the end of the connections")
    assert post(webhook)[0] == 202


def test_events_about_a_watched_folder_are_told_from_others_without_listing_it(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    params = day.root / "params.yaml"
    params.write_text(params.read_text().replace(str(day.photos), "s3://b/photos"))
    monkeypatch.setattr(watch, "list_input", lambda params: pytest.fail("each of thousands of events would list a bucket"))
    assert day.watcher.covers(["s3://b/photos/new/a.jpg"]) is None
    assert day.watcher.covers(["s3://b/photos-2/a.jpg"]) == "only s3://b/photos is watched"


def test_a_watch_names_a_deployment_that_exists(tmp_path: Path) -> None:
    project = yaml.safe_load((REPOSITORY / "infra/prefect.yaml").read_text())
    (tmp_path / "infra").mkdir()
    for change, says in (
        ({"deployment": "retrian"}, "watch.deployment: 'retrian' is not one of the deployments: pipeline, retrain"),
        ({"deployment": "retrain", "quiet_seconds": 0}, "watch.quiet_seconds"),
        ({"deployment": "retrain", "quite": 3}, "watch.quite"),
    ):
        (tmp_path / "infra/prefect.yaml").write_text(yaml.safe_dump(project | {"watch": change}))
        with pytest.raises(ConfigError, match=r"infra/prefect\.yaml: ") as error:
            read_project(tmp_path)
        assert says in str(error.value)
