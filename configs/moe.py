"""A mixture of experts: the base model with four routed experts, two per token, and one shared expert.

96,100,864 parameters, of which 61,497,856 are active per token.

python -m mateconv_jax.train --config=configs/moe.py --config.data.train_data_path=data/zh
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.use_moe = True
    return config
