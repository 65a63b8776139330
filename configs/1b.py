"""1,003,851,520 parameters, trained on 20 tokens for each: what `recipe --params=1B` chooses.

A step fits one GPU of 80 GB (A100, H100).
docs/recipes.md has the rules. If you have fewer than 20 billion tokens, ask `python -m mateconv_jax.recipe` instead.

python -m mateconv_jax.train --config=configs/1b.py --config.data.train_data_path=data/zh
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 1792
    config.model.n_layers = 28
    config.model.n_heads = 28
    config.model.n_kv_heads = 14

    config.training.out_dir = "out_1b"
    config.training.max_steps = 38_294
    config.training.batch_size = 32
    config.training.accumulation_steps = 32
    config.training.learning_rate = 6.4e-3
    config.training.matrix_lr_ratio = 0.036  # 64 / dim
    config.training.min_lr = 6.4e-4
    config.training.warmup_ratio = 0.052  # 2,000 steps
    config.training.eval_interval = "5%"
    config.training.save_interval = "5%"
    return config
