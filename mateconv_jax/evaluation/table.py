"""Tables of numbers on a terminal."""

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LONGEST_NAME = 24  # columns; longer names wrap


def print_numbers(lines: list[str], corner: str, headings: list[str], rows: dict[str, list[str]]) -> None:
    """Print lines of text and a table. Headings wrap, numbers do not: the table may be wider than the terminal.

    Args:
      corner: what the names of the rows are.
      rows: {name: a cell for each heading}, not empty.
    """
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(escape(corner), overflow="fold", min_width=min(LONGEST_NAME, max(map(cell_len, (corner, *rows)))))
    for heading, cells in zip(headings, zip(*rows.values(), strict=True), strict=True):
        table.add_column(escape(heading), justify="right", min_width=max(map(len, (*cells, *heading.split()))))
    for name, cells in rows.items():
        table.add_row(escape(name), *cells)
    console = Console()
    console.width = max(console.width, Console(width=1000).measure(table).minimum)  # a measure is never above the width
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(table)
