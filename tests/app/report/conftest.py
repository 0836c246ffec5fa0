"""The content and the page of an analysis."""

from typing import Any

import pytest

from hessfunc.app import report
from tests.app.report.cases import PARTS, RUN, SUBJECT


@pytest.fixture
def content() -> dict[str, Any]:
    return report.content(RUN, SUBJECT, PARTS, status="complete")


@pytest.fixture
def page(content: dict[str, Any]) -> str:
    return report.page(content, {"density": b"\x89PNG"})
