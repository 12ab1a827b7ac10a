"""The report about what an SAE found: one HTML page, made from a catalogue alone, that needs no network.

`tables`, `plots` and `features` make the sections and hold their SQL. `parts` defines what a section consists of. `page` puts the sections
in order and writes them as HTML.
"""

from ommatid.show.report.page import make_report, write_into, write_report
from ommatid.show.report.parts import Report

__all__ = ["Report", "make_report", "write_into", "write_report"]
