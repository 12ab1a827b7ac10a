"""Every question is asked once: across runs, kills, threads and processes; a changed question is asked again."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ommatid.config.label import VlmLabeller
from ommatid.errors import ArtefactError
from ommatid.label.labellers import vlm
from ommatid.label.labellers.base import Case
from ommatid.label.labellers.vlm import AnswerCache, Vlm, open_checkout_cache
from ommatid.label.labellers.vlm.messages import Completion
from support.cases import LEFT, make_case
from support.processes import HANG_SECONDS, wait_for
from support.servers import Asked, Reply, chatting, names

TESTS = Path(__file__).parents[1]


def make(url: str, path: Path, **params: object) -> Vlm:
    values = {"kind": "vlm", "model": "tiny", "url": url, "timeout": HANG_SECONDS, **params}
    return Vlm("vlm", VlmLabeller.model_validate(values), AnswerCache(path), lambda line: None)


def script(asked: Asked, n_before: int) -> Reply:
    return names(f"thing {n_before}")


def test_a_second_run_sends_no_requests_and_gives_the_same_labels(tmp_path: Path) -> None:
    with chatting(script) as server:
        first = [make(server.url, tmp_path / "a").answer(make_case(i)) for i in range(5)]
        assert len(server.asked) == 5
        second = [make(server.url, tmp_path / "a").answer(make_case(i)) for i in range(5)]
        assert len(server.asked) == 5
    assert [answer.label for answer in second] == [answer.label for answer in first] == [f"thing {i}" for i in range(5)]
    # nor is the server needed any more
    assert make(server.url, tmp_path / "a").answer(make_case(3)).label == "thing 3"


def changed(case: Case, **values: object) -> Case:
    return Case(case.latent, (replace(case.firing[0], **values), *case.firing[1:]), case.silent)  # pyright: ignore[reportArgumentType]


def test_a_question_is_asked_again_exactly_if_its_message_or_model_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, other = make_case(0), make_case(1)
    with chatting(script) as server:

        def n_asked(case: Case, **params: object) -> int:
            before = len(server.asked)
            make(server.url, tmp_path / "a", **params).answer(case)
            return len(server.asked) - before

        assert n_asked(case) == 1
        assert n_asked(changed(case, encoded=other.firing[0].encoded)) == 1
        assert n_asked(changed(case, heat=LEFT.T.copy())) == 1
        assert n_asked(changed(case, heat=None)) == 1
        assert n_asked(changed(case, seen=(0.5, 1.0))) == 1
        assert n_asked(Case(0, case.firing[:-1], case.silent)) == 1
        assert n_asked(Case(0, (*case.firing, *case.silent[:1]), case.silent[1:])) == 1
        assert n_asked(case, model="large") == 1
        # what is not shown
        assert n_asked(Case(7, case.firing, case.silent)) == 0
        assert n_asked(changed(case, act=99.0)) == 0
        assert n_asked(changed(case, heat=LEFT * np.float32(3.0000001))) == 0
        assert n_asked(case, max_requests=1, timeout=7.0) == 0
        monkeypatch.setattr(vlm, "GRID_VERSION", 10**6)
        assert n_asked(case) == 1
        monkeypatch.setattr(vlm, "prompt_text", lambda prompt: "other words")
        assert n_asked(case) == 1


def test_threads_share_a_labeller_and_its_budget_exactly(tmp_path: Path) -> None:
    def with_company(asked: Asked, n_before: int) -> Reply:
        wait_for(lambda: server.n_at_once > 1, "another thread")
        return replace(names("horse"), seconds=0.02)

    with chatting(with_company) as server:
        vlm = make(server.url, tmp_path / "a", max_requests=17)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: vlm.answer(make_case(i)), range(30)))
    assert sum(answer.status == "ok" for answer in answers) == len(server.asked) == 17
    assert sum(answer.status == "over_budget" for answer in answers) == 13
    assert 1 < server.n_at_once <= 4


RUN = """
    import sys
    from pathlib import Path
    from support.cases import make_case
    from ommatid.config.label import VlmLabeller
    from ommatid.label.labellers.vlm import AnswerCache, Vlm

    url, path, n = sys.argv[1:]
    vlm = Vlm("vlm", VlmLabeller(kind="vlm", model="tiny", url=url), AnswerCache(Path(path)), print)
    for i in range(int(n)):
        print(vlm.answer(make_case(i)).label, flush=True)
"""


def test_a_killed_run_continues_after_its_last_answer(tmp_path: Path) -> None:
    def slow(asked: Asked, n_before: int) -> Reply:
        return replace(names(f"thing {n_before}"), seconds=HANG_SECONDS if n_before == 4 else 0)

    program = tmp_path / "run.py"
    program.write_text(textwrap.dedent(RUN))
    with chatting(slow) as server:
        command = [sys.executable, str(program), server.url, str(tmp_path / "a"), "8"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:

            def waits_for_the_fifth_answer() -> bool:
                assert process.poll() is None
                return len(server.asked) == 5

            wait_for(waits_for_the_fifth_answer, "five questions")
            process.send_signal(signal.SIGKILL)
            assert process.wait(HANG_SECONDS) == -signal.SIGKILL
        answers = [make(server.url, tmp_path / "a").answer(make_case(i)) for i in range(8)]
    assert len(server.asked) == 5 + 4  # the fifth again, and the rest
    assert [answer.label for answer in answers] == [f"thing {i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert [answer.n_requests for answer in answers] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_concurrent_writers_lose_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write(i: int) -> None:
        AnswerCache(path).add(f"key {i}", "tiny", Completion(f"text {i}", None, "stop", i))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100)))
    assert [AnswerCache(path).get(f"key {i}") for i in range(100)] == [Completion(f"text {i}", None, "stop", i) for i in range(100)]
    AnswerCache(path).add("key 0", "tiny", Completion("other", None, "stop", 0))
    assert AnswerCache(path).get("key 0") == Completion("text 0", None, "stop", 0)
    assert AnswerCache(path).get("key 100") is None


def test_a_damaged_cache_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"this is not a database, whatever it is" * 100)
    with pytest.raises(ArtefactError, match=r"a: the answers .* move the file away"):
        AnswerCache(path).get("key")
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE answers (key TEXT)")
    connection.close()
    with pytest.raises(ArtefactError, match="move the file away"):
        AnswerCache(path).add("key", "tiny", Completion("", None, "stop", 0))
    with pytest.raises(ArtefactError):
        AnswerCache(path / "below-a-file").get("key")


def test_experiments_share_the_cache_of_their_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMMATID_CHECKOUT", str(tmp_path / "checkout"))
    open_checkout_cache().add("key", "tiny", Completion("text", None, "stop", 0))
    assert (tmp_path / "checkout/data/.answers/answers.sqlite").exists()
    monkeypatch.delenv("OMMATID_CHECKOUT")
    assert open_checkout_cache().get("key") is None
    assert (tmp_path / "data/.answers/answers.sqlite").exists()
