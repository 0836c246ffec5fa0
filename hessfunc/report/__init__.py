"""What was found: a table for people, JSON for programs, a page for the browser."""

from hessfunc.report.content import NAMES, Part, Run, Subject, as_json, as_text, content
from hessfunc.report.folder import Folder
from hessfunc.report.page import page
from hessfunc.report.rows import Number, Row, brief, headline, plain, rows
from hessfunc.report.table import table
from hessfunc.report.training import training

__all__ = [
    "Folder",
    "Part",
    "Run",
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
