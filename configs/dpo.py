"""Preferences (DPO), after fine-tuning. The model's shape is that of the weights that it starts from, which are the reference.

python -m mateconv_jax.train --config=configs/dpo.py --config.data.train_data_path=data/pairs --config.training.init_from=out
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.loss.kind = "sigmoid"
    config.loss.beta = 0.1
    config.training.out_dir = "out_dpo"
    config.training.epochs = 1
    config.training.batch_size = 16  # pairs: the model reads twice as many rows
    config.training.learning_rate = 1e-6  # of a model of 27 M parameters; MiniMind takes 4e-8, at which the margin hardly moves
    config.training.min_lr = 1e-7
    config.training.warmup_ratio = 0.1
    config.training.weight_decay = 0.0
    config.training.eval_interval = "10%"
    config.training.save_interval = "10%"
    config.training.samples_interval = "20%"
    config.training.sample_prompts = ("你好", "介绍一下你自己。")
    config.training.sample_chat = True
    return config
