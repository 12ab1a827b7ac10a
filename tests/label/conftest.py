"""One planted SAE with its evaluation for all tests that only read it."""

from pathlib import Path

import pytest

from ommatid.config import Params
from ommatid.store import Artefact
from support.study import make_test_params
from support.tiles import COLOURS, D_SAE, make_line


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "colours.txt"
    path.write_text("\n".join(COLOURS) + "\n")
    return path


@pytest.fixture(scope="session")
def params(words: Path) -> Params:
    return make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": D_SAE, "k": 1},
        evaluate={"n_top": 16, "n_per_decile": 2},
        label={"labellers": [{"kind": "vocabulary", "words": [str(words)]}], "min_examples": 4, "n_examples": 8},
    )


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory, params: Params) -> dict[str, Artefact]:
    """Artefacts of all stages before `label`."""
    return make_line(tmp_path_factory.mktemp("line"), params)
