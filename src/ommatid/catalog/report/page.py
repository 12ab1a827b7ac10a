"""The report as one HTML file: styles and pictures inside, no script, no network, everything from data escaped."""

import base64
import os
from pathlib import Path

import jinja2

from ommatid.catalog import Catalog
from ommatid.catalog.report.content import make_report
from ommatid.catalog.report.parts import Report


def write_report(catalog: Catalog, path: Path, sae: str | None = None) -> Report:
    """Write the report about an SAE of a catalogue, whole or not at all; the same catalogue makes the same bytes.

    Args:
        catalog: Open.
        path: The HTML file.
        sae: Name of the SAE; None is the one with the highest mean MS above its floor.

    Raises:
        QueryError: there is no such SAE.
    """
    report = make_report(catalog, sae)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(_as_html(report), encoding="utf-8")
    os.replace(aside, path)
    return report


def _as_html(report: Report) -> str:
    loader = jinja2.PackageLoader("ommatid", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["png"] = lambda picture: _embed(picture, "png")
    environment.filters["webp"] = lambda picture: _embed(picture, "webp")
    return environment.get_template("report.html").render(report=report)


def _embed(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
