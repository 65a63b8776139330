"""From text to text."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerFast

from mateconv_jax import run_folder
from mateconv_jax.data import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.inference.decode import Decoder, DecodeState, Sampling, bucket
from mateconv_jax.inference.generation_config import GenerationConfig
from mateconv_jax.model.transformer import ModelConfig, Transformer, abstract_model, make_kv_cache


class TextGenerator:
    """A model and its tokenizer, ready to write.

    generator = TextGenerator.from_pretrained("out")
    generator.generate("中国", GenerationConfig(max_new_tokens=50))
    """

    def __init__(self, model: Transformer, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self._c = model.c
        graph, self.params = nnx.split(model)
        self._decoder = Decoder(graph, tokenizer.eos_token_id, self._c.max_seq_len)

    @staticmethod
    def from_pretrained(path: str | Path, use_ema: bool | None = None, dtype: str = "auto") -> "TextGenerator":
        """From a run folder; only parameters are read from its newest checkpoint.

        Args:
          use_ema: EMA weights or the raw ones; None takes EMA when the run has it.
          dtype: auto, float32 or bfloat16, of the computation.

        Raises:
          UserError: no run, no checkpoint or no tokenizer there; EMA weights asked for and not there.
        """
        key = "--model_path"
        model = run_folder.read_config(path, key).model
        model.attention = "auto"  # the backend it was trained with may not exist on this machine
        c = ModelConfig.make(model, dtype)
        graph, abstract_params = abstract_model(c)
        params = run_folder.load_params(path, abstract_params, use_ema, key)
        return TextGenerator(nnx.merge(graph, params), tokenizer_lib.load(Path(path) / "tokenizer", key))

    def generate(self, prompt: str, config: GenerationConfig = GenerationConfig()) -> str:
        """The text that follows `prompt`, without it. A document starts with `<s>`, and so does the prompt.

        Raises:
          UserError: the prompt fills the model's context.
        """
        return self.batch_generate([prompt], config)[0]

    def batch_generate(self, prompts: list[str], config: GenerationConfig = GenerationConfig()) -> list[str]:
        """`generate` for several prompts at once; a row's text does not depend on its batch."""
        return self._decode_all([self._prompt_ids(prompt) for prompt in prompts], config)

    def generate_samples(self, prompt: str, n: int, config: GenerationConfig = GenerationConfig()) -> list[str]:
        """n draws for one prompt; the first is `generate`'s."""
        return self._decode_all([self._prompt_ids(prompt)] * n, config, np.arange(n))

    def chat(self, history: list[dict[str, str]], config: GenerationConfig = GenerationConfig()) -> str:
        """The assistant's answer to a dialogue, [{"role": "user", "content": …}, …], through the chat template."""
        return self.batch_chat([history], config)[0]

    def batch_chat(self, histories: list[list[dict[str, str]]], config: GenerationConfig = GenerationConfig()) -> list[str]:
        """`chat` for several dialogues at once."""
        return self._decode_all([self._chat_ids(history) for history in histories], config)

    def stream(self, prompt: str, config: GenerationConfig = GenerationConfig()) -> Iterator[str]:
        """`generate`, piece by piece as it is written. The pieces joined are `generate`'s text."""
        return self._stream_ids(self._prompt_ids(prompt), config)

    def stream_chat(self, history: list[dict[str, str]], config: GenerationConfig = GenerationConfig()) -> Iterator[str]:
        """`chat`, piece by piece as it is written."""
        return self._stream_ids(self._chat_ids(history), config)

    def _prompt_ids(self, prompt: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *tokenizer_lib.encode(self.tokenizer, [prompt])[0]]

    def _chat_ids(self, history: list[dict[str, str]]) -> list[int]:
        return tokenizer_lib.encode_chat(self.tokenizer, history, add_generation_prompt=True)

    def check_prompt(self, prompt: str, name: str = "prompt") -> None:
        """Raises UserError, which names `name`, where the prompt leaves no room in the model's context."""
        self._check_length(len(self._prompt_ids(prompt)), name)

    def _check_length(self, n_tokens: int, name: str = "prompt") -> None:
        if n_tokens >= self._c.max_seq_len:
            raise UserError(
                f"{name}: {n_tokens} tokens leave no room in the model's context of {self._c.max_seq_len} "
                f"(expected at most {self._c.max_seq_len - 1})"
            )

    def _start(self, prompts: list[list[int]], max_new_tokens: int) -> DecodeState:
        lengths_B = np.array([len(ids) for ids in prompts], np.int32)
        room_B = self._c.max_seq_len - lengths_B
        self._check_length(int(lengths_B.max()))
        length = bucket(int(lengths_B.max()) + 1, self._c.max_seq_len)  # one more: the prefill appends a token
        tokens_BT = np.zeros((len(prompts), length), np.int32)
        for tokens_T, ids in zip(tokens_BT, prompts, strict=True):
            tokens_T[: len(ids)] = ids
        remaining_B = np.minimum(max_new_tokens, room_B)
        return DecodeState(
            tokens_BT=jnp.asarray(tokens_BT),
            length_B=jnp.asarray(lengths_B),
            remaining_B=jnp.asarray(remaining_B),
            finished_B=jnp.asarray(remaining_B == 0),
            kv_cache=make_kv_cache(self._c, len(prompts), length),
        )

    def _decode_all(self, prompts: list[list[int]], config: GenerationConfig, samples_B=None) -> list[str]:
        if not prompts:
            return []
        if samples_B is None:
            samples_B = np.zeros(len(prompts))
        sampling = Sampling.make(config, samples_B, self._c.vocab_size)
        state = self._decoder.run(self.params, self._start(prompts, config.max_new_tokens), sampling)
        tokens_BT, length_B = jax.device_get((state.tokens_BT, state.length_B))
        return [
            self._decode_text(tokens_T[len(ids) : length])
            for ids, tokens_T, length in zip(prompts, tokens_BT, length_B, strict=True)
        ]

    def _stream_ids(self, prompt: list[int], config: GenerationConfig) -> Iterator[str]:
        sampling = Sampling.make(config, np.zeros(1), self._c.vocab_size)
        state = self._start([prompt], config.max_new_tokens)
        if config.max_new_tokens == 0:
            return
        state = self._decoder.prefill(self.params, state, sampling)
        held = []  # tokens that end in the middle of a character
        while True:
            length = int(state.length_B[0])
            held.append(int(state.tokens_BT[0, length - 1]))
            finished = bool(state.finished_B[0])
            text = self._decode_text(held)
            if finished or not text.endswith("\ufffd"):
                yield text
                held = []
            if finished:
                return
            if length == state.tokens_BT.shape[1]:
                state = self._decoder.grow(state)
            state = self._decoder.step(self.params, state, sampling)

    def _decode_text(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
