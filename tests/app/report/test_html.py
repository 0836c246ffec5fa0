"""Pages that need nothing but themselves."""

import json
import re
from typing import Any

from hessfunc.app import report
from hessfunc.app.report import html
from tests.app.report.documents import parsed

NASTY = "<script>alert('&amp;')</script>\"$target"


def test_it_is_well_formed_and_its_labels_lead_somewhere(page: str) -> None:
    document = parsed(page)
    assert page.startswith("<!doctype html>")
    ids = [e.attributes["id"] for e in document.elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    labels = [e.attributes.get("aria-labelledby") for e in document.elements]
    assert set(filter(None, labels)) <= set(ids)
    assert document.all("html")[0].attributes["lang"] == "en"
    assert all(image.attributes["alt"] for image in document.all("img"))
    assert [len(document.all(tag)) for tag in ("h1", "main", "figure", "section")] == [1, 1, 3, 4]


def test_it_needs_no_network(page: str) -> None:
    document = parsed(page)
    for element in document.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (element.attributes.get(name) or "data:").startswith("data:")
    style, *others = document.all("style")
    assert not others
    assert "url(" not in style.text
    assert "@import" not in style.text
    policies = [m for m in document.all("meta") if "http-equiv" in m.attributes]
    assert str(policies[0].attributes["content"]).startswith("default-src 'none'; ")


def test_text_is_escaped_everywhere(content: dict[str, Any]) -> None:
    content["subject"] |= {"target": NASTY, "dtype": NASTY, "device": NASTY}
    content["run"]["command"] = content["run"]["began"] = content["status"] = NASTY
    content["versions"] = {NASTY: NASTY}
    content["results"]["trace"] |= {"by_leaf": {NASTY: 1.0}, "reason": NASTY}
    document = parsed(report.page(content, {}))
    assert len(document.all("script")) == 2
    assert json.loads(document.all("script")[0].text) == content
    assert [element.text for element in document.all("h1")] == [NASTY]
    assert document.all("code")[0].text == NASTY
    assert sum(NASTY in element.text for element in document.all("td") + document.all("th")) == 2


def test_colours_have_contrast_in_light_and_dark(page: str) -> None:
    schemes = re.findall(r"--ground: .*?\}", parsed(page).all("style")[0].text, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        of = dict(re.findall(r"--(\w+): #(\w{6})", scheme))
        for ground in (of["ground"], of["raised"]):
            assert min(contrast(of[name], ground) for name in ("text", "quiet")) > 4.5
        assert min(contrast(of[name], of["ground"]) for name in ("first", "second")) > 4.5


def contrast(one: str, other: str) -> float:
    """As the Web Content Accessibility Guidelines 2.2 define it."""
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(share * p for share, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_command_line_is_broken_between_its_words() -> None:
    assert html.command("a --out='b'") == (
        "<code><span>a</span> <span>--out=&#x27;b&#x27;</span></code>"
    )
