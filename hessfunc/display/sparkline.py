"""Small figures as inline SVG, in the colour of the text around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 320, 56, 4
# Room below the drawing for the numbers at its ends.
_TEXT = 16


def curve(x: Sequence[float], y: Sequence[float], /, *, title: str, filled: bool = False) -> str:
    """Return a line through the finite points, with the ends of the horizontal axis below it.

    Args:
        x: Horizontal coordinates in ascending order.
        y: Heights; the line has a gap where a height is not finite.
        title: Description for readers that cannot see the figure.
        filled: Whether the area below the line is shaded.
    """
    known = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not known:
        return ""
    across = _scale(x[0], x[-1], _MARGIN, _WIDTH - _MARGIN)
    heights = [b for _, b in known]
    up = _scale(min(heights), max(heights), _HEIGHT - _MARGIN, _MARGIN)
    path, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            path.append(f"{pen}{across(a):.1f} {up(b):.1f}")
        pen = "L" if math.isfinite(b) else "M"
    line = " ".join(path)
    # A single point has no line.
    cap = ' stroke-linecap="round"' if len(known) > 1 else ""
    if len(known) == 1:
        line += "h2"
    shapes = f'<path d="{line}" fill="none" stroke="currentColor" stroke-width="1.5"{cap}/>'
    if filled and len(known) > 1:
        first, last = across(known[0][0]), across(known[-1][0])
        area = f"{line} L{last:.1f} {_HEIGHT - _MARGIN} L{first:.1f} {_HEIGHT - _MARGIN}Z"
        shapes = f'<path d="{area}" fill="currentColor" fill-opacity="0.15"/>' + shapes
    return _drawn(title, shapes, x[0], x[-1])


def pins(values: Sequence[float], radii: Sequence[float], /, *, title: str) -> str:
    """Return values on the axis of numbers as pins, with the intervals around them as bars.

    Args:
        values: Values in any order.
        radii: Half-widths of the intervals.
        title: Description for readers that cannot see the figure.
    """
    known = [(v, r) for v, r in zip(values, radii, strict=True) if math.isfinite(v)]
    if not known:
        return ""
    low, high = min([0.0, *(v for v, _ in known)]), max([0.0, *(v for v, _ in known)])
    across = _scale(low, high, _MARGIN, _WIDTH - _MARGIN)
    floor = _HEIGHT - _MARGIN
    shapes = (
        f'<path d="M{_MARGIN} {floor}H{_WIDTH - _MARGIN}" stroke="currentColor" opacity="0.4"/>'
        f'<path d="M{across(0.0):.1f} {floor - 4}v8" stroke="currentColor" opacity="0.4"/>'
    )
    for value, radius in known:
        at = across(value)
        left, right = (
            min(max(across(end), 0.0), float(_WIDTH))
            for end in ((value - radius, value + radius) if math.isfinite(radius) else (low, high))
        )
        shapes += (
            f'<path d="M{at:.1f} {floor}V14" stroke="currentColor" stroke-width="1.2"/>'
            f'<path d="M{left:.1f} 10H{max(right, left + 0.1):.1f}" stroke="currentColor" '
            'stroke-width="5" opacity="0.35"/>'
            f'<circle cx="{at:.1f}" cy="10" r="3" fill="currentColor"/>'
        )
    return _drawn(title, shapes, low, high)


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Return the affine map from one interval to another; from a point, to the middle."""

    def placed(x: float) -> float:
        share = (x - low) / (high - low) if high > low else 0.5
        return first + share * (last - first)

    return placed


def _drawn(title: str, shapes: str, low: float, high: float) -> str:
    """Return the SVG with the numbers at the ends of its axis."""
    text = 'fill="currentColor" font-size="11" opacity="0.7"'
    height = _HEIGHT + _TEXT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" style="max-width: 100%" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{shapes}'
        f'<text x="{_MARGIN}" y="{height - 4}" {text}>{_number(low)}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{height - 4}" text-anchor="end" {text}>{_number(high)}'
        "</text></svg>"
    )


def _number(x: float) -> str:
    return f"{x:.4g}".replace("-", "\N{MINUS SIGN}")
