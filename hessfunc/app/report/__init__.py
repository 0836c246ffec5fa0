"""Results of an analysis as a terminal table, as JSON, and as an HTML page."""

from hessfunc.app.report.content import NAMES, Invocation, Part, Subject, as_json, as_text, content
from hessfunc.app.report.folder import Folder
from hessfunc.app.report.rows import Number, Row, brief, headline, plain, rows, table
from hessfunc.app.report.sections import page
from hessfunc.app.report.training import training

__all__ = [
    "Folder",
    "Part",
    "Invocation",
    "Subject",
    "NAMES",
    "content",
    "as_json",
    "as_text",
    "Number",
    "Row",
    "rows",
    "headline",
    "brief",
    "plain",
    "table",
    "page",
    "training",
]
