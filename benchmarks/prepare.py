"""`prepare`, end to end, compared with the bare tokenizer and with datasets.map on the same texts and cores.

python -m benchmarks.prepare --input raw.jsonl --tokenizer DIR [--repeat 3] [--times 1]

They take turns, --repeat times, and the fastest time counts. bare: tokenizers.Tokenizer.encode_batch on texts already in
memory.
datasets: load_dataset("json") and map(batched, num_proc = cores) with the same tokenizer, and nothing else. prepare: the whole
command, with start-up, cleaning, deduplication, statistics and writing. Memory is the peak over all its processes together
(proportional set size). --times N repeats the input N times, to see what grows with it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT_DATASETS = """
import os, sys, datasets
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
data = data.map(lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}, batched=True,
                num_proc=os.cpu_count(), remove_columns=data.column_names)
"""


def bare(path: Path, tokenizer_folder: str) -> tuple[float, float]:
    """(seconds, MB of UTF-8 text)."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(f"{tokenizer_folder}/tokenizer.json")
    texts = [json.loads(line)["text"] for line in path.open("rb")]
    start = time.perf_counter()
    for i in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=False):
            encoding.ids  # noqa: B018  (computed on access)
    return time.perf_counter() - start, sum(len(text.encode()) for text in texts) / 1e6


def run(arguments: list[str]) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a command and its child processes."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, _memory_mb(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    return time.perf_counter() - start, peak


def _memory_mb(session: int) -> float:
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) == session:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue  # the process has ended
    return total / 1e3


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.input)
        if args.times > 1:
            path = Path(folder) / "repeated.jsonl"
            with path.open("wb") as file:
                for _ in range(args.times):
                    file.write(Path(args.input).read_bytes())
        seconds: dict[str, list[float]] = {"bare": [], "prepare": [], "datasets": []}
        for i in range(args.repeat):
            if not args.only_prepare:
                bare_seconds, megabytes = bare(path, args.tokenizer)
                seconds["bare"].append(bare_seconds)
            prepare = [sys.executable, "-m", "mateconv_jax.prepare", "--input", str(path), "--output", f"{folder}/{i}"]
            prepare_seconds, memory = run([*prepare, "--tokenizer", args.tokenizer, *args.flags.split()])
            seconds["prepare"].append(prepare_seconds)
            if args.datasets:
                command = [sys.executable, "-c", SCRIPT_DATASETS, str(path), args.tokenizer, f"{folder}/cache{i}"]
                seconds["datasets"].append(run(command)[0])
        best = {name: min(values) for name, values in seconds.items() if values}
        result = {"seconds": {name: round(value, 1) for name, value in best.items()}, "prepare peak MB": round(memory)}
        if "bare" in best:
            result["MB/s"] = {name: round(megabytes / value, 2) for name, value in best.items()}
            result["prepare / bare"] = round(best["bare"] / best["prepare"], 2)
        print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help='JSONL with the key "text"')
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--datasets", action="store_true", help="also measure datasets.map (pip install datasets)")
    parser.add_argument("--only_prepare", action="store_true")
    parser.add_argument("--flags", default="", help="further flags for prepare, in one string")
    main(parser.parse_args())
