"""Choosing the next tokens: transformers' logits processors in transformers' order, then argmax or a sample.

Dimensions in names: B rows, T token positions, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference import logits_processors

# In a batch of rows with options of their own, rows with 0 < top_k <= TOP_K_AT_ONCE get their k highest logits from one TopK
# call: 20 µs a row of 6,400 logits. A search over the bits of the k-th takes 160.
TOP_K_AT_ONCE = 64
Array = jax.Array | np.ndarray
MAX_LOGIT_BIAS = 300  # tokens with a bias in a row with options of its own, as OpenAI's


@flax.struct.dataclass
class Sampling:
    """Sampling parameters as jit arguments.

    An option is a scalar for all rows (`make`), or each row has its own (`for_rows`): then it is (B,), a row's filter is off at
    the value that GenerationConfig documents, and a filter that is off in all rows costs a comparison. Arrays may change
    without recompiling. A filter that is None is off and costs nothing: which are, and the static fields, select the program.

    Attributes:
      seed: uint32.
      sample_B: int32, each row's index among the samples of its prompt.
      logit_bias: (token ids int32, biases fp32), each (M,) or (B, M); ids outside the vocabulary are ignored.
      repetition_penalty, presence_penalty, frequency_penalty, temperature, min_p: fp32, as in GenerationConfig.
      no_repeat_ngram_size, min_new_tokens: int32.
      top_p_tail: fp32, 1 - top_p.
      top_k_B: int32, each row's k; None: top_k for all rows.
      is_greedy_B: bool, rows that take the argmax; None: see do_sample.
      do_sample: False takes the argmax in all rows.
      top_k: 0 is off; with top_k_B, the largest k that a TopK call serves.
    """

    seed: Array
    sample_B: Array
    logit_bias: tuple[Array, Array] | None
    repetition_penalty: Array | None
    presence_penalty: Array | None
    frequency_penalty: Array | None
    no_repeat_ngram_size: Array | None
    min_new_tokens: Array | None
    temperature: Array | None
    top_p_tail: Array | None
    min_p: Array | None
    top_k_B: Array | None
    is_greedy_B: Array | None
    do_sample: bool = flax.struct.field(pytree_node=False)
    top_k: int = flax.struct.field(pytree_node=False)

    @staticmethod
    def make(config: GenerationConfig, sample_B: np.ndarray | jax.Array, vocab_size: int) -> "Sampling":
        do_sample = config.do_sample
        penalties = config.presence_penalty or config.frequency_penalty
        tokens, biases = zip(*config.logit_bias, strict=True) if config.logit_bias else ((), ())
        return Sampling(
            seed=jnp.uint32(config.seed),
            sample_B=jnp.asarray(sample_B, jnp.int32),
            logit_bias=(jnp.array(tokens, jnp.int32), jnp.array(biases, jnp.float32)) if tokens else None,
            repetition_penalty=jnp.float32(config.repetition_penalty) if config.repetition_penalty != 1 else None,
            presence_penalty=jnp.float32(config.presence_penalty) if penalties else None,
            frequency_penalty=jnp.float32(config.frequency_penalty) if penalties else None,
            no_repeat_ngram_size=jnp.int32(_int32(config.no_repeat_ngram_size)) if config.no_repeat_ngram_size else None,
            min_new_tokens=jnp.int32(_int32(config.min_new_tokens)) if config.min_new_tokens else None,
            temperature=jnp.float32(config.temperature) if do_sample else None,
            top_p_tail=jnp.float32(1 - config.top_p) if do_sample and config.top_p < 1 else None,
            min_p=jnp.float32(config.min_p) if do_sample and config.min_p else None,
            top_k_B=None,
            is_greedy_B=None,
            do_sample=do_sample,
            top_k=min(config.top_k, vocab_size) if do_sample else 0,
        )

    @staticmethod
    def for_rows(configs: list[GenerationConfig], samples: list[int], vocab_size: int) -> "Sampling":
        """Every row has its own options, as numpy arrays. All results have the same structure, hence one program.

        Args:
          configs: of each row; at most MAX_LOGIT_BIAS logit biases in each.
          samples: each row's index among the samples of its prompt.
        """

        def column(value, dtype):
            return np.array([value(c) for c in configs], dtype)

        tokens_BM = np.full((len(configs), MAX_LOGIT_BIAS), vocab_size, np.int32)
        bias_BM = np.zeros((len(configs), MAX_LOGIT_BIAS), np.float32)
        for row, config in enumerate(configs):
            for i, (token, bias) in enumerate(config.logit_bias):
                tokens_BM[row, i], bias_BM[row, i] = token, bias
        return Sampling(
            seed=column(lambda c: c.seed, np.uint32),
            sample_B=np.array(samples, np.int32),
            logit_bias=(tokens_BM, bias_BM),
            repetition_penalty=column(lambda c: c.repetition_penalty, np.float32),
            presence_penalty=column(lambda c: c.presence_penalty, np.float32),
            frequency_penalty=column(lambda c: c.frequency_penalty, np.float32),
            no_repeat_ngram_size=column(lambda c: _int32(c.no_repeat_ngram_size), np.int32),
            min_new_tokens=column(lambda c: _int32(c.min_new_tokens), np.int32),
            temperature=column(lambda c: c.temperature if c.do_sample else 1, np.float32),
            top_p_tail=column(lambda c: 1 - c.top_p if c.do_sample else 0, np.float32),
            min_p=column(lambda c: c.min_p if c.do_sample else 0, np.float32),
            top_k_B=column(lambda c: min(c.top_k, vocab_size) % vocab_size if c.do_sample else 0, np.int32),
            is_greedy_B=column(lambda c: not c.do_sample, bool),
            do_sample=True,
            top_k=min(TOP_K_AT_ONCE, vocab_size),
        )


def _int32(value: int) -> int:
    return min(value, 2**31 - 1)


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
    highest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if not sampling.do_sample:
        return highest_B
    if sampling.is_greedy_B is None:
        return draw(logits_BV, sampling.seed, sampling.sample_B, length_B)
    drawn_B = jax.lax.cond(
        jnp.all(sampling.is_greedy_B),
        lambda _: highest_B,
        lambda x: draw(x, sampling.seed, sampling.sample_B, length_B),
        logits_BV,
    )
    return jnp.where(sampling.is_greedy_B, highest_B, drawn_B)


def filtered_logits(logits_BV, sampling: Sampling, tokens_BT, length_B, prompt_length_B, eos_ids: tuple[int, ...]):
    """The logits that tokens are sampled from, fp32 (B, V), filtered in the order of transformers'
    GenerationMixin._get_logits_processor; presence and frequency penalties come after the repetition penalty.

    Arguments as in `next_tokens`. Greedy decoding uses only the filters that depend on earlier tokens, and the bias.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    s, per_row = sampling, sampling.top_k_B is not None
    if s.logit_bias is not None:
        used_B = jnp.any(s.logit_bias[1] != 0, axis=1) if per_row else None
        logits_BV = _where_used(used_B, lambda x: logits_processors.logit_bias(x, *s.logit_bias), logits_BV)
    if s.repetition_penalty is not None:
        penalty = _column(s.repetition_penalty)
        used_B = s.repetition_penalty != 1 if per_row else None
        logits_BV = _where_used(
            used_B, lambda x: logits_processors.repetition_penalty(x, tokens_BT, length_B, penalty), logits_BV
        )
    if s.presence_penalty is not None and s.frequency_penalty is not None:
        penalties = _column(s.presence_penalty), _column(s.frequency_penalty)
        used_B = (s.presence_penalty != 0) | (s.frequency_penalty != 0) if per_row else None
        logits_BV = _where_used(
            used_B,
            lambda x: logits_processors.count_penalties(x, tokens_BT, prompt_length_B, length_B, *penalties),
            logits_BV,
        )
    if s.no_repeat_ngram_size is not None:
        size = _column(s.no_repeat_ngram_size)
        used_B = s.no_repeat_ngram_size > 0 if per_row else None
        logits_BV = _where_used(used_B, lambda x: logits_processors.no_repeat_ngram(x, tokens_BT, length_B, size), logits_BV)
    if s.min_new_tokens is not None:
        minimum, new_tokens_B = _column(s.min_new_tokens), length_B - prompt_length_B
        used_B = s.min_new_tokens > 0 if per_row else None
        logits_BV = _where_used(
            used_B, lambda x: logits_processors.min_new_tokens(x, new_tokens_B, minimum, eos_ids), logits_BV
        )
    if s.temperature is not None:
        logits_BV = logits_processors.temperature(logits_BV, _column(s.temperature))
    if s.top_k_B is not None:
        logits_BV = _row_top_k_and_top_p(logits_BV, s)
    else:
        highest_BK = None
        if s.top_k:
            logits_BV, highest_BK = logits_processors.top_k(logits_BV, s.top_k)
        if s.top_p_tail is not None:
            logits_BV = logits_processors.top_p(logits_BV, s.top_p_tail, highest_BK)
    if s.min_p is not None:
        least = _column(s.min_p)
        used_B = s.min_p > 0 if per_row else None
        logits_BV = _where_used(used_B, lambda x: logits_processors.min_p(x, least), logits_BV)
    return logits_BV


def _column(value):
    """A row's own values as (B, 1), a scalar as it is."""
    return value[:, None] if value.ndim else value


def _where_used(is_used_B, apply, logits_BV):
    """apply(logits_BV) in the rows where is_used_B, None: in all. Where no row uses it, nothing is computed."""
    if is_used_B is None:
        return apply(logits_BV)
    return jax.lax.cond(is_used_B.any(), lambda x: jnp.where(is_used_B[:, None], apply(x), x), lambda x: x, logits_BV)


def _row_top_k_and_top_p(logits_BV, s: Sampling):
    """Each row's own top-k and top-p. How a row is computed depends on its own options alone, and so does its text."""
    assert s.top_k_B is not None and s.top_p_tail is not None
    k_B, tail_B = jnp.asarray(s.top_k_B), jnp.asarray(s.top_p_tail)
    tail_B1 = tail_B[:, None]
    is_few_B = (k_B > 0) & (k_B <= s.top_k)
    is_other_B = ~is_few_B & ((k_B > 0) | (tail_B > 0))

    def few(logits_BV):
        kept_BV, highest_BK = logits_processors.top_k(logits_BV, s.top_k, k_B)
        kept_BV = jnp.where(tail_B1 > 0, logits_processors.top_p(kept_BV, tail_B1, highest_BK), kept_BV)
        return jnp.where(is_few_B[:, None], kept_BV, logits_BV)

    def other(logits_BV):
        kept_BV = logits_processors.top_k_of_many(logits_BV, k_B)
        kept_BV = jnp.where(tail_B1 > 0, logits_processors.top_p(kept_BV, tail_B1), kept_BV)
        return jnp.where(is_other_B[:, None], kept_BV, logits_BV)

    logits_BV = jax.lax.cond(is_few_B.any(), few, lambda x: x, logits_BV)
    return jax.lax.cond(is_other_B.any(), other, lambda x: x, logits_BV)


def draw(logits_BV, seed, sample_B, position_B):
    """Sample one token per row from softmax(logits_BV), int32 (B,), by inverting the CDF at one uniform number per (seed,
    sample, position). The Gumbel trick needs V random numbers and is 15 times slower on the CPU.

    Args:
      seed: uint32, of all rows or (B,).
    """

    def uniform(seed, sample, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position))

    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    seed_B = jnp.broadcast_to(seed, position_B.shape)
    return logits_processors.inverse_cdf(weights_BV, jax.vmap(uniform)(seed_B, sample_B, position_B))
