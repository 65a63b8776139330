"""Generate text or chat with a model:  python -m mateconv_jax.sample --model_path=out --prompt="中国" """

import argparse
import dataclasses
import io
import json
import os
import re
import sys

from mateconv_jax.errors import UserError, exit_code, program
from mateconv_jax.generation_config import PRESETS, GenerationConfig

# {option: options that have no meaning with it}.
EXCLUDES = {
    "interactive": ("prompt", "chat", "stream", "json", "num_samples", "batch_file", "truncate"),
    "batch_file": ("prompt", "system", "stream", "json", "num_samples"),
    "stream": ("json", "num_samples"),
    "num_samples": ("chat",),
    "greedy": ("preset", "temperature", "top_k", "top_p", "min_p", "num_samples"),
}
NEEDS = {"system": "chat", "output": "batch_file", "batch_size": "batch_file"}


def main(args):
    check_options(args)
    config = generation_config(args)
    requests, prompt = None, ""
    if args.batch_file is not None:
        from mateconv_jax.inference import batch_file

        requests = batch_file.read_requests(args.batch_file, args.chat)
    elif not args.interactive:
        prompt = read_prompt(args.prompt)

    from mateconv_jax.runtime import compilation_cache, out_of_memory  # the 3 s of imports come after checking the command line

    compilation_cache.enable()
    with out_of_memory.as_user_error("--max_new_tokens", "lower it, --batch_size or --num_samples; or --dtype bfloat16"):
        answer(args, config, requests, prompt)


def answer(args, config: GenerationConfig, requests, prompt: str) -> None:
    """Load the model, and continue what was given: a dialogue, a file of prompts (None: there is none) or the prompt."""
    from mateconv_jax.inference.text_generator import TextGenerator

    generator = TextGenerator.from_pretrained(args.model_path, args.tokenizer, args.use_ema, args.dtype)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="utf-8" if args.json else None, errors="backslashreplace")
    if args.interactive:
        from mateconv_jax.inference import chat

        chat.run(generator, config, args.model_path)
    elif requests is not None:
        from mateconv_jax.inference import batch_file

        batch_file.run(generator, requests, config, args.output, args.batch_size or 16, args.chat)
    else:
        write_samples(generator, prompt, config, args)


def write_samples(generator, prompt: str, config: GenerationConfig, args) -> None:
    """Generate one or more texts for the prompt and print them."""
    from mateconv_jax.terminal import escaped_json, visible

    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    history = [*system, {"role": "user", "content": prompt}]
    prefix = "" if args.chat else prompt
    if args.stream:
        print(visible(prefix), end="", flush=True)
        try:
            for piece in generator.stream_chat(history, config) if args.chat else generator.stream(prompt, config):
                print(visible(piece), end="", flush=True)
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

            print(escaped_json(json.dumps({"prompt": prompt, **batch_file.result(text, config.seed)}, ensure_ascii=False)))
            continue
        if len(texts) > 1:
            print(f"==== {number} of {len(texts)}")
        print(visible(prefix + text))


def read_prompt(prompt: str | None) -> str:
    """The prompt. "-", or none if standard input is not a terminal, reads standard input without its final line break.

    Raises:
      UserError: it is not UTF-8.
    """
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
    """The preset, overridden by the options given."""
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.stop is not None:
        given["stop"] = tuple(map(unescape, args.stop))
    given |= dict(do_sample=not args.greedy, use_cache=not args.no_cache, truncate_prompt=args.truncate)
    try:
        return dataclasses.replace(PRESETS[args.preset] if args.preset else GenerationConfig(), **given)
    except UserError as error:
        raise UserError(f"--{error}") from error


def unescape(text: str) -> str:
    r"""Replace `\n`, `\t` and `\\`, because a line break is hard to type in a shell."""
    try:
        return re.sub(r"\\(.?)", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text, flags=re.DOTALL)
    except KeyError as error:
        raise UserError(f"--stop: {text!r} is invalid (expected n, t or a backslash after each backslash)") from error


def check_options(args) -> None:
    """Raises UserError for options that exclude each other, or that need another one."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for name, others in EXCLUDES.items():
        for other in others:
            if name in given and other in given:
                raise UserError(f"--{other}: not allowed with --{name} (expected one of the two)")
    for name, needed in NEEDS.items():
        if name in given and needed not in given:
            raise UserError(f"--{name}: requires --{needed}")
    if "truncate" in given and "chat" in given and "batch_file" not in given:
        raise UserError("--truncate: not allowed with --chat (shorten the prompt; a turn cannot be truncated)")


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
    add("--model_path", type=os.path.expanduser, required=True, metavar="MODEL",
        help="a run folder or one of its checkpoints (RUN/best, RUN/checkpoints/STEP), a Hugging Face folder, or a .pth or "
        ".gguf file")  # fmt: skip
    add("--tokenizer", type=os.path.expanduser, metavar="DIR",
        help="the tokenizer to use (default: the model's own; a .pth file has none)")  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="compute dtype; auto (default): "
        "bfloat16 on a GPU that supports it, otherwise float32")  # fmt: skip
    add("--use_ema", action=argparse.BooleanOptionalAction, help="EMA weights or the raw ones (default: EMA if available)")

    add = parser.add_argument_group("input and output").add_argument
    add("--prompt", metavar="TEXT", help="text to continue; empty: start a new document; -: read standard input, which is also "
        "read by default if it is not a terminal")  # fmt: skip
    add("--chat", action="store_true", help="treat the prompt as a user turn and answer it")
    add("--system", metavar="TEXT", help="the system prompt of --chat")
    add("--stream", action="store_true", help="print the text as it is generated")
    add("--num_samples", type=at_least_1, metavar="N", help="number of samples for the prompt, which is prefilled once")
    add("--json", action="store_true", help="print one JSON object per result: prompt, text, finish_reason, n_prompt_tokens, "
        "n_tokens, token_ids, seed")  # fmt: skip
    add("--batch_file", type=os.path.expanduser, metavar="FILE",
        help='many prompts: a text file with one per line (blank lines are skipped), or .jsonl with {"prompt": …}, '
        '{"messages": [{"role": …, "content": …}, …]} or {"history": …}; other fields are copied to the results')  # fmt: skip
    add("--output", type=os.path.expanduser, metavar="FILE",
        help="results of --batch_file, one JSON object per line (default: standard output); lines already in the file are "
        "kept, so that an interrupted run resumes")  # fmt: skip
    add("--batch_size", type=at_least_1, metavar="N", help="prompts of --batch_file decoded together (default: 16)")
    add("--interactive", action="store_true", help="chat in the terminal, in Chinese; type /help for its commands")

    add = parser.add_argument_group("sampling").add_argument
    presets = "; ".join(f"{name}: temperature {p.temperature}, top_k {p.top_k}, top_p {p.top_p}" for name, p in PRESETS.items())
    add("--preset", choices=tuple(PRESETS), help=f"{presets}. Other options override it")
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--temperature", type=float, metavar="T", help=f"higher is more varied (default: {default.temperature})")
    add("--top_k", type=int, metavar="K", help=f"keep the K most likely tokens; 0: all (default: {default.top_k})")
    add("--top_p", type=float, metavar="P", help="keep the smallest set of tokens that reaches this probability; 1: all "
        f"(default: {default.top_p})")  # fmt: skip
    add("--min_p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest; 0: all (default)")
    add("--repetition_penalty", type=float, metavar="X", help="above 1: penalise tokens already in the text; 1: off (default)")
    add("--presence_penalty", type=float, metavar="X", help="above 0: penalise tokens already in the answer; 0: off (default)")
    add("--frequency_penalty", type=float, metavar="X", help="the same for each time that a token is there; 0: off (default)")
    add("--no_repeat_ngram_size", type=int, metavar="N", help="never repeat N tokens in a row; 0: off (default)")
    add("--max_new_tokens", type=int, metavar="N", help=f"at most N new tokens (default: {default.max_new_tokens})")
    add("--min_new_tokens", type=int, metavar="N", help="at least N new tokens before the text may end (default: 0)")
    add("--stop", action="append", metavar="TEXT", help="end before this string; may be repeated; \\n, \\t and \\\\ stand for "
        "line break, tab and backslash")  # fmt: skip
    add("--seed", type=int, metavar="N", help=f"the same seed gives the same text (default: {default.seed})")
    add("--no_cache", action="store_true", help="recompute all positions for every token: slow, for comparison")
    add("--truncate", action="store_true", help="if a prompt exceeds the context, keep its end, and of a --batch_file dialogue "
        "the last turns (default: an error)")  # fmt: skip
    return parser.parse_args(argv)


def command() -> int:
    """Entry point of `mateconv-sample`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
