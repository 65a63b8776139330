"""108,749,568 parameters, trained on 20 tokens for each: what `recipe --params=110M` chooses.

A step fits one GPU of 24 GB (L4, RTX 4090).
docs/recipes.md has the rules. If you have fewer than 2.2 billion tokens, ask `python -m mateconv_jax.recipe` instead.

python -m mateconv_jax.train --config=configs/110m.py --config.data.train_data_path=data/zh
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 768
    config.model.n_layers = 16
    config.model.n_heads = 12
    config.model.n_kv_heads = 6

    config.training.out_dir = "out_110m"
    config.training.max_steps = 16_594
    config.training.batch_size = 64
    config.training.accumulation_steps = 4
    config.training.learning_rate = 6.4e-3
    config.training.matrix_lr_ratio = 0.083  # 64 / dim
    config.training.min_lr = 6.4e-4
    config.training.eval_interval = "5%"
    config.training.save_interval = "5%"
    return config
