"""Proves that the pages are true: every SQL statement in them runs, and pages made from code are those the code makes."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from catalog_artefacts import build, make_inputs, path_in
from fakes import CHECKOUT
from PIL import Image

from ommatid.catalog import Catalog

PAGES = [CHECKOUT / "README.md", *(CHECKOUT / "docs" / name for name in ("catalogue.md", "labels.md", "labelling.md", "stability.md"))]
SQL = [
    pytest.param(sql, id=f"{page.name}-{i}")
    for page in PAGES
    for i, sql in enumerate(re.findall(r'```sql\n(.*?)```|ommatid query "(SELECT .*?)"', page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    root = tmp_path_factory.mktemp("docs")
    build(root, make_inputs(root))
    with Catalog(path_in(root)) as opened:
        yield opened


@pytest.mark.parametrize("sql", SQL)
def test_sql_of_the_pages_runs(sql: tuple[str, str], catalog: Catalog) -> None:
    statement = sql[0] or sql[1]
    assert catalog.ask(statement).columns


def test_there_is_sql_in_every_page() -> None:
    assert len(SQL) >= 8


def test_the_page_of_artefacts_is_that_of_the_schemas() -> None:
    page = runpy.run_path(str(CHECKOUT / "docs" / "make_artefacts.py"))
    assert Path(CHECKOUT / "docs" / "artefacts.md").read_text(encoding="utf-8") == page["make_page"](), "run: make docs"


def test_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[0].read_text(encoding="utf-8"))
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


def test_the_sheet_of_shapes_is_what_the_source_draws() -> None:
    sheet = runpy.run_path(str(CHECKOUT / "docs" / "make_shapes.py"))["make_sheet"]()
    with Image.open(CHECKOUT / "docs/pictures/shapes.png") as picture:
        assert np.array_equal(np.array(picture), sheet), "run: make docs"
