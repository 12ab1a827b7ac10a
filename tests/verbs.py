"""Verbs in the process of the test: heavy imports are paid once."""

import sys

import pytest

from ommatid.cli import app


def run(*arguments: str) -> int:
    """`ommatid ...`. Gives the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ommatid", *arguments])
        try:
            app.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0
