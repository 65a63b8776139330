"""What decides the bytes of a dataset."""

import dataclasses

from mateconv_jax.data.dialogue import LEARN
from mateconv_jax.data.text import encodings
from mateconv_jax.data.text.cleaning import CleaningOptions
from mateconv_jax.data.text.lines import TXT_DOCUMENTS
from mateconv_jax.data.text.sources import ChunkSizes
from mateconv_jax.errors import check_values

DEDUP = ("none", "exact", "near")
SPLITS = ("train", "validation")
TOO_LONG_DIALOGUE = ("shorten", "drop")


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Everything but the input and the tokenizer that decides what the dataset's bytes are.

    text_key: of a line of JSON, or a column of CSV or parquet.
    encoding: of text files without a byte order mark, by any name that Python knows.
    ignore_fields: of lines and messages, which are dropped unread; sorted.
    txt_document: what a document of a .txt file is, one of lines.TXT_DOCUMENTS.
    seq_len: tokens that a row trains on.
    learn: of a dialogue: what the assistant says in every turn, or in the last one; or everything: then the dialogue is packed
      like a text, and cut where a row ends; otherwise it stays whole.
    too_long_dialogue: what becomes of a dialogue longer than a row: shorten leaves out its oldest turns, drop rejects it.
    val_fraction: share of the documents that make the validation split.
    dedup: none, exact or near (exact ones too); near_threshold: the Jaccard similarity of which half are dropped.

    Raises:
      UserError: a value out of its range.
    """

    text_key: str = "text"
    encoding: str = encodings.UTF8
    ignore_fields: tuple[str, ...] = ()
    txt_document: str = "line"
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
                ("near_threshold", 0 < self.near_threshold < 1, "a number between 0 and 1"),
            ],
        )
