"""A study for tests: params with a few values changed, and stages and verbs run in the process of the test."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ommatid import store
from ommatid.cli import app
from ommatid.config import Params, load_params, make_params
from ommatid.store import Artefact

CHECKOUT = Path(__file__).parents[2]


def make_test_params(**sections: Mapping[str, Any]) -> Params:
    """Return the params of the checkout with some values of each section changed, and few controls, as SAEs of tests have few latents."""
    values = load_params(CHECKOUT / "params.yaml").model_dump(mode="json")
    values["intervene"]["draws"] = 3
    for section, changes in sections.items():
        values[section] |= changes
    return make_params(values, "test")


def make_artefact(place: Path, kind: str, stage: Any, params: Any, inputs: Mapping[str, Artefact]) -> Artefact:
    """Run a stage function and publish what it makes."""
    with store.open_draft(place, kind, params.identity(), inputs) as draft:
        stage(params, inputs, draft)
        return draft.publish(place)


def run_verb(*arguments: str) -> int:
    """Run `ommatid ...` in this process, and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ommatid", *arguments])
        try:
            app.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0
