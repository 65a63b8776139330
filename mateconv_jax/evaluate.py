"""Evaluate models.

Held-out text:       python -m mateconv_jax.evaluate --model_path=out --data=data/zh
Benchmark questions: … --tasks data/ceval data/cmmlu --shots 5 --plot tasks.png
What it says:        python -m mateconv_jax.evaluate --model_path=out --says
Side by side:        … --says --model_path=a --model_path=b --output=compare.html
Rewards of answers:  … --prompts=held_out.jsonl --reward mateconv_jax.rewards:number_match
The demo corpus:     python -m mateconv_jax.evaluate --model_path=runs/demo --demo
"""

import argparse
import gc
import importlib
import json
import os
import sys
from pathlib import Path

from mateconv_jax.data.text.lines import TXT_DOCUMENTS
from mateconv_jax.errors import exit_code, program

# The module of mateconv_jax.evaluation that answers each flag. It has `evaluator(args)`, which returns a function from the path
# of a model to a result that JSON can hold, and `print_result(result)`. Those that compare models also have `paired(results)`,
# see evaluation/comparison.py, `side_by_side(results)`, see reporting/compare_page.py, and `described(result)`.
KINDS = {"data": "held_out", "tasks": "benchmark_command", "says": "says", "prompts": "reward_score", "demo": "demo_score"}
COMPARED = ("data", "tasks", "says")
LOWER = "lower it; where answers are generated --max_new_tokens; or --dtype bfloat16"


def main(args):
    from mateconv_jax.runtime import compilation_cache, out_of_memory  # the 3 s of imports come after checking the command line

    if args.output is not None:
        from mateconv_jax.evaluation import outputs
        from mateconv_jax.reporting import compare_page

        outputs.check(args.output, "--output", ".html", compare_page.MADE_BY)
    compilation_cache.enable()
    kind = importlib.import_module(f"mateconv_jax.evaluation.{module_for(args)}")
    results = []
    with out_of_memory.as_user_error("--batch_size", LOWER):
        evaluate = kind.evaluator(args)
        for path in args.model_path:
            results.append(evaluate(path))
            gc.collect()  # a generator refers to itself: its weights would lie beside the next model's
    if compares(args):
        show_comparison(kind, results, args)
    elif args.json:
        print(json.dumps(results[0], ensure_ascii=False))
    else:
        kind.print_result(results[0])


def compares(args) -> bool:
    return len(args.model_path) > 1 or args.output is not None


def module_for(args) -> str:
    """The module of mateconv_jax.evaluation that does what these arguments ask for."""
    flag = next(flag for flag in KINDS if is_given(args, flag))
    documents = compares(args) or args.by is not None or args.reference is not None  # scored one by one
    return "document_score" if flag == "data" and documents else KINDS[flag]


def show_comparison(kind, results: list[dict], args) -> None:
    from mateconv_jax.evaluation import comparison

    compared = comparison.compare(results, kind.paired(results))
    if args.output is not None:
        from mateconv_jax.evaluation import outputs
        from mateconv_jax.reporting import compare_page

        page = compare_page.html(compared, kind.side_by_side(results), kind.described(results[0])[1:])
        outputs.write(args.output, page.encode())
    if args.json:
        print(json.dumps({"models": results, "comparison": compared}, ensure_ascii=False))
    else:
        comparison.print_comparison(compared)
        if args.output is not None:
            print(args.output)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("evaluate"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model_path",
        type=os.path.expanduser,
        action="append",
        required=True,
        metavar="MODEL",
        help="a run folder or one of its checkpoints (RUN/best, RUN/checkpoints/STEP), a Hugging Face folder, or a .pth or "
        ".gguf file; give it once for each model to be compared",
    )
    add(
        "--tokenizer",
        type=os.path.expanduser,
        metavar="DIR",
        help="the tokenizer to use (default: the model's own; a .pth file has none)",
    )
    _add_kinds(parser)
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="use the EMA weights or the raw ones (default: EMA, if the model has EMA weights; both with --data alone)",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute dtype (default: auto)")
    add("--json", action="store_true", help="print one JSON object")
    add("--output", type=_path, metavar="FILE", help="write a page with the models side by side, a self-contained .html file")
    belongs = _add_data(parser) | _add_tasks(parser) | _add_answers(parser)
    args = parser.parse_args(argv)
    _check(parser, args, belongs)
    return args


def _add_kinds(parser: argparse.ArgumentParser) -> None:
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
        "--tasks",
        type=os.path.expanduser,
        nargs="+",
        metavar="[NAME=]PATH",
        help="benchmark questions: C-Eval or CMMLU folders, or .csv or .jsonl files (docs/evaluation.md has the formats)",
    )
    what.add_argument(
        "--says",
        type=os.path.expanduser,
        nargs="?",
        const="",
        metavar="FILE",
        help="measure how the model continues texts and answers dialogues: those in a .txt or .jsonl file, as for sample "
        "--batch_file, or 36 built-in ones",
    )
    what.add_argument(
        "--prompts", type=os.path.expanduser, metavar="FILE", help="a JSONL file of prompts, as for learning from reward"
    )
    what.add_argument("--demo", action="store_true", help="score a model trained on the demo corpus")


def _add_data(parser: argparse.ArgumentParser) -> dict[str, str]:
    """{flag: those it is allowed with}"""
    group = parser.add_argument_group("with --data")
    add = group.add_argument
    own = [
        add("--by", metavar="FIELD", help="score documents one by one and sum up by this field of their JSON"),
        add(
            "--reference",
            type=os.path.expanduser,
            nargs="+",
            metavar="PATH",
            help="score documents one by one, beside unigrams, gzip, xz and an n-gram model of this training text: raw text or "
            "a dataset folder",
        ),
        add("--split", help="split of a dataset folder (default: validation)"),
        add("--batch_size", type=int, help="rows over all devices (default: 8; with --tasks 8,192 tokens a device)"),
        add("--max_batches", type=int, help="stop after this many batches (default: score everything)"),
        add("--text_key", metavar="KEY", help="JSON key, or column, that holds a raw file's text (default: text)"),
        add("--encoding", help="of raw text without a byte order mark: gb18030, big5, utf-16-le … (default: utf-8)"),
        add("--ignore_fields", nargs="+", metavar="FIELD", help="drop these fields of lines and messages"),
        add("--split_at_tokens", nargs="*", metavar="TOKEN", help="cut texts at control tokens, as prepare does"),
        add("--txt_document", choices=TXT_DOCUMENTS, help="what counts as a document in a .txt file (default: line)"),
    ]
    return {action.dest: "data" for action in own} | {"batch_size": "data tasks"}


def _add_tasks(parser: argparse.ArgumentParser) -> dict[str, str]:
    """{flag: those it is allowed with}"""
    add = parser.add_argument_group("with --tasks").add_argument
    own = [
        add("--shots", type=int, metavar="N", help="solved examples before each question, from dev/ (default: 0)"),
        add(
            "--score",
            choices=("letters", "texts"),
            help="of an exam, compare the log-likelihoods of the letters or of the choices' texts (default: letters)",
        ),
        add("--chat", action="store_true", help="put the questions through the chat template (default: plain text)"),
        add("--limit", type=int, metavar="N", help="ask only the first N questions of each subject"),
        add("--records", action="store_true", help="with --json: every question's result, too"),
        add("--csv", type=_path, metavar="FILE", help="write accuracies by subject"),
        add("--plot", type=_path, metavar="FILE", help="draw them, with 95 %% intervals and chance (.png)"),
    ]
    return {action.dest: "tasks" for action in own}


def _add_answers(parser: argparse.ArgumentParser) -> dict[str, str]:
    """{flag: those it is allowed with}"""
    add = parser.add_argument_group("with --prompts, --says, and --tasks whose answers the model writes").add_argument
    add("--max_new_tokens", type=int, help="longest answer (default: 64, with --says 128)")
    add(
        "--reward",
        nargs="+",
        metavar="MODULE:FUNCTION",
        help="with --prompts and --tasks: functions that score the answers (with --tasks there are defaults)",
    )
    add = parser.add_argument_group("with --says").add_argument
    says = [
        add("--num_samples", type=int, metavar="N", help="answers to each prompt (default: 2)"),
        add("--seed", type=int, help="of the sampling (default: 0)"),
        add("--temperature", type=float, metavar="T", help="of the sampling (default: 0.8)"),
    ]
    return {action.dest: "says" for action in says} | {"max_new_tokens": "prompts tasks says", "reward": "prompts tasks"}


def _path(text: str) -> Path:
    return Path(text).expanduser()


def is_given(args, flag: str) -> bool:
    return getattr(args, flag) not in (None, False)


def _check(parser: argparse.ArgumentParser, args, belongs: dict[str, str]) -> None:
    """Ends the program where flags do not fit together. belongs: {flag: those it is allowed with}."""
    if args.prompts and not args.reward:
        parser.error("argument --reward: required with --prompts (for example mateconv_jax.rewards:number_match)")
    for flag, allowed in belongs.items():
        if is_given(args, flag) and not any(is_given(args, kind) for kind in allowed.split()):
            parser.error(
                f"argument --{flag}: only allowed with argument {' or '.join(f'--{kind}' for kind in allowed.split())}"
            )
    if compares(args) and not any(is_given(args, kind) for kind in COMPARED):
        flag = "output" if args.output is not None else "model_path"
        parser.error(f"argument --{flag}: models are compared with {' or '.join(f'--{kind}' for kind in COMPARED)}")
    if args.max_batches is not None and module_for(args) == "document_score":
        parser.error("argument --max_batches: not allowed where documents are scored one by one (give fewer of them)")
    for flag in ("csv", "plot"):
        if is_given(args, flag) and compares(args):
            parser.error(
                f"argument --{flag}: not allowed where models are compared (expected one --model_path and no --output)"
            )


def command() -> int:
    """Entry point of `mateconv-evaluate`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
