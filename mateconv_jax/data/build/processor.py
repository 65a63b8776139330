"""Data preparation from Python, with the interface of the PyTorch MateConv."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from mateconv_jax import files
from mateconv_jax.data.build import chunk_reader, pipeline, work_folder
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.dataset import is_dataset
from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text import duplicates, sources
from mateconv_jax.data.text.cleaning import CleaningOptions
from mateconv_jax.data.text.dialogue import as_record
from mateconv_jax.data.text.sources import ChunkSizes
from mateconv_jax.data.tokenizer.tokenizer import SPECIAL_TOKENS
from mateconv_jax.errors import UserError


class DataProcessor:
    """MateConv's interface to what `python -m mateconv_jax.prepare` does.

    Args:
      tokenizer_path: a tokenizer's folder.
      max_length: most characters of a document, longer ones are dropped as in MateConv; also the targets per row.
      chunk_size: records per chunk; a chunk becomes a shard.
      save_interval: most records between two durable points. A finished chunk is one, so only values below chunk_size matter.
      num_workers: number of processes. With more than 1, the calling script needs `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        tokenizer_path: str,
        max_length: int = 512,
        chunk_size: int = 50_000,
        save_interval: int = 1_000_000,
        num_workers: int = 1,
    ):
        for name, value in (("chunk_size", chunk_size), ("save_interval", save_interval)):
            if value < 1:
                raise UserError(f"{name}: {value!r} is invalid (expected at least 1)")
        self.tokenizer_path = os.path.expanduser(tokenizer_path)
        self.num_workers = num_workers
        self._options = PrepareOptions(
            seq_len=max_length,
            sizes=ChunkSizes(records=min(chunk_size, save_interval)),
            cleaning=CleaningOptions(max_chars=max_length, too_long="drop"),
        )
        self._statistics: dict | None = None

    def validate_and_clean_jsonl(self, input_path: str, output_path: str) -> dict[str, int]:
        """Write every usable document, cleaned, as a line of JSON; list the others in OUTPUT_PATH.rejected.jsonl.

        Returns:
          {"lines", "documents"} and the number of rejects per rule.

        Raises:
          UserError: no such input, or the output would replace it.
        """
        output, seen, counts = Path(os.path.expanduser(output_path)), duplicates.SeenKeys(), Counter(lines=0, documents=0)
        rejected_path = output.with_name(output.name + ".rejected.jsonl")
        found = sources.find([os.path.expanduser(input_path)])
        for path in (output, rejected_path):
            _check_not_an_input(path, found)
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            files.aside(output) as cleaned_path,
            files.aside(rejected_path) as rejects_path,
            cleaned_path.open("w", encoding="utf-8") as cleaned_file,
            rejects_path.open("w", encoding="utf-8") as rejected_file,
        ):
            for chunk in pipeline.all_chunks(found, self._options, None):
                cleaned = chunk_reader.read_chunk(chunk, self._options, tuple(SPECIAL_TOKENS.values()), 0)
                codes = seen.mark(cleaned.keys)
                for i in np.flatnonzero(codes == duplicates.KEPT):
                    for piece in cleaned.documents[i]:
                        record = as_record(piece) if isinstance(piece, Dialogue | Preference) else {"text": piece}
                        cleaned_file.write(json.dumps(record, ensure_ascii=False) + "\n")
                        counts["documents"] += 1
                for reject in chunk_reader.rejects_of(cleaned, codes):
                    rejected_file.write(json.dumps(reject, ensure_ascii=False) + "\n")
                    counts[reject["rule"]] += 1
                counts["lines"] += cleaned.statistics.lines
        return dict(counts)

    def process_dataset(self, input_path: str, output_path: str, resume: bool = True, keep_going: bool = False) -> dict:
        """Make a dataset folder for data.train_data_path or, if output_path ends in .bin, MateConv's flat file of 16-bit token
        ids with all documents.

        Args:
          resume: continue an earlier call, and do nothing if it finished; False starts over.
          keep_going: use the readable part of an input that is broken or mostly rejected, which is an error otherwise.

        Returns:
          The content of stats.json.

        Raises:
          UserError: no such input or tokenizer; the output exists and was made with other options (if `resume`), or not by this
            method.
        """
        output = Path(os.path.expanduser(output_path))
        flat = output.suffix == ".bin"
        folder = output.with_name(output.name + ".dataset") if flat else output
        found = sources.find([os.path.expanduser(input_path)])
        if flat and output.exists() and not is_dataset(folder):
            raise UserError(f"output_path: {str(output)!r} is there, and process_dataset did not make it (choose another name)")
        _check_not_an_input(output, found)
        if not resume:
            work_folder.check_outside(found, work_folder.path_for(folder))
            work_folder.check_replaceable(folder, found)
            work_folder.remove(work_folder.path_for(folder))
        options = dataclasses.replace(self._options, val_fraction=0.0) if flat else self._options
        workers = self.num_workers
        pipeline.prepare(found, folder, self.tokenizer_path, options, workers, not resume, also_bin=flat, keep_going=keep_going)
        self._statistics = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        if flat:
            files.link(folder / "train.bin", output)
        return self._statistics

    def save_statistics(self, path: str) -> None:
        """Write the statistics of the last process_dataset as JSON.

        Raises:
          UserError: there was none.
        """
        if self._statistics is None:
            raise UserError("save_statistics: nothing was processed yet (expected process_dataset before)")
        files.write_text(Path(os.path.expanduser(path)), json.dumps(self._statistics, indent=2, ensure_ascii=False) + "\n")


def _check_not_an_input(output: Path, inputs: list[sources.Source]) -> None:
    for source in inputs:
        if output.exists() and source.size is not None and output.samefile(source.path):
            raise UserError(f"output_path: {str(output)!r} is the input (choose another name)")
