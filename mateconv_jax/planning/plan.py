"""What a run will need and how fast it can be at best, from its compiled programs."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.errors import UserError
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.device import Device
from mateconv_jax.planning import programs, target
from mateconv_jax.planning.hlo_report import Collective
from mateconv_jax.planning.programs import Program
from mateconv_jax.planning.roofline import roofline
from mateconv_jax.training import setup

DECODE_BATCHES = (1, 16)
ASSUMED_STEPS = 10_000  # of the schedule, where it is not known how long the run is: it changes no shape

UNKNOWN = (
    "Which kernel a matrix product gets, and so how far below the bound it stays: XLA tries them out on the GPU itself.",
    "What cuDNN, NCCL and the CUDA context take of the memory beside XLA's plan: often 1 to 2 GB.",
    "How fast the network between hosts is, what else uses it, and whether the input keeps up.",
)


@dataclasses.dataclass(frozen=True)
class Where:
    """gpu: None where we have no figures of the device. memory: bytes of a device that jax may use."""

    name: str
    gpu: target.Gpu | None
    devices: list[jax.Device]
    hosts: int
    memory: int
    is_here: bool

    @staticmethod
    def named(name: str, count: int, hosts: int) -> "Where":
        """GPUs of that name, imaginary ones.

        Raises:
          UserError: see target.by_name and target.devices.
        """
        gpu = target.by_name(name)
        # What jax takes at its start; a program that needs more ends out of memory.
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
        return Where(gpu.device_kind, gpu, target.devices(gpu, count, hosts), hosts, int(share * gpu.memory), False)

    @staticmethod
    def here() -> "Where":
        """This process's devices."""
        devices = jax.devices()
        stats = devices[0].memory_stats()
        memory = stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kind = devices[0].device_kind
        return Where(kind, target.by_device_kind(kind), devices, jax.process_count(), memory, True)


def make_plan(
    config: ConfigDict, where: Where, dollars_per_gpu_hour: float | None = None, search: bool = True, say=lambda text: None
) -> dict:
    """Everything that `python -m mateconv_jax.plan` says, for JSON: bytes, seconds, FLOPs.

    Args:
      config: resolved.
      search: also look for the largest batch and plan decoding, about eight more compilations.
      say: told what is being done.

    Raises:
      UserError: the config does not fit the devices, or cuDNN refuses the attention.
    """
    device = Device.here() if where.is_here or where.gpu is None else where.gpu.device
    c = setup.model_config(config, device)
    steps, length = run_length(config)
    training_steps = steps or ASSUMED_STEPS

    def compile_step(config: ConfigDict) -> Program:
        say(f"compiling the training step, {config.training.batch_size} rows, remat {config.training.remat}")
        training_step = programs.training_step(config, c, where.devices, training_steps)
        return _cudnn_errors(c, functools.partial(programs.compile_step, training_step))

    if where.gpu is not None and not where.is_here:
        with target.compiling_for(where.gpu):
            return _plan(config, c, where, compile_step, steps, length, dollars_per_gpu_hour, search, say)
    return _plan(config, c, where, compile_step, steps, length, dollars_per_gpu_hour, search, say)


def _plan(config, c, where, compile_step, steps, length, dollars_per_gpu_hour, search, say) -> dict:
    count = len(where.devices)
    n_params = sum(p.size for p in jax.tree.leaves(programs.abstract_model(c)[1]))
    tokens_per_step = config.training.batch_size * config.training.accumulation_steps * config.data.seq_len
    flops_per_token = flops.training_flops_per_token(c, config.data.seq_len)

    begin = time.perf_counter()
    step = compile_step(config)
    plan: dict[str, Any] = {
        "device": where.name,
        "devices": count,
        "hosts": where.hosts,
        "jax": jax.__version__,
        "parameters": n_params,
        "dtype": c.dtype.name,
        "attention": c.attention,
        "passed_over": c.passed_over,
        "rows_per_device": config.training.batch_size // count,
        "tokens_per_step": tokens_per_step,
        "compile_seconds": round(time.perf_counter() - begin, 1),
        "training": _program(step, where) | {"flops_of_model": flops_per_token * tokens_per_step / count},
    }
    training = plan["training"]
    training["flops_ratio"] = training["flops"] / training["flops_of_model"]
    if where.gpu:
        training |= _speed(training["roofline"]["seconds"], tokens_per_step, flops_per_token, c, where)
    if where.is_here:
        say("measuring the training step")
        training_step = programs.training_step(config, c, where.devices, steps or ASSUMED_STEPS)
        seconds = programs.measure(training_step, step.compiled)
        plan["measured"] = {"seconds": seconds} | _speed(seconds, tokens_per_step, flops_per_token, c, where)
    if search:
        rows = plan["rows_per_device"]
        plan["largest_rows_per_device"] = {}
        for remat in ("none", "full"):
            peaks = {rows: step.peak} if config.training.remat == remat else {}

            def peak(rows: int, remat=remat) -> int:
                larger = ConfigDict(config)
                larger.training.update(dict(batch_size=rows * count, remat=remat))
                return compile_step(larger).peak

            plan["largest_rows_per_device"][remat] = largest_batch(peak, where.memory, peaks, rows)
        plan["decoding"] = []
        for batch in DECODE_BATCHES:
            say(f"compiling prefill and decoding, {batch} rows")
            prefill = programs.prefill(c, where.devices[0], batch)
            loop = programs.decode_loop(c, where.devices[0], batch)
            plan["decoding"].append({"rows": batch, "prefill": _program(prefill, where), "step": _program(loop, where)})
    plan["run"] = {"steps": steps, "length_from": length, "tokens": steps and steps * tokens_per_step}
    best = plan.get("measured", training).get("tokens_per_second")
    if steps and best:
        hours = plan["run"]["tokens"] / best / 3600
        plan["run"] |= {"hours": hours, "gpu_hours": hours * count}
        if dollars_per_gpu_hour is not None:
            plan["run"]["dollars"] = hours * count * dollars_per_gpu_hour
    plan["unknown"] = [] if where.is_here else list(UNKNOWN)
    if where.gpu is None:
        plan["unknown"].append(f"What a {where.name} can do at most: we have no figures of it.")
    return plan


def _cudnn_errors(c: ModelConfig, compile: Callable[[], Program]) -> Program:
    try:
        return compile()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        if c.attention == "cudnn" and "fused_attention" in _files_of(error):
            raise UserError(
                f"model.attention: cuDNN refuses these shapes ({' '.join(str(error).split())[:200]}; expected an even "
                "data.seq_len and a model.head_dim divisible by 8, or --config.model.attention=xla)"
            ) from error
        raise


def _files_of(error: Exception) -> str:
    names, traceback = [], error.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return " ".join(names)


def _program(program: Program, where: Where) -> dict:
    report = program.report
    known = sum(program.arguments.values())
    result: dict[str, Any] = {
        "memory": {
            "peak": program.peak,
            "available": where.memory,
            "fits": program.peak <= where.memory,
            "parts": program.arguments | {"temporaries": program.peak - known},
            "donated": program.donated,
        },
        "flops": report.flops(),
        "fused_attention": {
            way: round(sum(a.times for a in report.attention if a.direction == way)) for way in ("forward", "backward")
        },
        "products": {
            dtypes: {"count": n, "flops": flops_of_class} for dtypes, (n, flops_of_class) in report.products_by_dtype().items()
        },
        "collectives": [_exchange(collective) for collective in report.collectives],
        "launches": report.launches(),
        "launches_by_kind": report.launches_by_kind(),
    }
    if where.gpu:
        bounds = roofline(report, where.gpu, len(where.devices), where.hosts)
        result["roofline"] = dataclasses.asdict(bounds) | {"seconds": bounds.seconds, "bound": bounds.bound}
    return result


def _exchange(collective: Collective) -> dict:
    return {
        "what": collective.opcode,
        "dtype": "+".join(collective.dtypes),
        "bytes": collective.bytes,
        "times": collective.times,
        "devices": collective.devices,
        "asynchronous": collective.is_async,
        "kernels_beside": len(collective.beside),
    }


def _speed(seconds: float, tokens: int, flops_per_token: float, c: ModelConfig, where: Where) -> dict:
    speed = {"tokens_per_second": tokens / seconds}
    if peak := flops.peak_flops(where.name, c.dtype):
        speed["mfu"] = tokens * flops_per_token / seconds / (peak * len(where.devices))
    return speed


def largest_batch(peak: Callable[[int], int], memory: int, known: dict[int, int], start: int) -> int | None:
    """The most rows a device that fit, found in a few compilations: memory is nearly affine in the rows, so the line through
    two of them says where to look, and the result is compiled. Above 8, a multiple of 8.

    Args:
      peak: bytes that so many rows take; a compilation.
      memory: bytes there are.
      known: peaks that are known already.
      start: rows to begin with.

    Returns:
      Rows; None where not even one fits.
    """
    known = dict(known)

    def ask(rows: int) -> int:
        if rows not in known:
            known[rows] = peak(rows)
        return known[rows]

    ask(start)
    ask(start * 2 if known[start] <= memory else max(start // 2, 1))
    for _ in range(4):
        near = sorted(known, key=lambda rows: abs(known[rows] - memory))[:2]
        if len(near) < 2:
            break
        low, high = sorted(near)
        slope = (known[high] - known[low]) / (high - low)
        rows = max(int(low + (memory - known[low]) / slope), 1) if slope > 0 else high * 2
        rows = rows // 8 * 8 if rows > 8 else rows
        if rows in known or (ask(rows) <= memory and known[rows] > 0.97 * memory):
            break
    fitting = [rows for rows, size in known.items() if size <= memory]
    return max(fitting) if fitting else None


def run_length(config: ConfigDict) -> tuple[int | None, str]:
    """Steps of the run (None: not known), and where that is known from, or what is missing."""
    training, path = config.training, config.data.train_data_path
    if training.max_steps:
        return training.max_steps, "training.max_steps"
    if path is None:
        return None, "data.train_data_path and training.max_steps are not set: how long the run is is not known"
    try:
        rows = open_dataset(path, "data.train_data_path", config.data.seq_len).n_rows("train")
    except UserError:
        return None, f"no dataset at {path!r}: how long the run is is not known"
    return setup.total_steps(training, rows), f"{training.epochs} epochs of {rows:,} rows"
