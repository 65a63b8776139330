"""Batch generation: a file of prompts in, a file of results out, one line each. An interrupted run resumes where it stopped."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mateconv_jax.data.text.dialogue import is_dialogue
from mateconv_jax.data.text.jsonl import parse_text
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.chat import DoesNotFit, fit
from mateconv_jax.terminal import escaped_json

PROMPT_KEYS = ("prompt", "history", "messages")
RESULT_KEYS = ("text", "finish_reason", "n_prompt_tokens", "n_tokens", "token_ids", "seed", "settings")
# Settings that files written before they existed do not record: they were off.
LATER_SETTINGS = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": []}
MAX_SAMPLES = 100_000  # of one line: each is a request in memory
LOG_SECONDS = 10  # between progress lines when standard error is not a terminal


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the batch file.

    Attributes:
      location: FILE:LINE, for error messages.
      document: the prompt, or the dialogue to answer.
      record: the line's fields, copied to the front of its result.
      sample: index among the line's samples.
    """

    location: str
    document: str | list[dict]
    record: dict
    sample: int = 0

    def fields(self) -> dict:
        """What its result begins with: with `num_samples` also which of them it is."""
        return self.record | ({"sample": self.sample} if "num_samples" in self.record else {})

    def seed(self, config: GenerationConfig) -> int:
        return self.record.get("seed", config.seed)


def result(generation, seed: int) -> dict:
    """The JSON fields of a Generation."""
    return {
        "text": str(generation),
        "finish_reason": generation.finish_reason,
        "n_prompt_tokens": generation.n_prompt_tokens,
        "n_tokens": len(generation.token_ids),
        "token_ids": generation.token_ids,
        "seed": seed,
    }


# ---- requests ---------------------------------------------------------------------------------------------------------


def read_requests(path: str, chat: bool = False) -> list[Request]:
    """Read a batch file. Each line of a text file is a prompt. Each line of a .jsonl file is {"prompt": text} or a dialogue to
    answer, {"messages": [{"role": …, "content": …}, …]} or {"history": …}, plus any other fields. `seed` is the line's own, and
    `num_samples` makes it as many requests. Blank lines are skipped; an empty prompt is {"prompt": ""}.

    Args:
      chat: treat each prompt as a user turn.

    Raises:
      UserError: the file cannot be read or holds no prompt, or a line is malformed (the message names it).
    """
    if path.endswith(".json"):
        raise UserError(f"--batch_file: {path!r} is a .json file (expected a text file, or .jsonl with one object per line)")
    requests = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                location = f"{path}:{number}"
                try:
                    text = parse_text(line).rstrip("\r\n")
                except Rejected as error:
                    raise UserError(f"--batch_file: {location} is {error}") from error
                if text.strip():
                    record = _record(location, text) if path.endswith(".jsonl") else {"prompt": text}
                    document = _document(record, chat)
                    requests += [Request(location, document, record, i) for i in range(record.get("num_samples", 1))]
    except OSError as error:
        raise UserError(f"--batch_file: cannot read {path!r} ({error.strerror})") from error
    if not requests:
        raise UserError(f"--batch_file: no prompt in {path!r} (expected one per line)")
    return requests


def _document(record: dict, chat: bool) -> str | list[dict]:
    if "prompt" not in record:
        return record.get("history") or record["messages"]
    return [{"role": "user", "content": record["prompt"]}] if chat else record["prompt"]


def _record(location: str, text: str) -> dict:
    """Parse and check one JSON line. The json module, because orjson rounds integers above 64 bits and the user's own fields
    must come back unchanged.
    """
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # rejects NaN and lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"--batch_file: {location} is not valid JSON ({error})") from error
    keys = [key for key in PROMPT_KEYS if isinstance(record, dict) and key in record]
    if len(keys) != 1:
        raise UserError(
            f"--batch_file: {location} holds {keys or 'no prompt'} (expected an object with exactly one of {PROMPT_KEYS})"
        )
    _check_draws(location, record)
    results = [key for key in RESULT_KEYS if key != "seed"] + ["sample"] * ("num_samples" in record)
    if reserved := [key for key in results if key in record]:
        raise UserError(f"--batch_file: {location} uses {reserved[0]!r}, a field of the results (rename it)")
    [key] = keys
    if key == "prompt":
        if not isinstance(record[key], str):
            raise UserError(f"--batch_file: {location}: 'prompt' is {record[key]!r} (expected a string)")
    elif not is_dialogue(record[key]):
        raise UserError(
            f'--batch_file: {location}: {key!r} is not a dialogue (expected [{{"role": text, "content": text}}, …])'
        )
    elif record[key][-1]["role"] == "assistant":
        raise UserError(f"--batch_file: {location}: {key!r} ends with an assistant turn (expected a turn to answer)")
    return record


def _check_draws(location: str, record: dict) -> None:
    for key, lowest, highest in (("seed", 0, 2**32 - 1), ("num_samples", 1, MAX_SAMPLES)):
        value = record.get(key, lowest)
        if type(value) is not int or not lowest <= value <= highest:
            raise UserError(f"--batch_file: {location}: {key!r} is {value!r} (expected an integer from {lowest} to {highest})")


# ---- generation -------------------------------------------------------------------------------------------------------


def run(
    generator,
    requests: list[Request],
    config: GenerationConfig = GenerationConfig(),
    output: str | None = None,
    batch_size: int = 16,
    chat: bool = False,
) -> None:
    """Write one result per request, in order: the request's fields, those of `result`, and the generation settings, in which
    the seed is the request's.

    Args:
      generator: a TextGenerator.
      output: a file; results it already holds are kept, and only the rest are generated. None: standard output.
      batch_size: prompts decoded together.
      chat: as in `read_requests`; recorded in the settings.

    Raises:
      UserError: a prompt does not fit the model's context (checked before anything is generated), or the output file holds
        anything but results of these prompts with these settings (it is left untouched).
    """
    if batch_size < 1:
        raise UserError(f"--batch_size: {batch_size} is invalid (expected at least 1)")
    requests = [_fit_context(generator, request, config) for request in requests]
    settings = json.loads(json.dumps({"model": fingerprint(generator), "chat": chat, **dataclasses.asdict(config)}))
    on_terminal = sys.stderr.isatty() and not (output is None and sys.stdout.isatty())
    with _results_file(output, requests, settings) as (file, n_done):
        if n_done:
            print(f"resuming: {output} already holds {n_done:,} of {len(requests):,} results", file=sys.stderr)
        logged = time.monotonic()
        bar = tqdm(total=len(requests), initial=n_done, unit="prompt", dynamic_ncols=True, disable=not on_terminal)
        try:
            while n_done < len(requests):
                batch = requests[n_done : n_done + batch_size]
                for request, generation in zip(batch, _generate(generator, batch, config, batch_size), strict=True):
                    seed = request.seed(config)
                    made_with = {"settings": settings | {"seed": seed}}
                    line = _line({**request.fields(), **result(generation, seed), **made_with})
                    file.write(line if output else escaped_json(line.decode()).encode())
                file.flush()
                n_done += len(batch)
                bar.update(len(batch))
                if not sys.stderr.isatty() and (n_done == len(requests) or time.monotonic() - logged > LOG_SECONDS):
                    print(f"{n_done:,} of {len(requests):,} results", file=sys.stderr, flush=True)
                    logged = time.monotonic()
        finally:
            bar.close()
            if n_done < len(requests) and output is not None:
                print(
                    f"{output} holds {n_done:,} of {len(requests):,} results; run the same command again to resume",
                    file=sys.stderr,
                )


def _fit_context(generator, request: Request, config: GenerationConfig) -> Request:
    """Check that the request fits the context; with truncate_prompt, drop a dialogue's oldest turns until it does. (A prompt is
    truncated by the generator.)
    """
    document = request.document
    if isinstance(document, str):
        if not config.truncate_prompt:
            generator.check_prompt(document, f"--batch_file: {request.location}")
        return request
    if config.truncate_prompt:
        try:
            return dataclasses.replace(request, document=fit(generator, document, config))
        except DoesNotFit as error:
            raise UserError(f"--batch_file: {request.location}: the last turn alone is too long: {error}") from error
    if (n_tokens := generator.n_chat_tokens(document)) >= generator.max_seq_len:
        raise UserError(
            f"--batch_file: {request.location}: {n_tokens} tokens leave no room in the model's context of "
            f"{generator.max_seq_len} (shorten the dialogue, or pass --truncate)"
        )
    return request


def _generate(generator, batch: list[Request], config: GenerationConfig, batch_size: int) -> list:
    """One Generation per request, in order; prompts and dialogues may be mixed."""
    draws = [(request.seed(config), request.sample) for request in batch]
    own = draws if any(draw != (config.seed, 0) for draw in draws) else None  # rows of their own cost another program
    return generator.batch_answer([request.document for request in batch], config, batch_size, own)


# ---- resuming ---------------------------------------------------------------------------------------------------------


def fingerprint(generator) -> str:
    """16 hex digits of a hash over the weights (values and dtype), the tokenizer, its chat template and several end tokens."""
    tokenizer = generator.tokenizer
    sha = hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.chat_template}".encode())
    if len(generator.end_ids) > 1:
        sha.update(repr(generator.end_ids).encode())
    for path, parameter in generator.params.flat_state():
        sha.update(repr((path, parameter.shape, str(parameter.dtype))).encode())
        sha.update(np.asarray(parameter[...]).tobytes())
    return sha.hexdigest()[:16]


def _line(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@contextlib.contextmanager
def _results_file(output: str | None, requests: list[Request], settings: dict) -> Generator[tuple[BinaryIO, int]]:
    """The binary file to append results to, and how many it already holds. A partly written last line is cut off."""
    if output is None:
        yield sys.stdout.buffer, 0
        return
    try:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            complete = _complete_lines(output, file.read(), requests, settings)
            file.truncate(sum(map(len, complete)))
            yield file, len(complete)
    except OSError as error:
        raise UserError(f"--output: cannot write {output!r} ({error.strerror or error})") from error


def _complete_lines(output: str, content: bytes, requests: list[Request], settings: dict) -> list[bytes]:
    """The complete result lines in `content`; a partly written one may follow them.

    Raises:
      UserError: a line is not the result of its request with these settings.
    """
    *lines, partial = content.split(b"\n")
    for number, (line, request) in enumerate(zip(lines, requests, strict=False), 1):
        try:
            found = json.loads(line)
            made_with = {name: found.pop(name) for name in RESULT_KEYS}["settings"]
            made_with = LATER_SETTINGS | made_with
            expected = request.fields()
            wanted = settings | {"seed": expected.pop("seed", settings["seed"])}
            changes = [name for name in wanted if made_with[name] != wanted[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--output: {output}:{number} is not a result line (choose another file)") from error
        if found != expected:
            raise UserError(f"--output: {output}:{number} is not the result of {request.location} (choose another file)")
        if "model" in changes:
            raise UserError(
                f"--output: {output}:{number} was written by another model or in another dtype (choose another file)"
            )
        if changes:
            before, now = ({name: values[name] for name in changes} for values in (made_with, wanted))
            raise UserError(f"--output: {output}:{number} was written with {before}, not {now} (choose another file)")
    if len(lines) + bool(partial) > len(requests):
        raise UserError(f"--output: {output!r} has more lines than there are prompts ({len(requests)}; choose another file)")
    if partial:
        prefix = _line(requests[len(lines)].fields())[:-2]  # without "}\n": the result's own fields follow
        n = min(len(partial), len(prefix))
        if partial[:n] != prefix[:n]:
            raise UserError(f"--output: {output}:{len(lines) + 1} is not a result line (choose another file)")
    return [line + b"\n" for line in lines]
