"""What was found, for reading: one page that needs no network, made from a catalogue alone.

`tables`, `plots` and `features` make the sections, each beside the SQL behind it; `parts` says what a section is made of, and `page` puts
the sections in order and writes them as HTML.
"""

from ommatid.show.report.page import make_report, write_into, write_report
from ommatid.show.report.parts import Report

__all__ = ["Report", "make_report", "write_into", "write_report"]
