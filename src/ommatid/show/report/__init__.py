"""What was found, for reading: one page that needs no network, made from a catalogue alone.

`questions` are the SQL behind every number, `figures` the plots; `facts`, `tables`, `plots` and `features` make sections of both, `content`
puts them in order, `page` writes them as HTML.
"""

from ommatid.show.report.page import make_report, write_report
from ommatid.show.report.parts import Report

__all__ = ["Report", "make_report", "write_report"]
