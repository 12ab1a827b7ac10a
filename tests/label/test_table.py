"""Proves that answers come in order at any concurrency, and that a killed run continues without asking again."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ommatid.label.labellers.base import Answer
from ommatid.label.scoring import other_labels
from ommatid.label.table import AnswerLog, ask_each


@pytest.mark.parametrize("concurrency", [1, 4])
def test_answers_come_in_order_while_few_items_are_held(concurrency: int) -> None:
    n_at_once, n_most, n_drawn, lock = 0, 0, 0, threading.Lock()

    def ask(subject: int) -> int:
        nonlocal n_at_once, n_most
        with lock:
            n_at_once += 1
            n_most = max(n_most, n_at_once)
        time.sleep(random.random() / 100)
        with lock:
            n_at_once -= 1
        return subject * subject

    def subjects() -> Iterator[tuple[int, int]]:
        nonlocal n_drawn
        for i in range(20):
            n_drawn += 1
            yield i, i

    answers = ask_each(ask, subjects(), concurrency)
    assert next(answers) == (0, 0)
    assert n_drawn <= concurrency + 1
    assert list(answers) == [(i, i * i) for i in range(1, 20)]
    assert n_most <= concurrency


def test_an_error_while_asking_is_raised() -> None:
    def ask(subject: int) -> int:
        raise RuntimeError(f"no {subject}")

    with pytest.raises(RuntimeError, match="no 3"):
        list(ask_each(ask, iter([(3, 3)])))


def read(path: Path) -> dict[int, Answer]:
    with closing(AnswerLog(path)) as kept:
        return kept.answers


def test_all_answers_are_logged_except_failed_ones(tmp_path: Path) -> None:
    path = tmp_path / "inside/answers.jsonl"
    kept = AnswerLog(path)
    answers = {
        3: Answer("ok", "horse", detail="brown", n_requests=2, n_tokens=70),
        5: Answer("refused", detail="no"),
        6: Answer("failed", detail="no server"),
        7: Answer("over_budget"),
    }
    for latent, answer in answers.items():
        kept.add(latent, answer)
    assert kept.answers == {}
    # not closed yet: a process that is killed closes nothing
    assert read(path) == {latent: answers[latent] for latent in (3, 5)}
    kept.close()


def test_half_a_line_of_a_killed_process_is_dropped_and_the_log_continues(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    kept = AnswerLog(path)
    kept.add(1, Answer("ok", "a"))
    kept.add(2, Answer("ok", "b"))
    kept.close()
    path.write_bytes(path.read_bytes()[:-5])
    with closing(AnswerLog(path)) as again:
        assert again.answers == {1: Answer("ok", "a")}
        again.add(3, Answer("ok", "c"))
    assert read(path) == {1: Answer("ok", "a"), 3: Answer("ok", "c")}


@pytest.mark.parametrize("names", ["aab", "aaaaab", "abcabcaa", "ab", "abababab"])
def test_the_control_is_a_different_label_of_another_latent(names: str) -> None:
    labels = {10 * i: name for i, name in enumerate(names)}
    found = other_labels(labels, seed=1)
    assert found.keys() == labels.keys()
    assert all(other in set(names) - {labels[latent]} for latent, other in found.items())
    assert found == other_labels(labels, seed=1)


def test_controls_are_drawn_from_all_latents() -> None:
    """If all labels differ, each is a control exactly once."""
    labels = {i: f"name {i}" for i in range(50)}
    assert sorted(str(other) for other in other_labels(labels, seed=0).values()) == sorted(labels.values())
    assert other_labels(labels, seed=0) != other_labels(labels, seed=1)


def test_without_a_different_label_there_is_no_control() -> None:
    assert other_labels({1: "a", 2: "a"}, seed=0) == {1: None, 2: None}
    assert other_labels({1: "a"}, seed=0) == {1: None}
    assert other_labels({}, seed=0) == {}
