"""The labeller `vlm` against a server that misbehaves on purpose: the outcome of each failure, and the exact number of requests."""

import json
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from ommatid.config.label import VlmLabeller
from ommatid.label.labellers import vlm
from ommatid.label.labellers.vlm import AnswerCache, Vlm
from ommatid.label.labellers.vlm.client import Clock
from support.cases import make_case
from support.processes import HANG_SECONDS
from support.servers import Asked, ChatServer, Reply, Script, chatting, free_port, names, refuses, says

BUSY = refuses(429, "slow down")
BROKEN = refuses(500, "out of memory")
HORSE = names("horse")


class FakeClock:
    """A clock whose time passes only during sleeps, without randomness."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []
        self.clock = Clock(lambda: self.time, self._sleep, lambda: 0.0)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


class Run:
    """A labeller on a server, with its warnings and its clock."""

    def __init__(self, url: str, folder: Path, **params: object) -> None:
        self.said: list[str] = []
        self.time = FakeClock()
        self.cache = AnswerCache(folder / "answers.sqlite")
        values = {"kind": "vlm", "model": "tiny", "url": url, "timeout": HANG_SECONDS, **params}
        self.vlm = Vlm("vlm", VlmLabeller.model_validate(values), self.cache, self.said.append, self.time.clock)

    def statuses(self, n: int, first: int = 0) -> list[str]:
        return [self.vlm.answer(make_case(first + i)).status for i in range(n)]


def run(server: ChatServer, folder: Path, **params: object) -> Run:
    return Run(server.url, folder, **params)


def test_a_good_answer_becomes_a_label(tmp_path: Path) -> None:
    with chatting(names("Spotted  fur.")) as server:
        answer = run(server, tmp_path).vlm.answer(make_case(0))
    assert (answer.status, answer.label, answer.detail) == ("ok", "Spotted fur", "all show Spotted fur.")
    assert (answer.n_requests, answer.n_tokens) == (1, 100)
    asked = server.asked[0].body
    assert asked["model"] == "tiny" and asked["temperature"] == 0
    assert asked["response_format"]["json_schema"]["schema"]["required"] == ["seen", "label"]


def text(content: str | None, finish: str = "stop") -> Reply:
    return says(content, finish)


@pytest.mark.parametrize(
    ("reply", "status", "detail"),
    [
        (text('<think>{"label": "dog"}</think>\n```json\n{"seen": "", "label": "horse"}\n```'), "ok", None),
        (text('{"seen": "fur", "label"'), "unparsed", 'not the JSON asked for: {"seen": "fur", "label"'),
        (text('["horse"]'), "unparsed", "not the JSON"),
        (text('{"seen": "fur", "label": 7}'), "unparsed", "not the JSON"),
        (text("A horse."), "unparsed", "not the JSON asked for: A horse."),
        (text(""), "unparsed", "an empty answer"),
        (text(None), "unparsed", "an empty answer"),
        (text('{"seen": "all', "length"), "unparsed", "cut off"),
        (text(json.dumps({"seen": "", "label": "x" * 81})), "unparsed", "81 characters"),
        (says(None, refusal="I can't help with that."), "refused", "I can't help with that."),
        (text(None, "content_filter"), "refused", "content filter"),
        (text("I'm sorry, but I can't identify people."), "refused", "I'm sorry"),
        (text('{"seen": "a person", "label": "I cannot identify people"}'), "refused", "I cannot identify"),
        (text('{"seen": "many things", "label": ""}'), "refused", "saw nothing that the images share: many things"),
        (text('{"seen": "many things", "label": "Unclear."}'), "refused", "saw nothing"),
    ],
)
def test_every_answer_becomes_a_label_or_a_status_and_is_cached(reply: Reply, status: str, detail: str | None, tmp_path: Path) -> None:
    with chatting(reply) as server:
        answer = run(server, tmp_path).vlm.answer(make_case(0))
        again = run(server, tmp_path).vlm.answer(make_case(0))
    assert (answer.status, answer.label) == (status, "horse" if status == "ok" else None)
    assert detail is None or (answer.detail and detail in answer.detail)
    assert (again.status, again.label, again.n_requests, again.n_tokens) == (answer.status, answer.label, 0, 0)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("replies", "slept"),
    [
        ([BUSY, HORSE], [1.0]),
        ([Reply(429, {}, {"retry-after": "7"}), HORSE], [7.0]),
        ([BROKEN, BROKEN, BROKEN, BROKEN, HORSE], [1.0, 2.0, 4.0, 8.0]),
        ([Reply(503, b"<html>gateway</html>", {"content-type": "text/html", "retry-after": "3"}), HORSE], [3.0]),
        ([Reply(hangs_up=True), HORSE], [1.0]),
        ([Reply(200, b"<html>log in</html>", {"content-type": "text/html"}), HORSE], [1.0]),
        ([Reply(200, b'{"choices": [{"mess'), HORSE], [1.0]),
        ([Reply(200, {"error": {"message": "model is loading"}}), HORSE], [1.0]),
        ([Reply(200, {"choices": []}), HORSE], [1.0]),
    ],
)
def test_a_failing_server_is_asked_again_after_a_wait(replies: list[Reply], slept: list[float], tmp_path: Path) -> None:
    with chatting(replies) as server:
        labelling = run(server, tmp_path)
        answer = labelling.vlm.answer(make_case(0))
    assert (answer.status, answer.label) == ("ok", "horse")
    assert answer.n_requests == len(server.asked) == len(replies)
    assert labelling.time.slept == slept
    assert labelling.said == []


def test_a_server_may_say_by_a_date_how_long_to_wait(tmp_path: Path) -> None:
    in_nine_minutes = formatdate(time.time() + 540, usegmt=True)
    with chatting([Reply(429, {}, {"retry-after": in_nine_minutes}), Reply(429, {}, {"retry-after": "soon"}), HORSE]) as server:
        labelling = run(server, tmp_path)
        assert labelling.vlm.answer(make_case(0)).status == "ok"
    assert 60 < labelling.time.slept[0] <= 540 and labelling.time.slept[1] == 2.0


def test_waits_are_randomised_so_that_clients_do_not_retry_together(tmp_path: Path) -> None:
    with chatting([BROKEN, BROKEN, HORSE]) as server:
        labelling = run(server, tmp_path)
        object.__setattr__(labelling.time.clock, "chance", lambda: 0.5)
        labelling.vlm.answer(make_case(0))
    assert labelling.time.slept == [0.75, 1.5]


def test_a_timeout_is_retried(tmp_path: Path) -> None:
    with chatting([Reply(200, {}, seconds=HANG_SECONDS), HORSE]) as server:
        answer = run(server, tmp_path, timeout=2.0).vlm.answer(make_case(0))
    assert (answer.status, answer.n_requests) == ("ok", 2)


def test_a_question_that_fails_five_times_has_failed_until_the_next_run(tmp_path: Path) -> None:
    with chatting([BROKEN] * 5 + [HORSE]) as server:
        labelling = run(server, tmp_path)
        answer = labelling.vlm.answer(make_case(0))
        assert (answer.status, answer.label, answer.n_requests) == ("failed", None, 5)
        assert answer.detail == "no answer after 5 tries: 500: out of memory"
        assert run(server, tmp_path).vlm.answer(make_case(0)).status == "ok"
    assert len(server.asked) == 6


def test_after_three_failures_in_a_row_a_server_is_given_up_with_one_warning(tmp_path: Path) -> None:
    def script(asked: Asked, n_before: int) -> Reply:
        return HORSE if n_before in (0, 6) else BROKEN  # one good, one that fails, one good, then none

    with chatting(script) as server:
        labelling = run(server, tmp_path)
        assert labelling.statuses(100) == ["ok", "failed", "ok", *["failed"] * 97]
    assert len(server.asked) == 1 + 5 + 1 + 3 * 5
    assert len(labelling.said) == 1
    assert server.url in labelling.said[0] and "out of memory" in labelling.said[0] and "label.labellers" in labelling.said[0]


def test_an_unreachable_server_is_given_up_after_one_question(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    labelling = Run(url, tmp_path)
    answers = [labelling.vlm.answer(make_case(i)) for i in range(50)]
    assert {answer.status for answer in answers} == {"failed"}
    assert [answer.n_requests for answer in answers] == [5, *[0] * 49]
    assert labelling.time.slept == [1.0, 2.0, 4.0, 8.0]
    (line,) = labelling.said
    assert url in line and "refused" in line and "Start the server" in line and "are kept" in line


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (refuses(401, "bad key"), "set OPENAI_API_KEY"),
        (refuses(403, "not yours"), "OPENAI_API_KEY"),
        (refuses(404, "no such model"), "the server has the models tiny; model is tiny"),
        (refuses(402, "pay first"), "pay first"),
        (refuses(429, "you ran out of money", code="insufficient_quota"), "ran out of money"),
        (Reply(429, {}, {"retry-after": "86400"}), "86400 s"),
    ],
)
def test_a_permanent_failure_is_not_retried(reply: Reply, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chatting(reply) as server:
        labelling = run(server, tmp_path)
        assert labelling.statuses(20) == ["failed"] * 20
    assert len(server.asked) == 1
    assert len(labelling.said) == 1 and part in labelling.said[0]


def test_the_api_key_is_sent_in_the_header_and_appears_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with chatting(refuses(401, "the key sk-secret is wrong")) as server:
        labelling = run(server, tmp_path)
        answer = labelling.vlm.answer(make_case(0))
    assert server.asked[0].headers["Authorization"] == "Bearer sk-secret"
    assert answer.detail and "the key *** is wrong" in answer.detail
    assert "secret" not in f"{labelling.said} {answer} {server.asked[0].body}"


def without_schema(message: str) -> Script:
    return lambda asked, n: refuses(400, message) if "response_format" in asked.body else HORSE


@pytest.mark.parametrize("message", ["response_format json_schema is not supported", "bad request"])
def test_a_server_without_structured_output_is_asked_without_a_schema_from_then_on(message: str, tmp_path: Path) -> None:
    with chatting(without_schema(message)) as server:
        labelling = run(server, tmp_path)
        assert labelling.statuses(10) == ["ok"] * 10
    assert ["response_format" in asked.body for asked in server.asked] == [True, *[False] * 10]
    assert all('{"seen": "...", "label": "..."}' in asked.text for asked in server.asked)


def test_settings_that_newer_models_refuse_are_left_out_from_then_on(tmp_path: Path) -> None:
    def script(asked: Asked, n_before: int) -> Reply:
        for name in ("temperature", "max_tokens"):
            if name in asked.body:
                return refuses(400, f"Unsupported parameter: '{name}'", param=name)
        return HORSE

    with chatting(script) as server:
        assert run(server, tmp_path).statuses(3) == ["ok"] * 3
    assert len(server.asked) == 2 + 3
    assert all("max_completion_tokens" in asked.body and "response_format" in asked.body for asked in server.asked[2:])


def test_an_image_that_the_server_cannot_read_fails_that_latent_only(tmp_path: Path) -> None:
    def script(asked: Asked, n_before: int) -> Reply:
        return refuses(400, "cannot identify image file") if n_before == 1 else HORSE

    with chatting(script) as server:
        labelling = run(server, tmp_path)
        answers = [labelling.vlm.answer(make_case(i)) for i in range(3)]
    assert [answer.status for answer in answers] == ["ok", "failed", "ok"]
    assert answers[1].detail == "400: cannot identify image file"
    assert len(server.asked) == 3 and labelling.said == []


def test_a_model_that_accepts_no_images_is_given_up_after_three_questions(tmp_path: Path) -> None:
    with chatting(refuses(400, "this model takes no image input")) as server:
        labelling = run(server, tmp_path)
        assert labelling.statuses(30) == ["failed"] * 30
    assert len(server.asked) == 3
    assert len(labelling.said) == 1 and "takes no image" in labelling.said[0]


def test_a_budget_of_requests_is_exact_and_the_next_run_continues(tmp_path: Path) -> None:
    with chatting([HORSE, BROKEN, HORSE]) as server:
        first = run(server, tmp_path, max_requests=4)
        assert first.statuses(6) == ["ok", "ok", "ok", *["over_budget"] * 3]
        assert len(server.asked) == 4  # a failed request is one of them
        second = run(server, tmp_path, max_requests=2)
        assert second.statuses(6) == ["ok"] * 5 + ["over_budget"]
        assert len(server.asked) == 6
        assert run(server, tmp_path, max_requests=2).statuses(6) == ["ok"] * 6
        assert len(server.asked) == 7
    assert first.said == second.said == []


def test_no_grid_is_drawn_for_a_question_that_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chatting(HORSE) as server:
        labelling = run(server, tmp_path, max_requests=1)
        assert labelling.statuses(1) == ["ok"]
        monkeypatch.setattr(vlm, "draw_grid", None)
        assert labelling.statuses(3) == ["ok", "over_budget", "over_budget"]


def test_a_budget_spent_between_two_tries_says_what_failed(tmp_path: Path) -> None:
    with chatting(BROKEN) as server:
        answer = run(server, tmp_path, max_requests=2).vlm.answer(make_case(0))
    assert (answer.status, answer.n_requests) == ("over_budget", 2)
    assert answer.detail == "max_requests: 2; before that, 500: out of memory"


def test_a_budget_of_tokens_ends_once_they_are_spent(tmp_path: Path) -> None:
    with chatting(HORSE) as server:
        labelling = run(server, tmp_path, max_tokens=250)
        answers = [labelling.vlm.answer(make_case(i)) for i in range(5)]
    assert [answer.status for answer in answers] == ["ok"] * 3 + ["over_budget"] * 2
    assert len(server.asked) == 3
    assert answers[-1].detail == "max_tokens: 250, 300 spent"


def test_tokens_that_a_server_does_not_count_are_estimated(tmp_path: Path) -> None:
    with chatting(says('{"seen": "", "label": "horse"}', n_tokens=None)) as server:
        answer = run(server, tmp_path).vlm.answer(make_case(0))
    words = len(server.asked[0].text) // 4
    assert 3000 + words - 10 < answer.n_tokens < 3000 + words + 20  # three grids


def test_requests_are_spaced_by_the_rate_limit(tmp_path: Path) -> None:
    with chatting([HORSE, BUSY, HORSE]) as server:
        labelling = run(server, tmp_path, requests_per_minute=20)
        assert labelling.statuses(4) == ["ok"] * 4
    assert len(server.asked) == 5
    assert labelling.time.time == pytest.approx(4 * 3.0)  # the pause after `slow down` is shorter than what is left to wait anyway


def test_detection_does_not_depend_on_the_order_of_images(tmp_path: Path) -> None:
    images = tuple(make_case(i, 1, 1).firing[0].encoded for i in range(10)) + tuple(make_case(i, 1, 1).silent[0].encoded for i in range(10))

    def script(asked: Asked, n_before: int) -> Reply:
        sure = numbers_of_red(asked)
        return says(json.dumps({"sure": sure[1:], "maybe": sure[:1]}))

    with chatting(script) as server:
        labelling = run(server, tmp_path)
        grades = labelling.vlm.fires("red edge", images)
        assert labelling.vlm.fires("red edge", images) == grades
    assert grades is not None and len(grades) == 20
    assert sorted(grades[:10]) == [0.5, 0.5, *[1.0] * 8] and grades[10:] == (0.0,) * 10
    assert len(server.asked) == 2  # sixteen images at a time
    assert all('"red edge"' in asked.text for asked in server.asked)
    assert numbers_of_red(server.asked[0]) != list(range(1, 11))  # shuffled


def numbers_of_red(asked: Asked) -> list[int]:
    from ommatid.label.grid import SIDE, tile_corner

    (grid,) = asked.images
    n = int(asked.text.split(" numbered images")[0].split()[-1])
    corners = [grid.getpixel((tile_corner(i)[0] + SIDE // 8, tile_corner(i)[1] + SIDE // 2)) for i in range(n)]
    return [i for i, pixel in enumerate(corners, start=1) if isinstance(pixel, tuple) and pixel[0] > 150]


@pytest.mark.parametrize(
    "content",
    ['{"sure": [1], "maybe": [3]}', '{"sure": [0], "maybe": []}', '{"sure": "1"}', '{"maybe": []}', "none of them", "I'm sorry, no."],
)
def test_an_unusable_detection_gives_no_grades(content: str, tmp_path: Path) -> None:
    images = tuple(example.encoded for example in make_case(0, 2).firing)
    with chatting(says(content)) as server:
        assert run(server, tmp_path).vlm.fires("horse", images) is None
    with chatting(BROKEN) as server:
        assert run(server, tmp_path).vlm.fires("dog", images) is None
        assert len(server.asked) == 5


def test_no_request_is_sent_without_images(tmp_path: Path) -> None:
    with chatting(HORSE) as server:
        assert run(server, tmp_path).vlm.answer(make_case(0, n_firing=0)).status == "too_few_examples"
        assert run(server, tmp_path).vlm.fires("horse", ()) == ()
    assert server.asked == []
