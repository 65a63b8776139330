"""The server beside llama.cpp's and beside batch_generate, same weights in float32:  python -m benchmarks.serve [--repeat 3]

The base model with random weights and its answers of --new_tokens each, sampled with temperature 0.8, top-k 50 and top-p 0.9,
streamed to asyncio clients that ask one request after the other. The implementations take turns; ratios are medians over
turns. Prints tables and then one JSON line. Needs requirements-dev.txt (xllamacpp).
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from mateconv_jax import config as config_lib
from mateconv_jax.data.tokenizer import bpe
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.interop import gguf_file, hugging_face
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer

SLOTS = 16


def main(args):
    config = config_lib.resolve(config_lib.default_config())
    model = Transformer(ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32"), nnx.Rngs(0))
    params = nnx.split(model)[1]
    # Nearly every token is a character: one without a text of its own would reach no client.
    tokenizer = bpe.train([chr(0x4E00 + i) for i in range(6100)] * 2, 6400)
    console, report = Console(), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stored = StoredModel(Path(folder), config, tokenizer, False, None, None)
        (hf := Path(folder) / "base").mkdir()
        hugging_face.write_folder(hf, stored, params)
        urls = {"ours": stack.enter_context(our_server(hf, report))}
        if not args.without_llama_cpp:
            urls["llama.cpp"] = llama_cpp_server(Path(folder), stored, params)
        alone = TextGenerator(model, tokenizer)
        columns = ("tokens/s", "first token ms", "between tokens", "between pieces")
        table = Table("prompt", "clients", "", *columns, title="served (ms: p50, p95)")
        for n_prompt in args.prompts:
            for n_clients in args.clients:
                turns = []
                for turn in range(args.repeat + 1):  # the first warms up
                    rng = np.random.default_rng(1000 * n_prompt + turn)
                    turns.append(one_turn(rng, urls, alone, n_prompt, n_clients, args))
                report[f"{n_prompt}_{n_clients}"] = entry = summary(turns[1:])
                for name, figures in entry.items():
                    if name != "ratios":
                        cells = [", ".join(f"{one:.0f}" for one in np.atleast_1d(figure)) for figure in figures.values()]
                        table.add_row(str(n_prompt), str(n_clients), name, *cells)
                console.print(f"{n_prompt} tokens, {n_clients} clients: {entry['ratios']}")
        console.print(table)
    print(json.dumps(report))


def one_turn(rng, urls: dict[str, str], alone: TextGenerator, n_prompt: int, n_clients: int, args) -> dict:
    """{name: figures of one measurement}, one after the other."""
    n_requests = max(2, args.waves * n_clients)
    prompts = rng.integers(300, 6000, (n_requests, n_prompt)).tolist()
    turn = {name: asyncio.run(load(url, name, prompts, n_clients, args.new_tokens)) for name, url in urls.items()}
    options = GenerationConfig(max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens)
    begin = time.perf_counter()
    if n_clients == 1:
        for prompt in prompts:
            list(alone._stream_ids(prompt, options))
    else:
        alone._decode_batches(prompts, options, min(n_clients, SLOTS))
    seconds = time.perf_counter() - begin
    turn["stream" if n_clients == 1 else "batch"] = {"tokens_per_s": n_requests * args.new_tokens / seconds}
    return turn


async def load(url: str, name: str, prompts: list[list[int]], n_clients: int, new_tokens: int) -> dict:
    """n_clients clients that share the prompts. tokens/s in all; ms to first tokens, between tokens and between pieces."""
    first, between, gaps, waiting = [], [], [], list(prompts)
    common = dict(max_tokens=new_tokens, stream=True, temperature=0.8, top_k=50, top_p=0.9)
    own = {"ours": dict(model="base", min_tokens=new_tokens), "llama.cpp": dict(ignore_eos=True, cache_prompt=False)}[name]

    async def client(http):
        while waiting:
            prompt, times, begin = waiting.pop(), [], time.perf_counter()
            try:
                body = dict(prompt=prompt, seed=len(waiting), **common, **own)
                async with http.post("/v1/completions", json=body) as reply:
                    async for line in reply.content:
                        if line.startswith(b"data: {"):
                            times.append(time.perf_counter())
                    assert reply.status == 200, reply.status
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):  # llama.cpp's does now and then
                if name == "ours":
                    raise
                waiting.append(prompt)
                continue
            first.append(times[0] - begin)
            between.append((times[-1] - times[0]) / (new_tokens - 1))
            gaps.extend(np.diff(times))

    # Its parser is written in C: httpx takes 5 ms of CPU a request, aiohttp 1, of the cores that the servers compute on.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(600), connector=connector) as http:
        begin = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(n_clients)))
        seconds = time.perf_counter() - begin
    return {
        "tokens_per_s": len(prompts) * new_tokens / seconds,
        "first_ms": np.percentile(first, (50, 95)) * 1e3,
        "between_ms": np.percentile(between, (50, 95)) * 1e3,
        "gap_ms": np.percentile(gaps, (50, 95)) * 1e3,
    }


def summary(turns: list[dict]) -> dict:
    """Medians over turns, and of the ratios of ours to each other's tokens/s within a turn."""
    entry = {
        name: {key: np.median([turn[name][key] for turn in turns], axis=0).round(1).tolist() for key in turns[0][name]}
        for name in turns[0]
    }
    ours = np.array([turn["ours"]["tokens_per_s"] for turn in turns])
    entry["ratios"] = {
        name: round(float(np.median(ours / [turn[name]["tokens_per_s"] for turn in turns])), 3)
        for name in turns[0]
        if name != "ours"
    }
    return entry


@contextlib.contextmanager
def our_server(model: Path, report: dict):
    """The URL of `serve` in a process of its own, once it is ready."""
    command = [sys.executable, "-m", "mateconv_jax.serve", f"--model_path={model}", "--port=0", f"--max_batch={SLOTS}"]
    with (model.parent / "serve.log").open("w+b") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while not (found := re.search(r"ready: (\d+) programs compiled in ([\d.]+) s", text := read(log.name))):
                if process.poll() is not None:
                    raise SystemExit(text)
                time.sleep(0.2)
            report |= {"programs": int(found[1]), "compile_s": float(found[2])}
            yield re.search(r"http://\S+", text)[0]
        finally:
            process.terminate()
            process.wait()


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def llama_cpp_server(folder: Path, stored: StoredModel, params) -> str:
    """The URL of llama.cpp's server in this process, with as many slots and threads."""
    import xllamacpp

    gguf_file.write_gguf(folder / "base.gguf", stored, params, "float32")
    options = xllamacpp.CommonParams()
    options.model.path, options.verbosity = str(folder / "base.gguf"), -1
    options.n_parallel, options.n_ctx = SLOTS, SLOTS * stored.config.model.max_seq_len
    options.cpuparams.n_threads = os.cpu_count()
    options.port = 0
    global _server  # ends with the process
    _server = xllamacpp.Server(options)
    return _server.listening_address


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests of each client in a turn")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 200])
    # Its threads spin while they wait for each other: on a machine where others compute it takes seconds a token.
    parser.add_argument("--without_llama_cpp", action="store_true")
    main(parser.parse_args())
