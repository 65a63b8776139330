"""Preferences of the demo: after the quickstart, its model learns to answer shortly, in two to three minutes on two CPU cores.

python -m mateconv_jax.train --config=configs/demo_dpo.py
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.data.train_data_path = "data/demo_preferences"
    config.data.seq_len = 64

    config.loss.kind = "sigmoid"
    config.loss.sft_coef = 1.0  # without it the answers that it shall prefer become unlikely, too (docs/LOG.md, 2026-11-26)
    config.training.out_dir = "runs/demo_short"
    config.training.init_from = "runs/demo_chat"
    config.training.max_steps = 150
    config.training.batch_size = 16
    config.training.learning_rate = 5e-4
    config.training.min_lr = 5e-5
    config.training.weight_decay = 0.0
    config.training.eval_interval = 75
    config.training.save_interval = 75
    config.training.samples_interval = 75
    config.training.sample_prompts = ("法国的首都是哪里？", "熊猫最爱吃什么？")
    config.training.sample_chat = True
    return config
