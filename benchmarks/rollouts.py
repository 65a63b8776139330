"""Rollouts of training compared with batch_generate, same answers:  python -m benchmarks.rollouts [--repeat 5]

The base model with random weights: --prompts prompts of 16 tokens with --samples answers each. A rollout begins with the
training's fp32 parameters and ends with texts. The two take turns, and the best of --repeat turns counts. Ends with one JSON
line.
"""

import argparse
import json
import time

import numpy as np
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.data.tokenizer import bpe
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer
from mateconv_jax.runtime import sharding
from mateconv_jax.training.rollouts import DecodingWeights, Rollouts


def main(args):
    config = config_lib.default_config()
    config.model.update(dict(dim=args.dim, n_layers=args.n_layers, n_heads=8, n_kv_heads=8))
    config = config_lib.resolve(config)
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), args.dtype)
    model = Transformer(c, nnx.Rngs(0))
    tokenizer = bpe.train(["今天天气很好。" * 8], 300)
    how = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.new_tokens)
    prompts = np.random.default_rng(0).integers(3, 250, (args.prompts, 16)).tolist()
    generator, mesh = TextGenerator(model, tokenizer), sharding.make_mesh()
    graph, params = nnx.split(model)
    cast, rollouts = DecodingWeights(c, mesh), Rollouts(graph, c, mesh, tokenizer, how, 16, args.samples)
    generator.params = cast(params)

    def roll_out():
        return rollouts(cast(params), prompts, 0, 0, lambda: False)

    def generate():  # what batch_generate does once its prompts are tokens
        repeated = [ids for ids in prompts for _ in range(args.samples)]
        return generator._decode_batches(repeated, how, len(repeated))

    rates = {}
    for name, answer in [("rollouts", roll_out), ("batch_generate", generate)] * (1 + args.repeat):
        begin = time.perf_counter()
        n_tokens = sum(len(text.token_ids) for text in answer())
        rates[name] = max(rates.get(name, 0), n_tokens / (time.perf_counter() - begin))
    rates["ratio"] = rates["rollouts"] / rates["batch_generate"]
    print(json.dumps({name: round(rate, 3) for name, rate in rates.items()}))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 8), ("samples", 8), ("new_tokens", 100), ("repeat", 5), ("dim", 512), ("n_layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
