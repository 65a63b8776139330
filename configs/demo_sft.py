"""The quickstart's second stage: the demo model learns to answer, in about a minute on two CPU cores.

python -m mateconv_jax.train --config=configs/demo_sft.py
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.data.train_data_path = "data/demo_dialogues"
    config.data.seq_len = 128

    config.training.out_dir = "runs/demo_chat"
    config.training.init_from = "runs/demo"
    config.training.max_steps = 150
    config.training.batch_size = 16
    config.training.learning_rate = 1e-3
    config.training.min_lr = 1e-4
    config.training.weight_decay = 0.0
    config.training.eval_interval = 75
    config.training.save_interval = 75
    config.training.samples_interval = 75
    config.training.sample_prompts = ("法国的首都是哪里？", "熊猫最爱吃什么？")
    config.training.sample_chat = True
    return config
