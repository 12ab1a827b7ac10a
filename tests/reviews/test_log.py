"""Proves that the log of reviews loses nothing: not what several people say at once, nor what was said before a process was killed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ommatid.errors import ReviewError
from ommatid.reviews import FLAGS, Feature, ReviewLog
from ommatid.reviews.event import Event, clean, clean_who, parse_line
from ommatid.reviews.log import Draft
from support.processes import HANG_SECONDS

SAE = "topk-64-k2-s0-0a1b2c3d"
HOSTILE = "<script>alert(1)</script> \"'`& \u202etxet\u202c {{7*7}} \U0001f600 =cmd|' /C calc'!A0"


def direction() -> np.ndarray:
    return np.arange(1, 9, dtype=np.float32)


@pytest.fixture
def log(tmp_path: Path) -> ReviewLog:
    return ReviewLog(tmp_path / "reviews" / "log.jsonl")


def say(log: ReviewLog, who: str, kind: str, value: str | int, latent: int = 3, seen: str | None = None) -> Event:
    return log.append(who, SAE, latent, kind, value, seen=seen, direction=direction)


def feature(log: ReviewLog, latent: int = 3) -> Feature:
    return log.state().feature((SAE, latent))


def test_a_log_without_a_file_says_nothing(log: ReviewLog) -> None:
    state = log.state()
    assert (len(state), state.keys, state.problems, state.lists) == (0, (), (), {})
    assert feature(log).is_empty and feature(log).last == "" and not log.path.parent.exists()


def test_a_folder_in_place_of_the_log_is_said_and_left_closed(log: ReviewLog) -> None:
    log.path.mkdir(parents=True)
    before = psutil.Process().num_fds()
    for _ in range(3):
        with pytest.raises(ReviewError, match="cannot be read"):
            log.state()
    assert psutil.Process().num_fds() == before


def test_what_people_say_is_folded_by_feature(log: ReviewLog) -> None:
    say(log, "Ada", "rename", "  a horse,\nfrom the side ")
    say(log, "Ada", "rate", 2)
    say(log, "Bo", "rate", 5)
    say(log, "Ada", "rate", 4)
    say(log, "Bo", "flag", "polysemantic")
    say(log, "Ada", "flag", "wrong_name")
    say(log, "Ada", "flag", "polysemantic")
    say(log, "Cy", "unflag", "wrong_name")
    say(log, "Bo", "list_add", "animals")
    say(log, "Bo", "list_add", "odd")
    say(log, "Ada", "list_remove", "odd")
    say(log, "Bo", "comment", "first\r\nsecond ")
    found = feature(ReviewLog(log.path))
    assert found.rename and (found.name, found.rename.who) == ("a horse, from the side", "Ada")
    assert {who: event.value for who, event in found.ratings.items()} == {"Ada": 4, "Bo": 5} and found.rating == 4.5
    assert {reason: list(by) for reason, by in found.flags.items()} == {"polysemantic": ["Bo", "Ada"]}
    assert list(found.lists) == ["animals"] and log.state().lists == {"animals": ((SAE, 3),)}
    assert [event.value for event in found.comments] == ["first\nsecond"]
    assert len(found.history) == 12 == len(log.state()) and not found.is_empty
    say(log, "Bo", "rename", "")
    assert feature(log).name is None and feature(log).renames


def test_an_undo_takes_back_one_event_and_may_itself_be_undone(log: ReviewLog) -> None:
    first, second = say(log, "Ada", "rename", "horse"), say(log, "Bo", "rename", "pony")
    undo = log.undo("Ada", second.id)
    assert feature(log).name == "horse" and feature(log).undone == {second.id: undo}
    log.undo("Bo", undo.id)
    assert feature(log).name == "pony" and second.id not in feature(log).undone
    assert [event.who for event in feature(log).history] == ["Ada", "Bo", "Ada", "Bo"]
    log.undo("Bo", first.id)
    log.undo("Cy", first.id)
    assert feature(log).name == "pony"
    flag = say(log, "Ada", "flag", "other")
    log.undo("Ada", say(log, "Bo", "unflag", "other").id)
    assert feature(log).flags == {"other": {"Ada": flag}}
    with pytest.raises(ReviewError, match="undo: there is no event 'ffff'"):
        log.undo("Ada", "ffff")
    with pytest.raises(ReviewError, match=f"undo: {SAE} 4 has no event"):
        say(log, "Ada", "undo", first.id, latent=4)
    anchor = json.loads(log.path.read_bytes().splitlines()[0])
    assert anchor["kind"] == "anchor" and anchor["d_model"] == 8
    with pytest.raises(ReviewError, match="there is no event"):
        log.undo("Ada", anchor["id"])


def test_people_who_had_not_seen_each_other_are_in_conflict_until_someone_has_seen_both(log: ReviewLog) -> None:
    ada = say(log, "Ada", "rename", "horse", seen="")
    assert not feature(log).conflicts
    bo = say(log, "Bo", "rename", "pony", seen="")
    assert feature(log).conflicts == {"rename": (ada, bo)} and feature(log).name == "pony"
    cy = say(log, "Cy", "rename", "mare", seen=ada.id)
    assert feature(log).conflicts == {"rename": (bo, cy)}
    log.undo("Bo", bo.id)
    assert not feature(log).conflicts
    say(log, "Ada", "rate", 1, seen=feature(log).last)
    seen = feature(log).last
    say(log, "Bo", "rate", 1, seen="")
    assert not feature(log).conflicts  # they agree
    say(log, "Cy", "rate", 5, seen=seen)
    assert [event.who for event in feature(log).conflicts["rate"]] == ["Bo", "Cy"]
    say(log, "Bo", "rate", 2, seen=feature(log).last)
    assert not feature(log).conflicts
    say(log, "Ada", "rate", 3)
    assert not feature(log).conflicts  # it is not known what Ada had seen


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("rename", "x" * 501, "name: has 501 characters; at most 500"),
        ("rename", "a\x00b", "name: contains a control character"),
        ("rename", "a\ud800b", "name: contains a control character, or half of a surrogate pair"),
        ("rename", 3, "name: got 3; a text"),
        ("rate", 0, "rating: got 0; allowed are 1 to 5"),
        ("rate", True, "rating: got True"),
        ("rate", "4", "rating: got '4'"),
        ("flag", "bad", "flag: got 'bad'; allowed are wrong_name, "),
        ("flag", ["other"], "flag: got "),
        ("list_add", " ", "list: got ' '; give a name without a semicolon"),
        ("list_add", "a;b", "list: got 'a;b'"),
        ("list_add", "x" * 81, "list: has 81 characters"),
        ("comment", " \n", "comment: is empty"),
        ("comment", "x" * 10_001, "comment: has 10,001 characters; at most 10,000"),
        ("comment", "\x1b[2J", "comment: contains a control character"),
        ("delete", "x", "kind: got 'delete'; allowed are rename, "),
        ("anchor", "AAAA", "kind: got 'anchor'"),
        ("undo", "x", "undo: got 'x'"),
    ],
)
def test_what_cannot_be_said_is_refused_and_leaves_no_trace(log: ReviewLog, kind: str, value: str | int, says: str) -> None:
    with pytest.raises(ReviewError, match=says):
        say(log, "Ada", kind, value)
    with pytest.raises(ReviewError, match=says):
        log.extend([Draft("Ada", SAE, 3, "rate", 5, direction=direction), Draft("Ada", SAE, 3, kind, value, direction=direction)])
    assert not log.path.exists()


@pytest.mark.parametrize("who", ["", " \t", "x" * 81, "a\x07", "\udcff"])
def test_everything_is_said_by_someone(log: ReviewLog, who: str) -> None:
    with pytest.raises(ReviewError, match="who: "):
        say(log, who, "rate", 3)


def test_a_feature_is_anchored_once_and_not_without_its_direction(log: ReviewLog) -> None:
    with pytest.raises(ReviewError, match=f"{SAE} 3: its direction is not known"):
        log.append("Ada", SAE, 3, "rate", 3)
    log.append("Ada", SAE, 3, "rate", 3, direction=direction)
    log.append("Bo", SAE, 3, "rate", 4)
    log.append("Bo", SAE, 3, "rate", 5, direction=lambda: pytest.fail("asked for a direction that the log has"))
    assert [json.loads(line)["kind"] for line in log.path.read_bytes().splitlines()] == ["anchor", "rate", "rate", "rate"]
    kept = log.state().direction((SAE, 3))
    assert kept.dtype == np.float16 and np.abs(kept - direction() / np.linalg.norm(direction())).max() < 1e-3


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=400)


@given(name=TEXT, comment=st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\r\t"), min_size=1, max_size=999))
def test_every_text_comes_back_from_its_line(name: str, comment: str) -> None:
    for kind, text in (("rename", name), ("comment", comment), ("comment", HOSTILE * 100), ("rename", HOSTILE * 5)):
        if kind == "comment" and not text.strip():
            continue
        event = Event("0" * 32, "2026-01-31T12:00:00.000Z", "Ada", SAE, 3, kind, clean(kind, text))
        line = event.line()
        assert line.endswith(b"\n") and line.count(b"\n") == 1 and parse_line(line) == event
        assert clean(kind, event.value) == event.value  # cleaning again changes nothing
    assert clean_who(clean_who("A " + name[:78])) == clean_who("A " + name[:78])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"id": "0123', "not JSON; half a line"),
        (b"[1]", "not an event"),
        (b"{}", "id: got None"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({"latent": -1}, "latent: got -1"),
        ({"latent": True}, "latent: got True"),
        ({"at": "2026-13-31T12:00:00.000Z"}, "at: got '2026-13"),
        ({"sae": ""}, "sae: got ''"),
        ({"kind": "merge"}, "kind: got 'merge'"),
        ({"who": ""}, "who: is empty"),
        ({"value": 6}, "rating: got 6"),
        ({"seen": 1}, "seen: got 1"),
        ({"kind": "anchor", "value": "AAA"}, "value: not a direction"),
        ({"kind": "anchor", "value": "AHwAfA==", "d_model": 2}, "value: not a direction, but empty or not finite"),
        ({"kind": "anchor", "value": "ADwAPA==", "d_model": 3}, "value: a direction of 2 numbers, and d_model is 3"),
    ],
)
def test_a_line_that_is_no_event_is_left_out_and_named(log: ReviewLog, line: bytes | dict[str, object], says: str) -> None:
    say(log, "Ada", "rate", 3)
    if isinstance(line, dict):
        line = json.dumps(json.loads(log.path.read_bytes().splitlines()[1]) | {"id": "f" * 32} | line).encode()
    with log.path.open("ab") as file:
        file.write(line + b"\n")
    say(log, "Bo", "rate", 4)
    for state in (log.state(), ReviewLog(log.path).state()):
        assert len(state) == 2
        (problem,) = state.problems
        assert problem.startswith("line 3: ") and says in problem


def test_half_a_line_is_kept_aside_and_never_joins_the_next(log: ReviewLog) -> None:
    say(log, "Ada", "rename", "horse")
    half = log.path.read_bytes().splitlines()[1][:-20]
    with log.path.open("ab") as file:
        file.write(half)
    (problem,) = log.state().problems
    assert "the last line has no end" in problem and feature(log).name == "horse"
    say(log, "Bo", "rename", "pony")
    assert log.path.read_bytes().splitlines()[2] == half
    for state in (log.state(), ReviewLog(log.path).state()):
        assert state.feature((SAE, 3)).name == "pony" and len(state) == 2
        (problem,) = state.problems
        assert "line 3: not JSON" in problem
    with log.path.open("ab") as file:  # a whole event, of which only the end of the line is missing
        file.write(half.replace(b"horse", b"mare") + log.path.read_bytes().splitlines()[1][-20:])
    say(log, "Bo", "rate", 1)
    assert len(log.state()) == 3 and len(log.state().problems) == 1  # its id is that of the first, so it is the first


def test_a_failed_write_leaves_the_log_as_it_was(log: ReviewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    say(log, "Ada", "rename", "horse")
    before, write = log.path.read_bytes(), os.write

    def write_half(descriptor: int, data: bytes) -> int:
        if write_half.calls:
            raise OSError(28, "No space left on device")
        write_half.calls += 1
        return write(descriptor, data[: len(data) // 2])

    write_half.calls = 0
    monkeypatch.setattr(os, "write", write_half)
    with pytest.raises(ReviewError, match="nothing was recorded, for the disk is full; make room"):
        say(log, "Bo", "rename", "pony")
    monkeypatch.undo()
    assert log.path.read_bytes() == before and feature(log).name == "horse"
    assert say(log, "Bo", "rename", "mare") and feature(log).name == "mare"


def test_only_what_was_added_is_read_and_a_replaced_file_is_read_anew(log: ReviewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ReviewLog(log.path)
    say(other, "Ada", "rename", "horse")
    first = log.state()
    assert log.state() is first
    parsed: list[bytes] = []
    monkeypatch.setattr("ommatid.reviews.log.parse_line", lambda line: parsed.append(line) or parse_line(line))
    say(other, "Bo", "rename", "pony")
    parsed.clear()
    assert feature(log).name == "pony" and len(parsed) == 1
    assert first.feature((SAE, 3)).name == "horse"  # an earlier state does not change
    lines = log.path.read_bytes().splitlines(keepends=True)
    aside = log.path.with_suffix(".new")
    aside.write_bytes(b"".join(lines[:2]))
    os.replace(aside, log.path)
    assert feature(log).name == "horse"
    log.path.write_bytes(b"".join(lines))  # written in place, and longer
    assert feature(log).name == "pony"
    log.path.write_bytes(b"".join([lines[0], lines[2]]))  # shorter
    assert feature(log).name == "pony" and len(log.state()) == 1
    log.path.write_bytes(b"".join([lines[0], lines[1], lines[1].replace(b'"id": "', b'"id": "0000')]))  # longer, with another beginning
    assert feature(log).name == "horse" and len(log.state().problems) == 1
    log.path.unlink()
    assert len(log.state()) == 0 and not log.state().problems


def test_a_clock_that_goes_back_changes_no_order(log: ReviewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    first = say(log, "Ada", "rename", "horse")
    monkeypatch.setattr("ommatid.reviews.log.now", lambda: "2001-01-01T00:00:00.000Z")
    second = say(log, "Bo", "rename", "pony")
    assert feature(log).name == "pony" and second.at == first.at and feature(ReviewLog(log.path)).history == (first, second)


def test_threads_lose_nothing(log: ReviewLog) -> None:
    said: list[str] = []

    def talk(who: str, own: ReviewLog) -> None:
        said.extend(say(own, who, "comment", f"{who} {i}", latent=i % 4).id for i in range(12))

    threads = [threading.Thread(target=talk, args=(f"P{i}", log if i % 2 else ReviewLog(log.path))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = ReviewLog(log.path).state()
    assert sorted(event.id for event in state.events()) == sorted(said) and len(said) == 72
    assert [event.at for event in state.events()] == sorted(event.at for event in state.events())
    assert len(log.path.read_bytes().splitlines()) == 72 + 4 and not state.problems


TALKER = """
import os, sys, time
import numpy as np
import psutil
from ommatid.reviews import ReviewLog

write = os.write
def in_two(descriptor, data):  # gives a kill the time to come between the halves
    write(descriptor, data[: len(data) // 2])
    time.sleep(0.002)
    return len(data) // 2 + write(descriptor, data[len(data) // 2 :])
os.write = in_two
log, who = ReviewLog(sys.argv[1]), sys.argv[2]
for i in range(10**6):
    event = log.append(who, "a-0", i % 7, "comment", f"{who} {i} " + "x" * (i % 500), direction=lambda: np.ones(4))
    print(event.id, flush=True)
"""


def test_processes_that_are_killed_at_random_lose_nothing_that_they_were_told_is_recorded(tmp_path: Path) -> None:
    path, rng = tmp_path / "log.jsonl", random.Random(0)
    told: list[str] = []
    for round_ in range(2):
        started = [
            subprocess.Popen([sys.executable, "-c", TALKER, str(path), f"P{round_}-{i}"], stdout=subprocess.PIPE, text=True)
            for i in range(3)
        ]
        until = time.monotonic() + HANG_SECONDS
        while (len(path.read_bytes().splitlines()) if path.exists() else 0) < 90 * (round_ + 1):
            assert time.monotonic() < until, "the processes write nothing"
            time.sleep(0.01)
        for process in started:
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            told += process.communicate()[0].split()
    log = ReviewLog(path)
    say(log, "Ada", "rate", 5)
    state = log.state()
    recorded = {event.id for event in state.events()}
    told = [line for line in told if len(line) == 32]  # the last line of a killed process may itself be torn
    assert len(told) >= 100 and not set(told) - recorded
    assert all("not JSON; half a line" in problem for problem in state.problems) and len(state.problems) <= 6
    assert len(path.read_bytes().splitlines()) == len(state) + len(state.anchors) + len(state.problems)


def test_ten_thousand_events_are_read_and_folded_quickly(log: ReviewLog) -> None:
    said = [("rename", "name"), ("rate", 4), ("flag", next(iter(FLAGS))), ("comment", HOSTILE), ("list_add", "a")]
    drafts = [Draft(f"P{i % 7}", SAE, i % 999, *said[i % 5], direction=direction) for i in range(10_000)]
    assert len(log.extend(drafts)) == 10_000
    used = time.process_time()
    features = ReviewLog(log.path).state().features()
    assert time.process_time() - used < 3.0  # takes 0.15 s; a state that is folded anew for each event would take a minute
    assert len(features) == 999 and sum(len(one.history) for one in features.values()) == 10_000
