"""Evaluate a model on held-out text:  python -m mateconv_jax.evaluate --model_path=out --data=data/zh
Score what it learned of the demo corpus:  python -m mateconv_jax.evaluate --model_path=runs/demo --demo
"""

import argparse
import json
import sys

from mateconv_jax.errors import exit_code, program


def main(args):
    from mateconv_jax.runtime import compilation_cache  # the 3 s of imports come after checking the command line

    compilation_cache.enable()
    if args.demo:
        from mateconv_jax.evaluation.demo_score import score_demo
        from mateconv_jax.inference.text_generator import TextGenerator

        score = score_demo(TextGenerator.from_pretrained(args.model_path, args.tokenizer, args.use_ema, args.dtype))
        if args.json:
            print(json.dumps(score))
            return
        print(f"grammar: {score['grammar']:.1%} of {score['sentences']} sampled sentences follow the demo corpus's grammar")
        print(f"facts:   {score['facts']:.1%} of {score['questions']} questions that dialogues ask are answered correctly")
        others, texts = score["other_wordings_questions"], score["texts_alone_questions"]
        print(f"         {score['other_wordings']:.1%} of {others} in wordings that they have only for other facts")
        print(f"         {score['texts_alone']:.1%} of {texts} about facts that only texts state")
        if score["short"]:
            print(f"         {score['short']:.1%} of all of them with the bare answer, as the demo's preferences have it")
        return
    from mateconv_jax.evaluation import held_out

    result = held_out.evaluate_run(
        args.model_path, args.data, args.split, args.batch_size, args.max_batches, args.use_ema, args.dtype, args.tokenizer
    )
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        held_out.print_table(result)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("evaluate"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model_path",
        required=True,
        metavar="MODEL",
        help="a run folder or one of its checkpoints (RUN/best, RUN/checkpoints/STEP), "
        "a Hugging Face folder, or a .pth or .gguf file",
    )
    add("--tokenizer", metavar="DIR", help="the tokenizer to use (default: the model's own; a .pth file has none)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="a dataset folder from prepare; a flat .bin file; or any raw text that prepare accepts (JSONL, .txt, globs, -, "
        "tfds:…), which is tokenised with the model's tokenizer",
    )
    what.add_argument("--demo", action="store_true", help="score a model trained on the demo corpus")
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="use the EMA weights or the raw ones (default: both with --data, EMA with --demo, if the model has EMA weights)",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute dtype (default: auto)")
    add("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("with --data")
    group.add_argument("--split", help="split of a dataset folder (default: validation)")
    group.add_argument("--batch_size", type=int, help="rows over all devices (default: 8)")
    group.add_argument("--max_batches", type=int, help="stop after this many batches (default: score everything)")
    args = parser.parse_args(argv)
    for flag in ("split", "batch_size", "max_batches"):
        if args.demo and getattr(args, flag) is not None:
            parser.error(f"argument --{flag}: not allowed with argument --demo")
    return args


def command() -> int:
    """Entry point of `mateconv-evaluate`."""
    return exit_code(main, parse_args(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(command())
