"""What a run says about itself before its first step."""

import math
import os

import jax
from absl import logging
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict

from mateconv_jax.data.dataset import Rows
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.training import resume


def log_header(
    config: ConfigDict,
    c: ModelConfig,
    abstract_params: nnx.State,
    rows: Rows,
    total_steps: int,
    start: str,
    differences: list[str],
    val_rows: Rows | None,
) -> None:
    """What is about to happen. start: from `resume.start`; differences: from `resume.check_compatible`."""
    training = config.training
    flops_per_token = flops.training_flops_per_token(c, config.data.seq_len)
    peak_flops = flops.peak_flops(jax.devices()[0].device_kind, c.dtype)
    overview = parameter_overview.get_parameter_overview(nnx.to_pure_dict(abstract_params), include_stats=False)
    logging.info("parameters:\n%s", overview)
    total, active = flops.parameters(c)
    of_which = f", of which a token meets {active:,}; {c.experts} experts" if c.use_moe else ""
    logging.info("model: %s parameters%s, computed in %s, %s attention", f"{total:,}", of_which, c.dtype.name, c.attention)
    for reason in c.passed_over:
        logging.info("auto did not choose %s", reason)
    rows_of_device = training.batch_size // jax.device_count()
    logging.info("devices: %d x %s, %d rows each", jax.device_count(), jax.devices()[0].device_kind, rows_of_device)
    rows_per_step = training.batch_size * training.accumulation_steps
    tokens_per_step = rows_per_step * config.data.seq_len
    logging.info(
        "data: %s rows of %d tokens, %s tokens an epoch; %.2f epochs in %s steps of %s tokens",
        f"{len(rows):,}", config.data.seq_len, f"{len(rows) * config.data.seq_len:,}",
        total_steps * rows_per_step / len(rows), f"{total_steps:,}", f"{tokens_per_step:,}",
    )  # fmt: skip
    peak = f"{peak_flops:.3g} FLOP/s" if peak_flops else "unknown"
    total = flops_per_token * total_steps * tokens_per_step
    logging.info("arithmetic: %.3g FLOPs a token, %.3g in all; a device's peak is %s", flops_per_token, total, peak)
    logging.info("start: %s", start)
    if start == resume.FROM_SCRATCH:
        vocab_size = config.model.vocab_size
        expected = math.log(vocab_size)
        logging.info("expected initial loss: ln(%s) = %.4f (a model that knows nothing)", f"{vocab_size:,}", expected)

    for difference in differences:
        logging.warning("%s", difference)
    if val_rows is None:
        logging.info("validation: none (there is no validation split and no data.val_data_path)")


def log_memory(compiled: jax.stages.Compiled) -> None:
    """What the compiled step takes of a device's memory (of this machine's, on the CPU)."""
    memory = compiled.memory_analysis()
    if memory is None:  # a backend that does not say
        return
    state = memory.argument_size_in_bytes
    total = state + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    stats = jax.local_devices()[0].memory_stats()
    limit = stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    logging.info(
        "memory: the compiled step takes %.3g GB a device, %.3g of them state and batch; there are %.3g",
        total / 1e9, state / 1e9, limit / 1e9,
    )  # fmt: skip
