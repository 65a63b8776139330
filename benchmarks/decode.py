"""Decoding compared with transformers' generate and llama.cpp, same weights:  python -m benchmarks.decode [--repeat 5]

The base model with random weights, fp32 on the CPU (for llama.cpp also Q8_0). The implementations take turns: tokens/s are of
the best of --repeat turns, a ratio is the median of the turns' ratios. Prints tables and then one JSON line. Needs
requirements-dev.txt (PyTorch, xllamacpp).
"""

import argparse
import functools
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table

from mateconv_jax import config as config_lib
from mateconv_jax.data.tokenizer import bpe
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.decode import Decoder, DecodeState, bucket
from mateconv_jax.inference.sampling import Sampling
from mateconv_jax.interop import gguf_file
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.kv_cache import make_kv_cache
from mateconv_jax.model.transformer import Transformer
from tests import llama

PROMPT = 16


def main(args):
    config = config_lib.resolve(config_lib.default_config())
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32")
    model = Transformer(c, nnx.Rngs(0))
    graph, params = nnx.split(model)
    decoder = Decoder(graph, c, ())  # no token ends an answer
    peer = llama.from_ours(model)
    sampled = GenerationConfig(temperature=0.8, top_k=50, top_p=0.9)
    cases = [(B, name, how) for B in args.batch_sizes for name, how in (("sampled", sampled), ("greedy", GREEDY))]

    console, report = Console(), {"limit_tokens_per_s_at_batch_1": round(memory_limit(params), 1)}
    table = Table("batch", "", "tokens/s", "transformers", "ratio", "KV cache MB", title=f"{PROMPT} + {args.new_tokens} tokens")
    for B, name, how in cases:
        tokens_BS = np.random.default_rng(B).integers(3, c.vocab_size, (B, PROMPT), np.int32)
        (ours, theirs), (_, ratio) = race(
            functools.partial(generate, decoder, params, c, tokens_BS, how, args.new_tokens),
            functools.partial(generate_peer, peer, tokens_BS, how, args.new_tokens),
            repeat=args.repeat,
        )
        rates = [B * args.new_tokens / seconds for seconds in (ours, theirs)]
        T = bucket(PROMPT + args.new_tokens, c.max_seq_len, 64)
        megabytes = sum(x.nbytes for x in jax.tree.leaves(make_kv_cache(c, B, T))) / 1e6
        table.add_row(str(B), name, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{ratio:.2f}", f"{megabytes:.1f}")
        report[f"{name}_{B}"] = {"tokens_per_s": round(rates[0], 1), "ratio": round(ratio, 3)}
    console.print(table)

    comparison = Table("", "tokens/s", "ratio", title="greedy at batch 1, compared with llama.cpp")
    with tempfile.TemporaryDirectory() as folder:
        servers = llama_cpp_servers(Path(folder), config, params)
        tokens_1S = np.random.default_rng(1).integers(3, c.vocab_size, (1, PROMPT), np.int32)
        (ours, *theirs), (_, *ratios) = race(
            functools.partial(generate, decoder, params, c, tokens_1S, GREEDY, args.new_tokens),
            *(functools.partial(generate_llama_cpp, server, tokens_1S, args.new_tokens) for server in servers.values()),
            repeat=args.repeat,
        )
    comparison.add_row("ours, float32", f"{args.new_tokens / ours:,.0f}", "")
    for dtype, seconds, ratio in zip(servers, theirs, ratios, strict=True):
        rate = args.new_tokens / seconds
        comparison.add_row(f"llama.cpp, {dtype}", f"{rate:,.0f}", f"{ratio:.2f}")
        report[f"llama_cpp_{dtype}"] = {"tokens_per_s": round(rate, 1), "ratio": round(ratio, 3)}
    console.print(comparison)

    lengths = Table("tokens in the cache", "tokens/s at batch 1", title="by cache length")
    for n in args.lengths:
        report[f"at_{n}"] = round(rate_at(decoder, params, c, n, args.repeat), 1)
        lengths.add_row(str(n), f"{report[f'at_{n}']:,.0f}")
    console.print(lengths)

    report["first_token_ms"] = round(first_token(decoder, params, c, args.repeat) * 1e3, 1)
    report["share_of_memory_limit"] = round(
        report["greedy_1"]["tokens_per_s"] / report["limit_tokens_per_s_at_batch_1"], 3
    )  # fmt: skip
    console.print(
        f"first token of a {PROMPT}-token prompt: {report['first_token_ms']} ms; reading the weights once per token limits "
        f"batch 1 to {report['limit_tokens_per_s_at_batch_1']} tokens/s, of which greedy decoding reaches "
        f"{report['share_of_memory_limit']:.0%}"
    )
    print(json.dumps(report))


GREEDY = GenerationConfig(do_sample=False)


def race(*functions, repeat: int) -> tuple[list[float], list[float]]:
    """Each function's best time in seconds, and its time over the first's (the median of the turns), taking turns, after one
    warm-up turn that compiles."""
    times = []
    for _ in range(repeat + 1):
        turn = []
        for function in functions:
            start = time.perf_counter()
            function()
            turn.append(time.perf_counter() - start)
        times.append(turn)
    times = np.array(times[1:])
    return times.min(axis=0).tolist(), np.median(times / times[:, :1], axis=0).tolist()


def start(c, tokens_BS, room: int, new_tokens: int) -> DecodeState:
    B, S = tokens_BS.shape
    tokens_BT = np.zeros((B, room), np.int32)
    tokens_BT[:, :S] = tokens_BS
    length_B = jnp.full(B, S, jnp.int32)
    return DecodeState(
        tokens_BT=jnp.asarray(tokens_BT), length_B=length_B, prompt_length_B=length_B.copy(),
        remaining_B=jnp.full(B, new_tokens, jnp.int32), finished_B=jnp.zeros(B, bool), kv_cache=make_kv_cache(c, B, room),
    )  # fmt: skip


def generate(decoder, params, c, tokens_BS, config, new_tokens) -> None:
    sampling = Sampling.make(config, np.zeros(len(tokens_BS)), c.vocab_size)
    state = start(c, tokens_BS, bucket(PROMPT + 1, c.max_seq_len, 64), new_tokens)
    assert int(decoder.run(params, state, sampling, PROMPT).length_B.min()) == PROMPT + new_tokens


def generate_peer(peer, tokens_BS, config, new_tokens) -> None:
    options = dict(do_sample=True, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    with torch.inference_mode():
        out = peer.generate(
            torch.tensor(tokens_BS).long(), attention_mask=torch.ones(tokens_BS.shape, dtype=torch.long),
            max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0,
            **(options if config.do_sample else dict(do_sample=False)),
        )  # fmt: skip
    assert out.shape[1] == PROMPT + new_tokens


def llama_cpp_servers(folder: Path, config, params) -> dict:
    """{dtype: a llama.cpp server with our weights}; empty if xllamacpp is not installed."""
    try:
        import xllamacpp
    except ImportError:
        print("skipping llama.cpp (pip install xllamacpp)")
        return {}
    print(f"llama.cpp: {xllamacpp.get_system_info().strip(' |')}")
    tokenizer = bpe.train(["长江是中国最长的河流。"] * 5, 280)  # llama.cpp treats the remaining ids as unused
    servers = {}
    for dtype in ("float32", "q8_0"):
        path = folder / f"{dtype}.gguf"
        gguf_file.write_gguf(path, StoredModel(path, config, tokenizer, False, None, None), params, dtype)
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.verbosity = str(path), config.model.max_seq_len, -1
        options.cpuparams.n_threads = os.cpu_count()
        servers[dtype] = xllamacpp.Server(options)
    return servers


def generate_llama_cpp(server, tokens_1S, new_tokens) -> None:
    out = server.handle_completions(
        dict(prompt=tokens_1S[0].tolist(), max_tokens=new_tokens, temperature=0, ignore_eos=True, cache_prompt=False)
    )
    assert out["usage"]["prompt_tokens"] == PROMPT and out["usage"]["completion_tokens"] == new_tokens


def rate_at(decoder, params, c, n: int, repeat: int) -> float:
    """Tokens/s of 16 greedy steps after n tokens."""
    tokens_1S = np.random.default_rng(n).integers(3, c.vocab_size, (1, n), np.int32)
    sampling = Sampling.make(GREEDY, np.zeros(1), c.vocab_size)
    times = []
    for _ in range(repeat + 1):
        state = start(c, tokens_1S, bucket(n + 17, c.max_seq_len, 64), 17)
        logits_1V, state = decoder.prefill(params, state, 0, S=bucket(n, c.max_seq_len, 16))
        state = decoder.append(logits_1V, state, sampling)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        jax.block_until_ready(decoder.loop(params, state, sampling, 16))
        times.append(time.perf_counter() - begin)
    return 16 / min(times[1:])


def first_token(decoder, params, c, repeat: int) -> float:
    """Seconds from prompt ids on the host to the first token on the host, after compilation."""
    tokens_1S = np.arange(3, 3 + PROMPT, dtype=np.int32)[None]
    times = []
    for _ in range(4 * repeat + 1):
        begin = time.perf_counter()
        sampling = Sampling.make(GREEDY, np.zeros(1), c.vocab_size)
        logits_1V, state = decoder.prefill(params, start(c, tokens_1S, 64, 64), 0, S=PROMPT)
        jax.device_get(decoder.append(logits_1V, state, sampling).length_B)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def memory_limit(params) -> float:
    """Tokens/s if every weight is read once per token, at the speed this machine sums an array of the weights' size."""
    n_bytes = sum(p.nbytes for p in jax.tree.leaves(params))
    weights = torch.ones(n_bytes // 4)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        weights.sum()
        times.append(time.perf_counter() - begin)
    return 1 / min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 100, 200, 400, 490])
    main(parser.parse_args())
