"""Supervised fine-tuning on dialogues. The model's shape is that of the weights that it starts from.

python -m mateconv_jax.train --config=configs/sft.py --config.data.train_data_path=data/sft --config.training.init_from=out
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.training.out_dir = "out_sft"
    config.training.epochs = 3
    config.training.batch_size = 32
    config.training.learning_rate = 2e-5  # MateConv's; the quickstart's 1.4 M parameters take 1e-3
    config.training.min_lr = 2e-6
    config.training.warmup_ratio = 0.03
    config.training.weight_decay = 0.0
    config.training.eval_interval = "10%"
    config.training.save_interval = "10%"
    config.training.samples_interval = "20%"
    config.training.sample_prompts = ("你好", "介绍一下你自己。")
    config.training.sample_chat = True
    return config
