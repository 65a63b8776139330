"""Serve a model to OpenAI clients:  python -m mateconv_jax.serve --model_path=out --port 8000"""

import argparse
import dataclasses
import ipaddress
import logging
import os
import sys
from pathlib import Path

from mateconv_jax.errors import UserError, exit_code, program
from mateconv_jax.generation_config import PRESETS


def main(args) -> int:
    keys, hosts = access_of(args)
    from mateconv_jax.inference.engine import Engine
    from mateconv_jax.inference.text_generator import TextGenerator
    from mateconv_jax.runtime import compilation_cache
    from mateconv_jax.serving import server
    from mateconv_jax.serving.app import Service
    from mateconv_jax.serving.guard import Access
    from mateconv_jax.serving.limits import Limits
    from mateconv_jax.serving.prompts import OPENAI

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)  # absl has a handler
    for noisy in ("jax", "absl", "uvicorn.error", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    names = [field.name for field in dataclasses.fields(Limits)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        limits = Limits(**given)
    except UserError as error:
        raise UserError(f"--{error}") from error
    compilation_cache.enable()
    generator = TextGenerator.from_pretrained(args.model_path, args.tokenizer, args.use_ema, args.dtype)
    generator.tokenizer  # noqa: B018  raises UserError without one
    service = Service(
        generator,
        Engine(generator, args.max_batch, args.context, limits.max_queue),
        args.model_name or Path(args.model_path).resolve().name,
        args.max_batch,
        limits,
        Access(keys, hosts, tuple(args.cors_origin or ())),
        PRESETS[args.preset] if args.preset else OPENAI,
        args.log_contents,
    )
    return server.run(service, args.host, args.port)


def access_of(args) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """(API keys, names that a Host header may have; None: any).

    Raises:
      UserError: an address that others reach, without keys or --allow_anyone; or a file without keys.
    """
    is_local = args.host == "localhost"
    if not is_local:
        try:
            is_local = ipaddress.ip_address(args.host).is_loopback
        except ValueError as error:
            raise UserError(f"--host: {args.host!r} is no IP address (expected such as 127.0.0.1 or 0.0.0.0)") from error
    keys: tuple[str, ...] = ()
    if args.api_key_file:
        try:
            keys = tuple(Path(args.api_key_file).read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api_key_file: cannot read {args.api_key_file!r} ({error})") from error
        if not keys or not all(key.isascii() for key in keys):
            raise UserError(f"--api_key_file: {args.api_key_file!r} has no keys (expected one in each line, ASCII)")
    if not (is_local or keys or args.allow_anyone):
        raise UserError(
            f"--host: others can reach {args.host} (expected --api_key_file FILE, or --allow_anyone to let everybody in)"
        )
    # A page of another site may have its own name resolve to this address (DNS rebinding). Where anyone else may come anyway,
    # by names that we do not know, it would gain nothing.
    return keys, ("localhost", "127.0.0.1", "::1", args.host) if is_local else None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid (expected an integer, at least 1)")
    return int(text)


def parse_args(argv):
    usage = "%(prog)s --model_path MODEL [--port N] [options]"
    parser = argparse.ArgumentParser(prog=program("serve"), usage=usage, description=__doc__)
    add = parser.add_argument
    add(
        "--model_path",
        type=os.path.expanduser,
        required=True,
        metavar="MODEL",
        help="as in sample: a run folder, a Hugging Face folder, .pth or .gguf",
    )
    add("--tokenizer", type=os.path.expanduser, metavar="DIR",
        help="the tokenizer to use (default: the model's own; a .pth file has none)")  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="compute dtype (default: auto)")
    add("--use_ema", action=argparse.BooleanOptionalAction, help="EMA weights or the raw ones (default: EMA if available)")
    add("--model_name", metavar="NAME", help="what clients call the model (default: the last part of its path)")
    add("--preset", choices=tuple(PRESETS), help="sampling where a request says nothing (default: OpenAI's, temperature 1)")
    add("--max_batch", type=positive, default=16, metavar="N", help="answers at a time (default: 16)")
    add("--context", type=positive, metavar="N", help="tokens of a prompt and its answer (default: the model's); the KV cache "
        "has room for max_batch times as many")  # fmt: skip

    add = parser.add_argument_group("access").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    add("--api_key_file", type=os.path.expanduser, metavar="FILE", help="API keys, one a line; a request needs one of them")
    add("--allow_anyone", action="store_true", help="listen on any address without keys")
    add("--cors_origin", action="append", metavar="URL", help="another site whose pages may ask; may be repeated")
    add("--log_contents", action="store_true", help="write prompts and answers into the log")

    add = parser.add_argument_group("limits; what exceeds them is refused, see docs/serving.md").add_argument
    for name, default, kind, text in LIMITS:
        add(f"--{name}", type=kind, metavar="N", help=f"{text} (default: {default})")
    return parser.parse_args(argv)


# Fields of serving.limits.Limits, which is not imported for --help: a test compares them.
LIMITS = [
    ("max_body_bytes", 2**20, int, "bytes of a request's body"),
    ("body_seconds", 30.0, float, "seconds for a body to arrive"),
    ("max_messages", 1000, int, "messages of a dialogue"),
    ("max_samples", 16, int, "answers to one request"),
    ("max_queue", 256, int, "requests that wait for a slot"),
    ("queue_seconds", 120.0, float, "seconds in the queue"),
    ("request_seconds", 600.0, float, "seconds in all"),
    ("requests_per_minute", 0, int, "requests of one key, or of one address without keys; 0: any number"),
    ("max_connections", 1000, int, "open connections"),
    ("drain_seconds", 30.0, float, "seconds for requests to finish after SIGTERM"),
]


def command() -> int:
    """Entry point of `mateconv-serve`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
