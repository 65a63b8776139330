"""Additions as dialogues, for the demo of learning from reward:

    python -m mateconv_jax.data.demo_sums --output data/demo_sums

writes dialogues.jsonl to fine-tune on, prompts.jsonl to practise on, and held_out.jsonl: a fifth of all pairs of numbers, which
are in neither of the others.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

from mateconv_jax import files
from mateconv_jax.errors import exit_code, program

LARGEST = 29
HELD_OUT = 0.2


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"{a}加{b}等于几？"}


def answer(a: int, b: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"{a}加{b}等于{a + b}。"}


def pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of numbers to learn from, and those held out, in random order."""
    of_all = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(of_all)
    n_held_out = round(HELD_OUT * len(of_all))
    return of_all[n_held_out:], of_all[:n_held_out]


def main(args):
    learned, held_out = pairs(args.seed)
    drawn = random.Random(args.seed).choices(learned, k=args.dialogues)
    documents = {
        "dialogues": [{"messages": [question(a, b), answer(a, b)]} for a, b in drawn],
        "prompts": [{"prompt": [question(a, b)], "answer": a + b} for a, b in learned],
        "held_out": [{"prompt": [question(a, b)], "answer": a + b} for a, b in held_out],
    }
    for name, lines in documents.items():
        path = Path(args.output) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"{path}: {len(lines):,} lines")


def parse_args(argv):
    parser = argparse.ArgumentParser(prog=program("data.demo_sums"), description="Write the demo's additions.")
    parser.add_argument("--output", type=os.path.expanduser, required=True, help="the folder to write into")
    parser.add_argument("--dialogues", type=int, default=20_000, help="lines of dialogues.jsonl (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def command() -> int:
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
