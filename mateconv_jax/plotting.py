"""Shared by all figures: colors, a style, a font with Chinese characters, and tick labels."""

import contextlib
import functools
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import matplotlib.style
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, RED, GREEN, DARK = "#5b84b9", "#c9605c", "#6f9f78", "#555555"


@contextlib.contextmanager
def style(**changes) -> Generator[None]:
    """Inside the block, matplotlib's defaults with our changes. The user's settings are neither used nor changed."""
    ours = {
        "font.family": font().get_name(),
        "font.size": 10,
        "text.parse_math": False,  # a "$" in a name is literal
        "axes.unicode_minus": False,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.labelcolor": "#333333",
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "xtick.color": DARK,
        "ytick.color": DARK,
    }
    with matplotlib.style.context(["default", ours | changes]):
        yield


@functools.cache
def font() -> FontProperties:
    """Noto Sans CJK SC from the package mplfonts, registered for this process only."""
    fontManager.addfont(_font_file())
    return FontProperties(fname=_font_file())


def _font_file() -> Path:
    package = find_spec("mplfonts")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "fonts" / "NotoSansCJKsc-Regular.otf"


def drawable(text: str) -> str:
    """`text` with escapes for unprintable characters and those the font does not have."""
    face = get_font(_font_file())
    return "".join(
        character
        if character.isprintable() and face.get_char_index(ord(character))
        else character.encode("unicode_escape").decode()
        for character in text
    )


def log_ticks(axis: Axis) -> None:
    """Put ticks at round numbers on a logarithmic axis, formatted by `short`."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=10))
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_formatter(NullFormatter())


def short(n: float, position: int | None = None) -> str:
    """Format as 9,999 or 10k or 2.35M. `position` is passed by matplotlib and ignored."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= max(factor, 10_000):
            return f"{n / factor:.3g}{unit}"
    return f"{n:,g}"
