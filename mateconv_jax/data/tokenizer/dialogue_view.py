"""Dialogues of a file, with what is learned of them, on the terminal or as JSON."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text import jsonl, sources as sources_lib
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.data.tokenizer.chat import ChatEncoder, EncodedDialogue, TemplateRefuses
from mateconv_jax.data.tokenizer.pieces import visible
from mateconv_jax.errors import UserError

OPEN, CLOSE = "⟦", "⟧"  # around what is learned, where there are no colours
LEARNED, NOT_LEARNED = "bold green", "dim"
Piece = tuple[str, list[int], bool]  # text, its ids, whether it is learned


def show(tokenizer: PreTrainedTokenizerFast, file: str, text_key: str, learn: str, as_json: bool, ignore_fields=()) -> bool:
    """Print every dialogue of a file, of a preference both. A malformed line, or one that the chat template refuses, is an
    error on standard error.

    As JSON: {"ids": […], "learned": [0, 1, …]}, a line each. Otherwise a line for each line of the rendering, with its ids
    beside it: coloured on a terminal; elsewhere with a tab between the two, and brackets around what is learned.

    Args:
      file: a path, a glob or -, as `prepare --input` takes them.
      ignore_fields: as in PrepareOptions.

    Returns:
      Whether there were no errors.

    Raises:
      UserError: no such file, or the tokenizer has no chat template.
    """
    encoder = ChatEncoder(tokenizer, learn)
    console = Console(highlight=False)
    n_errors = n_texts = 0
    for place, record in _records(file):
        try:
            document = _document(record, text_key, ignore_fields)
            if isinstance(document, str):
                n_texts += 1
                continue
            found = _encoded(encoder, document)
        except (Rejected, TemplateRefuses) as error:
            print(f"error: {place}: {str(error).removeprefix('chat: ')}", file=sys.stderr)
            n_errors += 1
            continue
        for which, encoded in found.items():
            _print(place + which, tokenizer, encoded, console, as_json)
    if n_texts:
        print(f"{file}: plain text, which is learned whole, is not shown (lines: {n_texts:,})", file=sys.stderr)
    return n_errors == 0


def _encoded(encoder: ChatEncoder, document: Dialogue | Preference) -> dict[str, EncodedDialogue]:
    """The dialogue, or the two of a preference, by what is written behind their place."""
    if isinstance(document, Dialogue):
        return {"": encoder.encode(document)}
    both = {", chosen": document.chosen, ", rejected": document.rejected}
    return {which: encoder.encode(dialogue, document.n_prompt) for which, dialogue in both.items()}


def _print(place: str, tokenizer: PreTrainedTokenizerFast, encoded: EncodedDialogue, console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ids": encoded.ids, "learned": list(map(int, encoded.learned))}))
    elif console.is_terminal and not console.no_color:
        console.print(_table(place, tokenizer, encoded))
    else:
        print(_title(place, encoded))
        for pieces in _lines(tokenizer, encoded):
            texts = ((text, learned) for text, _, learned in pieces)
            ids = ((" ".join(map(str, ids)), learned) for _, ids, learned in pieces)
            print(_bracketed(texts, ""), _bracketed(ids, " "), sep="\t")


def _records(file: str) -> Iterator[tuple[str, bytes | Rejected]]:
    """(FILE:LINE, record, or why there is none)."""
    try:
        sources = sources_lib.find([file])
    except UserError as error:
        raise UserError(str(error).replace("--input", "--dialogue")) from error
    for source in sources:
        if source.format in ("bin", "txt"):
            raise UserError(f"--dialogue: {source.path!r} holds no dialogues (expected JSONL or CSV)")
        for chunk in sources_lib.chunks([source], 0, sources_lib.ChunkSizes()):
            (part,) = chunk.parts
            rejects = [(line, Rejected(rule, reason)) for line, rule, reason in part.rejects]
            for line, record in sorted([*part.records, *rejects], key=lambda numbered: numbered[0]):
                yield f"{source.path}:{line}", record


def _document(record: bytes | Rejected, text_key: str, ignore_fields: tuple[str, ...]) -> jsonl.Document:
    if isinstance(record, Rejected):
        raise record
    document, _, _ = jsonl.parse_line(record, text_key, ignore_fields)
    return document


def _lines(tokenizer: PreTrainedTokenizerFast, encoded: EncodedDialogue) -> list[list[Piece]]:
    """The rendering's lines, each cut where what is learned begins or ends."""
    lines: list[list[Piece]] = [[]]
    for learned, tokens in groupby(zip(encoded.ids, encoded.learned, strict=True), key=lambda token: token[1]):
        ids: list[int] = []
        for token, _ in tokens:
            ids.append(token)
            if "\n" in _decode(tokenizer, [token]):
                lines[-1].append((visible(_decode(tokenizer, ids)), ids, learned))
                lines.append([])
                ids = []
        if ids:
            lines[-1].append((visible(_decode(tokenizer, ids)), ids, learned))
    return [line for line in lines if line]


def _decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # several lists of ids would give several
    return text


def _title(place: str, encoded: EncodedDialogue) -> str:
    return f"{place}: {len(encoded.ids):,} tokens, {sum(encoded.learned):,} learned"


def _table(place: str, tokenizer: PreTrainedTokenizerFast, encoded: EncodedDialogue) -> Table:
    table = Table(title=_title(place, encoded), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, expand=True)
    table.add_column("learned in green", ratio=1, overflow="fold")
    table.add_column("ids", ratio=1, overflow="fold")
    for pieces in _lines(tokenizer, encoded):
        styles = [LEARNED if learned else NOT_LEARNED for _, _, learned in pieces]
        texts = Text.assemble(*((text, style) for (text, _, _), style in zip(pieces, styles, strict=True)))
        ids = Text(" ").join(Text(" ".join(map(str, ids)), style) for (_, ids, _), style in zip(pieces, styles, strict=True))
        table.add_row(texts, ids)
    return table


def _bracketed(pieces: Iterable[tuple[str, bool]], between: str) -> str:
    return between.join(f"{OPEN}{text}{CLOSE}" if learned else text for text, learned in pieces)
