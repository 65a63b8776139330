"""Text generation: TextGenerator loads a model and its tokenizer and continues prompts and dialogues."""

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerFast

from mateconv_jax import config as config_lib
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference import detokenizer
from mateconv_jax.inference.decode import SMALLEST_CACHE, SMALLEST_PROMPT, Decoder, DecodeState, bucket
from mateconv_jax.inference.detokenizer import Detokenizer
from mateconv_jax.inference.sampling import Sampling
from mateconv_jax.interop.formats import open_model
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.kv_cache import make_kv_cache
from mateconv_jax.model.transformer import Transformer, abstract_model

History = list[dict[str, str]]  # [{"role": "user", "content": ...}, ...]
Draw = tuple[int, int]  # seed, and index among the samples of a prompt


class Generation(str):
    """Generated text, a str with details.

    Attributes:
      token_ids: the generated tokens, without the end token and anything past a stop string.
      n_prompt_tokens: tokens of the prompt.
      finish_reason: "eos": the model ended the text; "stop": a stop string was found; "length": max_new_tokens was reached;
        "context": the model's context is full.
    """

    token_ids: list[int]
    n_prompt_tokens: int
    finish_reason: str

    def __new__(cls, text: str, token_ids: list[int], n_prompt_tokens: int, finish_reason: str):
        generation = super().__new__(cls, text)
        generation.token_ids, generation.n_prompt_tokens, generation.finish_reason = token_ids, n_prompt_tokens, finish_reason
        return generation

    def __reduce__(self):
        return Generation, (str(self), self.token_ids, self.n_prompt_tokens, self.finish_reason)


class TextGenerator:
    """A model and its tokenizer. Several threads may use one generator.

    generator = TextGenerator.from_pretrained("out")
    generator.generate("中国", GenerationConfig(max_new_tokens=50))

    Attributes:
      params: the model's parameters in the compute dtype; may be replaced by others of the same shapes.
      tokenizer: pass None to the constructor if only `logits` is needed.
      graph, model_config: the model's nnx graph definition and configuration.
      max_seq_len: the model's context, in tokens.
      end_ids: the tokens that end an answer.
    """

    def __init__(self, model: Transformer, tokenizer: PreTrainedTokenizerFast | None, end_ids: tuple[int, ...] = ()):
        """end_ids: tokens that end an answer besides the tokenizer's eos_token."""
        self._tokenizer = tokenizer
        self.max_seq_len = model.c.max_seq_len
        self.model_config = model.c
        self.graph, self.params = nnx.split(model)
        self.end_ids = tuple(sorted({*end_ids, *([tokenizer.eos_token_id] if tokenizer else [])}))
        self._decoder = Decoder(self.graph, self.model_config, self.end_ids)
        self._all_logits = jax.jit(lambda params, tokens_BS: nnx.merge(self.graph, params)(tokens_BS).astype(jnp.float32))
        # The last stream's parameters, tokens and state, whose KV cache the next one reuses for a common prefix.
        self._last_stream: tuple[nnx.State, list[int], DecodeState] | None = None
        self._last_stream_lock = threading.Lock()  # who takes it owns it: a state's arrays are donated when it goes on

    @staticmethod
    def from_pretrained(
        path: str | Path,
        tokenizer: str | Path | None = None,
        use_ema: bool | None = None,
        dtype: str = "auto",
        n_heads: int | None = None,
    ) -> "TextGenerator":
        """Load a model from a run folder (its newest checkpoint) or one of its checkpoints, a Hugging Face folder, or a .pth or
        .gguf file. Optimizer state is not read.

        Args:
          tokenizer: a folder with the tokenizer to use; None: the model's own. A .pth file has none.
          use_ema: load the EMA weights (True) or the raw ones (False); None: EMA if the model has them.
          dtype: compute dtype: auto, float32, bfloat16 or float16.
          n_heads: number of query heads, for a .pth file, which does not store it; None: MateConv's or MiniMind's.

        Raises:
          UserError: no model at `path`, a model this code cannot represent, or EMA weights requested but missing.
        """
        model = open_model(path, "--model_path", tokenizer, n_heads)
        # The backends used in training may be unavailable or slower on this machine.
        model.config.model.update(dict(attention="auto", experts="auto"))
        c = ModelConfig.make(config_lib.options(ModelOptions, model.config.model), dtype)
        graph, abstract_params = abstract_model(c)
        # fp32 weights would be read and cast again for every token.
        abstract_params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, c.dtype), abstract_params)
        return TextGenerator(nnx.merge(graph, model.params(abstract_params, use_ema)), model.tokenizer, model.end_ids)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Raises UserError if the model has none."""
        if self._tokenizer is None:
            raise UserError(
                "--tokenizer: required, because the model has none (expected a folder with tokenizer.json or tokenizer.model)"
            )
        return self._tokenizer

    # ---- text -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        config: GenerationConfig = GenerationConfig(),
        stream: bool = False,
        callback: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue `prompt`; the result does not include it. `<s>` is put before the prompt, as before every document.

        Args:
          stream: pass the text to `callback` piece by piece as it is generated.
          callback: None: print to standard output.

        Raises:
          UserError: the prompt fills the model's context.
        """
        if not stream:
            return self.batch_generate([prompt], config)[0]
        return _exhaust(self.stream(prompt, config), callback or _print)

    def stream(self, prompt: str, config: GenerationConfig = GenerationConfig(), every: int = 1) -> Iterator[str]:
        """Like `generate`, but yield the text piece by piece as it is generated. The iterator's return value is the Generation.

        Args:
          every: tokens decoded between two reads from the device.
        """
        return self._stream_ids(self._prompt_ids(prompt, config), config, every, continues=True)

    def batch_generate(
        self,
        prompts: list[str],
        config: GenerationConfig = GenerationConfig(),
        batch_size: int = 16,
        draws: list[Draw] | None = None,
    ) -> list[Generation]:
        """`generate` for several prompts, batch_size at a time. A prompt's text does not depend on the others in its batch.

        Args:
          draws: each prompt's (seed, sample): sample i of a seed is what `generate_samples` gives at i. None: (config.seed, 0).
        """
        ids = [self._prompt_ids(prompt, config) for prompt in prompts]
        return self._decode_batches(ids, config, batch_size, draws, continues=True)

    def generate_samples(self, prompt: str, n: int, config: GenerationConfig = GenerationConfig()) -> list[Generation]:
        """n samples for one prompt, which is prefilled once; the first is `generate`'s."""
        return self._decode_all([self._prompt_ids(prompt, config)], config, n, continues=True)

    # ---- dialogues --------------------------------------------------------------------------------------------------

    def chat(self, history: History, config: GenerationConfig = GenerationConfig()) -> Generation:
        """Answer a dialogue, [{"role": "user", "content": …}, …], formatted with the tokenizer's chat template.

        Raises:
          UserError: the dialogue fills the model's context, or the tokenizer has no chat template.
        """
        return self.batch_chat([history], config)[0]

    def batch_answer(
        self,
        documents: list[str | History],
        config: GenerationConfig = GenerationConfig(),
        batch_size: int = 16,
        draws: list[Draw] | None = None,
    ) -> list[Generation]:
        """`batch_generate` of the texts and `batch_chat` of the dialogues among `documents`, in their order."""

        def of(generate, is_text: bool) -> Iterator[Generation]:
            chosen = [i for i, document in enumerate(documents) if isinstance(document, str) == is_text]
            of_chosen = None if draws is None else [draws[i] for i in chosen]
            return iter(generate([documents[i] for i in chosen], config, batch_size, of_chosen))

        texts, dialogues = of(self.batch_generate, True), of(self.batch_chat, False)
        return [next(texts if isinstance(document, str) else dialogues) for document in documents]

    def batch_chat(
        self,
        histories: list[History],
        config: GenerationConfig = GenerationConfig(),
        batch_size: int = 16,
        draws: list[Draw] | None = None,
    ) -> list[Generation]:
        """`chat` for several dialogues, batch_size at a time; `draws` as in `batch_generate`."""
        return self._decode_batches([self._chat_ids(history, config) for history in histories], config, batch_size, draws)

    def stream_chat(self, history: History, config: GenerationConfig = GenerationConfig()) -> Iterator[str]:
        """Like `chat`, but yield the text piece by piece. When a dialogue continues, only its new turn is prefilled."""
        return self._stream_ids(self._chat_ids(history, config), config)

    def n_chat_tokens(self, history: History) -> int:
        """Length in tokens of a dialogue and the generation prompt that follows it."""
        return len(encode_chat(self.tokenizer, history, add_generation_prompt=True))

    # ---- logits -----------------------------------------------------------------------------------------------------

    def logits(self, token_ids_BS) -> np.ndarray:
        """Next-token logits after each token, fp32 (B, S, V).

        Args:
          token_ids_BS: integers; S is at most the model's context.

        Raises:
          UserError: the rows are too long, or an id is not in the vocabulary.
        """
        tokens_BS = np.asarray(token_ids_BS, np.int32)
        B, S = tokens_BS.shape
        if S > self.model_config.max_seq_len:
            raise UserError(f"token_ids: {S} tokens do not fit the model's context of {self.model_config.max_seq_len}")
        if tokens_BS.size and not 0 <= tokens_BS.min() <= tokens_BS.max() < self.model_config.vocab_size:
            raise UserError(f"token_ids: expected ids from 0 to {self.model_config.vocab_size - 1}")
        padding = bucket(S, self.model_config.max_seq_len, SMALLEST_PROMPT) - S
        return np.asarray(self._all_logits(self.params, np.pad(tokens_BS, ((0, 0), (0, padding)))))[:, :S]

    def score(self, text: str) -> tuple[list[int], np.ndarray]:
        """A document's tokens without `<s>`, and each one's log-probability (natural log, fp32 (S,)) given those before it.

        Raises:
          UserError: the text does not fit the model's context.
        """
        ids = self.document_ids(text)
        logits_SV = self.logits([ids])[0, :-1]
        log_probs_SV = logits_SV - np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)
        return ids[1:], log_probs_SV[np.arange(len(ids) - 1), ids[1:]]

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def check_prompt(self, prompt: str, name: str = "prompt", chat: bool = False) -> None:
        """Raises UserError, in which `name` stands for the prompt, if the prompt leaves no room in the model's context. `chat`:
        it is a question, formatted with the chat template.
        """
        n_tokens = self.n_chat_tokens([{"role": "user", "content": prompt}]) if chat else len(self.document_ids(prompt))
        self._check_length(n_tokens, name)

    def document_ids(self, text: str) -> list[int]:
        """Token ids of a document's beginning: `<s>`, where the model has it, and the text.

        Raises:
          UserError: no text, and no `<s>`.
        """
        ids = tokenizer_lib.encode_beginning(self.tokenizer, text)
        if not ids:
            raise UserError("prompt: empty, and this model has no begin-of-document token to start from (expected some text)")
        return ids

    def _prompt_ids(self, prompt: str, config: GenerationConfig) -> list[int]:
        ids = self.document_ids(prompt)
        if config.truncate_prompt:  # leave room for the answer, but give the prompt at least half of the context
            room = self.model_config.max_seq_len - max(1, min(config.max_new_tokens, self.model_config.max_seq_len // 2))
            if len(ids) > room:
                n_bos = int(self.tokenizer.bos_token_id is not None)
                ids = ids[:n_bos] + ids[n_bos - room :]
        self._check_length(len(ids))
        return ids

    def _chat_ids(self, history: History, config: GenerationConfig) -> list[int]:
        ids = encode_chat(self.tokenizer, history, add_generation_prompt=True)
        self._check_length(len(ids), "dialogue")
        return ids

    def _check_length(self, n_tokens: int, name: str = "prompt") -> None:
        if n_tokens >= self.model_config.max_seq_len:
            raise UserError(
                f"{name}: {n_tokens} tokens leave no room in the model's context of {self.model_config.max_seq_len} "
                f"(expected at most {self.model_config.max_seq_len - 1})"
            )

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def _start(self, prompts: list[list[int]], n_rows: int, config: GenerationConfig) -> DecodeState:
        """The state before the prefill: one row per prompt, and finished rows up to n_rows."""
        lengths_B = np.ones(n_rows, np.int32)
        lengths_B[: len(prompts)] = [len(ids) for ids in prompts]
        tokens_BT = np.zeros(
            (n_rows, bucket(int(lengths_B.max()) + 1, self.model_config.max_seq_len, SMALLEST_CACHE)), np.int32
        )
        for tokens_T, ids in zip(tokens_BT, prompts, strict=False):
            tokens_T[: len(ids)] = ids
        remaining_B = np.minimum(config.max_new_tokens, self.model_config.max_seq_len - lengths_B)
        remaining_B[len(prompts) :] = 0
        return DecodeState(
            tokens_BT=jnp.asarray(tokens_BT),
            length_B=jnp.asarray(lengths_B),
            prompt_length_B=jnp.asarray(lengths_B),
            remaining_B=jnp.asarray(remaining_B),
            finished_B=jnp.asarray(remaining_B == 0),
            kv_cache=make_kv_cache(self.model_config, *tokens_BT.shape) if config.use_cache else None,
        )

    def _decode_batches(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        batch_size: int,
        draws: list[Draw] | None = None,
        continues: bool = False,
    ) -> list[Generation]:
        batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
        decoded = (self._decode_all(prompts[b], config, draws=draws and draws[b], continues=continues) for b in batches)
        return [text for batch in decoded for text in batch]

    def _decode_all(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        n_samples: int = 1,
        draws: list[Draw] | None = None,
        continues: bool = False,
    ) -> list[Generation]:
        """n_samples answers to each prompt, those of one prompt next to each other. `continues`, here and below: an answer
        continues the prompt's text; otherwise it begins a turn.
        """
        n_rows = 1 << (len(prompts) - 1).bit_length()  # a power of two, so that few programs are compiled
        sampling = Sampling.make(config, np.tile(np.arange(n_samples), n_rows), self.model_config.vocab_size)
        if draws is not None:
            seed_B, sample_B = np.pad(np.array(draws, np.int64), ((0, n_rows - len(draws)), (0, 0))).T
            seed_B, sample_B = jnp.asarray(seed_B, jnp.uint32), jnp.asarray(sample_B, jnp.int32)
            sampling = dataclasses.replace(sampling, seed=seed_B, sample_B=sample_B)
        state = self._start(prompts, n_rows, config)
        S = bucket(max(map(len, prompts)), self.model_config.max_seq_len, SMALLEST_PROMPT)
        prompts = [ids for ids in prompts for _ in range(n_samples)]
        detokenizers = [Detokenizer(self.tokenizer, config.stop, ids[-1:] if continues else None) for ids in prompts]
        n_checked = [0] * len(prompts)

        def answers(state: DecodeState) -> list[list[int]]:
            tokens_BT, length_B = jax.device_get((state.tokens_BT, state.length_B))
            return [tokens_T[len(ids) : n].tolist() for ids, tokens_T, n in zip(prompts, tokens_BT, length_B, strict=False)]

        def check_stops(state: DecodeState) -> jax.Array:
            finished_B = np.array(state.finished_B)
            for row, ids in enumerate(answers(state)):
                for token in ids[n_checked[row] :]:
                    if token not in self.end_ids:
                        detokenizers[row].push(token)
                n_checked[row] = len(ids)
                finished_B[row] |= detokenizers[row].stopped
            return jnp.asarray(finished_B)

        state = self._decoder.run(self.params, state, sampling, S, n_samples, check_stops if config.stop else None)
        return [self._generation(ids, prompt, config, continues) for ids, prompt in zip(answers(state), prompts, strict=True)]

    def ended(self, ids: list[int], config: GenerationConfig) -> tuple[list[int], str]:
        """All tokens of an answer without the end token, and why it ended where no stop string did; see Generation."""
        if ids and ids[-1] in self.end_ids:
            return ids[:-1], "eos"
        return ids, "length" if len(ids) == config.max_new_tokens else "context"

    def _generation(self, ids: list[int], prompt: list[int], config: GenerationConfig, continues: bool) -> Generation:
        """The result for `ids`, all tokens decoded after `prompt`; cut at an end token or a stop string."""
        ids, reason = self.ended(ids, config)
        before = prompt[-1:] if continues else []
        if not config.stop:
            return Generation(detokenizer.continuation(self.tokenizer, before, ids), ids, len(prompt), reason)
        text = Detokenizer(self.tokenizer, config.stop, before)
        pieces = [text.push(token) for token in ids]
        pieces.append(text.finish())
        return Generation("".join(pieces), ids[: text.n_tokens], len(prompt), "stop" if text.stopped else reason)

    def _stream_ids(
        self, prompt: list[int], config: GenerationConfig, every: int = 1, continues: bool = False
    ) -> Iterator[str]:
        sampling = Sampling.make(config, np.zeros(1), self.model_config.vocab_size)
        text, ids = Detokenizer(self.tokenizer, config.stop, prompt[-1:] if continues else None), []
        state: DecodeState | None = None  # stays None if max_new_tokens is 0
        params = self.params
        try:
            if config.max_new_tokens:
                state, start, S = self._resume(prompt, config, params)
                logits_BV, state = self._decoder.prefill(params, state, start, S=S)
                state = self._decoder.append(logits_BV, state, sampling)
            while state is not None:
                tokens_1T, [length], [finished] = jax.device_get((state.tokens_BT, state.length_B, state.finished_B))
                new = tokens_1T[0, len(prompt) + len(ids) : length].tolist()
                ids += new
                for token in new:
                    if token not in self.end_ids and (piece := text.push(token)):
                        yield piece
                if finished or text.stopped:
                    break
                if length == tokens_1T.shape[1]:
                    state = self._decoder.grow(state)
                state = self._decoder.loop(params, state, sampling, every)
            if piece := text.finish():
                yield piece
        finally:
            # Without a generated token, the prefill may not have completed.
            if ids and state is not None and state.kv_cache is not None:
                with self._last_stream_lock:
                    self._last_stream = params, prompt + ids, state
        return self._generation(ids, prompt, config, continues)

    def _resume(self, prompt: list[int], config: GenerationConfig, params: nnx.State) -> tuple[DecodeState, int, int]:
        """A state for one prompt that reuses the last stream's KV cache for the tokens they have in common.

        Returns:
          (state, start, S): the prefill has to read positions start .. start + S - 1.
        """
        state = self._start([prompt], 1, config)
        T, n_same = state.tokens_BT.shape[1], 0
        with self._last_stream_lock:
            last, self._last_stream = self._last_stream, None
        if last is not None and config.use_cache and last[0] is params and not last[2].length_B.is_deleted():
            _, ids, old = last
            # A state's last token is not in its cache, and at least one token of the prompt must be read to get logits.
            comparable = min(len(ids), len(prompt)) - 1
            n_same = next((i for i in range(comparable) if ids[i] != prompt[i]), comparable)
            if old.tokens_BT.shape[1] != T:
                old = self._decoder.resize(old, length=T)
            state = dataclasses.replace(state, kv_cache=old.kv_cache)
        S = bucket(len(prompt) - n_same, self.model_config.max_seq_len, SMALLEST_PROMPT)
        return state, min(n_same, T - S), S  # near the end of the cache, the bucket starts earlier and rereads some tokens


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _exhaust(pieces: Iterator[str], callback: Callable[[str], None]) -> Generation:
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        callback(piece)
