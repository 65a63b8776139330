"""Train a model:  python -m mateconv_jax.train --config=configs/base.py --config.data.train_data_path=data/zh"""

import sys

from mateconv_jax import config as config_lib
from mateconv_jax.errors import exit_code


def main(argv):
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\n\n--config.SECTION.KEY=VALUE changes a key. All of them (mateconv_jax/config.py says more):\n")
        print(config_lib.default_config())
        return 0
    config = config_lib.resolve(config_lib.from_command_line(argv))
    from mateconv_jax.runtime import (
        compilation_cache,  # 6 s of imports, after the command line is known to be right
        distributed,
    )

    compilation_cache.enable(config.training.compilation_cache_dir)
    distributed.initialize()
    from mateconv_jax.training.loop import train

    return train(config)


def command() -> int:
    """What `mateconv-train` runs."""
    return exit_code(main, sys.argv)


if __name__ == "__main__":
    sys.exit(command())
