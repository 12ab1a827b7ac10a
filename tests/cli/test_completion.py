"""Proves that the command line prints its version, and that a shell completes its verbs and options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ommatid import __version__


def ommatid(*arguments: str, **environment: str) -> str:
    """Return what `ommatid` prints when bash starts it through its entry point."""
    code = "import sys; sys.argv[0] = 'ommatid'; from ommatid.cli import main; main()"
    command = ["bash", "-c", '"$@"; exit $?', "bash", sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


def test_the_version_is_that_of_the_package() -> None:
    assert ommatid("--version") == f"ommatid {__version__}\n"


def test_completion_is_shown_and_installed(tmp_path: Path) -> None:
    shown = ommatid("--show-completion")
    assert "complete -o default -F _ommatid_completion ommatid" in shown
    (tmp_path / ".bashrc").touch()
    ommatid("--install-completion", HOME=str(tmp_path))
    assert (tmp_path / ".bash_completions/ommatid.sh").read_text().strip() == shown.strip()
    assert ".bash_completions/ommatid.sh" in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(("words", "completed"), [("ommatid ca", {"catalog"}), ("ommatid query --ma", {"--max-rows"})])
def test_verbs_and_options_are_completed(words: str, completed: set[str]) -> None:
    place = str(len(words.split()) - 1)
    assert set(ommatid(_OMMATID_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place).split()) == completed
