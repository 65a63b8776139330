"""How the best learning rate, the best batch and the loss change with a model's size, on CPU-sized models:
python -m benchmarks.transfer --input zh.jsonl.xz --work /tmp/transfer [--minutes 80]

Trains many small models with the project's own `train` and appends a line for each finished run to --results. The same command
continues: finished runs are not repeated, and an interrupted one goes on from its checkpoint. A sweep doubles and halves the
learning rate until both neighbours of the best one are known. benchmarks/transfer_fit.py fits the rules of docs/recipes.md to
the results and draws them.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax

from mateconv_jax import config as config_lib
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.errors import UserError
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.planning import rules
from mateconv_jax.training import loop

VOCAB_SIZE, SEQ_LEN = 2048, 128
N_LAYERS = 4  # of every size: only the width changes, as in the papers on transfer over width
M = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: what decides its loss.

    Attributes:
      dim: the model's width: 64, 128, 192, 256 and 448 have 0.3, 1.0, 2.1, 3.5 and 9.9 M parameters.
      rule: "one": one learning rate for all parameters; "matrices": the blocks' matrices have matrix_lr_ratio of it
        (see rules.py).
      tokens: trained on, of 18 M; none twice.
      batch_tokens: of a step.
      log2_lr: logarithm of the peak learning rate.
    """

    dim: int
    log2_lr: float
    tokens: int = M // 2
    batch_tokens: int = 2048
    rule: str = "one"
    seed: int = 1

    @property
    def learning_rate(self) -> float:
        return 2.0**self.log2_lr


def main(args):
    data = prepare(args.input, args.work)
    runs = Runs(data, args.work / "runs", args.results, time.monotonic() + 60 * args.minutes)
    with contextlib.suppress(TimeIsUp):
        campaign(runs)


def campaign(runs: "Runs") -> None:
    """All runs, those first that matter most."""
    best_1m = sweep(runs, Case(64, -7.0, M))
    best = {64: sweep(runs, Case(64, best_1m))}
    best[128] = sweep(runs, Case(128, best[64] - 1))
    for seed in (2, 3):
        runs.of(Case(64, best[64], seed=seed))
    runs.of(Case(64, best[64] - 3))
    best[192] = sweep(runs, Case(192, best[128]))
    runs.of(Case(128, best[128], M))
    for batch_tokens in (4096, 1024):
        sweep(runs, Case(64, best[64], batch_tokens=batch_tokens))
    best[256] = sweep(runs, Case(256, best[192]))
    best_matrices = {128: sweep(runs, Case(128, best[64], rule="matrices"))}
    best[448] = sweep(runs, Case(448, best[256] - 1))
    best_matrices[256] = sweep(runs, Case(256, best[64], rule="matrices"))
    best_matrices[448] = sweep(runs, Case(448, best[64] - 1, rule="matrices"))
    for rule, log2_lr in (("matrices", best_matrices[256]), ("one", best[256])):
        runs.of(Case(256, log2_lr, 2 * M, rule=rule))
    for dim in (128, 256):
        for batch_tokens in (1024, 4096):
            sweep(runs, Case(dim, best_matrices[dim], batch_tokens=batch_tokens, rule="matrices"))
    for dim, tokens in ((128, 2 * M), (448, M), (128, M)):
        runs.of(Case(dim, best_matrices[dim], tokens, rule="matrices"))
    for dim, tokens in ((64, 2 * M), (256, M), (128, 2 * M), (448, M), (64, 4 * M)):
        runs.of(Case(dim, best[dim], tokens))


def sweep(runs: "Runs", case: Case) -> float:
    """log2 of the best learning rate, a power of two, found from that of `case` on: both its neighbours were tried."""
    losses = {}

    def loss(log2_lr: float) -> float:
        if log2_lr not in losses:
            losses[log2_lr] = runs.of(dataclasses.replace(case, log2_lr=log2_lr))
        return losses[log2_lr]

    loss(case.log2_lr)
    while True:
        best = min(losses, key=losses.__getitem__)
        if best - 1 in losses and best + 1 in losses:
            return best
        loss(best - 1 if best - 1 not in losses else best + 1)


class TimeIsUp(Exception):
    """No further run begins."""


class Runs:
    """Runs and their results.

    Args:
      data: the dataset folder.
      folder: of the run folders; a finished run's is removed.
      results: a JSONL file, appended to.
      end: of time.monotonic, after which no run begins.
    """

    def __init__(self, data: Path, folder: Path, results: Path, end: float):
        self.data, self.folder, self.results, self.end = data, folder, results, end
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        fields = [field.name for field in dataclasses.fields(Case)]
        records = [json.loads(line) for line in lines]
        self.losses = {Case(**{name: record[name] for name in fields}): record["val_loss"] for record in records}

    def of(self, case: Case) -> float:
        """Validation loss in nats per token; inf: it diverged."""
        if case not in self.losses:
            if time.monotonic() > self.end:
                raise TimeIsUp
            record = dataclasses.asdict(case) | self.train(case)
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
            self.losses[case] = record["val_loss"]
        loss = self.losses[case]
        return math.inf if loss is None else loss

    def train(self, case: Case) -> dict:
        out_dir = self.folder / "-".join(str(value) for value in dataclasses.astuple(case))
        config = config_of(case, self.data, out_dir)
        c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32")
        shape = {"parameters": flops.parameters(c)[0], "embedding": c.vocab_size * c.dim, "steps": config.training.max_steps}
        start = time.monotonic()
        try:
            code = loop.train(config)
        except UserError as error:  # training.max_bad_steps
            print(error, file=sys.stderr)
            return shape | {"val_loss": None, "bits_per_byte": None}
        if code:
            raise KeyboardInterrupt
        metrics = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = next(line for line in reversed(metrics) if "val/loss" in line)
        shutil.rmtree(out_dir)
        jax.clear_caches()
        measured = {"val_loss": round(last["val/loss"], 5), "bits_per_byte": round(last["val/bits_per_byte"], 5)}
        return shape | measured | {"seconds": round(time.monotonic() - start, 1)}


def config_of(case: Case, data: Path, out_dir: Path):
    """As configs/base.py, except for the shape, what the case says, and one evaluation at the end, over all validation rows."""
    config = config_lib.default_config()
    config.model.update(
        dict(dim=case.dim, n_layers=N_LAYERS, n_heads=case.dim // 32, n_kv_heads=case.dim // 64),
        vocab_size=VOCAB_SIZE, max_seq_len=SEQ_LEN,
    )  # fmt: skip
    config.data.update(dict(train_data_path=str(data), seq_len=SEQ_LEN, num_workers=1))
    rows = case.batch_tokens // SEQ_LEN
    val_rows = open_dataset(data, "--work", SEQ_LEN).n_rows("validation")
    config.training.update(
        dict(
            out_dir=str(out_dir), seed=case.seed, batch_size=rows, max_steps=case.tokens // case.batch_tokens,
            learning_rate=case.learning_rate, min_lr=case.learning_rate / 10,
            matrix_lr_ratio=rules.matrix_lr_ratio(case.dim) if case.rule == "matrices" else 1.0,
            eval_interval="100%", save_interval="100%",
            save_minutes=3.0, eval_iters=-(-val_rows // rows), keep_best=False, keep_latest=1, log_interval="2%",
        )
    )  # fmt: skip
    return config_lib.resolve(config)


def prepare(text: Path, work: Path) -> Path:
    """The dataset of `text`; made only once."""
    data = work / "data"
    flags = f"--train_tokenizer --vocab_size {VOCAB_SIZE} --seq_len {SEQ_LEN} --val_fraction 0.005 --sample_mb 16"
    command = [sys.executable, "-m", "mateconv_jax.prepare", "--input", str(text), "--output", str(data), *flags.split()]
    subprocess.run(command, check=True)
    return data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="text, as `prepare` reads it")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for the dataset and unfinished runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/transfer.jsonl"), metavar="FILE")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    main(parser.parse_args())
