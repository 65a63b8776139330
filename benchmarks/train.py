"""The training step compared with PyTorch's, same weights and batch:  python -m benchmarks.train [--repeat 3]

Ours is what `train` runs: make_train_step with the configured optimizer, in float32 on the CPU. PyTorch's is transformers'
LlamaForCausalLM with clip_grad_norm_ and fused AdamW, eager and with torch.compile. Each runs in its own process; they take
turns, and the best step of --repeat turns counts, in wall-clock and in CPU seconds. On a shared machine, only the ratios are
meaningful. Prints a table with a row per combination of sizes, and then one JSON line. Needs requirements-dev.txt (PyTorch).
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table

from mateconv_jax import config as config_lib
from mateconv_jax.data import loader
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer
from mateconv_jax.runtime import sharding
from mateconv_jax.training import optimizer, setup
from tests import llama

WEIGHTS_SEED = 1


def main(args):
    table = Table("batch", "length", "", "tokens/s", "seconds", "CPU s", "GFLOP/s", "ours / theirs")
    peak = product_rate()
    report = {"product_gflops": round(peak / 1e9, 1), "cases": []}
    for B, S in itertools.product(args.batch_sizes, args.seq_lens):
        case = measure(base_config(max_seq_len=S), B, args.peers, args.repeat)
        report["cases"].append(case)
        for name in case["seconds"]:
            (ours, ours_processor), (seconds, processor_seconds) = (
                [case[key][which] for key in ("seconds", "processor_s")] for which in ("ours", name)
            )
            table.add_row(
                str(B), str(S), name, f"{B * S / seconds:,.0f}", f"{seconds:.2f}", f"{processor_seconds:.2f}",
                f"{case['flops'] / seconds / 1e9:.0f}",
                "" if name == "ours" else f"{seconds / ours:.2f} ({processor_seconds / ours_processor:.2f})",
            )  # fmt: skip
    console = Console()
    console.print(table)
    share_of_limit = case["flops"] / peak / case["seconds"]["ours"]
    console.print(
        f"ours / theirs: ratio of tokens/s (in brackets, by CPU seconds). A matmul of 4,096 x 512 by 512 x 2,816 runs at "
        f"{report['product_gflops']} GFLOP/s; at that speed the last step would take {share_of_limit:.0%} of its time."
    )
    print(json.dumps(report))


def base_config(**model):
    """The default config with these keys of config.model; rows have max_seq_len tokens."""
    config = config_lib.default_config()
    config.model.update(model)
    config.data.seq_len = config.model.max_seq_len
    return config_lib.resolve(config)


def measure(config, batch_size: int, peers: list[str], repeat: int) -> dict:
    """Time a step of ours and of each peer ("eager", "compile"): best wall-clock and CPU seconds, by name."""
    c, S = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32"), config.data.seq_len
    tokens_BS1 = np.random.default_rng(0).integers(3, c.vocab_size, (batch_size, S + 1), np.uint16)
    batch = {"tokens": tokens_BS1, "length": np.full(batch_size, S + 1, np.int32)}
    names = ["ours", *(f"PyTorch, {peer}" for peer in peers)]
    sides = {name: Side(name, config, batch) for name in names}
    times, losses = race({name: functools.partial(side.step, batch) for name, side in sides.items()}, repeat)
    for side in sides.values():
        side.process.kill()
    return {
        "batch_size": batch_size,
        "seq_len": S,
        "n_layers": c.n_layers,
        "flops": flops.training_flops_per_token(c, S) * batch_size * S,
        "seconds": {name: round(seconds, 4) for name, (seconds, _) in times.items()},
        "processor_s": {name: round(seconds, 4) for name, (_, seconds) in times.items()},
        "loss_difference": max(abs(losses["ours"] - loss) for loss in losses.values()),
    }


class Side:
    """Ours, "PyTorch, eager" or "PyTorch, compile", in its own process so that they share neither threads nor malloc."""

    def __init__(self, name: str, config, batch: dict[str, np.ndarray], total_steps: int = 1000):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, config, batch, total_steps), daemon=True)
        self.process.start()
        theirs.close()
        self._pipe.recv()  # ready

    def step(self, batch: dict[str, np.ndarray]) -> tuple[float, float, float]:
        """(wall-clock seconds, CPU seconds, loss before the step)."""
        self._pipe.send(batch)
        return self._pipe.recv()


def _serve(pipe, name: str, config, batch, total_steps: int) -> None:
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32")
    if name == "ours":
        step = our_step(config, c, batch, total_steps)
    else:
        step = their_step(config, c, name == "PyTorch, compile", total_steps)
    pipe.send("ready")
    while True:
        batch = pipe.recv()
        start, processor_start = time.perf_counter(), time.process_time()
        loss = step(batch)
        pipe.send((time.perf_counter() - start, time.process_time() - processor_start, loss))


def our_step(config, c: ModelConfig, batch: dict[str, np.ndarray], total_steps: int):
    """A function that takes a batch of this shape, tokens (B, S + 1) and length (B,), performs one step and returns the loss
    before it.
    """
    config.training.update(dict(seed=WEIGHTS_SEED, batch_size=len(batch["length"]), accumulation_steps=1))
    run = setup.build(config, c, sharding.make_mesh(), total_steps)
    state = run.fresh_state()
    compiled = run.train_step.lower(state, run.abstract_batch).compile()

    def step(batch) -> float:
        nonlocal state
        state, metrics = compiled(state, sharding.to_devices(loader.micro_batches(batch, 1), run.mesh, rows_axis=1))
        jax.block_until_ready(state)
        return float(metrics["train/loss"])

    return step


def their_step(config, c: ModelConfig, compile: bool, total_steps: int):
    """`our_step` for PyTorch's model with the same weights."""
    training = config.training
    model = llama.from_ours(Transformer(c, nnx.Rngs(WEIGHTS_SEED))).train()
    model.config.use_cache = False
    schedule = optimizer.make_schedule(config_lib.options(optimizer.ScheduleOptions, training), total_steps)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(training.beta1, training.beta2), fused=True)
    run = torch.compile(model) if compile else model
    done = 0

    def step(batch) -> float:
        nonlocal done
        for group in adamw.param_groups:
            group["lr"] = float(schedule(done))
        tokens_BS1 = torch.tensor(batch["tokens"].astype(np.int64))
        is_real_BS = torch.arange(tokens_BS1.shape[1] - 1) < torch.tensor(batch["length"])[:, None] - 1
        targets_BS = tokens_BS1[:, 1:].masked_fill(~is_real_BS, -100)
        loss = run(input_ids=tokens_BS1[:, :-1], labels=targets_BS, shift_labels=targets_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        done += 1
        return loss.item()

    return step


def race(steps, repeat: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Best (wall-clock, processor) seconds of each, and each one's last loss. They take turns of three steps, of which the
    first does not count: it compiles, and finds its memory again (8 x 512, one step a turn: ours 6.4 s, by itself 3.9).
    """
    times, losses = {name: [] for name in steps}, {}
    for _ in range(repeat):
        for name, step in steps.items():
            for i in range(3):
                *seconds, losses[name] = step()
                if i > 0:
                    times[name].append(seconds)
    return {name: np.min(turns, axis=0).tolist() for name, turns in times.items()}, losses


def product_rate() -> float:
    """FLOP/s of one large matrix product."""
    x, w = jnp.ones((4096, 512)), jnp.ones((512, 2816))
    product = jax.jit(lambda x, w: x @ w)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        product(x, w).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * x.size * w.shape[1] / min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--seq_lens", type=int, nargs="+", default=[512])
    parser.add_argument("--peers", nargs="*", choices=("eager", "compile"), default=["eager", "compile"])
    main(parser.parse_args())
