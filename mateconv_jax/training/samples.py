"""What the model writes while it is trained."""

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from mateconv_jax.inference.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.runtime import distributed, sharding


class Samples:
    """Continues the same prompts with the same draws at every call: what differs is the model."""

    def __init__(
        self, graph: nnx.GraphDef, params: nnx.State, tokenizer: PreTrainedTokenizerFast, prompts: tuple[str, ...], mesh: Mesh
    ):
        """params: shapes are enough. Raises UserError where a prompt does not fit the context."""
        self._prompts = list(prompts)
        # One device of the first process decodes; where parameters are split over devices, all have to take part in this.
        self._gather = jax.jit(lambda params: params, out_shardings=sharding.replicated(mesh))
        self._generator = TextGenerator(nnx.merge(graph, params), tokenizer)
        for prompt in prompts:
            self._generator.check_prompt(prompt, "training.sample_prompts")

    def write(self, params: nnx.State) -> list[tuple[str, str]]:
        """Each prompt and how it goes on; every process has to call it, and only the first gets them."""
        whole = self._gather(params)
        if not distributed.is_first():
            return []
        self._generator.params = jax.tree.map(lambda p: p.addressable_data(0), whole)
        texts = self._generator.batch_generate(self._prompts, GenerationConfig(max_new_tokens=64))
        self._generator.params = nnx.State({})  # a second copy of the weights, which training needs the room of
        return list(zip(self._prompts, texts, strict=True))
