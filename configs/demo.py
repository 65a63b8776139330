"""The quickstart's first stage: a model of 1.4 M parameters that learns the demo corpus' texts in two minutes on two CPU cores.

python -m mateconv_jax.train --config=configs/demo.py
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 160
    config.model.n_layers = 4
    config.model.n_heads = 5
    config.model.n_kv_heads = 5
    config.model.vocab_size = 1024
    config.model.max_seq_len = 128

    config.data.train_data_path = "data/demo"
    config.data.seq_len = 128

    config.training.out_dir = "runs/demo"
    config.training.max_steps = 300
    config.training.batch_size = 16
    config.training.learning_rate = 3e-3
    config.training.min_lr = 3e-4
    config.training.eval_interval = 100
    config.training.save_interval = 100
    return config
