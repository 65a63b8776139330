"""Decoding compared with transformers on the same card:  python -m benchmarks.gpu.decoding --out DIR --data DATASET

The base model with random weights in bfloat16, sampling with temperature, top-k and top-p. transformers' generate runs with its
defaults, and with a static cache and torch.compile, each in its own process.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from benchmarks.decode import generate
from benchmarks.gpu import sizes, timing
from benchmarks.gpu.peer import Peer
from benchmarks.gpu.report import Report
from mateconv_jax import config as config_lib
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.decode import Decoder
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer
from mateconv_jax.runtime import compilation_cache

PROMPT = 16  # benchmarks.decode's
SAMPLED = GenerationConfig(temperature=0.8, top_k=50, top_p=0.9)
GREEDY = GenerationConfig(do_sample=False)


def main(args) -> None:
    compilation_cache.enable()
    report = Report(args.out, "decoding")
    batches, new = ((1, 4), 16) if args.dry_run else ((1, 16, 64, 256), 240)
    config = sizes.BASE.config(args.dry_run)
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "auto")
    case = {"model": config.model.to_dict(), "prompt": PROMPT, "new": new}
    peers = {"eager": [peer(case, batches, False)]}
    # One process per batch size, so that they compile concurrently.
    peers["static cache, compiled"] = [peer(case, (B,), True) for B in batches]
    try:
        graph, params = nnx.split(Transformer(c, nnx.Rngs(0)))
        params = jax.tree.map(lambda p: p.astype(c.dtype), params)
        decoder = Decoder(graph, c, ())  # no token ends an answer
        runs = {}
        for B in batches:
            tokens_BS = np.random.default_rng(B).integers(3, 256, (B, PROMPT), np.int32)
            for name, how in (("sampled", SAMPLED), ("greedy", GREEDY))[: 2 if B == 1 else 1]:
                runs[B, name] = lambda tokens_BS=tokens_BS, how=how: generate(decoder, params, c, tokens_BS, how, new)
        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(lambda run: run(), runs.values()))  # compiles
        all_ready = [p.ready() for name in peers for p in peers[name]]
        if args.compile_only:
            return
        report.row("transformers' processes", f"{sum(all_ready)} of {len(all_ready)} ready")
        ours = {key: timing.per_call(run, lambda: None, calls=1, seconds=0.5) for key, run in runs.items()}
        theirs = {name: measured(peers[name]) for name in peers}
        bandwidth = timing.memory_bandwidth(args.dry_run)
        weights = sum(p.nbytes for p in jax.tree.leaves(params))
        for (B, name), seconds in ours.items():
            cache = 2 * c.n_layers * B * c.n_kv_heads * c.head_dim * (PROMPT + new) * c.dtype.itemsize
            least = (weights + cache * (PROMPT + new / 2) / (PROMPT + new)) / bandwidth
            beside = [
                f"{peer_name} {B * new / t[B]:,.0f} ({t[B] / seconds:.2f} times as fast)"
                for peer_name, t in theirs.items()
                if B in t and name == "sampled"
            ]
            beside.append(f"limit by reading weights and cache {B / least:,.0f} ({1e6 * least:.0f} us)")
            report.row(
                f"batch {B}, {name}, {PROMPT} + {new} tokens",
                f"{B * new / seconds:,.0f} tokens/s, {1e6 * seconds / new:.0f} us/step",
                "; ".join(beside),
                tokens_per_s=B * new / seconds,
                seconds=seconds / new,
                config={key: value for key, value in sizes.BASE.changes(args.dry_run).items() if key.startswith("model.")},
                dtype=c.dtype.name,
                decoding={"rows": B, "cache": PROMPT + new, "do_sample": name == "sampled"},
                peers={peer_name: B * new / t[B] for peer_name, t in theirs.items() if B in t},
            )
        report.row("memory bandwidth of a large copy", f"{bandwidth / 1e12:.2f} TB/s")
    finally:
        for p in (p for name in peers for p in peers[name]):
            p.stop()


def peer(case: dict, batches, static: bool) -> Peer:
    return Peer("benchmarks.gpu.torch_decoding", "--case", json.dumps(case | {"batches": batches, "static": static}))


def measured(peers: list[Peer]) -> dict[int, float]:
    """{batch: seconds}"""
    results = [p.measure() or {} for p in peers]
    return {int(B): seconds for result in results for B, seconds in result.items()}


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
