"""Learning from reward (GRPO): the model answers prompts, and functions say what its answers are worth.

python -m mateconv_jax.train --config=configs/grpo.py --config.training.init_from=out_sft \
    --config.data.train_data_path=prompts.jsonl --config.reward.functions='("mateconv_jax.rewards:number_match",)'
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.loss.kind = "grpo"
    config.loss.beta = 0.04  # of DeepSeekMath; 0 keeps no reference, and saves its memory
    config.rollout.samples = 8
    config.rollout.max_new_tokens = 256

    config.training.out_dir = "out_grpo"
    config.training.epochs = 1
    config.training.batch_size = 64  # answers: 8 to each of 8 prompts
    config.training.learning_rate = 1e-6  # of DeepSeekMath and TRL; the demo's 0.9 M parameters take 2e-4
    config.training.min_lr = 1e-7
    config.training.warmup_ratio = 0.03
    config.training.weight_decay = 0.0
    config.training.log_interval = 1
    config.training.eval_interval = "10%"
    config.training.save_interval = "10%"
    config.training.samples_interval = "10%"
    return config
