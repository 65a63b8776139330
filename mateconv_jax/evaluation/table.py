"""Tables of numbers on a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_numbers(lines: list[str], corner: str, headings: list[str], rows: dict[str, list[str]]) -> None:
    """Print lines of text and a table. In a narrow terminal headings and names of rows wrap; numbers and words do not.

    Args:
      corner: what the names of the rows are.
      rows: {name: a cell for each heading}, not empty.
    """
    table = Table(escape(corner), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading, cells in zip(headings, zip(*rows.values(), strict=True), strict=True):
        table.add_column(escape(heading), justify="right", min_width=max(map(len, (*cells, *heading.split()))))
    for name, cells in rows.items():
        table.add_row(escape(name), *cells)
    console = Console()
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(table)
