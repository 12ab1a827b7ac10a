"""Proves that whatever ends one of our processes is reported in one line, with an exit status that says what kind of end it was."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ommatid.cli import app
from ommatid.cli.error_boundary import LONGEST, at_edge
from ommatid.errors import ArtefactError, StoppedError


def ended(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[object, str]:
    """Return the exit status and the output of a block that raises."""
    with pytest.raises(SystemExit) as exit_, at_edge():
        raise error
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ArtefactError("data/sae: missing"), 1, "error: data/sae: missing\n"),
        (StoppedError("train: step 5 of 9"), 143, "stopped: train: step 5 of 9\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ArtefactError("\x1b]0;evil\x07\u202eb.jpg\x9b2J:\n  not read"), 1, "error: \\x1b]0;evil\\x07\\u202eb.jpg\\x9b2J:\n  not read\n"),
    ],
)
def test_expected_errors_end_in_their_own_line(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str) -> None:
    assert ended(capsys, error) == (status, line)


@pytest.mark.parametrize(
    "error", [KeyError("bicubic"), BrokenPipeError(32, "Broken pipe"), ValueError("\n first \nsecond"), AssertionError()]
)
def test_unexpected_errors_end_in_one_line_with_their_type_and_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, said = ended(capsys, error)
    assert status == 70 and said.count("\n") == 1 and said.startswith(f"error: {type(error).__name__}")
    (file,) = tmp_path.iterdir()
    assert f"its traceback is in {file};" in said
    text = file.read_text()
    assert text.startswith("Traceback (most recent call last):") and "raise error" in text and type(error).__name__ in text


def test_a_long_message_is_cut_and_a_full_disk_prints_the_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    status, said = ended(capsys, ValueError("x" * 10_000))
    line = said.splitlines()[-1]
    assert status == 70 and "Traceback" in said
    assert line.startswith("error: ValueError: xxx") and len(line) < LONGEST + 200 and "could not be written to a file" in line


def script(body: str) -> list[str]:
    """Run a process that consists of `body`, with the handling of errors around it."""
    imports = "import os, sys, time\nfrom ommatid.cli.error_boundary import at_edge\n"
    text = f"{imports}with at_edge():\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    return [sys.executable, "-c", text]


def test_sigterm_ends_a_process_cleanly(tmp_path: Path) -> None:
    body = """
        import tempfile
        with tempfile.TemporaryDirectory(dir=sys.argv[1]):
            print("ready", flush=True)
            try:
                time.sleep(3600)
            except Exception:
                pass
    """
    with subprocess.Popen([*script(body), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "stopped: asked to end by SIGTERM\n"
        assert process.wait() == 143
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_ends_a_process_silently() -> None:
    body = """
        while True:
            print("line", flush=True)
    """
    with subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), 70, "error: BrokenPipeError: [Errno 32] Broken pipe; this was not expected"),
        (OSError(116, "Stale file handle"), 70, "error: OSError: [Errno 116] Stale file handle; this was not expected"),
        (KeyError("bicubic"), 70, "error: KeyError: 'bicubic'; this was not expected"),
    ],
)
def test_every_verb_handles_its_errors_in_the_same_way(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(app, "_run", fail)
    monkeypatch.setattr(sys, "argv", ["ommatid", "images"])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    assert exit_.value.code == status
    assert capsys.readouterr().err.startswith(said)


def test_typer_still_reports_mistakes_in_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ommatid", "images", "--nothing"])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    assert exit_.value.code == 2
    assert "No such option: --nothing" in capsys.readouterr().err
