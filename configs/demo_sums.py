"""The reward demo's first stage: a model of 0.9 M parameters learns to answer additions, but stops when about a third is right.

python -m mateconv_jax.train --config=configs/demo_sums.py
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 128
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.n_kv_heads = 4
    config.model.vocab_size = 300
    config.model.max_seq_len = 128

    config.data.train_data_path = "data/demo_sums/dataset"
    config.data.seq_len = 128

    config.training.out_dir = "runs/demo_sums"
    config.training.max_steps = 165
    config.training.batch_size = 16
    config.training.learning_rate = 2e-3
    config.training.lr_scheduler = "constant"
    config.training.warmup_ratio = 0.1
    config.training.weight_decay = 0.0
    config.training.eval_interval = 60
    config.training.save_interval = 60
    return config
