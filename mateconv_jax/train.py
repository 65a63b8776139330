"""Train a model:  python -m mateconv_jax.train --config=configs/base.py --config.data.train_data_path=data/zh"""

import sys

from mateconv_jax import config as config_lib
from mateconv_jax.errors import exit_code, program

HELP = """\
usage: {program} --config=FILE [--config.SECTION.KEY=VALUE ...]

Trains a model, or continues the run in training.out_dir.

FILE is configs/base.py, configs/110m.py, configs/340m.py, configs/1b.py, configs/sft.py,
configs/dpo.py, configs/grpo.py, configs/demo.py, configs/minimind.py, configs/moe.py, a copy of one
of them, what `recipe` writes, or configs/yaml.py:config.yaml for a YAML file. Example:

  {program} --config=configs/base.py --config.data.train_data_path=data/zh

Keys with their defaults, meaning and [allowed values]; those marked * must stay the same when a run
is resumed:

{keys}

Exit codes: 0 finished; 2 wrong input; 75 stopped by SIGTERM, Ctrl-C or training.max_hours with a
checkpoint saved, or by training.hang_timeout: give the same command to continue."""


def main(argv):
    if {"--help", "-h"} & set(argv):
        print(HELP.format(program=program("train"), keys=config_lib.describe()))
        return 0
    config = config_lib.resolve(config_lib.from_command_line(argv))
    from mateconv_jax.training.preemption import Signals

    with Signals() as signals:
        from mateconv_jax.runtime import compilation_cache, distributed  # imports take seconds: only for a valid command line

        compilation_cache.enable(config.training.compilation_cache_dir)
        distributed.initialize()
        from mateconv_jax.training.loop import train

        return train(config, signals)


def command() -> int:
    """What `mateconv-train` runs."""
    return exit_code(main, sys.argv)


if __name__ == "__main__":
    sys.exit(command())
