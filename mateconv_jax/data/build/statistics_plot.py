"""stats.png: a prepared dataset at a glance."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mateconv_jax import files, plotting
from mateconv_jax.data.tokenizer.pieces import visible
from mateconv_jax.plotting import BLUE, DARK, GREEN, RED, drawable, log_ticks, short

MOST_RULES = 12  # bars in the panel of rejects; one more sums up the rest
LONGEST_LABEL = 30  # characters of a rule, to leave room for the bars

SCRIPT_LABELS = {
    "han": "汉字 Han",
    "latin": "拉丁字母 Latin",
    "digits": "数字 digits",
    "punctuation": "标点 punctuation",
    "whitespace": "空白 whitespace",
    "kana": "假名 kana",
    "hangul": "谚文 Hangul",
    "bopomofo": "注音 Bopomofo",
    "greek": "希腊字母 Greek",
    "cyrillic": "西里尔字母 Cyrillic",
    "symbols": "符号 symbols",
    "other": "其他 other",
}
RULE_LABELS = {
    "invalid_json": "JSON 无效",
    "invalid_utf8": "UTF-8 无效",
    "lone_surrogate": "孤立代理项",
    "not_an_object": "不是对象",
    "no_text": "没有文本",
    "empty": "空文本",
    "too_short": "过短",
    "too_long": "过长",
    "repetition": "重复内容",
    "low_han_ratio": "汉字过少",
    "duplicate": "完全重复",
    "near_duplicate": "近似重复",
    "control_characters": "控制字符",
    "no_such_token": "词表外 token",
    "broken_file": "文件损坏",
}


def write_plot(summary: dict, path: Path) -> None:
    """Draw a `statistics.summary` as a PNG of 1,800 x 1,260 pixels, written aside and renamed.

    Equal summaries give equal bytes: the user's matplotlib settings are neither used nor changed.
    """
    with plotting.style():
        figure = Figure(
            figsize=(12, 8.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.03, hspace=0.03)
        )
        FigureCanvasAgg(figure)
        figure.suptitle(_title(summary), fontsize=13, linespacing=1.7)
        (lengths, ranks), (rejects, scripts) = figure.subplots(2, 2)
        _draw_lengths(lengths, summary)
        _draw_ranks(ranks, summary)
        _draw_rejects(rejects, summary)
        _draw_scripts(scripts, summary)
        with files.aside(path) as written:
            figure.savefig(written, format="png", metadata={"Software": None})


def _title(summary: dict) -> str:
    vocabulary = summary["vocabulary"]
    amounts = [
        f"{summary['documents']:,} 文档 documents",
        f"{summary['characters']:,} 字符 characters",
        f"{summary['tokens']:,} token",
        f"{summary['rows']:,} 行 rows",
    ]
    rates = [f"词表使用 vocabulary used {vocabulary['used']:,} / {vocabulary['size']:,} ({vocabulary['used_share']:.1%})"]
    if summary["characters"]:
        rates.insert(0, f"每 token 字符数 characters per token {summary['characters_per_token']:.3f}")
    if summary["unknown_token_rate"] is not None:
        rates.append(f"未知 token unknown {100 * summary['unknown_token_rate']:.3g}%")
    return "   ·   ".join(amounts) + "\n" + "   ·   ".join(rates)


# ---- panels -------------------------------------------------------------------------------------------------------


def _draw_lengths(axes: Axes, summary: dict) -> None:
    histogram, length = summary["length_histogram"], summary["document_length"]
    axes.set_title("文档长度分布 Document length")
    if not histogram["counts"]:
        return _draw_none(axes)
    highest = max(histogram["counts"])
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=BLUE)
    for name, label, line in (("p50", "中位数 median", "-"), ("mean", "平均 mean", "--"), ("p95", "P95", ":")):
        axes.vlines(length[name], 0, 1.04 * highest, RED, line, linewidth=1.4, label=f"{label} {length[name]:,.0f}")
    axes.set_xscale("log")
    if len(histogram["counts"]) == 1:
        axes.set_xlim(histogram["edges"][0] / 2, histogram["edges"][1] * 2)
    axes.set_ylim(0, 1.22 * highest)  # room for the legend
    legend = axes.legend(loc="upper center", ncols=3, fontsize=9, handlelength=1.5, columnspacing=1.5)
    legend.get_frame().set(edgecolor="none", alpha=1)
    axes.set_xlabel("文档长度（token）Tokens per document")
    axes.set_ylabel("文档数 Documents")
    log_ticks(axes.xaxis)
    _linear_ticks(axes.yaxis)
    axes.grid(axis="y")


def _draw_ranks(axes: Axes, summary: dict) -> None:
    ranks = summary["token_ranks"]
    axes.set_title("词频与排名 Token frequency by rank")
    if not ranks["rank"]:
        return _draw_none(axes)
    axes.loglog(ranks["rank"], ranks["count"], color=BLUE, linewidth=2, marker="o" if len(ranks["rank"]) == 1 else "")
    top = "最常见 most frequent:"
    for token in summary["top_tokens"]:
        text = drawable(visible(token["text"]))
        if _width(top + text) < 62 and not token["control"]:
            top += f"  {text}"
    axes.set_xlabel(f"排名 Rank\n{top}", linespacing=1.6)
    axes.set_ylabel("出现次数 Occurrences")
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    axes.grid()


def _width(text: str) -> int:
    """In units of half a Chinese character."""
    return sum(1 + (character > "\u2e80") for character in text)


def _draw_rejects(axes: Axes, summary: dict) -> None:
    axes.set_title("剔除的文档 Rejected documents")
    rejects = list(summary["rejects"].items())
    bars = [(f"{RULE_LABELS.get(rule, '')} {rule}".strip(), n) for rule, n in rejects[:MOST_RULES]]
    if len(rejects) > MOST_RULES:
        bars.append(("其他 others", sum(n for _, n in rejects[MOST_RULES:])))
    _draw_bars(axes, bars, RED, "文档数 Documents")


def _draw_scripts(axes: Axes, summary: dict) -> None:
    axes.set_title("字符类别 Characters by script")
    counts = sorted(summary["characters_by_script"].items(), key=lambda item: -item[1])
    _draw_bars(axes, [(SCRIPT_LABELS[script], n) for script, n in counts if n], GREEN, "字符数 Characters")


def _draw_bars(axes: Axes, bars: list[tuple[str, int]], color: str, x_label: str) -> None:
    """Horizontal bars, the first on top, labelled with their count and share of the total."""
    if not bars:
        return _draw_none(axes)
    labels, counts = zip(*bars, strict=True)
    places = range(len(bars))
    drawn = axes.barh(places, counts, color=color, height=0.65)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(drawn, [_with_share(n, sum(counts)) for n in counts], padding=4, color=DARK, fontsize=9, bbox=white)
    axes.set_yticks(places, [drawable(label)[:LONGEST_LABEL] for label in labels])
    axes.set_ylim(max(len(bars), 5) - 0.5, -0.5)
    axes.set_xlim(0, 1.4 * max(counts))  # room for the longest bar's label
    axes.set_xlabel(x_label)
    axes.tick_params(axis="y", length=0)
    _linear_ticks(axes.xaxis)
    axes.grid(axis="x")


def _with_share(n: int, total: int) -> str:
    share = f"{n / total:.2%}" if n >= total / 10_000 else "<0.01%"
    return f"{short(n)}  ({share})"


def _draw_none(axes: Axes) -> None:
    axes.text(0.5, 0.5, "无 none", transform=axes.transAxes, ha="center", va="center", color=DARK, fontsize=14)
    axes.set_xticks([])
    axes.set_yticks([])


# ---- numbers on axes ----------------------------------------------------------------------------------------------


def _linear_ticks(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
    axis.set_major_formatter(FuncFormatter(short))
