"""The report as one HTML file: styles and pictures inside, no script, no network, everything from data escaped."""

import base64
from pathlib import Path

import jinja2

from ommatid.catalog import Catalog
from ommatid.catalog.report.content import make_report
from ommatid.catalog.report.parts import Report
from ommatid.catalog.whole import write_whole


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
    write_whole(path, _as_html(report).encode())
    return report


def _as_html(report: Report) -> str:
    loader = jinja2.PackageLoader("ommatid", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["png"] = lambda picture: _embed(picture, "png")
    environment.filters["webp"] = lambda picture: _embed(picture, "webp")
    return environment.get_template("report.html").render(report=report)


def _embed(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
