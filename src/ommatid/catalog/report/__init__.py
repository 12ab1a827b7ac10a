"""What was found, for reading: one page that needs no network, made from a catalogue alone.

`questions` are the SQL behind every number, `figures` the plots; `facts`, `tables`, `plots` and `features` make sections of both, `content`
puts them in order, `page` writes them as HTML.
"""

from ommatid.catalog.report.content import make_report
from ommatid.catalog.report.page import write_report
from ommatid.catalog.report.parts import Report

__all__ = ["Report", "make_report", "write_report"]
