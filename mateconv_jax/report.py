"""Curves and results of training runs on one page:  python -m mateconv_jax.report runs/a [runs/b …] [--output report.html]"""

import argparse
import sys
from pathlib import Path

from mateconv_jax import files
from mateconv_jax.errors import UserError, exit_code, program
from mateconv_jax.reporting.history import read_runs


def write_report(folders: list[str], output: str | None = None, smooth: int | None = None) -> Path:
    """Read run folders, running ones too, and write their report, aside and renamed.

    Args:
      output: .html for a page with tables and curves that needs no other file, .png for the curves alone; None: report.html in
        the first folder.
      smooth: steps over which thick lines are averaged; 0: no thick lines; None: 0.5 % of the longest run.

    Returns:
      Where the report is.

    Raises:
      UserError: no run or no metrics in a folder, or an output that cannot be.
    """
    path = Path(folders[0], "report.html") if output is None else Path(output)
    if path.suffix not in (".html", ".png"):
        raise UserError(f"--output: {output!r} is not possible (expected a name that ends in .html or .png)")
    if smooth is not None and smooth < 0:
        raise UserError(f"--smooth: {smooth} is not possible (expected a number of steps, 0 for none)")
    runs = read_runs(folders)
    if smooth is None:
        smooth = max(run.last_step for run in runs) // 200

    from mateconv_jax.reporting import curves, report_page  # matplotlib, 1 s, after the input is right

    content = curves.draw(runs, smooth, "png") if path.suffix == ".png" else report_page.html(runs, smooth).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(path) as written:
            written.write_bytes(content)
    except OSError as error:
        raise UserError(f"--output: cannot write {str(path)!r} ({error.strerror}; expected a place for a file)") from error
    return path


def main(args):
    print(write_report(args.runs, args.output, args.smooth))


def parse_args(argv):
    parser = argparse.ArgumentParser(prog=program("report"), description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; several are drawn over each other")
    parser.add_argument("--output", metavar="FILE", help=".html or .png; default: report.html in the first run folder")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="average over about N steps; 0: not at all; default: 0.5%% of the run"
    )
    return parser.parse_args(argv)


def command() -> int:
    """What `mateconv-report` runs."""
    return exit_code(main, parse_args(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(command())
