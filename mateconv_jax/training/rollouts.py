"""Answers that the model in training gives to prompts: the decoder of `sample`, on all devices of the mesh.

Dimensions in names: P prompts, B answers, T cache bucket.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference import detokenizer
from mateconv_jax.inference.decode import SMALLEST_CACHE, SMALLEST_PROMPT, Decoder, DecodeState, bucket
from mateconv_jax.inference.sampling import Sampling
from mateconv_jax.inference.text_generator import Generation
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.kv_cache import make_kv_cache
from mateconv_jax.runtime import sharding

# Too little memory for the answers of a micro-batch, which are decoded together: see out_of_memory.as_user_error.
LOWER = "rollout.max_new_tokens", "lower it, or lower training.batch_size and raise training.accumulation_steps"


class DecodingWeights:
    """The parameters as decoding reads them: in the compute dtype, whole on every device."""

    def __init__(self, c: ModelConfig, mesh: Mesh):
        self._cast = jax.jit(self.cast_to(c.dtype), out_shardings=sharding.replicated(mesh))

    def __call__(self, params: nnx.State) -> nnx.State:
        return self._cast(params)

    @staticmethod
    def cast_to(dtype: jnp.dtype) -> Callable[[nnx.State], nnx.State]:
        """All but a mixture's gate, which computes in fp32."""

        def cast(path, p):
            return p if any(getattr(key, "key", None) == "gate_ED" for key in path) else p.astype(dtype)

        return lambda params: jax.tree.map_with_path(cast, params)


class Rollouts:
    """Decodes answers. Its programs depend on the number of prompts, the longest of all prompts and on how far answers go, so
    that a run compiles a handful of them.
    """

    def __init__(
        self, graph: nnx.GraphDef, c: ModelConfig, mesh: Mesh, tokenizer: PreTrainedTokenizerFast, how: GenerationConfig,
        longest_prompt: int, n_samples: int, end_ids: tuple[int, ...] = (),
    ):  # fmt: skip
        """
        Args:
          how: but for its seed.
          longest_prompt: in tokens, of all prompts there will be.
          n_samples: answers to each prompt.
          end_ids: tokens that end an answer besides the tokenizer's eos_token.
        """
        self._c, self._mesh, self._tokenizer, self._how, self._n_samples = c, mesh, tokenizer, how, n_samples
        self._end_ids = tuple(sorted({tokenizer.eos_token_id, *end_ids}))
        self._decoder = Decoder(graph, c, self._end_ids, mesh)
        self._S = bucket(longest_prompt, c.max_seq_len, SMALLEST_PROMPT)
        self._T = bucket(longest_prompt + 1, c.max_seq_len, SMALLEST_CACHE)
        self._start = jax.jit(self._first_state, out_shardings=sharding.batch(mesh))

    def __call__(
        self, weights: nnx.State, prompts: list[list[int]], seed: int, first_sample: int, should_stop: Callable[[], bool],
        are_texts: list[bool] | None = None,
    ) -> list[Generation] | None:  # fmt: skip
        """n_samples answers to each prompt, those of a prompt next to each other. An answer depends on the weights, its prompt,
        the seed and its number: first_sample + its place in the result.

        Args:
          weights: see DecodingWeights.
          prompts: token ids; as many as a multiple of the devices.
          should_stop: asked every STOP_CHECK_TOKENS tokens.
          are_texts: which prompts are texts that their answers continue, not dialogues; None: all.

        Returns:
          Texts whose token_ids include the end token; None: should_stop() was true before all were finished.
        """
        lengths_P = np.array([len(ids) for ids in prompts], np.int32)
        tokens_PT = np.zeros((len(prompts), self._T), np.int32)
        for tokens_T, ids in zip(tokens_PT, prompts, strict=True):
            tokens_T[: len(ids)] = ids
        state = self._start(*self._spread((tokens_PT, lengths_P)))
        sample_B = first_sample + np.arange(len(prompts) * self._n_samples, dtype=np.int32)
        how = dataclasses.replace(self._how, seed=seed)
        sampling = Sampling.make(how, self._spread(sample_B), self._c.vocab_size)
        stopped = False

        def finished(state: DecodeState) -> jax.Array:
            nonlocal stopped
            stopped = stopped or should_stop()
            return jnp.ones_like(state.finished_B) if stopped else state.finished_B

        state = self._decoder.run(weights, state, sampling, self._S, self._n_samples, finished)
        if stopped:
            return None
        tokens_BT, length_B = jax.device_get((state.tokens_BT, state.length_B))
        prompt_lengths_B = np.repeat(lengths_P, self._n_samples)
        is_text_B = np.repeat([True] * len(prompts) if are_texts is None else are_texts, self._n_samples)
        return [
            self._generation(tokens_T[:end].tolist(), int(start), bool(is_text))
            for tokens_T, start, end, is_text in zip(tokens_BT, prompt_lengths_B, length_B, is_text_B, strict=True)
        ]

    def _spread(self, rows):
        return jax.device_put(rows, sharding.batch(self._mesh))

    def _first_state(self, tokens_PT, length_P) -> DecodeState:
        return DecodeState(
            tokens_BT=tokens_PT,
            length_B=length_P,
            prompt_length_B=length_P,
            remaining_B=jnp.minimum(self._how.max_new_tokens, self._c.max_seq_len - length_P),
            finished_B=jnp.zeros(len(length_P), bool),
            kv_cache=make_kv_cache(self._c, *tokens_PT.shape),
        )

    def _generation(self, all_ids: list[int], n_prompt_tokens: int, is_text: bool) -> Generation:
        """Of the prompt's and the answer's tokens."""
        ids = all_ids[n_prompt_tokens:]
        before = all_ids[n_prompt_tokens - 1 : n_prompt_tokens] if is_text else []
        is_ended = ids[-1] in self._end_ids
        text = detokenizer.continuation(self._tokenizer, before, ids[:-1] if is_ended else ids)
        return Generation(text, ids, n_prompt_tokens, "eos" if is_ended else "length")
