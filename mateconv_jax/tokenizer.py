"""Train or inspect a tokenizer:  python -m mateconv_jax.tokenizer train --input raw.jsonl --output tokenizer"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from tqdm import tqdm

from mateconv_jax import files
from mateconv_jax.data.build import pipeline, tokenizer_sample
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.unreadable import UnreadableInputs
from mateconv_jax.data.dialogue import LEARN
from mateconv_jax.data.text import sources as sources_lib
from mateconv_jax.data.tokenizer import (
    bpe,
    dialogue_view,
    folder as folder_lib,
    report as tokenizer_report,
    report_tables,
    tokenizer as tokenizer_lib,
)
from mateconv_jax.errors import UserError, check_name, exit_code, program

INSPECT_MB = 4  # of each --input: takes seconds, and gets the ratio's second decimal right


def main(args):
    return args.run(args)


def train(args):
    output = Path(args.output)
    sources = sources_lib.find(args.input)
    print(f"tokenizer: reading {', '.join(source.path for source in sources)}", file=sys.stderr, flush=True)
    with _folder_aside(output, args.overwrite) as partial:
        tokens = None if args.split_at_tokens is None else tuple(args.split_at_tokens)
        options = PrepareOptions(args.text_key, args.encoding, tuple(args.ignore_fields), split_at_tokens=tokens)
        options = options.split_at(*(tokenizer_lib.SPECIAL_TOKENS[name] for name in ("bos_token", "eos_token")))
        texts = _texts(sources, options, args.sample_mb, args.seed, args.keep_going)
        trained = bpe.train(texts, args.vocab_size, args.split_digits, args.special_tokens, args.max_token_bytes)
        trained.save_pretrained(partial)
    print(f"{output}: {len(trained):,} tokens. Inspect it with: python -m mateconv_jax.tokenizer inspect {output}")


def inspect(args):
    if args.dialogue is not None:
        tokenizer = tokenizer_lib.load(args.folder, "inspect")
        shown = dialogue_view.show(tokenizer, args.dialogue, args.text_key, args.learn, args.json, tuple(args.ignore_fields))
        return 0 if shown else 2
    tokenizer = tokenizer_lib.load(args.folder, "inspect")
    compare = tokenizer_lib.load(args.compare, "--compare") if args.compare else None
    if args.encode is not None:
        for name, one in [(args.folder, tokenizer), *([(args.compare, compare)] if compare else [])]:
            report_tables.print_encoding(one, args.encode, name)
    elif args.vocab or args.grep is not None:
        report_tables.print_vocabulary(tokenizer, args.grep or "", compare)
    else:
        options = PrepareOptions(args.text_key, args.encoding, tuple(args.ignore_fields))
        inputs = {source.path: [source] for source in sources_lib.find(args.input)}
        texts = {path: list(_texts(source, options, INSPECT_MB)) for path, source in inputs.items()}
        report = tokenizer_report.report(tokenizer, texts, compare)
        if args.json:
            print(json.dumps(report, ensure_ascii=False, indent=2))
        else:
            report_tables.print_report(report, args.folder, args.compare)


@contextlib.contextmanager
def _folder_aside(output: Path, overwrite: bool) -> Generator[Path]:
    """A new folder that replaces `output` if the block succeeds and is removed otherwise."""
    check_name(output, "--output")
    if output.exists() and not overwrite:
        raise UserError(f"--output: {str(output)!r} is there already (choose another folder, or --overwrite)")
    if output.exists() and not (output / "tokenizer.json").is_file():
        raise UserError(f"--output: {str(output)!r} holds no tokenizer and is not replaced (choose another folder)")
    if output.exists() and (foreign := folder_lib.foreign_files(output)):
        raise UserError(f"--output: {str(output)!r} holds {foreign[0]!r} too and is not replaced (choose another folder)")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(output, folder=True, replace_folder=True) as written:
            yield written
    except OSError as error:
        raise UserError(f"cannot read or write {error.filename or str(output)!r} ({error.strerror or error})") from error


def _texts(
    sources: list[sources_lib.Source], options: PrepareOptions, sample_mb: float, seed: int = 0, keep_going: bool = True
) -> Iterator[str]:
    """Texts of a sample of the inputs, read and cleaned as `prepare` does by default."""
    if bins := [source.path for source in sources if source.format == "bin"]:
        raise UserError(f"--input: {bins[0]!r} holds token ids, not text (expected JSONL or .txt)")
    with tqdm(
        pipeline.all_chunks(sources, options, None), "reading", unit=" chunks", disable=not sys.stderr.isatty()
    ) as chunks:
        to_their_ends = chunks if keep_going else map(_check_not_broken, chunks)
        sampled = list(tokenizer_sample.sample(to_their_ends, int(sample_mb * 1e6), seed))
    n_texts = 0
    for text in tokenizer_sample.clean_texts(sampled, options, UnreadableInputs(keep_going, one_document_files=False)):
        n_texts += 1
        yield text
    if not n_texts:
        names = ", ".join(source.path for source in sources)
        raise UserError(
            f"--input: no text in {names} (expected documents of at most {sample_mb:g} MB, key {options.text_key!r})"
        )


def _check_not_broken(chunk: sources_lib.Chunk) -> sources_lib.Chunk:
    """Raises UserError where a file of the chunk could not be read to its end."""
    for part in chunk.parts:
        for line, rule, reason in part.rejects:
            if rule == "broken_file":
                raise UserError(
                    f"--input: {part.source.name!r} could not be read beyond line {line}: {reason}. Fix it or leave it out "
                    "(--keep_going uses what is readable)"
                )
    return chunk


def parse_args(argv):
    parser = argparse.ArgumentParser(prog=program("tokenizer"), description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="train | inspect")
    _add_train(commands)
    _add_inspect(commands)
    args = parser.parse_args(argv)
    if args.run is inspect:
        listing = args.vocab or args.grep is not None
        if args.input and (listing or args.encode is not None):
            parser.error("--input: only for the overview (expected no --vocab, --grep or --encode)")
        if args.grep is not None and (args.json or args.encode is not None):
            parser.error("--grep: only with --vocab, or alone (expected no --json or --encode)")
        if args.dialogue is not None and (args.input or args.compare or listing or args.encode is not None):
            parser.error("--dialogue: alone, or with --json (expected no --input, --compare, --vocab, --grep or --encode)")
        if args.dialogue is None and args.learn:
            parser.error("--learn: only with --dialogue")
        args.learn = args.learn or LEARN[0]
    elif args.sample_mb <= 0:
        parser.error(f"--sample_mb: {args.sample_mb} is invalid (expected more than 0)")
    return args


def _add_train(commands) -> None:
    command = commands.add_parser(
        "train", help="train a byte-level BPE", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=train)
    add = command.add_argument
    add("--input", type=os.path.expanduser, nargs="+", required=True,
        help="files, folders or globs, as prepare reads them (but no .bin); - for "
        "standard input")  # fmt: skip
    add("--output", type=os.path.expanduser, required=True, help="folder to create")
    add("--vocab_size", type=int, default=6400, help="maximum size, including control tokens and the 256 bytes")
    add("--split_digits", action="store_true", help="make every digit a token of its own")
    add("--max_token_bytes", type=int, metavar="N", help="no longer tokens; a Chinese character is 3 bytes of UTF-8")
    add("--special_tokens", nargs="+", default=[], metavar="TOKEN", help="additional control tokens, ids 4 and up")
    add("--sample_mb", type=float, default=tokenizer_sample.TokenizerTraining().sample_mb, help="MB of input to train on, "
        "sampled uniformly; 64 take 0.8 GB of memory")  # fmt: skip
    add("--text_key", default="text", help='JSON key that holds the text; {"messages": […]} is a dialogue')
    add("--encoding", default="utf-8", help="of text without a byte order mark")
    add("--ignore_fields", nargs="+", default=[], metavar="FIELD", help="drop these fields of lines and messages")
    add("--split_at_tokens", nargs="*", metavar="TOKEN", help="cut texts at these control tokens spelt out in them; "
        "without TOKEN: as in prepare")  # fmt: skip
    add("--keep_going", action="store_true", help="use what can be read of a broken or mostly rejected input")
    add("--seed", type=int, default=0, help="seed of the sample")
    add("--overwrite", action="store_true", help="replace an existing tokenizer folder")


def _add_inspect(commands) -> None:
    command = commands.add_parser("inspect", help="show a tokenizer's contents and how well it compresses")
    command.set_defaults(run=inspect)
    add = command.add_argument
    add("folder", type=os.path.expanduser, metavar="DIR", help="a folder with tokenizer.json or tokenizer.model")
    add("--compare", type=os.path.expanduser, metavar="DIR", help="show another tokenizer beside it")
    add("--input", type=os.path.expanduser, nargs="+", default=[],
        help=f"also compress a sample of {INSPECT_MB} MB of each of these files, and check "
        "that it decodes to the same text")  # fmt: skip
    add("--text_key", default="text", help="JSON key that holds the text (default: text)")
    add("--encoding", default="utf-8", help="of text without a byte order mark (default: utf-8)")
    add("--ignore_fields", nargs="+", default=[], metavar="FIELD", help="drop these fields of lines and messages")
    instead = command.add_argument_group("instead of the overview")
    add = instead.add_mutually_exclusive_group().add_argument
    add("--vocab", action="store_true", help="list all tokens, one a line: id, tab, text (tab, id in the other tokenizer)")
    add("--encode", metavar="TEXT", help="show the pieces of a text")
    add("--json", action="store_true", help="print the overview as JSON, or {ids, learned} of each dialogue")
    instead.add_argument("--grep", metavar="TEXT", help="list only tokens that contain this text")
    instead.add_argument("--dialogue", type=os.path.expanduser, metavar="FILE",
        help="show the dialogues of a JSONL or CSV file (- for standard input): "
        "what the model learns of them, with ids")  # fmt: skip
    instead.add_argument("--learn", choices=LEARN, help="with --dialogue: what is learned (default: assistant)")


def command() -> int:
    """What `mateconv-tokenizer` runs."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
