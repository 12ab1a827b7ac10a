"""The stage with a labeller on a server that looks at the pictures: planted colours are labelled, through grids, HTTP and tables."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ommatid import store
from ommatid.config import LabelParams
from ommatid.errors import ConfigError
from ommatid.events import Event, Warned
from ommatid.label import context
from ommatid.label.grid import SIDE, tile_corner
from ommatid.label.stage import label
from ommatid.store import Artefact
from support.servers import Asked, Reply, chatting, free_port, names, refuses, says
from support.study import make_test_params
from support.tiles import COLOURS, D_SAE, DEAD, MIXED, PURE, TileModel, make_line, use_tile_model

N_IMAGES = 200


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Artefact]]:
    """Artefacts of all stages up to the evaluation of the planted SAE."""
    root = tmp_path_factory.mktemp("line")
    params = make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": D_SAE, "k": 1},
        evaluate={"n_top": 16, "n_per_decile": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        yield make_line(root, params)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "colours.txt"
    path.write_text("\n".join(COLOURS) + "\n")
    return path


def run(place: Path, line: Mapping[str, Artefact], words: Path, url: str, **vlm: Any) -> tuple[dict[str, list[dict]], list[str]]:
    """Run the stage; return the rows of each labeller, in order of latents, and the warnings."""
    asked = {"kind": "vlm", "model": "tiny", "url": url, **vlm}
    labellers = [{"kind": "vocabulary", "words": [str(words)]}, asked]
    params = LabelParams.model_validate({"labellers": labellers, "n_examples": 16, "min_examples": 4, "seed": 0})
    heard: list[Event] = []
    with store.open_draft(place, "labels", params.identity(), line) as draft:
        label(params, line, draft, heard.append)
        rows = draft.publish(place).read("labels").to_pylist()
    by_labeller = {name: [row for row in rows if row["labeller"] == name] for name in ("vocabulary", "vlm")}
    return by_labeller, [event.what for event in heard if isinstance(event, Warned)]


def seen(grid: Image.Image, tile: int) -> str | None:
    """Return the colour of a tile; None if it is grey or missing."""
    left, top = tile_corner(tile)
    if top + SIDE > grid.height or left + SIDE > grid.width:
        return None
    pixels = np.asarray(grid.crop((left, top, left + SIDE, top + SIDE))).reshape(-1, 3).astype(int)
    vivid = pixels[pixels.max(1) - pixels.min(1) > 70]
    return ("red", "green", "blue")[int(vivid.sum(0).argmax())] if len(vivid) > SIDE else None


def look(asked: Asked, n_before: int) -> Reply:
    """Reply with the colour of most marked crops, or with the tiles that have the colour in question."""
    if "numbered images" in asked.text:
        (grid,) = asked.images
        name = asked.text.split('show this: "')[1].split('"')[0]
        return says(json.dumps({"sure": [i + 1 for i in range(16) if seen(grid, i) == name], "maybe": []}))
    marked = asked.images[1]
    found = [colour for i in range(16) if (colour := seen(marked, i))]
    return names(max(sorted(set(found)), key=found.count)) if found else says('{"seen": "grey", "label": ""}')


def test_planted_colours_are_labelled_and_detected_and_a_second_run_sends_no_requests(
    line: dict[str, Artefact], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(context, "load_model", lambda params, dtype, device: TileModel())
    with chatting(look) as server:
        rows, _ = run(tmp_path / "first", line, words, server.url)
        n_asked = len(server.asked)
        again, _ = run(tmp_path / "second", line, words, server.url)
        assert len(server.asked) == n_asked
    for latent, colour in PURE.items():
        row = rows["vlm"][latent]
        assert (row["status"], row["label"], row["n_requests"], row["n_tokens"]) == ("ok", colour, 1, 100)
        assert row["score"] > 0.9
        assert row["detector_score"] == row["detector_auroc"] == 1.0
    assert rows["vlm"][DEAD]["status"] == "too_few_examples"
    assert rows["vlm"][MIXED]["label"] in ("red", "green") and rows["vlm"][MIXED]["detector_score"] < 1.0
    assert sum("numbered images" not in asked.text for asked in server.asked) == D_SAE - 1  # of all but the dead one
    assert [row["label"] for row in again["vlm"]] == [row["label"] for row in rows["vlm"]]
    assert {row["n_requests"] for row in again["vlm"]} == {0}


def test_without_a_server_the_vocabulary_still_labels_and_a_warning_says_what_to_do(
    line: dict[str, Artefact], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(context, "load_model", lambda params, dtype, device: TileModel())
    monkeypatch.setattr("ommatid.label.labellers.vlm.client.FIRST_WAIT", 0.001)
    url = f"http://127.0.0.1:{free_port()}/v1"
    rows, warned = run(tmp_path / "labels", line, words, url)
    assert {latent: rows["vocabulary"][latent]["label"] for latent in PURE} == PURE
    assert {row["status"] for row in rows["vlm"]} == {"failed", "too_few_examples"}
    assert all(row["label"] is None and row["score"] is None for row in rows["vlm"])
    assert sum(row["n_requests"] for row in rows["vlm"]) <= 4 * 5  # those that were under way when it was given up
    (gave_up,) = [line for line in warned if "gave up" in line]
    assert url in gave_up and "label.labellers.vlm" in gave_up


def test_a_run_stops_asking_at_its_budget_and_the_next_continues(
    line: dict[str, Artefact], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(context, "load_model", lambda params, dtype, device: TileModel())
    with chatting(look) as server:
        rows, warned = run(tmp_path / "first", line, words, server.url, max_requests=2)
        assert len(server.asked) == 2
        assert sorted(row["status"] for row in rows["vlm"]) == ["ok", "ok", *["over_budget"] * 3, "too_few_examples"]
        assert any("3 over_budget" in line and "max_requests: 2" in line for line in warned)
        rows, _ = run(tmp_path / "second", line, words, server.url, max_requests=3)
        assert len(server.asked) == 5
    assert {latent: rows["vlm"][latent]["label"] for latent in PURE} == PURE


def test_a_refusal_is_a_status_in_the_table(
    line: dict[str, Artefact], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(context, "load_model", lambda params, dtype, device: TileModel())
    replies = {0: says("I'm sorry, I can't help with that."), 1: says("red"), 2: refuses(400, "bad image")}

    def script(asked: Asked, n_before: int) -> Reply:
        return replies.get(n_before) or look(asked, n_before)

    with chatting(script) as server:
        rows, _ = run(tmp_path / "labels", line, words, server.url, concurrency=1)
    assert [row["status"] for row in rows["vlm"][:3]] == ["refused", "unparsed", "failed"]
    assert [row["detail"] for row in rows["vlm"][:3]] == [
        "I'm sorry, I can't help with that.",
        "not the JSON asked for: red",
        "400: bad image",
    ]
    assert all(row["label"] is None and row["score"] is None and row["detector_score"] is None for row in rows["vlm"][:3])


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"url": "localhost:8000"}, r"labellers.1.url: got 'localhost:8000'"),
        ({"max_requests": 0}, "labellers.1.max_requests: got 0"),
        ({"api_key": "sk-secret"}, r"labellers.1.api_key: unknown key; known here: .*max_requests.*url"),
        ({"model": ""}, "labellers.1.model"),
    ],
)
def test_unusable_values_are_refused_before_any_work(values: dict[str, Any], part: str) -> None:
    labellers = [{"kind": "vocabulary", "words": ["common"]}, {"kind": "vlm", "model": "tiny", **values}]
    with pytest.raises(ConfigError, match=part):
        make_test_params(label={"labellers": labellers})
