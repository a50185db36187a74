"""Reports: text tables and one HTML page over the workdirs of runs."""

from lcm.report.page import write
from lcm.report.runs import ReportError, read_all
from lcm.report.sections import Picture, Published, Section
from lcm.report.tables import summary

__all__ = [
    "Picture",
    "Published",
    "ReportError",
    "Section",
    "read_all",
    "summary",
    "write",
]
