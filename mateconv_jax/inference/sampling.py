"""Choosing the next tokens: transformers' logits processors in transformers' order, then argmax or a sample.

Dimensions in names: B rows, T token positions, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference import logits_processors


@flax.struct.dataclass
class Sampling:
    """Sampling parameters as jit arguments.

    Arrays may change without recompiling. A filter that is None is off and costs nothing. Which filters are off, and the static
    fields do_sample, top_k and no_repeat_ngram_size, select the compiled program.

    Attributes:
      seed: uint32.
      sample_B: int32, each row's index among the samples of its prompt.
      repetition_penalty, temperature, min_p: fp32 scalars, as in GenerationConfig.
      min_new_tokens: int32 scalar.
      top_p_tail: fp32 scalar, 1 - top_p.
      do_sample: False takes the argmax.
      top_k, no_repeat_ngram_size: 0 is off.
    """

    seed: jax.Array
    sample_B: jax.Array
    repetition_penalty: jax.Array | None
    min_new_tokens: jax.Array | None
    temperature: jax.Array | None
    top_p_tail: jax.Array | None
    min_p: jax.Array | None
    do_sample: bool = flax.struct.field(pytree_node=False)
    top_k: int = flax.struct.field(pytree_node=False)
    no_repeat_ngram_size: int = flax.struct.field(pytree_node=False)

    @staticmethod
    def make(config: GenerationConfig, sample_B: np.ndarray | jax.Array, vocab_size: int) -> "Sampling":
        do_sample = config.do_sample
        return Sampling(
            seed=jnp.uint32(config.seed),
            sample_B=jnp.asarray(sample_B, jnp.int32),
            repetition_penalty=jnp.float32(config.repetition_penalty) if config.repetition_penalty != 1 else None,
            min_new_tokens=jnp.int32(min(config.min_new_tokens, 2**31 - 1)) if config.min_new_tokens else None,
            temperature=jnp.float32(config.temperature) if do_sample else None,
            top_p_tail=jnp.float32(1 - config.top_p) if do_sample and config.top_p < 1 else None,
            min_p=jnp.float32(config.min_p) if do_sample and config.min_p else None,
            do_sample=do_sample,
            top_k=min(config.top_k, vocab_size) if do_sample else 0,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
        )


def next_tokens(logits_BV, sampling: Sampling, tokens_BT, length_B, prompt_length_B, eos_ids: tuple[int, ...]):
    """Choose the token that follows each row's first length_B tokens.

    A filtered token is never chosen unless all are filtered; such a row gives 0. A sample depends only on (seed, sample,
    position) and on its own row's logits and tokens, not on the rest of the batch.

    Args:
      logits_BV: any float dtype.
      tokens_BT: int32. A row has length_B tokens, `<s>` included, the first prompt_length_B of them its prompt; the rest is
        padding.
      length_B, prompt_length_B: int32.
      eos_ids: the tokens that end an answer.

    Returns:
      int32 (B,)
    """
    logits_BV = filtered_logits(logits_BV, sampling, tokens_BT, length_B, prompt_length_B, eos_ids)
    if not sampling.do_sample:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return draw(logits_BV, sampling.seed, sampling.sample_B, length_B)


def filtered_logits(logits_BV, sampling: Sampling, tokens_BT, length_B, prompt_length_B, eos_ids: tuple[int, ...]):
    """The logits that tokens are sampled from, fp32 (B, V), filtered in the order of transformers'
    GenerationMixin._get_logits_processor.

    Arguments as in `next_tokens`. Greedy decoding uses only the filters that depend on earlier tokens.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.repetition_penalty is not None:
        logits_BV = logits_processors.repetition_penalty(logits_BV, tokens_BT, length_B, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        logits_BV = logits_processors.no_repeat_ngram(logits_BV, tokens_BT, length_B, sampling.no_repeat_ngram_size)
    if sampling.min_new_tokens is not None:
        new_tokens_B = length_B - prompt_length_B
        logits_BV = logits_processors.min_new_tokens(logits_BV, new_tokens_B, sampling.min_new_tokens, eos_ids)
    if sampling.temperature is not None:
        logits_BV = logits_processors.temperature(logits_BV, sampling.temperature)
    highest_BK = None
    if sampling.top_k:
        logits_BV, highest_BK = logits_processors.top_k(logits_BV, sampling.top_k)
    if sampling.top_p_tail is not None:
        logits_BV = logits_processors.top_p(logits_BV, sampling.top_p_tail, highest_BK)
    if sampling.min_p is not None:
        logits_BV = logits_processors.min_p(logits_BV, sampling.min_p)
    return logits_BV


def draw(logits_BV, seed, sample_B, position_B):
    """Sample one token per row from softmax(logits_BV), int32 (B,), by inverting the CDF at one uniform number per (seed,
    sample, position). The Gumbel trick needs V random numbers and is 15 times slower on the CPU.
    """

    def uniform(sample, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position))

    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    return logits_processors.inverse_cdf(weights_BV, jax.vmap(uniform)(sample_B, position_B))
