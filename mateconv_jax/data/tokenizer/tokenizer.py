"""Loading and using a tokenizer. Text is text: what a document or a user writes never becomes a control token.

Tokenizers are transformers' fast tokenizers; a folder holds tokenizer.json, tokenizer_config.json and the chat template.
tokenizer.model, as SentencePiece writes it, is read in place of tokenizer.json.
"""

import hashlib
import importlib
import re
import threading
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer.folder import has_tokenizer
from mateconv_jax.errors import UserError

# Ids 0 to 3, in this order.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

PROTOBUF = "sentencepiece.sentencepiece_model_pb2"  # through which transformers reads a SentencePiece model

# Whether control tokens are plain text is a setting of the tokenizer, not of a call: one thread at a time may encode.
_ENCODING = threading.Lock()


def load(folder: str | Path, key: str) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`. `key` names the flag or configuration key that gave the folder, for the error.

    Raises:
      UserError: no tokenizer there, one without `</s>`, or a tokenizer.model and no package that reads it. One without `<s>`,
        as Qwen's, is right.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{key}: no tokenizer at {str(folder)!r} (expected a folder with tokenizer.json or tokenizer.model)")
    if not (folder / "tokenizer.json").is_file():
        _check_convertible(folder / "tokenizer.model", key)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise UserError(f"{key}: cannot read the tokenizer at {str(folder)!r} ({error})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer at {str(folder)!r} has no end token (expected eos_token in its tokenizer_config.json)"
        )
    return tokenizer


def _check_convertible(path: Path, key: str) -> None:
    """Without its package, transformers would take a SentencePiece model for tiktoken's and report a broken file."""
    with path.open("rb") as file:
        is_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1000))  # a token in base64 and its id
    # SentencePiece 0.2.3 wants protobuf 7, which TensorBoard does not take yet.
    package, module, version = ("tiktoken",) * 3 if is_tiktoken else ("sentencepiece", PROTOBUF, "'sentencepiece<0.2.2'")
    try:
        importlib.import_module(module)
    except Exception as error:  # not installed, or made for another protobuf
        raise UserError(f"{key}: {str(path)!r} needs the package {package} (pip install {version}): {error}") from error


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for two tokenizers that give equal ids: 16 hex digits of the SHA-256 of the tokenizer's JSON."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Largest id + 1, the rows that an embedding needs. `len(tokenizer)` is less where ids are left out."""
    return 1 + max(tokenizer.get_vocab().values())


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts; a literal `</s>` in a text is five ordinary characters."""
    with _ENCODING:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"]


def encode_beginning(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a document's beginning: `<s>`, which imported models may not have, such as Qwen3, and the plain text."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + encode(tokenizer, [text])[0]


def encode_with_offsets(tokenizer: PreTrainedTokenizerFast, text: str, plain: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, and the characters (start, end) that each token stands for.

    Equal to `tokenizer(text, add_special_tokens=False, split_special_tokens=plain)` in three quarters of the time.
    """
    backend = tokenizer.backend_tokenizer
    with _ENCODING:
        backend.encode_special_tokens = plain
        if backend.padding or backend.truncation:
            backend.no_padding()
            backend.no_truncation()
        encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets
