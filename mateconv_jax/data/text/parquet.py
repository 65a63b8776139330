"""Parquet files as lines of JSON, one a row: {column: value}, of the columns that a document may be made of."""

from collections.abc import Iterator
from typing import BinaryIO

import orjson

from mateconv_jax.data.text import dialogue_schemas, preference_schemas
from mateconv_jax.data.text.lines import Record, too_long
from mateconv_jax.errors import UserError

BATCH_ROWS = 64  # read at once: rows may be as long as --max_line_mb. 1,024 are no faster
PAGE_BUFFER_BYTES = 1 << 20  # a column is read page by page, not whole as without it


def rows(file: BinaryIO, size: int | None, text_key: str, longest: int, progress: list[int]) -> Iterator[tuple[int, Record]]:
    """(number of the row from 1, its JSON). progress[0] is kept at the share of the rows that was read, in bytes of the file.

    Other columns than `text_key` and the dialogue schemas' are not read; an embedding takes more room than its text.

    Raises:
      UserError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("--input: parquet files need pyarrow (pip install pyarrow)") from error
    number = 0
    try:
        opened = parquet.ParquetFile(file, buffer_size=PAGE_BUFFER_BYTES, pre_buffer=False)
        there = opened.schema_arrow.names
        columns = [name for name in there if name == text_key or name in dialogue_schemas.KEYS | preference_schemas.KEYS]
        if not columns:
            yield 1, ("broken_file", f"no column {text_key!r} or those of a dialogue (there are: {', '.join(there):.300})")
            return
        for batch in opened.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            for record in _json_rows(batch):
                number += 1
                yield number, too_long(len(record), longest) if len(record) > longest else record
            progress[0] = (size or 0) * number // max(1, opened.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:  # a broken file is an OSError to it, too
        yield number + 1, ("broken_file", f"not readable as parquet ({' '.join(str(error).split()):.200})")


def _json_rows(batch) -> Iterator[Record]:
    try:
        found = [orjson.dumps(row, default=_as_text) for row in batch.to_pylist()]
    except (UnicodeDecodeError, orjson.JSONEncodeError) as error:
        if len(batch) > 1:  # which of the rows it is
            for i in range(len(batch)):
                yield from _json_rows(batch.slice(i, 1))
        elif isinstance(error, UnicodeDecodeError) or isinstance(error.__cause__, UnicodeDecodeError):
            yield "invalid_utf8", "not UTF-8"
        else:
            yield "invalid_json", f"not to be written as JSON ({error})"
        return
    yield from found


def _as_text(value) -> str:
    """What JSON has no type for: texts that were written as bytes, decimals, times of day."""
    return value.decode() if isinstance(value, bytes) else str(value)
