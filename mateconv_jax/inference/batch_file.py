"""From a file of prompts to a file of results, one line each, which a later run can go on with."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mateconv_jax.data.text.jsonl import Document, Rejected, is_dialogue, parse_text
from mateconv_jax.errors import UserError
from mateconv_jax.inference.chat import DoesNotFit, fit
from mateconv_jax.inference.generation_config import GenerationConfig

PROMPT_KEYS = ("prompt", "history", "messages")
RESULT_KEYS = ("text", "finish_reason", "n_prompt_tokens", "n_tokens", "token_ids", "seed", "settings")
LOG_SECONDS = 10  # between two lines of progress where there is no terminal


@dataclasses.dataclass(frozen=True)
class Request:
    """What to write about. `place`: FILE:LINE. `record`: what the line held, with which the result begins."""

    place: str
    document: Document
    record: dict


def result(generation, seed: int) -> dict:
    """What there is to say of a Generation, for JSON."""
    return {
        "text": str(generation),
        "finish_reason": generation.finish_reason,
        "n_prompt_tokens": generation.n_prompt_tokens,
        "n_tokens": len(generation.token_ids),
        "token_ids": generation.token_ids,
        "seed": seed,
    }


# ---- what is asked ----------------------------------------------------------------------------------------------------


def read_requests(path: str, chat: bool = False) -> list[Request]:
    """A line of a text file is a prompt. One of a .jsonl file holds {"prompt": text}, or a dialogue to be answered,
    {"messages": [{"role": …, "content": …}, …]} or {"history": …}, and any other fields. Lines without text are left out; an
    empty prompt is {"prompt": ""}.

    Args:
      chat: a prompt is a user's turn.

    Raises:
      UserError: no such file; what is wrong with which line.
    """
    if path.endswith(".json"):
        raise UserError(f"--batch_file: {path!r} is not possible (expected a text file, or .jsonl with an object a line)")
    requests = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                try:
                    text = parse_text(line).rstrip("\r\n")
                except Rejected as error:
                    raise UserError(f"--batch_file: {place} is {error}") from error
                if text.strip():
                    record = _record(place, text) if path.endswith(".jsonl") else {"prompt": text}
                    requests.append(Request(place, _document(record, chat), record))
    except OSError as error:
        raise UserError(f"--batch_file: cannot read {path!r} ({error.strerror})") from error
    if not requests:
        raise UserError(f"--batch_file: no prompt in {path!r} (expected one a line)")
    return requests


def _document(record: dict, chat: bool) -> Document:
    if "prompt" not in record:
        return record.get("history") or record["messages"]
    return [{"role": "user", "content": record["prompt"]}] if chat else record["prompt"]


def _record(place: str, text: str) -> dict:
    """Not by orjson, which rounds integers above 64 bits: other fields belong to the user."""
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # raises for NaN and half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise UserError(f"--batch_file: {place} is not JSON ({error})") from error
    keys = [key for key in PROMPT_KEYS if isinstance(record, dict) and key in record]
    if len(keys) != 1:
        raise UserError(f"--batch_file: {place} holds {keys or 'no prompt'} (expected an object with one of {PROMPT_KEYS})")
    if taken := [key for key in RESULT_KEYS if key in record]:
        raise UserError(f"--batch_file: {place} has the field {taken[0]!r}, which a result has, too (give it another name)")
    [key] = keys
    if key == "prompt":
        if not isinstance(record[key], str):
            raise UserError(f"--batch_file: {place}: 'prompt' is {record[key]!r} (expected a text)")
    elif not is_dialogue(record[key]):
        raise UserError(f'--batch_file: {place}: {key!r} is no dialogue (expected [{{"role": text, "content": text}}, …])')
    elif record[key][-1]["role"] == "assistant":
        raise UserError(f"--batch_file: {place}: {key!r} ends with an assistant's turn (expected one to answer)")
    return record


# ---- what comes of it -------------------------------------------------------------------------------------------------


def run(
    generator,
    requests: list[Request],
    config: GenerationConfig = GenerationConfig(),
    output: str | None = None,
    batch_size: int = 16,
    chat: bool = False,
) -> None:
    """Write each request's result, in their order: its record, what `result` says, and the settings it was made with.

    Args:
      generator: a TextGenerator.
      output: a file. Results that it holds already are kept, and the rest is made. None: standard output.
      chat: as in `read_requests`.

    Raises:
      UserError: a prompt does not fit the model's context (nothing is made then); the file holds something else than results
        of these prompts with these settings (it is left as it is).
    """
    if batch_size < 1:
        raise UserError(f"--batch_size: {batch_size} is not possible (expected at least 1)")
    requests = [_fitting(generator, request, config) for request in requests]
    settings = json.loads(json.dumps({"model": fingerprint(generator), "chat": chat, **dataclasses.asdict(config)}))
    on_terminal = sys.stderr.isatty() and not (output is None and sys.stdout.isatty())
    with _results_file(output, requests, settings) as (file, n_done):
        if n_done:
            print(f"{n_done:,} of {len(requests):,} results are in {output}", file=sys.stderr)
        logged = time.monotonic()
        bar = tqdm(total=len(requests), initial=n_done, unit="prompt", dynamic_ncols=True, disable=not on_terminal)
        try:
            while n_done < len(requests):
                batch = requests[n_done : n_done + batch_size]
                for request, generation in zip(batch, _write(generator, batch, config, batch_size), strict=True):
                    file.write(_line({**request.record, **result(generation, config.seed), "settings": settings}))
                file.flush()
                n_done += len(batch)
                bar.update(len(batch))
                if not sys.stderr.isatty() and (n_done == len(requests) or time.monotonic() - logged > LOG_SECONDS):
                    print(f"{n_done:,} of {len(requests):,} results", file=sys.stderr, flush=True)
                    logged = time.monotonic()
        finally:
            bar.close()
            if n_done < len(requests) and output is not None:
                print(f"{n_done:,} of {len(requests):,} results are in {output}; the same command goes on", file=sys.stderr)


def _fitting(generator, request: Request, config: GenerationConfig) -> Request:
    """The request, of a dialogue only the last turns where it may be truncated."""
    document = request.document
    if isinstance(document, str):
        if not config.truncate_prompt:
            generator.check_prompt(document, f"--batch_file: {request.place}")
        return request
    if config.truncate_prompt:
        try:
            return dataclasses.replace(request, document=fit(generator, document, config))
        except DoesNotFit as error:
            raise UserError(f"--batch_file: {request.place}: the last turn alone is too long, {error}") from error
    if (n_tokens := generator.n_chat_tokens(document)) >= generator.max_seq_len:
        raise UserError(
            f"--batch_file: {request.place}: {n_tokens} tokens leave no room in the model's context of {generator.max_seq_len} "
            "(expected fewer, or --truncate)"
        )
    return request


def _write(generator, batch: list[Request], config: GenerationConfig, batch_size: int) -> Iterator:
    """A Generation for each."""
    documents = [request.document for request in batch]
    texts = iter(generator.batch_generate([d for d in documents if isinstance(d, str)], config, batch_size))
    answers = iter(generator.batch_chat([d for d in documents if not isinstance(d, str)], config, batch_size))
    return (next(texts if isinstance(document, str) else answers) for document in documents)


# ---- what was done before ---------------------------------------------------------------------------------------------


def fingerprint(generator) -> str:
    """16 hex digits, equal for two models with equal weights in one dtype and equal tokenizers."""
    tokenizer = generator.tokenizer
    sha = hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.chat_template}".encode())
    for path, parameter in generator.params.flat_state():
        sha.update(repr((path, parameter.shape, str(parameter.dtype))).encode())
        sha.update(np.asarray(parameter[...]).tobytes())
    return sha.hexdigest()[:16]


def _line(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@contextlib.contextmanager
def _results_file(output: str | None, requests: list[Request], settings: dict) -> Iterator[tuple[BinaryIO, int]]:
    """Where results go, and how many are there."""
    if output is None:
        yield sys.stdout.buffer, 0
        return
    try:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            finished = _finished(output, file.read(), requests, settings)
            file.truncate(sum(map(len, finished)))
            yield file, len(finished)
    except OSError as error:
        raise UserError(f"--output: cannot write {output!r} ({error.strerror or error})") from error


def _finished(output: str, content: bytes, requests: list[Request], settings: dict) -> list[bytes]:
    """The lines that are whole. A torn one may follow them.

    Raises:
      UserError: they are not results of these requests with these settings.
    """
    *lines, torn = content.split(b"\n")
    for number, (line, request) in enumerate(zip(lines, requests, strict=False), 1):
        try:
            found = json.loads(line)
            made_with = {name: found.pop(name) for name in RESULT_KEYS}["settings"]
            changes = [name for name in settings if made_with[name] != settings[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--output: {output}:{number} is no result (choose another file)") from error
        if found != request.record:
            raise UserError(f"--output: {output}:{number} is not the result of {request.place} (choose another file)")
        if "model" in changes:
            raise UserError(
                f"--output: {output}:{number} was written by another model, or in another dtype (choose another file)"
            )
        if changes:
            before, now = ({name: values[name] for name in changes} for values in (made_with, settings))
            raise UserError(f"--output: {output}:{number} was written with {before}, now it is {now} (choose another file)")
    if len(lines) + bool(torn) > len(requests):
        raise UserError(f"--output: {output!r} has more lines than there are prompts, {len(requests)} (choose another file)")
    if torn:
        beginning = _line(requests[len(lines)].record)[:-2]  # of its result, which goes on where this closes
        n = min(len(torn), len(beginning))
        if torn[:n] != beginning[:n]:
            raise UserError(f"--output: {output}:{len(lines) + 1} is no result (choose another file)")
    return [line + b"\n" for line in lines]
