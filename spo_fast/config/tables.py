"""Tables as text: markdown, aligned columns, sizes."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first of them the head, as an aligned table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, two blanks between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit below them, GiB at most."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
