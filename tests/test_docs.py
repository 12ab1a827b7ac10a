"""Proves that the documentation is true: its SQL runs, its links resolve, its index is complete, and generated pages are up to date."""

import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from ommatid.catalog.reader import Catalog
from ommatid.cli.app import app
from ommatid.config.load import make_params
from support.catalog import build, make_inputs, path_in
from support.study import CHECKOUT

DOCS = CHECKOUT / "docs"
PAGES = sorted([*CHECKOUT.glob("*.md"), *DOCS.rglob("*.md"), *(CHECKOUT / ".github").rglob("*.md")])
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
SQL = [
    pytest.param(fenced or quoted, id=f"{page.name}-{i}")
    for page in PAGES
    for i, (fenced, quoted) in enumerate(re.findall(r'```sql\n(.*?)```|ommatid query "(SELECT .*?)"', TEXT[page], re.DOTALL))
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    root = tmp_path_factory.mktemp("docs")
    build(root, make_inputs(root))
    with Catalog(path_in(root)) as opened:
        yield opened


@pytest.mark.parametrize("sql", SQL)
def test_sql_of_the_pages_runs(sql: str, catalog: Catalog) -> None:
    assert catalog.ask(sql).columns


def test_the_pages_contain_sql() -> None:
    assert len(SQL) >= 20


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(CHECKOUT))) for page in PAGES])
def test_links_of_the_pages_resolve(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in links if not resolves(page, link)] == []


def resolves(page: Path, link: str) -> bool:
    """Whether the file exists and, where the link names a section, has a heading of that name."""
    path, _, section = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not section or section in anchors(target))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(TEXT[CHECKOUT / "README.md"].split()) < 900


EXAMPLES = {"flows/count.py", "src/ommatid/show/report/pairs.py"}
"""Files that recipes for developers make."""


def test_files_that_pages_code_and_settings_name_exist() -> None:
    settings = [CHECKOUT / name for name in ("params.yaml", "dvc.yaml", "Makefile", "pyproject.toml", "data/naming/README.md")]
    folders = [path for folder in ("src", "flows", "benchmarks", "infra", "docs") for path in (CHECKOUT / folder).rglob("*")]
    files = {*PAGES, *settings, *(path for path in folders if path.suffix in (".py", ".html", ".md", ".yaml", ".sql", ".svg"))}
    named = [(path, name) for path in files for name in find_names(path.read_text(encoding="utf-8"))]
    assert len(named) > 200
    assert sorted(f"{path.relative_to(CHECKOUT)}: {name}" for path, name in named if not is_there(path, name)) == []


def find_names(text: str) -> list[str]:
    """Paths of files (a/b.py), and of modules and what is in them (ommatid.a.b)."""
    files = re.findall(r"(?<![\w./<>{}-])((?:[\w-]+/)+[\w-]+\.(?:py|sql|md|svg|toml))\b", text)
    modules = re.findall(r"(?:^|[\s`(])(ommatid(?:\.[a-z_]\w*)+)\b(?!\.?[<{])", text, re.MULTILINE)
    return [*files, *modules]


def is_there(page: Path, name: str) -> bool:
    """Whether a file exists relative to the checkout, to a room or to the page, or whether a module has what is named."""
    if "/" in name:
        bases = (CHECKOUT, CHECKOUT / "src", CHECKOUT / "src/ommatid", CHECKOUT / "tests", page.parent)
        return name in EXAMPLES or any((base / name).exists() for base in bases)
    place = CHECKOUT / "src"
    for part in name.split("."):
        if not (place / part).is_dir():
            inside = place / "__init__.py"
            return (place / f"{part}.py").exists() or re.search(rf"\b{part}\b", inside.read_text(encoding="utf-8")) is not None
        place /= part
    return True


def test_the_page_on_architecture_names_every_package_and_layer() -> None:
    page = TEXT[DOCS / "developers/architecture.md"]
    rooms = {path.parent.name for path in (CHECKOUT / "src/ommatid").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in page.partition("## Rooms")[2].partition("## Layers")[0]} == set()
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [set(layer.replace("ommatid.", "").split(" : ")) for layer in contracts[0]["layers"]]
    assert [set(line.split(", ")) for line in page.partition("## Layers")[2].split("```")[1].strip().splitlines()] == layers


def test_the_index_lists_every_page() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link).resolve() for link in re.findall(r"^\| \[[^]]+\]\(([^)#]+)\) \| .+ \|$", TEXT[index], re.MULTILINE)}
    assert linked == set(DOCS.rglob("*.md")) - {index}


def test_the_page_on_artefacts_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "developers/make_artefacts.py"))
    assert TEXT[DOCS / "developers/artefacts.md"] == page["make_page"](), "run: make docs"


def test_the_sheet_of_shapes_is_up_to_date() -> None:
    sheet = runpy.run_path(str(DOCS / "pictures/make_shapes.py"))["make_sheet"]()
    with Image.open(DOCS / "pictures/shapes.png") as picture:
        assert np.array_equal(np.array(picture), sheet), "run: make docs"


def test_the_citation_names_the_version_of_the_package() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_hooks_before_a_commit_need_no_network() -> None:
    repos = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {repo["repo"] for repo in repos} == {"local"} and {hook["language"] for hook in hooks} == {"system"}
    assert all(hook["entry"].startswith(".venv/bin/ruff ") for hook in hooks)


def test_commands_of_the_pages_exist() -> None:
    verbs = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    inside = {f"{group} {name}": verb for group, of in verbs.items() for name, verb in getattr(of, "commands", {}).items()}
    options = {name: {option for param in verb.params for option in param.opts} for name, verb in {**verbs, **inside}.items()}
    shown = "\n".join(code for text in TEXT.values() for code in re.findall(r"(?:```\w*\n|`(?=ommatid ))([^`]*)`", text))
    used = re.findall(r"^(?:\$ )?ommatid ([\w-]+)(.*)$", shown, re.MULTILINE)
    assert len(used) > 40
    for verb, rest in used:
        given = re.findall(r"(?<=\s)--[\w-]+", re.sub(r"""#.*|;.*|"[^"]*"?|'[^']*'""", "", rest))
        name = next((name for name in inside if f"{verb}{rest} ".startswith(f"{name} ")), verb)
        assert set(given) <= options.get(name, set()), f"ommatid {verb}{rest}"


def test_targets_of_make_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {target for text in TEXT.values() for target in re.findall(r"`make ([a-z-]+)`", text)} <= targets


YAML = [
    pytest.param(yaml.safe_load(text), id=f"{page.name}-{i}")
    for page in PAGES
    for i, text in enumerate(re.findall(r"```yaml\n(.*?)```", TEXT[page], re.DOTALL))
]


@pytest.mark.parametrize("sections", YAML)
def test_params_of_the_pages_are_valid(sections: dict) -> None:
    params = yaml.safe_load((CHECKOUT / "params.yaml").read_text(encoding="utf-8"))
    for name, section in sections.items():
        params[name] = section if section.get("source") == "files" else params[name] | section
    make_params(params, "the page")
