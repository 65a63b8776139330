"""Report on a tokenizer: its vocabulary as text, compression by kind of text, and round-trip failures."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mateconv_jax.common_prefix import common_prefix
from mateconv_jax.data.tokenizer.pieces import BYTES, is_byte_level, read_pieces, readable
from mateconv_jax.data.tokenizer.samples import HARD_CASES, SAMPLES

if TYPE_CHECKING:  # takes 2 s to import
    from transformers import PreTrainedTokenizerFast

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KINDS = {  # of tokens, by their text without surrounding spaces; the first match counts
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
EXAMPLES = 12  # per kind, and of the longest tokens
SAMPLE_TOKENS = 60
CONTEXT = 6  # characters shown on each side of the first round-trip difference

# ---- the report ---------------------------------------------------------------------------------------------------


def report(
    tokenizer: "PreTrainedTokenizerFast",
    texts: dict[str, list[str]] | None = None,
    compare: "PreTrainedTokenizerFast | None" = None,
) -> dict:
    """Everything that `inspect` shows, as a JSON-serialisable dict.

    Args:
      texts: {kind: texts} to measure compression and round trips on, in addition to the built-in samples.
      compare: another tokenizer to measure on the same texts.

    Returns:
      kind, vocab_size, special_tokens, chat_template, bytes (how many of the 256 bytes are tokens; None if the tokenizer has
      no byte tokens), longest_number (most digits in one token), tokens_by_kind {kind: count}, examples {kind: texts},
      longest {"Han", "other"}, sample, compression {kind of text: counts and ratios}, round_trip {"checked", "failed"},
      read_from_text (control tokens that plain text can produce), compare (None without `compare`).
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
    """Per kind of text: characters, bytes, tokens, unknown tokens, characters_per_token and bytes_per_token."""
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
    """Cases that encoding and decoding do not reproduce: {"name", "text", "decoded"}, cut to the first difference."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    failed = []
    for name, text in cases:
        decoded = tokenizer.decode(tokenizer_lib.encode(tokenizer, [text])[0])
        assert isinstance(decoded, str)
        if decoded != text:
            at = common_prefix(text, decoded)
            near = slice(max(0, at - CONTEXT), at + CONTEXT)
            failed.append({"name": name, "text": text[near], "decoded": decoded[near]})
    return failed


def _kind(text: str) -> str:
    inner = text.strip(" ")
    return next(kind for kind, pattern in KINDS.items() if pattern.fullmatch(inner))


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[dict]:
    """Tokens added to the model's vocabulary. Those with special False are control tokens too, but skip_special_tokens keeps
    them in decoded text.
    """
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
