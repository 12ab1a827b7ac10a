"""Proves that an import ends in an SAE or in one sentence, whatever value of another library's JSON is changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ommatid.errors import OmmatidError
from ommatid.sae.interop import import_sae
from support.interop import FIXTURES, SAID, TOLD, fixture
from support.mutated import iter_mutated

CASES = [(name.name, file) for name in sorted(FIXTURES.iterdir()) if name.is_dir() for file in sorted(name.rglob("*.json"))]


@pytest.mark.parametrize(("name", "file"), CASES, ids=[f"{name}-{file.name}" for name, file in CASES])
def test_a_mutated_config_is_read_or_refused(tmp_path: Path, name: str, file: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    path = folder / fixture(name).relative_to(FIXTURES / name)
    copy = folder / file.relative_to(FIXTURES / name)
    overrides = replace(TOLD, values=SAID.get(name, {}))
    refused = 0
    for what, values in iter_mutated(json.loads(file.read_text(encoding="utf-8")), step=5):  # of 13: all come up over the keys
        copy.write_text(json.dumps(values), encoding="utf-8")
        try:
            import_sae(path, overrides)
        except OmmatidError as error:
            refused += 1
            assert "\n" not in str(error), what
        except Exception as error:
            raise AssertionError(f"{name}/{file.name} with {what}: {error!r}") from error
    assert refused
