"""What a model is and how it computes."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mateconv_jax.model import moe
from mateconv_jax.model.attention import backends


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model is (config.model, resolved) and how it computes (dtype, attention backend)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_factor: float
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_original_max_seq_len: int
    qk_norm: bool
    tie_word_embeddings: bool
    dropout: float
    use_moe: bool
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    norm_topk_prob: bool
    aux_loss_alpha: float
    experts: str  # a backend of model/moe.py, never "auto"
    attention: str  # a backend of model/attention/, never "auto"
    platform: str  # "cpu" or "gpu"
    dtype: jnp.dtype

    @staticmethod
    def make(model: ConfigDict, dtype: str, platform: str | None = None) -> "ModelConfig":
        """From a resolved config's `model` section, for this process's devices.

        Args:
          model: see `mateconv_jax.config.resolve`.
          dtype: of the computation; "auto" is bfloat16 on an accelerator and float32 on the CPU, where bfloat16
            matrix-vector products are 12 times slower.
          platform: "cpu" or "gpu"; None asks jax.

        Raises:
          UserError: the attention backend asked for cannot run there.
        """
        platform = platform or jax.default_backend()
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else "bfloat16"
        shape = {field.name: model[field.name] for field in dataclasses.fields(ModelConfig) if field.name in model}
        shape["experts"] = moe.choose_backend(model.experts)
        shape["attention"] = backends.choose_backend(model.attention, platform, jnp.dtype(dtype), model.dropout)
        return ModelConfig(**shape, platform=platform, dtype=jnp.dtype(dtype))
