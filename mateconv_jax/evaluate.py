"""Evaluate a model on held-out text:  python -m mateconv_jax.evaluate --model_path=out --data=data/zh
Score its answers with reward functions:  … --prompts=held_out.jsonl --reward mateconv_jax.rewards:number_match
Ask it benchmark questions:   … --tasks data/ceval data/cmmlu --shots 5 --plot tasks.png
Score what it learned of the demo corpus:  python -m mateconv_jax.evaluate --model_path=runs/demo --demo
"""

import argparse
import json
import os
import sys
from pathlib import Path

from mateconv_jax.data.text.lines import TXT_DOCUMENTS
from mateconv_jax.errors import exit_code, program


def main(args):
    from mateconv_jax.runtime import compilation_cache, out_of_memory  # the 3 s of imports come after checking the command line

    compilation_cache.enable()
    with out_of_memory.as_user_error("--batch_size", "lower it; with --prompts --max_new_tokens; or --dtype bfloat16"):
        score, print_score = evaluate(args)
    if args.json:
        print(json.dumps(score, ensure_ascii=False))
    else:
        print_score(score)


def evaluate(args):
    """The score, and what prints it as a table."""
    if args.data:
        from mateconv_jax.evaluation import held_out

        given = {name: getattr(args, name) for name in held_out.READING}
        reading = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
        }
        score, print_score = held_out.evaluate_run(
            args.model_path, args.data, args.split, args.batch_size, args.max_batches, args.use_ema, args.dtype, args.tokenizer,
            reading,
        ), held_out.print_table  # fmt: skip
    elif args.tasks:
        score, print_score = evaluate_tasks(args)
    else:
        from mateconv_jax.inference.text_generator import TextGenerator

        generator = TextGenerator.from_pretrained(args.model_path, args.tokenizer, args.use_ema, args.dtype)
        if args.demo:
            from mateconv_jax.evaluation.demo_score import print_score, score_demo

            score = score_demo(generator)
        else:
            from mateconv_jax.evaluation.reward_score import print_score, score_prompts

            score = score_prompts(generator, args.prompts, args.reward, args.max_new_tokens or 64)
    return score, print_score


def evaluate_tasks(args):
    from mateconv_jax.evaluation import benchmark, benchmark_table, outputs

    outputs.check(args.csv, "--csv", ".csv", ",".join(benchmark_table.CSV_COLUMNS))
    outputs.check(args.plot, "--plot", ".png", outputs.MADE_BY)
    options = benchmark.AskOptions(args.shots or 0, args.score or "letters", bool(args.chat))
    result = benchmark.evaluate_tasks(
        args.model_path, args.tasks, options, args.limit, args.batch_size, args.reward, args.max_new_tokens or 64, args.use_ema,
        args.dtype, args.tokenizer,
    )  # fmt: skip
    if args.csv is not None:
        benchmark_table.write_csv(result, args.csv)
    if args.plot is not None:
        from mateconv_jax.evaluation import benchmark_plot  # matplotlib takes 1 s

        benchmark_plot.write_plot(result, args.plot)
    if not args.records:
        result["tasks"] = [{key: value for key, value in task.items() if key != "records"} for task in result["tasks"]]
    return result, benchmark_table.print_table


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("evaluate"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model_path",
        type=os.path.expanduser,
        required=True,
        metavar="MODEL",
        help="a run folder or one of its checkpoints (RUN/best, RUN/checkpoints/STEP), "
        "a Hugging Face folder, or a .pth or .gguf file",
    )
    add(
        "--tokenizer",
        type=os.path.expanduser,
        metavar="DIR",
        help="the tokenizer to use (default: the model's own; a .pth file has none)",
    )
    _add_what(parser)
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="use the EMA weights or the raw ones (default: both with --data, else EMA, if the model has EMA weights)",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute dtype (default: auto)")
    add("--json", action="store_true", help="print one JSON object")
    _add_reading(parser)
    _add_asking(parser)
    group = parser.add_argument_group("with --prompts, and with --tasks whose answers the model writes")
    group.add_argument(
        "--reward",
        nargs="+",
        metavar="MODULE:FUNCTION",
        help="functions that score the answers (with --tasks there are defaults)",
    )
    group.add_argument("--max_new_tokens", type=int, help="longest answer (default: 64)")
    args = parser.parse_args(argv)
    if args.prompts and not args.reward:
        parser.error("argument --reward: required with --prompts (for example mateconv_jax.rewards:number_match)")
    _check_companions(parser, args)
    return args


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        type=os.path.expanduser,
        nargs="+",
        metavar="PATH",
        help="a dataset folder from prepare, or several, such as data/wiki:0.6,data/code:0.4; a flat .bin file; or any raw "
        "text that prepare accepts (JSONL, .txt, globs, -, tfds:…), which is tokenised with the model's tokenizer",
    )
    what.add_argument(
        "--prompts", type=os.path.expanduser, metavar="FILE", help="a JSONL file of prompts, as for learning from reward"
    )
    what.add_argument(
        "--tasks",
        type=os.path.expanduser,
        nargs="+",
        metavar="[NAME=]PATH",
        help="benchmark questions: C-Eval or CMMLU folders, or .csv or .jsonl files (docs/evaluation.md has the formats)",
    )
    what.add_argument("--demo", action="store_true", help="score a model trained on the demo corpus")


def _check_companions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Each flag that belongs to others is given with one of them."""
    belongs = dict.fromkeys(
        ("split", "max_batches", "text_key", "encoding", "txt_document", "ignore_fields", "split_at_tokens"),
        "data",
    )
    belongs |= dict.fromkeys(("shots", "score", "chat", "limit", "csv", "plot", "records"), "tasks")
    belongs |= {"batch_size": "data tasks", "reward": "prompts tasks", "max_new_tokens": "prompts tasks"}
    for flag, goes_with in belongs.items():
        if getattr(args, flag) is not None and all(getattr(args, other) is None for other in goes_with.split()):
            parser.error(f"argument --{flag}: only allowed with argument --{' or --'.join(goes_with.split())}")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --data")
    group.add_argument("--split", help="split of a dataset folder (default: validation)")
    group.add_argument("--batch_size", type=int, help="rows over all devices (default: 8; with --tasks 8,192 tokens a device)")
    group.add_argument("--max_batches", type=int, help="stop after this many batches (default: score everything)")
    group.add_argument("--text_key", metavar="KEY", help="JSON key, or column, that holds a raw file's text (default: text)")
    group.add_argument("--encoding", help="of raw text without a byte order mark: gb18030, big5, utf-16-le … (default: utf-8)")
    group.add_argument("--ignore_fields", nargs="+", metavar="FIELD", help="drop these fields of lines and messages")
    group.add_argument("--split_at_tokens", nargs="*", metavar="TOKEN", help="cut texts at control tokens, as prepare does")
    group.add_argument("--txt_document", choices=TXT_DOCUMENTS, help="what counts as a document in a .txt file (default: line)")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --tasks")
    group.add_argument("--shots", type=int, metavar="N", help="solved examples before each question, from dev/ (default: 0)")
    group.add_argument(
        "--score",
        choices=("letters", "texts"),
        help="of an exam, compare the log-likelihoods of the letters or of the choices' texts (default: letters)",
    )
    group.add_argument(
        "--chat", action="store_true", default=None, help="put the questions through the chat template (default: plain text)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions of each subject")
    group.add_argument("--records", action="store_true", default=None, help="with --json: every question's result, too")
    group.add_argument("--csv", type=_path, metavar="FILE", help="write accuracies by subject")
    group.add_argument("--plot", type=_path, metavar="FILE", help="draw them, with 95 %% intervals and chance (.png)")


def _path(text: str) -> Path:
    return Path(text).expanduser()


def command() -> int:
    """Entry point of `mateconv-evaluate`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
