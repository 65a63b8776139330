"""A run's programs and shapes, from a config and a mesh: training, planning and benchmarks build them here.

Nothing below this takes a ConfigDict: functions take plain values or the dataclasses of options that they declare.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mateconv_jax import config as config_lib, intervals
from mateconv_jax.errors import UserError
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.device import Device
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.runtime import sharding
from mateconv_jax.training import objective as objective_lib, optimizer, train_state
from mateconv_jax.training.batch_shape import START, Position
from mateconv_jax.training.objective import Objective
from mateconv_jax.training.optimizer import OptimizerOptions, ScheduleOptions
from mateconv_jax.training.step import StepOptions, make_eval_step, make_train_step
from mateconv_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run computes with.

    Attributes:
      c: the model's configuration for the devices of the mesh.
      graph, abstract_params: the model without its numbers.
      init: makes a fresh TrainState; called inside jit.
      abstract_state, abstract_batch: shapes with their shardings.
      train_step: jitted, (state, batch) -> (state, metrics); see step.make_train_step.
      eval_step: jitted, (params, batch) -> (sum, weight, metrics); see step.make_eval_step.
    """

    c: ModelConfig
    mesh: Mesh
    graph: nnx.GraphDef
    abstract_params: nnx.State
    init: Callable[[], TrainState]
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    train_step: jax.stages.Wrapped
    eval_step: Callable

    def fresh_state(self) -> TrainState:
        """On the mesh, sharded from birth."""
        return jax.jit(self.init, out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state))()


def model_config(config: ConfigDict, device: Device | None = None) -> ModelConfig:
    """The model of a (resolved) config, as trained on `device`; None: on this process's.

    Raises:
      UserError: see ModelConfig.make.
    """
    options, training = config_lib.options(ModelOptions, config.model), config.training
    return ModelConfig.make(options, training.dtype, device, config.data.seq_len, training.deterministic)


def build(
    config: ConfigDict, c: ModelConfig, mesh: Mesh, total_steps: int, objective: Objective | None = None, learned: bool = False
) -> Setup:
    """A run's programs.

    Args:
      config: resolved.
      c: made for the mesh's devices.
      total_steps: of the learning-rate schedule.
      objective: None: that of the config.
      learned: whether the dataset's rows say what is learned of them, for abstract_batch.

    Raises:
      UserError: the batch cannot be split over the mesh.
    """
    training = config.training
    sharding.check_batch_size(training.batch_size, mesh)
    graph, abstract_params = abstract_model(c)
    objective = objective or objective_lib.of(config)
    loss_fn = objective.loss_fn
    tx = optimizer.make_optimizer(config_lib.options(OptimizerOptions, training), c)
    schedule = optimizer.make_schedule(config_lib.options(ScheduleOptions, training), total_steps)
    init = functools.partial(train_state.init, c, tx, training.seed, training.use_ema)
    abstract_state = sharding.with_shardings(mesh, jax.eval_shape(init))
    return Setup(
        c=c,
        mesh=mesh,
        graph=graph,
        abstract_params=abstract_params,
        init=init,
        abstract_state=abstract_state,
        abstract_batch=objective.abstract_batch(mesh, learned),
        train_step=make_train_step(graph, loss_fn, tx, schedule, config_lib.options(StepOptions, training), abstract_state),
        eval_step=make_eval_step(graph, loss_fn),
    )


# ---- how long -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps.

    Attributes:
      total_steps: from the first to the last.
      eval_interval, save_interval, log_interval: between two evaluations, checkpoints, log lines.
      samples_interval: between two samples; None: no samples.
      tasks_interval: between two evaluations on benchmark questions.
    """

    total_steps: int
    eval_interval: int
    save_interval: int
    log_interval: int
    samples_interval: int | None
    tasks_interval: int

    @staticmethod
    def of(training: ConfigDict, n_rows: int, position: Position) -> "Length":
        """Of a run over a dataset of n_rows that stands at `position`.

        Raises:
          UserError: the run is shorter than one step, or keys contradict its length.
        """
        steps = total_steps(training, n_rows, position)
        rows_per_step = training.batch_size * training.accumulation_steps
        if steps <= 0:
            raise UserError(
                f"training.batch_size: a step takes {rows_per_step} rows, more than {training.epochs} epochs of the dataset's "
                f"{n_rows} rows (expected a smaller batch or more epochs)"
            )
        steps_per_epoch = n_rows / rows_per_step

        def interval(key: str) -> int:
            return intervals.steps(training[key], steps, steps_per_epoch)

        samples = None if training.samples_interval is None else interval("samples_interval")
        if samples is not None and not training.sample_prompts:
            raise UserError(
                "training.sample_prompts: empty, but training.samples_interval asks for samples (expected a prompt)"
            )
        _check_schedule(training, steps)
        tasks = interval("eval_interval" if training.eval_tasks_interval is None else "eval_tasks_interval")
        return Length(steps, interval("eval_interval"), interval("save_interval"), interval("log_interval"), samples, tasks)


def _check_schedule(training: ConfigDict, steps: int) -> None:
    """Raises UserError for keys that mean steps beyond the end of the run."""
    schedule = config_lib.options(ScheduleOptions, training)
    warmup_steps = optimizer.n_warmup_steps(schedule, steps)
    decay_steps = optimizer.n_decay_steps(schedule, steps) if schedule.lr_scheduler == "wsd" else 0
    if warmup_steps >= steps:
        raise UserError(f"training.warmup_steps: {warmup_steps}, but the run has {steps} steps (expected fewer)")
    if warmup_steps + decay_steps > steps:
        key = "warmup_ratio" if schedule.warmup_steps is None else "warmup_steps"
        raise UserError(
            f"training.decay_ratio: {training.decay_ratio} are {decay_steps} of the run's {steps} steps, but the warm-up takes "
            f"{warmup_steps} of them (expected a smaller decay_ratio or training.{key})"
        )
    if training.profile_step is not None and training.profile_step > steps:
        raise UserError(f"training.profile_step: {training.profile_step}, but the run has {steps} steps (expected fewer)")


def total_steps(training: ConfigDict, n_rows: int, position: Position = START) -> int:
    """training.max_steps, else the steps that are done and those that the rest of training.epochs over n_rows gives."""
    rows_per_step = training.batch_size * training.accumulation_steps
    return training.max_steps or position.step + math.floor((training.epochs * n_rows - position.rows) / rows_per_step)
