"""Proves what a stage prints: lines for logs, a bar for a terminal, and notices at once in both."""

import io
import re
from pathlib import Path

import pytest

from ommatid.cli import terminal
from ommatid.cli.terminal import Lines, number, say, showing, summarise
from ommatid.events import Listener, Measured, Noticed, Progress, Reused, Warned

VALUES = {"loss": 0.5, "fvu": 0.3125, "l0": 16.0, "dead": 0.02, "tokens_per_second": 123456.7}


class Terminal(io.StringIO):
    """A terminal of ordinary width."""

    def isatty(self) -> bool:
        return True


def tell(listener: Listener) -> None:
    for done in (10, 20, 30):
        listener(Measured("one", done, VALUES | {"fvu": 10 / done}))
        listener(Progress("train steps", done, 30))
    listener(Noticed("one", 30, "no progress: [see]"))
    listener(Warned("vlm gave up"))
    listener(Reused("images", 9900, 100))


def test_lines_are_few_but_include_the_last_and_every_notice(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(io.StringIO()) as listener:
        tell(listener)
    assert capsys.readouterr().out.splitlines() == [
        "step 10: loss 0.5 fvu 1 l0 16 dead 0.02 tokens_per_second 123457",
        "train steps: 10 of 30",
        "train steps: 30 of 30",
        "notice: one: step 30: no progress: [see]",
        "notice: vlm gave up",
        "9,900 of 10,000 images found in the cache, 100 computed",
    ]


def test_lines_name_the_sae_if_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    listener = Lines(has_several_saes=True)
    for sae in ("a", "b"):
        listener(Measured(sae, 3, {"fvu": 0.25}))
    assert capsys.readouterr().out.splitlines() == ["a: step 3: fvu 0.25", "b: step 3: fvu 0.25"]


def test_foreign_names_and_labels_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for event in (Warned("\x1b[2Jb.jpg: 'a\u202e'"), Noticed("s\x9b1m", 3, "x\r")):
        Lines()(event)
    say(Path("b\x07.png"))
    assert capsys.readouterr().out == "notice: \\x1b[2Jb.jpg: 'a\\u202e'\nnotice: s\\x9b1m: step 3: x\\r\nb\\x07.png\n"


def test_a_terminal_shows_a_bar_with_rate_time_left_and_the_last_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with showing(out) as listener:
        tell(listener)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = re.split(r"[\r\n]+", shown.strip())[-1]
    assert re.fullmatch(r"train steps ━+ 30/30 \d+/s \d:\d\d:\d\d fvu 0.333  l0 16  dead 0.02\s*", last)
    assert "notice: one: step 30: no progress: [see]" in shown


def test_a_continued_run_does_not_count_earlier_work_in_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with terminal._open_bars(out) as bars:
        listener = terminal._Bar(bars)
        listener(Progress("train steps", 900, 1000))
        (task,) = bars.tasks
        task.start_time = bars.get_time() - 10
        listener(Progress("train steps", 950, 1000))
        assert float(task.fields["rate"].removesuffix("/s")) == pytest.approx(5, rel=0.1)


def test_numbers_of_several_saes_are_shown_as_ranges() -> None:
    assert summarise({}) == ""
    assert summarise({"a": {"fvu": 0.5, "l0": 9.0}, "b": {"fvu": 0.25, "l0": 10.0}}) == "fvu 0.25 to 0.5  l0 9 to 10"
    assert summarise({"a": {"dead": 0.0}, "b": {"dead": 0.0}}) == "dead 0"


def test_large_numbers_have_no_exponent() -> None:
    assert [number(value) for value in (123456.7, 0.000123456, 12.3456, float("nan"))] == ["123457", "0.0001235", "12.35", "nan"]
