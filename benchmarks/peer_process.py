"""The process that runs the peers' trainers; it computes only on request, so that our steps and theirs alternate."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = os.environ.get("PEERS_PYTHON") or str(HERE.parent / ".peers/bin/python")
"""Python of an environment with the other projects' libraries (`make peers`)."""
LIBRARIES = ["sae-lens", "dictionary-learning", "eai-sparsify", "torch"]
"""Libraries of that environment whose versions are reported."""


class Peers:
    """Connection to a process that runs `peer_steps.py`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, what: str, **values: Any) -> Any:
        """Call method `what` of its `Session` and return the result."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": what} | values) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{PYTHON} peer_steps.py ended at {what} {values}: see its error above")
        return json.loads(line)

    def versions(self) -> dict[str, str]:
        """Versions of the peers' libraries."""
        return self.ask("versions", names=LIBRARIES)


@contextmanager
def open_peers() -> Iterator[Peers]:
    """Start the process, which ends with the block."""
    if not Path(PYTHON).exists():
        raise SystemExit(f"{PYTHON}: no such file; run `make peers`, or name a python that has the libraries: PEERS_PYTHON=...")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        [PYTHON, str(HERE / "peer_steps.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Peers(process)
        assert process.stdin
        process.stdin.close()
