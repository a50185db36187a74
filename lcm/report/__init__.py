"""Reports: text tables and one HTML page over the workdirs of runs."""

from lcm.report.accuracy import accuracy, accuracy_picture
from lcm.report.analyses import analysis_summary
from lcm.report.page import publish, write
from lcm.report.runs import ReportError, read_all, read_result
from lcm.report.sections import (
    Picture,
    Published,
    Section,
    provenance,
    published_beside_measured,
)
from lcm.report.tables import summary

__all__ = [
    "Picture",
    "Published",
    "ReportError",
    "Section",
    "accuracy",
    "accuracy_picture",
    "analysis_summary",
    "provenance",
    "publish",
    "published_beside_measured",
    "read_all",
    "read_result",
    "summary",
    "write",
]
