"""Making a dataset folder: a tokenizer, the chunks in parallel, and the folder assembled from them.

Everything is made in OUTPUT.partial, one folder a finished chunk, and renamed at the end. A run that was killed goes on with
the chunks that are missing, and gives the same bytes as one that was not.
"""

import collections
import concurrent.futures.process
import contextlib
import dataclasses
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
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from tqdm import tqdm

from mateconv_jax import files
from mateconv_jax.data.build import chunk_reader, chunk_writer, identity, work_folder
from mateconv_jax.data.build.chunk_reader import InputCounts
from mateconv_jax.data.build.chunk_writer import ChunkWriter
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.unreadable import UnreadableInputs
from mateconv_jax.data.dialogue import Dialogue
from mateconv_jax.data.shards import VERSION
from mateconv_jax.data.text import duplicates, sources as sources_lib
from mateconv_jax.data.text.dialogue import other_texts
from mateconv_jax.data.text.sources import Chunk, Part, Source
from mateconv_jax.errors import UserError

CHUNK_VERSION = 3  # of the folders of finished chunks


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What every worker needs, besides its chunk."""

    chunks_folder: Path
    options: PrepareOptions
    tokenizer_folder: Path
    bos_eos: tuple[int | None, int]
    special_tokens: tuple[str, ...]
    vocab_size: int

    def writer(self) -> ChunkWriter:
        return ChunkWriter(self.chunks_folder, self.options, self.tokenizer_folder, self.bos_eos, self.vocab_size)


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
    keep_going: bool = False,
) -> dict | None:
    """Make a dataset folder; see data/dataset.py.

    Args:
      tokenizer: a folder that holds one, or how to train one.
      num_workers: processes that clean and tokenise; 1 works in this one.
      overwrite: replace the dataset that is there, or was begun there, with other options. Nothing but a dataset is replaced.
      also_bin: write each split as a flat uint16 stream too.
      run_chunks: takes (sources, WorkerSetup, identity), makes all chunks in place of this machine's processes, and returns
        their names in order.
      open_file: opens an input for reading bytes.
      keep_going: use what can be read of an input that is broken or mostly rejected; otherwise it is an error.

    Returns:
      What stats.json holds; None where the dataset was there already, made with the same options.

    Raises:
      UserError: wrong input, another run in the same folder, a full disk. What was finished stays, and is not done again.
    """
    start = time.perf_counter()
    partial = work_folder.path_for(output)
    work_folder.check_outside(sources, partial)
    work_folder.restore_replaced(output)
    training, given, described = _described(sources, tokenizer, options, also_bin)
    bos_eos = None if given is None else (given.bos_token_id, given.eos_token_id)
    read = functools.partial(all_chunks, sources, options, bos_eos, open_file)
    if output.exists() and not overwrite:
        _check_there(output, described, read)
        work_folder.remove(partial)
        return None
    work_folder.check_replaceable(output, sources)
    versions = {"row_version": VERSION, "chunk_version": CHUNK_VERSION}  # chunks of another version cannot be mixed with ours
    unreadable = UnreadableInputs(keep_going, options.txt_document == "file")
    try:
        with work_folder.opened(partial, described | versions, overwrite) as folder:
            names = _make_chunks(folder, sources, read, given, training, options, num_workers, run_chunks, unreadable)
            figures = _assemble(folder, names, output, options, described, also_bin, start)
        work_folder.remove(partial)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {error.filename or str(partial)!r}: {error.strerror or error} (what was finished stays in "
            f"{str(partial)!r}; the same command goes on)"
        ) from error
    return figures


def _described(sources: list[Source], tokenizer: str | TokenizerTraining, options: PrepareOptions, also_bin: bool):
    """How a tokenizer is trained, or None; the one given, or None; and what decides the dataset's bytes, for JSON."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib  # imports transformers, 2 s

    if isinstance(tokenizer, TokenizerTraining):
        training, given, vocab_size = tokenizer, None, tokenizer.vocab_size
        made_with = {"tokenizer": dataclasses.asdict(tokenizer), "tokenizer_settings": None}
    else:
        training, given = None, tokenizer_lib.load(tokenizer, "--tokenizer")
        vocab_size = tokenizer_lib.vocab_size(given)
        settings = identity.tokenizer_settings(given)
        made_with = {"tokenizer": tokenizer_lib.fingerprint(given), "tokenizer_settings": settings}
    _check_bin(sources, training is not None, also_bin, vocab_size)
    described = {"input": identity.inputs(sources), **made_with, **dataclasses.asdict(options), "also_bin": also_bin}
    return training, given, described


def _check_there(output: Path, described: dict, read: Callable[[], Iterator[Chunk]]) -> None:
    """Raises UserError unless the dataset at `output` was made of these inputs with these options."""
    from mateconv_jax.data import dataset

    metadata = dataset.read_metadata(output, "--output")
    theirs = metadata["options"]
    identity.check_options(theirs, described, f"{str(output)!r} was made")
    if identity.same_input(theirs, described):
        return
    if "input_digest" not in metadata:  # made by an earlier version, which compared names and sizes
        if any(size is None for _, size, *_ in described["input"]):
            raise UserError(f"--input: what {str(output)!r} was made from cannot be compared with this (give --overwrite)")
        return
    print("the input may have changed: comparing it with what the dataset was made from", file=sys.stderr, flush=True)
    if input_digest(map(chunk_reader.digest, read())) != metadata["input_digest"]:
        raise UserError(
            f"--input: the content is not what {str(output)!r} was made from (choose another --output, or --overwrite)"
        )


def input_digest(chunk_digests: Iterable[str]) -> str:
    """Of everything that was read, from the digests of all chunks in order."""
    return blake2b("".join(chunk_digests).encode(), digest_size=16).hexdigest()


def _check_bin(sources: list[Source], trains_tokenizer: bool, also_bin: bool, vocab_size: int) -> None:
    if trains_tokenizer and any(source.format == "bin" for source in sources):
        raise UserError(
            "--train_tokenizer: a .bin file holds token ids, not text (expected --tokenizer DIR, the one they are of)"
        )
    if also_bin and vocab_size > 2**16:
        raise UserError("--also_bin: a .bin file holds 16-bit token ids (expected a vocabulary of at most 65,536)")


def _make_chunks(
    folder: Path, sources, read, given, training, options, num_workers, run_chunks, unreadable: UnreadableInputs
) -> list[str]:
    """Tokenizer and finished chunks in a work folder; the chunks' names in order. `read` gives all sources' chunks, from the
    beginning each time; the other arguments are `prepare`'s.
    """
    chunks = read()
    if given is None:
        once = any(source.path == "-" for source in sources)
        given, chunks = _trained(training, options, folder, chunks, None if once else read)
    elif not (folder / "tokenizer").exists():
        _save(given, folder / "tokenizer")
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    setup = WorkerSetup(
        folder / "chunks",
        options,
        folder / "tokenizer",
        (given.bos_token_id, given.eos_token_id),
        tuple(given.all_special_tokens),
        tokenizer_lib.vocab_size(given),
    )
    if not run_chunks:
        with Progress(sources) as progress:
            return process_chunks(chunks, setup, num_workers, progress.done, unreadable)
    made_from = (folder / "options.json").read_text(encoding="utf-8")
    if not identity.same_input(json.loads(made_from), json.loads(made_from)):  # not known: no chunk can be taken for ours
        made_from += str(time.time_ns())
    names = run_chunks(sources, setup, blake2b(made_from.encode(), digest_size=8).hexdigest())
    for name in names:
        inputs = _counts_of_done(folder / "chunks" / name)
        unreadable.begin(counts.path for counts in inputs)
        unreadable.done(inputs)
    unreadable.finish()
    return names


def _assemble(
    folder: Path, names: list[str], output: Path, options: PrepareOptions, described: dict, also_bin: bool, start: float
) -> dict:
    """The finished chunks of a work folder become the dataset at `output`. `start`: when the work began."""
    from mateconv_jax.data.build.assembling import assemble  # imports tensorflow_datasets, 2 s

    made, replaced = folder / "dataset", folder / "replaced"
    shutil.rmtree(made, ignore_errors=True)
    chunks = [folder / "chunks" / name for name in names]
    digest = input_digest(json.loads((chunk / "chunk.json").read_text())["digest"] for chunk in chunks)
    seconds = time.perf_counter() - start
    figures = assemble(chunks, made, folder / "tokenizer", options.seq_len, described, digest, seconds, also_bin)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed after it had put a newer one in its place
        output.rename(replaced)
    made.rename(output)
    return figures


# ---- the tokenizer ------------------------------------------------------------------------------------------------


def _trained(training: TokenizerTraining, options: PrepareOptions, folder: Path, chunks: Iterator[Chunk], read_again):
    """The tokenizer, and the chunks that are still to be read. `read_again` is None where the input can be read only once.

    Raises:
      UserError: a tokenizer is there that was trained on other text.
    """
    from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib

    described = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    record = folder / "sample.json"  # what the tokenizer was trained on
    before = json.loads(record.read_text(encoding="utf-8")) if (folder / "tokenizer").exists() else None
    if before and identity.same_input(before, described):
        return tokenizer_lib.load(folder / "tokenizer", "--output"), chunks
    max_bytes = int(training.sample_mb * 1e6)
    if read_again is None:  # the sample is the input's beginning
        head, size = [], 0
        for chunk in chunks:
            head.append(chunk)
            size += sum(len(record) for part in chunk.parts for _, record in part.records)
            if size >= max_bytes:
                break
        sampled, chunks = head, itertools.chain(head, chunks)
    else:
        sampled, chunks = list(sample(chunks, max_bytes)), read_again()
    now = {"input": described["input"], "digest": input_digest(map(chunk_reader.digest, sampled))}
    if before:
        if before["digest"] != now["digest"]:
            raise UserError("--input: the content has changed since a tokenizer was trained on it (--overwrite begins again)")
        return tokenizer_lib.load(folder / "tokenizer", "--output"), chunks
    trained = bpe.train(clean_texts(sampled, options), training.vocab_size, split_digits=training.split_digits)
    files.write_text(record, json.dumps(now))
    _save(trained, folder / "tokenizer")
    return trained, chunks


def sample(chunks: Iterable[Chunk], max_bytes: int, seed: int = 0) -> Iterator[Chunk]:
    """Records that are together at most max_bytes, drawn uniformly from a stream of unknown length that is not held; all of
    them where they are no more. They come in their order.

    Each record draws a number, and those with the smallest are kept (a reservoir; Vitter, 1985, with a bound in bytes).
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, Source, tuple[int, bytes]]] = []  # a heap, the largest number first
    size, limit, position = 0, 1.0, 0
    for part in itertools.chain.from_iterable(chunk.parts for chunk in chunks):
        for record in part.records:
            position += 1
            if (number := rng.random()) >= limit or len(record[1]) > max_bytes:
                continue
            heapq.heappush(kept, (-number, position, part.source, record))
            size += len(record[1])
            while size > max_bytes:
                negative, _, _, dropped = heapq.heappop(kept)
                size -= len(dropped[1])
                limit = -negative
    kept.sort(key=lambda entry: entry[1])
    for start in range(0, len(kept), 1000):
        by_source = itertools.groupby(kept[start : start + 1000], key=lambda entry: entry[2])
        yield Chunk("", [Part(source, [record for *_, record in entries]) for source, entries in by_source])


def clean_texts(chunks: Iterable[Chunk], options: PrepareOptions, unreadable: UnreadableInputs | None = None) -> Iterator[str]:
    """Texts for a tokenizer to learn from; of a dialogue, each turn as the chat template writes it.

    Raises:
      UserError: an input is mostly unusable, if `unreadable` is to notice.
    """
    from mateconv_jax.data.tokenizer.tokenizer import SPECIAL_TOKENS

    for chunk in chunks:
        cleaned = chunk_reader.read_chunk(chunk, options, tuple(SPECIAL_TOKENS.values()), 0)
        if unreadable:
            unreadable.begin(counts.path for counts in cleaned.inputs)
            unreadable.done(cleaned.inputs)
        for document in cleaned.documents:
            for piece in document:
                if isinstance(piece, str):
                    yield piece
                elif isinstance(piece, Dialogue):
                    yield from (f"{message['role']}\n{message['content']}" for message in piece.messages)
                    yield from other_texts(piece)
    if unreadable:
        unreadable.finish()


def _save(tokenizer, folder: Path) -> None:
    with files.aside(folder, folder=True) as written:
        tokenizer.save_pretrained(written)


# ---- all chunks, in parallel --------------------------------------------------------------------------------------


class Progress:
    """How much of the input is done: a bar on a terminal, a line every ten seconds in a log."""

    def __init__(self, sources: list[Source]):
        sizes = [source.size for source in sources if source.size is not None]
        self._total = sum(sizes) if len(sizes) == len(sources) else None  # bytes
        self._positions: dict[str, int] = {}
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
        advance = 0
        for part in chunk.parts:
            before = self._positions.get(part.source.path, 0)
            self._positions[part.source.path] = max(before, part.position)
            advance += self._positions[part.source.path] - before
        self._bar.update(advance)
        if self._bar.disable and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            total = "" if self._total is None else f" of {self._total / 1e6:,.0f}"
            print(
                f"tokenising: {sum(self._positions.values()) / 1e6:,.0f}{total} MB of input done", file=sys.stderr, flush=True
            )


def all_chunks(
    sources: list[Source], options: PrepareOptions, bos_eos: tuple[int | None, int] | None, open_file=sources_lib.open_local
) -> Iterator[Chunk]:
    for number, group in enumerate(sources_lib.groups(sources, options.sizes)):
        yield from chunks_of(group, number, options, bos_eos, open_file)


def chunks_of(group: list[Source], number: int, options: PrepareOptions, bos_eos, open_file) -> Iterator[Chunk]:
    """The chunks of one group of sources; see sources.chunks."""
    reader = sources_lib.Reader(options.txt_document, bos_eos, open_file, options.encoding, options.text_key)
    return sources_lib.chunks(group, number, options.sizes, reader)


def process_chunks(
    chunks: Iterable[Chunk],
    setup: WorkerSetup,
    num_workers: int,
    on_done: Callable[[Chunk], None],
    unreadable: UnreadableInputs,
) -> list[str]:
    """Make the folders of all chunks that are not there yet.

    Chunks are cleaned and tokenised out of order, but which documents are duplicates is decided in order, between the two.

    Args:
      num_workers: processes; 1 works in this one.
      on_done: called with each chunk, without its records, when its folder is there.
      unreadable: told what became of each input.

    Returns:
      The names of all chunks, in order.

    Raises:
      UserError: an input changed since the folder of a chunk was made, or is mostly unusable; a worker was killed.
    """
    seen, names = duplicates.SeenKeys(), []
    reading: collections.deque = collections.deque()  # (chunk, its cleaned form and keys), in order
    writing: dict[concurrent.futures.Future, Chunk] = {}

    def write_next():
        chunk, cleaned = reading.popleft()
        if isinstance(cleaned, np.ndarray):  # the keys of a chunk that is done
            seen.mark(cleaned)
            unreadable.done(_counts_of_done(setup.chunks_folder / chunk.name))
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
            # Both halves wait in one queue; more in flight would only hold more memory.
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


def _counts_of_done(folder: Path) -> list[InputCounts]:
    return [InputCounts(**counts) for counts in json.loads((folder / "chunk.json").read_text())["inputs"]]


def _keys_of_done(folder: Path, chunk: Chunk) -> np.ndarray | None:
    done = folder / chunk.name
    if not done.exists():
        return None
    if json.loads((done / "chunk.json").read_text())["digest"] != chunk_reader.digest(chunk):
        first = chunk.parts[0]
        raise UserError(
            f"--input: {first.source.name!r} has changed since part of it was prepared, near line "
            f"{first.records[0][0] if first.records else 1:,} (--overwrite begins again)"
        )
    return np.load(done / "keys.npy")


class _ThisProcess(concurrent.futures.Executor):
    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _workers(num_workers: int, setup: WorkerSetup) -> Iterator[concurrent.futures.Executor]:
    """A pool that is given up at the first error. Raises UserError where a worker was killed."""
    with _pool(num_workers, setup) as pool:
        try:
            yield pool
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "--num_workers: a worker process was killed, perhaps because memory ran out (run the command again to go on; "
                "fewer workers need less)"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pool(num_workers: int, setup: WorkerSetup) -> concurrent.futures.Executor:
    if num_workers == 1:
        _start(setup)
        return _ThisProcess()
    # Not fork: the tokenizer's and other threads of this process would not survive it. The server imports once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([chunk_writer.__name__, __name__])
    return concurrent.futures.ProcessPoolExecutor(num_workers, context, _start_worker, (setup,))


_setup: WorkerSetup
_writer: ChunkWriter
_lock: TextIO  # kept open


def _start(setup: WorkerSetup) -> None:
    global _setup, _writer
    _setup = setup
    _writer = setup.writer()


def _start_worker(setup: WorkerSetup) -> None:
    global _lock
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
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
    return pickle.dumps(cleaned), cleaned.keys  # pickled here, the documents only pass through the parent


def _write(pickled: bytes, codes: np.ndarray) -> list[InputCounts]:
    return _writer.write_chunk(pickle.loads(pickled), codes)
