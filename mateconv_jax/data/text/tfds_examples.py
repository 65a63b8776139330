"""The examples of TFDS datasets as lines of JSON, whatever they are stored in."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from mateconv_jax.errors import UserError

NAME = re.compile(r"tfds:([^:]+):([^:\[]+(?:\[[^\]]*\])?):([^:]+)")  # the split may be a part of one, train[:10%]


def lines(name: str) -> Iterator[bytes]:
    """Each example's text as a line of JSON. Invalid UTF-8 is passed on as it is: the line is rejected later."""
    import tensorflow_datasets as tfds  # 2 s

    parts = NAME.fullmatch(name)
    assert parts is not None, f"{name!r} is incomplete"
    builder_name, split, feature = parts.groups()
    try:
        builder: Any = tfds.builder(builder_name)
        if not builder.is_prepared():
            builder = tfds.builder(builder_name, file_format="array_record")  # TFDS' default needs TensorFlow
            builder.download_and_prepare()
        info = builder.info
    except ImportError as error:  # what the code that makes this dataset uses; of TFDS itself nothing
        package = error.name or "tensorflow"
        raise UserError(f"--input: TFDS cannot make {builder_name!r} without {package} (pip install {package})") from error
    except Exception as error:  # TFDS raises whatever its datasets raise
        raise UserError(
            f"--input: TFDS has no dataset {builder_name!r} ({' '.join(str(error).split())[:300]}); prepared ones "
            "are looked for in $TFDS_DATA_DIR or ~/tensorflow_datasets"
        ) from error
    if split.split("[")[0] not in info.splits:
        raise UserError(f"--input: {builder_name} has no split {split!r} (there are: {', '.join(info.splits)})")
    if feature not in info.features:
        raise UserError(f"--input: {builder_name} has no feature {feature!r} (there are: {', '.join(info.features)})")
    if info.file_format == tfds.core.FileFormat.TFRECORD:  # which TFDS itself reads with TensorFlow alone
        examples = map(info.features.deserialize_example_np, _tfrecords(info.splits[split].file_instructions))
    else:
        examples = builder.as_data_source(split)
    for example in examples:
        text = example[feature]
        text = text.encode() if isinstance(text, str) else bytes(text)
        try:
            yield orjson.dumps({"text": text.decode()}) + b"\n"
        except UnicodeDecodeError:
            yield b'{"text": "' + text.replace(b"\n", b" ") + b'"}\n'


def _tfrecords(file_instructions: Iterable) -> Iterator[bytes]:
    """The records of TFRecord files: each a length in 8 bytes, 4 bytes of checksum, the data, 4 bytes of checksum.

    Checksums are not compared: in Python that makes 5 MB/s, as slow as tokenising.

    Args:
      file_instructions: of TFDS; `filename`, and from `skip` on the next `take` records of that file.

    Raises:
      UserError: a file is shorter than its records say, or no such file.
    """
    for instruction in file_instructions:
        end = os.stat(instruction.filename).st_size
        with open(instruction.filename, "rb") as file:
            for number in range(instruction.skip + instruction.take):
                size = int.from_bytes(file.read(12)[:8], "little")
                if file.tell() + size + 4 > end:
                    raise UserError(f"--input: {instruction.filename!r} is broken or cut short at record {number + 1}")
                record = file.read(size)
                file.seek(4, os.SEEK_CUR)
                if number >= instruction.skip:
                    yield record
