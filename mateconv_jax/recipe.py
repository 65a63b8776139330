"""Choose a model and its training for your data, GPU and time, and write the configuration:

python -m mateconv_jax.recipe --data data/zh --gpu=4090 --hours=8 --output configs/mine.py
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

from mateconv_jax import files
from mateconv_jax.errors import UserError, check_name, exit_code, program

UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}  # powers of ten


def main(args):
    check(args)
    from rich.console import Console  # imports take seconds: only for a valid command line

    from mateconv_jax.planning import recipe as recipe_lib, recipe_reasons, recipe_text
    from mateconv_jax.planning.machine import machine_of

    if args.output:
        check_free(Path(args.output), recipe_text.MADE_BY, args.overwrite)
    data = recipe_lib.read_data(args.data)
    machine = machine_of(args.gpu, args.devices, args.hosts, lambda text: print(text, file=sys.stderr))
    recipe = recipe_lib.make_recipe(data, recipe_lib.Dial(args.hours, args.params, args.tokens), machine)
    out_dir = f"out_{Path(args.output).stem}" if args.output else "out"
    chosen = recipe_reasons.choices(recipe, out_dir)
    command = f"{program('recipe')} {shlex.join(args.argv)}"
    text = recipe_text.config_file(recipe, chosen, command, args.output or "FILE", args.dollars_per_gpu_hour)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(Path(args.output), text)
    if args.json:
        print(json.dumps(recipe_text.as_json(recipe, chosen, args.dollars_per_gpu_hour)))
    elif args.explain:
        recipe_text.print_table(recipe, chosen, args.dollars_per_gpu_hour, Console())
    elif args.output:
        recipe_text.print_summary(recipe, args.dollars_per_gpu_hour, Console())
        print(f"wrote {args.output}; start it with: python -m mateconv_jax.train --config={args.output}")
    else:
        print(text, end="")


def check(args) -> None:
    """Raises UserError for options that contradict each other."""
    given = [name for name in ("hours", "params", "tokens") if getattr(args, name) is not None]
    if not given:
        raise UserError("--hours is missing (expected --hours, --params or --tokens, or two of them)")
    if len(given) == 3:
        raise UserError("--hours, --params, --tokens: two of them determine the third (expected at most two)")
    if args.gpu == "this" and (args.devices != 1 or args.hosts != 1):
        raise UserError("--devices: has no effect with --gpu=this, which takes this machine's devices")
    check_name(args.output or "", "--output")
    if args.output and not args.output.endswith(".py"):
        raise UserError(f"--output: {args.output!r} is invalid (expected a name that ends in .py)")


def check_free(path: Path, made_by: str, overwrite: bool) -> None:
    """Raises UserError unless `path` is free, or holds a recipe's file that may be replaced."""
    if not path.exists():
        return
    is_ours = path.is_file() and path.read_bytes().startswith(made_by.encode())
    if not (is_ours and overwrite):
        advice = "give --overwrite to replace it" if is_ours else "it was not made by this command: choose another file"
        raise UserError(f"--output: {str(path)!r} exists ({advice})")


def count(text: str) -> float:
    """100M, 1.5B, 2e9 as a number."""
    match = re.fullmatch(r"(\d[\d,]*\.?\d*(?:e\d{1,2})?)([kmbgt]?)", text.lower())
    value = float(match[1].replace(",", "")) * 10 ** UNITS[match[2]] if match else 0
    if not 0 < value < 1e16:
        raise argparse.ArgumentTypeError(f"{text!r} is not possible (expected a number such as 100M, 2B or 5e7)")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not possible (expected a number above 0)")
    return value


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("recipe"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--data",
        type=os.path.expanduser,
        required=True,
        metavar="DIR",
        help="dataset folder, as prepare writes it; several: DIR:WEIGHT,DIR:WEIGHT",
    )
    add("--gpu", required=True, metavar="NAME", help="a100, a100-40, h100, h200, b200, l4 or 4090; or this: this machine's devices, on which the step is timed")  # fmt: skip  # noqa: E501
    add("--devices", type=int, default=1, metavar="N", help="total number of GPUs (default: 1)")
    add("--hosts", type=int, default=1, metavar="N", help="machines they are spread over (default: 1)")
    dial = parser.add_argument_group("the dial: one of these, or two")
    dial.add_argument("--hours", type=positive, metavar="X", help="how long it may train")
    dial.add_argument("--params", type=count, metavar="N", help="parameters, such as 100M")
    dial.add_argument("--tokens", type=count, metavar="N", help="tokens to train on, such as 2B; repeats the data if need be")
    add("--dollars_per_gpu_hour", type=positive, metavar="X", help="price, to also print the run's cost")
    add("--output", type=os.path.expanduser, metavar="FILE", help="write the configuration there; default: print it")
    add("--overwrite", action="store_true", help="replace an --output that an earlier recipe wrote")
    add("--explain", action="store_true", help="print every choice with its reason as a table")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    args.argv = argv
    return args


def command() -> int:
    """Entry point of `mateconv-recipe`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
