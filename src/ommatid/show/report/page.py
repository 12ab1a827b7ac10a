"""The report as one HTML file, with styles and pictures inside, without scripts and links, and with everything from data escaped."""

import base64
from pathlib import Path

import jinja2

from ommatid.catalog.question import choose_sae
from ommatid.catalog.reader import Catalog
from ommatid.show.about import About, list_facts, make_headlines
from ommatid.show.pictures.page import write_whole
from ommatid.show.report.features import make_features
from ommatid.show.report.interventions import make_interventions
from ommatid.show.report.parts import Report
from ommatid.show.report.plots import make_densities, make_fidelity, make_layers, make_monosemanticity, make_scatter, make_scores
from ommatid.show.report.tables import make_controls, make_saes, make_stability, write_params
from ommatid.stage import REPORT
from ommatid.store import Artefact


def make_report(catalog: Catalog, sae: str | None = None) -> Report:
    """Make the report about an SAE, which compares it with its controls and with all other SAEs of the catalogue.

    Args:
        catalog: The open catalogue.
        sae: Name of the SAE; None for the one with the highest mean MS above its floor.

    Returns:
        The report.

    Raises:
        QueryError: There is no such SAE.
    """
    about = About(catalog, choose_sae(catalog, sae))
    plots = [make(about) for make in (make_monosemanticity, make_scores, make_densities, make_scatter)]
    sections = [make_saes(about), *make_layers(about), make_controls(about), make_fidelity(about), *plots, *make_features(about)]
    sections += [*make_interventions(about), *make_stability(about)]
    title = f"{about.run['model']}, {about.run['hookpoint']}"
    return Report(title, about.name, make_headlines(about), list_facts(about), tuple(sections), write_params(about))


def write_into(catalog: Artefact, reports: Path) -> Path:
    """Write the report about the artefact of `catalog` into the folder of reports, and return its file."""
    with Catalog(catalog.file("catalog.duckdb")) as opened:
        write_report(opened, reports / REPORT)
    return reports / REPORT


def write_report(catalog: Catalog, path: Path, sae: str | None = None) -> Report:
    """Write the report about an SAE of a catalogue. The same catalogue always gives the same bytes.

    Args:
        catalog: The open catalogue.
        path: HTML file to write.
        sae: Name of the SAE; None for the one with the highest mean MS above its floor.

    Returns:
        The report.

    Raises:
        QueryError: There is no such SAE, or the file cannot be written.
    """
    report = make_report(catalog, sae)
    write_whole(path, _as_html(report).encode())
    return report


def _as_html(report: Report) -> str:
    loader = jinja2.PackageLoader("ommatid", "show/templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["png"] = lambda picture: _embed(picture, "png")
    environment.filters["webp"] = lambda picture: _embed(picture, "webp")
    return environment.get_template("report.html").render(report=report)


def _embed(picture: bytes, kind: str) -> str:
    """Return a data URL with the picture."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
