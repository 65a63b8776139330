"""Predict a run's memory and speed:  python -m mateconv_jax.plan --config=configs/base.py --gpu=h100 --devices=8

Compiles the run's programs for those GPUs and analyses them. Needs no GPU, but the package jax-cuda13-pjrt in jax's version.
"""

import argparse
import json
import sys

from mateconv_jax import config as config_lib
from mateconv_jax.errors import exit_code, program


def main(argv):
    args, rest = parse_args(argv[1:])
    sys.argv = [argv[0], *rest]  # config_flags reads overrides from there
    config = config_lib.resolve(config_lib.from_command_line(sys.argv))
    from rich.console import Console  # the 2 s of imports come after checking the command line

    from mateconv_jax.planning.plan import Cluster, make_plan
    from mateconv_jax.planning.tables import print_plan

    cluster = Cluster.local() if args.gpu == "this" else Cluster.named(args.gpu, args.devices, args.hosts)
    if config.training.init_from:  # reading a model imports more
        from mateconv_jax.training import resume

        config, _ = resume.with_model_of(resume.find_origin(config), config)
    plan = make_plan(config, cluster, args.dollars_per_gpu_hour, not args.quick, lambda text: print(text, file=sys.stderr))
    if args.json:
        print(json.dumps(plan))
    else:
        print_plan(plan, Console())


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("plan"),
        usage="%(prog)s --config=FILE --gpu=NAME [--devices=N] [options] [--config.section.key=value …]",
        description=__doc__,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", required=True, metavar="NAME", help="a100, a100-40, h100, h200, b200, l4 or 4090; or this: this machine's "
        "devices, on which the step is also timed")  # fmt: skip
    add("--devices", type=int, default=1, metavar="N", help="total number of GPUs (default: 1)")
    add("--hosts", type=int, default=1, metavar="N", help="machines they are spread over (default: 1)")
    add("--dollars_per_gpu_hour", type=float, metavar="X", help="price, to also print the run's cost")
    add("--quick", action="store_true", help="analyse only the training step: no search for the largest batch, no decoding")
    add("--json", action="store_true", help="print one JSON object: bytes, seconds, FLOPs")
    return parser.parse_known_args(argv)


def command() -> int:
    """Entry point of `mateconv-plan`."""
    return exit_code(main, sys.argv)


if __name__ == "__main__":
    sys.exit(command())
