"""Fixtures of tests in a real browser."""

from collections.abc import Iterator

import pytest

from support.browser import RunningBrowser, Windows, find_chromium, opening, running


@pytest.fixture(scope="session")
def browser() -> Iterator[RunningBrowser]:
    """A browser, which all tests of this process share."""
    with running(find_chromium()) as run:
        yield run


@pytest.fixture
def windows(browser: RunningBrowser) -> Iterator[Windows]:
    """Windows of the browser; a fault of a page fails the test that opened it."""
    with opening(browser) as opened:
        yield opened
