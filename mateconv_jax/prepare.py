"""Prepare a dataset from raw text:  python -m mateconv_jax.prepare --input raw.jsonl --output data/zh --train_tokenizer"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path

from mateconv_jax import cores
from mateconv_jax.data.build import pipeline, tokenizer_sample
from mateconv_jax.data.build.options import TOO_LONG_DIALOGUE, PrepareOptions
from mateconv_jax.data.dialogue import LEARN
from mateconv_jax.data.text import cleaning, lines, sources
from mateconv_jax.errors import UserError, exit_code, program


def main(args):
    if args.num_workers < 1:
        raise UserError(f"--num_workers: {args.num_workers} is invalid (expected at least 1)")
    options = PrepareOptions(
        **{
            key: getattr(args, key)
            for key in (
                "text_key",
                "encoding",
                "txt_document",
                "seq_len",
                "learn",
                "too_long_dialogue",
                "val_fraction",
                "dedup",
                "near_threshold",
            )
        },
        ignore_fields=tuple(sorted(set(args.ignore_fields))),
        split_at_tokens=None if args.split_at_tokens is None else tuple(dict.fromkeys(args.split_at_tokens)),
        sizes=sources.ChunkSizes(int(args.chunk_mb * 1e6), longest_record=int(args.max_line_mb * 1e6)),
        cleaning=cleaning.CleaningOptions(
            **{field.name: getattr(args, field.name) for field in dataclasses.fields(cleaning.CleaningOptions)}
        ),
    )
    tokenizer = args.tokenizer or tokenizer_sample.TokenizerTraining(args.vocab_size, args.split_digits, args.sample_mb)
    output = Path(args.output)
    files, open_file, run_chunks = sources.local_files, sources.open_local, None
    if args.runner:
        if "-" in args.input:
            raise UserError("--input: '-' is this process's standard input (expected files that Beam's workers can read)")
        beam = _beam()
        files, open_file = beam.files, beam.open_file
        flags = [f"--runner={args.runner}", *args.beam_flags]
        run_chunks = functools.partial(beam.run_chunks, beam_flags=flags, work_folder=args.beam_work_folder)
    found = sources.find(args.input, files)
    figures = pipeline.prepare(
        found,
        output,
        tokenizer,
        options,
        args.num_workers,
        args.overwrite,
        args.also_bin,
        run_chunks,
        open_file,
        args.keep_going,
    )
    if figures is None:
        print(f"nothing to do: {output} was already made with the same options")
        return
    from mateconv_jax.data.build.statistics import print_table

    print_table(figures, output)


def _beam():
    try:
        from mateconv_jax.data.build import beam
    except ImportError as error:
        raise UserError(f"--runner: Apache Beam is not installed ({error}; pip install apache-beam)") from error
    return beam


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("prepare"), description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=os.path.expanduser, nargs="+", required=True,
        help="files, folders or globs: .jsonl, .json, .csv, .tsv, .txt, .parquet, .bin; "
        "text also as .gz, .bz2, .xz, .zst, in .tar or .zip; - for standard input; tfds:NAME/CONFIG:SPLIT:FEATURE")  # fmt: skip
    add("--output", type=os.path.expanduser, required=True, help="dataset folder to create")
    add("--num_workers", type=int, default=cores.usable(), help="worker processes")
    add(
        "--overwrite",
        action="store_true",
        help="replace a dataset that was made, or begun, with other options; nothing else is replaced",
    )
    add("--also_bin", action="store_true", help="also write MateConv's flat uint16 train.bin and validation.bin")

    group = parser.add_argument_group("tokenizer")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=os.path.expanduser, metavar="DIR", help="use the tokenizer in this folder")
    which.add_argument("--train_tokenizer", action="store_true", help="train a byte-level BPE on a sample of the input")
    training = tokenizer_sample.TokenizerTraining()
    group.add_argument("--vocab_size", type=int, default=training.vocab_size, help="size of the trained vocabulary")
    group.add_argument("--split_digits", action="store_true", help="make every digit a token of its own")
    group.add_argument("--sample_mb", type=float, default=training.sample_mb, help="MB of text to train on")

    rows = PrepareOptions()
    _add_rows(parser, rows)
    group = parser.add_argument_group("records")
    group.add_argument("--text_key", default=rows.text_key, help="JSON key, or column, that holds the text")
    group.add_argument(
        "--encoding", default=rows.encoding, help="of text without a byte order mark: gb18030, big5, utf-16-le …"
    )
    group.add_argument("--ignore_fields", nargs="+", default=[], metavar="FIELD", help="drop these fields of lines and messages, such as tools or reasoning_content, as if they were not there")  # fmt: skip  # noqa: E501
    group.add_argument("--split_at_tokens", nargs="*", metavar="TOKEN", help="cut texts into documents at these control tokens spelt out in them, and drop these; without TOKEN: <|im_start|>, <|im_end|>, <|endoftext|>, and the tokenizer's begin and end tokens")  # fmt: skip  # noqa: E501
    group.add_argument("--txt_document", choices=lines.TXT_DOCUMENTS, default=rows.txt_document, help="what counts as one document in a .txt file: a line, a block between blank lines, or the whole file")  # fmt: skip  # noqa: E501
    group.add_argument("--keep_going", action="store_true", help="use what can be read of a broken or mostly rejected input")
    group.add_argument("--max_line_mb", type=float, default=rows.sizes.longest_record / 1e6, help="reject longer records")

    _add_cleaning(parser, rows)
    group = parser.add_argument_group(
        "Apache Beam", "runs the work in place of local processes; unknown options are passed to Beam"
    )
    group.add_argument("--runner", help="DirectRunner, FlinkRunner, SparkRunner, DataflowRunner …")
    group.add_argument("--beam_work_folder", help="folder that all workers can write to, such as gs://BUCKET/work")
    args, args.beam_flags = parser.parse_known_args(argv)
    if args.beam_flags and not args.runner:
        parser.error(f"unrecognized arguments: {' '.join(args.beam_flags)}")
    return args


def _add_rows(parser: argparse.ArgumentParser, rows: PrepareOptions) -> None:
    group = parser.add_argument_group("rows")
    group.add_argument("--seq_len", type=int, default=rows.seq_len, help="training tokens per row")
    group.add_argument(
        "--learn",
        choices=LEARN,
        default=rows.learn,
        help="what is learned of a dialogue: the assistant's turns, the last of them, or every token, as of a text",
    )
    group.add_argument(
        "--too_long_dialogue",
        choices=TOO_LONG_DIALOGUE,
        default=rows.too_long_dialogue,
        help="a dialogue longer than a row loses its oldest turns, or is rejected",
    )
    group.add_argument(
        "--val_fraction", type=float, default=rows.val_fraction, help="fraction of documents held out for validation"
    )
    group.add_argument("--chunk_mb", type=float, default=rows.sizes.bytes / 1e6, help="MB of input per shard")


def _add_cleaning(parser: argparse.ArgumentParser, rows: PrepareOptions) -> None:
    group = parser.add_argument_group("cleaning")
    rules = rows.cleaning
    group.add_argument("--unicode", choices=cleaning.CHOICES["unicode"], default=rules.unicode, help="Unicode normal form")
    group.add_argument("--control_characters", choices=cleaning.CHOICES["control_characters"], default=rules.control_characters)
    group.add_argument("--strip_control_tokens", action="store_true", help="remove <s>, </s>, <s>user … spelt out in the text")
    group.add_argument("--whitespace", choices=cleaning.CHOICES["whitespace"], default=rules.whitespace, help="normalize: LF line ends, no trailing spaces, at most one blank line in a row")  # fmt: skip  # noqa: E501
    group.add_argument("--min_chars", type=int, default=rules.min_chars, help="reject shorter documents")
    group.add_argument("--max_chars", type=int, default=rules.max_chars, help="split or drop longer documents (see --too_long)")
    group.add_argument(
        "--too_long",
        choices=cleaning.CHOICES["too_long"],
        default=rules.too_long,
        help="split: at the last sentence end that fits",
    )
    group.add_argument("--max_repetition", type=float, default=rules.max_repetition, metavar="SHARE", help="reject documents in which more of the 10-character pieces repeat")  # fmt: skip  # noqa: E501
    group.add_argument(
        "--min_han_ratio",
        type=float,
        default=rules.min_han_ratio,
        metavar="SHARE",
        help="reject documents with a smaller share of Chinese characters",
    )
    group.add_argument(
        "--dedup",
        choices=("none", "exact", "near"),
        default=rows.dedup,
        help="drop duplicates across all inputs; near adds MinHash",
    )
    group.add_argument(
        "--near_threshold",
        type=float,
        default=rows.near_threshold,
        help="Jaccard similarity at which a pair is dropped with probability 1/2",
    )


def command() -> int:
    """What `mateconv-prepare` runs."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
