"""The reference: MateConv's model, 26,878,464 parameters. `train --help` lists every key.

python -m mateconv_jax.train --config=configs/base.py --config.data.train_data_path=data/zh
"""

from mateconv_jax.config import default_config


def get_config():
    return default_config()
