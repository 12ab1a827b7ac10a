"""What `make up` says of faults of its servers; the Prefect server is a stand-in, and test_serve.py has a real one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows import monitor
from flows.monitor import N_LOOKS, Monitor
from flows.prefect_api import Api
from ommatid.errors import RunError


class Server(Api):
    """A server without deployments, whose worker sent its last sign of life long ago."""

    def __init__(self) -> None:
        super().__init__("http://nowhere/api")
        self.is_down = False
        self.sent: list[dict[str, Any]] = []
        """Events about messages, newest first."""
        self.heartbeat = datetime.now(UTC) - timedelta(days=1)

    def message(self, status: int | None) -> None:
        """Let a message be sent; None: it did not get an answer."""
        name = "failed" if status is None else "executed"
        payload = {"action_type": "call-webhook", **({"reason": "ReadTimeout"} if status is None else {"status_code": status})}
        event = {"id": f"{len(self.sent)}", "event": f"prefect.automation.action.{name}", "payload": payload}
        self.sent.insert(0, event | {"resource": {"prefect.resource.name": f"message {len(self.sent)}"}})

    def _call(self, method: str, path: str, body: Any) -> Any:
        if self.is_down:
            raise RunError("the Prefect server does not answer")
        if path == "/work_pools/pool/workers/filter":
            return [{"last_heartbeat_time": self.heartbeat.isoformat()}]
        return {"/ready": None, "/deployments/filter": [], "/events/filter": {"events": self.sent[:50]}}[path]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def faults(server: Server, tmp_path: Path) -> Monitor:
    return Monitor(server, tmp_path, ["pool"])


def test_each_lost_message_is_told_once_though_the_next_one_arrives(server: Server, faults: Monitor) -> None:
    server.message(200)
    assert faults.look() == []
    for status, reason in ((500, "it answered 500"), (302, "it answered 302, a redirection, which is not followed"), (None, "ReadTimeout")):
        server.message(status)
        server.message(204)
        lost, again = faults.look()
        assert lost.startswith(
            f"warning: the message 'message {len(server.sent) - 2}' did not reach its receiver ({reason}) and is not sent"
        )
        assert again == "the receiver of messages: works again"
        assert faults.look() == []
    server.message(500)
    server.message(500)
    assert len(faults.look()) == 2 and faults.look() == []


def test_a_worker_gets_time_to_start_although_it_was_silent_while_nothing_ran(
    server: Server, faults: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [line for _ in range(N_LOOKS + 1) for line in faults.look()] == []
    monkeypatch.setattr(monitor, "SILENT_SECONDS", 0.0)
    (said,) = [line for _ in range(N_LOOKS + 1) for line in faults.look()]
    assert said.startswith("warning: the worker of pool has not been heard of for ")
    monkeypatch.setattr(monitor, "SILENT_SECONDS", 60.0)
    server.heartbeat = datetime.now(UTC)
    assert faults.look() == ["the worker of pool: works again"]


def test_a_server_that_does_not_answer_is_reported_once_and_again_when_it_does(server: Server, faults: Monitor) -> None:
    server.is_down = True
    (said,) = [line for _ in range(N_LOOKS + 3) for line in faults.look()]
    assert said.startswith("warning: the Prefect server does not answer; its output is in ")
    server.is_down = False
    assert faults.look() == ["the Prefect server: works again"] and faults.look() == []
