"""From raw text to a dataset:  python -m mateconv_jax.prepare --input raw.jsonl --output data/zh --train_tokenizer"""

import argparse
import glob
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from mateconv_jax.data import dataset, jsonl, tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError, exit_code


def main(args):
    paths = _input_files(args.input)
    output = Path(args.output)
    options = {
        "input": [[str(path), path.stat().st_size] for path in paths],
        **{key: getattr(args, key) for key in ("text_key", "tokenizer", "vocab_size", "seq_len", "val_fraction")},
    }
    if output.exists() and not args.overwrite:
        return _say_what_is_there(output, options)

    rejects: list[str] = []

    def documents(doing):
        rejects.clear()
        with tqdm(total=sum(p.stat().st_size for p in paths), unit="B", unit_scale=True, desc=doing, mininterval=1) as bar:
            yield from jsonl.read_documents(
                paths, args.text_key, bar.update, lambda p, n, why: rejects.append(f"{p}:{n}: {why}")
            )

    if args.tokenizer:
        tokenizer = tokenizer_lib.load(args.tokenizer, "--tokenizer")
    else:
        tokenizer = tokenizer_lib.train(_plain_texts(documents("training the tokenizer")), args.vocab_size)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = {}
    for index, chunk in enumerate(dataset.chunks(documents("tokenising"))):
        for split, counts in dataset.write_chunk(chunk, partial, index, tokenizer, args.seq_len, args.val_fraction).items():
            shards.setdefault(split, []).append(counts)
    if "train" not in shards:
        raise UserError(f"--input: no document in {args.input}" + (f" ({rejects[0]})" if rejects else ""))
    metadata = dataset.finish(partial, shards, tokenizer, args.seq_len, options)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)

    for line in rejects[:3]:
        print(f"skipped {line}")
    if rejects:
        print(f"skipped {len(rejects):,} lines in all")
    _report(output, metadata)


def _input_files(patterns: list[str]) -> list[Path]:
    paths = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input: no file at {str(path)!r} (expected JSONL files or a glob)")
    return paths


def _say_what_is_there(output: Path, options: dict) -> None:
    metadata = dataset.read_metadata(output, "--output")
    for key, value in options.items():
        if metadata["options"].get(key) != value:
            raise UserError(
                f"--output: {str(output)!r} was made with {key}={metadata['options'].get(key)!r}, not {value!r} "
                "(choose another folder, or --overwrite)"
            )
    print("nothing to do: the dataset is there, made with the same options")
    _report(output, metadata)


def _plain_texts(documents):
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (f"{message['role']}\n{message['content']}" for message in document)


def _report(output: Path, metadata: dict) -> None:
    print(f"{output}: rows of {metadata['seq_len']} tokens, a vocabulary of {metadata['vocab_size']:,}")
    for split, counts in metadata["splits"].items():
        per_token = counts["characters"] / counts["tokens"]
        print(
            f"  {split:<10}  {counts['documents']:>10,} documents  {counts['characters']:>12,} characters  "
            f"{counts['tokens']:>12,} tokens ({per_token:.2f} characters each)  {counts['rows']:>9,} rows"
        )


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m mateconv_jax.prepare", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files or globs")
    parser.add_argument("--output", required=True, help="the dataset folder to make")
    parser.add_argument("--text_key", default="text", help='the key of a line\'s text; {"messages": […]} is a dialogue')
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--train_tokenizer", action="store_true", help="train a byte-level BPE on the input")
    which.add_argument("--tokenizer", metavar="DIR", help="use the tokenizer in this folder")
    parser.add_argument("--vocab_size", type=int, default=6400, help="of the tokenizer to train")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens a row trains on")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of the documents kept for validation")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset made with other options")
    args = parser.parse_args(argv)
    if args.seq_len < 1:
        parser.error(f"--seq_len: {args.seq_len} is not possible (expected at least 1)")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val_fraction: {args.val_fraction} is not possible (expected 0 to below 1)")
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args(sys.argv[1:])))
