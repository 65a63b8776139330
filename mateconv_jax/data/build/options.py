"""Options that determine a dataset's bytes."""

import dataclasses

from mateconv_jax.data.dialogue import LEARN
from mateconv_jax.data.text import encodings
from mateconv_jax.data.text.cleaning import DOCUMENT_TOKENS, CleaningOptions
from mateconv_jax.data.text.lines import TXT_DOCUMENTS
from mateconv_jax.data.text.sources import ChunkSizes
from mateconv_jax.errors import check_values

DEDUP = ("none", "exact", "near")
SPLITS = ("train", "validation")
TOO_LONG_DIALOGUE = ("shorten", "drop")


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Everything that determines a dataset's bytes, except the input and the tokenizer.

    Attributes:
      text_key: JSON key, or CSV or parquet column, that holds the text.
      encoding: of text files without a byte order mark, by any name that Python knows.
      ignore_fields: sorted keys of records and messages to drop unread.
      txt_document: what a document is in a .txt file, one of lines.TXT_DOCUMENTS.
      split_at_tokens: texts are cut into documents at these control tokens, spelt out in them, and lose them; None: they are
        not; empty: the tokenizer's begin and end tokens and cleaning.DOCUMENT_TOKENS.
      seq_len: targets per row.
      learn: which tokens of a dialogue are targets, one of dialogue.LEARN. With "everything" a dialogue is packed like a text
        and cut at row ends; otherwise it stays whole.
      too_long_dialogue: "shorten" drops the oldest turns of a dialogue longer than a row, "drop" rejects it.
      val_fraction: share of documents in the validation split.
      dedup: none, exact, or near (which includes exact).
      near_threshold: Jaccard similarity at which a pair is dropped with probability 1/2.

    Raises:
      UserError: a value is out of range.
    """

    text_key: str = "text"
    encoding: str = encodings.UTF8
    ignore_fields: tuple[str, ...] = ()
    txt_document: str = "line"
    split_at_tokens: tuple[str, ...] | None = None
    seq_len: int = 512
    learn: str = "assistant"
    too_long_dialogue: str = "shorten"
    val_fraction: float = 0.01
    dedup: str = "exact"
    near_threshold: float = 0.8
    sizes: ChunkSizes = ChunkSizes()
    cleaning: CleaningOptions = CleaningOptions()

    def __post_init__(self):
        object.__setattr__(self, "encoding", encodings.normal_name(given := self.encoding) or given)
        check_values(
            self,
            [
                ("encoding", encodings.normal_name(self.encoding) is not None, "utf-8, gb18030, big5, utf-16, …"),
                ("txt_document", self.txt_document in TXT_DOCUMENTS, " or ".join(TXT_DOCUMENTS)),
                ("seq_len", self.seq_len >= 1, "at least 1"),
                ("learn", self.learn in LEARN, " or ".join(LEARN)),
                ("too_long_dialogue", self.too_long_dialogue in TOO_LONG_DIALOGUE, " or ".join(TOO_LONG_DIALOGUE)),
                ("val_fraction", 0 <= self.val_fraction < 1, "a share from 0 to below 1"),
                ("dedup", self.dedup in DEDUP, " or ".join(DEDUP)),
                ("split_at_tokens", self.split_at_tokens is None or "" not in self.split_at_tokens, "tokens, not empty"),
                ("near_threshold", 0 < self.near_threshold < 1, "a number between 0 and 1"),
            ],
        )

    def split_at(self, begin: str | None, end: str) -> "PrepareOptions":
        """With split_at_tokens, if that is empty, for a tokenizer with this begin and end token."""
        if self.split_at_tokens != ():
            return self
        tokens = dict.fromkeys([begin, end, *DOCUMENT_TOKENS])
        return dataclasses.replace(self, split_at_tokens=tuple(filter(None, tokens)))
