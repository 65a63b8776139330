"""The chunks of `prepare` on Apache Beam, with any runner. The dataset is byte for byte the same.

    sources → chunks → cleaned chunks ─┬────────────────────────────────→ join → tokenise, write
                                       └→ keys → positions of duplicates ─┘

Files go through Beam's file systems. Inputs and the work folder may be gs://, s3:// or hdfs:// paths, for runners whose workers
share no disk.
"""

import dataclasses
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystem import CompressionTypes, FileMetadata
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from mateconv_jax import files as files_lib
from mateconv_jax.data.build import chunk_reader
from mateconv_jax.data.build.options import SPLITS
from mateconv_jax.data.build.parallel_chunks import WorkerSetup, chunks_of
from mateconv_jax.data.text import duplicates, sources as sources_lib
from mateconv_jax.data.text.sources import Chunk, Source
from mateconv_jax.errors import UserError

CHUNK_FILES = (
    *SPLITS,
    "statistics.npz",
    "keys.npy",
    "rejected.jsonl",
    "chunk.json",
)  # the last one marks a finished chunk


def run_chunks(
    sources: list[Source], setup: WorkerSetup, identity: str, beam_flags: list[str], work_folder: str | None
) -> list[str]:
    """Make the folders of all chunks in setup.chunks_folder, and return their names in order.

    Args:
      identity: hash of the inputs, tokenizer and options. Chunks go to a folder of that name in work_folder, so a run only ever
        reuses its own.
      beam_flags: Beam's own options: `--runner=…` and the runner's.
      work_folder: where workers store chunks before they are fetched; None: beside setup.chunks_folder.
    """
    work_folder = f"{work_folder or setup.chunks_folder.with_name('beam')}/{identity}"
    tokenizer = {path.name: path.read_bytes() for path in setup.tokenizer_folder.iterdir()}
    with beam.Pipeline(options=PipelineOptions(beam_flags)) as pipeline:
        cleaned = (
            pipeline
            | beam.Create(list(enumerate(sources_lib.groups(sources, setup.options.sizes))))
            | "read chunks" >> beam.FlatMap(_chunks, setup)
            | beam.Reshuffle()
            | "clean" >> beam.Map(_clean, setup)
        )
        dropped = (
            cleaned
            | "keys" >> beam.FlatMap(_keys, setup.options.dedup)
            | beam.GroupByKey()
            | "duplicates" >> beam.FlatMap(_all_but_the_first)
        )
        joined = {"cleaned": cleaned, "dropped": dropped} | beam.CoGroupByKey()
        joined | "write" >> beam.ParDo(_Write(setup, tokenizer, work_folder))
    finished = FileSystems.match([f"{work_folder}/*/chunk.json"])[0].metadata_list
    return sorted(_fetch(match.path.removesuffix("/chunk.json"), setup.chunks_folder) for match in finished)


def files(pattern: str) -> list[tuple[str, int, int | None]]:
    """Like sources.local_files, on any of Beam's file systems."""
    found = [(match.path, match.size_in_bytes, _modified(match)) for match in FileSystems.match([pattern])[0].metadata_list]
    if not found:
        raise UserError(f"--input: no file at {pattern!r} (expected .jsonl, .txt or .bin files, or a glob)")
    return sorted(found)


def _modified(match: FileMetadata) -> int | None:
    """Modification time in nanoseconds; equal to that of sources.local_files for a local file."""
    if os.path.exists(match.path):
        return os.stat(match.path).st_mtime_ns
    return int(1e9 * match.last_updated_in_seconds) or None


def open_file(path: str):
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)  # sources.py decompresses


def _chunks(numbered: tuple[int, list[Source]], setup: WorkerSetup) -> Iterator[Chunk]:
    number, group = numbered
    return chunks_of(group, number, setup.options, setup.bos_eos, open_file)


def _clean(chunk: Chunk, setup: WorkerSetup) -> tuple[str, tuple[bytes, str, np.ndarray]]:
    """(name, (pickled, digest of the input, keys))."""
    cleaned = chunk_reader.read_chunk(chunk, setup.options, setup.special_tokens, setup.vocab_size)
    return chunk.name, (pickle.dumps(cleaned), cleaned.digest, cleaned.keys)


Position = tuple[str, int]  # (chunk, document), ordered as in the input


def _keys(cleaned: tuple[str, tuple[bytes, str, np.ndarray]], dedup: str) -> Iterator[tuple[tuple[bool, int], Position]]:
    name, (_, _, keys_NK) = cleaned
    if dedup != "none":
        for document, keys in enumerate(keys_NK.view(np.int64).tolist()):  # Beam has no unsigned integers
            for column, key in enumerate(keys):
                yield (column == 0, key), (name, document)


def _all_but_the_first(group: tuple[tuple[bool, int], Iterable[Position]]) -> Iterator[tuple[str, tuple[int, bool]]]:
    (exact, _), positions = group
    first = min(positions)
    for name, document in positions:
        if (name, document) != first:
            yield name, (document, exact)


class _Write(beam.DoFn):
    """Tokenise and write a chunk on the worker's disk, then copy it to the work folder."""

    def __init__(self, setup: WorkerSetup, tokenizer: dict[str, bytes], work_folder: str):
        self._setup = setup
        self._tokenizer = tokenizer
        self._work_folder = work_folder

    def setup(self):
        self._local = Path(tempfile.mkdtemp())
        (self._local / "tokenizer").mkdir()
        for name, content in self._tokenizer.items():
            (self._local / "tokenizer" / name).write_bytes(content)
        setup = dataclasses.replace(self._setup, chunks_folder=self._local, tokenizer_folder=self._local / "tokenizer")
        self._writer = setup.writer()

    def process(self, element):
        name, joined = element
        target = f"{self._work_folder}/{name}"
        [(pickled, digest, keys)] = joined["cleaned"]
        if not _is_there(target, digest):
            codes = np.full(len(keys), duplicates.KEPT, np.uint8)
            for document, exact in joined["dropped"]:
                codes[document] = (
                    duplicates.DUPLICATE if exact or codes[document] == duplicates.DUPLICATE else duplicates.NEAR_DUPLICATE
                )
            self._writer.write_chunk(pickle.loads(pickled), codes)
            for file in CHUNK_FILES:
                if (self._local / name / file).exists():
                    with (
                        (self._local / name / file).open("rb") as data,
                        FileSystems.create(f"{target}/{file}", compression_type=CompressionTypes.UNCOMPRESSED) as out,
                    ):
                        shutil.copyfileobj(data, out)
            shutil.rmtree(self._local / name)

    def teardown(self):
        shutil.rmtree(self._local, ignore_errors=True)


def _is_there(target: str, digest: str) -> bool:
    """Whether an earlier run finished this chunk, from the same input."""
    if not FileSystems.exists(f"{target}/chunk.json"):
        return False
    with open_file(f"{target}/chunk.json") as file:
        return json.load(file)["digest"] == digest


def _fetch(remote: str, chunks_folder: Path) -> str:
    name = remote.rstrip("/").rsplit("/", 1)[1]
    with files_lib.aside(chunks_folder / name, folder=True, replace_folder=True) as written:
        for file in CHUNK_FILES:
            if FileSystems.exists(f"{remote}/{file}"):
                with open_file(f"{remote}/{file}") as data, (written / file).open("wb") as out:
                    shutil.copyfileobj(data, out)
    return name
