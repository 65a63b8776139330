"""Let a model write:  python -m mateconv_jax.sample --model_path=out --prompt="中国" """

import argparse
import sys

from mateconv_jax.errors import exit_code
from mateconv_jax.inference.generation_config import GenerationConfig


def main(args):
    config = GenerationConfig(
        do_sample=not args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    from mateconv_jax.inference.text_generator import TextGenerator  # 3 s of imports, after the command line is right

    generator = TextGenerator.from_pretrained(args.model_path, use_ema=args.use_ema, dtype=args.dtype)
    history = [{"role": "user", "content": args.prompt}]
    if not args.chat:
        print(args.prompt, end="", flush=True)
    if args.stream:
        pieces = generator.stream_chat(history, config) if args.chat else generator.stream(args.prompt, config)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print(generator.chat(history, config) if args.chat else generator.generate(args.prompt, config))


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m mateconv_jax.sample", description=__doc__)
    defaults = GenerationConfig()
    parser.add_argument("--model_path", required=True, help="a run folder")
    parser.add_argument("--prompt", default="", help="the text to continue; empty starts a new document")
    parser.add_argument("--chat", action="store_true", help="take the prompt as a user's turn and answer it")
    parser.add_argument("--max_new_tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--top_k", type=int, default=defaults.top_k, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=defaults.top_p, help="1: all tokens")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="the same seed gives the same text")
    parser.add_argument("--stream", action="store_true", help="print while it is written")
    parser.add_argument(
        "--use_ema", action=argparse.BooleanOptionalAction, default=None, help="EMA weights (default: when the run has them)"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args(sys.argv[1:])))
