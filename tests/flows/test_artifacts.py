"""The pages of a run: tables from the gates' reports, progress from the stages' lines, and the champion beside its challenger."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from flows import artifacts
from ommatid.config import Margins
from ommatid.pipeline import STAGES
from ommatid.publish.champion import folder_of
from ommatid.publish.decisions import Decision, Matched, Scores, append
from ommatid.publish.drift import Outcome
from ommatid.stage import HEALTH, QUALITY
from support import catalog as catalog_artefacts
from support.drifting import make_drifted_check


def report(root: Path, stage: str, success: bool = True) -> None:
    checks = [
        {
            "name": "rows | any",
            "reason": "an empty set trains nothing",
            "success": success,
            "observed": "0",
            "detail": "" if success else "no\nrows",
        }
    ]
    (root / "data/quality").mkdir(parents=True, exist_ok=True)
    text = json.dumps({"success": success, "summary": {"fvu": 0.123456, "n": 5}, "checks": checks})
    (root / f"data/quality/{stage}.json").write_text(text)


def test_a_line_of_progress_becomes_a_share() -> None:
    assert artifacts.progress_in("extract images: 2048 of 8192") == ("extract images", 25.0)
    assert artifacts.progress_in("evaluate images, first pass: 3 of 3") == ("evaluate images, first pass", 100.0)
    for line in ("2 of 3", "step 4: fvu 0.5", "x: 1 of 0", "x: one of two", ""):
        assert artifacts.progress_in(line) is None


def test_a_report_becomes_a_table_whose_cells_stay_cells(tmp_path: Path) -> None:
    assert artifacts.quality(tmp_path, "images") is None
    report(tmp_path, "images")
    assert "| passed | rows \\| any | 0 | an empty set trains nothing |" in str(artifacts.quality(tmp_path, "images"))
    report(tmp_path, "images", success=False)
    table = str(artifacts.quality(tmp_path, "images"))
    assert table.startswith("# images: **failed**") and "| **failed** | rows \\| any | 0 | no rows |" in table


def test_the_headline_has_evaluation_labels_and_interventions(tmp_path: Path) -> None:
    assert artifacts.headline(tmp_path) is None
    report(tmp_path, "evaluate")
    report(tmp_path, "label")
    report(tmp_path, "intervene")
    table = str(artifacts.headline(tmp_path))
    assert [line for line in table.splitlines() if line.startswith("#")] == ["# evaluate", "# label", "# intervene"]
    assert table.count("| `fvu` | 0.1235 |") == 3


def test_the_headline_of_several_saes_has_a_column_for_each(tmp_path: Path) -> None:
    (tmp_path / "data/quality").mkdir(parents=True)
    summary = {"topk-8-k2-s0.fvu": 0.25, "topk-8-k2-s0.n": 5, "topk-8-k4-s0.fvu": 0.125}
    (tmp_path / "data/quality/evaluate.json").write_text(json.dumps({"success": True, "summary": summary, "checks": []}))
    table = str(artifacts.headline(tmp_path))
    assert "|  | topk-8-k2-s0 | topk-8-k4-s0 |" in table
    assert "| `fvu` | 0.25 | 0.125 |" in table and "| `n` | 5 |  |" in table


def test_there_is_no_picture_without_a_catalogue(tmp_path: Path) -> None:
    assert artifacts.features(tmp_path) is None
    assert artifacts.comparison(tmp_path) is None
    assert artifacts.report(tmp_path) is None


def test_pictures_need_no_network(tmp_path: Path) -> None:
    place = tmp_path / STAGES["catalog"].place
    catalog_artefacts.build(place.parent, catalog_artefacts.make_inputs(tmp_path))
    for page in (artifacts.features(tmp_path), artifacts.comparison(tmp_path)):
        assert page and page.startswith("# The ") and "](data:image/webp;base64," in page


def test_the_report_contains_its_numbers_tables_and_plots(tmp_path: Path) -> None:
    place = tmp_path / STAGES["catalog"].place
    catalog_artefacts.build(place.parent, catalog_artefacts.make_inputs(tmp_path))
    page = str(artifacts.report(tmp_path))
    assert page.startswith(f"# lite0, blocks.15, {catalog_artefacts.NAME}\n") and "| **50 %** | of labels beat their control |" in page
    assert "## The SAE and its controls" in page and "| this SAE | 4 |" in page
    assert page.count("](data:image/png;base64,") == 6 and "## The best features" not in page


def test_a_decision_shows_both_sides() -> None:
    scores = Scores(sae="b", digest="b", fvu=0.3, l0=32.0, dead=0.1, ms=0.45, ms_floor=0.35)
    margins = Margins(min_ms_gain=0.005, max_fvu_loss=0.01, max_dead_rise=0.02)
    decision = Decision.model_validate(
        {"decision": "champion", "reason": "there was no champion", "decided_at": "2026-01-01T00:00:00Z", "challenger": scores}
        | {"champion": None, "margins": margins, "catalog": "c", "run": {}}
    )
    page = artifacts.decision(decision)
    assert page.startswith("# Promoted\n\nthere was no champion.\n\n|  | challenger |\n") and "data:image" not in page
    assert "| MS | 0.4500 |\n" in page and "FVU: share of the activations' variance that it does not explain (less is better)" in page
    for kind, title, head in (("champion", "Promoted", "champion before"), ("challenger", "Kept", "champion")):
        page = artifacts.decision(decision.model_copy(update={"champion": scores, "decision": kind}))
        assert page.startswith(f"# {title}\n") and f"|  | {head} | challenger |\n" in page and "| MS | 0.4500 | 0.4500 |\n" in page


def test_a_question_shows_the_best_features_of_both_and_what_became_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = STAGES["catalog"].place
    catalog_artefacts.build(place.parent, catalog_artefacts.make_inputs(tmp_path))
    sae = f"{catalog_artefacts.NAME}-00000000"
    scores = Scores(sae=sae, digest="b", fvu=0.3, l0=32.0, dead=0.1, ms=0.45, ms_floor=0.35)
    margins = Margins(min_ms_gain=0.005, max_fvu_loss=0.01, max_dead_rise=0.02)
    values = {"decision": "champion", "reason": "better", "decided_at": "2026-01-01T00:00:00Z", "challenger": scores, "champion": scores}
    values |= {"margins": margins, "catalog": "c", "run": {}, "who": "Prefect run"}
    made = Decision.model_validate(values | {"matched": Matched(kept=1234, split=1, changed=2, lost=3, new=4)})
    append(made)
    (folder_of(made)).mkdir(parents=True)
    shutil.copyfile(place / "catalog.duckdb", folder_of(made) / "catalog.duckdb")
    page = artifacts.decision(made, is_asked=True)
    assert page.startswith(f"# {sae} waits for approval\n\nbetter.\n") and "- 1,234 kept: cosine of at least 0.9" in page
    assert "- 4 new: of the challenger: nothing in the champion has a cosine" in page
    titles = [line for line in page.splitlines() if line.startswith("## The best")]
    assert titles == ["## The best features of the champion", "## The best features of the challenger"]
    assert page.count("](data:image/webp;base64,") == 2 and "Decided by" not in page


def test_the_page_contains_a_limited_number_of_pictures_of_health(tmp_path: Path) -> None:
    assert artifacts.health(tmp_path) is None
    folder = tmp_path / QUALITY / HEALTH
    folder.mkdir(parents=True)
    for i in range(artifacts.N_DICTIONARIES + 2):
        (folder / f"topk-{i:02d}.png").write_bytes(b"picture")
    page = str(artifacts.health(tmp_path))
    assert page.count("](data:image/png;base64,cGljdHVyZQ==)") == artifacts.N_DICTIONARIES
    assert page.endswith("2 more in `data/quality/health`")


def test_the_explorer_is_linked_while_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_EXPLORER_URL", "http://127.0.0.1:8329")
    assert artifacts.explorer(tmp_path) is None, "no catalogue"
    place = tmp_path / STAGES["catalog"].place
    catalog_artefacts.build(place.parent, catalog_artefacts.make_inputs(tmp_path))
    page = str(artifacts.explorer(tmp_path))
    assert (
        page.startswith("# [Explorer](http://127.0.0.1:8329/)")
        and f"](http://127.0.0.1:8329/?sae={catalog_artefacts.NAME}-00000000)" in page
    )
    monkeypatch.delenv("OMMATID_EXPLORER_URL")
    assert artifacts.explorer(tmp_path) is None, "nobody serves it"


def test_drift_shows_each_number_beside_chance_and_pictures_of_changed_features(tmp_path: Path) -> None:
    found = make_drifted_check(tmp_path)
    page = artifacts.drift(Outcome(found, "60 new images differ", is_drift=True))
    assert page.startswith("# Drift\n\n60 new images differ.\n")
    rows = [line for line in page.splitlines() if line.startswith("- ")]
    assert rows[0].startswith("- AUROC of a classifier") and "; by chance up to 0." in rows[0] and len(rows) > 5
    assert any(row.startswith("- latent ") and ": fires on " in row for row in rows)
    assert "`drift.action` is `warn`, so the run goes on" in page and "/drift?check=00001-" in page
    picture = re.search(r"data:image/webp;base64,([^)]+)\)", page)
    assert picture
    with Image.open(io.BytesIO(base64.b64decode(picture[1]))) as drawn:
        assert drawn.height > 100 and drawn.convert("RGB").getpixel((drawn.width // 2 + 30, 60)) == pytest.approx((255, 0, 0), abs=12)
