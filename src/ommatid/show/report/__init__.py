"""What was found, for reading: one page that needs no network, made from a catalogue alone.

`queries` holds the SQL behind every number; `tables`, `plots` and `features` make the sections, and `page` puts them in order and writes
them as HTML.
"""

from ommatid.show.report.page import make_report, write_into, write_report
from ommatid.show.report.parts import Report

__all__ = ["Report", "make_report", "write_into", "write_report"]
