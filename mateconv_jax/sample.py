"""Let a model write, answer or talk:  python -m mateconv_jax.sample --model_path=out --prompt="中国" """

import argparse
import dataclasses
import io
import json
import os
import re
import sys

from mateconv_jax.errors import UserError, exit_code, program
from mateconv_jax.inference.generation_config import PRESETS, GenerationConfig

# What does not go together: an option, and those that would mean nothing beside it.
EXCLUDES = {
    "interactive": ("prompt", "chat", "stream", "json", "num_samples", "batch_file", "truncate"),
    "batch_file": ("prompt", "stream", "json", "num_samples"),
    "stream": ("json", "num_samples"),
    "num_samples": ("chat",),
    "greedy": ("preset", "temperature", "top_k", "top_p", "min_p", "num_samples"),
}
NEEDS = {"output": "batch_file", "batch_size": "batch_file"}


def main(args):
    check_options(args)
    config = generation_config(args)
    requests, prompt = None, ""
    if args.batch_file is not None:
        from mateconv_jax.inference import batch_file

        requests = batch_file.read_requests(args.batch_file, args.chat)
    elif not args.interactive:
        prompt = read_prompt(args.prompt)

    from mateconv_jax.inference.text_generator import TextGenerator
    from mateconv_jax.runtime import compilation_cache  # 3 s of imports from here on, after the command line is right

    compilation_cache.enable()
    generator = TextGenerator.from_pretrained(args.model_path, args.tokenizer, args.use_ema, args.dtype)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="utf-8" if args.json else None, errors="backslashreplace")
    try:
        if args.interactive:
            from mateconv_jax.inference import chat

            chat.run(generator, config, args.model_path)
        elif requests is not None:
            from mateconv_jax.inference import batch_file

            batch_file.run(generator, requests, config, args.output, args.batch_size or 16, args.chat)
        else:
            write(generator, prompt, config, args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nothing must be written to the pipe at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write(generator, prompt: str, config: GenerationConfig, args) -> None:
    """One prompt's text, or several, to standard output."""
    history = [{"role": "user", "content": prompt}]
    shown = "" if args.chat else prompt
    if args.stream:
        print(shown, end="", flush=True)
        try:
            for piece in generator.stream_chat(history, config) if args.chat else generator.stream(prompt, config):
                print(piece, end="", flush=True)
        finally:
            print()
        return
    if args.chat:
        texts = [generator.chat(history, config)]
    else:
        texts = generator.generate_samples(prompt, args.num_samples or 1, config)
    for number, text in enumerate(texts, 1):
        if args.json:
            from mateconv_jax.inference import batch_file

            print(json.dumps({"prompt": prompt, **batch_file.result(text, config.seed)}, ensure_ascii=False))
            continue
        if len(texts) > 1:
            print(f"==== {number} of {len(texts)}")
        print(shown + text)


def read_prompt(prompt: str | None) -> str:
    """`-`, and no prompt where standard input is no terminal, is all of standard input, without the line break at its end."""
    if prompt == "-" or prompt is None and sys.stdin is not None and not sys.stdin.isatty():
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        name, content = "--prompt", (prompt or "").encode(errors="surrogateescape")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return re.sub(r"\r?\n\Z", "", text) if name == "standard input" else text


def generation_config(args) -> GenerationConfig:
    """The preset, and over it what was given."""
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    chosen = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.stop is not None:
        chosen["stop"] = tuple(map(unescape, args.stop))
    chosen |= dict(do_sample=not args.greedy, use_cache=not args.no_cache, truncate_prompt=args.truncate)
    try:
        return dataclasses.replace(PRESETS[args.preset] if args.preset else GenerationConfig(), **chosen)
    except UserError as error:
        raise UserError(f"--{error}") from error


def unescape(text: str) -> str:
    r"""A shell writes no line break easily: `\n`, `\t` and `\\` are understood."""
    try:
        return re.sub(r"\\(.?)", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text, flags=re.DOTALL)
    except KeyError as error:
        raise UserError(f"--stop: {text!r} is invalid (expected n, t or a backslash after each backslash)") from error


def check_options(args) -> None:
    """Raises UserError for an option that would mean nothing beside another."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for name, others in EXCLUDES.items():
        for other in others:
            if name in given and other in given:
                raise UserError(f"--{other}: not possible with --{name} (expected one of the two)")
    for name, needed in NEEDS.items():
        if name in given and needed not in given:
            raise UserError(f"--{name}: only possible with --{needed}")
    if "truncate" in given and "chat" in given and "batch_file" not in given:
        raise UserError("--truncate: not possible with --chat (expected a shorter prompt; a turn is not cut)")


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid (expected an integer, at least 1)")
    return int(text)


def parse_args(argv):
    default = GenerationConfig()
    parser = argparse.ArgumentParser(
        prog=program("sample"),
        usage="%(prog)s --model_path MODEL [--prompt TEXT | --batch_file FILE | --interactive] [options]",
        description=__doc__,
    )
    add = parser.add_argument
    add(
        "--model_path",
        required=True,
        metavar="MODEL",
        help="a run folder or one of its checkpoints (RUN/best, RUN/checkpoints/STEP), "
        "a Hugging Face folder, a .pth or a .gguf file",
    )
    add("--tokenizer", metavar="DIR", help="the tokenizer to use (default: the model's own; a .pth file has none)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the computation; auto is "
        "bfloat16 on a GPU, float32 on the CPU (default)")  # fmt: skip
    add("--use_ema", action=argparse.BooleanOptionalAction, help="EMA weights (default: when the run has them)")

    add = parser.add_argument_group("what to write").add_argument
    add("--prompt", metavar="TEXT", help="the text to continue; empty starts a new document; - is standard input, which is "
        "also read where it is no terminal and nothing else is asked")  # fmt: skip
    add("--chat", action="store_true", help="take the prompt as a user's turn and answer it")
    add("--stream", action="store_true", help="print while it is written")
    add("--num_samples", type=at_least_1, metavar="N", help="so many continuations of the prompt, which is read once")
    add("--json", action="store_true", help="print a JSON object a result: prompt, text, finish_reason, n_prompt_tokens, "
        "n_tokens, token_ids, seed")  # fmt: skip
    add("--batch_file", metavar="FILE", help='many prompts, one a line (empty lines are left out), or .jsonl with '
        '{"prompt": …}, {"messages": [{"role": …, "content": …}, …]} or {"history": …}; other fields come back in the '
        'result')  # fmt: skip
    add("--output", metavar="FILE", help="results of --batch_file, a JSON object a line (default: standard output); what the "
        "file holds already is not made again")  # fmt: skip
    add("--batch_size", type=at_least_1, metavar="N", help="prompts of --batch_file at once (default: 16)")
    add("--interactive", action="store_true", help="a dialogue in the terminal, in Chinese; /help says more")

    add = parser.add_argument_group("how to write").add_argument
    presets = "; ".join(f"{name}: temperature {p.temperature}, top_k {p.top_k}, top_p {p.top_p}" for name, p in PRESETS.items())
    add("--preset", choices=tuple(PRESETS), help=f"{presets}. Other options go before it")
    add("--greedy", action="store_true", help="always the most likely token")
    add("--temperature", type=float, metavar="T", help=f"above 1 more varied, below less (default: {default.temperature})")
    add("--top_k", type=int, metavar="K", help=f"from the K most likely tokens; 0: all (default: {default.top_k})")
    add(
        "--top_p",
        type=float,
        metavar="P",
        help=f"from the fewest that reach this probability; 1: all (default: {default.top_p})",
    )
    add("--min_p", type=float, metavar="P", help="from those this many times as likely as the likeliest; 0: all (default)")
    add("--repetition_penalty", type=float, metavar="X", help="above 1: what was there already comes less; 1: off (default)")
    add("--no_repeat_ngram_size", type=int, metavar="N", help="no N tokens in a row come twice; 0: off (default)")
    add("--max_new_tokens", type=int, metavar="N", help=f"at most so many tokens (default: {default.max_new_tokens})")
    add("--min_new_tokens", type=int, metavar="N", help="no end before so many (default: 0)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times; \\n, \\t and \\\\ "
        "are a line break, a tab and a backslash")  # fmt: skip
    add("--seed", type=int, metavar="N", help=f"the same seed gives the same text (default: {default.seed})")
    add("--no_cache", action="store_true", help="compute keys and values again at each token: slow, to compare")
    add("--truncate", action="store_true", help="of a prompt that is too long for the model read the end, of a dialogue in "
        "--batch_file the last turns (default: an error)")  # fmt: skip
    return parser.parse_args(argv)


def command() -> int:
    """What `mateconv-sample` runs."""
    return exit_code(main, parse_args(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(command())
