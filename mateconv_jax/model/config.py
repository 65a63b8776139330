"""ModelOptions, what a model is, and ModelConfig, that resolved for the device it runs on."""

import dataclasses

import jax.numpy as jnp

from mateconv_jax.model import moe
from mateconv_jax.model.attention import backends
from mateconv_jax.model.attention.request import Request
from mateconv_jax.model.device import Device
from mateconv_jax.model.rope import RotarySettings


@dataclasses.dataclass(frozen=True)
class ModelOptions(RotarySettings):
    """The keys of a resolved config's `model` section that the model code needs; see config_keys.py."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    tie_word_embeddings: bool
    dropout: float
    use_moe: bool
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    norm_topk_prob: bool
    aux_loss_alpha: float
    experts: str
    attention: str


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelOptions):
    """Everything the model code needs: the options, and how to compute on a device.

    Attributes:
      experts: a backend of model/moe.py, never "auto".
      attention: a backend of model/attention/, never "auto".
      platform: "cpu" or "gpu".
      dtype: of the activations; parameters are fp32.
      deterministic: produce the same bits in every run, on a GPU too.
      passed_over: why "auto" did not choose the options that are fastest elsewhere; logged, and not part of equality.
    """

    platform: str
    dtype: jnp.dtype
    deterministic: bool = False
    passed_over: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @staticmethod
    def make(
        options: ModelOptions, dtype: str, device: Device | None = None, length: int | None = None, deterministic: bool = False
    ) -> "ModelConfig":
        """Choose dtype and backends for a device.

        Args:
          dtype: compute dtype. "auto" is bfloat16 on accelerators that support it (NVIDIA GPUs from compute capability 8.0),
            float32 elsewhere: on the CPU, bfloat16 matrix-vector products are 12 times slower.
          device: the device to compute on; None: this process's.
          length: tokens per row in training or evaluation; None: any even length.
          deterministic: the same gradient bits in every run; always so on the CPU.

        Raises:
          UserError: the requested attention backend does not support this configuration.
        """
        device = device or Device.here()
        passed_over = []
        if dtype == "auto":
            dtype = "float32" if device.platform == "cpu" else "bfloat16"
            if device.compute_capability is not None and device.compute_capability < (8, 0):
                dtype = "float32"
                passed_over.append(
                    "bfloat16: needs compute capability 8.0, and this GPU has {}.{}; float16 is faster than float32 "
                    "(training.dtype, --dtype)".format(*device.compute_capability)
                )
        request = Request(jnp.dtype(dtype), options.head_dim, length, options.dropout, device)
        attention, reasons = backends.choose(options.attention, request)
        passed_over += [f"{reason} (attention)" for reason in reasons]
        chosen = dataclasses.replace(options, experts=moe.choose_backend(options.experts), attention=attention)
        return ModelConfig(
            **dataclasses.asdict(chosen),
            platform=device.platform,
            dtype=jnp.dtype(dtype),
            deterministic=deterministic,
            passed_over=tuple(passed_over),
        )
