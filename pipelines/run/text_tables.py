"""Tables as text: aligned columns for a terminal, Markdown for documents, and the numbers in their cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def number(value: float | None, digits: int = 2, scale: float = 1.0, none: str = "-") -> str:
    """`value * scale` with so many decimals; `none` where there is no value (None or NaN)."""
    return none if value is None or math.isnan(value) else f"{value * scale:.{digits}f}"


def estimate(
    found: Mapping[str, Any] | None, digits: int = 3, scale: float = 1.0, interval: bool = True,
    form: Callable[[float | None, int], str] = number,
) -> str:
    """A mean with its interval: `97.9 [93.2, 100.0]`.

    Args:
        found: `value`, `low` and `high` (see `evaluate.statistics`); `low` None where there is no interval; None: no
            estimate.
        digits: decimals.
        scale: 100 for percent.
        interval: False: the mean alone.
        form: writes a number with so many decimals, and None.
    """
    if found is None:
        return form(None, digits)
    text = form(found["value"] * scale, digits)
    if not interval or found["low"] is None:
        return text
    return f"{text} [{form(found['low'] * scale, digits)}, {form(found['high'] * scale, digits)}]"


def aligned(rows: Iterable[Sequence[object]], *columns: str, gap: str = "  ") -> str:
    """Rows as lines of aligned columns; a column is as wide as its widest cell. No line ends in spaces.

    Args:
        rows: one cell a column each; a head is a row like any other.
        columns: `<` or `>` for a column on the left or on the right, and its least width: `<`, `>10`. Columns that are
            not named are on the left.
        gap: between two columns.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    columns = (*columns, *["<"] * (max(map(len, rows), default=0) - len(columns)))
    least = (int(spec[1:] or 0) for spec in columns)
    widths = [max([width, *(len(row[i]) for row in rows if i < len(row))]) for i, width in enumerate(least)]
    return "\n".join(
        gap.join(f"{cell:{spec[0]}{width}}" for cell, spec, width in zip(row, columns, widths, strict=False)).rstrip()
        for row in rows
    )


def markdown(rows: Iterable[Sequence[object]], columns: str = "<>") -> str:
    """A Markdown table. Pipes and line breaks inside cells are escaped.

    Args:
        rows: the first is the head.
        columns: `<` or `>` for each column; the last one stands for all that follow.

    Raises:
        ValueError: there is no head.
    """
    head, *body = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    sides = columns + columns[-1] * (len(head) - len(columns))
    rule = ["---:" if side == ">" else "---" for side in sides[: len(head)]]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
