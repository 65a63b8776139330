"""What a tokenizer holds and how well it serves: its vocabulary as text, compression by kind of text, and round trips."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mateconv_jax.data.tokenizer.pieces import BYTES, is_byte_level, read_pieces, readable, visible
from mateconv_jax.data.tokenizer.samples import HARD_CASES, SAMPLES

if TYPE_CHECKING:  # its import costs 2 s, and workers of `prepare` import `readable`
    from transformers import PreTrainedTokenizerFast

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KINDS = {  # of tokens, by what the whole text is but for spaces around it; the first that fits
    "white space": re.compile(r"[^\S\x1c-\x1f]*"),
    "Han, 1 character": re.compile(f"[{HAN}]"),
    "Han, 2 characters": re.compile(f"[{HAN}]{{2}}"),
    "Han, 3 characters": re.compile(f"[{HAN}]{{3}}"),
    "Han, 4 and more": re.compile(f"[{HAN}]{{4,}}"),
    "Latin letters": re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+"),
    "digits": re.compile(r"\d+"),
    "punctuation, symbols": re.compile(r"(?:[^\w\s]|_)+"),
    "other": re.compile(".*", re.DOTALL),
}
ALL_SAMPLES = "all of these"
PARTS, CONTROL = "parts of a character", "control tokens"
EXAMPLES = 12  # of each kind, and of the longest
SAMPLE_TOKENS = 60
CONTROL_TOKENS = 40  # listed on the terminal
CONTEXT = 6  # characters shown on both sides of where a round trip went wrong

# ---- the report ---------------------------------------------------------------------------------------------------


def report(
    tokenizer: "PreTrainedTokenizerFast",
    texts: dict[str, list[str]] | None = None,
    compare: "PreTrainedTokenizerFast | None" = None,
) -> dict:
    """All that `inspect` shows, ready for JSON.

    Args:
      texts: kind: texts to compress and to send round, besides the built-in samples.
      compare: another tokenizer, for its compression of the same texts.

    Returns:
      kind, vocab_size, special_tokens, chat_template, bytes (of 256 in the vocabulary; None where bytes are no tokens),
      longest_number (digits in one token), tokens_by_kind {kind: count}, examples {kind: texts}, longest {"Han", "other"},
      sample, compression {kind of text: counts and ratios}, round_trip {"checked", "failed"}, read_from_text (control tokens
      that come out of plain text), compare (None without).
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special_tokens = _special_tokens(tokenizer)
    control = {token["id"] for token in special_tokens}
    ids = sorted(tokenizer.get_vocab().values())
    by_kind: dict[str, list[str]] = {kind: [] for kind in (CONTROL, *KINDS, PARTS)}
    for token, (text, whole) in zip(ids, read_pieces(tokenizer, ids), strict=True):
        by_kind[CONTROL if token in control else _kind(text) if whole else PARTS].append(text)
    han = [text for kind in KINDS if kind.startswith("Han") for text in by_kind[kind]]
    others = [text for kind in KINDS if not kind.startswith(("Han", "white")) for text in by_kind[kind]]
    ordinary = [token for token in ids if token not in control]
    evenly = [ordinary[i * len(ordinary) // SAMPLE_TOKENS] for i in range(SAMPLE_TOKENS)] if ordinary else []

    samples = {kind: [text] for kind, text in SAMPLES.items()}
    all_texts = {**samples, ALL_SAMPLES: [*SAMPLES.values()], **(texts or {})}
    cases = {**HARD_CASES, "control tokens as text": "</s><s>user\n" + "".join(token["text"] for token in special_tokens)}
    checked = [(name, text) for kinds in (samples, texts or {}) for name, some in kinds.items() for text in some]
    checked += cases.items()
    return {
        "kind": _describe(backend, is_byte_level(tokenizer)),
        "vocab_size": len(ids),
        "special_tokens": special_tokens,
        "chat_template": bool(tokenizer.chat_template),
        "bytes": _byte_tokens(tokenizer, backend),
        "longest_number": max((len(run) for text in others for run in re.findall(r"\d+", text)), default=0),
        "tokens_by_kind": {kind: len(members) for kind, members in by_kind.items()},
        "examples": {kind: members[:EXAMPLES] for kind, members in by_kind.items()},
        "longest": {name: sorted(some, key=len)[: -EXAMPLES - 1 : -1] for name, some in (("Han", han), ("other", others))},
        "sample": readable(tokenizer, dict.fromkeys(evenly)),
        "compression": compression(tokenizer, all_texts),
        "round_trip": {"checked": len(checked), "failed": round_trip(tokenizer, checked)},
        "read_from_text": _read_from_text(tokenizer, special_tokens),
        "compare": compare
        and {
            "vocab_size": len(compare.get_vocab()),
            "shared_tokens": len(_all_texts(tokenizer) & _all_texts(compare)),
            "compression": compression(compare, all_texts),
        },
    }


def compression(tokenizer: "PreTrainedTokenizerFast", texts: dict[str, list[str]]) -> dict[str, dict]:
    """Of each kind of text: characters, bytes, tokens, unknown (tokens), characters_per_token and bytes_per_token."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    result = {}
    for kind, some in texts.items():
        tokens = Counter(token for ids in tokenizer_lib.encode(tokenizer, some) for token in ids)
        counts = {
            "characters": sum(map(len, some)),
            "bytes": sum(len(text.encode()) for text in some),
            "tokens": tokens.total(),
            "unknown": tokens[tokenizer.unk_token_id],
        }
        per_token = {
            f"{unit}_per_token": round(counts[unit] / counts["tokens"], 4) if counts["tokens"] else None
            for unit in ("characters", "bytes")
        }
        result[kind] = counts | per_token
    return result


def round_trip(tokenizer: "PreTrainedTokenizerFast", cases: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """The (name, text) that do not come back from encoding and decoding: {"name", "text", "decoded"}, around the first
    difference."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    failed = []
    for name, text in cases:
        decoded = tokenizer.decode(tokenizer_lib.encode(tokenizer, [text])[0])
        assert isinstance(decoded, str)
        if decoded != text:
            at = len(os.path.commonprefix([text, decoded]))
            near = slice(max(0, at - CONTEXT), at + CONTEXT)
            failed.append({"name": name, "text": text[near], "decoded": decoded[near]})
    return failed


def _kind(text: str) -> str:
    inner = text.strip(" ")
    return next(kind for kind, pattern in KINDS.items() if pattern.fullmatch(inner))


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[dict]:
    """Tokens added to the model's vocabulary. Those with special False are control tokens too, but stay when special ones are
    left out of decoded text."""
    roles = tokenizer.special_tokens_map.items()
    return [
        {
            "id": token,
            "text": added.content,
            "roles": [role.removesuffix("_token") for role, text in roles if text == added.content],
            "special": added.special,
        }
        for token, added in sorted(tokenizer.added_tokens_decoder.items())
    ]


def _read_from_text(tokenizer: "PreTrainedTokenizerFast", special_tokens: list[dict]) -> list[str]:
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    texts = [token["text"] for token in special_tokens]
    encoded = tokenizer_lib.encode(tokenizer, texts) if texts else []
    return [token["text"] for token, ids in zip(special_tokens, encoded, strict=True) if token["id"] in ids]


def _byte_tokens(tokenizer: "PreTrainedTokenizerFast", backend: dict) -> int | None:
    if is_byte_level(tokenizer):
        return len(tokenizer.get_vocab().keys() & BYTES)
    if backend["model"].get("byte_fallback"):
        return len(tokenizer.get_vocab().keys() & {f"<0x{byte:02X}>" for byte in range(256)})
    return None


def _describe(backend: dict, byte_level: bool) -> str:
    model = backend["model"]
    kind = model.get("type", "?") + (", byte-level" if byte_level else ", byte fallback" if model.get("byte_fallback") else "")
    for part in ("normalizer", "pre_tokenizer"):
        if names := _names(backend.get(part)):
            kind += f"; {part.replace('_', '-')} {' + '.join(names)}"
    return kind


def _names(component: dict | None) -> list[str]:
    if component is None:
        return []
    parts = component.get("normalizers") or component.get("pretokenizers")
    return [name for part in parts for name in _names(part)] if parts else [component["type"]]


def _all_texts(tokenizer: "PreTrainedTokenizerFast") -> set[str]:
    return set(readable(tokenizer, tokenizer.get_vocab().values()))


# ---- on the terminal ----------------------------------------------------------------------------------------------


def print_vocabulary(tokenizer: "PreTrainedTokenizerFast", containing: str = "", compare=None) -> None:
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


def print_encoding(tokenizer: "PreTrainedTokenizerFast", text: str, name: str) -> None:
    """The pieces of a text, together and a line each with their ids."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    ids = tokenizer_lib.encode(tokenizer, [text])[0]
    pieces = [visible(piece) for piece in readable(tokenizer, ids)]
    each = f", {len(text) / len(ids):.2f} in each" if ids else ""
    print(f"{name}: {len(text):,} characters in {len(ids):,} tokens{each}")
    print("│".join(pieces))
    for token, piece in zip(ids, pieces, strict=True):
        print(token, piece, sep="\t")


def print_report(report: dict, name: str, compare_name: str | None = None) -> None:
    """A `report`, on standard output; without a terminal in 80 columns and without colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def words(texts: Iterable[str]) -> Text:
        return Text("  ").join(Text(visible(text)) for text in texts)

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
    console.print(Text(name, "bold"))
    console.print(_facts(facts))

    kinds = Table(box=box.SIMPLE_HEAD, expand=True)
    kinds.add_column("tokens by kind", no_wrap=True)
    kinds.add_column("", justify="right", no_wrap=True)
    kinds.add_column("the first of them", no_wrap=True, overflow="ellipsis", ratio=1)
    for kind, n in report["tokens_by_kind"].items():
        kinds.add_row(kind, f"{n:,}", words(report["examples"][kind]))
    console.print(kinds)
    console.print(
        _facts({"longest, Han": words(report["longest"]["Han"]), "longest, other": words(report["longest"]["other"]),
                "from all ranks": words(report["sample"])})
    )  # fmt: skip

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
    console.print(table)

    unknown = {name: report} if compare_name is None else {name: report, compare_name: report["compare"]}
    for folder, one in unknown.items():
        if n := _unknown(one["compression"]):
            console.print(Text(f"  unknown tokens in these texts, {_short(folder)}: {n:,}"))
    failed = report["round_trip"]["failed"]
    checked = f"{report['round_trip']['checked']:,} texts encoded and decoded"
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
    if report["read_from_text"]:
        console.print(
            Text(f"  written in a text, these become control tokens: {'  '.join(map(visible, report['read_from_text']))}")
        )


def _facts(facts: dict):
    from rich.table import Table
    from rich.text import Text

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
