"""Texts that the model writes during training."""

import contextlib
from collections.abc import Generator

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.runtime import distributed, sharding


class FirstProcessGenerator:
    """Lets the first process write with the weights of a run, on one of its devices."""

    def __init__(self, graph: nnx.GraphDef, params: nnx.State, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        """params: shapes suffice."""
        # Gathering shards takes part of every process.
        self._gather = jax.jit(lambda params: params, out_shardings=sharding.replicated(mesh))
        self.generator = TextGenerator(nnx.merge(graph, params), tokenizer)

    @contextlib.contextmanager
    def with_weights(self, params: nnx.State) -> Generator[TextGenerator | None]:
        """The generator with these parameters, in the first process; every process must call it, the others get None."""
        replicated = self._gather(params)
        if not distributed.is_first():
            yield None
            return
        self.generator.params = jax.tree.map(lambda p: p.addressable_data(0), replicated)
        try:
            yield self.generator
        finally:
            self.generator.params = nnx.State({})  # training needs the room of this second copy of the weights


class Samples:
    """Continues the same prompts with the same random draws at every call: only the model differs."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        tokenizer: PreTrainedTokenizerFast,
        prompts: tuple[str, ...],
        chat: bool,
        mesh: Mesh,
    ):
        """
        Args:
          params: shapes suffice.
          chat: prompts are questions, which the model answers.

        Raises:
          UserError: a prompt does not fit the context, or there is no chat template.
        """
        self._prompts, self._chat = list(prompts), chat
        self._first = FirstProcessGenerator(graph, params, tokenizer, mesh)
        for prompt in prompts:
            self._first.generator.check_prompt(prompt, "training.sample_prompts", chat)

    def write(self, params: nnx.State) -> list[tuple[str, str]]:
        """Each prompt and its continuation, in the first process; every process must call it."""
        how = GenerationConfig(max_new_tokens=64)
        with self._first.with_weights(params) as generator:
            if generator is None:
                return []
            if self._chat:
                texts = generator.batch_chat([[{"role": "user", "content": prompt}] for prompt in self._prompts], how)
            else:
                texts = generator.batch_generate(self._prompts, how)
        return list(zip(self._prompts, texts, strict=True))
