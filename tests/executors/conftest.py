"""What the tests of all executors share."""

from collections.abc import Iterator

import pytest
from processes import Driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A driver to start and to end."""
    driver = Driver()
    yield driver
    driver.kill()
