"""A run's programs, compiled for given devices: training step, prefill and decoding."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mateconv_jax import weighted_paths
from mateconv_jax.data.dataset import Dataset, open_dataset
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.decode import Decoder, DecodeState
from mateconv_jax.inference.sampling import Sampling
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.kv_cache import make_kv_cache
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.planning.hlo_report import HloReport, read
from mateconv_jax.runtime import sharding
from mateconv_jax.training import setup
from mateconv_jax.training.setup import Setup
from mateconv_jax.training.step import lower, make_score_step

EOS = 2  # any id would do: it is a constant in the compiled program


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and its analysis.

    Attributes:
      arguments: {argument: bytes per device}.
      peak: bytes per device of arguments, results and temporaries at the worst moment, as planned by XLA.
      donated: bytes per device of arguments whose memory is reused for results.
    """

    compiled: jax.stages.Compiled
    report: HloReport
    arguments: dict[str, int]
    peak: int
    donated: int

    @staticmethod
    def compile(lowered: jax.stages.Lowered, arguments: dict) -> "Program":
        compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None and text is not None  # available on CPUs and GPUs
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        total += memory.output_size_in_bytes - memory.alias_size_in_bytes
        # On the CPU, peak_memory_in_bytes covers only the arguments.
        peak = memory.peak_memory_in_bytes if memory.peak_memory_in_bytes > memory.temp_size_in_bytes else total
        sizes = {name: _bytes_per_device(tree) for name, tree in arguments.items()}
        return Program(compiled, read(text), sizes, peak, memory.alias_size_in_bytes)


def _bytes_per_device(tree) -> int:
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def training_step(config: ConfigDict, c: ModelConfig, devices, steps: int) -> Setup:
    """What `mateconv_jax.train` would run with this resolved config on these devices.

    Raises:
      UserError: the mesh or the batch size does not fit the devices.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    return setup.build(config, c, mesh, steps, learned=_rows_say_what_is_learned(config))


def _rows_say_what_is_learned(config: ConfigDict) -> bool:
    """Of the datasets, if they are there already: rows of one alone give all batches the fields."""
    if config.data.train_data_path is None:
        return False
    try:
        return any(dataset.learned for dataset in training_datasets(config))
    except UserError:
        return False


def training_datasets(config: ConfigDict) -> list[Dataset]:
    """Those of data.train_data_path, which must not be None.

    Raises:
      UserError: there is none at one of the paths.
    """
    key = "data.train_data_path"
    return [open_dataset(path, key, config.data.seq_len) for path, _ in weighted_paths.parse(config.data.train_data_path, key)]


def compile_step(run: Setup) -> Program:
    """Compile the training step. XLA's and cuDNN's errors are passed on."""
    state, batch = run.abstract_state, run.abstract_batch
    parts = {"parameters": state.params, "EMA": state.ema_params, "optimizer": state.opt_state, "batch": batch}
    return Program.compile(lower(run.train_step, state, batch, run.c.deterministic), parts)


def random_batch(run: Setup, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch on the host of the run's shapes: random tokens in full rows, a document start every hundred tokens."""
    random, shapes = np.random.default_rng(seed), run.abstract_batch
    values = {
        "tokens": random.integers(0, 256, shapes["tokens"].shape, np.uint16),
        "length": np.full(shapes["length"].shape, shapes["tokens"].shape[-1], np.int32),
        "document_starts": random.random(shapes["tokens"].shape) < 0.01,
        "learned": random.random(shapes["tokens"].shape) < 0.5,
        "reference": random.normal(-100, 10, shapes["length"].shape),
        "advantage": random.normal(0, 1, shapes["length"].shape),
        "token_weight": np.full(shapes["length"].shape, 0.01),
        "old_log_probs": np.full(_targets(shapes), -1.0),
        "reference_log_probs": np.full(_targets(shapes), -1.0),
    }
    return {name: values[name].astype(x.dtype) for name, x in shapes.items()}


def _targets(shapes: dict[str, jax.ShapeDtypeStruct]) -> tuple[int, ...]:
    *rows, n_tokens = shapes["tokens"].shape
    return *rows, n_tokens - 1


def compile_scoring(run: Setup) -> Program:
    """Compile what scores a batch of pairs under the reference."""
    params, rows = run.abstract_state.params, sharding.batch(run.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=rows)
        for name, x in run.abstract_batch.items()
        if name != "reference"
    }
    lowered = make_score_step(run.graph, run.mesh).lower(params, batch)
    return Program.compile(lowered, {"parameters": params, "batch": batch})


def measure_scoring(run: Setup, compiled: jax.stages.Compiled, batches: int = 5) -> float:
    """Mean seconds per batch of random pairs."""
    params = run.fresh_state().params
    host = {name: x[0] for name, x in random_batch(run).items() if name != "reference"}
    batch = sharding.to_devices(host, run.mesh)
    jax.block_until_ready(compiled(params, batch))
    begin = time.perf_counter()
    jax.block_until_ready([compiled(params, batch) for _ in range(batches)])
    return (time.perf_counter() - begin) / batches


def measure(run: Setup, compiled: jax.stages.Compiled, seconds: float = 5.0) -> float:
    """Mean seconds per step with random tokens, over about `seconds` seconds, after two warm-up steps."""
    state, batch = run.fresh_state(), sharding.to_devices(random_batch(run), run.mesh, rows_axis=1)
    for is_warmup in (True, False):
        steps, metrics, begin = 0, None, time.perf_counter()
        while steps < 2 or not is_warmup and steps < 1000 and time.perf_counter() - begin < seconds:
            state, metrics = compiled(state, batch)
            steps += 1
            if steps % 10 == 0:  # bounds the steps in flight
                jax.block_until_ready(metrics)
        jax.block_until_ready(metrics)
    return (time.perf_counter() - begin) / steps


def prefill(c: ModelConfig, device: jax.Device, batch: int) -> Program:
    """The prefill of `batch` full contexts on one device."""
    decoder, params, state = _decoder(c, device, batch, c.max_seq_len)
    start = _on(device, jax.ShapeDtypeStruct((), jnp.int32))
    lowered = decoder.prefill.lower(params, state, start, S=c.max_seq_len)
    return Program.compile(lowered, {"parameters": params, "cache": state.kv_cache})


def decode_loop(
    c: ModelConfig, device: jax.Device, batch: int, config=GenerationConfig(), length: int | None = None
) -> Program:
    """The decode loop of `batch` rows with a cache of `length` (None: full-size), sampling as in `config`. Each iteration
    decodes a token.
    """
    decoder, params, state = _decoder(c, device, batch, length or c.max_seq_len)
    sampling = _on(device, jax.eval_shape(lambda: Sampling.make(config, jnp.zeros(batch, jnp.int32), c.vocab_size)))
    max_steps = _on(device, jax.ShapeDtypeStruct((), jnp.int32))
    lowered = decoder.loop.lower(params, state, sampling, max_steps)
    return Program.compile(lowered, {"parameters": params, "cache": state.kv_cache})


def _decoder(c: ModelConfig, device: jax.Device, B: int, T: int):
    """(a Decoder, abstract parameters in the compute dtype, an abstract DecodeState)."""
    graph, params = abstract_model(c)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, c.dtype), params)

    def empty():
        zeros_B = jnp.zeros(B, jnp.int32)
        return DecodeState(
            tokens_BT=jnp.zeros((B, T), jnp.int32), length_B=zeros_B, prompt_length_B=zeros_B, remaining_B=zeros_B,
            finished_B=jnp.zeros(B, bool), kv_cache=make_kv_cache(c, B, T),
        )  # fmt: skip

    return Decoder(graph, c, (EOS,)), _on(device, params), _on(device, jax.eval_shape(empty))


def _on(device: jax.Device, tree):
    on_device = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), tree)
