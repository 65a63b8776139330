"""The reward demo's second stage: the same model practises additions, and is told only which of its answers are right.

python -m mateconv_jax.train --config=configs/demo_rl.py
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.data.train_data_path = "data/demo_sums/prompts.jsonl"
    config.data.val_data_path = "data/demo_sums/held_out.jsonl"
    config.data.seq_len = 27  # a question has 15 tokens, its answer at most 9

    config.loss.kind = "dr_grpo"
    config.loss.scale_rewards = "none"
    config.rollout.samples = 8
    config.rollout.max_new_tokens = 12
    config.reward.functions = ("mateconv_jax.rewards:number_match",)

    config.training.out_dir = "runs/demo_rl"
    config.training.init_from = "runs/demo_sums"
    config.training.max_steps = 160
    config.training.batch_size = 256  # answers: 8 to each of 32 questions
    config.training.learning_rate = 3e-4
    config.training.min_lr = 3e-5  # at a constant rate the share right moves by 3 % between evaluations (docs/LOG.md)
    config.training.warmup_steps = 0
    config.training.weight_decay = 0.0
    config.training.log_interval = 5
    config.training.eval_interval = 25
    config.training.save_interval = 50
    config.training.samples_interval = 25
    return config
