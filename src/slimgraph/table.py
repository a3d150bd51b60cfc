"""Plain text tables."""

from collections.abc import Sequence


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, footer: Sequence[object] | None = None
) -> str:
    """Rows under a header in aligned columns; `footer` is one more row, set off by a line.

    Integers get thousands separators. A column whose cells are all numbers is aligned to the right.

    >>> print(text_table(["layer", "MACs"], [["conv1", 118013952], ["fc", 512000]]))
    layer         MACs
    ------------------
    conv1  118,013,952
    fc         512,000
    """
    body = [*rows, *([footer] if footer is not None else [])]
    columns = range(len(header))
    to_right = [bool(rows) and all(isinstance(row[column], (int, float)) for row in rows) for column in columns]
    lines = [list(header), *([_cell(value) for value in row] for row in body)]
    widths = [max(len(line[column]) for line in lines) for column in columns]

    def text(line: Sequence[str]) -> str:
        cells = zip(line, widths, to_right, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    printed = [text(line) for line in lines]
    if footer is not None:
        printed.insert(-1, rule)
    return "\n".join([printed[0], rule, *printed[1:]])
