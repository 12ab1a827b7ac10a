"""The report, put together."""

from ommatid.catalog import Catalog
from ommatid.catalog.pictures import choose_sae
from ommatid.catalog.report.about import About
from ommatid.catalog.report.facts import list_facts, make_headlines, write_params
from ommatid.catalog.report.features import make_features
from ommatid.catalog.report.parts import Report
from ommatid.catalog.report.plots import make_densities, make_fidelity, make_monosemanticity, make_scatter, make_scores
from ommatid.catalog.report.tables import make_controls, make_saes, make_stability


def make_report(catalog: Catalog, sae: str | None = None) -> Report:
    """The report about an SAE of a catalogue, beside its controls and all other SAEs.

    Args:
        catalog: Open.
        sae: Name of the SAE; None is the one with the highest mean MS above its floor.

    Raises:
        QueryError: there is no such SAE.
    """
    about = About(catalog, choose_sae(catalog, sae))
    plots = [make(about) for make in (make_monosemanticity, make_scores, make_densities, make_scatter)]
    sections = [make_saes(about), make_controls(about), make_fidelity(about), *plots, *make_features(about), *make_stability(about)]
    title = f"{about.run['model']}, {about.run['hookpoint']}"
    return Report(title, about.name, make_headlines(about), list_facts(about), tuple(sections), write_params(about))
