"""Predict a run's memory, speed and cost from its compiled programs."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mateconv_jax.config_keys import REWARD_LOSSES
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.decode import SMALLEST_CACHE, bucket
from mateconv_jax.model import flops
from mateconv_jax.model.attention import cudnn
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.device import Device
from mateconv_jax.planning import expected as expected_lib, measurements, programs, target
from mateconv_jax.planning.hlo_report import Collective
from mateconv_jax.planning.programs import Program
from mateconv_jax.planning.roofline import roofline
from mateconv_jax.runtime import device_memory
from mateconv_jax.training import objective as objective_lib, setup

DECODE_BATCHES = (1, 16)
ASSUMED_STEPS = 10_000  # of the schedule, if the run's length is unknown; does not affect any shape

UNKNOWN = (
    "Which kernel each matmul gets, and so how far it stays below the bound: XLA autotunes on the GPU itself.",
    "Memory of cuDNN, NCCL and the CUDA context, on top of XLA's plan: often 1 to 2 GB.",
    "The real speed of the network between hosts, what else uses it, and whether the input pipeline keeps up.",
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The devices to plan for.

    Attributes:
      name: jax's device kind.
      gpu: its data sheet; None if unknown.
      devices: all of them.
      hosts: machines they are spread over.
      memory: bytes per device that JAX may use.
      is_local: these are this process's own devices, not descriptions of others.
      measured: on any GPU.
    """

    name: str
    gpu: target.Gpu | None
    devices: list[jax.Device]
    hosts: int
    memory: int
    is_local: bool
    measured: Sequence[measurements.Measurement] = ()

    @staticmethod
    def named(name: str, count: int, hosts: int) -> "Cluster":
        """`count` GPUs, of a name in target.GPUS, that need not exist here.

        Raises:
          UserError: see target.by_name, target.devices and measurements.load.
        """
        gpu, measured = target.by_name(name), measurements.load(measurements.PATH)
        # JAX preallocates this fraction; a program that needs more runs out of memory.
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
        devices, memory = target.devices(gpu, count, hosts), int(fraction * gpu.memory)
        return Cluster(gpu.device_kind, gpu, devices, hosts, memory, False, measured)

    @staticmethod
    def local() -> "Cluster":
        """The devices of this process (and those it is connected to)."""
        devices = jax.devices()
        kind = devices[0].device_kind
        memory, measured = device_memory.available(), measurements.load(measurements.PATH)
        return Cluster(kind, target.by_device_kind(kind), devices, jax.process_count(), memory, True, measured)


def make_plan(
    config: ConfigDict, cluster: Cluster, dollars_per_gpu_hour: float | None = None, search: bool = True, log=lambda text: None
) -> dict:
    """The plan as a JSON object, in bytes, seconds and FLOPs.

    Args:
      config: resolved.
      cluster: the devices to plan for.
      dollars_per_gpu_hour: to add the run's cost.
      search: also search for the largest batch and plan decoding, about eight more compilations.
      log: called with progress messages.

    Raises:
      UserError: the config does not fit the devices, or cuDNN rejects the attention.
    """
    device = Device.here() if cluster.is_local or cluster.gpu is None else cluster.gpu.device
    c = setup.model_config(config, device)
    steps, length = run_length(config)
    training_steps = steps or ASSUMED_STEPS

    def compile_step(config: ConfigDict) -> Program:
        log(f"compiling the training step: {config.training.batch_size} rows, remat {config.training.remat}")
        training_step = programs.training_step(config, c, cluster.devices, training_steps)
        with cudnn.clear_rejections():
            return programs.compile_step(training_step)

    if cluster.gpu is not None and not cluster.is_local:
        with target.compiling_for(cluster.gpu):
            return _plan(config, c, cluster, compile_step, steps, length, dollars_per_gpu_hour, search, log)
    return _plan(config, c, cluster, compile_step, steps, length, dollars_per_gpu_hour, search, log)


def _plan(config, c, cluster, compile_step, steps, length, dollars_per_gpu_hour, search, log) -> dict:
    count = len(cluster.devices)
    n_params = sum(p.size for p in jax.tree.leaves(programs.abstract_model(c)[1]))
    objective = objective_lib.of(config)
    tokens_per_step = objective.shape.tokens
    flops_per_token = flops.training_flops_per_token(c, config.data.seq_len)

    def speed(seconds: float) -> dict:
        return _speed(seconds, tokens_per_step, flops_per_token, c, cluster)

    begin = time.perf_counter()
    step = compile_step(config)
    plan: dict[str, Any] = {
        "device": cluster.name,
        "devices": count,
        "hosts": cluster.hosts,
        "jax": jax.__version__,
        "parameters": n_params,
        "dtype": c.dtype.name,
        "attention": c.attention,
        "passed_over": c.passed_over,
        "rows_per_device": config.training.batch_size // count,
        "tokens_per_step": tokens_per_step,
        "compile_seconds": round(time.perf_counter() - begin, 1),
        "training": _program(step, c, cluster, "training step") | {"flops_of_model": flops_per_token * tokens_per_step / count},
    }
    training = plan["training"]
    training["flops_ratio"] = training["flops"] / training["flops_of_model"]
    if cluster.gpu:
        training |= speed(training["roofline"]["seconds"])
        plan["expected_from"] = expected_lib.source(cluster.measured, "training step", c.dtype.name, cluster.name)
    if "expected" in training:
        training["expected"] |= speed(training["expected"]["seconds"])
    if cluster.is_local:
        log("measuring the training step")
        training_step = programs.training_step(config, c, cluster.devices, steps or ASSUMED_STEPS)
        seconds = programs.measure(training_step, step.compiled)
        plan["measured"] = {"seconds": seconds} | speed(seconds)
    if search:
        plan["largest_rows_per_device"] = _largest_batches(config, cluster, compile_step, step.peak)
        plan["decoding"] = [_decoding(c, cluster, batch, log) for batch in DECODE_BATCHES]
    if objective.needs_reference:
        log("compiling the scoring of the reference")
        plan["reference"] = _reference(config, c, cluster, training_steps=steps or ASSUMED_STEPS)
    if objective.content == "prompts":
        plan["rollout"] = _rollout(config, c, cluster, plan["training"], log)
    training["memory"] |= _checkpoint_copy(training["memory"], cluster)
    plan["run"] = _whole_run(plan, steps, length, dollars_per_gpu_hour)
    plan["unknown"] = [] if cluster.is_local else list(UNKNOWN)
    if cluster.gpu is None:
        plan["unknown"].append(f"The peak speed of a {cluster.name}: no data sheet values for it.")
    return plan


def _decoding(c: ModelConfig, cluster: Cluster, rows: int, log) -> dict:
    """Prefill of full contexts, and decoding a token."""
    log(f"compiling prefill and decoding: {rows} rows")
    prefill, loop = (compile(c, cluster.devices[0], rows) for compile in (programs.prefill, programs.decode_loop))
    step = _program(loop, c, cluster, "decoding step")
    if "expected" in step:
        step["expected"]["tokens_per_second"] = rows / step["expected"]["seconds"]
    return {"rows": rows, "prefill": _program(prefill, c, cluster), "step": step}


def _checkpoint_copy(memory: dict, cluster: Cluster) -> dict:
    """The copy of the state that a checkpoint is written from, and whether training can go on beside it. At most one is alive.
    Where it does not fit, or the limit or what is in use is not known to JAX, a save waits until the state is on the host.
    """
    size = sum(memory["parts"][part] for part in ("parameters", "EMA", "optimizer"))
    return {"checkpoint_copy": size, "fits_with_copy": memory["peak"] + size <= cluster.memory}


def _whole_run(plan: dict, steps: int | None, length: str, dollars_per_gpu_hour: float | None) -> dict:
    """Steps, tokens, hours and cost, as far as they are known. Scoring a reference counts at best: it was never measured."""
    run: dict[str, Any] = {"steps": steps, "length_from": length, "tokens": steps and steps * plan["tokens_per_step"]}
    training, price = plan["training"], dollars_per_gpu_hour
    rollout, reference = plan.get("rollout", {}), plan.get("reference", {}).get("seconds") or 0.0

    def cost(step: dict, per_rollout: float | None, prefix: str = "") -> dict:
        hours = (steps * (plan["tokens_per_step"] / step["tokens_per_second"] + (per_rollout or 0)) + reference) / 3600
        costs = {"hours": hours, "gpu_hours": hours * plan["devices"]}
        if price is not None:
            costs["dollars"] = costs["gpu_hours"] * price
        return {prefix + name: value for name, value in costs.items()}

    best = plan.get("measured", training)
    if steps and "tokens_per_second" in best:
        run |= cost(best, rollout.get("seconds_per_step"))
    if steps and "expected" in training and "measured" not in plan:
        run |= cost(training["expected"], rollout.get("expected_seconds_per_step"), "expected_")
    return run


def _reference(config: ConfigDict, c: ModelConfig, cluster: Cluster, training_steps: int) -> dict:
    """The pass over all pairs before the first step: pairs, seconds (None: unknown) and its program."""
    run = programs.training_step(config, c, cluster.devices, training_steps)
    with cudnn.clear_rejections():
        scoring = programs.compile_scoring(run)
    described = _program(scoring, c, cluster)
    per_batch = described.get("roofline", {}).get("seconds")
    if cluster.is_local:
        per_batch = programs.measure_scoring(run, scoring.compiled)
    pairs = _rows(config, ("train", "validation"))
    batches = pairs and -(-pairs // config.training.batch_size)
    seconds = batches * per_batch if batches and per_batch else None
    return {"pairs": pairs, "seconds_per_batch": per_batch, "seconds": seconds} | described


def _rollout(config: ConfigDict, c: ModelConfig, cluster: Cluster, training: dict, log) -> dict:
    """The answers of a step on one device: rows decoded at a time, the program that decodes a token, the memory at the worst
    moment and, at best and as expected, seconds for each step if all answers are of full length (None: unknown). With KL the
    reference's weights are added here and to `training`.
    """
    log("compiling the decoding of answers")
    rollout, rows = config.rollout, config.training.batch_size // len(cluster.devices)
    how = GenerationConfig(temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)
    length = bucket(config.data.seq_len + 1, c.max_seq_len, SMALLEST_CACHE)
    loop = programs.decode_loop(c, cluster.devices[0], rows, how, length)
    described = _program(loop, c, cluster, "decoding step")
    parts = training["memory"]["parts"]
    decoding, state = described["memory"], {name: parts[name] for name in ("parameters", "EMA", "optimizer")}
    if config.loss.beta:
        state["reference"] = parts["reference"] = parts["parameters"] * c.dtype.itemsize // 4
        training["memory"]["peak"] += state["reference"]
        training["memory"]["fits"] = training["memory"]["peak"] <= cluster.memory
    decoding["parts"]["decoding weights"] = decoding["parts"].pop("parameters")
    decoding["parts"] = state | decoding["parts"]
    decoding["peak"] += sum(state.values())
    decoding["fits"] = decoding["peak"] <= cluster.memory
    decoded = rollout.max_new_tokens * config.training.accumulation_steps / rollout.iterations  # tokens a step, in turn
    a_token, expected = described.get("roofline", {}).get("seconds"), described.get("expected", {}).get("seconds")
    seconds = {"seconds_per_step": a_token and a_token * decoded, "expected_seconds_per_step": expected and expected * decoded}
    return {"rows": rows} | seconds | described


def _rows(config: ConfigDict, splits: tuple[str, ...]) -> int | None:
    """Rows of the training data's splits; None: it is not there."""
    if config.data.train_data_path is None:
        return None
    try:
        return sum(dataset.n_rows(split) for dataset in programs.training_datasets(config) for split in splits)
    except UserError:
        return None


def _program(program: Program, c: ModelConfig, cluster: Cluster, kind: str | None = None) -> dict:
    """`kind`: one of measurements.PROGRAMS, to say what time is expected of it."""
    report = program.report
    known = sum(program.arguments.values())
    result: dict[str, Any] = {
        "memory": {
            "peak": program.peak,
            "available": cluster.memory,
            "fits": program.peak <= cluster.memory,
            "parts": program.arguments | {"temporaries": program.peak - known},
            "donated": program.donated,
        },
        "flops": report.flops(),
        "fused_attention": {
            direction: round(sum(a.times for a in report.attention if a.direction == direction))
            for direction in ("forward", "backward")
        },
        "products": {
            dtypes: {"count": n, "flops": flops_of_class} for dtypes, (n, flops_of_class) in report.matmuls_by_dtype().items()
        },
        "collectives": [_collective(collective) for collective in report.collectives],
        "launches": report.launches(),
        "launches_by_kind": report.launches_by_kind(),
    }
    if cluster.gpu:
        bounds = roofline(report, cluster.gpu, len(cluster.devices), cluster.hosts)
        result["roofline"] = dataclasses.asdict(bounds) | {"seconds": bounds.seconds, "bound": bounds.bound}
        if kind and (of := expected_lib.expected_seconds(bounds, kind, c.dtype.name, cluster.name, cluster.measured)):
            result["expected"] = dataclasses.asdict(of)
    return result


def _collective(collective: Collective) -> dict:
    return {
        "what": collective.opcode,
        "dtype": "+".join(collective.dtypes),
        "bytes": collective.bytes,
        "times": collective.times,
        "devices": collective.devices,
        "asynchronous": collective.is_async,
        "kernels_beside": len(collective.overlapping),
    }


def _speed(seconds: float, tokens: int, flops_per_token: float, c: ModelConfig, cluster: Cluster) -> dict:
    speed = {"tokens_per_second": tokens / seconds}
    if peak := flops.peak_flops(cluster.name, c.dtype):
        speed["mfu"] = tokens * flops_per_token / seconds / (peak * len(cluster.devices))
    return speed


def _largest_batches(config: ConfigDict, cluster: Cluster, compile_step, planned_peak: int) -> dict[str, int | None]:
    """{training.remat: rows per device}. `planned_peak`: of the config as it is."""
    count = len(cluster.devices)
    rows = config.training.batch_size // count

    def largest(remat: str) -> int | None:
        def peak(rows: int) -> int:
            larger = config.copy_and_resolve_references()
            larger.training.update(dict(batch_size=rows * count, remat=remat))
            return compile_step(larger).peak

        return largest_batch(peak, cluster.memory, {rows: planned_peak} if config.training.remat == remat else {}, rows)

    return {remat: largest(remat) for remat in ("none", "full")}


def largest_batch(peak: Callable[[int], int], memory: int, known: dict[int, int], start: int) -> int | None:
    """The largest number of rows per device that fits, found in a few compilations: memory is nearly affine in the rows, so the
    line through two known points predicts where to look next. The result itself was compiled. Above 8, a multiple of 8.

    Args:
      peak: rows -> peak memory in bytes; compiles the program.
      memory: available bytes.
      known: {rows: peak} that are known already.
      start: rows to begin with.

    Returns:
      Rows, or None if not even one fits.
    """
    known = dict(known)

    def peak_of(rows: int) -> int:
        if rows not in known:
            known[rows] = peak(rows)
        return known[rows]

    peak_of(start)
    peak_of(start * 2 if known[start] <= memory else max(start // 2, 1))
    for _ in range(4):
        near = sorted(known, key=lambda rows: abs(known[rows] - memory))[:2]
        if len(near) < 2:
            break
        low, high = sorted(near)
        slope = (known[high] - known[low]) / (high - low)
        rows = max(int(low + (memory - known[low]) / slope), 1) if slope > 0 else high * 2
        rows = rows // 8 * 8 if rows > 8 else rows
        if rows in known or (peak_of(rows) <= memory and known[rows] > 0.97 * memory):
            break
    fitting = [rows for rows, size in known.items() if size <= memory]
    return max(fitting) if fitting else None


def run_length(config: ConfigDict) -> tuple[int | None, str]:
    """The run's steps (None: unknown), and what determines them or what is missing."""
    training, path = config.training, config.data.train_data_path
    if training.max_steps:
        return training.max_steps, "training.max_steps"
    if path is None:
        return None, "unknown length: neither data.train_data_path nor training.max_steps is set"
    if config.loss.kind in REWARD_LOSSES:
        return _prompts_length(config, path)
    try:
        rows = sum(dataset.n_rows("train") for dataset in programs.training_datasets(config))
    except UserError:
        return None, f"unknown length: no dataset at {path!r}"
    return setup.total_steps(training, rows), f"{training.epochs} epochs of {rows:,} rows"


def _prompts_length(config: ConfigDict, path: str) -> tuple[int | None, str]:
    """See run_length."""
    try:
        with open(path, "rb") as file:
            prompts = sum(bool(line.strip()) for line in file)
    except OSError:
        return None, f"unknown length: no file at {path!r}"
    rows = prompts * config.rollout.samples * config.rollout.iterations
    return setup.total_steps(config.training, rows), f"{config.training.epochs} epochs of {prompts:,} prompts"
