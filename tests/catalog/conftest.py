"""One tiny catalogue for all tests that only read."""

from collections.abc import Iterator
from pathlib import Path

import catalog_artefacts
import pytest

from ommatid.catalog.reader import Catalog


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("catalogue")
    catalog_artefacts.build(root, catalog_artefacts.make_inputs(root))
    return catalog_artefacts.path_in(root)


@pytest.fixture(scope="session")
def catalog(file: Path) -> Iterator[Catalog]:
    with Catalog(file) as opened:
        yield opened
