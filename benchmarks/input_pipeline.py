"""Throughput of the input pipeline, without a model:  python -m benchmarks.input_pipeline [--data data/zh] [--seconds 10]

Reads batches of --batch_size rows of 512 tokens through the training pipeline, from --data or from random tokens in the shards
of a dataset folder, in a flat .bin file, and in two and five datasets that are mixed. Prints one JSON line per case. The exit
code is 1 if memory grew by 16 MB or more.

--pace 20e6 reads as a training of that many tokens a second would, and tells how long the loop waits for batches and for which
share of the time the device would have nothing to do. As in training, the loop holds the interpreter for 1 ms to dispatch a
step, and then sleeps until the step before is done.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mateconv_jax.data import loader, mixture, shards as rows_lib
from mateconv_jax.data.build import packing
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.token_bin import FlatRows

VOCAB_SIZE = 6400
WARM_UP = 500  # batches, until buffers and threads exist and every shard has been read from
MAX_GROWTH_MB = 16
HOST_SECONDS = 1e-3  # of each step in Python, beside the loader


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            cases = {args.data: open_dataset(args.data, "--data", args.seq_len).rows("train")}
        else:
            cases = random_rows(Path(folder), args.shards, args.seq_len)
        run = measure if args.pace is None else paced
        reports = [run(name, rows, n, args) for name, rows in cases.items() for n in (1, 4)]
    return int(any(report["rss_end_mb"] - report["rss_start_mb"] >= MAX_GROWTH_MB for report in reports))


def random_rows(folder: Path, n_shards: int, seq_len: int) -> dict:
    """Shards of 4,096 rows, and a flat file with the same tokens."""
    rng = np.random.default_rng(0)
    format = rows_lib.RowFormat(seq_len, VOCAB_SIZE)
    paths = [folder / f"{shard:05d}" for shard in range(n_shards)]
    with (folder / "tokens.bin").open("wb") as flat:
        for path in paths:
            stream = rng.integers(VOCAB_SIZE, size=4096 * seq_len + 1, dtype=np.uint16)
            starts = rng.random(len(stream)) < 1 / 200
            rows_lib.write_shard(path, packing.pack({"tokens": stream, "document_starts": starts}, seq_len), format)
            flat.write(stream.tobytes())
    return {
        "shards": rows_lib.ShardRows(paths, format),
        "shards, document_starts": rows_lib.ShardRows(paths, format, (1, 2)),
        "flat": FlatRows(folder / "tokens.bin", seq_len, "tokens.bin"),
        "flat, document_starts": FlatRows(folder / "tokens.bin", seq_len, "tokens.bin", (1, 2)),
        "mixture of 2 datasets": mixed(paths, format, [60_000, 40_000]),
        "mixture of 5 datasets": mixed(paths, format, [40_000, 30_000, 15_000, 10_000, 5_000]),
    }


def mixed(paths: list[Path], format: rows_lib.RowFormat, counts: list[int]) -> mixture.MixedRows:
    """The shards dealt out to datasets."""
    parts = [rows_lib.ShardRows(paths[number :: len(counts)], format) for number in range(len(counts))]
    return mixture.MixedRows([mixture.Part(f"{i}", *part, "") for i, part in enumerate(zip(parts, counts, strict=True))])


def measure(name: str, rows, num_workers: int, args) -> dict:
    """Throughput over --seconds. The best second shows what an otherwise idle machine would reach."""
    batches = warm_batches(rows, num_workers, args)
    rss_start, start, rates, cpu = rss_mb(), time.perf_counter(), [], time.process_time()
    while time.perf_counter() - start < args.seconds:
        n_batches, second = 0, time.perf_counter()
        while time.perf_counter() - second < 1:
            next(batches)
            n_batches += 1
        rates.append(n_batches * args.batch_size / (time.perf_counter() - second))
    report = {
        "data": name,
        "rows": len(rows),
        "num_workers": num_workers,
        "rows/s": round(np.mean(rates)),
        "tokens/s": round(np.mean(rates) * args.seq_len),
        "best_tokens/s": round(max(rates) * args.seq_len),
        "tokens/s per core": round(sum(rates) * args.seq_len / (time.process_time() - cpu)),
        "rss_start_mb": rss_start,
        "rss_end_mb": rss_mb(),
    }
    print(json.dumps(report), flush=True)
    return report


def warm_batches(rows, num_workers: int, args):
    row_numbers = None
    if isinstance(rows, mixture.MixedRows):
        order = mixture.Order(
            tuple(
                mixture.PartOrder(part.name, part.count, start, len(part.rows), salt=number)
                for number, (part, start) in enumerate(zip(rows.parts, rows.starts, strict=True), 1)
            )
        )
        row_numbers = order.rows_at
    batches = loader.training_batches(rows, args.batch_size, 0, True, 0, num_workers, row_numbers=row_numbers)
    for _ in range(max(2 * num_workers, WARM_UP * 32 // args.batch_size)):
        next(batches)
    return batches


def paced(name: str, rows, num_workers: int, args) -> dict:
    """What a training at --pace waits for."""
    batches, step = warm_batches(rows, num_workers, args), args.batch_size * args.seq_len / args.pace
    rss_start, begin, cpu, waits = rss_mb(), time.perf_counter(), time.process_time(), []
    idle, done = 0.0, begin  # done: when the device has done all that was dispatched
    while time.perf_counter() - begin < args.seconds:
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        dispatched = time.perf_counter() + HOST_SECONDS
        while time.perf_counter() < dispatched:
            pass
        idle, before, done = idle + max(0.0, dispatched - done), done, max(dispatched, done) + step
        time.sleep(max(0.0, before - time.perf_counter()))
    seconds, tokens = time.perf_counter() - begin, len(waits) * args.batch_size * args.seq_len
    report = {
        "data": name,
        "num_workers": num_workers,
        "pace": args.pace,
        "tokens/s": round(tokens / seconds),
        "device_idle": round(idle / seconds, 4),
        "step_ms": round(step * 1e3, 2),
        "mean_wait_ms": round(np.mean(waits) * 1e3, 3),
        "99th_wait_ms": round(np.quantile(waits, 0.99) * 1e3, 3),
        "longest_wait_ms": round(max(waits) * 1e3, 2),
        "cores": round((time.process_time() - cpu) / seconds - len(waits) * HOST_SECONDS / seconds, 2),
        "rss_start_mb": rss_start,
        "rss_end_mb": rss_mb(),
    }
    print(json.dumps(report), flush=True)
    return report


def rss_mb() -> float:
    """Resident memory of this process in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return round(int(status["VmRSS"].split()[0]) / 1000, 1)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a dataset folder or a .bin file")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a step, of all devices of a process (default: 32)")
    parser.add_argument("--pace", type=float, metavar="TOKENS", help="a training's tokens/s; without, as fast as possible")
    parser.add_argument("--shards", type=int, default=32, help="number of shards of random rows")
    parser.add_argument("--seconds", type=float, default=10, help="time per case")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args(sys.argv[1:])))
