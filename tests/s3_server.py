"""A real S3 server on loopback: `rclone serve s3` over a folder."""

import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from waiting import HANG_SECONDS, wait_for


@dataclass(frozen=True)
class S3Server:
    """A server that runs."""

    endpoint: str
    """http://127.0.0.1:<port>"""
    key: str
    secret: str
    root: Path
    """Its folder; the folders inside are buckets."""

    @property
    def environment(self) -> dict[str, str]:
        """What a client on this machine sets, and nothing that leads elsewhere."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone sends the checksum of the whole object with every range of it
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_CONFIG_FILE": str(self.root / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.root / "no-credentials"),
        }


@contextmanager
def serving(root: Path) -> Iterator[S3Server]:
    """A server over `root`, until the block ends."""
    (root / "bucket").mkdir(parents=True)
    server = S3Server(f"http://127.0.0.1:{free_port()}", secrets.token_hex(10), secrets.token_hex(20), root)
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(root), "--addr", server.endpoint.removeprefix("http://")]
    # without config it reads no file of the user's
    settings = ["--auth-key", f"{server.key},{server.secret}", "--config", "/dev/null", "--vfs-cache-mode", "off"]
    with (root.parent / "rclone.log").open("wb") as log, subprocess.Popen([*command, *settings], stdout=log, stderr=log) as process:
        try:
            _wait_for(server.endpoint, process)
            yield server
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        try:
            urllib.request.urlopen(endpoint, timeout=HANG_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()  # it answers: without a signature nobody is let in
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            return False
        return True

    wait_for(answers, "the S3 server to answer")
