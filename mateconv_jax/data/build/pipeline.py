"""The making of a dataset folder: a tokenizer, chunk after chunk in parallel, and the whole put together.

Everything is made in OUTPUT.partial, one folder a finished chunk, and renamed at the end. A run that was killed goes on with
the chunks that are missing, and gives the same bytes as one that was not.
"""

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import functools
import heapq
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mateconv_jax import files
from mateconv_jax.data.build import worker
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.worker import ChunkWriter
from mateconv_jax.data.shards import VERSION
from mateconv_jax.data.text import duplicates, sources as sources_lib
from mateconv_jax.data.text.sources import Chunk, Source
from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What every worker needs, besides its chunk."""

    chunks_folder: Path
    options: PrepareOptions
    tokenizer_folder: Path
    bos_eos: tuple[int, int]
    special_tokens: tuple[str, ...]
    vocab_size: int

    def writer(self) -> ChunkWriter:
        return ChunkWriter(self.chunks_folder, self.options, self.tokenizer_folder, self.bos_eos)


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer to train on a sample of the input; see tokenizer.train."""

    vocab_size: int = 6400
    split_digits: bool = False
    sample_mb: float = 32.0  # of text; twice as much gained 0.03 % compression


def prepare(
    sources: list[Source],
    output: Path,
    tokenizer: str | TokenizerTraining,
    options: PrepareOptions = PrepareOptions(),
    num_workers: int = 1,
    overwrite: bool = False,
    also_bin: bool = False,
    run_chunks: Callable | None = None,
    open_file: Callable[[str], BinaryIO] = sources_lib.open_local,
) -> dict | None:
    """Make a dataset folder; see data/dataset.py.

    Args:
      tokenizer: a folder that holds one, or how to train one.
      num_workers: processes that clean and tokenise; 1 works in this one.
      overwrite: replace what is there, or was begun there, with other options.
      also_bin: write each split as a flat uint16 stream too.
      run_chunks: takes (sources, WorkerSetup) and makes all chunks, in place of this machine's processes.
      open_file: opens an input for reading bytes.

    Returns:
      What stats.json holds; None where the dataset was there already, made with the same options.

    Raises:
      UserError: wrong input, another run in the same folder, a full disk. What was finished stays, and is not done again.
    """
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib  # imports transformers, 2 s

    start = time.perf_counter()
    if isinstance(tokenizer, TokenizerTraining):
        training, given = tokenizer, None
        vocab_size, identity = tokenizer.vocab_size, dataclasses.asdict(tokenizer)
    else:
        training, given = None, tokenizer_lib.load(tokenizer, "--tokenizer")
        vocab_size, identity = len(given), tokenizer_lib.fingerprint(given)
    _check_bin(sources, training is not None, also_bin, vocab_size)
    described = _described(sources, identity, options, also_bin)
    partial = output.with_name(output.name + ".partial")
    if output.exists() and not overwrite:
        from mateconv_jax.data import dataset

        check_options(dataset.read_metadata(output, "--output")["options"], described, f"{str(output)!r} was made")
        shutil.rmtree(partial, ignore_errors=True)
        return None
    try:
        # Finished chunks of another version of the rows cannot be mixed with ours.
        with work_folder(partial, described | {"row_version": VERSION}, overwrite) as folder:
            _make_chunks(folder, sources, given, training, options, num_workers, run_chunks, open_file)
            figures = _assemble(folder, output, options, described, also_bin, start)
        shutil.rmtree(partial)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {error.filename or str(partial)!r}: {error.strerror or error} (what was finished stays in "
            f"{str(partial)!r}; the same command goes on)"
        ) from error
    return figures


def _described(sources: list[Source], tokenizer: dict | str, options: PrepareOptions, also_bin: bool) -> dict:
    """What decides the dataset's bytes, for JSON. tokenizer: how one is trained, or the fingerprint of the one given."""
    inputs = [[source.path, source.size] for source in sources]
    return {"input": inputs, "tokenizer": tokenizer, **dataclasses.asdict(options), "also_bin": also_bin}


def _check_bin(sources: list[Source], trains_tokenizer: bool, also_bin: bool, vocab_size: int) -> None:
    if trains_tokenizer and any(source.format == "bin" for source in sources):
        raise UserError(
            "--train_tokenizer: a .bin file holds token ids, not text (expected --tokenizer DIR, the one they are of)"
        )
    if also_bin and vocab_size > 2**16:
        raise UserError("--also_bin: a .bin file holds 16-bit token ids (expected a vocabulary of at most 65,536)")


def _make_chunks(folder: Path, sources, given, training, options, num_workers, run_chunks, open_file) -> None:
    """Tokenizer and finished chunks in a work folder; the arguments are `prepare`'s."""
    bos_eos = given and (given.bos_token_id, given.eos_token_id)
    read = functools.partial(all_chunks, sources, options, bos_eos, open_file)
    chunks = read()
    if given is None:
        once = any(source.path == "-" for source in sources)
        given, chunks = _trained(training, options, folder / "tokenizer", chunks, None if once else read)
    elif not (folder / "tokenizer").exists():
        _save(given, folder / "tokenizer")
    setup = WorkerSetup(
        folder / "chunks",
        options,
        folder / "tokenizer",
        (given.bos_token_id, given.eos_token_id),
        tuple(given.all_special_tokens),
        len(given),
    )
    if run_chunks:
        run_chunks(sources, setup)
    else:
        with Progress(sources) as progress:
            process_chunks(chunks, setup, num_workers, progress.done)


def _assemble(folder: Path, output: Path, options: PrepareOptions, described: dict, also_bin: bool, start: float) -> dict:
    """The finished chunks of a work folder become the dataset at `output`. `start`: when the work began."""
    from mateconv_jax.data.build.assembling import assemble  # imports tensorflow_datasets, 2 s

    dataset = folder / "dataset"
    shutil.rmtree(dataset, ignore_errors=True)
    seconds = time.perf_counter() - start
    figures = assemble(folder / "chunks", dataset, folder / "tokenizer", options.seq_len, described, seconds, also_bin)
    if output.exists():
        output.rename(folder / "replaced")
    dataset.rename(output)
    return figures


# ---- the tokenizer ------------------------------------------------------------------------------------------------


def _trained(training: TokenizerTraining, options: PrepareOptions, folder: Path, chunks: Iterator[Chunk], read_again):
    """The tokenizer, and the chunks that are still to be read. `read_again` is None where the input can be read only once."""
    from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib

    if folder.exists():
        return tokenizer_lib.load(folder, "--output"), chunks
    max_bytes = int(training.sample_mb * 1e6)
    if read_again is None:  # the sample is the input's beginning
        head, size = [], 0
        for chunk in chunks:
            head.append(chunk)
            size += sum(len(record) for _, record in chunk.records)
            if size >= max_bytes:
                break
        texts, chunks = clean_texts(head, options), itertools.chain(head, chunks)
    else:
        texts, chunks = clean_texts(sample(chunks, max_bytes), options), read_again()
    trained = bpe.train(texts, training.vocab_size, split_digits=training.split_digits)
    _save(trained, folder)
    return trained, chunks


def sample(chunks: Iterable[Chunk], max_bytes: int, seed: int = 0) -> Iterator[Chunk]:
    """Records that are together at most max_bytes, drawn uniformly from a stream of unknown length that is not held; all of
    them where they are no more. They come in their order.

    Each record draws a number, and those with the smallest are kept (a reservoir; Vitter, 1985, with a bound in bytes).
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, Chunk]] = []  # a heap, the largest number first
    size, limit, position = 0, 1.0, 0
    for chunk in chunks:
        for record in chunk.records:
            position += 1
            if (number := rng.random()) >= limit or len(record[1]) > max_bytes:
                continue
            heapq.heappush(kept, (-number, position, dataclasses.replace(chunk, records=[record], rejects=[])))
            size += len(record[1])
            while size > max_bytes:
                negative, _, dropped = heapq.heappop(kept)
                size -= len(dropped.records[0][1])
                limit = -negative
    for _, _, chunk in sorted(kept, key=lambda entry: entry[1]):
        yield chunk


def clean_texts(chunks: Iterable[Chunk], options: PrepareOptions) -> Iterator[str]:
    """Texts for a tokenizer to learn from; of a dialogue, each turn as the chat template writes it."""
    from mateconv_jax.data.tokenizer.tokenizer import SPECIAL_TOKENS

    for chunk in chunks:
        for document in worker.read_chunk(chunk, options, tuple(SPECIAL_TOKENS.values()), 0).documents:
            for piece in document:
                if isinstance(piece, str):
                    yield piece
                else:
                    yield from (f"{message['role']}\n{message['content']}" for message in piece)


def _save(tokenizer, folder: Path) -> None:
    with files.aside(folder, folder=True) as written:
        tokenizer.save_pretrained(written)


# ---- the work folder ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def work_folder(folder: Path, options: dict, overwrite: bool) -> Iterator[Path]:
    """The folder, made and locked, once it is known that what lies there was made with the same options.

    Raises:
      UserError: another run is writing there, or other options made what is there and overwrite is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--output: another run is writing {str(folder)!r} (wait for it, or choose another folder)"
            ) from error
        there = folder / "options.json"
        if there.exists():
            try:
                check_options(json.loads(there.read_text()), options, f"{str(folder)!r} was begun")
            except UserError:
                if not overwrite:
                    raise
                for path in folder.iterdir():
                    if path.name != "lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        files.write_text(there, json.dumps(options, ensure_ascii=False))
        (folder / "chunks").mkdir(exist_ok=True)
        yield folder


def check_options(theirs: dict, ours: dict, what: str) -> None:
    """Raises UserError with the first option that differs. `what` starts the sentence: "'data/zh' was made"."""
    ours = json.loads(json.dumps(ours))
    for key in [*ours, *theirs]:
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"--output: {what} with {key}={theirs.get(key)!r}, not {ours.get(key)!r} "
                "(choose another folder, give the same options, or --overwrite)"
            )


# ---- all chunks, in parallel --------------------------------------------------------------------------------------


class Progress:
    """How much of the input is done: a bar on a terminal, a line every ten seconds in a log."""

    def __init__(self, sources: list[Source]):
        sizes = [source.size for source in sources if source.size is not None]
        self._total = sum(sizes) if len(sizes) == len(sources) else None  # bytes
        self._positions: dict[Source, int] = {}
        self._last_line = time.monotonic()

    def __enter__(self):
        self._bar = tqdm(
            total=self._total,
            unit="B",
            unit_scale=True,
            desc="tokenising",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )
        return self

    def __exit__(self, *_):
        self._bar.close()

    def done(self, chunk: Chunk) -> None:
        """A chunk is finished, perhaps not in order."""
        before = self._positions.get(chunk.source, 0)
        self._positions[chunk.source] = max(before, chunk.position)
        self._bar.update(self._positions[chunk.source] - before)
        if self._bar.disable and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            total = "" if self._total is None else f" of {self._total / 1e6:,.0f}"
            print(
                f"tokenising: {sum(self._positions.values()) / 1e6:,.0f}{total} MB of input done", file=sys.stderr, flush=True
            )


def all_chunks(
    sources: list[Source], options: PrepareOptions, bos_eos: tuple[int, int] | None, open_file=sources_lib.open_local
) -> Iterator[Chunk]:
    for number, source in enumerate(sources):
        yield from sources_lib.chunks(source, number, options.sizes, options.txt_document, bos_eos, open_file)


def process_chunks(chunks: Iterable[Chunk], setup: WorkerSetup, num_workers: int, on_done: Callable[[Chunk], None]) -> None:
    """Make the folders of all chunks that are not there yet.

    Chunks are cleaned and tokenised out of order, but which documents are duplicates is decided in order, between the two.

    Args:
      num_workers: processes; 1 works in this one.
      on_done: called with each chunk, without its records, when its folder is there.

    Raises:
      UserError: an input changed since the folder of a chunk was made; a worker was killed.
    """
    seen = duplicates.SeenKeys()
    reading: collections.deque = collections.deque()  # (chunk, its cleaned form and keys), in order
    writing: dict[concurrent.futures.Future, Chunk] = {}

    def write_next():
        chunk, cleaned = reading.popleft()
        if isinstance(cleaned, np.ndarray):  # the keys of a chunk that is done
            seen.mark(cleaned)
            on_done(chunk)
            return
        pickled, keys = cleaned.result()
        codes = seen.mark(keys) if setup.options.dedup != "none" else np.full(len(keys), duplicates.KEPT, np.uint8)
        writing[pool.submit(_write, pickled, chunk.source.path, codes)] = chunk

    def wait_for_one():
        done, _ = concurrent.futures.wait(writing, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            future.result()
            on_done(writing.pop(future))

    with _pool(num_workers, setup) as pool:
        try:
            for chunk in chunks:
                # Both halves wait in one queue; more in flight would only hold more memory.
                while len(reading) >= num_workers:
                    write_next()
                while len(writing) > num_workers:
                    wait_for_one()
                keys = _keys_of_done(setup.chunks_folder, chunk)
                reading.append((dataclasses.replace(chunk, records=[]), pool.submit(_read, chunk) if keys is None else keys))
            while reading:
                write_next()
            while writing:
                wait_for_one()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "--num_workers: a worker process was killed, perhaps for want of memory (run again, it goes on; fewer workers "
                "need less)"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _keys_of_done(folder: Path, chunk: Chunk) -> np.ndarray | None:
    done = folder / chunk.name
    if not done.exists():
        return None
    if json.loads((done / "chunk.json").read_text())["digest"] != worker.digest(chunk):
        raise UserError(
            f"--input: {chunk.source.path!r} has changed since part of it was prepared, near line "
            f"{chunk.records[0][0] if chunk.records else 1:,} (--overwrite begins again)"
        )
    return np.load(done / "keys.npy")


class _ThisProcess(concurrent.futures.Executor):
    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(num_workers: int, setup: WorkerSetup) -> concurrent.futures.Executor:
    if num_workers == 1:
        _start(setup)
        return _ThisProcess()
    # Not fork: the tokenizer's and other threads of this process would not survive it. The server imports once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__, __name__])
    return concurrent.futures.ProcessPoolExecutor(num_workers, context, _start_worker, (setup,))


_setup: WorkerSetup
_writer: ChunkWriter


def _start(setup: WorkerSetup) -> None:
    global _setup, _writer
    _setup = setup
    _writer = setup.writer()


def _start_worker(setup: WorkerSetup) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _start(setup)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _read(chunk: Chunk) -> tuple[bytes, np.ndarray]:
    cleaned = worker.read_chunk(chunk, _setup.options, _setup.special_tokens, _setup.vocab_size)
    return pickle.dumps(cleaned), cleaned.keys  # pickled here, the documents only pass through the parent


def _write(pickled: bytes, source: str, codes: np.ndarray) -> None:
    _writer.write_chunk(pickle.loads(pickled), source, codes)
