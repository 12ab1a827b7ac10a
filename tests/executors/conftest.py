"""Fixtures shared by the tests of all executors."""

import os
import secrets
from collections.abc import Iterator

import pytest

from support.processes import Driver

# read when Ray is imported: Ray clusters of tests answer nobody else, and no token is written to the user's home
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A driver that a test starts and ends."""
    driver = Driver()
    yield driver
    driver.kill()
