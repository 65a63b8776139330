"""Prepare a dataset folder: get a tokenizer, process chunks in parallel, assemble the folder.

All work happens in OUTPUT.partial, with one folder per finished chunk, and is renamed into place at the end. After a kill, the
next run processes only the missing chunks; the dataset is byte for byte the same.
"""

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from mateconv_jax import disk
from mateconv_jax.data.build import chunk_reader, identity, parallel_chunks, tokenizer_sample, work_folder
from mateconv_jax.data.build.input_progress import InputProgress
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.parallel_chunks import WorkerSetup, chunks_of
from mateconv_jax.data.build.tokenizer_sample import TokenizerTraining
from mateconv_jax.data.build.unreadable import UnreadableInputs
from mateconv_jax.data.shards import VERSION
from mateconv_jax.data.text import sources as sources_lib
from mateconv_jax.data.text.sources import Chunk, Source
from mateconv_jax.errors import UserError

CHUNK_VERSION = 4  # of the finished chunks' folders


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
      tokenizer: a tokenizer's folder, or how to train one.
      num_workers: processes that clean and tokenise; 1 runs in this process.
      overwrite: replace a dataset, finished or begun, that was made with other options. Only datasets are ever replaced.
      also_bin: also write each split as a flat uint16 stream.
      run_chunks: called with (sources, WorkerSetup, identity), makes all chunks instead of local processes and returns their
        names in order.
      open_file: opens an input in binary mode.
      keep_going: use the readable part of an input that is broken or mostly rejected, which is an error otherwise.

    Returns:
      The content of stats.json; None if the dataset already exists, made with the same options.

    Raises:
      UserError: invalid input, another run in the same folder, a full disk. Finished chunks are kept and reused.
    """
    start = time.perf_counter()
    partial = work_folder.path_for(output)
    work_folder.check_outside(sources, partial)
    work_folder.restore_replaced(output)
    training, given, options, described = _described(sources, tokenizer, options, also_bin)
    bos_eos = None if given is None else (given.bos_token_id, given.eos_token_id)
    read = functools.partial(all_chunks, sources, options, bos_eos, open_file)
    if output.exists() and not overwrite:
        _check_there(output, described, read)
        work_folder.remove(partial)
        return None
    work_folder.check_replaceable(output, sources)
    versions = {"row_version": VERSION, "chunk_version": CHUNK_VERSION}  # chunks of other versions cannot be mixed with these
    unreadable = UnreadableInputs(keep_going, options.txt_document == "file")
    try:
        with disk.os_errors(partial), work_folder.opened(partial, described | versions, overwrite) as folder:
            names = _make_chunks(folder, sources, read, given, training, options, num_workers, run_chunks, unreadable)
            figures = _assemble(folder, names, output, options, described, also_bin, start)
        work_folder.remove(partial)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {error.filename or str(partial)!r}: {error.strerror or error} (finished chunks stay in "
            f"{str(partial)!r}; the same command resumes from there)"
        ) from error
    return figures


def _described(sources: list[Source], tokenizer: str | TokenizerTraining, options: PrepareOptions, also_bin: bool):
    """(TokenizerTraining or None, the given tokenizer or None, `options` with all that follows from the tokenizer, everything
    that determines the dataset's bytes, as JSON).
    """
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib  # imports transformers, 2 s

    if isinstance(tokenizer, TokenizerTraining):
        training, given, vocab_size = tokenizer, None, tokenizer.vocab_size
        begin_end = [tokenizer_lib.SPECIAL_TOKENS[name] for name in ("bos_token", "eos_token")]
        made_with = {"tokenizer": dataclasses.asdict(tokenizer), "tokenizer_settings": None}
    else:
        training, given = None, tokenizer_lib.load(tokenizer, "--tokenizer")
        vocab_size = tokenizer_lib.vocab_size(given)
        begin_end = [given.bos_token, given.eos_token]
        settings = identity.tokenizer_settings(given)
        made_with = {"tokenizer": tokenizer_lib.fingerprint(given), "tokenizer_settings": settings}
    _check_bin(sources, training is not None, also_bin, vocab_size)
    options = options.split_at(*begin_end)
    described = {"input": identity.inputs(sources), **made_with, **dataclasses.asdict(options), "also_bin": also_bin}
    return training, given, options, described


def _check_there(output: Path, described: dict, read: Callable[[], Iterator[Chunk]]) -> None:
    """Raises UserError unless the dataset at `output` was made of these inputs with these options."""
    from mateconv_jax.data import dataset

    metadata = dataset.read_metadata(output, "--output")
    theirs = metadata["options"]
    identity.check_options(theirs, described, f"{str(output)!r} was made")
    if identity.same_input(theirs, described):
        return
    if "input_digest" not in metadata:  # made by an earlier version, which compared only names and sizes
        if any(size is None for _, size, *_ in described["input"]):
            raise UserError(f"--input: cannot be compared with what {str(output)!r} was made from (use --overwrite)")
        return
    print("the input may have changed: comparing its content with what the dataset was made from", file=sys.stderr, flush=True)
    if identity.input_digest(map(chunk_reader.digest, read())) != metadata["input_digest"]:
        raise UserError(
            f"--input: the content is not what {str(output)!r} was made from (choose another --output, or --overwrite)"
        )


def _check_bin(sources: list[Source], trains_tokenizer: bool, also_bin: bool, vocab_size: int) -> None:
    if trains_tokenizer and any(source.format == "bin" for source in sources):
        raise UserError(
            "--train_tokenizer: a .bin file holds token ids, not text (expected --tokenizer DIR, the one they are of)"
        )
    if also_bin and vocab_size > 2**16:
        raise UserError("--also_bin: a .bin file holds 16-bit token ids (expected a vocabulary of at most 65,536)")


def all_chunks(
    sources: list[Source], options: PrepareOptions, bos_eos: tuple[int | None, int] | None, open_file=sources_lib.open_local
) -> Iterator[Chunk]:
    """The chunks of all sources, in order."""
    for number, group in enumerate(sources_lib.groups(sources, options.sizes)):
        yield from chunks_of(group, number, options, bos_eos, open_file)


def _make_chunks(
    folder: Path, sources, read, given, training, options, num_workers, run_chunks, unreadable: UnreadableInputs
) -> list[str]:
    """Make the tokenizer and all chunks in a work folder, and return the chunks' names in order. `read()` yields the chunks of
    all sources from the start; the other arguments are those of `prepare`.
    """
    chunks = read()
    if given is None:
        once = any(source.path == "-" for source in sources)
        given, chunks = tokenizer_sample.train(training, options, folder, chunks, None if once else read)
    elif not (folder / "tokenizer").exists():
        tokenizer_sample.save(given, folder / "tokenizer")
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
        with InputProgress(sources) as progress:
            return parallel_chunks.process_chunks(chunks, setup, num_workers, progress.done, unreadable)
    made_from = (folder / "options.json").read_text(encoding="utf-8")
    if not identity.same_input(json.loads(made_from), json.loads(made_from)):  # unknown: never reuse a chunk
        made_from += str(time.time_ns())
    names = run_chunks(sources, setup, blake2b(made_from.encode(), digest_size=8).hexdigest())
    for name in names:
        inputs = parallel_chunks.counts_of_done(folder / "chunks" / name)
        unreadable.begin(counts.path for counts in inputs)
        unreadable.done(inputs)
    unreadable.finish()
    return names


def _assemble(
    folder: Path, names: list[str], output: Path, options: PrepareOptions, described: dict, also_bin: bool, start: float
) -> dict:
    """Turn a work folder's finished chunks into the dataset at `output`. `start`: when the work began."""
    from mateconv_jax.data.build.assembling import assemble  # imports tensorflow_datasets, 2 s

    made, replaced = folder / "dataset", folder / "replaced"
    shutil.rmtree(made, ignore_errors=True)
    chunks = [folder / "chunks" / name for name in names]
    digest = identity.input_digest(json.loads((chunk / "chunk.json").read_text(encoding="utf-8"))["digest"] for chunk in chunks)
    seconds = time.perf_counter() - start
    figures = assemble(chunks, made, folder / "tokenizer", options.seq_len, described, digest, seconds, also_bin)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # left by a run that was killed after putting its dataset in place
        output.rename(replaced)
    made.rename(output)
    return figures
