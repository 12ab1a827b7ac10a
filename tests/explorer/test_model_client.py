"""Proves that the explorer's model can start, hang, die and fail to load without harm to the server that asks it.

The process is a real one, with a small model in it that hangs and dies when a text tells it to.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pytest

from ommatid.errors import InputError, ModelError
from ommatid.explorer import model_client
from ommatid.explorer.model_client import MAX_UPLOAD, ModelClient, Starting, Unavailable
from support.processes import HANG_SECONDS, TESTS, wait_for, wait_for_end
from support.tile_study import SAE, make_tile_study
from support.tiles import draw_tiles, png

MODULE = "support.tile_worker"
RED = png(draw_tiles(np.random.default_rng(0), ["red", "grey", "grey"] * 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tile_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def catalog(made: Path, tmp_path: Path) -> Path:
    """A catalogue that the test may replace, in a study of its own."""
    shutil.copytree(made.parents[1], tmp_path / "data", symlinks=True)
    return tmp_path / "data" / "catalog" / made.name


@pytest.fixture
def client(catalog: Path) -> Iterator[ModelClient]:
    opened = ModelClient(catalog, catalog.parents[1], MODULE)
    yield opened
    opened.close()


def search(client: ModelClient, text: str = "red", wait: float = HANG_SECONDS) -> int:
    """Return the first hit."""
    return client.search_text(SAE, text, 3, wait).found[0]


def test_the_process_starts_with_the_first_question_says_how_long_it_takes_and_learns_it(
    client: ModelClient, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMMATID_TOKEN", "secret")
    assert client.pid is None
    with pytest.raises(Starting, match=r"the model is being loaded, which takes about 8 s; 0 s have passed") as first:
        client.search_text(SAE, "red")
    wait_for(lambda: client.pid, "the model's process")
    with pytest.raises(Starting) as second:
        client.prepare(SAE, "words")
    assert 0 <= first.value.elapsed < second.value.elapsed and first.value.expected == second.value.expected == 8
    assert [search(client, colour) for colour in ("red", "green", "blue")] == [0, 1, 2]
    pid = client.pid
    assert pid and psutil.Process(pid).nice() == 5 and "OMMATID_TOKEN" not in psutil.Process(pid).environ()
    client.prepare(SAE, "words")
    assert 0 in client.encode(SAE, RED, HANG_SECONDS).latents
    client.prepare(SAE)
    hits = client.search_image(SAE, RED, 5, HANG_SECONDS)
    assert hits.by_activation.found[0] in (0, 5) and len(hits.images.found) == 5 and hits.problem is None
    assert client.pid == pid
    measured = json.loads((catalog.parents[1] / ".work" / "model_seconds.json").read_text())
    assert set(measured) == {"start words", "model", "images"} and measured["start words"] > measured["model"] >= 0
    client.close()
    later = ModelClient(catalog, catalog.parents[1], MODULE)
    with pytest.raises(Starting) as again:
        later.search_text(SAE, "red")
    later.close()
    assert again.value.expected == measured["start words"]
    with pytest.raises(Unavailable, match="the server is about to end"):
        client.search_text(SAE, "red")


def test_steering_and_attribution_cross_processes(client: ModelClient) -> None:
    found = client.steer(SAE, RED, [1], 0.6, "patches", [0], ["something green"], wait=HANG_SECONDS)
    assert found.doses == sorted([*model_client.DOSES, 0.6]) and [one.latent for one in found.latents] == [1]
    names = {one.name: one for one in found.names}
    assert names["something green"].kind == "text" and all(len(one.scores) == len(one.ranks) == len(found.doses) for one in found.names)
    assert all(low <= high for one in found.names for ends in one.controls.values() for low, high in ends)
    parted = client.attribute(SAE, RED, "green", "red")
    assert {one.latent: one.effect < 0 for one in parted.latents}[0] and (parted.rows, parted.cols) == (2, 3)
    for wrong, says in (
        (lambda: client.steer(SAE, RED, []), "latents: got 0; choose 1 to 8 latents, each once"),
        (lambda: client.steer(SAE, RED, [1, 1]), "latents: got 2; choose"),
        (lambda: client.steer(SAE, RED, [1], float("nan")), "dose: got nan; expected 0 to 10"),
        (lambda: client.steer(SAE, RED, [1], tokens="patches"), "patches: none is chosen"),
        (lambda: client.steer(SAE, RED, [1], texts=["x"] * 9), "texts: got 9; at most 8"),
        (lambda: client.steer(SAE, b"", [1]), "the image has 0 bytes"),
        (lambda: client.steer(SAE, RED, [99]), "latent 99 does not exist"),
        (lambda: client.attribute(SAE, RED, ""), "the text has 0 characters"),
        (lambda: client.attribute(SAE, RED, "a b", " a  b"), "against: got 'a b' twice"),
    ):
        with pytest.raises(InputError, match=says):
            wrong()


def test_a_process_that_ends_fails_its_question_and_the_next_starts_it_again(
    client: ModelClient, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert search(client) == 0
    pid = client.pid
    with pytest.raises(
        Unavailable, match=r"the process that holds the model ended \(exit status 7\), .* the next question starts it again"
    ):
        search(client, "crash")
    assert search(client, "green") == 1 and client.pid != pid

    with ThreadPoolExecutor(1) as pool:  # killed while it answers
        hanging = pool.submit(search, client, "hang")
        pid = wait_for(lambda: client._turn.locked() and client.pid, "the question to be asked")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match=r"ended \(SIGKILL\)"):
            hanging.result(HANG_SECONDS)
    assert search(client, "blue") == 2

    pid = client.pid  # killed while nobody asks
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: client.pid is None, "the end of the process")
    with pytest.raises(Starting):
        client.search_text(SAE, "red")
    assert search(client) == 0

    pid = client.pid  # a terminal sends Ctrl-C to all processes
    assert pid
    os.kill(pid, signal.SIGINT)
    with pytest.raises(ModelError, match="the model failed: a bug"):
        search(client, "raise")
    assert search(client) == 0 and client.pid == pid
    assert "RuntimeError: a bug" in capfd.readouterr().err

    monkeypatch.setattr(model_client, "TIMEOUT", 0.3)
    with pytest.raises(Unavailable, match=r"did not answer within 0.3 s, and was stopped"):
        search(client, "hang")
    assert client.pid is None


def test_questions_wait_in_a_short_queue_and_inputs_are_checked_before_it(client: ModelClient) -> None:
    for _ in range(1 + model_client.WAITING):
        client._places.acquire()
    with pytest.raises(Starting):  # while others wait for the model to load, who does not wait is told so
        client.search_text(SAE, "red")
    client._places.release(1 + model_client.WAITING)
    assert search(client) == 0
    with ThreadPoolExecutor(1 + model_client.WAITING) as pool:
        hanging = [pool.submit(search, client, "hang") for _ in range(1 + model_client.WAITING)]
        wait_for(lambda: client._places._value == 0, "the queue to be full")  # pyright: ignore[reportAttributeAccessIssue]
        began = time.monotonic()
        with pytest.raises(Unavailable, match="4 other questions to the model are waiting already"):
            search(client)
        assert time.monotonic() - began < HANG_SECONDS / 10, "who is refused does not wait"
        for text, says in (("", "0 characters"), ("x" * 201, "201 characters: expected 1 to 200"), ("a\0b", "cannot be printed")):
            with pytest.raises(InputError, match=f"the text has .*{says}|the text has {says}"):
                client.search_text(SAE, text)
        for encoded, says in ((b"", "0 bytes"), (b"\0" * (MAX_UPLOAD + 2**20), "17.0 MB: expected 16 MB or less")):
            with pytest.raises(InputError, match=f"the image has {says}"):
                client.encode(SAE, encoded)
        with pytest.raises(InputError, match="0 hits were asked for: expected 1 to 1000"):
            client.search_text(SAE, "red", 0)
        client.close()
        for question in hanging:
            with pytest.raises((Unavailable, Starting)):
                question.result(HANG_SECONDS)
    assert client.pid is None


def test_what_cannot_be_loaded_says_why_and_is_tried_again_when_the_catalogue_is_replaced(client: ModelClient, catalog: Path) -> None:
    shutil.copyfile(catalog, catalog.with_suffix(".good"))
    with duckdb.connect(catalog) as connection:
        connection.execute("DROP TABLE meanings")
    with pytest.raises(ModelError, match="has no relation meanings"):
        search(client)
    assert client.pid is None  # nothing is loaded, so no memory is taken
    with pytest.raises(ModelError, match="has no relation meanings"):
        client.search_text(SAE, "red")
    assert client.pid is None
    os.replace(catalog.with_suffix(".good"), catalog)
    assert search(client) == 0
    with pytest.raises(InputError, match=r"the image cannot be read \(not an image\)"):
        client.encode(SAE, b"no image", HANG_SECONDS)

    pid = client.pid
    shutil.copyfile(catalog, catalog.with_suffix(".new"))
    with duckdb.connect(catalog.with_suffix(".new")) as connection:
        connection.execute("DELETE FROM meanings WHERE latent = 0")
    os.replace(catalog.with_suffix(".new"), catalog)
    assert search(client) != 0 and client.pid != pid


def test_a_process_that_cannot_start_is_an_error(catalog: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client = ModelClient(catalog, catalog.parents[1], "support.no_such_module")
    with pytest.raises(ModelError, match=r"the process that holds the model ended \(exit status 1\)"):
        search(client)
    assert "No module named support.no_such_module" in capfd.readouterr().err
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("model")]
    assert not threads and client.pid is None
    client.close()


PARENT = """
import sys, time
from pathlib import Path
from ommatid.explorer.model_client import ModelClient
catalog = Path(sys.argv[1])
client = ModelClient(catalog, catalog.parents[1], "support.tile_worker")
client.search_text("planted", "red", wait=1000)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "transformers"}, "the server's side imported them"
print(client.pid, flush=True)
client.search_text("planted", "hang")
"""


def test_the_process_ends_with_a_server_that_is_killed_even_in_the_middle_of_an_answer(catalog: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    command = [sys.executable, "-c", PARENT, str(catalog)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    wait_for_end([worker], "the model's process")
