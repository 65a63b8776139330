"""What a tokenizer holds, on the terminal."""

from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer.pieces import readable, visible
from mateconv_jax.data.tokenizer.report import ALL_SAMPLES, EXAMPLES
from mateconv_jax.data.tokenizer.tokenizer import encode

CONTROL_TOKENS = 40  # listed at most


def print_vocabulary(tokenizer: PreTrainedTokenizerFast, containing: str = "", compare=None) -> None:
    """Tokens whose text contains `containing`, a line each, by id: id, tab, text; with another tokenizer, a tab and the id of
    the same text there, or nothing."""
    ids = sorted(tokenizer.get_vocab().values())
    there = {}
    if compare:
        others = sorted(compare.get_vocab().values())
        there = dict(zip(readable(compare, others), others, strict=True))
    for token, text in zip(ids, readable(tokenizer, ids), strict=True):
        if containing in text:
            print(token, visible(text), *([there.get(text, "")] if compare else []), sep="\t")


def print_encoding(tokenizer: PreTrainedTokenizerFast, text: str, name: str) -> None:
    """The pieces of a text, together and a line each with their ids."""
    ids = encode(tokenizer, [text])[0]
    pieces = [visible(piece) for piece in readable(tokenizer, ids)]
    each = f", {len(text) / len(ids):.2f} in each" if ids else ""
    print(f"{name}: {len(text):,} characters in {len(ids):,} tokens{each}")
    print("│".join(pieces))
    for token, piece in zip(ids, pieces, strict=True):
        print(token, piece, sep="\t")


def print_report(report: dict, name: str, compare_name: str | None = None) -> None:
    """A `report`, on standard output; without a terminal in 80 columns and without colours."""
    console = Console(highlight=False)
    console.print(Text(name, "bold"))
    console.print(_facts(_vocabulary_facts(report, compare_name)))
    console.print(_kinds(report))
    longest = {"longest, Han": report["longest"]["Han"], "longest, other": report["longest"]["other"]}
    console.print(_facts({name: _words(texts) for name, texts in {**longest, "from all ranks": report["sample"]}.items()}))
    console.print(_compression(report, name, compare_name))
    unknown = {name: report} if compare_name is None else {name: report, compare_name: report["compare"]}
    for folder, one in unknown.items():
        if n := _unknown(one["compression"]):
            console.print(Text(f"  unknown tokens in these texts, {_short(folder)}: {n:,}"))
    _print_round_trip(report["round_trip"], console)
    if report["read_from_text"]:
        console.print(
            Text(f"  written in a text, these become control tokens: {'  '.join(map(visible, report['read_from_text']))}")
        )


def _words(texts: Iterable[str]) -> Text:
    return Text("  ").join(Text(visible(text)) for text in texts)


def _vocabulary_facts(report: dict, compare_name: str | None) -> dict[str, Text]:
    special = report["special_tokens"]
    digits = {0: "none", 1: "one token each"}.get(report["longest_number"], f"up to {report['longest_number']} in a token")
    facts = {
        "kind": Text(report["kind"]),
        "vocabulary": Text(f"{report['vocab_size']:,} tokens, {len(special)} of them control tokens"),
        "bytes": Text("none are tokens" if report["bytes"] is None else f"{report['bytes']} of 256 are tokens"),
        "digits": Text(digits),
        "chat template": Text("yes" if report["chat_template"] else "no"),
        "control tokens": Text("  ").join(
            Text(f"{token['id']}:{visible(token['text'])}" + "".join(f"({role})" for role in token["roles"]))
            for token in special[:CONTROL_TOKENS]
        ),
    }
    if len(special) > CONTROL_TOKENS:
        facts["control tokens"] += Text(f"  and {len(special) - CONTROL_TOKENS:,} more")
    if report["compare"]:
        facts["compared with"] = Text(
            f"{compare_name}, {report['compare']['vocab_size']:,} tokens, {report['compare']['shared_tokens']:,} in both"
        )
    return facts


def _kinds(report: dict) -> Table:
    kinds = Table(box=box.SIMPLE_HEAD, expand=True)
    kinds.add_column("tokens by kind", no_wrap=True)
    kinds.add_column("", justify="right", no_wrap=True)
    kinds.add_column("the first of them", no_wrap=True, overflow="ellipsis", ratio=1)
    for kind, n in report["tokens_by_kind"].items():
        kinds.add_row(kind, f"{n:,}", _words(report["examples"][kind]))
    return kinds


def _compression(report: dict, name: str, compare_name: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kind of text", min_width=16, overflow="fold")
    table.add_column("characters", justify="right")
    table.add_column("bytes\na token", justify="right")
    table.add_column(Text("characters\na token" + (f",\n{_short(name)}" if report["compare"] else "")), justify="right")
    if compare_name is not None:
        table.add_column(Text(f"\n\n{_short(compare_name)}"), justify="right")
        table.add_column("\n\ndifference", justify="right")
    for kind, counts in report["compression"].items():
        row = [f"{counts['characters']:,}", _two_digits(counts["bytes_per_token"]), _two_digits(counts["characters_per_token"])]
        if report["compare"]:
            other = report["compare"]["compression"][kind]
            row += [_two_digits(other["characters_per_token"]), _change(counts, other)]
        table.add_row(Text(Path(kind).name), *map(Text, row))
    return table


def _print_round_trip(round_trip: dict, console: Console) -> None:
    failed = round_trip["failed"]
    checked = f"{round_trip['checked']:,} texts encoded and decoded"
    console.print(Text(f"  round trip: {checked}, {f'{len(failed):,} came back changed' if failed else 'all as they were'}"))
    if failed:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("text", "has", "came back with"):
            table.add_column(heading, overflow="fold")
        for failure in failed[:EXAMPLES]:
            table.add_row(Text(failure["name"]), *(Text(visible(failure[key])) for key in ("text", "decoded")))
        console.print(table)
    if len(failed) > EXAMPLES:
        console.print(Text(f"  and {len(failed) - EXAMPLES:,} more"))


def _facts(facts: dict):
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, fact in facts.items():
        grid.add_row(Text(f"  {name}", "bold"), fact)
    return grid


def _short(folder: str) -> str:
    return Path(folder).resolve().name


def _two_digits(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _change(counts: dict, other: dict) -> str:
    """How much more of the text a token holds than in the other tokenizer."""
    return f"{other['tokens'] / counts['tokens'] - 1:+.1%}" if counts["tokens"] else "-"


def _unknown(compression: dict[str, dict]) -> int:
    return sum(counts["unknown"] for kind, counts in compression.items() if kind != ALL_SAMPLES)
