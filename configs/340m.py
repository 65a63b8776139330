"""335,591,680 parameters, trained on 20 tokens for each: what `recipe --params=340M` chooses.

A step fits one GPU of 24 GB (RTX 4090).
docs/recipes.md has the rules. If you have fewer than 6.7 billion tokens, ask `python -m mateconv_jax.recipe` instead.

python -m mateconv_jax.train --config=configs/340m.py --config.data.train_data_path=data/zh
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 1280
    config.model.n_layers = 18
    config.model.n_heads = 20
    config.model.n_kv_heads = 10

    config.training.out_dir = "out_340m"
    config.training.max_steps = 25_604
    config.training.batch_size = 32
    config.training.accumulation_steps = 16
    config.training.learning_rate = 6.4e-3
    config.training.matrix_lr_ratio = 0.05  # 64 / dim
    config.training.min_lr = 6.4e-4
    config.training.warmup_ratio = 0.078  # 2,000 steps
    config.training.eval_interval = "5%"
    config.training.save_interval = "5%"
    return config
