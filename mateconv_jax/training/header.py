"""What a run logs about itself before its first step."""

from collections.abc import Mapping

import jax
from absl import logging
from clu import parameter_overview
from flax import nnx

from mateconv_jax.data.mixture import Order
from mateconv_jax.data.rows import Rows
from mateconv_jax.model import flops
from mateconv_jax.runtime import device_memory, distributed
from mateconv_jax.training import mixing, resume
from mateconv_jax.training.batch_shape import BatchShape, Position
from mateconv_jax.training.objective import Objective
from mateconv_jax.training.setup import Setup


def log_header(
    programs: Setup,
    rows: Rows,
    order: Order | None,
    val_sets: Mapping[str, Rows],
    objective: Objective,
    total_steps: int,
    position: Position,
    start: str,
    differences: list[str],
) -> None:
    """What is about to happen. order: from `mixing.order_of`; position, start: from `resume.start`; differences: from both and
    `resume.check_compatible`.
    """
    c, shape = programs.c, objective.shape
    flops_per_token = flops.training_flops_per_token(c, shape.seq_len)
    peak_flops = flops.peak_flops(jax.devices()[0].device_kind, c.dtype)
    overview = parameter_overview.get_parameter_overview(nnx.to_pure_dict(programs.abstract_params), include_stats=False)
    logging.info("parameters:\n%s", overview)
    total, active = flops.parameters(c)
    of_which = f", {active:,} active per token; {c.experts} experts" if c.use_moe else ""
    logging.info("model: %s parameters%s, computed in %s, %s attention", f"{total:,}", of_which, c.dtype.name, c.attention)
    for reason in c.passed_over:
        logging.info("auto did not choose %s", reason)
    logging.info(
        "devices: %d process%s x %d %s, %d rows each",
        jax.process_count(), "es" * (jax.process_count() > 1), jax.local_device_count(), jax.devices()[0].device_kind,
        shape.batch_size // jax.device_count(),
    )  # fmt: skip
    if idle := distributed.idle_gpus():
        logging.warning("%d of this machine's GPUs are not used (CUDA_VISIBLE_DEVICES, or the tasks per node)", idle)
    datasets = f" in {len(order.parts)} datasets" if order is not None and len(order.parts) > 1 else ""
    logging.info(
        "data: %s rows of %s%d tokens%s, %s tokens per epoch; %.2f epochs in %s steps of %s tokens",
        f"{len(rows):,}", f"{shape.sequences} x " if shape.sequences > 1 else "", shape.seq_len, datasets,
        f"{len(rows) * shape.sequences * shape.seq_len:,}",
        total_steps * shape.rows / len(rows), f"{total_steps:,}", f"{shape.tokens:,}",
    )  # fmt: skip
    if order is not None:
        _log_mixture(order, position, total_steps, shape)
    peak = f"{peak_flops:.3g} FLOP/s" if peak_flops else "unknown"
    total = flops_per_token * total_steps * shape.tokens
    logging.info("compute: %.3g FLOPs per token, %.3g in total; peak per device: %s", flops_per_token, total, peak)
    logging.info("start: %s", start)
    expected = objective.expected_loss(c.vocab_size, start == resume.FROM_SCRATCH)
    if expected is not None and not position.step:
        logging.info("expected initial loss: %s", expected)

    for difference in differences:
        logging.warning("%s", difference)
    if not val_sets:
        logging.info("validation: none (there is no validation split and no data.val_data_path)")
    if any(val_sets):
        sets = ", ".join(f"{name} {len(rows):,}" for name, rows in val_sets.items())
        logging.info("validation: rows of %s; val/loss is that of %s", sets, next(iter(val_sets)))


def _log_mixture(order: Order, position: Position, total_steps: int, shape: BatchShape) -> None:
    now = order.read_before(position.rows)
    end = order.read_before(position.rows + max(0, total_steps - position.step) * shape.rows)
    for part, n_now, n_end in zip(order.parts, now, end, strict=True):
        so_far = f" ({n_now / part.n_rows:.2f} so far)" if n_now else ""
        logging.info(
            "data: %s from %s, %s rows: %.2f epochs in %s steps%s",
            mixing.share(part.count), part.name, f"{part.n_rows:,}", n_end / part.n_rows, f"{total_steps:,}", so_far,
        )  # fmt: skip


def log_memory(compiled: jax.stages.Compiled) -> None:
    """How much of a device's memory the compiled step needs (on the CPU, of the machine's)."""
    memory, beside_arguments = compiled.memory_analysis(), device_memory.of_program(compiled)
    if memory is None or beside_arguments is None:
        return
    state = memory.argument_size_in_bytes
    logging.info(
        "memory: the compiled step needs %.3g GB per device, %.3g of it for state and batch; %.3g available",
        (state + beside_arguments) / 1e9, state / 1e9, device_memory.available() / 1e9,
    )  # fmt: skip
