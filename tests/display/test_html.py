"""HTML of a summary."""

from hessfunc.display.html import page


def test_texts_are_escaped_and_the_figure_is_not() -> None:
    html = page("A<b>", {"x_y": "1 < 2 & 'q'"}, "<svg></svg>")
    assert "A&lt;b&gt;" in html
    assert "1 &lt; 2 &amp; &#x27;q&#x27;" in html
    assert "x y" in html
    assert html.endswith("<svg></svg></div>")


def test_a_summary_without_a_figure() -> None:
    assert "None" not in page("A", {}, None)
