"""What a model is and how it computes."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from mateconv_jax.model import moe
from mateconv_jax.model.attention import backends
from mateconv_jax.model.attention.request import Request
from mateconv_jax.model.device import Device


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
    deterministic: bool = False  # the same bits in every run, on a GPU too
    # Why what "auto" stands for is not what is fastest elsewhere; for the log, no part of what is computed.
    passed_over: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @staticmethod
    def make(
        model: ConfigDict, dtype: str, device: Device | None = None, length: int | None = None, deterministic: bool = False
    ) -> "ModelConfig":
        """From a resolved config's `model` section.

        Args:
          model: see `mateconv_jax.config.resolve`.
          dtype: of the computation. "auto" is bfloat16 on an accelerator that computes in it, and float32 elsewhere: on the CPU
            bfloat16's matrix-vector products are 12 times slower, and NVIDIA GPUs have it from compute capability 8.0 on.
          device: what it is computed on; None: this process's.
          length: of the rows that are trained or evaluated; None: any that is even.
          deterministic: gradients with the same bits in every run; on the CPU they always have.

        Raises:
          UserError: the attention backend asked for cannot serve that.
        """
        device = device or Device.here()
        passed_over = []
        if dtype == "auto":
            dtype = "float32" if device.platform == "cpu" else "bfloat16"
            if device.compute_capability is not None and device.compute_capability < (8, 0):
                dtype = "float32"
                passed_over.append(
                    "bfloat16: it needs compute capability 8.0, and this GPU has {}.{}; float16 is faster than float32 "
                    "(training.dtype, --dtype)".format(*device.compute_capability)
                )
        shape = {field.name: model[field.name] for field in dataclasses.fields(ModelConfig) if field.name in model}
        request = Request(jnp.dtype(dtype), model.head_dim, length, model.dropout, device)
        shape["experts"] = moe.choose_backend(model.experts)
        shape["attention"], reasons = backends.choose(model.attention, request)
        passed_over += [f"{reason} (attention)" for reason in reasons]
        return ModelConfig(
            **shape,
            platform=device.platform,
            dtype=jnp.dtype(dtype),
            deterministic=deterministic,
            passed_over=tuple(passed_over),
        )
