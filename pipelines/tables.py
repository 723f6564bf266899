"""Aligned text tables for the terminal."""

import shutil
import textwrap
from collections.abc import Sequence


def listed(items: Sequence[str], most: int = 3) -> str:
    """The first items in a row, and how many there are besides."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def size_words(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.3g} MB"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """The rows under their headers, columns two spaces apart; the last column wraps at `width` characters.

    Args:
        headers: One per column.
        rows: Each with one cell per column; a cell is shown by `str`.
        width: The number of characters; by default the terminal's.
    """
    lines = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = max((width or shutil.get_terminal_size((100, 24)).columns) - indent, 24)
    shown = []
    for line in lines:
        lead = "".join(f"{cell:<{size}}  " for cell, size in zip(line[:-1], widths, strict=False))
        wrapped = textwrap.wrap(line[-1], room) or [""]
        shown += [(lead + wrapped[0]).rstrip(), *(" " * indent + rest for rest in wrapped[1:])]
    return "\n".join(shown)
