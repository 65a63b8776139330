"""Dataset statistics: per-chunk sums that merge exactly, and the figures computed from them."""

import dataclasses
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mateconv_jax import files
from mateconv_jax.data.rows import Batch, learned_targets
from mateconv_jax.data.tokenizer.pieces import readable, visible

if TYPE_CHECKING:  # takes seconds to import, and workers import this module
    from transformers import PreTrainedTokenizerFast

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
TOP_TOKENS = 50
RANK_POINTS = 200

# ---- sums ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SplitCounts:
    """Size of a split or of one of its shards."""

    documents: int = 0
    characters: int = 0  # of text, without control tokens; 0 if only token ids were given
    tokens: int = 0
    rows: int = 0
    bytes: int = 0  # on disk
    filled: int = 0  # non-padding positions; the token that two overlapping rows share counts twice
    targets: int = 0  # tokens that contribute to the loss
    pairs: int = 0  # rows that are pairs, of two sequences each

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        return SplitCounts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(eq=False)
class Statistics:
    """Sums over documents. `a += b` equals one pass over both sets of documents, in any order."""

    vocab_size: int
    lines: int = 0  # input records read
    bytes_in: int = 0  # input size, decompressed
    control_tokens_as_text: int = 0  # documents that spell out a control token, before deduplication
    schemas: Counter[str] = dataclasses.field(default_factory=Counter)  # dialogue schema or "text": records, before cleaning
    ignored_fields: Counter[str] = dataclasses.field(default_factory=Counter)  # field: records it was dropped from
    rejects: Counter[str] = dataclasses.field(default_factory=Counter)  # rule: documents it rejected
    cleaned: Counter[str] = dataclasses.field(default_factory=Counter)  # rule: documents it changed
    splits: dict[str, SplitCounts] = dataclasses.field(default_factory=dict)
    document_lengths: Counter[int] = dataclasses.field(default_factory=Counter)  # length in tokens: documents
    code_points: Counter[int] = dataclasses.field(default_factory=Counter)  # Unicode code point: occurrences
    token_counts: np.ndarray = dataclasses.field(init=False)  # (vocab_size,) int64, occurrences by id

    def __post_init__(self):
        self.token_counts = np.zeros(self.vocab_size, np.int64)

    def add_documents(
        self, split: str, texts: list[str], lengths: list[int], tokens: np.ndarray, rows: Batch, n_bytes: int
    ) -> None:
        """Add a shard of a split.

        Args:
          texts: the documents' text, split in any way; empty if only token ids are known.
          lengths: tokens per document, including control tokens; of a pair, those of the longer dialogue.
          tokens: (n,) token ids of all documents, below vocab_size.
          rows: the rows they were packed into.
          n_bytes: size of the shard on disk.
        """
        # surrogatepass: lone surrogates count like any other code point.
        characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        filled, targets = int(rows["length"].sum()), int(learned_targets(rows).sum())
        n_rows = len(rows["length"])
        pairs = n_rows if rows["length"].ndim == 2 else 0
        counts = SplitCounts(len(lengths), len(characters), len(tokens), n_rows, n_bytes, filled, targets, pairs)
        self.splits[split] = self.splits.get(split, SplitCounts()) + counts
        self.document_lengths.update(_occurrences(np.array(lengths)))
        self.code_points.update(_occurrences(characters))
        self.token_counts += np.bincount(tokens, minlength=self.vocab_size)

    def __iadd__(self, other: "Statistics") -> "Statistics":
        self.lines += other.lines
        self.bytes_in += other.bytes_in
        self.control_tokens_as_text += other.control_tokens_as_text
        self.schemas.update(other.schemas)
        self.ignored_fields.update(other.ignored_fields)
        self.rejects.update(other.rejects)
        self.cleaned.update(other.cleaned)
        for split, counts in other.splits.items():
            self.splits[split] = self.splits.get(split, SplitCounts()) + counts
        self.document_lengths.update(other.document_lengths)
        self.code_points.update(other.code_points)
        self.token_counts += other.token_counts
        return self

    def save(self, path: Path) -> None:
        """Write one file, under 100 kB for a chunk. It is written aside and renamed."""
        small = {
            "vocab_size": self.vocab_size,
            "lines": self.lines,
            "bytes_in": self.bytes_in,
            "control_tokens_as_text": self.control_tokens_as_text,
            "schemas": self.schemas,
            "ignored_fields": self.ignored_fields,
            "rejects": self.rejects,
            "cleaned": self.cleaned,
            "splits": {split: dataclasses.asdict(counts) for split, counts in self.splits.items()},
        }
        used = np.flatnonzero(self.token_counts)
        with files.aside(path) as written, written.open("wb") as file:
            np.savez_compressed(
                file,
                small=np.array(json.dumps(small)),
                tokens=np.stack([used, self.token_counts[used]]),
                document_lengths=_as_array(self.document_lengths),
                code_points=_as_array(self.code_points),
            )

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote."""
        with np.load(path) as file:
            small = json.loads(str(file["small"]))
            statistics = cls(small["vocab_size"], small["lines"], small["bytes_in"], small["control_tokens_as_text"])
            statistics.schemas.update(small.get("schemas", {}))  # missing in chunks of earlier versions
            statistics.ignored_fields.update(small.get("ignored_fields", {}))
            statistics.rejects.update(small["rejects"])
            statistics.cleaned.update(small["cleaned"])
            statistics.splits = {split: SplitCounts(**counts) for split, counts in small["splits"].items()}
            statistics.document_lengths.update(dict(file["document_lengths"].T.tolist()))
            statistics.code_points.update(dict(file["code_points"].T.tolist()))
            ids, counts = file["tokens"]
            statistics.token_counts[ids] = counts
        return statistics


def _occurrences(values: np.ndarray) -> dict[int, int]:
    """{value: count} of non-negative integers. np.unique of older numpy versions sorts, ten times slower."""
    counts = np.bincount(values)
    distinct = np.flatnonzero(counts)
    return dict(zip(distinct.tolist(), counts[distinct].tolist(), strict=True))


def _as_array(counter: Counter[int]) -> np.ndarray:
    """(2, n) int64: sorted keys, and their counts."""
    return np.array(sorted(counter.items()), np.int64).reshape(-1, 2).T


# ---- figures ------------------------------------------------------------------------------------------------------


def summary(statistics: Statistics, tokenizer: "PreTrainedTokenizerFast", seq_len: int, seconds: float) -> dict:
    """The content of stats.json. It does not depend on the order in which chunks were merged.

    Args:
      tokenizer: the tokenizer that produced the tokens.
      seq_len: targets per row.
      seconds: how long the preparation took.

    Returns:
      A JSON-serialisable dict. Lengths are in tokens, including control tokens. The p-th percentile is the smallest length
      that at least p percent of the documents do not exceed. Unknown figures are None.
    """
    total = sum(statistics.splits.values(), SplitCounts())
    has_text = total.characters > 0
    utf8_bytes = sum(n * _utf8_length(code_point) for code_point, n in statistics.code_points.items())
    used = np.count_nonzero(statistics.token_counts)
    unknown = tokenizer.unk_token_id
    return {
        "documents": total.documents,
        "characters": total.characters,
        "tokens": total.tokens,
        "rows": total.rows,
        "splits": {split: dataclasses.asdict(statistics.splits[split]) for split in sorted(statistics.splits)},
        "targets": total.targets,
        "pairs": total.pairs,
        "filled_share": _ratio(total.filled, (total.rows + total.pairs) * (seq_len + 1)),
        "lines": statistics.lines,
        "bytes_in": statistics.bytes_in,
        "bytes_out": total.bytes,
        "schemas": _most_first(statistics.schemas),
        "ignored_fields": _most_first(statistics.ignored_fields),
        "rejects": _most_first(statistics.rejects),
        "duplicates": {"exact": statistics.rejects["duplicate"], "near": statistics.rejects["near_duplicate"]},
        "cleaned": _most_first(statistics.cleaned),
        "control_tokens_as_text": statistics.control_tokens_as_text,
        "document_length": _length_figures(statistics.document_lengths),
        "length_histogram": _length_histogram(statistics.document_lengths),
        "characters_per_token": _ratio(total.characters, total.tokens) if has_text else None,
        "bytes_per_token": _ratio(utf8_bytes, total.tokens) if has_text else None,  # of UTF-8 text
        "characters_by_script": characters_by_script(statistics.code_points),
        "vocabulary": {
            "size": statistics.vocab_size,
            "used": int(used),
            "used_share": _ratio(int(used), statistics.vocab_size),
        },
        "unknown_token_rate": None if unknown is None else _ratio(statistics.token_counts[unknown], total.tokens),
        "top_tokens": _top_tokens(statistics.token_counts, tokenizer),
        "token_ranks": _token_ranks(statistics.token_counts),
        "seconds": round(seconds, 3),
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(int(part) / int(whole), 6) if whole else None


def _most_first(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(((rule, n) for rule, n in counter.items() if n), key=lambda item: (-item[1], item[0])))


def _utf8_length(code_point: int) -> int:
    return 1 + (code_point >= 0x80) + (code_point >= 0x800) + (code_point >= 0x10000)


def _length_figures(document_lengths: Counter[int]) -> dict[str, float | None]:
    names = ["min", *(f"p{percent}" for percent in PERCENTILES), "max"]
    if not document_lengths:
        return dict.fromkeys(["mean", *names])
    lengths, counts = _as_array(document_lengths)
    up_to = np.cumsum(counts)
    n = int(up_to[-1])
    # Nearest rank, in integer arithmetic: documents sorted by length, position ceil(n * percent / 100), counted from 1.
    places = [1, *(-(-n * percent // 100) for percent in PERCENTILES), n]
    figures = lengths[np.searchsorted(up_to, places)].tolist()
    return {"mean": round(int(lengths @ counts) / n, 3), **dict(zip(names, figures, strict=True))}


def _length_histogram(document_lengths: Counter[int]) -> dict[str, list[int]]:
    """Bin i counts documents with edges[i] <= length < edges[i + 1]."""
    if not document_lengths:
        return {"edges": [], "counts": []}
    lengths, counts = _as_array(document_lengths)
    # Integer bins about 1/8 of their edge wide. Their widths never shrink, as those of rounded powers do, which would draw a
    # saw-tooth.
    edges = [1]
    while edges[-1] <= lengths[-1]:
        edges.append(edges[-1] + max(1, edges[-1] // 8))
    edges = edges[np.searchsorted(edges, lengths[0], "right") - 1 :]
    bins = np.searchsorted(edges, lengths, "right") - 1
    in_bin = np.zeros(len(edges) - 1, np.int64)
    np.add.at(in_bin, bins, counts)
    return {"edges": edges, "counts": in_bin.tolist()}


def _token_ranks(token_counts: np.ndarray) -> dict[str, list[int]]:
    """Occurrences of the token of rank r (1 = most frequent), at log-spaced ranks."""
    descending = -np.sort(-token_counts[token_counts > 0])
    if not len(descending):
        return {"rank": [], "count": []}
    ranks = np.unique(np.geomspace(1, len(descending), RANK_POINTS).round().astype(np.int64))
    return {"rank": ranks.tolist(), "count": descending[ranks - 1].tolist()}


def _top_tokens(token_counts: np.ndarray, tokenizer: "PreTrainedTokenizerFast") -> list[dict]:
    ids = [token for token in np.argsort(-token_counts, kind="stable")[:TOP_TOKENS].tolist() if token_counts[token]]
    n_tokens = token_counts.sum()
    control = set(tokenizer.all_special_ids)
    return [
        {
            "id": token,
            "text": text,
            "control": token in control,
            "count": int(token_counts[token]),
            "share": _ratio(token_counts[token], n_tokens),
        }
        for token, text in zip(ids, readable(tokenizer, ids), strict=True)
    ]


# ---- scripts ------------------------------------------------------------------------------------------------------

SCRIPTS = (
    "han", "latin", "digits", "punctuation", "whitespace", "kana", "hangul", "bopomofo", "greek", "cyrillic", "symbols",
    "other",
)  # fmt: skip
_HAN_NAMES = (
    "CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "CJK RADICAL", "KANGXI RADICAL", "IDEOGRAPHIC ITERATION MARK",
    "IDEOGRAPHIC NUMBER ZERO", "HANGZHOU NUMERAL",
)  # fmt: skip
_LETTERS = {  # the first word of a letter's Unicode name
    "LATIN": "latin", "HIRAGANA": "kana", "KATAKANA": "kana", "KATAKANA-HIRAGANA": "kana", "HANGUL": "hangul",
    "BOPOMOFO": "bopomofo", "GREEK": "greek", "CYRILLIC": "cyrillic",
}  # fmt: skip


def characters_by_script(code_points: Counter[int]) -> dict[str, int]:
    """Character count per script, in the order of SCRIPTS.

    Fullwidth and halfwidth forms count as the script of their letter, 〇 and compatibility ideographs as Han, and emoji,
    currency and mathematical signs as symbols. "other" is everything else: other alphabets, control and private-use characters.
    """
    counts = dict.fromkeys(SCRIPTS, 0)
    for code_point, n in code_points.items():
        counts[_script(code_point)] += n
    return counts


def _script(code_point: int) -> str:
    character = chr(code_point)
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    # Planes 2 and 3 hold only ideographs, and older Pythons lack the names of the newest ones.
    if 0x20000 <= code_point < 0x40000 or name.startswith(_HAN_NAMES):
        return "han"
    if character.isspace():
        return "whitespace"
    match unicodedata.category(character)[0]:
        case "L" | "M":
            return _LETTERS.get(name.split(" ")[0], "other")
        case "N":
            return "digits"
        case "P":
            return "punctuation"
        case "S":
            return "symbols"
        case _:
            return "other"


# ---- table --------------------------------------------------------------------------------------------------------


def print_table(summary: dict, folder: str | Path) -> None:
    """Print the main figures of a `summary` to standard output. Without a terminal: 80 columns, no colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    splits = {"all": summary | {"bytes": summary["bytes_out"]}, **summary["splits"]}
    counts = Table(box=box.SIMPLE)
    counts.add_column()
    for split in splits:
        counts.add_column(Text(split), justify="right")
    for key in ("documents", "characters", "tokens", "rows"):
        counts.add_row(key, *(f"{split[key]:,}" for split in splits.values()))
    if summary["pairs"]:
        counts.add_row("pairs", *(f"{split['pairs']:,}" for split in splits.values()))
    if summary["targets"] < summary["tokens"] - summary["rows"]:  # dialogues: some tokens are not targets
        counts.add_row("learned tokens", *(f"{split['targets']:,}" for split in splits.values()))
    counts.add_row("on disk", *(_size(split["bytes"]) for split in splits.values()))

    figures = {
        "input": f"{summary['lines']:,} records, {_size(summary['bytes_in'])}, in {summary['seconds']:,.1f} s",
        "rejected": _by_rule(summary["rejects"], summary["lines"]),
        "cleaned": _by_rule(summary["cleaned"]),
    }
    if summary["schemas"].keys() - {"text"}:
        figures["schemas"] = _by_rule(summary["schemas"])
    if summary["ignored_fields"]:
        figures["ignored fields"] = _by_rule(summary["ignored_fields"])
    if n := summary["control_tokens_as_text"]:
        figures["control tokens"] = f"spelt out in {n:,} documents, encoded as plain text (see --split_at_tokens)"
    if summary["characters"]:
        shares = {script: n / summary["characters"] for script, n in summary["characters_by_script"].items()}
        figures["text"] = f"a token is {summary['characters_per_token']:.3f} characters, {summary['bytes_per_token']:.3f} bytes"
        figures["scripts"] = ", ".join(f"{script} {share:.1%}" for script, share in shares.items() if share >= 0.0005)
    figures["rows"] = f"{summary['filled_share']:.1%} filled" if summary["rows"] else "none"
    if summary["documents"]:
        length = summary["document_length"]
        figures["document length"] = (
            f"{length['min']:,} to {length['max']:,} tokens, 90% from {length['p5']:,} to {length['p95']:,}, "
            f"median {length['p50']:,}, mean {length['mean']:,.1f}"
        )
        figures["top tokens"] = " ".join(visible(token["text"]) for token in summary["top_tokens"][:20])
    vocabulary = summary["vocabulary"]
    figures["vocabulary"] = f"{vocabulary['used']:,} of {vocabulary['size']:,} tokens occur ({vocabulary['used_share']:.1%})"
    if summary["unknown_token_rate"] is not None:
        figures["unknown tokens"] = f"{100 * summary['unknown_token_rate']:.3g}%"

    console = Console()

    def written(text: str) -> str:  # a log's encoding may lack some characters
        return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

    lines = Table.grid(padding=(0, 2, 0, 0))
    for name, figure in figures.items():
        lines.add_row(Text(f"  {name}", "bold"), Text(written(figure)))
    console.print(Text(written(str(folder)), "bold"))
    console.print(counts)
    console.print(lines)


def _size(n_bytes: int) -> str:
    thousands = min((len(str(n_bytes)) - 1) // 3, 4)
    return f"{n_bytes / 1000**thousands:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[thousands]}"


def _by_rule(counts: dict[str, int], records: int = 0) -> str:
    """Counts by rule, each with its share of `records` if given."""
    return ", ".join(f"{rule} {n:,}" + (f" ({n / records:.2%})" if records else "") for rule, n in counts.items()) or "none"
