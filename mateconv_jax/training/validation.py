"""The loss on text that training never sees."""

import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mateconv_jax.data import loader
from mateconv_jax.data.dataset import Rows
from mateconv_jax.data.tokenizer import token_bytes
from mateconv_jax.runtime import sharding
from mateconv_jax.training.preemption import Signals
from mateconv_jax.training.train_state import TrainState


def evaluate(
    eval_step,
    state: TrainState,
    rows: Rows,
    batch_size: int,
    max_batches: int,
    mesh: Mesh,
    bytes_per_token_V: np.ndarray,
    signals: Signals | None,
) -> dict[str, float] | None:
    """Mean cross-entropy in nats over the first `max_batches` batches: val/loss, and val/ema_loss when EMA is on; and
    val/bits_per_byte of the text, of the EMA when it is on. None where one of `signals` came before the end.
    """
    weights = {"val/loss": state.params}
    if state.ema_params is not None:
        weights["val/ema_loss"] = state.ema_params
    sums = {name: [] for name in weights}
    n_bytes = 0
    for batch in loader.validation_batches(rows, batch_size, max_batches):
        if signals is not None and signals.stop:
            return None
        n_bytes += token_bytes.target_bytes(bytes_per_token_V, batch)
        on_devices = sharding.to_devices(batch, mesh)
        for name, params in weights.items():
            sums[name].append(eval_step(params, on_devices))
    scalars = {}
    for name, pairs in jax.device_get(sums).items():
        loss_sum, count = np.sum(np.asarray(pairs, np.float64), axis=0)
        scalars[name] = float(loss_sum / count)
    loss = scalars.get("val/ema_loss", scalars["val/loss"])
    n_bytes = np.sum(multihost_utils.process_allgather(np.int64(n_bytes)))  # each process read its rows
    if n_bytes:
        scalars["val/bits_per_byte"] = float(loss * count / math.log(2) / n_bytes)
    return scalars
