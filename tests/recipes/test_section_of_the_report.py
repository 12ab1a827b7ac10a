"""Proves the recipe docs/developers/add-a-section-of-the-report.md: a new section of the report takes two files."""

from pathlib import Path

from support import catalog as artefacts
from support.recipes import assert_only_named, blocks_of, copy_tree

PAGE = "add-a-section-of-the-report.md"
REPORT = "src/ommatid/show/report"


def test_a_new_section_takes_the_files_of_its_recipe(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    tree.write(f"{REPORT}/pairs.py", blocks_of(PAGE)[0])
    before = "from ommatid.show.report.plots import"
    tree.replace(f"{REPORT}/page.py", before, f"from ommatid.show.report.pairs import make_pairs\n{before}")
    tree.replace(f"{REPORT}/page.py", "*make_stability(about)]", "*make_stability(about), make_pairs(about)]")
    assert_only_named(tree, PAGE)

    artefacts.build(tmp_path, artefacts.make_inputs(tmp_path))
    page = tmp_path / "report.html"
    tree.run("python", "-m", "ommatid", "report", "--to", str(page), "--catalog", str(artefacts.path_in(tmp_path)))
    section = page.read_text(encoding="utf-8").partition("<h2>Latents that fire together</h2>")[2]
    assert "<td>0 and 1</td><td>2.0</td><td>0.200</td>" in section
    assert "FROM cofiring" in section
