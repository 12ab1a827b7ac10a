"""Prefect's REST API, for processes that do not import Prefect, which takes seconds and 100 MB."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from ommatid.errors import RunError

RETRIES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between attempts while the server answers 503: its database was locked, and nothing was changed."""

BEGUN = ("RUNNING", "COMPLETED", "FAILED", "CRASHED")
"""Types of the states of runs that have begun."""

RESTARTED = "Restarted"
"""Name of the state of a run that is started again because its worker had ended."""


class Api:
    """The API of a Prefect server.

    Raises:
        RunError: The server does not answer, or refuses a request; raised by every method.
    """

    def __init__(self, url: str, seconds: float = 60.0):
        self.url = url
        """Address of the API, without a slash at its end."""
        self._seconds = seconds

    def get(self, path: str) -> Any:
        """Get an object."""
        return self._call("GET", path, None)

    def post(self, path: str, body: object) -> Any:
        """Create an object, or ask for those that match a filter."""
        return self._call("POST", path, body)

    def patch(self, path: str, body: object) -> None:
        """Change an object."""
        self._call("PATCH", path, body)

    def deployments(self, *names: str) -> list[dict[str, Any]]:
        """Return the deployments with these names, or all of them."""
        return self.post("/deployments/filter", {"deployments": {"name": {"any_": names}}} if names else {})

    def runs(self, **filters: object) -> list[dict[str, Any]]:
        """Return the flow runs that match Prefect's filters, oldest first."""
        return self.post("/flow_runs/filter", {"flow_runs": filters, "sort": "EXPECTED_START_TIME_ASC"})

    def set_state(self, run: str, kind: str, message: str, name: str | None = None) -> None:
        """Set the state of a flow run, whatever state it is in; without a name of its own, the state is called as its kind."""
        self.post(f"/flow_runs/{run}/set_state", {"state": {"type": kind, "name": name, "message": message}, "force": True})

    def _call(self, method: str, path: str, body: object) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        for wait in (*RETRIES, None):
            try:
                with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read().decode(errors="replace")[:300]
                if error.code != 503 or wait is None:
                    raise RunError(f"the Prefect server at {self.url} refused {method} {path}: {error.code} {said}") from None
                time.sleep(wait)
            except (OSError, ValueError) as error:
                raise RunError(f"the Prefect server at {self.url} does not answer: {getattr(error, 'reason', error)}") from None
        raise AssertionError("the last attempt returns or raises")
