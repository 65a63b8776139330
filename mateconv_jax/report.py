"""Report on training runs, with results and curves:  python -m mateconv_jax.report runs/a [runs/b …] [--output report.html]"""

import argparse
import os
import sys
from pathlib import Path

from mateconv_jax import files
from mateconv_jax.errors import UserError, exit_code, program
from mateconv_jax.reporting.history import MADE_BY, read_runs


def write_report(folders: list[str], output: str | None = None, smooth: int | None = None) -> Path:
    """Write a report on run folders, finished or still training.

    Args:
      output: a .html file (self-contained page with tables and curves) or .png file (only the curves); None: report.html in the
        first folder.
      smooth: averaging length of the thick lines in steps; 0: no thick lines; None: 0.5 % of the longest run.

    Returns:
      The report's path.

    Raises:
      UserError: a folder has no run or no metrics, or the output is invalid or cannot be written.
    """
    path = Path(folders[0], "report.html") if output is None else Path(output)
    if path.suffix not in (".html", ".png"):
        raise UserError(f"--output: {output!r} is invalid (expected a name that ends in .html or .png)")
    _check_ours(path)
    if smooth is not None and smooth < 0:
        raise UserError(f"--smooth: {smooth} is invalid (expected a number of steps, 0 for none)")
    runs = read_runs(folders)
    if smooth is None:
        smooth = max(run.last_step for run in runs) // 200

    from mateconv_jax.reporting import curves, report_page  # matplotlib takes 1 s, so it comes after checking the input

    content = curves.draw(runs, smooth, "png") if path.suffix == ".png" else report_page.html(runs, smooth).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(path) as written:
            written.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {str(path)!r} ({error.strerror}; expected a path that a file can be written to)"
        ) from error
    return path


def _check_ours(path: Path) -> None:
    """Raises UserError unless `path` is free or holds a report."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(1000)
    # The title: pages written before they said what had made them.
    if not any(mark in start for mark in (MADE_BY.encode(), b"<title>Training report: ")):
        raise UserError(f"--output: {str(path)!r} is not a report and is not replaced (choose another file)")


def main(args):
    print(write_report(args.runs, args.output, args.smooth))


def parse_args(argv):
    parser = argparse.ArgumentParser(prog=program("report"), description=__doc__)
    parser.add_argument(
        "runs", type=os.path.expanduser, nargs="+", metavar="RUN", help="a run folder; several are drawn into the same panels"
    )
    parser.add_argument(
        "--output", type=os.path.expanduser, metavar="FILE", help=".html or .png; default: report.html in the first run folder"
    )
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="average over about N steps; 0: off; default: 0.5%% of the longest run"
    )
    return parser.parse_args(argv)


def command() -> int:
    """Entry point of `mateconv-report`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
