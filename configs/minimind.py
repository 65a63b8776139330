"""The current MiniMind: 63,912,192 parameters, RMSNorm of queries and keys; transformers' Qwen3 architecture.

Matches version 3 (jingyaogong/minimind, commit 0074dcf, model/model_minimind.py). Prepare the text with MiniMind's tokenizer,
or with your own of at most 6,400 tokens.

python -m mateconv_jax.train --config=configs/minimind.py --config.data.train_data_path=data/zh
"""

from mateconv_jax.config import default_config


def get_config():
    config = default_config()
    config.model.dim = 768
    config.model.n_heads = 8
    config.model.n_kv_heads = 4
    config.model.hidden_dim = 2432  # pi * dim, rounded up to a multiple of 64
    config.model.max_seq_len = 32_768
    config.model.norm_eps = 1e-6
    config.model.rope_theta = 1e6
    config.model.qk_norm = True
    return config
