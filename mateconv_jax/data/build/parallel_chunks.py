"""Clean, tokenise and write chunks with several processes."""

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mateconv_jax.data.build import chunk_reader, chunk_writer, work_folder
from mateconv_jax.data.build.chunk_reader import InputCounts
from mateconv_jax.data.build.chunk_writer import ChunkWriter
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.unreadable import UnreadableInputs
from mateconv_jax.data.text import duplicates, sources as sources_lib
from mateconv_jax.data.text.sources import Chunk, Part, Source
from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What every worker needs besides its chunk."""

    chunks_folder: Path
    options: PrepareOptions
    tokenizer_folder: Path
    bos_eos: tuple[int | None, int]
    special_tokens: tuple[str, ...]
    vocab_size: int

    def writer(self) -> ChunkWriter:
        return ChunkWriter(self.chunks_folder, self.options, self.tokenizer_folder, self.bos_eos, self.vocab_size)


def process_chunks(
    chunks: Iterable[Chunk],
    setup: WorkerSetup,
    num_workers: int,
    on_done: Callable[[Chunk], None],
    unreadable: UnreadableInputs,
) -> list[str]:
    """Make the folders of all chunks that are still missing.

    Workers clean and tokenise chunks out of order. Between these two steps, this process finds duplicates in input order.

    Args:
      num_workers: number of processes; 1 runs in this process.
      on_done: called with each chunk, without its records, once its folder exists.
      unreadable: receives the counts of each input.

    Returns:
      The names of all chunks, in order.

    Raises:
      UserError: an input has changed since one of its chunks was finished, or is mostly unusable; a worker was killed.
    """
    seen, names = duplicates.SeenKeys(), []
    reading: collections.deque = collections.deque()  # (chunk, future of its cleaned form and keys, or keys), in order
    writing: dict[concurrent.futures.Future, Chunk] = {}

    def write_next():
        chunk, cleaned = reading.popleft()
        if isinstance(cleaned, np.ndarray):  # the chunk was finished by an earlier run
            seen.mark(cleaned)
            unreadable.done(counts_of_done(setup.chunks_folder / chunk.name))
            on_done(chunk)
            return
        pickled, keys = cleaned.result()
        codes = seen.mark(keys) if setup.options.dedup != "none" else np.full(len(keys), duplicates.KEPT, np.uint8)
        writing[pool.submit(_write, pickled, codes)] = chunk

    def wait_for_one():
        done, _ = concurrent.futures.wait(writing, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            on_done(writing.pop(future))
            unreadable.done(future.result())

    with _workers(num_workers, setup) as pool:
        for chunk in chunks:
            # Reads and writes share one pool; more in flight would only take more memory.
            while len(reading) >= num_workers:
                write_next()
            while len(writing) > num_workers:
                wait_for_one()
            keys = _keys_of_done(setup.chunks_folder, chunk)
            names.append(chunk.name)
            unreadable.begin(part.source.name for part in chunk.parts)
            reading.append((_without_records(chunk), pool.submit(_read, chunk) if keys is None else keys))
        while reading:
            write_next()
        while writing:
            wait_for_one()
        unreadable.finish()
    return names


def _without_records(chunk: Chunk) -> Chunk:
    return dataclasses.replace(chunk, parts=[Part(part.source, position=part.position) for part in chunk.parts])


def counts_of_done(folder: Path) -> list[InputCounts]:
    return [InputCounts(**counts) for counts in json.loads((folder / "chunk.json").read_text(encoding="utf-8"))["inputs"]]


def _keys_of_done(folder: Path, chunk: Chunk) -> np.ndarray | None:
    done = folder / chunk.name
    if not done.exists():
        return None
    if json.loads((done / "chunk.json").read_text(encoding="utf-8"))["digest"] != chunk_reader.digest(chunk):
        first = chunk.parts[0]
        raise UserError(
            f"--input: {first.source.name!r} has changed since part of it was prepared, near line "
            f"{first.records[0][0] if first.records else 1:,} (--overwrite starts over)"
        )
    return np.load(done / "keys.npy")


class _ThisProcess(concurrent.futures.Executor):
    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _workers(num_workers: int, setup: WorkerSetup) -> Generator[concurrent.futures.Executor]:
    """A pool that is shut down at the first error. Raises UserError if a worker was killed."""
    with _pool(num_workers, setup) as pool:
        try:
            yield pool
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "--num_workers: a worker process was killed, perhaps because memory ran out (run the same command again to "
                "resume; fewer workers need less memory)"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pool(num_workers: int, setup: WorkerSetup) -> concurrent.futures.Executor:
    if num_workers == 1:
        _start(setup)
        return _ThisProcess()
    # Not fork: this process has threads, such as the tokenizer's. The fork server imports the modules once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([chunk_writer.__name__, __name__])
    return concurrent.futures.ProcessPoolExecutor(num_workers, context, _start_worker, (setup,))


_setup: WorkerSetup
_writer: ChunkWriter
_lock: BinaryIO  # held until the worker ends


def _start(setup: WorkerSetup) -> None:
    global _setup, _writer
    _setup = setup
    _writer = setup.writer()


def _start_worker(setup: WorkerSetup) -> None:
    global _lock
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _lock = work_folder.hold_for_worker(setup.chunks_folder.parent)
    _start(setup)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _read(chunk: Chunk) -> tuple[bytes, np.ndarray]:
    cleaned = chunk_reader.read_chunk(chunk, _setup.options, _setup.special_tokens, _setup.vocab_size)
    return pickle.dumps(cleaned), cleaned.keys  # pickled here: the parent only passes the documents on


def _write(pickled: bytes, codes: np.ndarray) -> list[InputCounts]:
    return _writer.write_chunk(pickle.loads(pickled), codes)


def chunks_of(group: list[Source], number: int, options: PrepareOptions, bos_eos, open_file) -> Iterator[Chunk]:
    """The chunks of one group of sources; see sources.chunks."""
    reader = sources_lib.Reader(options.txt_document, bos_eos, open_file, options.encoding, options.text_key)
    return sources_lib.chunks(group, number, options.sizes, reader)
