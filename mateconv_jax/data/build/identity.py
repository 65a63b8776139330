"""Identify what a dataset is made from, and compare it with an earlier run."""

import json
import os
from collections.abc import Iterable
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING

from mateconv_jax.data.text.sources import Source
from mateconv_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_BYTES = 1 << 16  # compared at each end of an input
# Options that earlier versions lacked, with the values that reproduce their behaviour.
ADDED_OPTIONS = {
    "encoding": "utf-8",
    "ignore_fields": [],
    "learn": "everything",
    "split_at_tokens": None,
    "too_long_dialogue": "shorten",
}


def inputs(sources: list[Source]) -> list[list]:
    """[path, bytes, modification time, hash of both ends] of each input; the last two are None if unknown.

    Bytes of a path that are not UTF-8 become backslash escapes.
    """
    return [
        [os.fsencode(source.path).decode(errors="backslashreplace"), source.size, source.modified, _ends(source)]
        for source in sources
    ]


def _ends(source: Source) -> str | None:
    if source.size is None:
        return None
    try:
        with open(source.path, "rb") as file:
            hasher = blake2b(file.read(END_BYTES), digest_size=8)
            if source.size > END_BYTES:
                file.seek(max(END_BYTES, source.size - END_BYTES))
                hasher.update(file.read(END_BYTES))
    except OSError:  # on a file system that only Beam can read
        return None
    return hasher.hexdigest()


def tokenizer_settings(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Hash of what decides how dialogues and document ends are encoded; `tokenizer.fingerprint` covers ordinary text."""
    settings = [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.all_special_tokens]
    return sha256(json.dumps(settings).encode()).hexdigest()[:16]


def same_input(theirs: dict, ours: dict) -> bool:
    """Whether the inputs are known to be unchanged without reading them. Always False for standard input and TFDS."""
    known = all(size is not None and modified is not None for _, size, modified, _ in ours["input"])
    return known and theirs.get("input") == ours["input"]


def check_options(theirs: dict, ours: dict, what: str) -> None:
    """Raises UserError for the first option that differs. `what` starts the message: "'data/zh' was made".

    Inputs are compared by name and size only; see `same_input`.
    """
    ours = json.loads(json.dumps(ours))
    for key in [*ours, *theirs]:
        if key == "input":
            difference = _input_difference(theirs.get(key, []), ours[key])
        elif key == "tokenizer_settings" and key not in theirs:  # made by an earlier version
            continue
        else:
            difference = _difference(key, theirs.get(key, ADDED_OPTIONS.get(key)), ours.get(key))
        if difference:
            raise UserError(
                f"--output: {what} with {difference} (choose another folder, give the same options, or --overwrite)"
            )


def _difference(key: str, theirs, ours) -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        parts = (_difference(f"{key}.{name}", theirs.get(name), ours.get(name)) for name in [*ours, *theirs])
        return next(filter(None, parts), None)
    return None if theirs == ours else f"{key}={theirs!r}, not {ours!r}"


def _input_difference(theirs: list[list], ours: list[list]) -> str | None:
    sizes, before = ({path: size for path, size, *_ in files} for files in (ours, theirs))
    for files, others, word in ((sizes, before, "without"), (before, sizes, "with")):
        if other := [path for path in files if path not in others]:
            more = f" and {len(other) - 1:,} more" if len(other) > 1 else ""
            return f"another --input: {word} {other[0]!r}{more}"
    for path, size in before.items():
        if size != sizes[path]:
            return f"another --input: {path!r} had {size:,} bytes, now {sizes[path]:,}"
    if [path for path, *_ in theirs] != [path for path, *_ in ours]:
        return "the same --input in another order"
    return None


def input_digest(chunk_digests: Iterable[str]) -> str:
    """Hash of the whole input, from the digests of all chunks in order."""
    return blake2b("".join(chunk_digests).encode(), digest_size=16).hexdigest()
