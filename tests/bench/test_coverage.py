"""The table of coverage keeps the rows that are not measured again."""

from __future__ import annotations

from bench.coverage import HEADER, table


def _row(stop: str, share: float) -> dict[str, object]:
    return {"stop": stop, "covered": [share] * 4, "ratios": [1.0, 1.0, None, 1.0], "products": 4.2}


def test_only_measured_rows_are_replaced() -> None:
    before = table(
        {
            "hutchpp": {"zero": {"seeds": 10, "rows": [_row("6 products", 0.5)]}},
            "xtrace": {
                "zero": {"seeds": 10, "rows": [_row("4 products", 0.5), _row("6 products", 0.5)]},
                "i^-1": {"seeds": 10, "rows": [_row("4 products", 0.5)]},
            },
        }
    )
    assert table({}, before) == before
    after = table({"xtrace": {"zero": {"seeds": 20, "rows": [_row("4 products", 0.9)]}}}, before)
    half, most = " | ".join(["50.0 %"] * 4), " | ".join(["90.0 %"] * 4)
    assert after.splitlines() == [
        *HEADER,
        f"| hutchpp | zero | 6 products | {half} | rounding | 4 | 10 |",
        f"| xtrace | i^-1 | 4 products | {half} | rounding | 4 | 10 |",
        f"| xtrace | zero | 4 products | {most} | rounding | 4 | 20 |",
    ]
