"""What an optimizer step takes: memory and seconds, from its compiled program, or estimated where nothing can be compiled."""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict

from mateconv_jax.planning import target
from mateconv_jax.planning.expected import expected_seconds
from mateconv_jax.planning.plan import Cluster, make_plan
from mateconv_jax.planning.roofline import Roofline
from mateconv_jax.planning.rules import Shape

# Parameters and MFU, measured on one H100 (benchmarks/README.md, "On one H100"), for where no step can be compiled.
# Interpolated over the logarithm of the parameters, constant beyond.
MEASURED_MFU = ((27e6, 0.264), (118e6, 0.379), (336e6, 0.443), (988e6, 0.454))


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Attributes:
    memory, available: bytes of a device: what the step takes at its peak, and what JAX may use.
    seconds: of an optimizer step, expected.
    seconds_at_best: by the GPU's data sheet; None: not computed.
    memory_from, seconds_from: in words.
    """

    memory: int
    available: int
    seconds: float
    seconds_at_best: float | None
    memory_from: str
    seconds_from: str

    @property
    def fits(self) -> bool:
        return self.memory <= self.available


def compiled(config: ConfigDict, cluster: Cluster, log=lambda text: None) -> StepCost:
    """Of a resolved config, from the program that XLA makes of its training step; on this machine's devices also measured.

    Raises:
      UserError: the config does not fit the devices.
    """
    plan = make_plan(config, cluster, search=False, log=log)
    memory = plan["training"]["memory"]
    sizes = memory["peak"], memory["available"]
    if cluster.is_local:
        return StepCost(*sizes, plan["measured"]["seconds"], None, "compiled here", "measured here")
    bounds = Roofline(**{field.name: plan["training"]["roofline"][field.name] for field in dataclasses.fields(Roofline)})
    cards = [m.card for m in cluster.measured if m.program == "training step" and m.dtype == plan["dtype"]]
    # Where no such GPU was measured, the slowdowns of the one that was measured most.
    card = cluster.name if cluster.name in cards else max(cards, key=cards.count, default="")
    likely = expected_seconds(bounds, "training step", plan["dtype"], card, cluster.measured)
    if likely is None:
        how = f"the bound by the data sheet: no step was measured in {plan['dtype']}"
        return StepCost(*sizes, bounds.seconds, bounds.seconds, "compiled for this GPU", how)
    how = ("expected from " if card == cluster.name else "as far above the bound as ") + likely.source
    return StepCost(*sizes, likely.seconds, bounds.seconds, "compiled for this GPU", how)


def estimated(config: ConfigDict, gpu: target.Gpu, devices: int) -> StepCost:
    """Of a resolved config of a Shape, without compiling it."""
    training, shape = config.training, Shape(config.model.dim, config.model.n_layers)
    fsdp = devices if config.mesh.fsdp != 1 else 1
    parameters = shape.parameters(config.model.vocab_size)
    micro_batch = training.batch_size // devices * config.data.seq_len
    memory = estimated_memory(shape, config.model.vocab_size, micro_batch, training.remat != "none", fsdp)
    tokens = training.batch_size * training.accumulation_steps * config.data.seq_len
    mfu = measured_mfu(parameters)
    attention = 6 * shape.n_layers * config.data.seq_len * shape.dim
    seconds = tokens * (6 * parameters + attention) / (mfu * gpu.half * devices) * (4 / 3 if training.remat == "full" else 1)
    available = target.usable_memory(gpu)
    how = f"the model's FLOPs at {mfu:.0%} of the GPU's peak, as measured on one H100"
    return StepCost(memory, available, seconds, None, "an estimate: nothing was compiled", how)


def estimated_memory(shape: Shape, vocab_size: int, tokens: int, remat: bool, fsdp: int = 1) -> int:
    """Bytes of a device at the peak of a training step.

    Args:
      tokens: of a micro-batch, on one device.
      remat: training.remat is full.
      fsdp: devices that parameters and optimizer state are spread over.
    """
    state = 16 * shape.parameters(vocab_size) / fsdp  # fp32: parameters, both moments, gradients
    kept = 2 * shape.dim  # a block's input
    queries = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    block = 2 * (5 * shape.dim + queries + 3 * shape.hidden_dim)
    activations = shape.n_layers * kept + block if remat else shape.n_layers * block
    return int(state + tokens * (activations + 4 * vocab_size))


def measured_mfu(parameters: float) -> float:
    sizes, mfu = zip(*MEASURED_MFU, strict=True)
    return float(np.interp(math.log(parameters), np.log(sizes), mfu))
